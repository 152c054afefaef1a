"""Which meshes large models fit, and how fast they could be there.

`python scripts/pod_reports.py` searches meshes and recomputation for the models of
`experiments/lm_1b.py` and `experiments/lm_8b.py` on slices of TPU, as `jaxformers
compile --search --fast` does, and compiles the best of each search again with all
optimisations. That needs the compiler of `requirements-tpu.lock` and an hour. It
writes what was found to `launch/reports/` and, as tables, to `docs/pods.md`;
`--best` compiles only the best of the kept searches, and `--tables` writes the
tables from the files alone.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from jaxformers.aot import Report
from jaxformers.aot import ranking

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
BEST = 2
"""How many of each search are compiled again."""
BEGIN = """# Large models on pods that are not here

What the compiler of TPUs says of train steps, ranked as `jaxformers compile --search`
ranks them: those that fit, fastest first. Nothing was run. Times are estimates at the
peak rates of the hardware's data sheets: if arithmetic, memory and communication
overlap wholly, and if not at all. Utilisation is that of the former, and counts no
recomputation.

The first table of each machine has the two best of the search, compiled as a run
compiles them. The second has all candidates, compiled with `--fast`: that says what
fits, and which to compile again, but what they read, write and send is not quite that
of a run.

With `fsdp=256` on v5p:4x8x8 the compiler gathers parameters by all-reduces, with
`--fast` and without, and so sends more than on v5e.
"""


def compiled(experiment: str, *words: str) -> Any:
  """Returns what `jaxformers compile` reports."""
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / 'reports.json'
    path = ROOT / 'experiments' / f'{experiment}.py'
    command = [sys.executable, '-m', 'jaxformers', 'compile', str(path), *words]
    subprocess.run([*command, '--json', str(out)], check=True, cwd=ROOT)
    return json.loads(out.read_text())


def search(name: str) -> None:
  """Compiles all candidates and keeps their reports, best first."""
  experiment, topology, mesh = SEARCHES[name]
  words = '--topology', topology, '--mesh', mesh, '--search', '--fast'
  write(f'{name}_fast', compiled(experiment, *words))


def compile_best(name: str) -> None:
  """Compiles the best of a search with all optimisations, and keeps that."""
  experiment, topology, _ = SEARCHES[name]
  found = []
  for report in read(f'{name}_fast')[:BEST]:
    mesh = ','.join(f'{axis}={size}' for axis, size in report.mesh.items())
    words = ['--topology', topology, '--mesh', mesh]
    words += ['--set', f'model.stack.remat={report.remat!r}']
    found.append(Report.from_json(compiled(experiment, *words)))
  write(name, [report.to_json() for report in ranking(found)])


def write(name: str, reports: list[dict[str, Any]]) -> None:
  """Keeps reports."""
  REPORTS.mkdir(parents=True, exist_ok=True)
  text = json.dumps(reports, indent=1)
  (REPORTS / f'{name}.json').write_text(text + '\n')


def read(name: str) -> list[Report]:
  """Returns reports that were kept."""
  trees = json.loads((REPORTS / f'{name}.json').read_text())
  return [Report.from_json(tree) for tree in trees]


def page() -> str:
  """Returns the tables of all searches."""
  lines = [BEGIN]
  for name, (experiment, topology, mesh) in SEARCHES.items():
    best, candidates = read(name), read(f'{name}_fast')
    command = f'jaxformers compile experiments/{experiment}.py'
    lines += [
      f'## `{experiment}` on {topology}',
      '',
      f'`{command} --topology {topology} --mesh ...`, {versions(best)}.',
      '',
      *table(best),
      '',
      f'All candidates: `{command} --topology {topology} --mesh {mesh} --search '
      f'--fast`, {versions(candidates)}.',
      '',
      *table(candidates),
      '',
    ]
  return '\n'.join(lines)


def versions(reports: list[Report]) -> str:
  """Returns what compiled the reports."""
  [text] = {
    ', '.join(f'{k} {v}' for k, v in r.versions.items()) for r in reports
  }
  return text


def table(reports: list[Report]) -> list[str]:
  """Returns the lines of a table."""
  return [
    '| mesh | recomputation | memory per chip | step | utilisation '
    '| sent per chip |',
    '| --- | --- | --- | --- | --- | --- |',
    *map(row, reports),
  ]


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
  parser.add_argument('--best', action='store_true')
  parser.add_argument('--tables', action='store_true')
  arguments = parser.parse_args()
  if not arguments.tables:
    for name in SEARCHES:
      if not arguments.best:
        search(name)
      compile_best(name)
  PAGE.write_text(page())


if __name__ == '__main__':
  main()
