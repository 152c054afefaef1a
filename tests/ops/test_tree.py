"""Arithmetic over trees, against NumPy and without gathering split leaves."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from jaxformers.ops import leaf_keys
from jaxformers.ops import top_fraction_threshold
from jaxformers.ops import tree_dot
from jaxformers.ops import tree_norm


def test_inner_products_and_norms_by_hand():
  a = {'x': jnp.array([1.0, 2.0]), 'y': jnp.array([[3.0]])}
  b = {'x': jnp.array([4.0, -1.0]), 'y': jnp.array([[2.0]])}
  assert tree_dot(a, b) == 8
  np.testing.assert_allclose(tree_norm(a), np.sqrt(14), rtol=1e-6)
  assert tree_norm({}) == 0


def test_products_of_half_precision_accumulate_in_float32():
  ones = {'x': jnp.ones(1000, jnp.bfloat16)}
  dot = tree_dot(ones, ones)
  assert dot == 1000
  assert dot.dtype == jnp.float32
  with jax.enable_x64(True):
    assert tree_dot(jnp.ones(3), jnp.ones(3)).dtype == jnp.float64


def test_leaves_have_keys_of_their_own_at_each_step():
  tree = {'x': 0, 'y': (1, 2)}
  key = jax.random.key(0)
  keys = [*jax.tree.leaves(leaf_keys(key, 3, tree))]
  keys += jax.tree.leaves(leaf_keys(key, 4, tree))
  assert len({tuple(jax.random.key_data(k).tolist()) for k in keys}) == 6
  assert jax.tree.structure(leaf_keys(key, 3, tree)) == jax.tree.structure(tree)


@pytest.mark.parametrize('fraction', [0.0, 0.1, 0.5, 1.0])
def test_a_threshold_divides_all_entries(fraction):
  rng = np.random.default_rng(0)
  tree = {'x': rng.normal(size=(30, 10)), 'y': rng.normal(size=700)}
  tree = jax.tree.map(jnp.float32, tree)
  threshold = jax.jit(top_fraction_threshold)(tree, fraction)
  above = sum((x >= threshold).sum() for x in jax.tree.leaves(tree))
  assert above == max(1, 1000 * fraction)


def test_a_threshold_is_exact_among_entries_of_very_different_size():
  sizes = 10.0 ** -np.arange(30)
  tree = {'x': jnp.float32(sizes), 'y': -jnp.float32(sizes), 'z': jnp.zeros(4)}
  threshold = jax.jit(top_fraction_threshold)
  for count, value in ((10, 1e-9), (30, 1e-29), (33, 0.0), (44, -1e-20)):
    value = -jnp.float32(1e-20) if value < 0 else jnp.float32(value)
    assert threshold(tree, count / 64) == value
  with jax.enable_x64(True):
    assert threshold({'x': jnp.asarray(sizes)}, 0.5, 64) == 10.0**-14


def test_a_threshold_of_equal_entries_is_their_value():
  assert top_fraction_threshold({'x': jnp.full(7, 0.3)}, 0.5) == jnp.float32(
    0.3
  )


def test_nothing_of_a_split_leaf_is_gathered():
  mesh = jax.make_mesh((2, 4), ('a', 'b'), (AxisType.Auto,) * 2)
  split = NamedSharding(mesh, PartitionSpec('a', 'b'))
  leaf = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=split)
  for function in (tree_norm, lambda x: top_fraction_threshold(x, 0.3)):
    assert (
      'all-gather(' not in jax.jit(function).lower(leaf).compile().as_text()
    )
