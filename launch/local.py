"""Starts N processes of a run on this computer: the code path of a pod, at home.

For GPUs of one host a single process is simpler, and it is what `jaxformers
train` does without this file. Several are for trying what a cluster will do:

  python launch/local.py --processes 2 --cpu-devices 4 -- \\
      train experiments/lm.py --workdir runs/two

Ctrl-C and SIGTERM let the run save and leave; the same command resumes. When one
process dies the others are ended, and with `--restarts N` all are started again.
"""

import argparse
from collections.abc import Sequence
import os
import shlex
import signal
import socket
import subprocess
import sys
import time

LEFT = 75  # Asked to leave before the end, or lost another process.
FINAL = (0, 1, 2)  # Done, the run failed, bad input: again would not help.
PATIENCE_SECONDS = 15  # For processes to end by themselves when one has failed.


def free_port() -> int:
  """Returns a port that nobody uses at the moment."""
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return listener.getsockname()[1]


def commands(words: Sequence[str], count: int, port: int) -> list[list[str]]:
  """Returns the command of each process.

  Args:
    words: arguments of `jaxformers`, the first being `train`.
    count: how many processes.
    port: at which they meet.
  """
  who = ['--coordinator', f'127.0.0.1:{port}', '--processes', str(count)]
  who += ['--left-status', str(LEFT)]
  base = [sys.executable, '-m', 'jaxformers', *words, *who]
  return [[*base, '--process', str(index)] for index in range(count)]


def environment(options: argparse.Namespace, index: int) -> dict[str, str]:
  """Returns the variables that give a process its devices.

  Args:
    options: the parsed ones.
    index: number of the process.
  """
  if options.cpu_devices is not None:
    count = str(options.cpu_devices)
    return {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': count}
  if options.gpus is not None:
    own = range(index * options.gpus, (index + 1) * options.gpus)
    return {'CUDA_VISIBLE_DEVICES': ','.join(map(str, own))}
  return {}


def run_once(options: argparse.Namespace) -> int:
  """Runs all processes once and returns the status that stands for them."""
  starts = [
    (words, environment(options, index))
    for index, words in enumerate(
      commands(options.words, options.processes, free_port())
    )
  ]
  if options.dry_run:
    for words, variables in starts:
      print(*(f'{k}={v}' for k, v in variables.items()), shlex.join(words))
    return 0
  processes = [
    subprocess.Popen(words, env=os.environ | variables, start_new_session=True)
    for words, variables in starts
  ]

  def pass_on(number, frame):
    del number, frame
    for process in processes:
      process.terminate()

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, pass_on)
  return summary(wait(processes))


def wait(processes: Sequence[subprocess.Popen]) -> list[int]:
  """Waits for all; when one has failed, the others are given little time.

  Args:
    processes: those of one run.

  Returns:
    Their statuses, those that had to be killed left out.
  """
  deadline = None
  while None in [process.poll() for process in processes]:
    failed = [i for i, p in enumerate(processes) if p.returncode]
    if failed and deadline is None:
      deadline = time.monotonic() + PATIENCE_SECONDS
    if deadline is not None and time.monotonic() > deadline:
      status = processes[failed[0]].returncode
      print(
        f'local.py: process {failed[0]} has died (status {status}), and the '
        'others cannot go on without it: ending them.',
        file=sys.stderr,
      )
      ended = [p.returncode for p in processes if p.poll() is not None]
      for process in processes:
        process.kill()
        process.wait()
      return ended
    time.sleep(0.1)
  return [process.returncode for process in processes]


def summary(statuses: Sequence[int]) -> int:
  """Returns one status: that which says most about whether to start again.

  Args:
    statuses: of the processes; negative for signals.
  """
  reasons = [s for s in statuses if s in FINAL[1:]] or [
    s for s in statuses if s
  ]
  return reasons[0] if reasons else 0


def main() -> int:
  """Runs, and runs again while that may help."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--processes', type=int, default=2, metavar='N')
  devices = parser.add_mutually_exclusive_group()
  devices.add_argument(
    '--gpus', type=int, metavar='N', help='how many each process gets'
  )
  devices.add_argument(
    '--cpu-devices', type=int, metavar='N', help='split the CPU into so many'
  )
  parser.add_argument(
    '--restarts', type=int, default=0, metavar='N', help='(default: 0)'
  )
  parser.add_argument(
    '--dry-run', action='store_true', help='print the commands, run nothing'
  )
  parser.add_argument('words', nargs='+', metavar='-- train FILE ...')
  options = parser.parse_args()
  for restart in range(options.restarts + 1):
    status = run_once(options)
    if status in FINAL or restart == options.restarts:
      break
    print(f'local.py: status {status}: starting again', file=sys.stderr)
  return status if status >= 0 else 128 - status


if __name__ == '__main__':
  sys.exit(main())
