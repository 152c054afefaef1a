"""Penalties on input gradients against single examples and Jacobians."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.losses import input_gradient_penalty
from jaxformers.losses import noise_penalty

X = np.random.default_rng(0).normal(size=(3, 2, 2)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(2, 2, 3)).astype(np.float32)


def loss(x):
  return jnp.sum(jnp.sin(x) * x[0]) ** 2


def probabilities(x):
  return jax.nn.softmax(jnp.einsum('...ij,ijk->...k', jnp.tanh(x), W))


def test_each_example_has_its_own_gradient():
  penalty = input_gradient_penalty(jax.vmap(loss), X)
  for x, value in zip(X, penalty, strict=True):
    np.testing.assert_allclose(
      value, jnp.sum(jax.grad(loss)(x) ** 2), rtol=1e-5
    )


def test_a_penalised_loss_is_that_after_a_step_that_is_not_normalised():
  eps = 1e-3
  losses = jax.vmap(loss)
  moved = losses(X + eps * jax.grad(lambda x: losses(x).sum())(X))
  # The step raises the loss by eps |g|^2, of which the penalty has a half.
  expected = losses(X) + eps * input_gradient_penalty(losses, X)
  np.testing.assert_allclose(moved, expected, rtol=1e-3)


@pytest.mark.parametrize('divergence', ['mse', 'kl'])
def test_random_signs_estimate_the_cost_of_noise(divergence, monkeypatch):
  """Averaged over all signs of one example it is the sum over outputs."""
  x = X[:1]
  patterns = iter(jnp.array([*itertools.product((-1.0, 1.0), repeat=3)]))
  monkeypatch.setattr(
    jax.random, 'rademacher', lambda key, shape, dtype: next(patterns)[None]
  )
  estimates = [
    noise_penalty(probabilities, x, None, divergence=divergence)[0]
    for _ in range(8)
  ]
  jacobian = np.asarray(jax.jacobian(probabilities)(x[0]), np.float64)
  squares = (jacobian**2).sum((1, 2))
  weights = 2 if divergence == 'mse' else 1 / probabilities(x[0])
  np.testing.assert_allclose(
    np.mean(estimates), np.sum(weights * squares), rtol=1e-5
  )


def test_noise_costs_what_the_penalty_says():
  with jax.enable_x64(True):
    sigma, x = 1e-3, jnp.asarray(X[0], jnp.float64)
    noise = sigma * jax.random.normal(jax.random.key(0), (20000, 2, 2))
    p, q = probabilities(x), probabilities(x + noise)
    jacobian = jax.jacobian(probabilities)(x)
    kl = jnp.mean(jnp.sum(p * jnp.log(p / q), axis=-1))
    expected = sigma**2 / 2 * jnp.sum(jacobian**2 / p[:, None, None])
    np.testing.assert_allclose(kl, expected, rtol=0.03)


def test_an_unknown_divergence_is_refused():
  with pytest.raises(ValueError, match="'mse' or 'kl', got 'l1'"):
    noise_penalty(probabilities, X, jax.random.key(0), divergence='l1')
