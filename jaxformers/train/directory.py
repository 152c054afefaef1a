"""A directory that belongs to one configuration, and who may write to it."""

import abc
from collections.abc import Iterator
import contextlib
import dataclasses
import difflib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import socket
import time
from typing import Any, ClassVar
import warnings

import jaxformers
from jaxformers.train import record as records

_LOCK = 'lock'
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


@dataclasses.dataclass(frozen=True)
class Directory(abc.ABC):
  """A directory that belongs to one configuration.

  Who writes holds `locked()` from before `prepare` until it has finished; who
  only reads needs neither. Subclasses say what lies where.

  Attributes:
    kind: What lies here, in one word.
    content: What the configuration is called; names the file that holds it.
    adaptable: Settings that may differ from those recorded.
    path: The directory; a string is accepted.

  Raises:
    ValueError: If the path is an address such as `gs://bucket/run`.
  """

  kind: ClassVar[str]
  content: ClassVar[str]
  adaptable: ClassVar[frozenset[str]] = frozenset()
  path: pathlib.Path

  def __post_init__(self):
    object.__setattr__(self, 'path', pathlib.Path(self.path))
    scheme = re.match('[a-z][a-z0-9+]+:/', str(self.path))
    if scheme:
      raise ValueError(
        f'{self.path} names a store and not a directory: locks, metrics and '
        'checkpoints need a file system. Mount the store, for gs:// with '
        'gcsfuse, and pass the path at which it is mounted.'
      )

  @property
  def record(self) -> pathlib.Path:
    """The configuration as JSON."""
    return self.path / f'{self.content}.json'

  @property
  def exists(self) -> bool:
    """Whether this directory was prepared."""
    return self.record.is_file()

  @contextlib.contextmanager
  def locked(self, process: int = 0) -> Iterator[None]:
    """Keeps other trainers away for as long as the context lasts.

    The directory is made if need be. The kernel releases the lock when the
    process ends, however it ends.

    Args:
      process: Index of this process; only process 0 takes the lock.

    Yields:
      Nothing.

    Raises:
      BlockingIOError: If another process holds the lock; says which.
      ValueError: If the directory holds something else.
      OSError: If the directory cannot be made or written to.
    """
    if process != 0:
      yield
      return
    self._claim()
    descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
      _lock(descriptor, self.path)
      yield
    finally:
      os.close(descriptor)

  def prepare(
    self, record: Any, *, device: str | None = None, process: int = 0
  ) -> None:
    """Makes the directory that of a configuration, or checks that it is.

    Args:
      record: What `to_record` made of the experiment.
      device: Kind of the devices, for the reader of the file.
      process: Index of this process; only process 0 writes. The others check
        what is there, so that all of them fail together.

    Raises:
      ValueError: If the directory holds another configuration; lists the
        differences. Also if it holds something else.
      OSError: If the directory cannot be made or written to.
    """
    if self.exists:
      self._check_same(record)
    if process == 0:
      self._claim()
      if not self.exists:
        self._write(record, device)

  def holder(self) -> str:
    """Returns what the process that holds the lock wrote about itself."""
    return (self.path / _LOCK).read_text('utf-8')

  def check_shared(self, holder: str, seconds: float = 60) -> None:
    """Checks that this process sees what process 0 writes.

    Args:
      holder: What `holder` returned there.
      seconds: How long to try: network file systems show changes late.

    Raises:
      ValueError: If it does not.
    """
    end = time.monotonic() + seconds
    while not self._is_held_by(holder):
      if time.monotonic() > end:
        raise ValueError(
          f'{self.path} on {socket.gethostname()} is not the directory that '
          f'process 0 ({holder.strip()}) writes to; all processes need the '
          'same one: choose a --workdir on a file system that they share.'
        )
      time.sleep(0.2)

  def _is_held_by(self, holder: str) -> bool:
    try:
      return self.holder() == holder
    except FileNotFoundError:
      return False

  def load(self) -> Any:
    """Reads the configuration.

    Returns:
      The record; `from_record` builds the experiment.

    Raises:
      FileNotFoundError: If there is none here.
      ValueError: If the file is damaged.
    """
    return self._read(self.content)

  def environment(self) -> dict[str, str]:
    """Reads on what the directory was begun.

    Returns:
      The kind of the devices, and versions by name.

    Raises:
      FileNotFoundError: If there is no configuration here.
      ValueError: If the file is damaged.
    """
    return {'device': str(self._read('device')), **self._read('versions')}

  def _read(self, key: str) -> Any:
    """Returns a part of the file that holds the configuration."""
    if not self.exists:
      raise FileNotFoundError(self._absent())
    try:
      return json.loads(self.record.read_text('utf-8'))[key]
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f'{self.record} is damaged ({type(error).__name__}: {error}); restore '
        'it from a copy, or start again in another directory with --workdir.'
      ) from error

  def _check_same(self, record: Any) -> None:
    old, new = (
      {k: v for k, v in x.items() if k not in self.adaptable}
      for x in (self.load(), record)
    )
    if lines := records.differences(old, new):
      listed = '\n  '.join(lines)
      raise ValueError(
        f'{self.path} holds a {self.kind} with other settings:\n  {listed}\n'
        'Choose another --workdir for the new settings, or repeat the old ones '
        'to resume.'
      )

  def _claim(self) -> None:
    """Makes the directory; refuses one that is not ours to write to."""
    try:
      self.path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
      raise NotADirectoryError(
        f'{self.path} cannot be a {self.kind} directory: a file is in the '
        'way; choose another --workdir.'
      ) from error
    except OSError as error:
      raise PermissionError(_cannot_write(self.path, error.strerror)) from error
    if not os.access(self.path, os.W_OK | os.X_OK):
      raise PermissionError(_cannot_write(self.path, 'permission denied'))
    strangers = {p.name for p in self.path.iterdir()}
    strangers -= {_LOCK, f'{self.record.name}.new'}
    if strangers and not self.exists:
      raise ValueError(
        f'{self.path} is not empty and not a {self.kind} (it holds '
        f'{_some(strangers)}, but no {self.record.name}); choose another --workdir.'
      )

  def _write(self, record: Any, device: str | None) -> None:
    content = {self.content: record, 'versions': versions(), 'device': device}
    text = json.dumps(content, indent=2, allow_nan=False) + '\n'
    write_whole(self.record, text)

  def _absent(self) -> str:
    """Says what there is instead of this directory."""
    path, kind, name = self.path, self.kind, self.record.name
    if path.is_dir():
      return f'{path} is not a {kind}: it has no {name}.'
    parent = path.parent
    there = sorted(p.parent.name for p in parent.glob(f'*/{name}'))
    close = difflib.get_close_matches(path.name, there, n=1)
    if close:
      return f'there is no {kind} {path}; did you mean {parent / close[0]}?'
    if there:
      listed = f'in {parent} there are {", ".join(there)}'
    else:
      listed = f'there are no {kind}s in {parent}; make one first'
    return f'there is no {kind} {path}; {listed}.'


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes a file so that a reader sees all of it or what was there before.

  Args:
    path: The file; may exist.
    text: What it shall hold.

  Raises:
    OSError: If it cannot be written.
  """
  unfinished = path.with_name(f'{path.name}.new')
  with unfinished.open('w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(unfinished, path)


def versions() -> dict[str, str]:
  """Names the versions of all that has a say in what is computed.

  Returns:
    Of this package, those it computes with, and Python.
  """
  installed = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {
    'jaxformers': jaxformers.__version__,
    **installed,
    'python': platform.python_version(),
  }


def _lock(descriptor: int, path: pathlib.Path) -> None:
  """Locks an open file and writes into it who did."""
  import fcntl  # not on Windows

  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    holder = os.pread(descriptor, 200, 0).decode('utf-8', 'replace').strip()
    raise BlockingIOError(
      f'{path} is in use by {holder or "another process"}; wait for it, '
      'stop it, or choose another --workdir.'
    ) from error
  except OSError as error:
    warnings.warn(
      f'{path}: this file system has no locks ({error.strerror}); make sure '
      'that only one trainer writes there.',
      stacklevel=4,
    )
  os.ftruncate(descriptor, 0)
  os.pwrite(
    descriptor, f'pid {os.getpid()} on {socket.gethostname()}\n'.encode(), 0
  )


def _cannot_write(path: pathlib.Path, reason: str | None) -> str:
  return f'cannot write to {path} ({reason}); choose another --workdir.'


def _some(names: set[str], limit: int = 3) -> str:
  more = ', ...' if len(names) > limit else ''
  return ', '.join(sorted(names)[:limit]) + more
