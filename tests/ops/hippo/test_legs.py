"""Steps of LegS, against matrix exponentials and dense algebra in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm
from scipy.special import eval_legendre

from jaxformers.ops import LegS
from jaxformers.ops import legs_change
from jaxformers.ops import legs_forgetting
from jaxformers.ops import legs_multiply
from jaxformers.ops import legs_projection
from jaxformers.ops import legs_solve
from jaxformers.ops import legs_transition


def near(actual, expected, tolerance=1e-12):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def by_exponential(size, ratio):
  system = LegS().system(size)
  e = expm(-system.a_ST * np.log(ratio))
  return e, np.linalg.solve(system.a_ST, (e - np.eye(size)) @ system.b_S)


def test_three_states_at_half_the_time_by_hand():
  step = legs_transition(3, 0.5)
  expected = [[0.5, 0, 0], [-0.433013, 0.25, 0], [0, -0.484123, 0.125]]
  near(step.a_ST, expected, 1e-6)
  near(step.b_S, [0.5, 0.433013, 0], 1e-6)


@pytest.mark.parametrize('size', [1, 2, 64])
def test_transitions_are_exponentials(size):
  ratios = np.array([0.1, 0.5, 0.9, 0.999])
  step = legs_transition(size, ratios)
  for i, ratio in enumerate(ratios):
    e, b = by_exponential(size, ratio)
    near(step.a_ST[i], e, 1e-11)
    near(step.b_S[i], b, 1e-11)
    near(np.diag(step.a_ST[i]), legs_forgetting(size, ratio), 1e-11)


def test_transitions_compose_and_never_grow():
  ratios = np.array([0.0, 0.2, 0.5, 0.99, 1.0])
  steps = legs_transition(32, ratios).a_ST
  norms = np.linalg.norm(steps, 2, axis=(1, 2))
  assert (norms <= np.sqrt(ratios) + 1e-12).all()
  near(steps[1] @ steps[2], legs_transition(32, 0.1).a_ST)
  near(steps[0], 0)
  near(steps[4], np.eye(32))


@pytest.mark.parametrize('size', [1, 2, 64])
def test_changes_are_transitions_to_the_last_digit(size):
  times = np.array([0, 0, 1, 1, 2, 9, 50, 10**6])
  until = np.array([0, 1, 1, 2, 3, 99, 51, 10**6 + 1])
  ratio = np.where(until > 0, times / np.maximum(until, 1), 1)
  exact = legs_transition(size, ratio)
  change = jax.jit(legs_change, static_argnums=(2, 3))
  with jax.enable_x64(True):
    double = jax.tree.map(np.asarray, change(times, until, size, jnp.float64))
  near(double.change_ST + np.eye(size), exact.a_ST, 1e-12)
  near(double.gain_S, exact.b_S, 1e-12)
  single = change(times, until, size, jnp.float32)
  single = jax.tree.map(np.asarray, single)
  # Errors are relative to the change, which is 1e-6 for the last step.
  for ours, true in zip(single, double, strict=True):
    axes = tuple(range(1, true.ndim))
    error = np.linalg.norm(ours - true, axis=axes)
    assert (error <= 2e-6 * np.linalg.norm(true, axis=axes)).all()
  # Padding and the first sample are exact to the bit.
  assert not single.change_ST[[0, 2]].any()
  assert not single.gain_S[[0, 2]].any()
  assert single.gain_S[1].tolist() == [1, *[0] * (size - 1)]


def test_a_projection_is_the_integral_of_the_definition():
  u = np.random.default_rng(0).normal(size=(1, 7, 2))
  node, weight = np.polynomial.legendre.leggauss(12)
  size, expected = 9, 0
  for j in range(7):
    s = (2 * j + 1 + node) / 7 - 1
    basis = np.sqrt(2 * np.arange(size) + 1) * eval_legendre(
      np.arange(size), s[:, None]
    )
    expected = expected + (weight @ basis / 14)[:, None] * u[0, j]
  project = jax.jit(legs_projection, static_argnums=1)
  with jax.enable_x64(True):
    near(project(u, size)[0], expected)
  near(project(u.astype(np.float32), size)[0], expected, 3e-6)


def test_multiplying_and_solving_take_no_matrix():
  rng, size = np.random.default_rng(0), 33
  v, mu = rng.normal(size=(3, size, 2)), np.array([0.0, 0.1, 2.0])
  a, eye = LegS().system(size).a_ST, np.eye(size)
  with jax.enable_x64(True):
    near(jax.jit(legs_multiply)(v), a @ v, 1e-11)
    solved = jax.jit(legs_solve)(v, mu)
    for i in range(3):
      near(solved[i], np.linalg.solve(eye - mu[i] * a, v[i]), 1e-11)
    near(jax.jit(legs_solve)(v, 0.1)[1], solved[1])


def test_ratios_lie_between_0_and_1():
  with pytest.raises(ValueError, match='between 0 and 1'):
    legs_transition(2, [0.5, 1.5])
