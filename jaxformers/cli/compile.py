"""`jaxformers compile`: see whether a step fits a machine that is not here."""

import argparse
from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from jaxformers.cli import experiment_file
from jaxformers.cli import mesh_argument
from jaxformers.cli import values
from jaxformers.cli.train import add_settings
from jaxformers.cli.train import experiment_from

HELP = """\
compile a step for a TPU or GPU machine, without having it
The train step of an experiment is compiled by the machine's own compiler, and
what it will ask of each device is reported: memory and its largest arrays,
operations, bytes moved and sent, and how long a step takes at least. No data is
read and nothing is allocated. The exit status is 1 if it does not fit."""

EPILOG = """\
examples:
  jaxformers compile experiments/lm.py --topology v5e:2x2
  jaxformers compile experiments/lm_1b.py --topology v5e:8x8
  jaxformers compile experiments/lm_1b.py --topology '2*v5e:8x8' \\
      --mesh dcn=2,fsdp=16,tensor=4
  jaxformers compile experiments/lm_1b.py --topology v5p:4x4x4 --step decode
  jaxformers compile experiments/lm_1b.py --topology v5e:4x4 --search
  jaxformers compile experiments/lm_1b.py --topology h100:1x1x8

topologies: v4:XxYxZ, v5e:XxY, v5p:XxYxZ, v6e:XxY, tpu7x:XxYxZ (chips along each
axis), N* before it for N slices; h100:SLICESxHOSTSxDEVICES. TPUs need
`pip install 'jaxformers[tpu]'`, GPUs `pip install 'jaxformers[gpu-aot]'`.
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
  parser.add_argument(
    '--topology',
    metavar='NAME',
    required=True,
    help='the machine, such as v5e:16x16',
  )
  mesh_argument.add(
    parser, '1, or any number with --search', 'the mesh of the experiment'
  )
  parser.add_argument(
    '--step',
    choices=('train', 'evaluate', 'decode'),
    default='train',
    help='which step to compile (default: train)',
  )
  parser.add_argument(
    '--length',
    metavar='N',
    type=int,
    help='tokens that the state of decoding holds (default: those of a row)',
  )
  parser.add_argument(
    '--search',
    action='store_true',
    help='try meshes and recomputation policies, and rank what fits',
  )
  parser.add_argument(
    '--fast',
    action='store_true',
    help='optimise less: several times faster, and the memory hardly differs',
  )
  parser.add_argument(
    '--timeout',
    metavar='SECONDS',
    type=values.whole_number(1),
    default=3600,
    help='how long the compiler may take for a step (default: %(default)s)',
  )
  parser.add_argument(
    '--json',
    metavar='FILE',
    type=pathlib.Path,
    help='write the report, or with --search all of them, here as well',
  )
  # How the command calls itself: compilers may crash and take the process along.
  parser.add_argument(
    '--worker', type=pathlib.Path, help=argparse.SUPPRESS, default=None
  )
  add_settings(parser)


def run(arguments: argparse.Namespace) -> None:
  """Runs the command.

  Args:
    arguments: As parsed.
  """
  experiment_file.check_exists(arguments.file)
  if arguments.worker is not None:
    _work(arguments)
    return
  from jaxformers.aot.compile import environment
  from jaxformers.aot.hardware import Topology

  topology = Topology.parse(arguments.topology)
  variables = environment(topology)
  if arguments.search:
    reports = _search(arguments, topology, variables)
  else:
    mesh = mesh_argument.shape(arguments.mesh)
    extra = [] if mesh is None else [f'mesh={mesh!r}']
    reports = [_apart(arguments, variables, extra)]
  _show(reports, arguments)


def _apart(
  arguments: argparse.Namespace, variables: dict[str, str], extra: list[str]
) -> Any:
  """Compiles in a process of its own; a crash of the compiler is retried."""
  from jaxformers.aot.report import Report
  from jaxformers.train.errors import RunFailed

  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / 'report.json'
    words = [sys.executable, '-m', 'jaxformers', 'compile', str(arguments.file)]
    words += ['--topology', arguments.topology, '--step', arguments.step]
    words += ['--worker', str(out)]
    words += ['--fast'] if arguments.fast else []
    words += (
      [] if arguments.length is None else ['--length', str(arguments.length)]
    )
    words += [w for s in (*arguments.settings, *extra) for w in ('--set', s)]
    for _ in range(2):
      done = _finished(words, os.environ | variables, arguments.timeout)
      if done.returncode >= 0:
        break
    if done.returncode < 0:
      raise RunFailed(
        f'the compiler crashed twice (signal {-done.returncode}):\n'
        f'{done.stderr[-2000:]}'
      )
    if done.returncode:
      message = done.stderr.rpartition('jaxformers: error: ')[2].strip()
      raise ValueError(message or f'compiling failed:\n{done.stderr[-4000:]}')
    report = Report.from_json(json.loads(out.read_text()))
  copied = done.stderr.count('Involuntary full rematerialization')
  return dataclasses.replace(report, copied_whole=copied)


def _finished(
  words: list[str], environment: Mapping[str, str], seconds: float
) -> subprocess.CompletedProcess[str]:
  """Runs a process to its end, which must come in time."""
  from jaxformers.train.errors import RunFailed

  try:
    return subprocess.run(
      words,
      env=environment,
      capture_output=True,
      text=True,
      timeout=seconds,
    )
  except subprocess.TimeoutExpired:
    raise RunFailed(
      f'the compiler did not finish in {seconds} seconds; give it more with '
      '--timeout, or less to do with --fast.'
    ) from None


def _search(
  arguments: argparse.Namespace, topology: Any, variables: dict[str, str]
) -> list[Any]:
  """Compiles all candidates, saying how each did, and returns them ranked.

  Those that cannot be compiled are said again in the end.
  """
  from jaxformers.aot.search import candidates
  from jaxformers.aot.search import has_remat
  from jaxformers.aot.search import ranking
  from jaxformers.aot.search import remat_of
  from jaxformers.train.errors import RunFailed

  experiment = experiment_from(arguments)
  fixed = {
    k: n for k, n in mesh_argument.sizes(arguments.mesh).items() if n > 0
  }
  tried = list(candidates(experiment, topology, fixed=fixed))
  if not tried:
    raise ValueError(
      f'no mesh{" with " + arguments.mesh if fixed else ""} divides the devices '
      f'of {topology.name} and batch_size {experiment.batch_size} among them; '
      'change one of these.'
    )
  reports, failed = [], []
  for number, candidate in enumerate(tried, 1):
    mesh, remat = candidate.mesh, remat_of(candidate)
    last = reports[-1] if reports else None
    if last and not last.fits and last.mesh == mesh.sizes(topology.devices):
      continue  # The policy before keeps less, and even that is too much.
    extra = [f'mesh={mesh!r}']
    if has_remat(candidate):
      extra.append(f'model.stack.remat={remat!r}')
    try:
      report = _apart(arguments, variables, extra)
    except (RunFailed, ValueError) as error:
      first, *rest = str(error).strip().splitlines()
      reason = ' '.join((first, *rest[-1:]))[:300]
      failed.append(f'{mesh} remat={remat}: failed: {reason}')
      print(f'{number}/{len(tried)} {failed[-1]}', flush=True)
      continue
    reports.append(report)
    print(f'{number}/{len(tried)} {_line(report)}', flush=True)
  if not reports:
    raise RunFailed('no mesh could be compiled; the reasons are above.')
  print('', *failed, sep='\n')
  return ranking(reports)


def _line(report: Any) -> str:
  axes = ' '.join(f'{k}={n}' for k, n in report.mesh.items() if n > 1)
  time = ''
  if report.fits:
    seconds = report.estimate()['step_seconds_without_overlap']
    time = f', {1e3 * seconds:.1f} ms without overlap'
  return (
    f'{axes} remat={report.remat}: {report.verdict().partition(";")[0]}{time}'
  )


def _work(arguments: argparse.Namespace) -> None:
  """Compiles in this process, whose environment is set up for it."""
  from jaxformers.aot.compile import compile_step
  from jaxformers.aot.hardware import Topology

  report = compile_step(
    experiment_from(arguments),
    Topology.parse(arguments.topology),
    step=arguments.step,
    length=arguments.length,
    fast=arguments.fast,
  )
  arguments.worker.write_text(json.dumps(report.to_json()))


def _show(reports: list[Any], arguments: argparse.Namespace) -> None:
  """Prints the best report, writes all, and fails if nothing fits."""
  from jaxformers.aot.report import table
  from jaxformers.train.errors import RunFailed

  print(table(reports[0]))
  if arguments.json is not None:
    trees = [report.to_json() for report in reports]
    tree = trees if arguments.search else trees[0]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(tree, indent=2) + '\n')
  if not reports[0].fits:
    raise RunFailed(reports[0].verdict())
