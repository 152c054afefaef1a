"""Recording a few training steps for xprof."""

from collections.abc import Callable
import contextlib
import pathlib
from typing import Any

import jax

_WARM_UP = (
  2  # The first step of a process compiles, the second still allocates.
)


class Profile(contextlib.AbstractContextManager):
  """Records some calls of a train step on process 0.

  `xprof --logdir FOLDER`, or TensorBoard with the xprof plugin, shows the traces:
  which operation took how long, on the host and on each of its devices.

  Args:
    folder: gets the trace, below `plugins/profile/<time>`.
    first: number of the first step that will be called.
    last: number of the last one.
    count: how many to record: those after the first two, if there are so many.
  """

  def __init__(self, folder: pathlib.Path, first: int, last: int, count: int):
    begin = max(first, min(first + _WARM_UP, last - count + 1))
    self._folder = folder
    self._step = first
    self._recorded = range(begin, min(begin + count, last + 1))
    self._is_open = False
    if jax.process_index() != 0:
      self._recorded = range(0)

  def __exit__(self, kind, error, trace) -> None:
    self._close()

  def __call__(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the train step with its calls counted and some recorded.

    Args:
      train_step: of a state and a batch.
    """

    def step(state, batch):
      number, self._step = self._step, self._step + 1
      if number not in self._recorded:
        return train_step(state, batch)
      if number == self._recorded.start:
        jax.block_until_ready(state)
        jax.profiler.start_trace(self._folder)
        self._is_open = True
      with jax.profiler.StepTraceAnnotation('train', step_num=number):
        done = train_step(state, batch)
      if number == self._recorded[-1]:
        jax.block_until_ready(done)
        self._close()
      return done

    return step

  def _close(self):
    if self._is_open:
      jax.profiler.stop_trace()
    self._is_open = False
