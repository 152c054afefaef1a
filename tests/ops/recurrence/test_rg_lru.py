"""The real-gated linear recurrent unit, against a NumPy loop."""

import functools

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from jaxformers.ops import rg_lru
from jaxformers.ops import rg_lru_decay
from jaxformers.ops.segments import advance
from jaxformers.ops.segments import start

B, L, D = 2, 7, 3
rng = np.random.default_rng(0)
X, INPUT, RECURRENCE = rng.normal(size=(3, B, L, D))
DECAY = rng.normal(size=D)
INITIAL = rng.normal(size=(B, D))
SEGMENTS = np.array([[1, 1, 0, 1, 3, 3, 3], [0, 2, 2, 0, 0, 5, 0]])
METHODS = {'fused': 3, 'chunked': 3, 'associative': None}
unit = jax.jit(rg_lru, static_argnames=('sharpness', 'method', 'chunk'))


def looped(segments=None, initial=None):
  """The definition, in float64."""
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  a = np.exp(-8 * sigmoid(RECURRENCE) * np.log1p(np.exp(DECAY)))
  out = np.zeros((B, L, D))
  last = np.zeros((B, D)) if initial is None else initial.copy()
  for row in range(B):
    before = None if initial is None else 1
    for i in range(L):
      segment = 1 if segments is None else segments[row, i]
      if segment == 0:
        continue
      gated = sigmoid(INPUT[row, i]) * X[row, i]
      if segment == before:
        decay = a[row, i]
        last[row] = decay * last[row] + np.sqrt(1 - decay**2) * gated
      else:
        last[row] = gated
      before = segment
      out[row, i] = last[row]
  return out, last


def agree(actual, expected):
  for one, other in zip(actual, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('method', METHODS)
def test_it_equals_the_loop_whole_and_in_pieces(method):
  options = {'method': method, 'chunk': METHODS[method]}
  with jax.enable_x64(True):
    arrays = X, INPUT, RECURRENCE
    agree(unit(*arrays, DECAY, **options), looped())
    state, outputs = INITIAL, []
    for piece in (slice(0, 1), slice(1, 5), slice(5, 7)):
      out, state = unit(*(z[:, piece] for z in arrays), DECAY, state, **options)
      outputs.append(out)
    agree((np.concatenate(outputs, 1), state), looped(initial=INITIAL))


@pytest.mark.parametrize('method', METHODS)
def test_segments_start_anew_and_padding_may_hold_anything(method):
  options = {'method': method, 'chunk': METHODS[method]}
  expected, expected_last = looped(SEGMENTS)
  is_token = SEGMENTS != 0
  arrays = [
    np.where(is_token[..., None], z, np.nan) for z in (X, INPUT, RECURRENCE)
  ]
  with jax.enable_x64(True):
    places, _ = advance(start(B), jnp.asarray(SEGMENTS))
    # What came before the first segment plays no part.
    out, last = unit(*arrays, DECAY, INITIAL, places=places, **options)
  assert np.isfinite(out).all()
  agree((out[is_token], last), (expected[is_token], expected_last))


def test_gradients_are_those_of_finite_differences():
  with jax.enable_x64(True):
    arrays = [jnp.asarray(z) for z in (X, INPUT, RECURRENCE, DECAY, INITIAL)]
    check_grads(
      jax.jit(lambda *arrays: rg_lru(*arrays, chunk=3)),
      arrays,
      order=1,
      modes=('fwd', 'rev'),
    )
    places, _ = advance(start(B), jnp.asarray(SEGMENTS))

    def loss(x, *arrays, method, chunk):
      options = {'method': method, 'chunk': chunk, 'places': places}
      x = jnp.where(SEGMENTS[..., None] == 0, jnp.nan, x)
      out, last = rg_lru(x, *arrays, **options)
      out = jnp.where(SEGMENTS[..., None] == 0, 0, out)
      return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(last))

    fused, *others = (
      jax.jit(
        jax.grad(
          functools.partial(loss, method=method, chunk=chunk),
          argnums=range(5),
        )
      )(*arrays)
      for method, chunk in METHODS.items()
    )
    for other in others:
      agree(other, fused)


def test_a_closed_gate_freezes_the_state_with_finite_gradients():
  ones = jnp.ones((1, 4, 1))
  run = functools.partial(rg_lru, ones, ones)
  state = jnp.full((1, 1), 2.0)

  def total(gate):
    return run(gate * ones, jnp.ones(1), state).out_BLD.sum()

  np.testing.assert_array_equal(
    run(-1e4 * ones, jnp.ones(1), state).out_BLD, 2 * ones
  )
  # Decays of 1 in float32, where the square root has no derivative.
  for gate in (-1e4, -30.0, -18.0):
    assert np.isfinite(jax.grad(total)(gate))


def test_states_keep_their_bound_and_the_decay_its_start():
  decay_D = jnp.array([0.5, 0.9, 0.999])
  # softplus(p) = -log a: a gate of 1/8 decays by a, an open one by a^8.
  parameter_D = rg_lru_decay(decay_D)
  np.testing.assert_allclose(parameter_D[1], np.log(1 / 0.9 - 1), rtol=1e-5)
  open_gate = jnp.full((1, 2, 3), 1e4)
  out, _ = rg_lru(
    jnp.zeros((1, 2, 3)), open_gate, open_gate, parameter_D, jnp.ones((1, 3))
  )
  np.testing.assert_allclose(out[0, 1], decay_D**16, rtol=1e-4)
  ones = jnp.ones((1, 99, 3))
  out, _ = rg_lru(ones, 1e4 * ones, 0 * ones, parameter_D)
  a_D = np.asarray(decay_D) ** 4
  assert (out <= np.sqrt((1 + a_D) / (1 - a_D)) * (1 + 1e-5)).all()


def test_the_output_has_the_dtype_of_the_input_and_the_state_more():
  x = jnp.asarray(X, jnp.bfloat16)
  out, last = rg_lru(x, x, x, jnp.asarray(DECAY))
  assert (out.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match='must all be'):
    rg_lru(X, INPUT, RECURRENCE[:, 1:], DECAY)
  with pytest.raises(ValueError, match=r'decay must be \[3\]'):
    rg_lru(X, INPUT, RECURRENCE, DECAY[1:])
  with pytest.raises(ValueError, match=r'state must be \[2, 3\]'):
    rg_lru(X, INPUT, RECURRENCE, DECAY, INITIAL[1:])
  with pytest.raises(ValueError, match='chunk=0'):
    rg_lru(X, INPUT, RECURRENCE, DECAY, chunk=0)
  with pytest.raises(ValueError, match="got 'associative'"):
    rg_lru(X, INPUT, RECURRENCE, DECAY, method='associative', chunk=3)
  with pytest.raises(ValueError, match="unknown method 'sequential'"):
    rg_lru(X, INPUT, RECURRENCE, DECAY, method='sequential')
