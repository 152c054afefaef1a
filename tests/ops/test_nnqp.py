"""Quadratic programs against SciPy and their own conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from jaxformers.ops import frank_wolfe_weights
from jaxformers.ops import min_norm_weights
from jaxformers.ops import nnqp

TASKS, WIDTH = 5, 7


def gradients():
  """1000 sets of five gradients: generic, conflicting, dependent, extreme."""
  rng = np.random.default_rng(0)
  g = rng.normal(size=(1000, TASKS, WIDTH))
  thin = rng.normal(size=(150, TASKS, 2)) @ rng.normal(size=(150, 2, WIDTH))
  g[200:350] = thin  # rank 2
  g[350:450, 1] = -g[350:450, 0]
  g[450:550, 2] = 3 * g[450:550, 1]
  g[550:650, 3] = 0
  g[650:750] = g[650:750, :1] + 0.05 * g[650:750]
  g[650:750, 0] *= -1
  g[750:900] *= np.exp(2 * rng.normal(size=(150, TASKS, 1)))
  g[900:] *= 1e6
  return g


G = gradients()


def solved(function, *arrays, dtype=np.float64):
  """Returns what a function gives for each problem, compiled once."""
  with jax.enable_x64(dtype == np.float64):
    arrays = [jnp.asarray(a, dtype) for a in arrays]
    return np.asarray(jax.jit(jax.vmap(function))(*arrays), np.float64)


def grams(g):
  return np.einsum('ztd,zud->ztu', g, g)


@pytest.mark.parametrize(
  ('dtype', 'tolerance'), [(np.float64, 1e-10), (np.float32, 2e-4)]
)
def test_a_thousand_projections_are_those_of_scipy(dtype, tolerance):
  k = grams(G)
  x = solved(nnqp, k[:, 1:, 1:], k[:, 1:, 0], dtype=dtype)
  assert (x >= 0).all()
  for g, own in zip(G, x, strict=True):
    theirs, _ = optimize.nnls(g[1:].T, -g[0])
    difference = (own - theirs) @ g[1:]
    assert np.linalg.norm(difference) <= tolerance * np.linalg.norm(g[0])


@pytest.mark.parametrize(
  ('dtype', 'tolerance'), [(np.float64, 1e-11), (np.float32, 2e-6)]
)
def test_a_thousand_shortest_vectors_meet_their_conditions(dtype, tolerance):
  a = solved(min_norm_weights, grams(G), dtype=dtype)
  assert (a >= 0).all()
  np.testing.assert_allclose(a.sum(axis=1), 1, rtol=1e-6)
  u = np.einsum('zt,ztd->zd', a, G)
  along = np.einsum('ztd,zd->zt', G, u)
  square = (u**2).sum(axis=1, keepdims=True)
  scale = np.linalg.norm(G, axis=-1).min(axis=1, keepdims=True)
  size = np.linalg.norm(G, axis=-1) * np.maximum(scale, 1e-30)
  # <g_i, u> >= |u|^2 for all, with equality where a_i > 0.
  assert ((square - along) <= tolerance * size + 1e-300).all()
  assert (a * (along - square) <= tolerance * size + 1e-300).all()


def test_more_unknowns_go_through_coordinate_descent():
  rng = np.random.default_rng(1)
  g = rng.normal(size=(50, 13, 20))
  g[25:] *= np.exp(2 * rng.normal(size=(25, 13, 1)))
  g[:10, 5] = 2 * g[:10, 6]
  g[10:12, 3] = 0
  k = grams(g)
  x = solved(nnqp, k[:, 1:, 1:], k[:, 1:, 0])
  for g_TD, own in zip(g, x, strict=True):
    theirs, _ = optimize.nnls(g_TD[1:].T, -g_TD[0])
    error = np.linalg.norm((own - theirs) @ g_TD[1:])
    assert error <= 1e-8 * np.linalg.norm(g_TD[0])


def test_absent_unknowns_are_left_out():
  q = np.array([[4.0, 1.0, -2.0], [1.0, 3.0, 0.5], [-2.0, 0.5, 5.0]])
  c = np.array([-1.0, 2.0, -3.0])
  with jax.enable_x64(True):
    mask = jnp.array([True, True, False])
    own = nnqp(jnp.asarray(q), jnp.asarray(c), mask)
    np.testing.assert_allclose(own[:2], nnqp(q[:2, :2], c[:2]), rtol=1e-12)
    assert own[2] == 0
    a = min_norm_weights(jnp.asarray(q), mask)
    np.testing.assert_allclose(a, [2 / 5, 3 / 5, 0], rtol=1e-12)


def test_two_vectors_by_the_closed_form():
  k = grams(np.random.default_rng(2).normal(size=(100, 2, 2)))
  first = (k[:, 1, 1] - k[:, 0, 1]) / (k[:, 0, 0] + k[:, 1, 1] - 2 * k[:, 0, 1])
  a = solved(min_norm_weights, k)
  np.testing.assert_allclose(a[:, 0], np.clip(first, 0, 1), atol=1e-12)


@pytest.mark.parametrize(
  ('g', 'expected'),
  [
    ([[3.0, 0.0], [0.0, 3.0]], [0.5, 0.5]),
    ([[1.0, 2.0], [3.0, 6.0]], [1.0, 0.0]),
    ([[0.0, 0.0], [3.0, 6.0]], [1.0, 0.0]),
    ([[0.0, 0.0], [0.0, 0.0]], [0.5, 0.5]),
  ],
)
def test_shortest_vectors_at_the_edges(g, expected):
  g = jnp.array(g)
  np.testing.assert_allclose(min_norm_weights(g @ g.T), expected, atol=1e-6)


def test_nothing_present_has_no_weight():
  k = jnp.eye(3)
  np.testing.assert_array_equal(min_norm_weights(k, jnp.zeros(3, bool)), 0)


def test_a_twin_changes_weights_but_not_the_vector():
  g = np.array([[2.0, 0.0], [-1.0, 1.0], [-1.0, 1.0]])
  a = solved(min_norm_weights, (g @ g.T)[None])[0]
  np.testing.assert_allclose(a @ g, [0.2, 0.6], atol=1e-12)


def test_frank_wolfe_arrives_late():
  g = np.array([[1.0, 0.2, 0.0], [-0.5, 1.0, 0.3], [0.1, -0.4, 1.0]])
  k = g @ g.T
  with jax.enable_x64(True):
    exact = min_norm_weights(k)
    early, late = (frank_wolfe_weights(k, n) for n in (3, 3000))
    mean = frank_wolfe_weights(k, 3000, 'average')
  np.testing.assert_allclose(late, exact, atol=1e-3)
  np.testing.assert_allclose(mean, exact, atol=1e-2)
  assert np.abs(early - exact).max() > np.abs(late - exact).max()
  with pytest.raises(ValueError, match="'exact' or 'average', got 'line'"):
    frank_wolfe_weights(k, 1, 'line')
