"""Leaving a run cleanly when somebody asks."""

import contextlib
import signal
import threading
from types import FrameType

Handler = object


class Interrupt(contextlib.AbstractContextManager):
  """Notes SIGTERM and Ctrl-C instead of dying of them.

  The loop looks at `requested` once per step, saves and leaves. A second signal
  does what it always did. Outside the main thread, where Python delivers no
  signals, it does nothing.

  Attributes:
    requested: name of the signal that came, or None.
  """

  def __init__(self):
    self.requested: str | None = None
    self._before: dict[signal.Signals, Handler] = {}

  def __enter__(self) -> 'Interrupt':
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, kind, error, trace) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.requested = signal.Signals(number).name
    signal.signal(number, self._before[signal.Signals(number)])
