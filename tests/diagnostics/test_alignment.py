"""Cosines of trees and their blocks: identities, traps, and the trainer."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from jaxformers.diagnostics import measurements_of
from jaxformers.diagnostics import monitor_alignment
from jaxformers.diagnostics import tree_cosine_report
from jaxformers.diagnostics import update_report


def cosine(x, y):
  return x @ y / (np.linalg.norm(x) * np.linalg.norm(y))


def random_tree(seed):
  rng = np.random.default_rng(seed)
  return {
    'a': {'w_DF': rng.normal(size=(3, 4)), 'b_F': rng.normal(size=4)},
    'c': [100 * rng.normal(size=2)],
  }


def test_entries_with_equal_signs_have_kappa_as_their_cosine():
  report = tree_cosine_report(
    jnp.array([1.0, 1.0]), jnp.array([1.0, 2.0]), 'element'
  )
  np.testing.assert_allclose(
    [report.cosine, report.kappa], 0.94868330, rtol=1e-6
  )
  np.testing.assert_array_equal(report.block_cosines, [1, 1])
  np.testing.assert_allclose(report.block_weights, [1 / 3, 2 / 3], rtol=1e-6)


def test_large_cosines_of_all_blocks_do_not_make_a_large_cosine():
  v = jnp.array([0.9, np.sqrt(0.19)])
  x = [jnp.array([0.1, 0.0]), jnp.array([1.0, 0.0])]
  report = tree_cosine_report(x, [v, 0.1 * v])
  local = [*report.block_cosines.values()]
  np.testing.assert_allclose(local, [0.9, 0.9], rtol=1e-6)
  np.testing.assert_allclose(report.kappa, 0.19801980, rtol=1e-6)
  np.testing.assert_allclose(report.cosine, 0.17821782, rtol=1e-6)


def test_pooled_correlations_can_change_their_sign():
  """Centred within groups or overall: Simpson's paradox."""
  x = [jnp.array([0.0, 1.0, 2.0]), jnp.array([4.0, 5.0, 6.0])]
  y = [x[0] + 5, x[1] - 5]
  centred = lambda parts: [a - a.mean() for a in parts]
  groups = tree_cosine_report(centred(x), centred(y)).block_cosines
  np.testing.assert_allclose([*groups.values()], [1, 1], rtol=1e-6)
  pooled = [jnp.concatenate(a) - jnp.concatenate(a).mean() for a in (x, y)]
  np.testing.assert_allclose(
    tree_cosine_report(*pooled).cosine, -0.79406667, rtol=1e-6
  )


def test_the_cosine_with_signs_compares_two_norms():
  g = jnp.array([3.0, -4.0, 0.1])
  report = tree_cosine_report(g, jnp.sign(g))
  np.testing.assert_allclose(report.cosine, 0.81967345, rtol=1e-6)
  by_norms = jnp.abs(g).sum() / (3**0.5 * jnp.linalg.norm(g))
  np.testing.assert_allclose(report.cosine, by_norms, rtol=1e-6)


@pytest.mark.parametrize('blocks', ['leaf', 'element', r'^.'])
def test_the_whole_is_kappa_times_the_weighted_mean_of_the_blocks(blocks):
  with jax.enable_x64(True):
    x, y = random_tree(0), random_tree(1)
    report = jax.jit(tree_cosine_report, static_argnums=2)(x, y, blocks)
    flat = [
      np.concatenate([a.ravel() for a in jax.tree.leaves(t)]) for t in (x, y)
    ]
    np.testing.assert_allclose(report.cosine, cosine(*flat), rtol=1e-12)
    mean = sum(
      jnp.sum(w * c)
      for w, c in zip(
        jax.tree.leaves(report.block_weights),
        jax.tree.leaves(report.block_cosines),
        strict=True,
      )
    )
    np.testing.assert_allclose(report.cosine, report.kappa * mean, rtol=1e-12)
    total = sum(w.sum() for w in jax.tree.leaves(report.block_weights))
    np.testing.assert_allclose(total, 1, rtol=1e-12)
    assert 0 <= report.kappa <= 1


def test_blocks_are_named_by_what_a_pattern_matches():
  report = tree_cosine_report(random_tree(0), random_tree(1), r'^a')
  assert set(report.block_cosines) == {'a', 'rest'}
  leaves = tree_cosine_report(random_tree(0), random_tree(1))
  assert set(leaves.block_cosines) == {'a/b_F', 'a/w_DF', 'c/0'}


def test_nothing_has_cosine_and_weight_zero():
  x = [jnp.zeros(2), jnp.ones(2)]
  report = tree_cosine_report(x, [jnp.ones(2), jnp.ones(2)])
  np.testing.assert_allclose(
    [*report.block_cosines.values()], [0, 1], rtol=1e-6
  )
  np.testing.assert_allclose(
    [*report.block_weights.values()], [0, 1], rtol=1e-6
  )
  for blocks in ('leaf', 'element'):
    nothing = tree_cosine_report(x[0], x[0], blocks)
    for leaf in jax.tree.leaves(nothing):
      np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_roots_come_before_products():
  """The product of these squared norms would overflow."""
  large = jnp.full(2, 1e15)
  assert tree_cosine_report(large, large).cosine == pytest.approx(1)


def test_updates_are_measured_beside_their_weights():
  params = {'w': jnp.array([3.0, 4.0]), 'b': jnp.zeros(2)}
  updates = {'w': jnp.array([0.0, 0.1]), 'b': jnp.array([0.6, 0.8])}
  report = update_report(
    updates, params, jax.tree.map(lambda a: 2 * a, updates)
  )
  np.testing.assert_allclose(report.update_to_weight['w'], 0.02, rtol=1e-6)
  assert report.update_to_weight['b'] == 0
  np.testing.assert_allclose(report.update_norm['b'], 1, rtol=1e-6)
  np.testing.assert_allclose(report.weight_norm['w'], 5, rtol=1e-6)
  np.testing.assert_allclose(report.gradient_norm['b'], 2, rtol=1e-6)


def test_a_monitored_optimiser_updates_as_before():
  params = jax.tree.map(jnp.float32, random_tree(0))
  gradients = jax.tree.map(jnp.float32, random_tree(1))
  inner = optax.adam(0.1)
  monitored = monitor_alignment(inner)
  state = monitored.init(params)
  updates, state = jax.jit(monitored.update)(
    gradients, state, params, value=1.0
  )
  expected, _ = jax.jit(inner.update)(gradients, inner.init(params), params)
  jax.tree.map(np.testing.assert_array_equal, updates, expected)
  measured = measurements_of(optax.MultiStepsState(0, 0, state, 0, 0))
  report = tree_cosine_report(updates, gradients)
  np.testing.assert_allclose(
    measured['update_cosine'], -report.cosine, rtol=1e-5
  )
  change = optax.tree.vdot(updates, gradients)
  np.testing.assert_allclose(measured['predicted_change'], change, rtol=1e-5)
  assert measured['update_to_weight/c/0'] > 0
  with pytest.raises(ValueError, match=r'needs update\(\.\.\., params\)'):
    monitored.update(gradients, state)
  with pytest.raises(ValueError, match="'element' is for tree_cosine_report"):
    update_report(updates, params, gradients, 'element')


def test_measurements_of_optax_are_read_too():
  chain = optax.chain(
    optax.monitor({'norm': optax.tree.norm, 'all': lambda u: u}), optax.sgd(1.0)
  )
  state = chain.init(jnp.ones(2))
  _, state = chain.update(jnp.array([3.0, 4.0]), state)
  measured = measurements_of(state)
  assert set(measured) == {'norm'}
  assert measured['norm'] == 5


def test_split_leaves_are_not_gathered():
  mesh = jax.make_mesh((2, 4), ('a', 'b'), (AxisType.Auto,) * 2)
  split = NamedSharding(mesh, PartitionSpec(None, ('a', 'b')))
  leaf = jax.ShapeDtypeStruct((4, 16), jnp.float32, sharding=split)
  compiled = jax.jit(tree_cosine_report).lower([leaf], [leaf]).compile()
  assert 'all-gather(' not in compiled.as_text()
