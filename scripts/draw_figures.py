"""Draws the figures of the documentation from the results kept beside them.

Run: python scripts/draw_figures.py
"""

import json
import pathlib

from jaxformers.train.figure import plot_loss

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / 'experiments' / 'results'
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


if __name__ == '__main__':
  main()
