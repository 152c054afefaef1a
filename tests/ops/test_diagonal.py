"""Diagonal state-space models: where they begin, and what a step does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.ops import discretize
from jaxformers.ops import normal_legs


@pytest.mark.parametrize('size', [1, 2, 7, 64])
def test_legs_is_a_normal_matrix_less_one_of_rank_one(size):
  # Gu et al., 2020, equation 3: rows below, diagonal, and nothing above.
  expected = np.zeros((size, size))
  for n in range(size):
    expected[n, n] = -(n + 1)
    for k in range(n):
      expected[n, k] = -np.sqrt((2 * n + 1) * (2 * k + 1))
  legs = normal_legs(size)
  v, p = legs.vectors_NS, legs.low_rank_N
  actual = (v * legs.eigenvalues_S) @ v.conj().T - np.outer(p, p)
  np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-11)
  np.testing.assert_allclose(v.conj().T @ v, np.eye(size), atol=1e-12)
  np.testing.assert_allclose(v[0].imag, 0, atol=1e-12)
  assert (v[0].real > 0).all()


def test_its_eigenvalues_are_known_and_come_in_pairs():
  eigenvalues = normal_legs(4).eigenvalues_S
  pairs = [-4.6033, -0.5565, 0.5565, 4.6033]
  np.testing.assert_allclose(eigenvalues.imag, pairs, atol=5e-5)
  np.testing.assert_allclose(eigenvalues.real, -0.5)
  for size, largest in (16, 80.97), (64, 1303.27):
    actual = normal_legs(size).eigenvalues_S[0].imag
    assert round(-actual, 2) == largest


def test_a_step_that_holds_its_input_is_exact():
  # x' = -2 x + u with u = 3 from x = 1: towards 1.5 by exp(-2 dt).
  decay, gain = discretize(jnp.array(-2.0), jnp.array(0.7))
  expected = 1.5 + (1 - 1.5) * np.exp(-1.4)
  np.testing.assert_allclose(decay + 3 * gain, expected, rtol=1e-6)


def test_a_trapezoidal_step_solves_its_equation():
  eigenvalue, step = jnp.array(-0.5 + 3j), 0.1
  decay, gain = discretize(eigenvalue, step, 'bilinear')
  x, u = 1 - 2j, 3.0
  after = decay * x + gain * u
  change = step * (eigenvalue * (x + after) / 2 + u)
  np.testing.assert_allclose(after - x, change, rtol=1e-5)


def test_small_steps_keep_their_digits():
  for size in 1e-3, 1e-6, 0.0:
    eigenvalue = jnp.array(-0.5 * size + 0j)
    z = -0.5 * size * 1.0
    _, gain = discretize(eigenvalue, 1.0)
    expected = np.expm1(z) / z if z else 1.0
    np.testing.assert_allclose(gain, expected, rtol=2e-7)
    gradient = jax.grad(lambda x: discretize(x, 1.0).gain.real)(-0.5 * size)
    assert np.isfinite(gradient)


def test_a_system_that_cannot_be_is_refused():
  with pytest.raises(ValueError, match='size >= 1, got 0'):
    normal_legs(0)
  with pytest.raises(ValueError, match="did you mean 'bilinear'"):
    discretize(jnp.array(-1.0), 0.1, 'bilinera')
