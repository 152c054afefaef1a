"""`jaxformers train`: run an experiment, or show its configuration."""

import argparse
import pathlib

from jaxformers.cli import experiment_file

HELP = """\
train an experiment, or resume it
The run directory keeps the configuration, checkpoints, metrics, the loss curve
and a sample. The same command again resumes the run, also after kill -9. A
directory that holds a run with other settings is refused, with the differences
shown; nothing is overwritten."""

EPILOG = """\
examples:
  jaxformers train experiments/lm.py
  jaxformers train experiments/lm.py --show
  jaxformers train experiments/lm.py --set steps=50 --workdir runs/short
  jaxformers train experiments/lm.py --set data.path=my.txt
  jaxformers train experiments/lm.py \\
      --set 'model.stack.block.mixer=Attention(num_heads=8, position=Rotary())'

values: numbers, strings (quotes only where needed), None, True, (1, 2),
dtypes such as bfloat16, and objects such as Rotary(base=5e5). They must be of
the kind that stood there. `jaxformers list parts` shows what objects there are;
classes of your own that FILE defines or imports can be named as well.
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
    help='a Python file with a function experiment() -> Experiment',
  )
  add_settings(parser)
  parser.add_argument(
    '--workdir',
    metavar='DIR',
    type=pathlib.Path,
    help='the run directory (default: runs/NAME for NAME.py)',
  )
  parser.add_argument(
    '--show',
    action='store_true',
    help='print every setting, ready for --set, and leave',
  )
  parser.add_argument(
    '--placement',
    action='store_true',
    help='print what each device holds of every array, and leave',
  )


def add_settings(parser: argparse.ArgumentParser) -> None:
  """Declares `--set`.

  Args:
    parser: That of a command.
  """
  parser.add_argument(
    '--set',
    metavar='PATH=VALUE',
    action='append',
    default=[],
    dest='settings',
    help='change one value, such as model.stack.depth=6 (may be repeated)',
  )


def run(arguments: argparse.Namespace) -> None:
  """Runs the command.

  Args:
    arguments: As parsed.
  """
  module = experiment_file.load(arguments.file)
  from jaxformers.train import record
  from jaxformers.train.override import override_all

  experiment = experiment_file.experiment_of(module)
  classes = experiment_file.classes_with(module)
  experiment = override_all(experiment, arguments.settings, classes)
  if arguments.show:
    print(*record.tree(record.to_record(experiment)), sep='\n')
    return
  if arguments.placement:
    from jaxformers.train.holdings import holdings_table
    from jaxformers.train.program import abstract_state

    print(holdings_table(abstract_state(experiment, experiment.mesh.build())))
    return
  from jaxformers.train.loop import train

  train(experiment, arguments.workdir or default_workdir(arguments.file))


def default_workdir(file: pathlib.Path) -> pathlib.Path:
  """Chooses where a run goes when nothing is said.

  Args:
    file: The experiment file.

  Returns:
    `runs/NAME` for `NAME.py`.
  """
  return pathlib.Path('runs') / file.stem
