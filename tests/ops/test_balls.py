"""Balls by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.ops import L2Ball
from jaxformers.ops import MaxBall


def test_the_extreme_of_a_gradient_has_the_radius():
  g = jnp.array([[3.0, 4.0], [0.0, -2.0], [0.0, 0.0]])
  np.testing.assert_allclose(
    L2Ball(2.0).extreme(g), [[1.2, 1.6], [0, -2], [0, 0]], rtol=1e-6
  )
  whole = L2Ball(2.0, per_example=False).extreme({'a': g[0], 'b': 12 * g[1:2]})
  np.testing.assert_allclose(
    whole['b'], [[0, -48 / np.sqrt(25 + 576)]], rtol=1e-6
  )
  np.testing.assert_array_equal(
    MaxBall(0.5).extreme(g), [[0.5, 0.5], [0, -0.5], [0, 0]]
  )


def test_a_projection_moves_only_what_is_outside():
  delta = jnp.array([[3.0, 4.0], [0.3, -0.4]])
  np.testing.assert_allclose(
    L2Ball(1.0).project(delta), [[0.6, 0.8], [0.3, -0.4]], rtol=1e-6
  )
  np.testing.assert_allclose(
    MaxBall(1.0).project(delta), [[1, 1], [0.3, -0.4]], rtol=1e-6
  )


def test_examples_share_a_length_over_all_leaves():
  tree = {'a': jnp.array([3.0, 1.0]), 'b': jnp.array([[4.0], [0.0]])}
  moved = L2Ball(5.0).extreme(tree)
  np.testing.assert_allclose(moved['a'], [3, 5], rtol=1e-6)
  np.testing.assert_allclose(moved['b'], [[4], [0]], rtol=1e-6)


def test_dtypes_stay():
  g = jnp.ones((2, 3), jnp.bfloat16)
  for ball in (L2Ball(0.1), MaxBall(0.1)):
    assert ball.extreme(g).dtype == ball.project(g).dtype == jnp.bfloat16


@pytest.mark.parametrize('ball', [L2Ball, MaxBall])
def test_a_negative_radius_is_refused(ball):
  with pytest.raises(ValueError, match=r'radius must be at least 0, got -1'):
    ball(-1.0)
