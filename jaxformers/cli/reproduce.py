"""`jaxformers reproduce`: put a claim to the test, or show the options."""

import argparse
import pathlib

from jaxformers.cli import experiment_file
from jaxformers.cli.train import add_settings

HELP = """\
measure a study and judge its claim
A study compares variants over several seeds and holds the numbers against
criteria that its file fixes. What has been measured is kept; the same command
again goes on where it stopped, also after kill -9. A directory that holds other
options is refused, with the differences shown; nothing is overwritten.
The exit status is 0 whatever the verdict: that a claim does not hold is a
result."""

EPILOG = """\
examples:
  jaxformers reproduce experiments/entropy_versus_length.py
  jaxformers reproduce experiments/entropy_versus_length.py --show
  jaxformers reproduce experiments/entropy_versus_length.py \\
      --set 'seeds=(0, 1)' --workdir runs/two-seeds
  jaxformers reproduce experiments/entropy_versus_length.py \\
      --out experiments/results
"""


def configure(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments.

  Args:
    parser: That of the command.
  """
  parser.add_argument(
    'file',
    metavar='FILE',
    type=pathlib.Path,
    help='a Python file with a function study() -> Study',
  )
  add_settings(parser)
  parser.add_argument(
    '--workdir',
    metavar='DIR',
    type=pathlib.Path,
    help='where measurements and training runs are kept (default:'
    ' runs/studies/NAME for NAME.py)',
  )
  parser.add_argument(
    '--out',
    metavar='DIR',
    type=pathlib.Path,
    help='where NAME.json and NAME.png go (default: the same directory)',
  )
  parser.add_argument(
    '--show',
    action='store_true',
    help='print every option, ready for --set, and leave',
  )


def run(arguments: argparse.Namespace) -> None:
  """Runs the command.

  Args:
    arguments: As parsed.
  """
  module = experiment_file.load(arguments.file)
  from jaxformers.train import record
  from jaxformers.train.override import override_all

  study = experiment_file.study_of(module)
  classes = experiment_file.classes_with(module)
  study = override_all(study, arguments.settings, classes)
  if arguments.show:
    print(*record.tree(record.to_record(study)), sep='\n')
    return
  from jaxformers.train.reproduction import reproduce

  name = arguments.file.stem
  workdir = arguments.workdir or pathlib.Path('runs') / 'studies' / name
  reproduce(study, workdir, name=name, out=arguments.out)
