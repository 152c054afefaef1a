"""Loading a user's Python file, and the experiment or study it defines."""

import difflib
import importlib.machinery
import importlib.util
import pathlib
import sys
import traceback
import types
from typing import Any

_ARTICLES = {'experiment': 'an', 'study': 'a'}


def load(path: pathlib.Path) -> types.ModuleType:
  """Runs a Python file as a module.

  Its folder is searched after everything installed, so that an experiment may
  import its neighbours and none of them hides a library.

  Args:
    path: The file.

  Returns:
    The module, also known to `sys.modules`, which dataclasses need.

  Raises:
    FileNotFoundError: If there is no such file; names similar ones.
    ValueError: If it raises; the message has the line and the error.
  """
  check_exists(path)
  folder = str(path.resolve().parent)
  if folder not in sys.path:
    sys.path.append(folder)
  name = f'jaxformers_experiment_{path.stem}'
  loader = importlib.machinery.SourceFileLoader(name, str(path))
  spec = importlib.util.spec_from_loader(name, loader)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    del sys.modules[name]
    raise ValueError(_explain(error, path)) from error
  return module


def experiment_of(module: types.ModuleType) -> Any:
  """Calls the function `experiment` of a loaded file.

  Args:
    module: From `load`.

  Returns:
    The `Experiment`.

  Raises:
    ValueError: If there is no such function, it raises, or it returns
      something else.
  """
  from jaxformers.train.experiment import Experiment

  return _made(module, 'experiment', Experiment)


def study_of(module: types.ModuleType) -> Any:
  """Calls the function `study` of a loaded file.

  Args:
    module: From `load`.

  Returns:
    The `Study`.

  Raises:
    ValueError: See `experiment_of`.
  """
  from jaxformers.train.study import Study

  return _made(module, 'study', Study)


def _made(module: types.ModuleType, name: str, kind: type) -> Any:
  """Calls a function without arguments that must return an object."""
  function, article = getattr(module, name, None), _ARTICLES[name]
  if not callable(function):
    raise ValueError(
      f'{module.__file__} has no function def {name}() -> {kind.__name__}; '
      'define one that takes no arguments.'
    )
  try:
    made = function()
  except Exception as error:
    path = pathlib.Path(module.__file__)
    raise ValueError(_explain(error, path)) from error
  if not isinstance(made, kind):
    raise ValueError(
      f'{module.__file__}: {name}() must return {article} {kind.__name__}, got '
      f'{made!r:.60} ({type(made).__name__}).'
    )
  return made


def check_exists(path: pathlib.Path) -> None:
  """Raises unless a path is a file.

  Args:
    path: The file.

  Raises:
    FileNotFoundError: If it is not; names similar files nearby.
  """
  if path.is_file():
    return
  if path.is_dir():
    raise FileNotFoundError(f'{path} is a directory; expected a Python file.')
  candidates = [*path.parent.glob('*.py'), *pathlib.Path().glob('*/*.py')]
  by_stem = {candidate.stem: candidate for candidate in reversed(candidates)}
  close = difflib.get_close_matches(path.stem, by_stem, n=1)
  advice = (
    f'did you mean {by_stem[close[0]]}?'
    if close
    else '`jaxformers list experiments` shows what there is.'
  )
  raise FileNotFoundError(f'there is no file {path}; {advice}')


def _explain(error: Exception, path: pathlib.Path) -> str:
  """Writes an error with the line of the user's file that led to it."""
  message = f'{type(error).__name__}: {error}'
  if isinstance(error, SyntaxError):
    place = f'{error.filename}:{error.lineno}'
    return f'{place}: {type(error).__name__}: {error.msg}{_line(error.text)}'
  frames = traceback.extract_tb(error.__traceback__)
  own = [f for f in frames if f.filename == str(path)]
  if not own:
    return f'{path}: {message}'
  return f'{path}:{own[-1].lineno}: {message}{_line(own[-1].line)}'


def _line(text: str | None) -> str:
  return f'\n    {text.strip()}' if text and text.strip() else ''


def classes_with(module: types.ModuleType | None) -> dict[str, type]:
  """Collects the classes that a configuration may name.

  Args:
    module: A loaded file of the user's, if there is one.

  Returns:
    Those of the library and of the module.

  Raises:
    ValueError: If two different classes share a name.
  """
  from jaxformers.train import record

  classes = record.known_classes()
  if module is None:
    return classes
  return record.merge_classes(classes, record.classes_of(module))
