"""The page of one study, or of several below each other."""

import base64
from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

from jaxformers.pages.drawing import drawn
from jaxformers.pages.markup import Html
from jaxformers.pages.markup import facts
from jaxformers.pages.markup import fold
from jaxformers.pages.markup import join
from jaxformers.pages.markup import table
from jaxformers.pages.markup import tag
from jaxformers.pages.page import page
from jaxformers.pages.page import section
from jaxformers.train import record as records
from jaxformers.train.report import Report
from jaxformers.train.report import load_result
from jaxformers.train.report import read_report
from jaxformers.train.study import Results

_SIZE = (8.0, 4.2)


@dataclasses.dataclass(frozen=True)
class RecordedStudy:
  """The result of a study.

  Attributes:
    path: the JSON file.
    classes: by name, the class of the study among them; None if its file is
      not at hand, and the figure is then that which lies beside the result.
  """

  path: pathlib.Path
  classes: Mapping[str, type] | None


def studies_page(studies: Sequence[RecordedStudy]) -> str:
  """Writes the page of studies.

  Args:
    studies: At least one.

  Raises:
    ValueError: If one is not the result of a study, or not of these classes.
  """
  names = [study.path.stem.replace('_', ' ') for study in studies]
  parts = [_parts(study) for study in studies]
  if len(studies) == 1:
    return page(f'Study: {names[0]}', *parts[0])
  sections = (section(n, *p) for n, p in zip(names, parts, strict=True))
  return page(f'{len(studies)} studies', *sections)


def _parts(study: RecordedStudy) -> list[Html]:
  """Writes what came of one study."""
  content = load_result(study.path)
  try:
    seeds = content['study']['seeds']
    results = Results(tuple(seeds), content['measurements'])
    return [
      tag('p', tag('strong', content['claim'])),
      tag('p', content['source'], class_='note'),
      facts(_summary(content)),
      _criteria(content['judgements']),
      _figure(study, content['claim']),
      tag('h3', 'Measurements'),
      _scalars(results),
      _lists(results),
      tag('h3', 'Settings'),
      _settings(content['study']),
      tag('h3', 'Environment'),
      _pairs({'device': content['device'], **content['versions']}),
    ]
  except (KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f'{study.path} is damaged ({error!r}); reproduce the study again.'
    ) from error


def _summary(content: Mapping[str, Any]) -> dict[str, str]:
  held = [judgement['holds'] for judgement in content['judgements']]
  return {
    'verdict': content['verdict'],
    'criteria': f'{sum(held)} of {len(held)} hold',
    'seeds': ', '.join(map(str, content['study']['seeds'])),
    'time': f'{content["minutes"]:.3g} minutes',
  }


def _criteria(judgements: Sequence[Mapping[str, Any]]) -> Html:
  rows = [
    [
      judgement['statement'],
      _number(judgement['seen']),
      f'{judgement["relation"]} {judgement["bound"]:g}',
      tag('span', 'holds', class_='holds')
      if judgement['holds']
      else tag('span', 'does not hold', class_='fails'),
    ]
    for judgement in judgements
  ]
  return table(['criterion', 'seen', 'wanted', ''], rows, caption='Criteria')


def _figure(study: RecordedStudy, claim: str) -> Html:
  """Draws the figure by the file of the study, or shows that beside it."""
  if study.classes is not None:
    picture = _drawn(read_report(study.path, study.classes))
  elif (beside := study.path.with_suffix('.png')).is_file():
    data = base64.b64encode(beside.read_bytes()).decode()
    picture = tag(
      'img', src=f'data:image/png;base64,{data}', alt=claim, width='100%'
    )
  else:
    return tag(
      'p', 'No figure: the file of the study draws it; name it by --code.'
    )
  wide = tag('div', picture, class_='wide', tabindex=0)
  return tag('figure', wide, class_='card')


def _drawn(report: Report) -> Html:
  def draw(figure: Any) -> None:
    report.study.draw(report.results, figure)

  judged = '. '.join(map(str, report.judgements))
  return drawn(draw, _SIZE, f'{report.study.claim} {judged}.')


def _scalars(results: Results) -> Html:
  """Writes single numbers: their mean, and those of each seed."""
  several = len(results.seeds) > 1
  rows = []
  for variant in results.variants:
    for name in results.names:
      if results.values(variant, name).ndim == 1:
        mean = results.mean(variant, name)
        summary = f'{mean:.4g} ± {results.spread(variant, name):.2g}'
        seen = map(_number, results.measurements[variant][name])
        rows.append([variant, name, *[summary] * several, *seen])
  if not rows:
    return tag('p', 'Lists only.')
  heading = ['variant', 'measurement', *['mean ± deviation'] * several]
  heading += [f'seed {seed}' for seed in results.seeds]
  return table(heading, rows, caption='Measurements')


def _lists(results: Results) -> Html:
  """Writes lists of numbers, folded away."""
  rows = [
    [variant, name, str(seed), ', '.join(map(_number, values))]
    for variant in results.variants
    for name in results.names
    if results.values(variant, name).ndim == 2
    for seed, values in zip(
      results.seeds, results.measurements[variant][name], strict=True
    )
  ]
  if not rows:
    return Html()
  heading = ['variant', 'measurement', 'seed', 'values']
  lists = table(heading, rows, caption='Lists of measurements')
  return fold(f'{len(rows)} lists of numbers', lists)


def _settings(record: Mapping[str, Any]) -> Html:
  pairs = {k: records.describe(v) for k, v in record.items() if k != 'class'}
  return join(tag('p', tag('code', record['class'])), _pairs(pairs))


def _pairs(pairs: Mapping[str, str]) -> Html:
  rows = [[name, tag('code', value)] for name, value in pairs.items()]
  return table(['', ''], rows, caption='Values by name')


def _number(value: float | None) -> str:
  return 'nothing' if value is None else f'{value:.4g}'
