"""Norms against float64 NumPy, and at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.ops import layer_norm
from jaxformers.ops import rms_norm
from jaxformers.ops.activations import activation

X = np.random.default_rng(0).normal(3.0, 2.0, (4, 6))


def test_rms_norm_by_hand():
  y = rms_norm(jnp.array([3.0, 4.0]), jnp.array([1.0, 2.0]), eps=0.0)
  np.testing.assert_allclose(y, np.array([3, 8]) / np.sqrt(12.5), rtol=1e-6)


@pytest.mark.parametrize('eps_on', ['variance', 'deviation'])
@pytest.mark.parametrize('variance', ['biased', 'unbiased'])
def test_layer_norm_options_equal_numpy(eps_on, variance):
  scale, offset = np.arange(1.0, 7), np.arange(6.0)
  std = X.std(axis=-1, ddof=variance == 'unbiased', keepdims=True)
  divisor = np.sqrt(std**2 + 0.1) if eps_on == 'variance' else std + 0.1
  expected = (X - X.mean(-1, keepdims=True)) / divisor * scale + offset
  with jax.enable_x64(True):
    actual = layer_norm(
      jnp.asarray(X),
      jnp.asarray(scale),
      jnp.asarray(offset),
      eps=0.1,
      eps_on=eps_on,
      variance=variance,
    )
  np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_a_large_mean_costs_no_digits():
  x = jnp.asarray(X + 1e4, jnp.float32)
  expected = layer_norm(x - 1e4)
  np.testing.assert_allclose(layer_norm(x), expected, atol=5e-3)


@pytest.mark.parametrize('eps_on', ['variance', 'deviation'])
@pytest.mark.parametrize('norm', [rms_norm, layer_norm])
def test_zero_vectors_have_finite_gradients(norm, eps_on):
  x = jnp.zeros((2, 4))
  gradient = jax.grad(lambda x: norm(x, eps_on=eps_on).sum())(x)
  assert np.isfinite(gradient).all()
  assert (norm(x, eps_on=eps_on) == 0).all()


def test_bfloat16_in_bfloat16_out():
  x = jnp.asarray(X, jnp.bfloat16)
  assert rms_norm(x).dtype == jnp.bfloat16
  assert layer_norm(x).dtype == jnp.bfloat16


def test_an_unknown_activation_names_the_nearest():
  with pytest.raises(ValueError, match="'gelo'; did you mean 'gelu'"):
    activation('gelo')


def test_activations_by_hand():
  x = jnp.array([-1.0, 2.0])
  np.testing.assert_allclose(activation('squared_relu')(x), [0, 4])
  np.testing.assert_allclose(
    activation('gelu')(x), [-0.15865525, 1.9544997], rtol=1e-5
  )
  np.testing.assert_allclose(
    activation('gelu_tanh')(x), [-0.15880801, 1.95459769], rtol=1e-5
  )
