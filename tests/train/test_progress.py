"""Rates and remaining times are those of this process, without its pauses."""

import contextlib
import io

import jax
import pytest

from jaxformers.train.progress import Meter
from jaxformers.train.progress import Progress

VALUES = {'loss': 2.34567, 'learning_rate': 1e-3, 'gradient_norm': 0.8312}


class FakeClock:
  """A clock that is moved by hand."""

  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock():
  return FakeClock()


def run(progress, clock, steps, seconds):
  for step in steps:
    clock.now += seconds
    progress.update(step, VALUES)


def test_speed_leaves_out_the_first_step(clock):
  meter = Meter(100, 0, clock)
  clock.now += 60.0  # compiling
  meter.advance(1)
  assert meter.steps_per_second is None
  assert meter.seconds_left is None
  clock.now += 0.5
  meter.advance(2)
  assert meter.steps_per_second == 2.0
  assert meter.seconds_left == 49.0


def test_resumed_run_does_not_count_the_steps_before(clock):
  meter = Meter(1000, 900, clock)
  for step in (901, 902, 903):
    clock.now += 4.0
    meter.advance(step)
  assert meter.steps_per_second == 0.25
  assert meter.seconds_left == 97 * 4.0


def test_pause_does_not_count(clock):
  meter = Meter(10, 0, clock)
  meter.advance(1)
  clock.now += 1.0
  with meter.pause():
    clock.now += 500.0
  meter.advance(2)
  assert meter.steps_per_second == 1.0


def test_pause_ends_when_its_block_fails(clock):
  meter = Meter(10, 0, clock)
  meter.advance(1)
  with contextlib.suppress(KeyError), meter.pause():
    clock.now += 500.0
    raise KeyError
  clock.now += 2.0
  meter.advance(2)
  assert meter.steps_per_second == 0.5


def test_speed_is_that_of_the_last_seconds(clock):
  meter = Meter(1000, 0, clock)
  for step in range(1, 101):
    clock.now += 1.0
    meter.advance(step)
  for step in range(101, 301):
    clock.now += 0.1
    meter.advance(step)
  assert meter.steps_per_second == pytest.approx(10.0)


def test_steps_longer_than_the_window_are_measured(clock):
  meter = Meter(10, 0, clock)
  for step in range(1, 6):
    clock.now += 40.0
    meter.advance(step)
  assert meter.steps_per_second == pytest.approx(1 / 40)


def test_timing_gives_tokens_and_utilisation(clock):
  progress = Progress(9, 0, 512, 3e9, 1e11, output=io.StringIO(), clock=clock)
  assert progress.timing == {}
  run(progress, clock, [1, 2, 3], 0.25)
  assert progress.timing == pytest.approx(
    {'steps_per_second': 4, 'tokens_per_second': 2048, 'mfu': 0.12}
  )


def test_utilisation_is_left_out_where_the_peak_is_unknown(clock):
  progress = Progress(9, 0, 512, 3e9, None, output=io.StringIO(), clock=clock)
  run(progress, clock, [1, 2], 1.0)
  assert set(progress.timing) == {'steps_per_second', 'tokens_per_second'}


def test_plain_lines_show_first_last_and_every_ten_seconds(clock):
  output = io.StringIO()
  with Progress(50, 0, 45_200, output=output, clock=clock) as progress:
    run(progress, clock, range(1, 51), 1.0)
  lines = output.getvalue().splitlines()
  steps = [line.split()[1] for line in lines]
  assert steps == ['1/50', '11/50', '21/50', '31/50', '41/50', '50/50']
  assert lines[0] == (
    'step 1/50  loss 2.3457  lr 1.00e-03  grad norm 0.831  ETA -:--'
  )
  assert lines[1] == (
    'step 11/50  loss 2.3457  lr 1.00e-03  grad norm 0.831'
    '  45.2k tokens/s  ETA 0:39'
  )


def test_utilisation_is_shown(clock):
  output = io.StringIO()
  progress = Progress(2, 0, 1_234_567, 1.0, 8.0, output=output, clock=clock)
  run(progress, clock, [1, 2], 1.0)
  assert '1.2M tokens/s  MFU 12.5%  ETA 0:00' in output.getvalue()


@pytest.mark.parametrize(
  ('seconds', 'shown'),
  [(59.6, '1:00'), (125, '2:05'), (3723, '1:02:03'), (90_000, '25:00:00')],
)
def test_remaining_time_is_written_as_a_clock_does(clock, seconds, shown):
  output = io.StringIO()
  progress = Progress(3, 0, 1, output=output, clock=clock)
  progress.update(1, {})
  clock.now += seconds
  progress.update(2, {})
  assert output.getvalue().endswith(f'ETA {shown}\n')


@pytest.mark.parametrize(
  ('rate', 'shown'),
  [(12, '12'), (999, '999'), (1000, '1.0k'), (99_950, '100k'), (3.2e9, '3.2G')],
)
def test_rates_have_units(clock, rate, shown):
  output = io.StringIO()
  progress = Progress(2, 0, rate, output=output, clock=clock)
  run(progress, clock, [1, 2], 1.0)
  assert f'  {shown} tokens/s' in output.getvalue()


def test_message_is_a_line_of_its_own(clock):
  output = io.StringIO()
  with Progress(9, 0, 1, output=output, clock=clock) as progress:
    progress.message('held-out [bold] 2.1')
  assert output.getvalue() == 'held-out [bold] 2.1\n'


def test_terminal_shows_a_bar_with_numbers_and_messages(clock, monkeypatch):
  monkeypatch.setenv('COLUMNS', '100')
  monkeypatch.setenv('TERM', 'xterm')
  output = Terminal()
  with Progress(40, 10, 512, 1.0, 8.0, output=output, clock=clock) as progress:
    run(progress, clock, range(11, 20), 0.5)
    progress.message('held-out [bold] 2.1')
    run(progress, clock, range(20, 31), 0.5)
  text = output.getvalue()
  assert '10/40' in text
  assert 'compiling' in text
  assert 'held-out [bold] 2.1\n' in text
  last = text.rsplit('30/40', 1)[1]
  assert 'ETA 0:05' in last
  assert 'loss 2.3457  lr 1.00e-03  grad norm 0.831' in last
  assert '1.0k tokens/s  MFU 25.0%' in last


def test_bar_is_not_redrawn_for_every_fast_step(clock, monkeypatch):
  monkeypatch.setenv('TERM', 'xterm')
  output = Terminal()
  with Progress(1000, 0, 1, output=output, clock=clock) as progress:
    run(progress, clock, range(1, 1001), 0.001)
  assert output.getvalue().count('/1000') < 20
  assert '1000/1000' in output.getvalue()


def test_only_process_0_shows_anything(clock, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  output = io.StringIO()
  with Progress(2, 0, 1, output=output, clock=clock) as progress:
    run(progress, clock, [1, 2], 1.0)
    progress.message('hello')
  assert output.getvalue() == ''
