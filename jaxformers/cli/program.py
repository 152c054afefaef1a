"""Runs one command and turns what goes wrong into a message and a status."""

from collections.abc import Sequence
import os
import pathlib
import sys
import traceback

import jaxformers
from jaxformers.cli import parser

DONE, RUN_FAILED, BAD_INPUT, TRY_AGAIN, INTERRUPTED = 0, 1, 2, 75, 130

# What a user can cause and mend. Anything else is a bug of the program or of
# an experiment file, and keeps its traceback.
_USER_ERRORS = (ValueError, OSError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line.

  Args:
    arguments: Words after the program's name; None for those of the process.

  Returns:
    The exit status: 0 done, 1 the run failed, 2 bad input, 75 another process
    of the run was lost, 130 interrupted.
  """
  words = sys.argv[1:] if arguments is None else list(arguments)
  grammar = parser.build_parser()
  if not words:
    grammar.print_help(sys.stderr)
    return BAD_INPUT
  parsed = grammar.parse_args(words)
  try:
    status = parsed.run(parsed) or DONE
    sys.stdout.flush()
    return status
  except BrokenPipeError:
    _discard_output()
  except KeyboardInterrupt:
    return INTERRUPTED
  except Exception as error:
    status = _status(error)
    if status is None:
      _leave(RUN_FAILED, bug=error)
      raise
    wanted = os.environ.get('JAXFORMERS_TRACEBACK') == '1'
    _report(error, show_traceback=parsed.traceback or wanted)
    return _leave(status)
  return DONE


def _status(error: Exception) -> int | None:
  """Gives the exit status for an error, None for a bug."""
  # Only a run that began can fail; importing the trainer here would load JAX
  # for a misspelt file name.
  errors = sys.modules.get('jaxformers.train.errors')
  if errors is not None and isinstance(error, errors.ProcessLost):
    return TRY_AGAIN
  if errors is not None and isinstance(error, errors.RunFailed):
    return RUN_FAILED
  return BAD_INPUT if isinstance(error, _USER_ERRORS) else None


def _report(error: Exception, *, show_traceback: bool) -> None:
  if show_traceback:
    traceback.print_exception(error)
  errors = sys.modules.get('jaxformers.train.errors')
  if errors is not None and isinstance(error, errors.FailedTogether):
    return
  message = str(error) or type(error).__name__
  if not _is_ours(error) and not show_traceback:
    message += '\n(raised by a library; --traceback shows where)'
  distributed = sys.modules.get('jaxformers.train.distributed')
  prefix = '' if distributed is None else distributed.prefix()
  print(f'jaxformers: error: {prefix}{message}', file=sys.stderr)


def _leave(status: int, bug: Exception | None = None) -> int:
  """Ends this process at once if others would keep it from ending."""
  distributed = sys.modules.get('jaxformers.train.distributed')
  if distributed is not None and distributed.several():
    if bug is not None:
      traceback.print_exception(bug)
    distributed.leave(status)
  return status


def _is_ours(error: Exception) -> bool:
  """Whether our own code raised an error, so that its message says enough."""
  frames = traceback.extract_tb(error.__traceback__)
  package = pathlib.Path(jaxformers.__file__).parent
  return pathlib.Path(frames[-1].filename).is_relative_to(package)


def _discard_output() -> None:
  """Lets the interpreter flush at exit although the reader has gone."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
