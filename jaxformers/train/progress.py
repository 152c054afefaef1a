"""What a run shows of itself while it goes on.

On a terminal, a bar with the rest of the time and the newest numbers; into a
file or a notebook, a plain line every ten seconds.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import math
import sys
import time
from typing import Any, TextIO

import jax

_LINE_EVERY = 10.0  # seconds between plain lines
_WINDOW = 10.0  # seconds over which a rate is measured
_REDRAW_EVERY = 0.1  # seconds between changes of the bar

Clock = Callable[[], float]


class Meter:
  """Measures the speed of this process alone.

  The first step is where measuring begins, since its time is that of the
  compiler; steps of an earlier process and paused time do not count.

  Args:
    total_steps: the last step of the run.
    first_step: how many steps were done before this process began.
    clock: seconds from any origin.
  """

  def __init__(self, total_steps: int, first_step: int, clock: Clock):
    self._total = total_steps
    self._step = first_step
    self._clock = clock
    self._paused = 0.0
    self._marks: list[tuple[float, int]] = []

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Leaves out the time spent within."""
    start = self._clock()
    try:
      yield
    finally:
      self._paused += self._clock() - start

  def advance(self, step: int) -> None:
    """Notes that `step` is done."""
    now = self._clock() - self._paused
    self._step = step
    self._marks.append((now, step))
    # The window starts at the last mark that is older than it, so that steps
    # slower than the window are measured too.
    while len(self._marks) > 2 and self._marks[1][0] <= now - _WINDOW:
      self._marks.pop(0)

  @property
  def steps_per_second(self) -> float | None:
    """Speed over the last window; None until two steps are done."""
    if len(self._marks) < 2:
      return None
    (start, first), (end, last) = self._marks[0], self._marks[-1]
    return (last - first) / (end - start) if end > start else None

  @property
  def seconds_left(self) -> float | None:
    """Time that the remaining steps take at this speed, or None."""
    speed = self.steps_per_second
    return (self._total - self._step) / speed if speed else None


class Progress:
  """Shows how far a run is; a context manager.

  Args:
    total_steps: the last step of the run.
    first_step: how many steps were done before this process began.
    tokens_per_step: tokens of one global batch.
    flops_per_step: operations that the model needs for a step, over all
      devices, if known; see `flops.model_flops`.
    peak_flops: what all devices together can do in a second, if known.
    output: where to show it; standard output if None. Process 0 alone shows
      anything.
    clock: seconds from any origin; for tests.
  """

  def __init__(
    self,
    total_steps: int,
    first_step: int,
    tokens_per_step: int,
    flops_per_step: float | None = None,
    peak_flops: float | None = None,
    *,
    output: TextIO | None = None,
    clock: Clock = time.monotonic,
  ):
    self._total = total_steps
    self._tokens = tokens_per_step
    self._load = None
    if flops_per_step and peak_flops:
      self._load = flops_per_step / peak_flops
    self._meter = Meter(total_steps, first_step, clock)
    self._display = _display(
      output or sys.stdout, first_step, total_steps, clock
    )

  def __enter__(self) -> 'Progress':
    self._display.open()
    return self

  def __exit__(self, kind, error, trace) -> None:
    self._display.close()

  @property
  def timing(self) -> dict[str, float]:
    """Speed over the last seconds; empty until two steps are done.

    `steps_per_second`, `tokens_per_second` and, where the peak is known,
    `mfu`: the fraction of the peak that the operations which the model needs
    make up, recomputation not among them.
    """
    speed = self._meter.steps_per_second
    if speed is None:
      return {}
    rates = {
      'steps_per_second': speed,
      'tokens_per_second': speed * self._tokens,
    }
    return rates if self._load is None else rates | {'mfu': speed * self._load}

  def update(self, step: int, values: Mapping[str, float]) -> None:
    """Shows that a step is done.

    Args:
      step: its number; the first is 1.
      values: `loss`, `learning_rate` and `gradient_norm` are shown.
    """
    self._meter.advance(step)
    eta = self._meter.seconds_left
    self._display.show(step, lambda: _facts(values, self.timing, eta))

  def message(self, text: str) -> None:
    """Prints lines that stay, above the bar if there is one."""
    self._display.message(text)

  def pause(self) -> contextlib.AbstractContextManager[None]:
    """Leaves the time spent in a `with` block out of the rates."""
    return self._meter.pause()


def _facts(
  values: Mapping[str, float], timing: Mapping[str, float], eta: float | None
) -> list[str]:
  """Returns what is known as short texts, the most wanted first."""
  formats = {
    'loss': 'loss {:.4f}',
    'learning_rate': 'lr {:.2e}',
    'gradient_norm': 'grad norm {:.3g}',
  }
  facts = [f.format(values[k]) for k, f in formats.items() if k in values]
  if 'tokens_per_second' in timing:
    facts.append(f'{_short(timing["tokens_per_second"])} tokens/s')
  if 'mfu' in timing:
    facts.append(f'MFU {timing["mfu"]:.1%}')
  return [*facts, f'ETA {_duration(eta)}']


def _short(number: float) -> str:
  """Returns a positive number with three digits and a unit: 45.2k."""
  for unit in ('', 'k', 'M', 'G'):
    if number < 999.5 or unit == 'G':
      digits = 0 if number >= 99.95 or not unit else 1
      return f'{number:.{digits}f}{unit}'
    number /= 1000


def _duration(seconds: float | None) -> str:
  """Returns a time as 1:02:03, 2:03 or, if unknown, -:--."""
  if seconds is None or not math.isfinite(seconds):
    return '-:--'
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{rest:02}' if hours else f'{minutes}:{rest:02}'


def _display(output: TextIO, first_step: int, total: int, clock: Clock) -> Any:
  """Chooses how to show a run."""
  if jax.process_index() != 0:
    return _Nothing()
  if output.isatty():
    return _Bar(output, first_step, total, clock)
  return _Lines(output, total, clock)


class _Nothing:
  """Shows nothing: for every process but the first."""

  def open(self) -> None:
    """Does nothing."""

  def close(self) -> None:
    """Does nothing."""

  def show(self, step: int, facts: Callable[[], list[str]]) -> None:
    """Does nothing."""

  def message(self, text: str) -> None:
    """Does nothing."""


class _Lines(_Nothing):
  """Prints a line for the first and last step and every ten seconds."""

  def __init__(self, output: TextIO, total: int, clock: Clock):
    self._output = output
    self._total = total
    self._clock = clock
    self._next = -math.inf

  def show(self, step: int, facts: Callable[[], list[str]]) -> None:
    """Prints a line if it is time for one."""
    now = self._clock()
    if now < self._next and step != self._total:
      return
    self._next = now + _LINE_EVERY
    text = '  '.join(facts())
    self.message(f'step {step}/{self._total}  {text}')

  def message(self, text: str) -> None:
    """Prints a line."""
    print(text, file=self._output, flush=True)


class _Bar(_Nothing):
  """Draws a bar at the bottom of a terminal."""

  def __init__(self, output: TextIO, first_step: int, total: int, clock: Clock):
    import rich.console
    import rich.progress

    self._clock = clock
    self._next = -math.inf
    self._total = total
    self._console = rich.console.Console(file=output, highlight=False)
    # A second line, since one of 80 columns has no room for all.
    self._bar = rich.progress.Progress(
      rich.progress.BarColumn(bar_width=None),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TextColumn('{task.fields[eta]}', markup=False),
      console=self._console,
      expand=True,
      auto_refresh=False,
    )
    self._task = self._bar.add_task(
      '', total=total, completed=first_step, eta=''
    )
    self._live = None
    self._facts: list[str] = ['compiling']

  def _picture(self) -> Any:
    """Returns the two lines at the bottom."""
    import rich.console
    import rich.text

    numbers = rich.text.Text('  '.join(self._facts), overflow='ellipsis')
    numbers.no_wrap = True
    return rich.console.Group(self._bar.get_renderable(), numbers)

  def open(self) -> None:
    """Begins to draw."""
    import rich.live

    self._live = rich.live.Live(
      self._picture(), console=self._console, auto_refresh=False
    )
    self._live.start(refresh=True)

  def close(self) -> None:
    """Leaves the last state of the bar standing."""
    self._live.stop()

  def show(self, step: int, facts: Callable[[], list[str]]) -> None:
    """Redraws the bar unless that was done just now."""
    now = self._clock()
    if now < self._next and step != self._total:
      return
    self._next = now + _REDRAW_EVERY
    *self._facts, eta = facts()
    self._bar.update(self._task, completed=step, eta=eta)
    self._live.update(self._picture(), refresh=True)

  def message(self, text: str) -> None:
    """Prints a line above the bar."""
    self._console.print(text, markup=False, soft_wrap=True)
