"""Inner products and combinations of stacked gradients."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
import numpy as np
import pytest

from jaxformers.ops import combine
from jaxformers.ops import gram

TASKS = 3


def stacked(dtype=np.float32):
  rng = np.random.default_rng(0)
  shapes = {'w_DF': (8, 4), 'b_F': (4,), 'scale': ()}
  return {
    k: jnp.asarray(rng.normal(size=(TASKS, *s)), dtype)
    for k, s in shapes.items()
  }


def flat(tree):
  leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
  return np.concatenate([x.reshape(TASKS, -1) for x in leaves], axis=1)


def test_all_inner_products_over_all_leaves():
  g = flat(stacked())
  np.testing.assert_allclose(gram(stacked()), g @ g.T, rtol=1e-5, atol=1e-5)
  w = np.array([0.5, 0.0, -2.0])
  got = combine(stacked(), jnp.array(w))
  expected = w @ g
  np.testing.assert_allclose(
    np.concatenate([np.ravel(x) for x in got.values()]), expected, 1e-5, 1e-6
  )


def test_a_metric_weighs_entries():
  tree, metric = stacked(), {k: 1 + x[0] ** 2 for k, x in stacked().items()}
  weight = np.concatenate([np.ravel(x) for x in jax.tree.leaves(metric)])
  g = flat(tree)
  np.testing.assert_allclose(
    gram(tree, metric), (g * weight) @ g.T, rtol=1e-5, atol=1e-5
  )
  with pytest.raises(ValueError, match='metric has 1 leaves, .* have 3'):
    gram(tree, jnp.ones(3))


def test_half_precision_accumulates_in_float32():
  tree = {'w_D': jnp.ones((2, 5000), jnp.bfloat16)}
  k = gram(tree)
  assert k.dtype == jnp.float32
  np.testing.assert_array_equal(k, 5000)
  assert combine(tree, jnp.ones(2))['w_D'].dtype == jnp.bfloat16
  with jax.enable_x64(True):
    assert gram(stacked(np.float64)).dtype == jnp.float64


def test_what_has_no_weight_does_not_count():
  tree = {'w_D': jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf]])}
  np.testing.assert_array_equal(
    combine(tree, jnp.array([2.0, 0.0]))['w_D'], [2, 4]
  )


def test_split_leaves_are_reduced_and_never_gathered():
  mesh = jax.make_mesh((2, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
  specs = {
    'w_DF': jax.P(None, 'a', 'b'),
    'b_F': jax.P(None, 'b'),
    'scale': jax.P(),
  }
  tree = stacked()
  placed = {
    k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()
  }
  compiled = jax.jit(gram).lower(placed).compile()
  text = compiled.as_text()
  assert 'all-gather' not in text
  assert 'all-reduce' in text
  np.testing.assert_allclose(compiled(placed), gram(tree), 1e-5, 1e-5)
