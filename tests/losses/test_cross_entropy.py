"""Cross-entropy by hand and against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxformers.losses import cross_entropy

LOGITS = jax.random.normal(jax.random.key(0), (2, 3, 5)) * 3
TARGETS = jnp.array([[0, -1, 4], [2, 2, -1]])


def test_by_hand():
  logits = jnp.log(jnp.array([[[1.0, 2.0, 5.0]]]))
  losses = cross_entropy(logits, jnp.array([[1]]))
  np.testing.assert_allclose(losses.cross_entropy_BL, np.log(4), rtol=1e-6)
  np.testing.assert_allclose(losses.log_normalizer_BL, np.log(8), rtol=1e-6)


def test_it_equals_optax_where_something_is_to_be_predicted():
  losses = cross_entropy(LOGITS, TARGETS)
  expected = optax.softmax_cross_entropy_with_integer_labels(
    LOGITS, jnp.maximum(TARGETS, 0)
  )
  np.testing.assert_allclose(
    losses.cross_entropy_BL, jnp.where(TARGETS >= 0, expected, 0), rtol=1e-5
  )
  np.testing.assert_array_equal(losses.is_target_BL, TARGETS >= 0)


def test_smoothing_equals_a_smoothed_target_distribution():
  losses = cross_entropy(LOGITS, TARGETS, label_smoothing=0.2)
  smooth = optax.smooth_labels(jax.nn.one_hot(TARGETS, 5), 0.2)
  expected = optax.softmax_cross_entropy(LOGITS, smooth)
  np.testing.assert_allclose(
    losses.cross_entropy_BL,
    jnp.where(TARGETS >= 0, expected, 0),
    rtol=1e-5,
    atol=1e-6,
  )


def test_what_is_not_a_target_has_no_gradient():
  gradient = jax.grad(
    lambda logits: cross_entropy(logits, TARGETS).cross_entropy_BL.sum()
  )(LOGITS)
  assert (gradient[TARGETS < 0] == 0).all()
  assert (gradient[TARGETS >= 0] != 0).all()


def test_bfloat16_logits_are_summed_in_float32():
  logits = jnp.zeros((1, 1, 1000), jnp.bfloat16)
  losses = cross_entropy(logits, jnp.array([[7]]))
  assert losses.cross_entropy_BL.dtype == jnp.float32
  np.testing.assert_allclose(losses.cross_entropy_BL, np.log(1000), rtol=1e-6)
