"""The inequality between gradients by parameters and by inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.losses import gradient_norm_inequality


def linear(z):
  return z


def test_two_layers_by_hand():
  params = [
    (jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([0.0, 1.0])),
    (jnp.array([[1.0, -1.0]]), jnp.zeros(1)),
  ]
  lhs, rhs, per_layer = gradient_norm_inequality(
    params, jnp.ones(2), (jax.nn.relu, linear), lambda h: h[0]
  )
  np.testing.assert_allclose(lhs, 3.43145751, rtol=1e-6)
  np.testing.assert_allclose(rhs, 20, rtol=1e-6)
  np.testing.assert_allclose(per_layer.sum(), lhs, rtol=1e-6)


def test_one_linear_layer_has_equality():
  params = [(jnp.array([[3.0, 4.0]]), jnp.array([0.5]))]
  lhs, rhs, _ = gradient_norm_inequality(
    params, jnp.array([1.0, 2.0]), (linear,), lambda h: h[0]
  )
  np.testing.assert_allclose([lhs, rhs], [6, 6], rtol=1e-6)


@pytest.mark.parametrize(
  'activation', [jnp.tanh, jax.nn.relu, jax.nn.gelu, linear, jnp.sin]
)
def test_it_holds_for_random_perceptrons(activation):
  with jax.enable_x64(True):
    check = jax.jit(
      jax.vmap(
        lambda params, x: gradient_norm_inequality(
          params, x, (activation,) * 3, lambda h: jnp.sum(jnp.sin(h))
        )
      )
    )
    rng = np.random.default_rng(0)
    params = [
      (rng.normal(size=(40, m, n)), rng.normal(size=(40, m)))
      for m, n in ((4, 3), (4, 4), (2, 4))
    ]
    lhs, rhs, per_layer = check(params, rng.normal(size=(40, 3)))
    assert (lhs <= rhs * (1 + 1e-12)).all()
    assert (per_layer >= 0).all()


def test_a_dead_layer_is_left_out():
  params = [
    (jnp.array([[1.0]]), jnp.array([-5.0])),
    (jnp.array([[1.0]]), jnp.array([1.0])),
  ]
  lhs, rhs, per_layer = gradient_norm_inequality(
    params, jnp.ones(1), (jax.nn.relu, linear), lambda h: h[0]
  )
  assert lhs == 0
  assert rhs == 1
  np.testing.assert_array_equal(per_layer, [0, 0])


def test_layers_without_activations_are_refused():
  with pytest.raises(ValueError, match='got 1 for 0 layers'):
    gradient_norm_inequality([], jnp.ones(1), (linear,), jnp.sum)
