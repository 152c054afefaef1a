"""The curves of one or several runs: a panel for each thing that was measured."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from jaxformers.pages.drawing import drawn
from jaxformers.pages.markup import Html
from jaxformers.pages.markup import fold
from jaxformers.pages.markup import join
from jaxformers.pages.markup import table
from jaxformers.pages.markup import tag
from jaxformers.pages.recorded import RecordedRun
from jaxformers.train.figure import COLOURS
from jaxformers.train.figure import PALETTE
from jaxformers.train.figure import smooth

_SIZE = (4.6, 2.7)  # inches, at letters of 10 points: readable on a phone
# What people look at first. All else follows in the order of the files.
_FIRST = (
  'bits_per_byte', 'loss', 'cross_entropy', 'learning_rate', 'gradient_norm',
)  # fmt: skip
# The number that a mean was taken over, and what differs from tokens per second
# by a factor only.
_NOT_DRAWN = frozenset({'targets', 'steps_per_second'})
_EARLY = 0.05  # this part of a run may leave the top of the picture
_ROWS = 40  # of the numbers below a picture
_SMOOTHED_PARTS = 60
_WORDS = {'train': 'training', 'heldout': 'held-out', 'timing': ''}


@dataclasses.dataclass(frozen=True)
class Series:
  """One line of a panel.

  Attributes:
    run: its number among those of the page.
    label: what the line is called.
    split: what was measured on.
    colour: in hexadecimal.
    rows: `[N, 2]`: step and value, which may be nan or infinite.
  """

  run: int
  label: str
  split: str
  colour: str
  rows: np.ndarray

  @property
  def finite(self) -> np.ndarray:
    """The rows whose value is finite."""
    return self.rows[np.isfinite(self.rows).all(axis=1)]

  @property
  def is_points(self) -> bool:
    """Whether each value is marked, as those of evaluations are."""
    return self.split == 'heldout' or len(self.finite) == 1


def curves(runs: Sequence[RecordedRun]) -> Html:
  """Draws all that was measured on the way.

  Args:
    runs: One, or several to lay over one another.
  """
  panels = {name: _series(runs, name) for name in _names(runs)}
  constant = {n: s for n, s in panels.items() if _is_constant(s)}
  shown = [
    _panel(name, series, _baselines(runs, name))
    for name, series in panels.items()
    if name not in constant
  ]
  if not shown and not constant:
    return tag('p', 'Nothing has been measured yet.')
  notes = [_constant_note(name, series) for name, series in constant.items()]
  return join(_legend(runs), tag('div', *shown, class_='panels'), *notes)


def _names(runs: Sequence[RecordedRun]) -> list[str]:
  """Names what was measured in any run, the most wanted first."""
  splits = ('heldout', 'train', 'timing')
  names = [n for run in runs for split in splits for n in run.names(split)]
  order = {name: place for place, name in enumerate(_FIRST)}
  ordered = sorted(dict.fromkeys(names), key=lambda n: order.get(n, len(order)))
  return [name for name in ordered if name not in _NOT_DRAWN]


def _series(runs: Sequence[RecordedRun], name: str) -> list[Series]:
  found = []
  for number, run in enumerate(runs):
    for split in run.metrics:
      rows = run.curve(split, name)
      words = [run.name if len(runs) > 1 else '', _WORDS.get(split, split)]
      label = ', '.join(filter(None, words)) or name
      if len(rows):
        colour = PALETTE[number % len(PALETTE)]
        if len(runs) == 1:
          colour = COLOURS.get(split, colour)
        found.append(Series(number, label, split, colour, rows))
  return found


def _baselines(runs: Sequence[RecordedRun], name: str) -> dict[str, float]:
  """Returns what other models reached, by name."""
  if name != 'bits_per_byte':
    return {}
  return {label: bits for run in runs for label, bits in run.baselines.items()}


def _is_constant(series: Sequence[Series]) -> bool:
  """Whether a panel would show nothing but one number."""
  values = np.concatenate([s.rows[:, 1] for s in series])
  return len(values) > 1 and np.isfinite(values).all() and np.ptp(values) == 0


def _constant_note(name: str, series: Sequence[Series]) -> Html:
  value = series[0].rows[0, 1]
  return tag(
    'p', tag('code', name), f' was {value:.6g} throughout.', class_='note'
  )


def _dashes(run: int) -> str:
  """Tells runs apart that share a colour."""
  return ('-', '--', ':', '-.')[run // len(PALETTE) % 4]


def _legend(runs: Sequence[RecordedRun]) -> Html:
  if len(runs) == 1:
    keys = [('training', 'c0', ''), ('held-out', 'c1', '')]
  else:
    keys = [
      (run.name, f'c{i % len(PALETTE)}', 'dashed' * (i >= len(PALETTE)))
      for i, run in enumerate(runs)
    ]
  if any(run.baselines for run in runs):
    keys.append(('baseline', 'grey', 'dashed'))
  keys = [
    tag('span', label, class_=f'key {c}'.strip(), style=f'--colour: var(--{v})')
    for label, v, c in keys
  ]
  note = '; points are held-out' * (len(runs) > 1)
  explained = f'thin lines: every step, thick lines: smoothed{note}.'
  return tag('p', *keys, tag('span', explained, class_='note'))


def _panel(
  name: str, series: Sequence[Series], baselines: dict[str, float]
) -> Html:
  """Draws one panel, with its numbers folded away below it."""

  def draw(figure: Any) -> None:
    axes = figure.subplots()
    for bits in baselines.values():
      axes.axhline(bits, color=COLOURS['baseline'], linestyle=(0, (5, 3)))
    for one in series:
      _draw_series(axes, one)
    _set_limits(axes, series, list(baselines.values()))
    axes.set_xlabel('step')

  lines = [_in_words(one) for one in series]
  lines += [f'{label}: {bits:.4g}' for label, bits in baselines.items()]
  picture = drawn(draw, _SIZE, f'{name}. {". ".join(lines)}.')
  notes = [
    tag('p', line, class_='note') for one in series for line in _gaps(one)
  ]
  notes += [
    tag('p', f'{label}: {bits:.4g}', class_='note')
    for label, bits in baselines.items()
  ]
  heading = tag('h3', tag('code', name))
  return tag(
    'figure', heading, picture, *notes, _numbers(name, series), class_='card'
  )


def _draw_series(axes: Any, one: Series) -> None:
  """Draws points, or a line, which is smoothed if it goes up and down."""
  steps, values = one.rows.T
  values = np.where(np.isfinite(values), values, np.nan)
  line = {'color': one.colour, 'linestyle': _dashes(one.run)}
  if one.is_points:
    axes.plot(steps, values, **line, linewidth=1, marker='o', markersize=4)
  elif _is_noisy(one.finite[:, 1]):
    axes.plot(steps, values, color=one.colour, alpha=0.4, linewidth=0.7)
    steps, values = one.finite.T
    window = max(5, len(values) // _SMOOTHED_PARTS)
    axes.plot(steps, smooth(values, window), **line)
  else:
    axes.plot(steps, values, **line)


def _is_noisy(values: np.ndarray) -> bool:
  """Whether a curve goes up and down by several times its range."""
  return len(values) > 5 and np.abs(np.diff(values)).sum() > 3 * np.ptp(values)


def _set_limits(
  axes: Any, series: Sequence[Series], baselines: Sequence[float]
) -> None:
  """Shows all but the first steep part."""
  last = max(one.rows[-1, 0] for one in series)
  axes.set_xlim(0, last * 1.02 or 1)
  axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
  finite = np.concatenate([one.finite for one in series])
  late = finite[finite[:, 0] > _EARLY * last, 1]
  if not len(late):
    return
  low = min([finite[:, 1].min(), *baselines])
  high = max([late.max(), *baselines])
  margin = 0.06 * (high - low) or 0.1 * abs(high) or 0.1
  axes.set_ylim(low - margin, high + margin)


def _in_words(one: Series) -> str:
  """Describes a line to those who cannot see it."""
  values = one.finite[:, 1]
  if not len(values):
    return f'{one.label}: never finite'
  return (
    f'{one.label}: {values[0]:.4g} at first, {values[-1]:.4g} at last,'
    f' between {values.min():.4g} and {values.max():.4g}'
  )


def _gaps(one: Series) -> list[str]:
  """Says where a line has no value that could be drawn."""
  bad = one.rows[~np.isfinite(one.rows[:, 1])]
  if not len(bad):
    return []
  count = f'{len(bad)} values were' if len(bad) > 1 else 'one value was'
  return [f'{one.label}: {count} not finite, first at step {bad[0, 0]:.0f}.']


def _numbers(name: str, series: Sequence[Series]) -> Html:
  """Writes what was drawn as a table, some steps of many."""
  steps = np.unique(np.concatenate([one.rows[:, 0] for one in series]))
  shown = _some(steps)
  points = [_some(one.rows[:, 0]) for one in series if one.is_points]
  chosen = np.unique(np.concatenate([shown, *points]))
  columns = [dict(one.rows.tolist()) for one in series]
  rows = [
    [f'{step:.0f}', *(_cell(c.get(step)) for c in columns)] for step in chosen
  ]
  heading = ['step', *(one.label for one in series)]
  part = f'{len(chosen)} of ' * (len(chosen) < len(steps))
  return fold(f'{part}{len(steps)} steps', table(heading, rows, caption=name))


def _some(steps: np.ndarray) -> np.ndarray:
  """Picks steps evenly, the first and the last among them."""
  if len(steps) <= _ROWS:
    return steps
  return steps[np.linspace(0, len(steps) - 1, _ROWS).round().astype(int)]


def _cell(value: float | None) -> str:
  return '' if value is None else f'{value:.6g}'
