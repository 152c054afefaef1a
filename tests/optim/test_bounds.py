"""Bounds and schedules against numbers by hand and runs of gradient descent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.optim import InverseSqrtDecay
from jaxformers.optim import LinearDecay
from jaxformers.optim import RefinedDecay
from jaxformers.optim import average_bound
from jaxformers.optim import average_regret_bound
from jaxformers.optim import horizon_constant
from jaxformers.optim import inv_sqrt
from jaxformers.optim import last_iterate_bound
from jaxformers.optim import last_iterate_bound_never_rising
from jaxformers.optim import linear_decay
from jaxformers.optim import refined_from_grad_norms
from jaxformers.optim import smoothed
from jaxformers.optim import weighted_average_bound


def rates(schedule, steps):
  return np.array([schedule(count) for count in range(steps)], np.float64)


def many(schedule, steps):
  with jax.enable_x64(True):
    return np.asarray(schedule(jnp.arange(steps, dtype=jnp.float64)))


def test_the_regret_bound_by_hand():
  bound = average_regret_bound(rates(inv_sqrt(1.0), 4), 2, 1)
  np.testing.assert_allclose(bound, 1.348057, atol=1e-6)
  eta = horizon_constant(2, 3, 16)
  np.testing.assert_allclose(
    average_regret_bound(rates(eta, 16), 2, 3), 2 * 3 / 4, rtol=1e-6
  )


def test_linear_decay_by_hand():
  eta = rates(linear_decay(1.0, 4), 4)
  np.testing.assert_allclose(eta, [0.8, 0.6, 0.4, 0.2], rtol=1e-6)
  bound = last_iterate_bound([0.8, 0.6, 0.4, 0.2], 1, 1)
  np.testing.assert_allclose(bound, 1.31666667, atol=1e-8)
  # Without a distance what remains is half the sum.
  np.testing.assert_allclose(
    2 * last_iterate_bound([0.8, 0.6, 0.4, 0.2], 0, 1), 2.13333333, atol=1e-8
  )


@pytest.mark.parametrize('steps', [1, 2, 7, 1000])
def test_the_sum_of_linear_decay_in_closed_form(steps):
  harmonic = np.sum(1 / np.arange(1, steps))
  expected = (2 * (steps - 1 + harmonic) + 1) / (steps + 1)
  bound = last_iterate_bound(many(linear_decay(1.0, steps), steps), 0, 1)
  np.testing.assert_allclose(2 * bound, expected, rtol=1e-9)


def test_the_bound_of_the_last_iterate_for_usual_schedules():
  """Each with its best scale, in units of R G / sqrt T."""
  cosine = lambda steps: (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2

  def best(eta):
    # r / a + s a is least at 2 sqrt(r s).
    distance = last_iterate_bound(eta, 1, 0)
    noise = last_iterate_bound(eta, 0, 1)
    return 2 * np.sqrt(distance * noise * len(eta))

  found = [
    best(many(linear_decay(1.0, 1000), 1000)),
    best(many(linear_decay(1.0, 10000), 10000)),
    best(np.ones(10000)),
    best(many(inv_sqrt(1.0), 10000)),
    best(cosine(10000)),
  ]
  np.testing.assert_allclose(found, [2.006, 2.001, 3.28, 2.87, 2.06], atol=5e-3)


def test_bounds_by_their_sums():
  eta, norms = [0.5, 0.4, 0.4], [1.0, 2.0, 3.0]
  squares = [0.25 * 1, 0.16 * 4, 0.16 * 9]
  np.testing.assert_allclose(
    average_bound(eta, 2, norms), (4 + sum(squares)) / (2 * 3 * 0.4)
  )
  np.testing.assert_allclose(
    weighted_average_bound(eta, 2, norms), (4 + sum(squares)) / (2 * 1.3)
  )
  np.testing.assert_allclose(
    last_iterate_bound_never_rising(eta, 2, norms),
    (4 / 3 + squares[0] / 2 + squares[1] + squares[2]) / (2 * 0.4),
  )
  np.testing.assert_allclose(
    last_iterate_bound(eta, 2, norms),
    4 / (2 * 1.3)
    + (squares[0] / 0.8 + squares[1] / 0.4 + squares[2] / 0.4) / 2,
  )


def test_a_constant_rate_in_the_bound_of_the_last_iterate():
  steps, eta = 50, 0.1
  bound = last_iterate_bound_never_rising([eta] * steps, 1, 1)
  assert bound <= 1 / (2 * steps * eta) + eta / 2 * (2 + np.log(steps))


def test_the_identity_behind_the_last_iterate():
  """The last value as the weighted mean and differences of tails."""
  rng = np.random.default_rng(0)
  q, w = rng.normal(size=20), rng.uniform(0.1, 1, size=20)
  tail = lambda k: w[k:].sum()
  value = np.sum(w * q) / tail(0)
  for k in range(19):
    gaps = np.sum(w[k:] * (q[k:] - q[k]))
    value += (1 / tail(k + 1) - 1 / tail(k)) * gaps
  np.testing.assert_allclose(value, q[-1], rtol=1e-12)


@pytest.mark.parametrize('bound', [average_regret_bound, average_bound])
def test_bounds_refuse_what_they_do_not_hold_for(bound):
  with pytest.raises(
    ValueError, match='never rise; use weighted_average_bound'
  ):
    bound([0.1, 0.2], 1, 1)
  with pytest.raises(ValueError, match='ends at 0 has no bound'):
    bound([0.1, 0.0], 1, 1)


def test_refined_rates_by_hand():
  schedule = refined_from_grad_norms([2.0, 1.0, 1.0])
  np.testing.assert_allclose(
    rates(schedule, 3), [0.14814815, 0.29629630, 0], atol=1e-7
  )
  average = rates(refined_from_grad_norms([2.0, 1.0, 1.0], 3.0, 'average'), 3)
  np.testing.assert_allclose(average, [0.5, 2, 2], rtol=1e-6)
  anytime = rates(refined_from_grad_norms([2.0, 1.0, 1.0], 1, 'anytime'), 3)
  np.testing.assert_allclose(
    anytime, [0.25 / 0.5 * 2 / 3, 1.25**-0.5 / 3, 0], atol=1e-7
  )


def test_constant_norms_give_linear_decay():
  found = rates(refined_from_grad_norms([3.0] * 10, 2.0), 10)
  expected = 2 / (3 * 10**0.5) * (1 - np.arange(1, 11) / 10)
  np.testing.assert_allclose(found, expected, atol=1e-7)
  longer = rates(refined_from_grad_norms([3.0] * 10, 2.0, steps=40), 40)
  np.testing.assert_allclose(longer[3::4], expected / 2, atol=1e-7)


def test_refined_rates_minimise_the_weighted_bound():
  norms = np.array([2.0, 1.0, 0.5, 1.5])
  best = rates(refined_from_grad_norms(norms, 1.0, 'average'), 4)
  least = weighted_average_bound(best, 1, norms)
  rng = np.random.default_rng(0)
  for noise in rng.uniform(0.8, 1.2, size=(20, 4)):
    assert weighted_average_bound(best * noise, 1, norms) > least


def test_refined_rates_refuse_what_they_cannot_use():
  with pytest.raises(ValueError, match='norms must be positive'):
    refined_from_grad_norms([1.0, 0.0])
  with pytest.raises(ValueError, match="kind must be one of .* got 'first'"):
    refined_from_grad_norms([1.0], kind='first')
  with pytest.raises(
    ValueError, match='window must be odd and positive, got 2'
  ):
    smoothed([1.0], 2)


def test_a_running_median():
  np.testing.assert_array_equal(
    smoothed([5.0, 1.0, 9.0, 2.0], 3), [3, 5, 2, 5.5]
  )


def test_schedules_by_name_span_the_run():
  linear = LinearDecay(2.0).schedule(4)
  np.testing.assert_allclose(rates(linear, 4), [1.6, 1.2, 0.8, 0.4], rtol=1e-6)
  falling = InverseSqrtDecay(2.0).schedule(4)
  np.testing.assert_allclose(
    rates(falling, 4), 2 / np.sqrt([1, 2, 3, 4]), rtol=1e-6
  )
  refined = RefinedDecay(3.0, (2.0, 1.0, 1.0), smoothing=0.0).schedule(3)
  np.testing.assert_allclose(rates(refined, 3), [1.5, 3, 0], atol=1e-6)


def test_the_regret_never_exceeds_its_bound():
  """Absolute losses of random data, step by step in NumPy."""
  rng = np.random.default_rng(0)
  steps, width, diameter = 200, 5, 2.0
  for eta in (
    np.full(steps, 0.1),
    rates(inv_sqrt(0.5), steps),
    rates(linear_decay(0.3, steps), steps),
  ):
    x = rng.normal(size=(steps, width))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    best = rng.normal(size=width)
    best *= rng.uniform(0, 1) / np.linalg.norm(best)
    y = x @ best + rng.laplace(scale=0.5, size=steps)
    theta, regret = np.zeros(width), 0.0
    for t in range(steps):
      residual = x[t] @ theta - y[t]
      regret += abs(residual) - abs(x[t] @ best - y[t])
      theta = theta - eta[t] * np.sign(residual) * x[t]
      theta *= min(1, diameter / 2 / np.linalg.norm(theta))
    assert regret / steps <= average_regret_bound(eta, diameter, 1)
