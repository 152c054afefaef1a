"""The arguments of every command that opens a trained run."""

import argparse
from collections.abc import Mapping
import pathlib
from typing import Any

from jaxformers.cli import experiment_file
from jaxformers.cli import mesh_argument
from jaxformers.cli import values


def add(parser: argparse.ArgumentParser) -> None:
  """Declares RUN, `--checkpoint`, `--mesh` and `--code`.

  Args:
    parser: That of the command.
  """
  parser.add_argument(
    'run_directory',
    metavar='RUN',
    type=pathlib.Path,
    help='the directory of a run, such as runs/lm',
  )
  parser.add_argument(
    '--checkpoint',
    metavar='latest|best|STEP',
    type=values.checkpoint,
    default='latest',
    help='which saved state to use (default: %(default)s)',
  )
  mesh_argument.add(
    parser,
    '1',
    'the mesh of the run or, on other devices, as much fsdp as divides',
  )
  parser.add_argument(
    '--code',
    metavar='FILE',
    type=pathlib.Path,
    help='a Python file that defines or imports classes of your own that the'
    ' run uses; it is executed',
  )


def classes(arguments: argparse.Namespace) -> dict[str, type]:
  """Collects the classes that the run's record may name.

  Args:
    arguments: As parsed.

  Returns:
    Those of the library, and of the file given by `--code`, which is executed.
  """
  code = arguments.code
  module = experiment_file.load(code) if code is not None else None
  return experiment_file.classes_with(module)


def open_run(
  arguments: argparse.Namespace, known_classes: Mapping[str, type]
) -> Any:
  """Opens the run that the arguments name.

  Args:
    arguments: As parsed.
    known_classes: From `classes`.

  Returns:
    The opened run.
  """
  from jaxformers.train.run import open_run as opened

  return opened(
    arguments.run_directory,
    checkpoint=arguments.checkpoint,
    classes=known_classes,
    mesh=mesh_argument.shape(arguments.mesh),
  )
