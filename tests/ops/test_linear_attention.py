"""Linear attention and retention against NumPy loops of their definitions."""

import functools

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from jaxformers.ops import ReRoPE
from jaxformers.ops import RetNetSpectrum
from jaxformers.ops import Rotary
from jaxformers.ops import linear_attention
from jaxformers.ops import retention
from jaxformers.ops import retention_log_decay
from jaxformers.ops import rms_norm
from jaxformers.ops import segments
from jaxformers.ops.activations import activation
from jaxformers.ops.activations import elu_plus_one

B, L, H, K, V, C = 2, 9, 2, 4, 3, 4
rng = np.random.default_rng(1)
QUERY, KEY = rng.normal(size=(2, B, L, H, K))
VALUE = rng.normal(size=(B, L, H, V))
IDS = np.array([[1, 1, 1, 0, 2, 2, 2, 2, 2], [5, 6, 6, 6, 6, 6, 6, 0, 0]])
ONE_SEGMENT = np.ones((B, L), int)
RETNET = Rotary(pairing='interleaved', spectrum=RetNetSpectrum())


def turned(x, positions, frequencies, pairing):
  """Rotates by complex numbers."""
  a, b = (
    (x[..., : K // 2], x[..., K // 2 :])
    if pairing == 'half'
    else (x[..., ::2], x[..., 1::2])
  )
  z = (a + 1j * b) * np.exp(1j * positions[:, :, None, None] * frequencies)
  parts = np.stack([z.real, z.imag])
  if pairing == 'half':
    return np.concatenate(list(parts), axis=-1)
  return np.moveaxis(parts, 0, -1).reshape(x.shape)


def positions_of(ids):
  """Positions in each segment; ids of `IDS` and `ONE_SEGMENT` never return."""
  return np.array(
    [[list(row[:i]).count(row[i]) for i in range(L)] for row in ids]
  )


def weighed(weight, ids, causal=True):
  """Returns `sum_j weight(b, i, j, h) v_j` over visible j, and all weights."""
  weights = np.zeros((B, H, L, L))
  for b, h, i, j in np.ndindex(weights.shape):
    if ids[b, i] and ids[b, i] == ids[b, j] and (j <= i or not causal):
      weights[b, h, i, j] = weight(b, i, j, h)
  return np.einsum('bhij,bjhv->bihv', weights, VALUE), weights


def per_row(factors_BHL):
  return factors_BHL.swapaxes(1, 2)[..., None]


advance = jax.jit(segments.advance)


def places_of(name):
  if name == 'one':
    return None
  return advance(segments.start(B), jnp.asarray(IDS))[0]


def near(actual, expected, tolerance=1e-12):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@functools.partial(jax.jit, static_argnames=('options',))
def run_linear(query, key, value, initial, places, options):
  return linear_attention(
    query, key, value, initial, places=places, **dict(options)
  )


def linear(*arrays, initial=None, places=None, **options):
  with jax.enable_x64(True):
    options = tuple(sorted(options.items()))
    return run_linear(*arrays, initial, places, options)


UNNORMALISED = {'feature': activation('identity'), 'normalize': False}
NORMALISED = {'position': Rotary(base=100.0)}


@pytest.mark.parametrize(
  ('packing', 'options', 'causal'),
  [
    ('packed', UNNORMALISED, True),
    ('one', UNNORMALISED, False),
    ('packed', NORMALISED, True),
    ('packed', NORMALISED, False),
    ('one', NORMALISED, True),
  ],
)
def test_linear_attention_equals_its_sum(packing, options, causal):
  ids = ONE_SEGMENT if packing == 'one' else IDS
  phi = lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
  positive = options is NORMALISED
  q, k = (phi(QUERY), phi(KEY)) if positive else (QUERY, KEY)
  dot = lambda q, k: lambda b, i, j, h: q[b, i, h] @ k[b, j, h]
  if positive:
    turn = lambda x: turned(x, positions_of(ids), np.array([1, 0.1]), 'half')
    expected, _ = weighed(dot(turn(q), turn(k)), ids, causal)
    # The denominator knows nothing of positions.
    total = weighed(dot(q, k), ids, causal)[1].sum(axis=-1)
    expected = expected / per_row(total + 1e-10)
  else:
    expected, _ = weighed(dot(q, k), ids, causal)
  places = places_of(packing)
  out, _ = linear(
    QUERY, KEY, VALUE, places=places, causal=causal, chunk=C, **options
  )
  is_token = ids != 0
  near(np.asarray(out)[is_token], expected[is_token])
  assert np.isfinite(out).all()


def test_linear_attention_goes_on_from_its_memory():
  cursor, memory, outputs = segments.start(B), None, []
  for cut in (slice(0, C + 1), slice(C + 1, L)):
    places, cursor = advance(cursor, jnp.asarray(IDS[:, cut]))
    piece = [x[:, cut] for x in (QUERY, KEY, VALUE)]
    out, memory = linear(
      *piece, initial=memory, places=places, causal=True, chunk=C, **NORMALISED
    )
    outputs.append(out)
  whole = linear(
    QUERY,
    KEY,
    VALUE,
    places=places_of('packed'),
    causal=True,
    chunk=C,
    **NORMALISED,
  )
  near(np.concatenate(outputs, axis=1), whole.out)
  jax.tree.map(near, memory, whole.last)


def test_gradients_of_linear_attention_are_those_of_finite_differences():
  def function(query, key, value):
    return linear_attention(
      query, key, value, position=Rotary(), places=places, chunk=C
    ).out

  places = jax.tree.map(lambda x: x[:1, : C + 1], places_of('packed'))
  with jax.enable_x64(True):
    arrays = tuple(x[:1, : C + 1] for x in (QUERY, KEY, VALUE))
    check_grads(jax.jit(function), arrays, order=1, modes=('rev',))


def test_elu_plus_one_is_positive_however_small():
  x = np.array([-80.0, -1.0, 0.0, 2.0])
  near(elu_plus_one(x.astype(np.float32)), [0, np.exp(-1), 1, 3], 1e-6)
  assert elu_plus_one(jnp.float32(-80)) > 0
  gradient = jax.vmap(jax.grad(elu_plus_one))(x.astype(np.float32))
  near(gradient, [np.exp(-80), np.exp(-1), 1, 1], 1e-6)


@functools.partial(jax.jit, static_argnames=('options',))
def run_retention(query, key, value, log_decay, places, options):
  return retention(
    query, key, value, log_decay_H=log_decay, places=places, **dict(options)
  )


def retained(log_decay=None, places=None, **options):
  with jax.enable_x64(True):
    options = tuple(sorted(options.items()))
    return run_retention(QUERY, KEY, VALUE, log_decay, places, options)


@pytest.mark.parametrize(
  ('packing', 'stabilise', 'method'),
  [
    ('one', 'none', 'chunked'),
    ('packed', 'none', 'chunked'),
    ('packed', 'decay', 'recurrent'),
    ('packed', 'scores', 'parallel'),
  ],
)
def test_retention_equals_its_sum(packing, stabilise, method):
  ids = ONE_SEGMENT if packing == 'one' else IDS
  positions, angles = positions_of(ids), np.array([1, 1e-4])
  turn = lambda x: turned(x, positions, angles, 'interleaved')
  q, k = turn(QUERY), turn(KEY)
  decays = [0.96875, 0.984375]
  decay = lambda b, i, j, h: decays[h] ** (positions[b, i] - positions[b, j])
  root = np.ones((B, H, L))
  if stabilise != 'none':
    root = np.sqrt(np.maximum(weighed(decay, ids)[1].sum(axis=-1), 1))
  score = lambda b, i, j, h: (
    decay(b, i, j, h) * (q[b, i, h] @ k[b, j, h]) / 2 / root[b, h, i]
  )
  expected, scores = weighed(score, ids)
  if stabilise == 'scores':
    sums = np.abs(scores).sum(axis=-1)
    assert (sums > 1).any()
    assert ((0 < sums) & (sums < 1)).any()
    expected = expected / per_row(np.clip(sums, 1, 5e4))
  out, _ = retained(
    places=places_of(packing),
    position=RETNET,
    stabilise=stabilise,
    method=method,
    chunk=None if method == 'parallel' else C,
  )
  is_token = ids != 0
  near(np.asarray(out)[is_token], expected[is_token])
  assert np.isfinite(out).all()


def test_the_norm_after_retention_undoes_what_stabilises_it():
  plain, decay, scores = (
    retained(stabilise=kind, method='parallel').out
    for kind in ('none', 'decay', 'scores')
  )
  with jax.enable_x64(True):
    near(rms_norm(decay, eps=0), rms_norm(plain, eps=0))
    near(rms_norm(scores, eps=0), rms_norm(plain, eps=0))
  assert not np.allclose(decay, plain)


def test_retention_without_decay_is_linear_attention():
  for method in ('chunked', 'recurrent', 'parallel'):
    out, last = retained(np.zeros(H), scale=1.0, method=method)
    expected = linear(
      QUERY, KEY, VALUE, feature=activation('identity'), normalize=False
    )
    near(out, expected.out)
    near(last, expected.last.outer_BHKV)


def test_retention_that_forgets_all_sees_itself_only():
  out, _ = retained(np.full(H, -np.inf), scale=1.0)
  near(out, np.sum(QUERY * KEY, axis=-1, keepdims=True) * VALUE)


def test_heads_forget_at_half_the_rate_of_those_before():
  decay_H = np.exp(retention_log_decay(4))
  near(decay_H, [0.96875, 0.984375, 0.9921875, 0.99609375], 1e-15)


def test_the_last_frequency_of_retnet_is_that_of_the_base():
  near(RetNetSpectrum().frequencies(8, 10000.0)[-1], 1e-4, 1e-18)
  near(RetNetSpectrum().frequencies(6, 100.0), [1, 0.1, 0.01], 1e-16)
  near(RetNetSpectrum().frequencies(2, 100.0), [1])
  with pytest.raises(ValueError, match='even'):
    RetNetSpectrum().frequencies(3, 100.0)


def test_what_cannot_be_is_refused():
  arrays = QUERY, KEY, VALUE
  with pytest.raises(ValueError, match='each pair of a query and a key'):
    linear(*arrays, position=ReRoPE(window=3))
  unnormalised = linear(*arrays, normalize=False).last
  with pytest.raises(ValueError, match='knows no sum of keys'):
    linear(*arrays, initial=unnormalised)
  with pytest.raises(ValueError, match='not causal'):
    linear(*arrays, initial=unnormalised, normalize=False, causal=False)
  with pytest.raises(ValueError, match='pass places'):
    linear(*arrays, initial=unnormalised, normalize=False, position=Rotary())
  with pytest.raises(ValueError, match='unknown stabilise'):
    retained(stabilise='rows')
  with pytest.raises(ValueError, match='all keys at once'):
    retained(stabilise='scores')
