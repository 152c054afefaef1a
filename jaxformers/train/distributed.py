"""One run on several processes: how they find each other, agree, and end.

Every process runs the same program on its own devices. Process 0 alone writes
and prints; all enter every collective. A process that dies takes the others
along within `heartbeat_timeout` seconds, and whoever started them starts all of
them again: the run goes on from its newest checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import difflib
import importlib.util
import json
import os
import re
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils
import numpy as np

from jaxformers.train.errors import FailedTogether
from jaxformers.train.errors import ProcessLost
from jaxformers.train.errors import RunFailed

TRY_AGAIN = 75
"""Exit status of a process that lost the others: starting all again helps."""

# The end of process 0, which the others are connected to, makes them abort: it
# waits until they have said what they have to say.
_LAST_WORDS_SECONDS = 2.0
# Of the run-time library over ours, so that ours speaks first.
_MARGIN_SECONDS = 30
_BROKEN = re.compile(
  'Gloo|NCCL|coordination service|UNAVAILABLE|DEADLINE_EXCEEDED'
)


def start(
  coordinator: str | None = None,
  count: int | None = None,
  index: int | None = None,
  *,
  start_timeout: int = 300,
  heartbeat_timeout: int = 100,
) -> None:
  """Joins the other processes of a run; before the first use of a device.

  Without `coordinator` the launcher is asked: Slurm, Open MPI, Cloud TPU and
  indexed Jobs of Kubernetes say who there is. Where none of them started
  several processes, this one is alone and nothing happens.

  A process that has a host for itself has all of its devices. Where a launcher
  puts several onto a host, each gets the GPU of its number there, unless the
  launcher has bound it to one.

  Args:
    coordinator: `HOST:PORT` of process 0, the same on every process; the port
      must be free there.
    count: number of processes; 1 for this one alone, whatever started it.
    index: number of this process, from 0.
    start_timeout: seconds to wait for the others.
    heartbeat_timeout: seconds without a sign of life after which a process is
      taken for dead.

  Raises:
    ValueError: if the arguments do not go together.
    OSError: if the port is taken.
  """
  _check(coordinator, count, index)
  if count == 1 or (coordinator is None and not is_cluster(os.environ)):
    return
  where = coordinator or 'the address that the launcher gives'
  if coordinator is not None and index == 0:
    _check_free(coordinator)
  with _impatient(start_timeout, where):
    try:
      jax.distributed.initialize(
        coordinator,
        count,
        index,
        local_device_ids=local_devices(os.environ),
        cluster_detection_method=None if coordinator is None else 'deactivate',
        initialization_timeout=start_timeout + _MARGIN_SECONDS,
        heartbeat_timeout_seconds=heartbeat_timeout,
        shutdown_timeout_seconds=heartbeat_timeout,
      )
    except (ValueError, RuntimeError) as error:
      raise ValueError(
        f'the launcher does not say who takes part ({error}); pass '
        '--coordinator HOST:PORT --processes N --process I, or --processes 1 '
        'to train alone.'
      ) from error


def _check(coordinator, count, index):
  """Raises unless the arguments of `start` go together."""
  if coordinator is None:
    if index is not None or count not in (None, 1):
      raise ValueError(
        'several processes need --coordinator HOST:PORT, the address of '
        'process 0, on each of them.'
      )
    return
  if not re.fullmatch(r'.+:\d+', coordinator):
    raise ValueError(
      f'--coordinator must be HOST:PORT, got {coordinator!r}; any free port of '
      'the host of process 0 will do.'
    )
  if count is None or index is None or not 0 <= index < count:
    raise ValueError(
      '--coordinator needs --processes N and --process I with 0 <= I < N, got '
      f'{count} and {index}.'
    )


def is_cluster(environment: Mapping[str, str]) -> bool:
  """Returns whether a launcher started this process as one of several.

  `jax.distributed.initialize` knows these launchers too, but cannot be asked
  without being obeyed: alone in a pod of Kubernetes it fails.

  Args:
    environment: the variables of this process.
  """
  if 'SLURM_STEP_NODELIST' in environment:  # Set by srun, not by sbatch.
    return int(environment['SLURM_NTASKS']) > 1
  if 'OMPI_COMM_WORLD_SIZE' in environment:
    return int(environment['OMPI_COMM_WORLD_SIZE']) > 1
  for name in ('TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES'):
    if name in environment:
      slices = int(environment.get('MEGASCALE_NUM_SLICES') or 1)
      return ',' in environment[name] or slices > 1
  if 'KUBERNETES_SERVICE_HOST' in environment:
    return 'JOB_COMPLETION_INDEX' in environment
  return _is_tpu_vm()


def _is_tpu_vm():
  """Whether this is a virtual machine of Cloud TPU, perhaps of a pod.

  Where there are no chips, importing jax has set the variable.
  """
  has_library = importlib.util.find_spec('libtpu') is not None
  return has_library and 'TPU_SKIP_MDS_QUERY' not in os.environ


def local_devices(environment: Mapping[str, str]) -> list[int] | None:
  """Returns `[]` for all devices that are visible, None to let JAX choose.

  Left to itself under Slurm and Open MPI, JAX takes one GPU per process.

  Args:
    environment: the variables of this process.
  """
  if 'JAX_LOCAL_DEVICE_IDS' in environment:
    return None
  tasks = environment.get('SLURM_STEP_TASKS_PER_NODE') or environment.get(
    'OMPI_COMM_WORLD_LOCAL_SIZE'
  )
  has_host = tasks is None or re.fullmatch(r'1(\(x\d+\))?', tasks)
  is_bound = re.fullmatch('[^,]+', environment.get('CUDA_VISIBLE_DEVICES', ''))
  return [] if has_host or is_bound else None


def _check_free(coordinator):
  """Raises if the port of process 0 is taken: waiting would be in vain."""
  port = int(coordinator.rpartition(':')[2])
  try:
    socket.create_server(('', port)).close()
  except OSError as error:
    raise OSError(
      error.errno,
      f'process 0 cannot listen at {coordinator} ({error.strerror}); choose '
      'another port for --coordinator, or end the run that uses it',
    ) from error


@contextlib.contextmanager
def _impatient(seconds: float, where: str) -> Iterator[None]:
  """Ends the process if the block lasts too long: JAX would abort it."""

  def give_up():
    _end(
      TRY_AGAIN,
      f'waited {seconds} seconds in vain for the other processes to meet at '
      f'{where}. Is each of them running, with the same address and number of '
      'processes, and does the firewall of process 0 let them in?',
    )

  timer = threading.Timer(seconds, give_up)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def several() -> bool:
  """Returns whether there are other processes; touches no device if not."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def prefix() -> str:
  """Returns what errors of this process begin with; '' on process 0."""
  index = jax.process_index() if several() else 0
  return f'process {index}: ' if index else ''


def gather(value: Any) -> list[Any]:
  """Returns what each process says, in their order; all must take part.

  Args:
    value: of JSON.
  """
  if not several():
    return [value]
  text_N = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(text_N.size))
  padded_N = np.zeros(int(sizes.max()), np.uint8)
  padded_N[: text_N.size] = text_N
  texts = multihost_utils.process_allgather(padded_N)
  return [
    json.loads(bytes(text_N[:size]))
    for text_N, size in zip(texts, sizes, strict=True)
  ]


def tell_all(value: Any) -> Any:
  """Returns what process 0 says; all must take part.

  Args:
    value: of JSON; that of the others is ignored.
  """
  return gather(value if jax.process_index() == 0 else None)[0]


def check_same(what: str, lines: list[str]) -> None:
  """Makes all processes fail unless all of them have the same.

  Args:
    what: they should have, in the plural.
    lines: text that describes it.

  Raises:
    ValueError: on process 0, with the first difference from it.
    FailedTogether: on the others.
  """
  first = tell_all(lines)
  with agreement():
    if lines != first:
      marked = difflib.ndiff(first, lines)
      shown = '\n  '.join(x for x in marked if x.startswith(('- ', '+ ')))
      raise ValueError(
        f'this process has other {what} than process 0:\n  {shown}\nStart all '
        'processes with the same command, files and packages.'
      )


def call_first(function: Callable[[], Any]) -> Any:
  """Lets process 0 call a function and returns its result on all.

  Args:
    function: returns JSON, and must not wait for other processes.
  """
  result = None
  with agreement():
    if jax.process_index() == 0:
      result = function()
  return tell_all(result)


def wait_for_all() -> None:
  """Returns when every process has got here."""
  if several():
    multihost_utils.sync_global_devices('jaxformers')


@contextlib.contextmanager
def agreement() -> Iterator[None]:
  """Makes all processes fail if one of them fails in the block.

  What fails on one of them, such as reading a file, would leave the others
  waiting for it. Process 0 says what happened. The block must not wait for other
  processes itself.

  Raises:
    FailedTogether: on the processes that have nothing to say.
    RunFailed: on process 0, if only others failed.
    ValueError: the same, if what they got is at fault.
  """
  failure = None
  try:
    yield
  except Exception as error:
    failure = error
  if jax.distributed.is_initialized():
    _settle(failure)
  elif failure is not None:
    raise failure


def _settle(failure: Exception | None) -> None:
  """Raises on all processes if one of them has a failure."""
  said = failure and {
    'text': str(failure) or type(failure).__name__,
    'is_run': isinstance(failure, RunFailed),
  }
  failures = {i: said for i, said in enumerate(gather(said)) if said}
  if not failures:
    return
  if jax.process_index() != 0:
    raise FailedTogether('process 0 says why.') from failure
  if failure is not None:
    raise failure
  index, said = next(iter(failures.items()))
  kind = RunFailed if said['is_run'] else ValueError
  raise kind(f'process {index}: {said["text"]}')


@contextlib.contextmanager
def explained() -> Iterator[None]:
  """Says what the loss of another process means, where something reports it.

  Raises:
    ProcessLost: in place of an error of JAX or of what failed because of it,
      such as a checkpoint.
  """
  try:
    yield
  except Exception as error:
    reason = _loss(error) if several() else None
    if reason is None:
      raise
    raise ProcessLost(
      f'the connection to another process is lost ({reason}). It has probably '
      'died: see what it said last. Start all processes again with the same '
      'command, and the run goes on from its newest checkpoint.'
    ) from error


def _loss(error: BaseException | None) -> str | None:
  """Returns what an error or its causes say of a lost process, if they do."""
  seen = set()
  while error is not None and id(error) not in seen:  # A cause may be circular.
    if _BROKEN.search(str(error)):
      return str(error).splitlines()[0][:200]
    seen.add(id(error))
    error = error.__cause__ or error.__context__
  return None


def leave(status: int) -> NoReturn:
  """Ends a process that failed among others, which might never end otherwise.

  Leaving in good order would wait for all of them.

  Args:
    status: to leave with.
  """
  if jax.process_index() == 0:
    time.sleep(_LAST_WORDS_SECONDS)
  _end(status)


def _end(status, message=None):
  """Ends the process at once, without waiting for anything."""
  sys.stdout.flush()
  if message is not None:
    print(f'jaxformers: error: {message}', file=sys.stderr)
  sys.stderr.flush()
  os._exit(status)
