"""Draws the figures of the documentation from the results kept beside them.

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


def main() -> None:
  """Draws all of them."""
  lm = json.loads((RESULTS / 'lm.json').read_text())
  plot_loss(
    RESULTS / 'lm_metrics.jsonl',
    FIGURES / 'lm_loss.png',
    title='A small byte-level Transformer learns the King James Bible',
    baselines={lm['baseline']: lm['baseline_bits_per_byte']},
  )
  for result in sorted(RESULTS.glob('*.json')):
    if 'study' in json.loads(result.read_text()):
      draw_result(result)


def draw_result(result: pathlib.Path) -> None:
  """Draws the figure of a study from its result alone.

  Args:
    result: NAME.json, written by the study in NAME.py.
  """
  module = experiment_file.load(EXPERIMENTS / f'{result.stem}.py')
  report = read_report(result, experiment_file.classes_with(module))
  draw_study(report, FIGURES / f'{result.stem}.png')


if __name__ == '__main__':
  main()
