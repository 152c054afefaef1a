"""Decays of 0, of 1 and between, side by side, against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.ops import Modes
from jaxformers.ops import lti_convolution
from jaxformers.ops import selective_recurrence
from jaxformers.ops import wkv

L, D, S = 100, 4, 2
LOG_DECAY = np.array([-np.inf, 0.0, -30.0, -0.01])
rng = np.random.default_rng(0)
X, STEP, KEY, BAR = rng.normal(size=(4, 1, L, D))
STEP = 0.5 + np.abs(STEP)
B, C = rng.normal(size=(2, 1, L, S))
OWN = rng.normal(size=D)


def alike(x, *constants):
  """Returns constants in the dtype of an array."""
  return [jnp.asarray(z, x.dtype) for z in constants]


def scanned(step, state, *inputs):
  """Runs a step over the tokens of the only row."""
  _, out_LD = jax.lax.scan(step, state, tuple(x[0] for x in inputs))
  return out_LD[None]


def lti(method, log_decay, x, write):
  decay = jnp.exp(log_decay) + 0j
  if method is not None:
    modes = Modes(decay[:, None], write[:, None] + 0j, (decay + 1)[:, None])
    return lti_convolution(x, modes, method=method, chunk=16).out

  def step(state, inputs):
    (u,) = inputs
    state = jnp.exp(log_decay) * state + write * u
    return state, (1 + jnp.exp(log_decay)) * state

  return scanned(step, jnp.zeros(D), x)


def selective(method, log_decay, x, write):
  # Steps vary, and rates of minus infinity are no numbers: as good as.
  a = jnp.maximum(jnp.stack([log_decay, log_decay[::-1]], axis=1), -1e4)
  step_sizes, b, c = alike(x, STEP, B, C)
  step_sizes *= write**2
  if method is not None:
    return selective_recurrence(x, step_sizes, a, b, c, method=method).out_BLE

  def step(state, inputs):
    u, t, b, c = inputs
    state = jnp.exp(t[:, None] * a) * state + (t * u)[:, None] * b
    return state, state @ c

  return scanned(step, jnp.zeros((D, S)), x, step_sizes, b, c)


def means(method, log_decay, x, write):
  key = alike(x, KEY)[0] * write
  if method is not None:
    return wkv(key, x, log_decay, write, method=method).out_BLD

  def step(state, inputs):
    k, v = inputs
    total, weight = state
    own = jnp.exp(write + k)
    out = (total + own * v) / (weight + own)
    decay = jnp.exp(log_decay)
    total, weight = decay * total + jnp.exp(k) * v, decay * weight + jnp.exp(k)
    return (total, weight), out

  return scanned(step, (jnp.zeros(D), jnp.zeros(D)), key, x)


METHODS = {
  lti: ('chunked', 'fft'),
  selective: ('fused', 'chunked'),
  means: ('fused', 'chunked'),
}


@pytest.mark.parametrize('operator', METHODS, ids=lambda f: f.__name__)
def test_they_do_as_a_loop_does_in_all_methods_with_gradients(operator):
  @functools.partial(jax.jit, static_argnums=0)
  def results(method, x, write):
    run = functools.partial(operator, method, jnp.asarray(LOG_DECAY, x.dtype))
    out, pull = jax.vjp(run, x, write)
    return out, *pull(jnp.asarray(BAR, x.dtype))

  with jax.enable_x64(True):
    expected = jax.tree.map(np.asarray, results(None, X, OWN))
    for method in METHODS[operator]:
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
          a, b, rtol=1e-10, atol=1e-10 * np.abs(b).max()
        ),
        results(method, X, OWN),
        expected,
      )
  single = jnp.asarray(X, jnp.float32), jnp.asarray(OWN, jnp.float32)
  actual = map(np.asarray, results(METHODS[operator][0], *single))
  for a, b in zip(actual, expected, strict=True):
    assert np.abs(a - b).max() < 1e-4 * np.abs(b).max()
