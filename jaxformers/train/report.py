"""What came of a study: for the terminal, as JSON, and back."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
import os
import pathlib
from typing import Any

from jaxformers.train import record as records
from jaxformers.train.study import Judgement
from jaxformers.train.study import Results
from jaxformers.train.study import Study
from jaxformers.train.study import verdict_of


@dataclasses.dataclass(frozen=True)
class Report:
  """What came of a study.

  Attributes:
    study: with its options.
    results: all measurements.
    judgements: one per criterion.
    minutes: how long measuring took, over all sessions.
    versions: of the software.
    device: kind of the devices.
  """

  study: Study
  results: Results
  judgements: tuple[Judgement, ...]
  minutes: float
  versions: Mapping[str, str]
  device: str

  @property
  def verdict(self) -> str:
    """All judgements in a word or two."""
    return verdict_of(self.judgements)

  def to_json(self) -> str:
    """Writes everything as JSON; `read_report` is the inverse."""
    judgements = [
      {**dataclasses.asdict(j), 'holds': j.holds} for j in self.judgements
    ]
    content = {
      'claim': self.study.claim,
      'source': self.study.source,
      'verdict': self.verdict,
      'judgements': judgements,
      'study': records.to_record(self.study),
      'measurements': self.results.measurements,
      'minutes': self.minutes,
      'device': self.device,
      'versions': self.versions,
    }
    return _json(content) + '\n'

  def __str__(self) -> str:
    lines = [f'claim: {self.study.claim}', '', *table(self.results), '']
    lines += [str(judgement) for judgement in self.judgements]
    return '\n'.join([*lines, '', f'verdict: {self.verdict}'])


def read_report(
  path: str | os.PathLike[str], classes: Mapping[str, type]
) -> Report:
  """Reads what `Report.to_json` wrote.

  Args:
    path: the file.
    classes: maps the class names in the record of the study to classes.

  Raises:
    ValueError: if the file is not the result of a study, or names a class that
      is not among these.
  """
  content = load_result(path)
  study = records.from_record(content['study'], classes)
  try:
    return Report(
      study=study,
      results=Results(study.seeds, content['measurements']),
      judgements=tuple(map(_judgement, content['judgements'])),
      minutes=content['minutes'],
      versions=content['versions'],
      device=content['device'],
    )
  except (KeyError, TypeError) as error:
    raise ValueError(f'{path} is damaged: {error!r}.') from error


def load_result(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads the JSON of a result.

  Args:
    path: the file.

  Raises:
    ValueError: if it is not the result of a study.
  """
  try:
    content = json.loads(pathlib.Path(path).read_text('utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is not JSON: {error}.') from error
  if not isinstance(content, dict) or 'study' not in content:
    raise ValueError(
      f'{path} is not the result of a study; expected the JSON that '
      '`jaxformers reproduce` writes.'
    )
  return content


def _judgement(content: dict[str, Any]) -> Judgement:
  names = (field.name for field in dataclasses.fields(Judgement))
  return Judgement(**{name: content[name] for name in names})


def table(results: Results) -> list[str]:
  """Writes the measured numbers, without the lists, as lines of text.

  Args:
    results: all measurements.

  Returns:
    A heading, and a line per variant with mean and spread over seeds.
  """
  names = [
    name
    for name in results.names
    if all(results.values(v, name).ndim == 1 for v in results.variants)
  ]
  rows = [('variant', *names)]
  for variant in results.variants:
    rows.append((variant, *(_cell(results, variant, name) for name in names)))
  return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    '  '.join(f'{x:{w}}' for x, w in zip(row, widths, strict=True)).rstrip()
    for row in rows
  ]


def _cell(results: Results, variant: str, name: str) -> str:
  mean = results.mean(variant, name)
  if math.isnan(mean):
    return '-'
  if len(results.seeds) == 1:
    return f'{mean:.4g}'
  return f'{mean:.4g} ± {results.spread(variant, name):.2g}'


def _json(value: Any, indent: str = '') -> str:
  """Writes JSON with one line per list of numbers."""
  inner = indent + '  '
  if isinstance(value, Mapping):
    items = [f'{json.dumps(k)}: {_json(v, inner)}' for k, v in value.items()]
    brackets = '{}'
  elif isinstance(value, (list, tuple)) and any(
    isinstance(x, (Mapping, list, tuple)) for x in value
  ):
    items = [_json(x, inner) for x in value]
    brackets = '[]'
  else:
    return json.dumps(value, allow_nan=False)
  lines = ',\n'.join(inner + item for item in items)
  return f'{brackets[0]}\n{lines}\n{indent}{brackets[1]}'
