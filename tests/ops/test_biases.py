"""Biases of attention scores against their definitions and published numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.ops import ALiBi
from jaxformers.ops import DenseBias
from jaxformers.ops import NoPosition
from jaxformers.ops import RelativeBias
from jaxformers.ops import T5Bias
from jaxformers.ops import attend
from jaxformers.ops.biases import alibi_slopes
from jaxformers.ops.biases import as_bias
from jaxformers.ops.biases import t5_bucket

B, L, M, H, K = 2, 4, 6, 3, 2


def logits(bias, heads=H):
  query, key = jnp.ones((B, L, heads, K)), jnp.ones((B, M, 1, K))
  return bias.logits(
    query, key, jnp.arange(2, 2 + L)[None], jnp.arange(M)[None]
  )


def test_slopes_are_powers_of_two_and_interleave_between_them():
  np.testing.assert_allclose(alibi_slopes(8), 0.5 ** np.arange(1, 9))
  np.testing.assert_allclose(
    alibi_slopes(6), [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]
  )
  assert alibi_slopes(1) == [2**-8]
  with pytest.raises(ValueError, match='at least one head'):
    alibi_slopes(0)


def test_alibi_falls_with_the_distance_on_both_sides():
  found = logits(ALiBi(), heads=2)
  for h, slope in enumerate([2**-4, 2**-8]):
    expected = [[-slope * abs(i + 2 - j) for j in range(M)] for i in range(L)]
    np.testing.assert_allclose(found[0, h], expected)


def bucket(distance, buckets, bidirectional, furthest):
  """The bucket of one distance, step by step."""
  first = 0
  if bidirectional:
    buckets //= 2
    first = buckets if distance < 0 else 0
    distance = abs(distance)
  distance = max(distance, 0)
  exact = buckets // 2
  if distance < exact:
    return first + distance
  steps = math.log(distance / exact) / math.log(furthest / exact)
  return first + min(exact + int(steps * (buckets - exact)), buckets - 1)


@pytest.mark.parametrize('bidirectional', [False, True])
def test_buckets_are_exact_nearby_and_logarithmic_further_off(bidirectional):
  distance = np.arange(-300, 300)
  # Powers of two fall on edges of buckets, where rounding decides.
  distance = distance[np.log2(np.maximum(np.abs(distance), 1)) % 1 > 0]
  expected = [bucket(d, 32, bidirectional, 128) for d in distance]
  found = t5_bucket(distance, 32, bidirectional=bidirectional)
  np.testing.assert_array_equal(found, expected)


def test_buckets_at_some_published_distances():
  # What the released code gives for 32 buckets up to 128.
  distance = jnp.array([0, 1, 15, 16, 20, 31, 64, 127, 128, 1000, -5])
  found = t5_bucket(distance, 32)
  expected = [0, 1, 15, 16, 17, 21, 26, 31, 31, 31, 0]
  np.testing.assert_array_equal(found, expected)
  found = t5_bucket(jnp.array([3, -3, 200, -200]), 32, bidirectional=True)
  np.testing.assert_array_equal(found, [3, 19, 15, 31])


@pytest.mark.parametrize(
  ('buckets', 'bidirectional', 'furthest'),
  [(1, False, 128), (7, True, 128), (2, True, 128), (32, False, 16)],
)
def test_impossible_buckets_are_refused(buckets, bidirectional, furthest):
  with pytest.raises(ValueError, match='T5 buckets need'):
    t5_bucket(
      jnp.arange(3),
      buckets,
      bidirectional=bidirectional,
      max_distance=furthest,
    )


def test_t5_and_relative_biases_look_up_their_tables():
  table = np.arange(8 * H).reshape(8, H).astype('f4')
  found = logits(T5Bias(jnp.asarray(table), max_distance=16))
  table_5 = np.arange(5 * H).reshape(5, H).astype('f4')
  clipped = logits(RelativeBias(jnp.asarray(table_5)))
  for h in range(H):
    for i in range(L):
      for j in range(M):
        distance = i + 2 - j
        assert found[0, h, i, j] == table[bucket(distance, 8, False, 16), h]
        row = min(max(distance, -2), 2) + 2
        assert clipped[0, h, i, j] == table_5[row, h]
  with pytest.raises(ValueError, match=r'table \[2 C \+ 1, H\]'):
    logits(RelativeBias(jnp.zeros((4, H))))


def test_a_dense_bias_equals_its_array():
  arrays = [
    jax.random.normal(jax.random.key(i), (B, n, H, K))
    for i, n in enumerate((L, M, M))
  ]
  bias = jax.random.normal(jax.random.key(3), (1, H, L, 1))
  np.testing.assert_array_equal(
    attend(*arrays, bias=bias), attend(*arrays, bias=DenseBias(bias))
  )
  assert as_bias(None) is None
  with pytest.raises(ValueError, match=r'Bias or an array \[B, H, L, M\]'):
    attend(*arrays, bias=jnp.zeros((L, M)))


def test_biases_that_compare_positions_need_them():
  arrays = [jnp.ones((B, n, H, K)) for n in (L, M, M)]
  with pytest.raises(ValueError, match='pass query_position'):
    attend(*arrays, bias=ALiBi(), position=NoPosition())
