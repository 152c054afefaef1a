"""The recurrence with a matrix for a state, against NumPy loops."""

import functools
import re

import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from jaxformers.ops import Recurred
from jaxformers.ops import outer_recurrence
from jaxformers.ops.recurrence import decay_weights

B, L, H, K, V, C = 2, 9, 2, 3, 4, 4
METHODS = {
  'chunked': C,
  'parallel_chunks': C,
  'recurrent': C,
  'parallel': None,
}
rng = np.random.default_rng(0)
QUERY, KEY = rng.normal(size=(2, B, L, H, K))
VALUE = rng.normal(size=(B, L, H, V))
INITIAL = rng.normal(size=(B, H, K, V))
BONUS = rng.normal(size=(H, K))
LOG_DECAY = -rng.random((B, L, H))
# Resets within a chunk, at a chunk's edge, at the start, and twice in a row;
# and a decay of 0 like that of padding.
LOG_DECAY[0, [2, 4]] = -np.inf
LOG_DECAY[1, [0, 6, 7], 0] = -np.inf
LOG_DECAY[1, 3] = 0.0
PER_CHANNEL = LOG_DECAY[..., None] * (1 + rng.random(K))
PER_CHANNEL[0, 5, 1, 0] = -np.inf
# Decays per head, read after writing; decays per channel, queries and keys that
# heads share, and reading before writing with a bonus.
KINDS = {
  'head': (QUERY, KEY, VALUE, LOG_DECAY, INITIAL, None),
  'channel': (
    QUERY[:, :, :1],
    KEY[:, :, :1],
    VALUE,
    PER_CHANNEL,
    INITIAL,
    BONUS,
  ),
}


def looped(query, key, value, log_decay, state, bonus=None):
  """The definition, in float64."""
  outputs = []
  heads = value.shape[2]
  query, key = (np.repeat(x, heads // x.shape[2], axis=2) for x in (query, key))
  if log_decay.ndim == 3:
    log_decay = log_decay[..., None]
  for i in range(query.shape[1]):
    written = key[:, i, :, :, None] * value[:, i, :, None, :]
    decays = np.exp(log_decay[:, i])[..., None]
    read = np.where(decays == 0, 0, state)
    state = decays * state + written
    read = state if bonus is None else read + bonus[..., None] * written
    outputs.append(np.einsum('bhk,bhkv->bhv', query[:, i], read))
  return np.stack(outputs, axis=1), state


@functools.partial(jax.jit, static_argnames=('method', 'chunk'))
def recur(*arrays, method, chunk):
  *arrays, bonus = arrays if len(arrays) == 6 else (*arrays, None)
  return outer_recurrence(*arrays, bonus_HK=bonus, method=method, chunk=chunk)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('method', METHODS)
def test_any_method_in_any_pieces_equals_the_loop(method, kind):
  *arrays, initial, bonus = KINDS[kind]
  expected, expected_last = looped(*arrays, initial, bonus)
  with jax.enable_x64(True):
    state, outputs, start = jnp.asarray(initial), [], 0
    for length in (1, (L - 1) // 2, (L - 1) // 2):
      piece = [x[:, start : start + length] for x in arrays]
      out, state = recur(
        *piece, state, bonus, method=method, chunk=METHODS[method]
      )
      outputs.append(out)
      start += length
    out = np.concatenate(outputs, axis=1)
  np.testing.assert_allclose(out, expected, rtol=1e-13, atol=1e-13)
  np.testing.assert_allclose(state, expected_last, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize('chunk', [1, 3, 8, 100])
def test_any_chunk_with_padding_equals_the_loop(chunk):
  *arrays, initial, bonus = KINDS['channel']
  expected, expected_last = looped(*arrays, initial, bonus)
  with jax.enable_x64(True):
    out, last = recur(*arrays, initial, bonus, method='chunked', chunk=chunk)
  np.testing.assert_allclose(out, expected, rtol=1e-13, atol=1e-13)
  np.testing.assert_allclose(last, expected_last, rtol=1e-13, atol=1e-13)


def test_it_is_a_masked_product_of_queries_keys_and_values():
  # The quadratic form, with weights as products of decays.
  decays = np.exp(LOG_DECAY)
  weights = np.zeros((B, H, L, L))
  for i in range(L):
    for j in range(i + 1):
      weights[:, :, i, j] = decays[:, j + 1 : i + 1].prod(axis=1)
  scores = np.einsum('blk,bmk->blm', QUERY[:, :, 0], KEY[:, :, 0])
  expected = np.einsum('bhlm,bmhv->blhv', scores[:, None] * weights, VALUE)
  with jax.enable_x64(True):
    shared = QUERY[:, :, :1], KEY[:, :, :1]
    out, _ = recur(*shared, VALUE, LOG_DECAY, method='chunked', chunk=C)
    actual, seen = jax.jit(decay_weights)(LOG_DECAY.swapaxes(1, 2))
  np.testing.assert_allclose(out, expected, rtol=1e-13, atol=1e-13)
  np.testing.assert_allclose(actual, weights, rtol=1e-13)
  first = decays.cumprod(axis=1).swapaxes(1, 2)
  np.testing.assert_allclose(seen, first, rtol=1e-13)


def test_without_decay_it_is_linear_attention_with_a_causal_mask():
  scores = np.tril(np.einsum('blhk,bmhk->bhlm', QUERY, KEY))
  expected = np.einsum('bhlm,bmhv->blhv', scores, VALUE)
  with jax.enable_x64(True):
    out, last = recur(QUERY, KEY, VALUE, method='parallel_chunks', chunk=C)
  np.testing.assert_allclose(out, expected, rtol=1e-13, atol=1e-13)
  total = np.einsum('blhk,blhv->bhkv', KEY, VALUE)
  np.testing.assert_allclose(last, total, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize('shape', [(H,), (H, K), (1, K)])
def test_a_constant_decay_is_that_decay_at_every_step(shape):
  log_decay = np.log(np.linspace(0.5, 0.9, np.prod(shape)).reshape(shape))
  per_step = np.broadcast_to(log_decay, (B, L, *shape))
  expected, expected_last = looped(QUERY, KEY, VALUE, per_step, 0 * INITIAL)
  with jax.enable_x64(True):
    out, last = recur(QUERY, KEY, VALUE, log_decay, method='auto', chunk=C)
  np.testing.assert_allclose(out, expected, rtol=1e-13, atol=1e-13)
  np.testing.assert_allclose(last, expected_last, rtol=1e-13, atol=1e-13)


def test_one_number_of_half_decay_by_hand():
  one = jnp.ones((1, 3, 1, 1))
  value = jnp.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
  out, last = outer_recurrence(one, one, value, jnp.log(jnp.array([0.5])))
  assert out.ravel().tolist() == [1.0, 2.5, 4.25]
  assert last.ravel().tolist() == [4.25]


def test_a_bonus_for_the_own_step_by_hand():
  one = jnp.ones((1, 3, 1, 1))
  value = jnp.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
  out, last = outer_recurrence(
    one, one, value, jnp.log(jnp.array([[0.5]])), bonus_HK=jnp.array([[3.0]])
  )
  # States before: 0, 1, 2.5; own: 3, 6, 9.
  np.testing.assert_allclose(out.ravel(), [3.0, 7.0, 11.5], rtol=1e-6)
  np.testing.assert_allclose(last.ravel(), [4.25], rtol=1e-6)


def test_a_vanishing_decay_leaves_each_step_alone():
  own = np.sum(QUERY * KEY, axis=-1, keepdims=True) * VALUE
  for log_decay in (-800.0, -np.inf):
    with jax.enable_x64(True):
      log_decay_H = np.full(H, log_decay)
      out, _ = recur(QUERY, KEY, VALUE, log_decay_H, method='chunked', chunk=C)
    np.testing.assert_allclose(out, own, rtol=1e-13)


def loss(method, *arrays):
  out, last = recur(*arrays, method=method, chunk=METHODS[method])
  return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(last))


@pytest.mark.parametrize(
  ('kind', 'methods'),
  [('head', ('chunked',)), ('channel', ('chunked', 'parallel_chunks'))],
)
def test_all_methods_have_the_same_first_and_second_derivatives(kind, methods):
  point = tuple(x for x in KINDS[kind] if x is not None)
  tangent = tuple(np.ones(x.shape) for x in point)

  def derivatives(method):
    gradient = jax.grad(
      functools.partial(loss, method), argnums=range(len(point))
    )
    # Forward over reverse: what a Hessian-vector product needs.
    return jax.jit(lambda *x: jax.jvp(gradient, x, tangent))(*point)

  with jax.enable_x64(True):
    expected = derivatives('recurrent')
    for method in methods:
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11),
        derivatives(method),
        expected,
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


@pytest.mark.parametrize('kind', KINDS)
def test_extreme_decays_neither_overflow_nor_lose_digits(kind):
  length, chunk = 96, 64
  shape = (1, length, 1) if kind == 'head' else (1, length, 1, 4)
  logs = [0.0, -1e-3, -1e-3, -30.0, -200.0, -np.inf]
  log_decay = rng.choice(logs, shape, p=[0.3, 0.2, 0.25, 0.21, 0.02, 0.02])
  # Nothing but strong decays, and then nothing but weak ones.
  log_decay[0, 5:45], log_decay[0, 45:60] = -30.0, -1e-3
  arrays = rng.normal(size=(3, 1, length, 1, 4)).astype(np.float32)
  bonus = None if kind == 'head' else np.ones((1, 4), np.float32)
  expected, _ = looped(*arrays.astype(np.float64), log_decay, 0, bonus)

  def run(method, *arrays):
    out, _ = outer_recurrence(
      *arrays,
      log_decay.astype(np.float32),
      bonus_HK=bonus,
      method=method,
      chunk=chunk,
    )
    return jnp.sum(out**2), out

  gradient = jax.jit(
    jax.grad(run, argnums=(1, 2, 3), has_aux=True), static_argnums=0
  )
  for method in ('chunked', 'parallel_chunks'):
    gradients, out = gradient(method, *arrays)
    # Sums of tens of terms of size 1, in float32.
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize('kind', KINDS)
def test_a_sequence_split_among_devices_is_that_of_one(kind):
  *arrays, initial, bonus = KINDS[kind]
  arrays = [x[:, :8].astype(np.float32) for x in arrays]
  mesh = jax.sharding.Mesh(
    mesh_utils.create_device_mesh((4,), jax.devices()[:4]), ('sequence',)
  )
  split, same = jax.P(None, 'sequence'), jax.P()

  def local(*arrays):
    return outer_recurrence(*arrays, bonus_HK=bonus, chunk=2)

  def sharded(*arrays):
    run = functools.partial(
      outer_recurrence,
      axis_name='sequence',
      bonus_HK=bonus,
      chunk=2,
    )
    specs = (split,) * 4 + (same,)
    return jax.shard_map(
      run, mesh=mesh, in_specs=specs, out_specs=Recurred(split, same)
    )(*arrays)

  def values(function):
    def loss(*arrays):
      out, last = function(*arrays)
      return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(last)), (out, last)

    return jax.jit(jax.value_and_grad(loss, argnums=range(5), has_aux=True))

  point = (*arrays, initial.astype(np.float32))
  placed = [
    jax.device_put(x, jax.NamedSharding(mesh, spec))
    for x, spec in zip(point, (split,) * 4 + (same,), strict=True)
  ]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    values(sharded)(*placed),
    values(local)(*point),
  )
  text = jax.jit(sharded).lower(*placed).compile().as_text()
  gathered = re.findall(r'= \(?f32\[([\d,]+)\].* all-gather', text)
  # Four states, and four decays of at most their size.
  sizes = [np.prod([int(n) for n in shape.split(',')]) for shape in gathered]
  assert 0 < len(sizes) <= 2
  assert max(sizes) <= 4 * B * H * K * V


@pytest.mark.parametrize(
  ('arguments', 'options', 'message'),
  [
    ((QUERY[0], KEY, VALUE), {}, r'arrays \[B, length, heads, width\]'),
    ((QUERY[:, 1:], KEY, VALUE), {}, 'equal shapes'),
    ((QUERY, KEY, VALUE[:, 1:]), {}, 'equal shapes'),
    ((QUERY, KEY, VALUE[:, :, :1]), {}, 'as many heads'),
    ((QUERY[:, :0], KEY[:, :0], VALUE[:, :0]), {}, 'at least one token'),
    ((QUERY, KEY, VALUE, np.zeros(3)), {}, r'one of the shapes \[2\]'),
    ((QUERY, KEY, VALUE, np.zeros((L, H))), {}, 'log_decay must have'),
    ((QUERY, KEY, VALUE, None, INITIAL[:1]), {}, 'initial state must'),
    ((QUERY, KEY, VALUE), {'bonus_HK': BONUS[:1]}, 'the bonus must have'),
    ((QUERY, KEY, VALUE), {'method': 'fast'}, "unknown method 'fast'"),
    ((QUERY, KEY, VALUE), {'chunk': 0}, 'at least 1 token'),
    ((QUERY, KEY, VALUE), {'method': 'parallel', 'chunk': 2}, 'single chunk'),
  ],
)
def test_what_does_not_fit_is_refused(arguments, options, message):
  with pytest.raises(ValueError, match=message):
    outer_recurrence(*arguments, **options)
