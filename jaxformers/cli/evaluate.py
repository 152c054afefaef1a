"""`jaxformers eval`: measure a trained model on held-out data."""

import argparse
from collections.abc import Mapping
import json
import math

from jaxformers.cli import run_argument
from jaxformers.cli.train import add_settings

HELP = """\
measure a trained model on held-out data
The model and the data are those of the run, from the record in its directory;
no code that lies there is executed. With --set the model can be measured on
other data."""

EPILOG = """\
examples:
  jaxformers eval runs/lm
  jaxformers eval runs/lm --checkpoint best --json
  jaxformers eval runs/lm --set data.path=my.txt
"""


def configure(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments.

  Args:
    parser: That of the command.
  """
  run_argument.add(parser)
  add_settings(parser)
  parser.add_argument(
    '--json', action='store_true', help='print one JSON object, not a table'
  )


def run(arguments: argparse.Namespace) -> None:
  """Runs the command.

  Args:
    arguments: As parsed.
  """
  classes = run_argument.classes(arguments)
  opened = run_argument.open_run(arguments, classes)
  from jaxformers.train.override import override_all

  experiment = override_all(opened.experiment, arguments.settings, classes)
  metrics = opened.evaluate(experiment)
  print(as_json(opened.step, metrics) if arguments.json else table(metrics))


def as_json(step: int, metrics: Mapping[str, float]) -> str:
  """Writes metrics as one JSON object.

  Args:
    step: Of the checkpoint.
    metrics: By name.

  Returns:
    The object, with null for numbers that JSON lacks.
  """
  finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
  return json.dumps({'step': step, **finite}, allow_nan=False)


def table(metrics: Mapping[str, float]) -> str:
  """Writes metrics as two columns.

  Args:
    metrics: By name.

  Returns:
    One line per metric.
  """
  width = max(map(len, metrics), default=0)
  return '\n'.join(f'{k:{width}}  {v:.6g}' for k, v in metrics.items())
