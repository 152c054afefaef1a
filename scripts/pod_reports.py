"""Which meshes large models fit, and how fast they could be there.

`python scripts/pod_reports.py` searches meshes and recomputation for the models of
`experiments/lm_1b.py` and `experiments/lm_8b.py` on slices of TPU, as `jaxformers
compile --search` does, which needs `pip install 'jaxformers[tpu]'` and half an hour.
It writes what was found to `launch/reports/` and, as tables, to `docs/pods.md`;
`--tables` writes the tables from those files alone.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

from jaxformers.aot.report import Report

ROOT = pathlib.Path(__file__).parents[1]
REPORTS = ROOT / 'launch' / 'reports'
PAGE = ROOT / 'docs' / 'pods.md'
# Each with the axes that are not searched.
SEARCHES = {
  'lm_1b_v5e_64': ('lm_1b', 'v5e:8x8', 'data=1'),
  'lm_8b_v5e_256': ('lm_8b', 'v5e:16x16', 'data=1'),
  'lm_8b_v5p_256': ('lm_8b', 'v5p:4x8x8', 'data=1'),
  'lm_8b_v6e_256': ('lm_8b', 'v6e:16x16', 'data=1'),
}
BEGIN = """# Large models on pods that are not here

What the compiler of TPUs says of train steps, ranked as `jaxformers compile --search`
ranks them: those that fit, fastest first. Nothing was run. Times are estimates at the
peak rates of the hardware's data sheets: if arithmetic, memory and communication
overlap wholly, and if not at all. Utilisation is that of the former, and counts no
recomputation. `--fast` was used, which hardly changes the memory.
"""


def search(experiment: str, topology: str, mesh: str) -> list[dict]:
  """Compiles the candidates and returns their reports, best first."""
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / 'reports.json'
    path = ROOT / 'experiments' / f'{experiment}.py'
    words = [sys.executable, '-m', 'jaxformers', 'compile', str(path), '--fast']
    words += ['--topology', topology, '--mesh', mesh, '--search']
    subprocess.run([*words, '--json', str(out)], check=True, cwd=ROOT)
    return json.loads(out.read_text())


def page() -> str:
  """Returns the tables of all searches."""
  lines = [BEGIN]
  for name, (experiment, topology, mesh) in SEARCHES.items():
    trees = json.loads((REPORTS / f'{name}.json').read_text())
    reports = [Report.from_json(tree) for tree in trees]
    versions = ', '.join(f'{k} {v}' for k, v in reports[0].versions.items())
    lines += [
      f'## `{experiment}` on {topology}',
      '',
      f'`jaxformers compile experiments/{experiment}.py --topology {topology} '
      f'--mesh {mesh} --search --fast`, {versions}.',
      '',
      '| mesh | recomputation | memory per chip | step | utilisation '
      '| sent per chip |',
      '| --- | --- | --- | --- | --- | --- |',
      *map(row, reports),
      '',
    ]
  return '\n'.join(lines)


def row(report: Report) -> str:
  """Returns the line of a candidate."""
  mesh = ' '.join(f'{k}={n}' for k, n in report.mesh.items() if n > 1)
  memory = 'unknown'
  if report.peak_bytes is not None:
    memory = f'{report.peak_bytes / 2**30:.1f} GiB'
  rest = ['does not fit', '', '']
  if report.fits:
    estimate = report.estimate()
    sent = sum(t.sent + t.sent_far for t in report.traffic)
    least = estimate['step_seconds']
    most = estimate['step_seconds_without_overlap']
    rest = [
      f'{least:.2f} to {most:.2f} s',
      f'{estimate["utilisation"]:.0%}',
      f'{sent / 2**30:.1f} GiB',
    ]
  cells = [mesh, report.remat or 'none', memory, *rest]
  return '| ' + ' | '.join(cells) + ' |'


def main() -> None:
  """Runs the command."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--tables', action='store_true')
  if not parser.parse_args().tables:
    REPORTS.mkdir(parents=True, exist_ok=True)
    for name, found in SEARCHES.items():
      reports = json.dumps(search(*found), indent=1)
      (REPORTS / f'{name}.json').write_text(reports + '\n')
  PAGE.write_text(page())


if __name__ == '__main__':
  main()
