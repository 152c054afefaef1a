"""`jaxformers train`: run an experiment, or show its configuration."""

import argparse
import pathlib
from typing import Any

from jaxformers.cli import experiment_file
from jaxformers.cli import values

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
  jaxformers train experiments/lm.py --workdir /shared/lm \
      --coordinator host0:7777 --processes 2 --process 0   (and 1 on host1)

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
  parser.add_argument(
    '--profile',
    metavar='STEPS',
    nargs='?',
    type=values.whole_number(1),
    const=5,
    default=0,
    help='record so many steps (default: %(const)s) for xprof, in DIR/profile',
  )
  parser.add_argument(
    '--compile-cache',
    metavar='DIR',
    type=pathlib.Path,
    help='keep compiled programs here, so that the next start is faster',
  )
  parser.add_argument(
    '--left-status',
    metavar='N',
    type=values.whole_number(0),
    default=0,
    help='exit status after leaving early because of SIGTERM, for launchers'
    ' that shall start again (default: %(default)s)',
  )
  _add_processes(parser)


def _add_processes(parser: argparse.ArgumentParser) -> None:
  """Declares how several processes find each other."""
  group = parser.add_argument_group(
    'several processes',
    'Cloud TPU, Slurm, Open MPI 4 and indexed Jobs of Kubernetes say by'
    ' themselves who takes part. Elsewhere start the same command on every host,'
    ' with these options. The run directory must be the same one for all.',
  )
  group.add_argument(
    '--coordinator', metavar='HOST:PORT', help='a free port of process 0'
  )
  group.add_argument(
    '--processes',
    metavar='N',
    type=values.whole_number(1),
    help='how many there are; 1 to train alone whatever the launcher says',
  )
  group.add_argument(
    '--process',
    metavar='I',
    type=values.whole_number(0),
    help='number of this one, from 0',
  )
  group.add_argument(
    '--start-timeout',
    metavar='SECONDS',
    type=values.whole_number(1),
    default=300,
    help='how long to wait for the others (default: %(default)s)',
  )
  group.add_argument(
    '--heartbeat-timeout',
    metavar='SECONDS',
    type=values.whole_number(1),
    default=100,
    help='a process without a sign of life for so long is taken for dead, and'
    ' all end (default: %(default)s)',
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


def run(arguments: argparse.Namespace) -> int:
  """Runs the command.

  Args:
    arguments: As parsed.

  Returns:
    The exit status.
  """
  experiment_file.check_exists(arguments.file)
  if arguments.show:
    from jaxformers.train import record

    experiment = experiment_from(arguments)
    print(*record.tree(record.to_record(experiment)), sep='\n')
    return 0
  from jaxformers.train import distributed
  from jaxformers.train.loop import train

  distributed.start(  # Before the file, which may use a device.
    arguments.coordinator,
    arguments.processes,
    arguments.process,
    start_timeout=arguments.start_timeout,
    heartbeat_timeout=arguments.heartbeat_timeout,
  )
  with distributed.agreement():
    experiment = experiment_from(arguments)
  if arguments.placement:
    from jaxformers.train.holdings import holdings_table
    from jaxformers.train.program import abstract_state

    table = holdings_table(abstract_state(experiment, experiment.mesh.build()))
    if not distributed.prefix():  # Process 0 alone prints.
      print(table)
    return 0
  if arguments.compile_cache is not None:
    _keep_compiled(arguments.compile_cache)
  workdir = arguments.workdir or default_workdir(arguments.file)
  state = train(experiment, workdir, profile_steps=arguments.profile)
  return arguments.left_status if state is None else 0


def experiment_from(arguments: argparse.Namespace) -> Any:
  """Returns the experiment of a file with the settings of `--set`.

  Args:
    arguments: As parsed, with `file` and `settings`.

  Raises:
    ValueError: If the file or a setting is wrong.
  """
  module = experiment_file.load(arguments.file)
  from jaxformers.train.override import override_all

  experiment = experiment_file.experiment_of(module)
  classes = experiment_file.classes_with(module)
  return override_all(experiment, arguments.settings, classes)


def _keep_compiled(folder: pathlib.Path) -> None:
  """Keeps every compiled program, also those that compile fast."""
  import jax

  jax.config.update('jax_compilation_cache_dir', str(folder.resolve()))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def default_workdir(file: pathlib.Path) -> pathlib.Path:
  """Chooses where a run goes when nothing is said.

  Args:
    file: The experiment file.

  Returns:
    `runs/NAME` for `NAME.py`.
  """
  return pathlib.Path('runs') / file.stem
