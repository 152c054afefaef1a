"""Running a study: measure, judge, write down."""

from collections.abc import Mapping
import dataclasses
import inspect
import json
import os
import pathlib
import time
from typing import Any
import zlib

import jax

from jaxformers.train import record as records
from jaxformers.train.directory import versions
from jaxformers.train.directory import write_whole
from jaxformers.train.figure import draw_study
from jaxformers.train.study import Judgement
from jaxformers.train.study import Results
from jaxformers.train.study import Study
from jaxformers.train.study import check_alike
from jaxformers.train.study import check_shapes
from jaxformers.train.study import check_study
from jaxformers.train.study import clean_measurement
from jaxformers.train.study import verdict_of
from jaxformers.train.workspace import Left
from jaxformers.train.workspace import Measurement
from jaxformers.train.workspace import StudyDirectory
from jaxformers.train.workspace import Workspace


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
    """All judgements in a word."""
    return verdict_of(self.judgements)

  def to_json(self) -> str:
    """Writes everything as JSON; `read_report` is the inverse."""
    content = {
      'claim': self.study.claim,
      'source': self.study.source,
      'verdict': self.verdict,
      'judgements': [
        {**dataclasses.asdict(j), 'holds': j.holds} for j in self.judgements
      ],
      'study': records.to_record(self.study),
      'seeds': self.results.seeds,
      'measurements': self.results.measurements,
      'minutes': round(self.minutes, 2),
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
  """Reads what `to_json` wrote.

  Args:
    path: the file.
    classes: maps the class names in the record of the study to classes.

  Raises:
    ValueError: if the file is not a report, or names other classes.
  """
  content = _load(pathlib.Path(path))
  try:
    judgements = [
      Judgement(*(x[k] for k in ('statement', 'seen', 'relation', 'bound')))
      for x in content['judgements']
    ]
    return Report(
      study=records.from_record(content['study'], classes),
      results=Results(tuple(content['seeds']), content['measurements']),
      judgements=tuple(judgements),
      minutes=content['minutes'],
      versions=content['versions'],
      device=content['device'],
    )
  except (KeyError, TypeError) as error:
    raise ValueError(
      f'{path} is not a report of a study: {error!r}.'
    ) from error


def reproduce(
  study: Study,
  workdir: str | os.PathLike[str],
  *,
  name: str = 'result',
  out: str | os.PathLike[str] | None = None,
) -> Report | None:
  """Measures a study, judges it and writes the result and its figure.

  What has been measured is kept after each variant and seed; after kill -9 the
  same call goes on from there.

  Args:
    study: what to measure.
    workdir: holds measurements and training runs; made if missing. One that
      holds the same study is resumed, one that holds anything else is refused.
    name: what the result is called: `NAME.json` and `NAME.png`.
    out: where the result goes; made if missing. None for `workdir`.

  Returns:
    The report, or None if a signal asked to leave before the end.

  Raises:
    RunFailed: if a training run fails.
    ValueError: if the study, what it measures, or a directory does not fit.
  """
  check_study(study)
  record = records.to_record(study)
  directory = StudyDirectory(pathlib.Path(workdir))
  result = pathlib.Path(workdir if out is None else out) / f'{name}.json'
  check_result(result, record)
  device = jax.devices()[0].device_kind
  with directory.locked():
    directory.prepare(record, device=device)
    try:
      measurements = _measure_all(study, directory)
    except Left:
      print('Left before the end; the same command goes on from there.')
      return None
    report = _judge(study, measurements, device)
    result.parent.mkdir(parents=True, exist_ok=True)
    write_whole(result, report.to_json())
    draw_study(study, report.results, result.with_suffix('.png'))
  print(f'\n{report}\n\nresult: {result}\nfigure: {result.with_suffix(".png")}')
  return report


def check_result(path: pathlib.Path, record: Any) -> None:
  """Raises if a result of other options is in the way.

  Args:
    path: where the result shall go.
    record: of the study.

  Raises:
    ValueError: if there is one, or something else; says what differs.
  """
  if not path.exists():
    return
  lines = records.differences(_load(path).get('study'), record)
  if lines:
    listed = '\n  '.join(lines)
    raise ValueError(
      f'{path} is the result of other options:\n  {listed}\n'
      'Choose another --out, or delete that file first.'
    )


def _load(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text('utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is not JSON: {error}.') from error
  if not isinstance(content, dict):
    raise ValueError(f'{path} is not a report of a study.')
  return content


def _measure_all(study: Study, directory: StudyDirectory) -> list[Measurement]:
  """Measures what has not been measured yet."""
  code = _checksum(study)
  done = directory.load_measurements()
  if any(m.code != code for m in done):
    print(
      f'Note: the file of the study has changed since parts of it were measured;'
      f' delete {directory.path} to measure all again.'
    )
  workspace = Workspace(directory)
  total = len(study.seeds) * len(study.variants())
  for seed in study.seeds:
    for variant in study.variants():
      if any((m.variant, m.seed) == (variant, seed) for m in done):
        continue
      start = time.perf_counter()
      values = _measure(study, variant, seed, workspace, done)
      minutes = (time.perf_counter() - start) / 60
      done.append(Measurement(variant, seed, values, minutes, code))
      directory.save_measurements(done)
      print(f'[{len(done)}/{total}] {variant}, seed {seed}: {_scalars(values)}')
    workspace.forget()
  return done


def _measure(study, variant, seed, workspace, done):
  measured = study.measure(variant, seed, workspace)
  try:
    values = clean_measurement(measured)
    for other in done:
      check_alike(other.values, values)
      if other.variant == variant:
        check_shapes(other.values, values)
  except ValueError as error:
    raise ValueError(f'{variant}, seed {seed}: {error}') from error
  return values


def _checksum(study: Study) -> str:
  path = inspect.getsourcefile(type(study))
  return f'{zlib.crc32(pathlib.Path(path).read_bytes()):08x}'


def _scalars(values) -> str:
  return ', '.join(
    f'{name} {value:.4g}'
    for name, value in values.items()
    if isinstance(value, float)
  )


def _judge(study, measurements, device) -> Report:
  by_key = {(m.variant, m.seed): m.values for m in measurements}
  table = {
    variant: {
      name: [by_key[variant, seed][name] for seed in study.seeds]
      for name in measurements[0].values
    }
    for variant in study.variants()
  }
  results = Results(study.seeds, table)
  judgements = tuple(study.judge(results))
  if not judgements:
    raise ValueError(f'{type(study).__name__}.judge() gave no judgement.')
  minutes = sum(m.minutes for m in measurements)
  return Report(study, results, judgements, minutes, versions(), device)


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
  rows = [['variant', *names]]
  for variant in results.variants:
    cells = [_cell(results, variant, name) for name in names]
    rows.append([variant, *cells])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    '  '.join(f'{x:{w}}' for x, w in zip(row, widths, strict=True)).rstrip()
    for row in rows
  ]


def _cell(results: Results, variant: str, name: str) -> str:
  mean = f'{results.mean(variant, name):.4g}'
  if len(results.seeds) == 1:
    return mean
  return f'{mean} ± {results.spread(variant, name):.2g}'


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
