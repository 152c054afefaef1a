"""Bounded and leaky rotations against one rotation per pair of tokens."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.nn.mixers import Attention
from jaxformers.ops import Causal
from jaxformers.ops import Interpolation
from jaxformers.ops import InverseSqrt
from jaxformers.ops import LeakyReRoPE
from jaxformers.ops import LogLengthRetrofit
from jaxformers.ops import NoMask
from jaxformers.ops import NTKMixed
from jaxformers.ops import ReRoPE
from jaxformers.ops import Rotary
from jaxformers.ops import attend

B, T, H, G, K = 2, 12, 4, 2, 6


@pytest.fixture(autouse=True)
def float64(request):
  # No generator: the garbage collector must not decide when this ends.
  context = jax.enable_x64(True)
  context.__enter__()
  request.addfinalizer(  # noqa: PT021
    lambda: context.__exit__(None, None, None)
  )


def arrays(length=T, batch=B):
  keys = jax.random.split(jax.random.key(0), 3)
  return tuple(
    jax.random.normal(key, (batch, length, heads, K), jnp.float64)
    for key, heads in zip(keys, (H, G, G), strict=True)
  )


def relative(distance, window, slope, bidirectional=False):
  """The distance that a pair of tokens is rotated by."""
  if distance >= window:
    return window + (distance - window) / slope
  if bidirectional and distance <= -window:
    return -window + (distance + window) / slope
  return distance


def table(window, slope, query, key, bidirectional=False):
  return np.array(
    [
      [relative(i - j, window, slope, bidirectional) for j in key]
      for i in query
    ],
    np.float64,
  )


def oracle(xp, query, key, value, relative_BLM, *, causal=True, pairing='half'):
  """Attention with one rotation for every pair of tokens.

  Pairs of coordinates are complex numbers, and the score is the real part of
  `q conj(k) exp(i theta P)`, summed; with NumPy, or JAX for its gradients.
  """
  key, value = (xp.repeat(x, H // G, axis=2) for x in (key, value))
  half = K // 2
  first, second = slice(0, half), slice(half, K)
  if pairing == 'interleaved':
    first, second = slice(0, K, 2), slice(1, K, 2)
  q = query[..., first] + 1j * query[..., second]
  k = key[..., first] + 1j * key[..., second]
  theta = 10000.0 ** (-np.arange(half) * 2 / K)
  turn = np.exp(
    1j * theta * np.broadcast_to(relative_BLM, (B, T, T))[..., None]
  )
  score = xp.einsum('blhp,bmhp,blmp->bhlm', q, k.conj(), turn).real
  score = score / math.sqrt(K)
  if causal:
    score = xp.where(np.tri(T, dtype=bool), score, -np.inf)
  weights = xp.exp(score - score.max(axis=-1, keepdims=True))
  weights = weights / weights.sum(axis=-1, keepdims=True)
  return xp.einsum('bhlm,bmhv->blhv', weights, value)


def near(actual, expected, tolerance=1e-12):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def scores(position, length):
  """Unscaled scores of all pairs, for one-hot frequencies to be read off."""
  query = jnp.ones((1, length, 1, 2)) * jnp.array([1.0, 0.0])
  places = jnp.arange(length)[None]
  branches = position.branches(
    query, position.store(query, places), *[places] * 2
  )
  logits = np.zeros((length, length))
  for branch in branches:
    product = np.einsum('blhk,bmhk->lm', branch.query, branch.key)
    holds = True
    if branch.region is not None:
      holds = np.asarray(branch.region(places, places))[0, 0]
    logits = np.where(holds, product, logits)
  return logits


@pytest.mark.parametrize(
  ('position', 'expected'),
  [
    (LeakyReRoPE(3, 2), [4.5, 4, 3.5, 3, 2, 1, 0]),
    (ReRoPE(3), [3, 3, 3, 3, 2, 1, 0]),
  ],
)
def test_relative_positions_of_the_last_of_seven_tokens(position, expected):
  # One pair that turns by half a radian: the score is cos(P / 2), P < 2 pi.
  class Half:
    def frequencies(self, dim, base):
      return np.array([0.5])

  position = dataclasses.replace(position, spectrum=Half())
  near(2 * np.arccos(scores(position, 7)[-1].clip(-1, 1)), expected, 1e-7)


CASES = [
  (3, 2.0),
  (3, 2.5),
  (4, 1 / 16),
  (0, 2.0),
  (1, 7.0),
  (3, math.inf),
  (0, math.inf),
  (20, math.inf),
]


def scheme(window, slope, **options):
  if slope == math.inf:
    return ReRoPE(window, **options)
  return LeakyReRoPE(window, slope, **options)


@pytest.mark.parametrize('pairing', ['half', 'interleaved'])
@pytest.mark.parametrize(('window', 'slope'), CASES)
def test_two_branches_equal_a_rotation_per_pair(window, slope, pairing):
  inputs = arrays()
  position = scheme(window, slope, pairing=pairing)
  actual = attend(*inputs, position=position, mask=Causal())
  expected = oracle(
    np,
    *map(np.asarray, inputs),
    table(window, slope, range(T), range(T)),
    pairing=pairing,
  )
  near(actual, expected)


@pytest.mark.parametrize(('window', 'slope'), CASES)
def test_three_branches_bound_distances_to_both_sides(window, slope):
  inputs = arrays()
  position = scheme(window, slope, bidirectional=True)
  actual = attend(*inputs, position=position, mask=NoMask())
  bounded = table(window, slope, range(T), range(T), True)
  near(actual, oracle(np, *map(np.asarray, inputs), bounded, causal=False))
  near(bounded, -bounded.T)
  if slope == math.inf:
    distance = np.subtract.outer(np.arange(T), np.arange(T))
    near(bounded, np.clip(distance, -window, window))


def test_the_third_branch_exists_only_where_asked_for():
  inputs = *arrays()[:2], *[jnp.arange(T)[None]] * 2
  assert len(ReRoPE(3).branches(*inputs)) == 2
  assert len(LeakyReRoPE(3, 2.0).branches(*inputs)) == 2
  assert len(ReRoPE(3, bidirectional=True).branches(*inputs)) == 3
  near(
    attend(*arrays(), position=ReRoPE(3, bidirectional=True), mask=Causal()),
    attend(*arrays(), position=ReRoPE(3), mask=Causal()),
    0,
  )


@pytest.mark.parametrize('slope', [2.0, 1 / 16, math.inf])
def test_rows_of_a_batch_have_positions_of_their_own(slope):
  inputs = arrays()
  place = np.stack([np.arange(T) + 5, np.arange(T) * 2])
  actual = attend(
    *inputs,
    position=scheme(3, slope),
    mask=Causal(),
    query_position=jnp.asarray(place),
    key_position=jnp.asarray(place),
  )
  tables = np.stack([table(3, slope, p, p) for p in place])
  near(actual, oracle(np, *map(np.asarray, inputs), tables))


@pytest.mark.parametrize(
  ('slope', 'implementation'),
  [(2.0, 'xla'), (math.inf, 'xla'), (1 / 16, 'blockwise')],
)
def test_gradients_equal_those_of_a_rotation_per_pair(slope, implementation):
  inputs = arrays()
  weights = jnp.sin(jnp.arange(B * T * H * K)).reshape(B, T, H, K)
  bounded = table(3, slope, range(T), range(T))

  def ours(*inputs):
    out = attend(
      *inputs,
      position=scheme(3, slope),
      mask=Causal(),
      implementation=implementation,
      block=None if implementation == 'xla' else 5,
    )
    return (weights * out).sum()

  def theirs(*inputs):
    return (weights * oracle(jnp, *inputs, bounded)).sum()

  actual, expected = (
    jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(*inputs)
    for f in (ours, theirs)
  )
  jax.tree.map(near, actual, expected)


@pytest.mark.parametrize(
  ('position', 'equal', 'tolerance'),
  [
    (ReRoPE(T), Rotary(), 0),
    (LeakyReRoPE(T, 3.0), Rotary(), 0),
    (LeakyReRoPE(3, 1.0), Rotary(), 0),
    (LeakyReRoPE(3, 1.0, pairing='interleaved', rotary_dim=4),
     Rotary(pairing='interleaved', rotary_dim=4), 0),
    (LeakyReRoPE(3, 1e9), ReRoPE(3), 1e-5),
    (LeakyReRoPE(0, 4.0), Rotary(spectrum=Interpolation(4)), 1e-12),
    (ReRoPE(T, base=100.0, spectrum=NTKMixed(4)),
     Rotary(base=100.0, spectrum=NTKMixed(4)), 0),
  ],
)  # fmt: skip
def test_limits_are_known_schemes(position, equal, tolerance):
  actual = attend(*arrays(), position=position, mask=Causal())
  expected = attend(*arrays(), position=equal, mask=Causal())
  near(actual, expected, tolerance)


def test_a_window_of_zero_leaves_no_positions():
  actual = attend(*arrays(), position=ReRoPE(0), mask=Causal())
  near(actual, attend(*arrays(), mask=Causal()))
  both = ReRoPE(0, bidirectional=True)
  near(attend(*arrays(), position=both), attend(*arrays()))


@pytest.mark.parametrize('slope', [2.0, math.inf])
def test_shifting_all_positions_changes_nothing(slope):
  def out(shift):
    place = jnp.arange(T) + shift
    return attend(
      *arrays(),
      position=scheme(3, slope),
      mask=Causal(),
      query_position=place,
      key_position=place,
    )

  near(out(1000), out(0), 1e-11)
  near(out(-7), out(0))


@pytest.mark.parametrize('slope', [2.0, math.inf])
def test_appended_tokens_change_no_earlier_row(slope):
  @jax.jit
  def out(*inputs):
    scale = InverseSqrt() * LogLengthRetrofit(4)
    return attend(
      *inputs, position=scheme(3, slope), scale=scale, mask=Causal()
    )

  short = out(*(x[:, :7] for x in arrays()))
  near(out(*arrays())[:, :7], short)


def test_far_keys_have_no_order():
  query, key, value = arrays()
  order = np.array([4, 0, 7, 2, 8, 1, 3, 6, 5, 9, 10, 11])  # the last has r < 3

  def last(position, order):
    return attend(
      query[:, -1:],
      key[:, order],
      value[:, order],
      position=position,
      query_position=jnp.array([T - 1]),
      key_position=jnp.arange(T),
    )

  near(last(ReRoPE(3), order), last(ReRoPE(3), np.arange(T)))
  leaky = LeakyReRoPE(3, 2.0)
  change = last(leaky, order) - last(leaky, np.arange(T))
  assert np.abs(change).max() > 1e-3


@pytest.mark.parametrize('slope', [2.0, 1 / 16, math.inf])
def test_raw_keys_of_a_cache_give_each_row_of_the_whole(slope):
  query, key, value = arrays()
  position = scheme(3, slope)
  whole = attend(query, key, value, position=position, mask=Causal())
  stored = position.store(key, jnp.arange(T)[None])
  near(stored, key, 0)
  for start, end in ((0, 1), (1, 6), (6, 7), (7, T)):
    rows = attend(
      query[:, start:end],
      stored,
      value,
      position=position,
      mask=Causal(),
      query_position=jnp.arange(start, end),
      keys_stored=True,
    )
    near(rows, whole[:, start:end])


def test_decoding_with_a_state_equals_reading_the_whole():
  mixer = Attention(num_heads=H, num_kv_heads=G, position=ReRoPE(3))
  x_BLD = jax.random.normal(jax.random.key(1), (B, T, 16), jnp.float32)
  run = jax.jit(mixer.apply)
  variables = jax.jit(mixer.init)(jax.random.key(2), x_BLD)
  whole, _ = run(variables, x_BLD)
  state = mixer.initial_state(B, T, 16, jnp.float32)
  outputs, start = [], 0
  for size in (5, 1, 1, 5):
    y, state = run(variables, x_BLD[:, start : start + size], state)
    outputs.append(y)
    start += size
  near(jnp.concatenate(outputs, axis=1), whole, 1e-5)


def test_fractional_positions_are_kept_in_bfloat16():
  place = jnp.array([[301]])
  ones = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
  position = LeakyReRoPE(2, 4.0, base=1.0)
  far = position.branches(ones, ones, place, place)[1]
  assert far.key.dtype == jnp.bfloat16
  for turned, angle in ((far.key, 301 / 4), (far.query, 299 / 4 + 2)):
    exact = [
      math.cos(angle) - math.sin(angle),
      math.cos(angle) + math.sin(angle),
    ]
    near(np.asarray(turned[0, 0, 0], np.float64), exact, 0.01)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: ReRoPE(-1), 'ReRoPE needs window >= 0, got -1'),
    (lambda: LeakyReRoPE(-1, 2.0), 'LeakyReRoPE needs window >= 0'),
    (lambda: LeakyReRoPE(3, 0.0), 'finite slope > 0, got 0.0; use ReRoPE'),
    (lambda: LeakyReRoPE(3, math.inf), 'finite slope > 0, got inf'),
    (lambda: ReRoPE(3, pairing='both'), "'half' or 'interleaved', got 'both'"),
    (lambda: ReRoPE(3, base=0.0), 'base > 0, got 0.0'),
  ],
)
def test_what_makes_no_sense_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
