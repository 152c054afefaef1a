"""Running a study: measure, judge, write down."""

import inspect
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
from jaxformers.train.report import Report
from jaxformers.train.report import load_result
from jaxformers.train.study import Results
from jaxformers.train.study import Study
from jaxformers.train.study import check_alike
from jaxformers.train.study import check_shapes
from jaxformers.train.study import check_study
from jaxformers.train.study import clean_measurement
from jaxformers.train.workspace import Left
from jaxformers.train.workspace import Measurement
from jaxformers.train.workspace import StudyDirectory
from jaxformers.train.workspace import Workspace


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
  if out is not None:
    _check_free(result, record)
  device = jax.devices()[0].device_kind
  with directory.locked():
    directory.prepare(record, device=device)
    try:
      measurements = _measure_all(study, directory)
    except Left:
      print('Left before the end; the same command goes on from there.')
      return None
    report = _judge(study, measurements, device)
    write_whole(result, report.to_json())
    draw_study(report, result.with_suffix('.png'))
  print(f'\n{report}\n\nresult: {result}\nfigure: {result.with_suffix(".png")}')
  return report


def _check_free(path: pathlib.Path, record: Any) -> None:
  """Makes the folder of a result; raises if another result is in the way."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise NotADirectoryError(
      f'cannot make {path.parent} ({error.strerror}); choose another --out.'
    ) from error
  if not path.exists():
    return
  lines = records.differences(load_result(path)['study'], record)
  if lines:
    listed = '\n  '.join(lines)
    raise ValueError(
      f'{path} is the result of other options:\n  {listed}\n'
      'Choose another --out, or delete that file first.'
    )


def _measure_all(study: Study, directory: StudyDirectory) -> list[Measurement]:
  """Measures what has not been measured yet."""
  code = _checksum(study)
  done = directory.load_measurements()
  if any(m.code != code for m in done):
    print(
      'Note: parts were measured by another version of the file, which has '
      f'changed since; delete {directory.path} to measure all again.'
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
  """Returns that of the file of the study, '' where there is none."""
  try:
    path = inspect.getsourcefile(type(study))
    return f'{zlib.crc32(pathlib.Path(path).read_bytes()):08x}'
  except (TypeError, OSError):  # such as in a notebook
    return ''


def _scalars(values) -> str:
  return ', '.join(
    f'{name} {value:.4g}'
    for name, value in values.items()
    if isinstance(value, float)
  )


def _judge(study, measurements, device) -> Report:
  """Puts the measurements in order and holds them against the criteria."""
  by_key = {(m.variant, m.seed): m.values for m in measurements}
  measured = {
    variant: {
      name: [by_key[variant, seed][name] for seed in study.seeds]
      for name in measurements[0].values
    }
    for variant in study.variants()
  }
  results = Results(study.seeds, measured)
  judgements = tuple(study.judge(results))
  if not judgements:
    raise ValueError(f'{type(study).__name__}.judge() gave no judgement.')
  minutes = round(sum(m.minutes for m in measurements), 2)
  return Report(study, results, judgements, minutes, versions(), device)
