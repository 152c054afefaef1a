"""Weight decay without a coefficient."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformers.optim import tuning_free_l2

PARAMS = {'a': jnp.array([1.0, 2.0]), 'b': jnp.array([2.0]), 'c': jnp.zeros(2)}
GRADIENT = {
  'a': jnp.array([-3.0, 1.0]),
  'b': jnp.array([-4.0]),
  'c': jnp.ones(2),
}


def updated(transform, updates=GRADIENT, params=PARAMS):
  return transform.update(updates, transform.init(params), params)[0]


def test_globally_by_hand():
  # <g, theta> = -3 + 2 - 8 = -9, |theta|^2 = 9: theta is added once.
  u = updated(tuning_free_l2())
  np.testing.assert_allclose(u['a'], [-2, 3])
  np.testing.assert_allclose(u['b'], [-2])
  np.testing.assert_allclose(u['c'], [1, 1])
  inner = sum(jnp.vdot(u[k], PARAMS[k]) for k in u)
  np.testing.assert_allclose(inner, 0, atol=1e-6)


def test_by_tensor_by_hand():
  u = updated(tuning_free_l2('tensor'))
  np.testing.assert_allclose(u['a'], [-2.8, 1.4], rtol=1e-6)
  np.testing.assert_allclose(u['b'], [0], atol=1e-6)
  np.testing.assert_allclose(u['c'], [1, 1])


def test_what_shrinks_already_is_left_alone():
  gradient = {k: -g for k, g in GRADIENT.items()}
  u = updated(tuning_free_l2(), gradient)
  for k in u:
    np.testing.assert_array_equal(u[k], gradient[k])


def test_decoupled_it_treats_the_update():
  link = tuning_free_l2(decoupled=True)
  step = {k: -g for k, g in GRADIENT.items()}
  u = updated(link, step)
  np.testing.assert_allclose(u['a'], [2, -3])
  after = optax.apply_updates(PARAMS, {k: 1e-3 * x for k, x in u.items()})
  grown = optax.tree.norm(after) ** 2 - optax.tree.norm(PARAMS) ** 2
  assert grown <= 1e-4  # of second order


def test_wrong_use_is_refused():
  with pytest.raises(ValueError, match="'global' or 'tensor', got 'layer'"):
    tuning_free_l2('layer')
  with pytest.raises(ValueError, match='needs params'):
    tuning_free_l2().update(GRADIENT, optax.EmptyState())
