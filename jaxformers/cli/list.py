"""`jaxformers list`: what there is to run, to continue and to build with."""

import argparse
import ast
from collections.abc import Iterable, Iterator, Sequence
import difflib
import inspect
import json
import pathlib

HELP = """\
list runs, experiments, studies, corpora or parts
Without a word: the runs below ./runs, and the experiments and studies below
./experiments."""

EPILOG = """\
examples:
  jaxformers list
  jaxformers list runs           step, loss and held-out bits per byte
  jaxformers list experiments    files with a function experiment()
  jaxformers list studies        files with a function study(), and verdicts
  jaxformers list corpora        texts by name, with their licences
  jaxformers list parts          every class that --set can name
"""

_KINDS = ('runs', 'experiments', 'studies', 'corpora', 'parts')


def configure(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments.

  Args:
    parser: That of the command.
  """
  parser.add_argument(
    'what',
    metavar='|'.join(_KINDS),
    nargs='?',
    type=_kind,
    help='what to list (default: runs, experiments and studies)',
  )


def run(arguments: argparse.Namespace) -> None:
  """Runs the command.

  Args:
    arguments: As parsed.
  """
  here = pathlib.Path()
  if arguments.what in ('runs', None):
    _print_table('runs', run_rows(here / 'runs'))
  if arguments.what in ('experiments', None):
    _print_table('experiments', experiment_rows(here / 'experiments'))
  if arguments.what in ('studies', None):
    _print_table('studies', study_rows(here / 'experiments'))
  if arguments.what == 'corpora':
    _print_table('corpora', corpus_rows())
  if arguments.what == 'parts':
    for package, rows in part_rows().items():
      _print_table(package, rows)
  if arguments.what is None:
    print('also: jaxformers list corpora, jaxformers list parts')


def run_rows(folder: pathlib.Path) -> list[tuple[str, ...]]:
  """Summarises the runs in a folder.

  Args:
    folder: Where the run directories lie.

  Returns:
    Path, step, loss and held-out bits per byte of each.
  """
  patterns = '*/experiment.json', '*/*/experiment.json'
  files = (file for pattern in patterns for file in folder.glob(pattern))
  paths = sorted(file.parent for file in files)
  return [(str(path), *_progress(path / 'metrics.jsonl')) for path in paths]


def experiment_rows(folder: pathlib.Path) -> list[tuple[str, ...]]:
  """Summarises the experiment files in a folder, without running them.

  Args:
    folder: Where they lie, at any depth.

  Returns:
    Path and first line of the docstring of each.
  """
  files = sorted(folder.glob('**/*.py'))
  rows = ((str(file), _claim(file, 'experiment')) for file in files)
  return [(path, claim) for path, claim in rows if claim is not None]


def study_rows(folder: pathlib.Path) -> list[tuple[str, ...]]:
  """Summarises the studies in a folder, without running them.

  Args:
    folder: Where they lie, at any depth; their results in `results` beside
      them.

  Returns:
    Path, verdict of the result and first line of the docstring of each.
  """
  files = sorted(folder.glob('**/*.py'))
  rows = ((file, _claim(file, 'study')) for file in files)
  return [
    (str(file), _verdict(file), claim)
    for file, claim in rows
    if claim is not None
  ]


def corpus_rows() -> list[tuple[str, ...]]:
  """Summarises the corpora that have names.

  Returns:
    Name, description and licence of each.
  """
  from jaxformers.data import CORPORA

  entries = CORPORA.items()
  return [(name, entry.description, entry.licence) for name, entry in entries]


def part_rows() -> dict[str, list[tuple[str, ...]]]:
  """Summarises the classes that a configuration may name.

  Returns:
    For each package, name and first docstring line of its classes.
  """
  from jaxformers.train.record import known_classes

  rows: dict[str, list[tuple[str, ...]]] = {}
  for name, cls in sorted(known_classes().items()):
    package = cls.__module__.rpartition('.')[0]
    summary = (inspect.getdoc(cls) or '').partition('\n')[0]
    rows.setdefault(package, []).append((name, summary))
  return dict(sorted(rows.items()))


def _kind(text: str) -> str:
  if text in _KINDS:
    return text
  close = difflib.get_close_matches(text, _KINDS, n=1)
  advice = f'did you mean {close[0]!r}?' if close else f'one of {_KINDS}'
  raise argparse.ArgumentTypeError(f'cannot list {text!r}; {advice}')


def _progress(metrics: pathlib.Path) -> tuple[str, str, str]:
  """Reads the last step, loss and held-out bits per byte."""
  step, loss, bits = 'step -', 'loss -', 'held-out bits/byte -'
  for line in _json_lines(metrics):
    if 'step' in line:
      step = f'step {line["step"]}'
    if line.get('split') == 'train' and _is_number(line.get('loss')):
      loss = f'loss {line["loss"]:.3f}'
    if line.get('split') == 'heldout' and _is_number(line.get('bits_per_byte')):
      bits = f'held-out bits/byte {line["bits_per_byte"]:.3f}'
  return step, loss, bits


def _is_number(value: object) -> bool:
  return isinstance(value, (int, float))


def _json_lines(path: pathlib.Path) -> Iterator[dict]:
  """Yields the objects of a file of JSON lines, unfinished lines excepted."""
  if not path.is_file():
    return
  with path.open(encoding='utf-8', errors='replace') as file:
    for line in file:
      try:
        value = json.loads(line)
      except ValueError:
        continue
      if isinstance(value, dict):
        yield value


def _verdict(file: pathlib.Path) -> str:
  """Gives the verdict of a study from its result."""
  result = file.parent / 'results' / f'{file.stem}.json'
  try:
    return str(json.loads(result.read_text('utf-8'))['verdict'])
  except (OSError, ValueError, LookupError, TypeError):
    return '-'


def _claim(file: pathlib.Path, function: str) -> str | None:
  """Gives the first docstring line of a file with a function, else None."""
  try:
    tree = ast.parse(file.read_bytes())
  except (SyntaxError, ValueError) as error:
    broken = f'(cannot be parsed: {error})'
    return broken if function == 'experiment' else None
  functions = (x.name for x in tree.body if isinstance(x, ast.FunctionDef))
  if function not in functions:
    return None
  return (ast.get_docstring(tree) or '(no docstring)').partition('\n')[0]


def _print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
  print(f'{title}:')
  if not rows:
    print('  (none)')
  for line in _aligned(rows):
    print(f'  {line}')


def _aligned(rows: Iterable[Sequence[str]]) -> Iterator[str]:
  """Pads the cells of all columns but the last to equal widths."""
  rows = list(rows)
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for row in rows:
    padded = [f'{x:{w}}' for x, w in zip(row, widths, strict=True)]
    yield '  '.join(padded).rstrip()
