"""Draws the figures of the documentation and writes its page on the studies.

Both come from the committed results alone.

Run: python scripts/draw_figures.py
"""

import json
import pathlib

from jaxformers.cli import experiment_file
from jaxformers.train import read_report
from jaxformers.train.figure import draw_study
from jaxformers.train.figure import plot_loss

ROOT = pathlib.Path(__file__).parent.parent
EXPERIMENTS = ROOT / 'experiments'
RESULTS = EXPERIMENTS / 'results'
FIGURES = ROOT / 'docs' / 'figures'
PAGE = ROOT / 'docs' / 'studies.md'
HEAD = """# Claims put to the test

Each study is a file in `experiments/` that fixes its criteria before it runs. Figures and numbers are those of the committed results in
`experiments/results/`; what does not hold is reported like what does. Minutes were taken while the machine did other work as well.

"""


def main() -> None:
  """Draws all of them."""
  lm = json.loads((RESULTS / 'lm.json').read_text())
  plot_loss(
    RESULTS / 'lm_metrics.jsonl',
    FIGURES / 'lm_loss.png',
    title='A small byte-level Transformer learns the King James Bible',
    baselines={lm['baseline']: lm['baseline_bits_per_byte']},
  )
  for result in study_results():
    draw_result(result)
  PAGE.write_text(studies_page())


def study_results() -> list[pathlib.Path]:
  """Returns the result files of all studies."""
  return [
    path
    for path in sorted(RESULTS.glob('*.json'))
    if 'study' in json.loads(path.read_text())
  ]


def studies_page() -> str:
  """Returns the page that lists the studies with what came of them."""
  return HEAD + '\n'.join(_section(path) for path in study_results())


def _section(result: pathlib.Path) -> str:
  """Returns the part of the page on one study."""
  found = json.loads(result.read_text())
  name, minutes = result.stem, found['minutes']
  rows = [
    f'| {j["statement"]} | {j["seen"]:.4g} | {j["relation"]} {j["bound"]:.4g} '
    f'| {"holds" if j["holds"] else "does not hold"} |'
    for j in found['judgements']
  ]
  return f"""## {name.replace('_', ' ').capitalize()}: {found['verdict']}

{found['claim']} ({found['source']})

| criterion | seen | wanted | |
| --- | --- | --- | --- |
{chr(10).join(rows)}

![{found['claim']}](figures/{name}.png)

`jaxformers reproduce experiments/{name}.py`, {minutes:.1f} minutes on {found['device']}, {_seeds(found)}.
"""


def draw_result(result: pathlib.Path) -> None:
  """Draws the figure of a study from its result alone.

  Args:
    result: NAME.json, written by the study in NAME.py.
  """
  module = experiment_file.load(EXPERIMENTS / f'{result.stem}.py')
  report = read_report(result, experiment_file.classes_with(module))
  draw_study(report, FIGURES / f'{result.stem}.png')


def _seeds(found: dict) -> str:
  """Says how many seeds a study was measured with."""
  count = len(found['study']['seeds'])
  return f'{count} seeds' if count > 1 else 'one seed'


if __name__ == '__main__':
  main()
