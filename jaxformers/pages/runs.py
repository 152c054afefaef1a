"""The page of one run, or of several beside each other."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from jaxformers.pages.curves import curves
from jaxformers.pages.markup import Html
from jaxformers.pages.markup import escape
from jaxformers.pages.markup import facts
from jaxformers.pages.markup import fold
from jaxformers.pages.markup import join
from jaxformers.pages.markup import table
from jaxformers.pages.markup import tag
from jaxformers.pages.page import page
from jaxformers.pages.page import section
from jaxformers.pages.recorded import RecordedRun
from jaxformers.train import record as records

_ABSENT = object()


def runs_page(runs: Sequence[RecordedRun], classes: Mapping[str, type]) -> str:
  """Writes the page of runs.

  Args:
    runs: One, or several to compare.
    classes: Classes that the configurations may name; their defaults tell what
      was chosen.
  """
  if len(runs) == 1:
    title, summary = f'Run {runs[0].name}', facts(_summary(runs[0]))
    difference = ''
  else:
    title = f'Runs {", ".join(run.name for run in runs)}'
    summary = _side_by_side(runs, [_summary(run) for run in runs], 'Summary')
    difference = section('What differs', _differences(runs))
  return page(
    title,
    summary,
    difference,
    section('Curves', curves(runs)),
    section('Samples', *(_sample(run, len(runs) == 1) for run in runs)),
    section('Configuration', *_configurations(runs, classes)),
    section('Environment', _environment(runs)),
  )


def _summary(run: RecordedRun) -> dict[str, str]:
  """Returns the numbers that matter most, by name."""
  found = {'state': _state(run), **_heldout(run), **_baselines(run)}
  train = run.curve('train', 'loss')
  if len(train):
    found['training loss'] = f'{train[-1, 1]:.4g}'
  speed = run.curve('timing', 'tokens_per_second')[:, 1]
  if len(speed):
    found['tokens per second'] = f'{np.median(speed):,.0f} (median)'
  rates = run.curve('timing', 'steps_per_second')[:, 1]
  if len(rates):
    found['time in steps'] = f'about {_duration((1 / rates).sum())}'
  if run.checkpoints:
    found['saved'] = ', '.join(f'{step:,}' for step in run.checkpoints)
  return found


def _baselines(run: RecordedRun) -> dict[str, str]:
  """Returns what other models reached on the same held-out text, by name."""
  return {
    f'{label}, bits per byte': f'{bits:.4g}'
    for label, bits in run.baselines.items()
  }


def _state(run: RecordedRun) -> str:
  wanted = run.record.get('steps', 0)
  if run.step >= wanted:
    return f'finished after {run.step:,} steps'
  where = f'at step {run.step:,} of {wanted:,}' if run.step else 'not begun'
  last = run.metrics.get('train', [{}])[-1]
  values = [value for name, value in last.items() if name != 'split']
  is_bad = run.step and not np.isfinite(values).all()
  return f'{where}, where a number was not finite' if is_bad else where


def _heldout(run: RecordedRun) -> dict[str, str]:
  """Returns the last evaluation and the lowest one."""
  for name in ('bits_per_byte', 'loss'):
    rows = run.curve('heldout', name)
    if len(rows):
      break
  else:
    return {'held-out': 'not evaluated yet'}
  label = f'held-out {name.replace("_", " ")}'
  found = {label: f'{rows[-1, 1]:.4g} at step {rows[-1, 0]:,.0f}'}
  finite = rows[np.isfinite(rows[:, 1])]
  if len(finite):
    step, lowest = finite[finite[:, 1].argmin()]
    found['lowest held-out'] = f'{lowest:.4g} at step {step:,.0f}'
  return found


def _duration(seconds: float) -> str:
  if seconds < 120:
    return f'{seconds:.1f} seconds'
  minutes = seconds / 60
  return (
    f'{minutes:.1f} minutes' if minutes < 120 else f'{minutes / 60:.1f} hours'
  )


def _side_by_side(
  runs: Sequence[RecordedRun], found: Sequence[Mapping[str, str]], caption: str
) -> Html:
  """Writes what is known of each run as the columns of a table."""
  names = dict.fromkeys(name for one in found for name in one)
  rows = [[name, *(one.get(name, '') for one in found)] for name in names]
  return table(['', *(run.name for run in runs)], rows, caption=caption)


def _differences(runs: Sequence[RecordedRun]) -> Html:
  places = records.differing([run.record for run in runs])
  if not places:
    return tag('p', 'Nothing in their configurations.')
  rows = [
    [tag('code', _breakable(path)), *(tag('code', x) for x in values)]
    for path, values in places
  ]
  heading = ['setting', *(run.name for run in runs)]
  return table(heading, rows, caption='Settings that differ')


def _breakable(path: str) -> Html:
  """Lets a long path go on in another line."""
  return Html(escape(path or 'experiment').replace('.', '.<wbr>'))


def _sample(run: RecordedRun, is_alone: bool) -> Html:
  name = '' if is_alone else tag('h3', run.name)
  if run.sample is None:
    return join(name, tag('p', 'No text: it is drawn when a run has finished.'))
  preview = run.record.get('preview') or {}
  settings = ('prompt', 'tokens', 'temperature', 'top_p')
  asked = (f'{s} {preview[s]!r}' for s in settings if s in preview)
  note = tag('p', ', '.join(asked), class_='note')
  return join(name, note, tag('pre', run.sample, dir='auto'))


def _configurations(
  runs: Sequence[RecordedRun], classes: Mapping[str, type]
) -> Iterator[Html]:
  """Writes each configuration as a tree that can hide what is a default."""
  for number, run in enumerate(runs):
    box = f'chosen-{number}'
    tree = tag(
      'div',
      tag('input', type='checkbox', id=box),
      tag(
        'label', 'only what differs from the defaults of its class', for_=box
      ),
      _tree(run.record, classes),
      class_='tree',
    )
    yield tree if len(runs) == 1 else fold(run.name, tree)


def _tree(record: records.Record, classes: Mapping[str, type]) -> Html:
  """Writes the settings of an object, or of several, as a list."""
  if isinstance(record, list):
    pairs = [(str(i), value, _ABSENT) for i, value in enumerate(record)]
  else:
    defaults = _defaults(classes.get(record['class']))
    pairs = [
      (name, value, defaults.get(name, _ABSENT))
      for name, value in record.items()
      if name != 'class'
    ]
  return tag('ul', *(_leaf(*pair, classes) for pair in pairs))


def _leaf(name: str, value: Any, default: Any, classes) -> Html:
  kind = 'default' if value == default else None
  if not records.is_branch(value):
    return tag('li', f'{name} = {records.describe(value)}', class_=kind)
  title = value['class'] if isinstance(value, dict) else 'tuple'
  below = _tree(value, classes)
  return tag('li', f'{name}: ', tag('b', title), below, class_=kind)


def _defaults(cls: type | None) -> dict[str, records.Record]:
  """Returns the recorded defaults of a class, {} if it is not known."""
  if cls is None:
    return {}
  found = {}
  for field in dataclasses.fields(cls):
    if field.default is not dataclasses.MISSING:
      try:
        found[field.name] = records.to_record(field.default)
      except ValueError:  # a default that is no configuration
        continue
  return found


def _environment(runs: Sequence[RecordedRun]) -> Html:
  found = [run.directory.environment() for run in runs]
  note = tag('p', 'As recorded when the run began.', class_='note')
  return join(note, _side_by_side(runs, found, 'Environment'))
