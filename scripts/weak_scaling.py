"""Weak scaling on paper: what chips send each other as their number grows.

The model of `experiments/lm_1b.py` is compiled for 8, 64, 256 and 1024 chips of
TPU v5e (four slices of 256) with the same number of rows per chip, and what each
chip sends in a step is read from the compiled programs. Divided by the speed of
its links and of its network, and beside the time of its arithmetic, it says how
far the model scales before communication is what takes longest.

`python scripts/weak_scaling.py` compiles, which needs
`pip install 'jaxformers[tpu]'` and a quarter of an hour, and writes
`launch/reports/weak_scaling.json`; `--draw` draws `docs/figures/weak_scaling.png`
from it alone.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / 'launch' / 'reports' / 'weak_scaling.json'
FIGURE = ROOT / 'docs' / 'figures' / 'weak_scaling.png'
ROWS = 4
MACHINES = {
  8: ('v5e:2x4', 'fsdp=8'),
  64: ('v5e:8x8', 'fsdp=64'),
  256: ('v5e:16x16', 'fsdp=256'),
  1024: ('4*v5e:16x16', 'dcn=4,fsdp=256'),
}


def compiled(chips: int) -> dict:
  """Compiles the train step for that many chips and returns its report."""
  topology, mesh = MACHINES[chips]
  experiment = ROOT / 'experiments' / 'lm_1b.py'
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / 'report.json'
    words = [sys.executable, '-m', 'jaxformers', 'compile', str(experiment)]
    words += ['--topology', topology, '--mesh', mesh]
    words += ['--set', f'batch_size={ROWS * chips}', '--json', str(out)]
    subprocess.run(words, check=True, cwd=ROOT)
    return json.loads(out.read_text())


def draw() -> None:
  """Draws the figure from the results."""
  import matplotlib

  matplotlib.use('agg')
  import matplotlib.pyplot as plt

  from jaxformers.train.figure import COLOURS
  from jaxformers.train.figure import PALETTE

  reports = json.loads(RESULTS.read_text())
  chips = sorted(map(int, reports))
  sent, seconds = {}, {}
  for count in chips:
    report = reports[str(count)]
    for t in report['traffic']:
      bytes_sent = (t['sent'] + t['sent_far']) / 2**30
      sent.setdefault(t['kind'], dict.fromkeys(chips, 0.0))[count] = bytes_sent
    for name in ('compute', 'memory', 'links', 'network'):
      value = report['estimate'][f'{name}_seconds']
      seconds.setdefault(name, []).append(1e3 * value or float('nan'))
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3.4), layout='constrained'
  )
  base = [0.0] * len(chips)
  for colour, (kind, by_chips) in zip(PALETTE, sent.items(), strict=False):
    heights = [by_chips[count] for count in chips]
    left.bar(range(len(chips)), heights, 0.6, base, color=colour, label=kind)
    base = [a + b for a, b in zip(base, heights, strict=True)]
  left.set_xticks(range(len(chips)), chips)
  left.set_ylabel('GiB sent per chip and step')
  left.set_ylim(top=1.3 * max(base))
  left.legend(fontsize=8, ncols=2, loc='upper right')
  for colour, (name, values) in zip(PALETTE, seconds.items(), strict=False):
    right.plot(chips, values, 'o-', color=colour, label=name)
  right.set_xscale('log', base=2)
  right.set_yscale('log')
  right.set_xticks(chips, chips)
  right.set_ylabel('ms per step at peak rates')
  right.legend(fontsize=8)
  for axes in (left, right):
    axes.set_xlabel('chips (TPU v5e)')
    axes.spines[['top', 'right']].set_visible(False)
    axes.tick_params(colors=COLOURS['text'])
  figure.suptitle(
    f'A model of a billion parameters, {ROWS} rows of 4096 bytes per chip',
    fontsize=10,
  )
  figure.savefig(FIGURE, dpi=150)


def main() -> None:
  """Runs the command."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--draw', action='store_true')
  if not parser.parse_args().draw:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    reports = {str(chips): compiled(chips) for chips in MACHINES}
    RESULTS.write_text(json.dumps(reports, indent=2) + '\n')
  draw()


if __name__ == '__main__':
  main()
