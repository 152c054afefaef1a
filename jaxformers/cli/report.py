"""`jaxformers report`: one page on a run, on several, or on studies."""

import argparse
import difflib
import pathlib
from typing import Any

from jaxformers.cli import experiment_file

HELP = """\
write a page on runs or studies
One HTML file, which needs no other and no network: curves, samples,
configuration and environment of a run, or verdict, figure and numbers of a
study. Several runs share their curves, and what differs between their
configurations is listed."""

EPILOG = """\
examples:
  jaxformers report runs/lm
  jaxformers report runs/lm runs/grouped --output compared.html
  jaxformers report experiments/results/entropy_versus_length.json
  jaxformers report runs/studies/entropy_versus_length

The page of one run goes to RUN/report.html, that of a study to NAME.html beside
NAME.json, any other to ./report.html. An older page is replaced, anything else
is not. The figure of the study NAME is drawn by --code or ./experiments/NAME.py,
which is executed; where there is neither, NAME.png beside it is taken.
"""


def configure(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments.

  Args:
    parser: That of the command.
  """
  parser.add_argument(
    'paths',
    metavar='PATH',
    nargs='+',
    type=pathlib.Path,
    help='a run directory, or the result of a study: NAME.json or the'
    ' directory that it was measured in',
  )
  parser.add_argument(
    '--output',
    metavar='FILE',
    type=pathlib.Path,
    help='the page to write (default: beside what it is about)',
  )
  parser.add_argument(
    '--code',
    metavar='FILE',
    type=pathlib.Path,
    help='the Python file of the study, or one with classes of your own that a'
    ' run uses; it is executed',
  )


def run(arguments: argparse.Namespace) -> None:
  """Runs the command.

  Args:
    arguments: As parsed.

  Raises:
    FileNotFoundError: If there is nothing at a path.
    ValueError: If there are runs and studies.
  """
  found = [_find(path) for path in arguments.paths]
  kinds = {path.is_file() for path in found}
  if len(kinds) > 1:
    raise ValueError(
      'cannot put runs and studies on one page; give the directories of runs, '
      'or the results of studies.'
    )
  from jaxformers import pages

  if kinds == {True}:
    text = pages.studies_page([_study(path, arguments.code) for path in found])
  else:
    code = arguments.code
    module = None if code is None else experiment_file.load(code)
    classes = experiment_file.classes_with(module)
    text = pages.runs_page(pages.recorded_runs(found), classes)
  output = arguments.output or _default_output(found)
  pages.save(output, text)
  print(f'report: {output}')


def _study(path: pathlib.Path, code: pathlib.Path | None) -> Any:
  """Pairs a result with the classes of the file that can draw it."""
  from jaxformers.pages import RecordedStudy

  usual = pathlib.Path('experiments') / f'{path.stem}.py'
  code = code or (usual if usual.is_file() else None)
  if code is None:
    return RecordedStudy(path, None)
  classes = experiment_file.classes_with(experiment_file.load(code))
  return RecordedStudy(path, classes)


def _default_output(found: list[pathlib.Path]) -> pathlib.Path:
  if len(found) > 1:
    return pathlib.Path('report.html')
  [path] = found
  return path.with_suffix('.html') if path.is_file() else path / 'report.html'


def _find(path: pathlib.Path) -> pathlib.Path:
  """Returns the directory of a run or the result of a study.

  Args:
    path: What was typed.

  Raises:
    FileNotFoundError: If there is neither; says what was probably meant.
  """
  if (path / 'experiment.json').is_file():
    return path
  if (path / 'study.json').is_file():
    result = path / f'{path.resolve().name}.json'
    if result.is_file():
      return result
    raise FileNotFoundError(
      f'{path} holds a study without a result ({result.name}); let `jaxformers '
      'reproduce` finish, or give the JSON that it wrote elsewhere.'
    )
  if (
    path.is_file() and path.suffix == '.json' and path.name != 'experiment.json'
  ):
    return path
  raise FileNotFoundError(_advice(path))


def _advice(path: pathlib.Path) -> str:
  """Says what a page can be about instead of a path."""
  if (path.parent / 'experiment.json').is_file():
    return f'{path} is a part of a run; did you mean {path.parent}?'
  if path.is_dir():
    problem, folder = f'{path} is neither a run nor a study', path
  elif path.exists():
    problem, folder = f'{path} is not the result of a study', path.parent
  else:
    problem, folder = f'there is no file or directory {path}', path.parent
  there = _reportable(folder)
  close = difflib.get_close_matches(path.name, there, n=1)
  if close and folder != path:
    return f'{problem}; did you mean {folder / close[0]}?'
  if there:
    return f'{problem}; in {folder} there are {", ".join(there)}.'
  return (
    f'{problem}; expected the directory of a run, such as runs/lm, or the JSON '
    'that `jaxformers reproduce` wrote.'
  )


def _reportable(folder: pathlib.Path) -> list[str]:
  """Names the runs, studies and results in a folder."""
  marks = [*folder.glob('*/experiment.json'), *folder.glob('*/study.json')]
  return sorted(
    {x.parent.name for x in marks} | {x.name for x in folder.glob('*.json')}
  )
