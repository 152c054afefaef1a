"""Leaving a run cleanly when somebody asks."""

import contextlib
import os
import signal
import threading
from types import FrameType

from jax.experimental import multihost_utils

from jaxformers.train import distributed

Handler = object


class Interrupt(contextlib.AbstractContextManager):
  """Notes SIGTERM and Ctrl-C instead of dying of them.

  The loop asks `reached` once per step, saves and leaves. A second signal does
  what it always did. Outside the main thread, where Python delivers no signals,
  it does nothing.

  Of several processes it is enough that one gets a signal: JAX notes SIGTERM
  and spreads the word, and they agree on the step at which all leave. Ctrl-C is
  passed on as SIGTERM there.

  Attributes:
    requested: name of the signal that came, or None.
  """

  def __init__(self):
    self.requested: str | None = None
    self._before: dict[signal.Signals, Handler] = {}

  def __enter__(self) -> 'Interrupt':
    if threading.current_thread() is not threading.main_thread():
      return self
    # A handler for SIGTERM would take the place of JAX's.
    if distributed.several():
      handlers = {signal.SIGINT: self._pass_on}
    else:
      handlers = {signal.SIGTERM: self._note, signal.SIGINT: self._note}
    for number, handler in handlers.items():
      self._before[number] = signal.signal(number, handler)
    return self

  def __exit__(self, kind, error, trace) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def reached(self, step: int) -> bool:
    """Returns whether to leave after this step; all processes get one answer.

    Args:
      step: its number, one higher with every call.
    """
    if distributed.several() and multihost_utils.reached_preemption_sync_point(
      step
    ):
      self.requested = signal.SIGTERM.name
    return self.requested is not None

  def _note(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.requested = signal.Signals(number).name
    signal.signal(number, self._before[signal.Signals(number)])

  def _pass_on(self, number: int, frame: FrameType | None) -> None:
    del frame
    signal.signal(number, self._before[signal.Signals(number)])
    os.kill(os.getpid(), signal.SIGTERM)
