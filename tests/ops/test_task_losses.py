"""Weights of losses by their formulas, worked numbers and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.ops import dwa_weights
from jaxformers.ops import gradnorm_loss
from jaxformers.ops import gradnorm_weights
from jaxformers.ops import imtl_l_loss
from jaxformers.ops import power_mean
from jaxformers.ops import power_mean_weights
from jaxformers.ops import uncertainty_loss

L = jnp.array([1.0, 4.0, 16.0])


@pytest.mark.parametrize(
  ('gamma', 'mean'),
  [
    (-np.inf, 1),
    (-1, 2.28571429),
    (0, 4),
    (1, 7),
    (2, 9.53939201),
    (np.inf, 16),
  ],
)
def test_power_means_of_1_4_and_16(gamma, mean):
  np.testing.assert_allclose(power_mean(L, gamma), mean, rtol=1e-6)
  weights = power_mean_weights(L, gamma)
  np.testing.assert_allclose(weights @ L, mean, rtol=1e-6)  # Euler
  if np.isfinite(gamma):
    own = jax.grad(power_mean)(L, gamma)
    np.testing.assert_allclose(weights, own, rtol=1e-5)


def test_weights_of_the_geometric_and_the_quadratic_mean():
  np.testing.assert_allclose(
    power_mean_weights(L, 0), [4 / 3, 1 / 3, 1 / 12], rtol=1e-6
  )
  np.testing.assert_allclose(
    power_mean_weights(L, 2), [0.03494283, 0.13977131, 0.55908525], rtol=1e-6
  )
  np.testing.assert_array_equal(
    power_mean_weights(jnp.array([3.0, 1.0, 3.0]), np.inf), [0.5, 0, 0.5]
  )


def test_power_means_are_stable_and_grow_with_the_exponent():
  means = [power_mean(L, g) for g in (-50, -3, -1e-7, 1e-7, 3, 50)]
  assert (np.diff(means) >= 0).all()
  assert np.isfinite(power_mean(1e30 * L, 4))
  np.testing.assert_allclose(power_mean(L, 1e-4), 4, rtol=1e-3)


@pytest.mark.parametrize('gamma', [-np.inf, -1, 0, 2, np.inf])
def test_absent_losses_have_no_part_in_means(gamma):
  losses = jnp.array([1.0, np.nan, 16.0])
  mask = jnp.array([True, False, True])
  there = losses[jnp.array([0, 2])]
  mean = power_mean(losses, gamma, mask)
  np.testing.assert_allclose(mean, power_mean(there, gamma), rtol=1e-6)
  weights = power_mean_weights(losses, gamma, mask)
  expected = power_mean_weights(there, gamma)
  np.testing.assert_allclose(
    weights, [expected[0], 0, expected[1]], rtol=1e-6, atol=1e-30
  )
  nothing = jnp.zeros(3, bool)
  assert power_mean(losses, gamma, nothing) == 0
  np.testing.assert_array_equal(power_mean_weights(losses, gamma, nothing), 0)


def test_uncertainty_at_its_minimum_is_the_mean_logarithm():
  s = jnp.log(L)
  value, slope = jax.value_and_grad(uncertainty_loss, argnums=1)(L, s)
  np.testing.assert_allclose(value, 0.5 * np.sum(1 + np.log(L)), rtol=1e-6)
  np.testing.assert_allclose(slope, 0, atol=1e-6)
  s = jnp.array([0.3, -1.0, 2.0])
  np.testing.assert_allclose(
    imtl_l_loss(L, -s), 2 * uncertainty_loss(L, s), rtol=1e-6
  )
  mask = jnp.array([True, True, False])
  np.testing.assert_allclose(
    uncertainty_loss(L.at[2].set(jnp.nan), s, mask),
    uncertainty_loss(L[:2], s[:2]),
    rtol=1e-6,
  )


def test_dwa_favours_what_falls_slowly():
  weights = dwa_weights(jnp.array([0.5, 1.0]), jnp.array([1.0, 1.0]), 2.0)
  first = 2 / (1 + np.exp(0.25))
  np.testing.assert_allclose(weights, [first, 2 - first], rtol=1e-6)
  masked = dwa_weights(L, L, 2.0, jnp.array([True, False, True]))
  np.testing.assert_allclose(masked, [1, 0, 1], rtol=1e-6)


def test_gradnorm_by_its_definition():
  z, norms = np.array([0.2, -0.4, 0.1]), np.array([1.0, 5.0, 0.5])
  first = np.array([2.0, 4.0, 64.0])
  w = 3 * np.exp(z) / np.exp(z).sum()
  left = np.asarray(L) / first
  goal = (w * norms).mean() * (left / left.mean()) ** 1.5
  expected = np.abs(w * norms - goal).sum()
  arrays = [jnp.asarray(a, jnp.float32) for a in (z, norms)]
  value = gradnorm_loss(*arrays, L, jnp.asarray(first, jnp.float32), 1.5)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(gradnorm_weights(arrays[0]), w, rtol=1e-6)
  # The goal is constant: only the weighted norm moves.
  slope = jax.grad(gradnorm_loss)(*arrays, L, jnp.asarray(first, jnp.float32))
  step = 1e-6

  def fixed(z):
    w = 3 * np.exp(z) / np.exp(z).sum()
    return np.abs(w * norms - goal).sum()

  numeric = [
    (fixed(z + step * e) - fixed(z - step * e)) / (2 * step) for e in np.eye(3)
  ]
  np.testing.assert_allclose(slope, numeric, rtol=1e-4)
