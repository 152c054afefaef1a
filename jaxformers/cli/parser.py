"""The grammar of the command line: what may be typed, and help that teaches."""

import argparse
from collections.abc import Callable, Sequence
import difflib
import sys
from typing import Any, NoReturn

import jaxformers
from jaxformers.cli import compile as compiling
from jaxformers.cli import evaluate
from jaxformers.cli import list as listing
from jaxformers.cli import report
from jaxformers.cli import reproduce
from jaxformers.cli import sample
from jaxformers.cli import train

_DESCRIPTION = """\
Train, sample and evaluate models built from the parts of jaxformers.

An experiment is a Python file with one function, `experiment()`, that returns
the whole configuration as an object. Every value in it can be changed from the
command line by its path. A file with a function `study()` puts a claim to the
test."""

_EPILOG = """\
first steps:
  jaxformers list experiments                     what there is to run
  jaxformers train experiments/lm.py              train; again: resume
  jaxformers train experiments/lm.py --show       every value and its path
  jaxformers train experiments/lm.py --set steps=50 --workdir runs/short
  jaxformers sample runs/lm --prompt 'In the beginning'
  jaxformers eval runs/lm
  jaxformers report runs/lm                       one page on a run
  jaxformers reproduce experiments/attention_concentration.py
  jaxformers compile experiments/lm.py --topology v5e:2x2

exit status:
  0  done, or saved and left after SIGTERM (the same command resumes; for
     launchers, `train --left-status 75` tells this from done)
  1  the run failed, such as by a loss that is not finite
  2  bad input; the message says what to change
  75 another process of the run was lost; start all of them again
"""


class Parser(argparse.ArgumentParser):
  """An argument parser whose errors name what was probably meant."""

  def __init__(self, **options: Any):
    super().__init__(
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
      **options,
    )

  def parse_known_args(
    self, args: Sequence[str] | None = None, namespace: Any = None
  ) -> tuple[argparse.Namespace, list[str]]:
    """Parses, after looking for misspelt options and commands.

    argparse would first complain about the argument that is missing because
    its name was misspelt.

    Args:
      args: The words.
      namespace: Where the values go.

    Returns:
      The namespace and the words left over.
    """
    args = sys.argv[1:] if args is None else args
    self._check_spelling(args)
    return super().parse_known_args(args, namespace)

  def error(self, message: str) -> NoReturn:
    """Prints one message, with the way to the help, and exits with 2.

    Args:
      message: What is wrong.
    """
    self.exit(
      2, f'jaxformers: error: {message}\n(`{self.prog} --help` explains)\n'
    )

  def _check_spelling(self, args: Sequence[str]) -> None:
    commands = self.commands()
    for word in args:
      if word == '--':
        return
      if word.startswith('--') and ' ' not in word:  # else it is a value
        self._check_option(word.partition('=')[0])
      elif commands and not word.startswith('-'):
        if word not in commands:
          self.error(_unknown('command', word, commands))
        return  # what follows is the command's own business

  def _check_option(self, word: str) -> None:
    options = [o for o in self._option_string_actions if o.startswith('--')]
    if word not in options:
      self.error(_unknown('option', word, options))

  def commands(self) -> list[str]:
    """Names the commands below this parser.

    Returns:
      Empty for the parser of a command.
    """
    if self._subparsers is None:
      return []
    return [
      name
      for action in self._subparsers._group_actions
      for name in action.choices
    ]


def build_parser() -> Parser:
  """Builds the parser of the whole command line.

  Returns:
    A parser whose result has `run`, the function of the command, and
    `traceback`.
  """
  root = Parser(prog='jaxformers', description=_DESCRIPTION, epilog=_EPILOG)
  version = f'jaxformers {jaxformers.__version__}'
  root.add_argument('--version', action='version', version=version)
  _add_traceback(root, default=False)
  commands = root.add_subparsers(
    title='commands', metavar='COMMAND', required=True, dest='command'
  )
  _add(commands, 'train', train)
  _add(commands, 'sample', sample)
  _add(commands, 'eval', evaluate)
  _add(commands, 'report', report)
  _add(commands, 'reproduce', reproduce)
  _add(commands, 'compile', compiling)
  _add(commands, 'list', listing)
  return root


def _add(commands: Any, name: str, module: Any) -> None:
  """Adds a command, which is a module with HELP, EPILOG, configure and run."""
  summary, _, details = module.HELP.partition('\n')
  command = commands.add_parser(
    name,
    help=summary,
    description=f'{summary}\n{details}',
    epilog=module.EPILOG,
  )
  module.configure(command)
  # Without a default: else the command would overwrite the root's value.
  _add_traceback(command, default=argparse.SUPPRESS)
  run: Callable[[argparse.Namespace], int | None] = module.run
  command.set_defaults(run=run)


def _add_traceback(parser: Parser, *, default: Any) -> None:
  parser.add_argument(
    '--traceback',
    action='store_true',
    default=default,
    help='show where an error was raised (also: JAXFORMERS_TRACEBACK=1)',
  )


def _unknown(kind: str, word: str, known: Sequence[str]) -> str:
  close = difflib.get_close_matches(word, known, n=1)
  if close:
    return f'unknown {kind} {word!r}; did you mean {close[0]!r}?'
  return f'unknown {kind} {word!r}; expected one of {", ".join(known)}.'
