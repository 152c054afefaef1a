"""Recording of steps: which ones, and that a trace comes out."""

import jax
import jax.numpy as jnp
import pytest

from jaxformers.train.profile import Profile


@pytest.mark.parametrize(
  ('first', 'last', 'count', 'expected'),
  [
    (1, 100, 5, [3, 4, 5, 6, 7]),  # after compiling and a step to settle
    (41, 100, 2, [43, 44]),
    (1, 4, 3, [2, 3, 4]),
    (1, 3, 9, [1, 2, 3]),
    (1, 9, 0, []),
  ],
)
def test_steps_after_the_first_are_recorded(
  monkeypatch, tmp_path, first, last, count, expected
):
  opened, recorded = [], []
  monkeypatch.setattr(jax.profiler, 'start_trace', opened.append)
  monkeypatch.setattr(jax.profiler, 'stop_trace', opened.pop)

  def train_step(state, batch):
    if opened:
      recorded.append(batch)
    return state, {}

  with Profile(tmp_path, first, last, count) as profile:
    step = profile(train_step)
    for number in range(first, last + 1):
      step(0, number)
  assert recorded == expected
  assert opened == []


def test_leaving_early_keeps_what_was_recorded(tmp_path):
  step = jax.jit(lambda state, batch: (state + batch, {}))
  with Profile(tmp_path, 1, 100, 50) as profile:
    recording = profile(step)
    state = jnp.zeros(3)
    for _ in range(4):
      state, _ = recording(state, 1.0)
  (trace,) = tmp_path.glob('plugins/profile/*/*.xplane.pb')
  assert b'train' in trace.read_bytes()
  jax.profiler.start_trace(tmp_path / 'again')  # It was closed.
  jax.profiler.stop_trace()
