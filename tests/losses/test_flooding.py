"""Flooding by hand, and as descent of the squared gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.losses import flooding


def test_losses_and_slopes_on_both_sides_of_the_level():
  slope = jax.grad(flooding)
  np.testing.assert_allclose(flooding(0.5, 0.2), 0.5, rtol=1e-6)
  np.testing.assert_allclose(flooding(0.1, 0.2), 0.3, rtol=1e-6)
  assert slope(0.5, 0.2) == 1
  assert slope(0.1, 0.2) == -1
  assert slope(jnp.float32(0.2), jnp.float32(0.2)) == 1


def test_a_level_of_zero_changes_no_loss():
  losses = jnp.array([0.0, 0.3, 2.0])
  np.testing.assert_array_equal(flooding(losses, 0.0), losses)


def potential(x):
  return (x[0] * x[1] - 0.6) ** 2 / 2 + jnp.sin(x[0]) * x[1] ** 3 / 5


def test_a_step_down_and_one_up_descend_the_squared_gradient():
  """The error shrinks eight times with each halving of the step."""
  with jax.enable_x64(True):
    gradient = jax.jit(jax.grad(potential))
    square = jax.jit(jax.grad(lambda x: jnp.sum(gradient(x) ** 2)))
    x = jnp.array([0.7, 1.1])
    for first in (1, -1):  # down then up, up then down
      errors = []
      for h in (0.02, 0.01):
        y = x - first * h * gradient(x)
        y = y + first * h * gradient(y)
        errors.append(jnp.linalg.norm(y - (x - h**2 / 2 * square(x))))
      assert 7 < errors[0] / errors[1] < 9


def test_unequal_steps_descend_the_loss_with_a_penalty():
  with jax.enable_x64(True):
    e1, e2 = 0.003, 0.002
    strength = e1 * e2 / (2 * (e1 - e2))
    gradient = jax.grad(potential)
    penalised = lambda x: potential(x) + strength * jnp.sum(gradient(x) ** 2)
    x = jnp.array([0.7, 1.1])
    y = x - e1 * gradient(x)
    y = y + e2 * gradient(y)
    expected = x - (e1 - e2) * jax.grad(penalised)(x)
    np.testing.assert_allclose(y, expected, atol=1e-7)
    assert jnp.abs(y - (x - (e1 - e2) * gradient(x))).max() > 3e-6
