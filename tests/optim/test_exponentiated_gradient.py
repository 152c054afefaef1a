"""Multiplied parameters against hand-computed numbers and NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformers.optim import AdamW
from jaxformers.optim import Constant
from jaxformers.optim import EGPlusMinus
from jaxformers.optim import ExponentiatedGradient
from jaxformers.optim import FromOptax
from jaxformers.optim import eg_plus_minus
from jaxformers.optim import exponentiate_updates
from jaxformers.optim import exponentiated_gradient
from jaxformers.train.record import from_record
from jaxformers.train.record import known_classes
from jaxformers.train.record import to_record


@functools.partial(jax.jit, static_argnums=0)
def after(transform, params, gradients, state):
  """Returns parameters after a step for each gradient of the first axis."""

  def step(carry, gradient):
    params, state = carry
    updates, state = transform.update(gradient, state, params)
    return (optax.apply_updates(params, updates), state), None

  return jax.lax.scan(step, (params, state), gradients)[0][0]


def run(transform, params, gradients):
  with jax.enable_x64(True):
    params = jnp.asarray(params, jnp.float64)
    gradients = jnp.asarray(gradients, jnp.float64)
    state = transform.init(params)
    return np.asarray(after(transform, params, gradients, state))


def near(actual, expected, tolerance=1e-14):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def test_positive_parameters_by_hand():
  new = run(exponentiated_gradient(0.1), [1, 2, 0.5], [[0.5, -1, 0]])
  near(new, [0.95122942, 2.21034184, 0.5], 1e-8)


def test_a_simplex_by_hand():
  transform = exponentiated_gradient(1.0, 'simplex')
  new = run(transform, [0.2, 0.3, 0.5], [[1, 0, -1]])
  near(new, [0.04246273, 0.17313851, 0.78439876], 1e-8)
  near(new.sum(), 1)


def test_both_signs_by_hand():
  transform = eg_plus_minus(0.1, total_mass=2.0)
  near(run(transform, [0, 0], [[1, -0.5]]), [-0.19884341, 0.09892666], 1e-8)


def test_kept_signs_by_hand():
  transform = exponentiated_gradient(0.1, 'signed')
  new = run(transform, [2, -2, 0], [[1, 1, 1]])
  near(new, [2 * np.exp(-0.1), -2 * np.exp(0.1), 0])


def test_small_steps_are_exact_in_float32():
  params = jnp.ones(1)
  transform = exponentiated_gradient(1e-9)
  updates, _ = transform.update(jnp.ones(1), transform.init(params), params)
  np.testing.assert_allclose(updates, -1e-9, rtol=1e-6)


@pytest.mark.parametrize('axis', [0, -1, (0, 1), None])
def test_a_simplex_lies_along_any_axes(axis):
  rng = np.random.default_rng(0)
  start = np.exp(rng.normal(size=(3, 4)))
  start /= start.sum(axis=axis, keepdims=True)
  gradients = rng.normal(size=(5, 3, 4))
  transform = exponentiated_gradient(0.3, 'simplex', axis)
  expected = start * np.exp(-0.3 * gradients.sum(axis=0))
  expected /= expected.sum(axis=axis, keepdims=True)
  near(run(transform, start, gradients), expected)


def test_a_simplex_does_not_notice_constants_however_large():
  start, gradients = [0.2, 0.3, 0.5], np.array([[1.0, 0.0, -1.0]])
  transform = exponentiated_gradient(1.0, 'simplex')
  expected = run(transform, start, gradients)
  near(run(transform, start, gradients + 1e4), expected, 1e-11)


@pytest.mark.parametrize('mode', ['egu', 'signed', 'simplex'])
def test_huge_gradients_give_finite_parameters(mode):
  transform = exponentiated_gradient(1.0, mode)
  params = jnp.array([0.25, 0.75])
  gradient = jnp.array([-1e30, 1e30])
  updates, _ = transform.update(gradient, transform.init(params), params)
  new = optax.apply_updates(params, updates)
  limit = np.exp(20.0)
  expected = [1, 0] if mode == 'simplex' else [0.25 * limit, 0.75 / limit]
  np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-7)


def test_zero_stays_unless_there_is_a_floor():
  gradients = np.full((3, 2), -1.0)
  stuck = run(exponentiated_gradient(0.1), [0, 1], gradients)
  near(stuck, [0, np.exp(0.3)])
  freed = run(exponentiated_gradient(0.1, floor=1e-8), [0, 1], gradients)
  near(freed, [1e-8 * np.exp(0.3), np.exp(0.3)])
  signed = exponentiated_gradient(0.1, 'signed', floor=0.5)
  near(run(signed, [-0.1, 0], gradients[:1]), [-0.5 * np.exp(-0.1), 0])
  simplex = exponentiated_gradient(1.0, 'simplex', floor=0.1)
  odds = 0.1 / 1.1
  near(run(simplex, [0, 1], np.zeros((1, 2))), [odds, 1 - odds])


def test_l1_decay_is_a_constant_factor():
  gradients = np.zeros((4, 2))
  for mode, start in (('egu', [1.0, 2.0]), ('signed', [1.0, -2.0])):
    transform = exponentiated_gradient(0.1, mode, l1_decay=0.5)
    expected = np.array(start) * np.exp(-0.1 * 0.5 * 4)
    near(run(transform, start, gradients), expected)


def test_it_follows_the_gradient_flow_of_a_square():
  # Along `theta = v^2 / 4`, dv/dt = -dL/dv is dtheta/dt = -theta dL/dtheta.
  curvature, target = np.array([0.5, 1.0]), np.array([2.0, 0.3])
  rate, steps = 5e-4, 2000

  def gradient(theta):
    return jnp.asarray(curvature) * (theta - jnp.asarray(target))

  transform = exponentiated_gradient(rate)

  def step(carry, _):
    theta, v = carry
    updates, _ = transform.update(gradient(theta), state, theta)
    v -= rate * gradient(v**2 / 4) * v / 2
    return (theta + updates, v), None

  with jax.enable_x64(True):
    theta = jnp.array([0.5, 1.0])
    state = transform.init(theta)
    scan = jax.jit(lambda c: jax.lax.scan(step, c, length=steps)[0])
    theta, v = scan((theta, 2 * jnp.sqrt(theta)))
    near(theta, v**2 / 4, 1e-3)
    assert np.abs(theta - np.array([0.5, 1.0])).min() > 0.2


def test_directions_of_any_optimiser_move_logarithms():
  rng = np.random.default_rng(1)
  start, gradients = np.exp(rng.normal(size=4)), rng.normal(size=(6, 4))
  transform = optax.chain(optax.adam(0.1), exponentiate_updates())
  logs = run(optax.adam(0.1), np.log(start), gradients)
  near(np.log(run(transform, start, gradients)), logs, 1e-13)


def test_the_rate_may_follow_a_schedule():
  rate = optax.linear_schedule(0.1, 0.3, 2)
  transform = exponentiated_gradient(rate, l1_decay=1.0)
  near(run(transform, [1.0], np.ones((3, 1))), [np.exp(-2 * 0.6)], 1e-7)


def plus_minus(start, gradients, rate, mass):
  """EG+- in NumPy, as its definition reads."""
  n = start.size
  spare = (1 - np.abs(start).sum() / mass) / (2 * n)
  plus = spare + np.maximum(start, 0) / mass
  minus = spare + np.maximum(-start, 0) / mass
  for gradient in gradients:
    plus = plus * np.exp(-rate * mass * gradient)
    minus = minus * np.exp(rate * mass * gradient)
    total = plus.sum() + minus.sum()
    plus, minus = plus / total, minus / total
  return mass * (plus - minus)


@pytest.mark.parametrize('axis', [None, 0])
def test_both_signs_by_numpy_from_any_start(axis):
  rng = np.random.default_rng(2)
  start, gradients = rng.normal(size=(4, 3)), rng.normal(size=(7, 4, 3))
  new = run(eg_plus_minus(0.02, 15.0, axis), start, gradients)
  if axis is None:
    near(new, plus_minus(start, gradients, 0.02, 15.0), 1e-13)
  else:
    for k in range(3):
      expected = plus_minus(start[:, k], gradients[:, :, k], 0.02, 15.0)
      near(new[:, k], expected, 1e-13)
  assert (np.abs(new).sum(axis=axis) < 15).all()


def test_both_signs_start_where_the_parameters_are():
  start = np.random.default_rng(3).normal(size=5)
  near(run(eg_plus_minus(0.1, 20.0), start, np.zeros((1, 5))), start)


def test_an_experiment_names_them():
  rng = np.random.default_rng(4)
  start, gradients = rng.normal(size=3), rng.normal(size=(3, 3))
  sgd = FromOptax('sgd', Constant(0.1), max_gradient_norm=None)
  config = ExponentiatedGradient(sgd, l1_decay=0.2)
  actual = run(config.build(3), start, gradients)
  expected = run(
    exponentiated_gradient(0.1, 'signed', l1_decay=0.2), start, gradients
  )
  near(actual, expected, 1e-8)
  both = EGPlusMinus(Constant(0.1), total_mass=9.0)
  near(
    run(both.build(3), start, gradients),
    run(eg_plus_minus(0.1, 9.0), start, gradients),
    1e-8,
  )
  for part in (config, both):
    assert part.learning_rate == Constant(0.1)
    assert from_record(to_record(part), known_classes()) == part


def test_bad_options_are_named():
  with pytest.raises(ValueError, match="'signed', got 'positive'"):
    exponentiated_gradient(0.1, 'positive')
  with pytest.raises(ValueError, match='learning_rate must not be negative'):
    exponentiated_gradient(-0.1)
  with pytest.raises(ValueError, match='floor must not be negative, got -1'):
    exponentiate_updates(floor=-1.0)
  with pytest.raises(ValueError, match='changes nothing where parameters sum'):
    exponentiated_gradient(0.1, 'simplex', l1_decay=0.1)
  with pytest.raises(ValueError, match='total_mass must be positive, got 0'):
    eg_plus_minus(0.1, 0.0)
  with pytest.raises(ValueError, match='must be 0, got 0.1; set l1_decay'):
    ExponentiatedGradient(AdamW(weight_decay=0.1)).build(1)


def test_starts_that_cannot_be_multiplied_are_refused():
  params = {'w': jnp.array([0.5, -0.25, 0.75])}
  with pytest.raises(ValueError, match=r"\['w'\] has negative .* -0.25"):
    exponentiated_gradient(0.1).init(params)
  with pytest.raises(ValueError, match="'simplex' cannot multiply"):
    exponentiated_gradient(0.1, 'simplex').init(params)
  exponentiated_gradient(0.1, 'signed').init(params)
  with pytest.raises(ValueError, match='between 2 and 2; start at a softmax'):
    exponentiated_gradient(0.1, 'simplex').init({'w': jnp.ones(2)})
  with pytest.raises(ValueError, match='sum to 1.5, which must be less than'):
    eg_plus_minus(0.1, total_mass=1.0).init(params)


def test_negative_values_that_nobody_could_check_become_nan():
  transform = exponentiated_gradient(0.1)
  params = jnp.array([1.0, -1.0])
  state = jax.jit(transform.init)(params)
  updates, _ = transform.update(params, state, params)
  np.testing.assert_array_equal(np.isnan(updates), [False, True])


@pytest.mark.parametrize(
  'transform', [exponentiated_gradient(0.1), eg_plus_minus(0.1)]
)
def test_the_parameters_are_needed(transform):
  params = jnp.array([0.5])
  with pytest.raises(ValueError, match=r'call update\(updates, state, params'):
    transform.update(params, transform.init(params))
