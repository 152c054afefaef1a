"""The loss curve of a run and the result of a study as pictures.

Every figure of the project takes its size, fonts and colours from here.
"""

from collections.abc import Mapping, Sequence
import math
import os
import textwrap
from typing import Any

import numpy as np

from jaxformers.train.metrics import read_metrics
from jaxformers.train.report import Report

SIZE = (1200, 750)  # pixels
DPI = 150
FONT = 'DejaVu Sans'  # comes with matplotlib, so that pictures are the same
FONT_SIZE = 10
TITLE_SIZE = 12
COLOURS = {
  'train': '#2a6fbb',
  'heldout': '#d1495b',
  'baseline': '#7a7a7a',
  'text': '#222222',
  'grid': '#e4e4e4',
}
# For what is compared, in this order; grey is for baselines.
PALETTE = ('#2a6fbb', '#d1495b', '#3a8f5c', '#e09f3e', '#7b5ea7', '#2a9d9d')
_SMOOTHED_PARTS = 60  # the window of the smooth curve is the run over this
_SHOWN_QUANTILE = 0.97
_HEADING_WIDTH = 82  # letters


def plot_loss(
  metrics_path: str | os.PathLike[str],
  figure_path: str | os.PathLike[str],
  *,
  title: str,
  baselines: Mapping[str, float] | None = None,
  tokens_per_step: float | None = None,
) -> None:
  """Draws the loss of a run over its steps into a PNG of 1200 x 750 pixels.

  The unit is bits: $loss / \\ln 2$ per token, or, where the held-out lines have
  `bits_per_byte`, bits per byte, the training loss being divided by the tokens
  per byte of the held-out text. The first steps may leave the top of the
  picture, so that the rest can be read.

  Args:
    metrics_path: a `metrics.jsonl` with lines of the splits `train` and
      `heldout`; `cross_entropy` is preferred to `loss` (both in nats).
    figure_path: the PNG to write.
    title: what the run is called.
    baselines: bits by name, drawn as dashed lines.
    tokens_per_step: if given, a second axis counts tokens.

  Raises:
    ValueError: the file holds no loss.
  """
  train, heldout, unit = _curves(read_metrics(metrics_path))
  if not len(train) and not len(heldout):
    raise ValueError(
      f'{metrics_path} holds no finite loss to draw; train for at least one'
      ' step first.'
    )
  figure, axes = _canvas(title, top=0.83 if tokens_per_step else 0.9)
  axes.set_xlabel('step')
  axes.set_ylabel(unit)
  _draw_train(axes, train)
  _draw_heldout(axes, heldout)
  for bits in (baselines or {}).values():
    axes.axhline(
      bits, color=COLOURS['baseline'], linestyle=(0, (5, 3)), linewidth=1.2
    )
  _set_limits(axes, train, heldout, list((baselines or {}).values()))
  _label(axes, _labels(train, heldout, baselines or {}))
  if tokens_per_step:
    _add_tokens(axes, tokens_per_step)
  figure.savefig(figure_path, format='png', dpi=DPI)


def draw_study(report: Report, figure_path: str | os.PathLike[str]) -> None:
  """Draws the result of a study into a PNG of 1200 x 750 pixels.

  Claim and verdict stand above what the study draws.

  Args:
    report: what came of the study.
    figure_path: the PNG to write.
  """
  import matplotlib
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  with matplotlib.rc_context(style()):
    size = [pixels / DPI for pixels in SIZE]
    figure = Figure(size, DPI, facecolor='white', layout='constrained')
    FigureCanvasAgg(figure)
    claim = textwrap.wrap(report.study.claim, _HEADING_WIDTH)
    height = 0.05 * len(claim) + 0.06
    top, bottom = figure.subfigures(2, 1, height_ratios=(height, 1 - height))
    _write_heading(top, '\n'.join(claim), _summary(report))
    report.study.draw(report.results, bottom)
    figure.savefig(figure_path, format='png', dpi=DPI)


def _write_heading(part: Any, claim: str, summary: str) -> None:
  part.text(0.01, 0.9, claim, fontsize=TITLE_SIZE, va='top')
  part.text(0.01, 0.1, summary, color=COLOURS['baseline'], va='bottom')


def _summary(report: Report) -> str:
  held = sum(judgement.holds for judgement in report.judgements)
  count = len(report.results.seeds)
  return (
    f'{report.verdict}: {held} of {len(report.judgements)} criteria hold; '
    f'{count} seed{"s" * (count > 1)}'
  )


def plot_band(axes: Any, x: Any, y: Any, **style: Any) -> None:
  """Draws the mean over seeds as a line, and their range as a band.

  Args:
    axes: where to.
    x: `[N]`.
    y: `[seeds, N]`, as `Results.values` gives it; nan leaves gaps.
    **style: of the line, such as `label` and `color`.
  """
  y = np.asarray(y)
  (line,) = axes.plot(x, y.mean(axis=0), **style)
  if len(y) > 1:
    low, high = y.min(axis=0), y.max(axis=0)
    colour = line.get_color()
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def style() -> dict[str, Any]:
  """Returns the style of the project as matplotlib's settings."""
  from cycler import cycler

  return {
    'font.family': FONT,
    'font.size': FONT_SIZE,
    'text.color': COLOURS['text'],
    'axes.labelcolor': COLOURS['text'],
    'axes.titlesize': FONT_SIZE,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'axes.prop_cycle': cycler(color=PALETTE),
    'grid.color': COLOURS['grid'],
    'grid.linewidth': 0.8,
    'xtick.labelsize': FONT_SIZE - 1,
    'ytick.labelsize': FONT_SIZE - 1,
    'legend.fontsize': FONT_SIZE - 1,
    'legend.frameon': False,
    'lines.linewidth': 1.8,
  }


def _curves(lines: Sequence[Mapping[str, Any]]) -> tuple[Any, Any, str]:
  """Returns `[N, 2]` arrays of (step, bits) of both splits, and their unit."""
  nats = {split: _column(lines, split) for split in ('train', 'heldout')}
  bits = {k: x / [1.0, math.log(2)] for k, x in nats.items()}
  per_byte = _column(lines, 'heldout', ('bits_per_byte',))
  if not len(per_byte) or len(per_byte) != len(bits['heldout']):
    return bits['train'], bits['heldout'], 'bits per token'
  per_token = np.maximum(bits['heldout'][:, 1], 1e-9)
  tokens_per_byte = np.median(per_byte[:, 1] / per_token)
  return bits['train'] * [1.0, tokens_per_byte], per_byte, 'bits per byte'


def _column(
  lines: Sequence[Mapping[str, Any]],
  split: str,
  names: Sequence[str] = ('cross_entropy', 'loss'),
) -> np.ndarray:
  """Returns `[N, 2]`: step and the first of `names`, where it is finite."""
  rows = [
    (line['step'], next(line[name] for name in names if name in line))
    for line in lines
    if line.get('split') == split and any(name in line for name in names)
  ]
  rows = np.array(rows, np.float64).reshape(-1, 2)
  return rows[np.isfinite(rows).all(axis=1)]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
  """Averages over a centred window, cut off where the values end.

  Centred, unlike an exponential average, so that the curve does not lag.
  Towards the start the window shrinks from both sides, or the steep part would
  be averaged with what follows it; at the end only what is not there is left
  out.

  Args:
    values: float `[N]`.
    window: how many values to average; made odd.

  Returns:
    float `[N]`.
  """
  half = window // 2
  sums = np.concatenate([[0.0], np.cumsum(values)])
  index = np.arange(len(values))
  reach = np.minimum(half, index)
  start, stop = index - reach, np.minimum(index + reach + 1, len(values))
  return (sums[stop] - sums[start]) / (stop - start)


def _smoothed(train: np.ndarray) -> np.ndarray:
  """Returns the smooth training curve, `[N]`."""
  return smooth(train[:, 1], max(5, len(train) // _SMOOTHED_PARTS))


def _canvas(title: str, top: float) -> tuple[Any, Any]:
  """Returns a figure in the style of the project, and axes up to `top`."""
  # The object interface: pyplot would keep every figure and ask for a screen.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure([pixels / DPI for pixels in SIZE], DPI, facecolor='white')
  FigureCanvasAgg(figure)
  axes = figure.add_axes((0.085, 0.115, 0.735, top - 0.115))
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(color=COLOURS['grid'], linewidth=0.8)
  axes.set_axisbelow(True)
  axes.tick_params(labelsize=FONT_SIZE - 1, labelfontfamily=FONT)
  for axis in (axes.xaxis, axes.yaxis):
    axis.label.set(fontfamily=FONT, fontsize=FONT_SIZE, color=COLOURS['text'])
  axes.xaxis.get_major_locator().set_params(integer=True)
  axes.xaxis.set_major_formatter(lambda value, _: f'{value:,.0f}')
  style = {'fontfamily': FONT, 'fontsize': TITLE_SIZE}
  figure.text(0.085, 0.955, title, va='center', color=COLOURS['text'], **style)
  return figure, axes


def _draw_train(axes: Any, train: np.ndarray) -> None:
  """Draws every step lightly and the smooth curve over it."""
  if not len(train):
    return
  colour = COLOURS['train']
  axes.plot(*train.T, color=colour, alpha=0.25, linewidth=0.7)
  marker = 'o' if len(train) == 1 else None
  axes.plot(
    train[:, 0], _smoothed(train), color=colour, linewidth=1.8, marker=marker
  )


def _draw_heldout(axes: Any, heldout: np.ndarray) -> None:
  """Draws the held-out points."""
  axes.plot(
    *heldout.T,
    color=COLOURS['heldout'],
    linewidth=1.0,
    marker='o',
    markersize=4.5,
    markeredgecolor='white',
    markeredgewidth=0.7,
    zorder=3,
  )


def _set_limits(axes, train, heldout, baselines) -> None:
  """Shows all but the first steep part of the curve."""
  last = max(rows[-1, 0] for rows in (train, heldout) if len(rows))
  axes.set_xlim(0, last * 1.01)
  late = heldout[heldout[:, 0] > 0.1 * last, 1]
  wanted = [*late, *baselines]
  if len(train):
    wanted += [train[:, 1].min(), np.quantile(train[:, 1], _SHOWN_QUANTILE)]
  wanted = wanted or list(heldout[:, 1])
  low, high = min(wanted), max(wanted)
  margin = 0.06 * (high - low) or 0.1
  axes.set_ylim(max(low - margin, 0.0), high + margin)


def _labels(train, heldout, baselines) -> list[tuple[float, str, str]]:
  """Returns height, text and colour of what is written beside the curves."""
  labels = [
    (bits, f'{name}\n{bits:.3f}', COLOURS['baseline'])
    for name, bits in baselines.items()
  ]
  if len(heldout):
    bits = heldout[-1, 1]
    labels.append((bits, f'held-out\n{bits:.3f}', COLOURS['heldout']))
  if len(train):
    bits = _smoothed(train)[-1]
    labels.append((bits, f'training\n{bits:.3f}', COLOURS['train']))
  return labels


def _label(axes: Any, labels: Sequence[tuple[float, str, str]]) -> None:
  """Writes labels beside the right end of the curves, none over another."""
  low, high = axes.get_ylim()
  labels = sorted(labels)
  heights = _spread([(bits - low) / (high - low) for bits, _, _ in labels])
  for height, (_, text, colour) in zip(heights, labels, strict=True):
    axes.text(
      1.015,
      height,
      text,
      color=colour,
      transform=axes.transAxes,
      verticalalignment='center',
      fontfamily=FONT,
      fontsize=FONT_SIZE - 1,
      linespacing=1.15,
    )


def _spread(heights: Sequence[float], gap: float = 0.085) -> np.ndarray:
  """Moves sorted heights apart as little as it takes, within 0 and 1."""
  offsets = gap * np.arange(len(heights))
  # Isotonic regression by pooling neighbours that are out of order.
  pools: list[list[float]] = []
  for value in np.asarray(heights) - offsets:
    pools.append([value])
    while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
      pools[-2:] = [pools[-2] + pools[-1]]
  free = [np.mean(pool) for pool in pools for _ in pool]
  highest = max(1.0 - offsets[-1], 0.0) if len(heights) else 0.0
  return np.clip(free, 0.0, highest) + offsets


def _add_tokens(axes: Any, tokens_per_step: float) -> None:
  """Adds an axis that counts tokens."""
  from matplotlib.ticker import EngFormatter

  top = axes.secondary_xaxis(
    'top',
    functions=(lambda x: x * tokens_per_step, lambda x: x / tokens_per_step),
  )
  top.set_xlabel(
    'tokens', fontfamily=FONT, fontsize=FONT_SIZE, color=COLOURS['text']
  )
  top.tick_params(labelsize=FONT_SIZE - 1, labelfontfamily=FONT)
  top.xaxis.set_major_formatter(EngFormatter(sep=''))
