"""The recurrence with a matrix for a state, against a NumPy loop."""

import functools

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from jaxformers.ops import outer_recurrence

B, L, H, K, V, C = 2, 9, 2, 3, 4, 4
METHODS = {'chunked': C, 'recurrent': C, 'parallel': None}
rng = np.random.default_rng(0)
QUERY, KEY = rng.normal(size=(2, B, L, H, K))
VALUE = rng.normal(size=(B, L, H, V))
INITIAL = rng.normal(size=(B, H, K, V))
LOG_DECAY = -rng.random((B, L, H))
# Resets within a chunk, at a chunk's edge, at the start, and twice in a row;
# and a decay of 0 like that of padding.
LOG_DECAY[0, [2, 4]] = -np.inf
LOG_DECAY[1, [0, 6, 7], 0] = -np.inf
LOG_DECAY[1, 3] = 0.0


def looped(query, key, value, log_decay, state):
  """The definition, in float64."""
  outputs = []
  for i in range(query.shape[1]):
    written = key[:, i, :, :, None] * value[:, i, :, None, :]
    state = np.exp(log_decay[:, i])[..., None, None] * state + written
    outputs.append(np.einsum('bhk,bhkv->bhv', query[:, i], state))
  return np.stack(outputs, axis=1), state


@functools.partial(jax.jit, static_argnames=('method', 'chunk'))
def recur(*arrays, method, chunk):
  return outer_recurrence(*arrays, method=method, chunk=chunk)


@pytest.mark.parametrize('method', METHODS)
def test_any_method_in_any_pieces_equals_the_loop(method):
  expected, expected_last = looped(QUERY, KEY, VALUE, LOG_DECAY, INITIAL)
  with jax.enable_x64(True):
    state, outputs, start = jnp.asarray(INITIAL), [], 0
    for length in (1, C - 1, C + 1):
      piece = [
        x[:, start : start + length] for x in (QUERY, KEY, VALUE, LOG_DECAY)
      ]
      out, state = recur(*piece, state, method=method, chunk=METHODS[method])
      outputs.append(out)
      start += length
    out = np.concatenate(outputs, axis=1)
  np.testing.assert_allclose(out, expected, rtol=1e-13, atol=1e-13)
  np.testing.assert_allclose(state, expected_last, rtol=1e-13, atol=1e-13)


def test_a_decay_per_head_is_that_decay_at_every_step():
  decay_H = np.log([0.5, 0.9])
  per_step = np.broadcast_to(decay_H, (B, L, H))
  expected, expected_last = looped(QUERY, KEY, VALUE, per_step, 0 * INITIAL)
  with jax.enable_x64(True):
    out, last = recur(QUERY, KEY, VALUE, decay_H, method='chunked', chunk=C)
  np.testing.assert_allclose(out, expected, rtol=1e-13, atol=1e-13)
  np.testing.assert_allclose(last, expected_last, rtol=1e-13, atol=1e-13)


def test_one_number_of_half_decay_by_hand():
  one = jnp.ones((1, 3, 1, 1))
  value = jnp.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
  out, last = outer_recurrence(one, one, value, jnp.log(jnp.array([0.5])))
  assert out.ravel().tolist() == [1.0, 2.5, 4.25]
  assert last.ravel().tolist() == [4.25]


def test_a_vanishing_decay_leaves_each_step_alone():
  own = np.sum(QUERY * KEY, axis=-1, keepdims=True) * VALUE
  for log_decay in (-800.0, -np.inf):
    with jax.enable_x64(True):
      log_decay_H = np.full(H, log_decay)
      out, _ = recur(QUERY, KEY, VALUE, log_decay_H, method='chunked', chunk=C)
    np.testing.assert_allclose(out, own, rtol=1e-13)


def loss(method, query, key, value, log_decay, initial):
  out, last = outer_recurrence(
    query, key, value, log_decay, initial, method=method, chunk=METHODS[method]
  )
  return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(last))


def test_chunks_and_steps_have_the_same_first_and_second_derivatives():
  point = QUERY, KEY, VALUE, LOG_DECAY, INITIAL
  tangent = tuple(np.ones(x.shape) for x in point)

  def derivatives(method):
    gradient = jax.grad(functools.partial(loss, method), argnums=range(5))
    # Forward over reverse: what a Hessian-vector product needs.
    return jax.jit(lambda *x: jax.jvp(gradient, x, tangent))(*point)

  with jax.enable_x64(True):
    chunked, recurrent = map(derivatives, ('chunked', 'recurrent'))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12),
    chunked,
    recurrent,
  )


def test_its_gradients_are_those_of_finite_differences():
  length = C + 1
  arrays = [x[:1, :length] for x in (QUERY, KEY, VALUE)]
  log_decay = np.maximum(LOG_DECAY[:1, :length], -2.0)

  def function(*arrays):
    return jnp.sin(outer_recurrence(*arrays, INITIAL[:1], chunk=C).out)

  with jax.enable_x64(True):
    check_grads(
      jax.jit(function), (*arrays, log_decay), order=1, modes=('fwd', 'rev')
    )


def test_memory_grows_by_little_more_than_the_inputs():
  width, chunk = 16, 32

  def temporaries(length):
    shape = jax.ShapeDtypeStruct((1, length, 1, width), jnp.float32)

    def function(query, key, value):
      out, _ = outer_recurrence(query, key, value, jnp.ones(1), chunk=chunk)
      return jnp.sum(out**2)

    gradient = jax.jit(jax.grad(function, argnums=(0, 1, 2)))
    compiled = gradient.lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  sizes = [temporaries(length) for length in (1024, 2048, 4096)]
  growth = np.diff(sizes) / np.array([1024, 2048])
  numbers_per_token = growth / 4
  # Reordered inputs and output, their gradients, and K V / C of states: 73. If
  # what is in the chunks were kept too, it would be 155; a state per token is
  # K V = 256 alone.
  np.testing.assert_allclose(growth[1], growth[0], rtol=0.05)
  assert numbers_per_token.max() < 6 * width


def test_float32_stays_finite_and_bfloat16_is_summed_in_float32():
  steep = np.where(np.arange(300) % 50 == 0, -80.0, -1e-3)
  arrays = [
    rng.normal(size=(1, 300, 1, 4)).astype(np.float32) for _ in range(3)
  ]
  log_decay = steep[None, :, None]
  expected, _ = looped(*arrays, log_decay, np.zeros((1, 1, 4, 4)))
  # 100 is the size of the largest outputs; each is a sum of up to 50 terms.
  out, last = recur(*arrays, log_decay, method='chunked', chunk=128)
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-3)
  halves = [x.astype(jnp.bfloat16) for x in arrays]
  half, last = recur(*halves, log_decay, method='chunked', chunk=128)
  assert half.dtype == last.dtype == jnp.float32
  rounded, _ = looped(
    *(np.asarray(x, np.float64) for x in halves), log_decay, 0
  )
  np.testing.assert_allclose(half, rounded, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
  ('arguments', 'options', 'message'),
  [
    ((QUERY[0], KEY, VALUE), {}, r'arrays \[B, length, heads, width\]'),
    ((QUERY[:, 1:], KEY, VALUE), {}, 'equal shapes'),
    ((QUERY, KEY, VALUE[:, :, :1]), {}, 'equal shapes'),
    ((QUERY[:, :0], KEY[:, :0], VALUE[:, :0]), {}, 'at least one token'),
    ((QUERY, KEY, VALUE, np.zeros(3)), {}, r'log_decay must have shape \[2\]'),
    ((QUERY, KEY, VALUE, np.zeros((L, H))), {}, 'log_decay must have'),
    ((QUERY, KEY, VALUE, None, INITIAL[:1]), {}, 'initial state must'),
    ((QUERY, KEY, VALUE), {'method': 'fast'}, "unknown method 'fast'"),
    ((QUERY, KEY, VALUE), {'chunk': 0}, 'at least 1 token'),
    ((QUERY, KEY, VALUE), {'method': 'parallel', 'chunk': 2}, 'single chunk'),
  ],
)
def test_what_does_not_fit_is_refused(arguments, options, message):
  with pytest.raises(ValueError, match=message):
    outer_recurrence(*arguments, **options)
