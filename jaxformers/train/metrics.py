"""What a run measured, as JSON lines and as TensorBoard event files.

`metrics.jsonl` holds only what the state of the run determines, so that after a
kill and a resume it equals, byte for byte, that of a run that was never
interrupted. What depends on the clock goes to `timing.jsonl` beside it.
"""

from collections.abc import Mapping
import io
import itertools
import json
import math
import os
import pathlib
import socket
import struct
import time
from typing import Any

import jax

from jaxformers.train.errors import RunFailed

# JSON has no words for these; the strings are those of Protocol Buffers.
_NOT_FINITE = {'NaN': math.nan, 'Infinity': math.inf, '-Infinity': -math.inf}
_counter = itertools.count()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Reads a file of metrics, also while it is being written.

  Args:
    path: a `metrics.jsonl` or `timing.jsonl`.

  Returns:
    One dictionary per line, in order: `step`, `split` and the values as floats,
    bit for bit as they were written. A last line that is not complete, as a
    kill leaves it, is left out.

  Raises:
    ValueError: a line before the last is not a line of metrics.
  """
  return [record for _, record in _read_lines(pathlib.Path(path))]


def _read_lines(path: pathlib.Path) -> list[tuple[bytes, dict[str, Any]]]:
  """Returns every complete line with what it says."""
  *lines, _ = path.read_bytes().split(b'\n')
  records = []
  for number, line in enumerate(lines, start=1):
    try:
      record = json.loads(line)
      record['step'] + 0  # every line has a number there
    except (ValueError, TypeError, LookupError) as error:
      raise ValueError(
        f'{path}, line {number}: expected a line of metrics, got'
        f' {line[:60]!r}. Mend or delete this line.'
      ) from error
    records.append((line, {k: _from_json(k, v) for k, v in record.items()}))
  return records


def _from_json(name: str, value: Any) -> Any:
  """Returns a value as it was before it was written."""
  if name == 'split' or not isinstance(value, str):
    return value
  return _NOT_FINITE[value]


def _to_json(value: float) -> float | str:
  """Returns a value as strict JSON can hold it."""
  value = float(value)  # exact for float32 and bfloat16, and so is its repr
  if math.isfinite(value):
    return value
  return 'NaN' if math.isnan(value) else f'{"-" * (value < 0)}Infinity'


def _forget(path: pathlib.Path, first_step: int) -> None:
  """Drops the lines of `first_step` and later, and an incomplete last one.

  All at once: a kill leaves the old file or the new one.
  """
  if not path.exists():
    return
  kept = [x for x, record in _read_lines(path) if record['step'] < first_step]
  temporary = path.with_name(f'{path.name}.tmp')
  with temporary.open('wb') as file:
    file.writelines(line + b'\n' for line in kept)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def _append(file: io.RawIOBase, data: bytes) -> None:
  """Writes all of `data`: a file without buffer may take a part only."""
  while data:
    data = data[file.write(data) :]


class _EventFile:
  """One TensorBoard event file, complete after every event.

  The writers of tensorboardX queue events for a thread: what is in the queue is
  lost by a kill, and once the thread has died of a full disk the queue blocks
  the training loop for ever. Their names also repeat within a second. So the
  records are framed here: it takes three lines.

  Args:
    folder: where the file is made.
    purge_step: TensorBoard hides what earlier files say of this step and later.
  """

  def __init__(self, folder: pathlib.Path, purge_step: int):
    from tensorboardX.proto import event_pb2

    self._proto = event_pb2
    unique = f'{os.getpid()}.{next(_counter)}'
    stem = f'events.out.tfevents.{time.time_ns() // 10**9:010d}'
    path = folder / f'{stem}.{socket.gethostname()}.{unique}'
    self._file = path.open('xb', buffering=0)
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(file_version='brain.Event:2')
    self._write(step=purge_step, session_log=start)

  def _write(self, **fields: Any) -> None:
    """Appends one event: length, data, and a checksum of each."""
    from tensorboardX.record_writer import masked_crc32c

    event = self._proto.Event(wall_time=time.time(), **fields)
    data = event.SerializeToString()
    length = struct.pack('<Q', len(data))
    checksums = [struct.pack('<I', masked_crc32c(x)) for x in (length, data)]
    _append(self._file, length + checksums[0] + data + checksums[1])

  def write(self, step: int, prefix: str, values: Mapping[str, float]) -> None:
    """Appends scalars named `<prefix>/<name>`."""
    from tensorboardX.proto import summary_pb2

    scalars = [
      summary_pb2.Summary.Value(tag=f'{prefix}/{name}', simple_value=value)
      for name, value in values.items()
    ]
    self._write(step=step, summary=summary_pb2.Summary(value=scalars))

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


class MetricsLog:
  """The measurements of a run; a context manager.

  Lines appear in the order of the calls, and each is in the file when `write`
  returns, so a kill loses none. Only process 0 writes; elsewhere nothing
  happens.

  Args:
    directory_jsonl: the file of the JSON lines; `timing.jsonl` is beside it.
    events_dir: folder of the event files; made if missing. Every start of a run
      adds one.
    first_step: the first step that this process will write. What the files say
      of it and later ones comes from a process that was killed after its last
      checkpoint, and is dropped.

  Raises:
    RunFailed: the files cannot be written.
    ValueError: one of them holds something else.
  """

  def __init__(
    self,
    directory_jsonl: str | os.PathLike[str],
    events_dir: str | os.PathLike[str],
    *,
    first_step: int,
  ):
    self._path = pathlib.Path(directory_jsonl)
    self._events_dir = pathlib.Path(events_dir)
    self._is_writer = jax.process_index() == 0
    if not self._is_writer:
      return
    try:
      self._open(first_step)
    except OSError as error:
      raise self._failure(error) from error

  def _open(self, first_step: int) -> None:
    """Forgets the steps to come and opens the files."""
    timing = self._path.with_name('timing.jsonl')
    for path in (self._path, timing):
      path.parent.mkdir(parents=True, exist_ok=True)
      _forget(path, first_step)
    self._events_dir.mkdir(parents=True, exist_ok=True)
    # Without a buffer nothing is left that could fail when the file is closed.
    self._metrics_file = self._path.open('ab', buffering=0)
    self._timing_file = timing.open('ab', buffering=0)
    self._events = _EventFile(self._events_dir, first_step)

  def __enter__(self) -> 'MetricsLog':
    return self

  def __exit__(self, kind, error, trace) -> None:
    if self._is_writer:
      self._metrics_file.close()
      self._timing_file.close()
      self._events.close()

  def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
    """Appends measurements that the state of the run determines.

    Args:
      step: the step they belong to.
      split: what they were measured on, such as `'train'` or `'heldout'`.
      values: numbers by name. Not finite ones are written as `"NaN"`,
        `"Infinity"`, `"-Infinity"`, since JSON has no such numbers.

    Raises:
      RunFailed: the disk is full.
      ValueError: a name is `step` or `split`.
    """
    if reserved := {'step', 'split'} & set(values):
      raise ValueError(
        f'Metrics must not be called {" or ".join(sorted(reserved))}: these'
        ' name the step and the data of a line. Rename them.'
      )
    if self._is_writer:
      self._record(self._metrics_file, step, {'split': split}, split, values)

  def write_timing(self, step: int, values: Mapping[str, float]) -> None:
    """Appends measurements that depend on the clock, such as tokens per second.

    Args:
      step: the step they belong to.
      values: numbers by name.

    Raises:
      RunFailed: the disk is full.
    """
    if self._is_writer:
      self._record(self._timing_file, step, {}, 'timing', values)

  def _record(self, file, step, extra, prefix, values) -> None:
    """Appends one line to a file and one event to the event file."""
    line = {'step': int(step), **extra}
    line |= {name: _to_json(value) for name, value in values.items()}
    try:
      _append(file, json.dumps(line, allow_nan=False).encode() + b'\n')
      self._events.write(int(step), prefix, values)
    except OSError as error:
      raise self._failure(error) from error

  def _failure(self, error: OSError) -> RunFailed:
    """Describes a failure to write."""
    return RunFailed(
      f'Cannot write metrics to {error.filename or self._path.parent}:'
      f' {error.strerror}. Once this is mended, the same command resumes from'
      ' the newest checkpoint.'
    )
