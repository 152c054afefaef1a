"""Entropies and distributions of prescribed entropy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.ops import entropy
from jaxformers.ops import normalize_entropy
from jaxformers.ops import renyi_entropy

P = np.array([1 / 2, 1 / 4, 1 / 8, 1 / 8])
H = 1.2130075660


def nats(p):
  """Entropy of probabilities in float64."""
  p = np.asarray(p, np.float64)
  return -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)


normalize = jax.jit(normalize_entropy, static_argnames='axis')


def double(p, target):
  with jax.enable_x64(True):
    logits = jnp.log(jnp.asarray(p, jnp.float64))
    return jax.tree.map(np.asarray, normalize(logits, target))


def test_the_entropy_of_halves_quarters_and_eighths():
  np.testing.assert_allclose(entropy(jnp.log(P)), H, rtol=1e-6)
  np.testing.assert_allclose(H, 1.75 * math.log(2), atol=1e-10)
  np.testing.assert_allclose(entropy(jnp.log(P) + 1e4), H, atol=1e-3)


def test_entropy_reads_any_axis_and_only_what_counts():
  logits = jnp.stack([jnp.log(P), jnp.zeros(4)], axis=1)
  np.testing.assert_allclose(
    entropy(logits, axis=0), [H, math.log(4)], rtol=1e-6
  )
  mask = jnp.array([[True, True], [True, True], [False, True], [False, True]])
  two = math.log(3) - 2 / 3 * math.log(2)
  np.testing.assert_allclose(
    entropy(logits, mask, axis=0), [two, math.log(4)], rtol=1e-6
  )
  none = entropy(jnp.array([1.0, 2.0]), jnp.zeros(2, bool))
  assert none == 0


@pytest.mark.parametrize(
  'lowest', [-jnp.inf, jnp.finfo('float32').min, -1e38, -1e3]
)
def test_entropy_and_its_gradient_ignore_probabilities_of_zero(lowest):
  logits = jnp.concatenate([jnp.log(P), jnp.array([lowest])])
  value, gradient = jax.value_and_grad(entropy)(logits)
  np.testing.assert_allclose(value, H, rtol=1e-6)
  expected = -P * (np.log(P) + H)
  np.testing.assert_allclose(gradient[:4], expected, atol=1e-6)
  assert gradient[4] == 0
  bare = jax.grad(entropy)(jnp.full(3, -jnp.inf))
  np.testing.assert_array_equal(bare, 0)


def test_bfloat16_logits_give_float32_entropies():
  logits = jnp.zeros(1000, jnp.bfloat16)
  for value in (entropy(logits), renyi_entropy(logits, 2.0)):
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, math.log(1000), rtol=1e-6)
  found = normalize(jnp.arange(8, dtype=jnp.bfloat16), 1.0)
  assert found.probabilities.dtype == jnp.bfloat16
  assert found.gamma.dtype == jnp.float32


@pytest.mark.parametrize(
  ('order', 'expected'),
  [
    (0, math.log(4)),
    (0.5, 2 * math.log(np.sqrt(P).sum())),
    (1, H),
    (2, -math.log(11 / 32)),
    (float('inf'), math.log(2)),
  ],
)
def test_renyi_entropies_of_halves_quarters_and_eighths(order, expected):
  found = renyi_entropy(jnp.log(P) + 7, order)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  padded = jnp.concatenate([jnp.log(P), jnp.ones(2)])
  found = renyi_entropy(padded, order, jnp.arange(6) < 4)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_renyi_entropy_has_no_negative_order():
  with pytest.raises(ValueError, match='needs an order >= 0, got -1'):
    renyi_entropy(jnp.zeros(2), -1)


@pytest.mark.parametrize(
  ('target', 'gamma', 'expected'),
  [
    (
      0.5,
      2.93666632566724,
      [0.858569960326, 0.112137543465, 0.014646248105, 0.014646248105],
    ),
    (
      1.0,
      1.56322186665964,
      [0.637992626170, 0.215893211901, 0.073057080965, 0.073057080965],
    ),
    (
      1.3,
      0.700155118998954,
      [0.421371746745, 0.259356848349, 0.159635702453, 0.159635702453],
    ),
  ],
)
def test_prescribed_entropies_have_the_computed_powers(target, gamma, expected):
  found = double(P, target)
  np.testing.assert_allclose(found.gamma, gamma, rtol=1e-11)
  np.testing.assert_allclose(found.probabilities, expected, atol=6e-13)
  assert found.converged
  single = normalize(jnp.log(P), target)
  np.testing.assert_allclose(single.gamma, gamma, rtol=2e-6)
  np.testing.assert_allclose(single.probabilities, expected, atol=1e-6)


def test_the_example_of_the_article():
  p = np.random.default_rng(0).random(100)
  p /= p.sum()
  found = double(p, math.log(30))
  np.testing.assert_allclose(found.gamma, 9.3299, atol=5e-5)
  np.testing.assert_allclose(
    nats(found.probabilities), math.log(30), rtol=1e-12
  )
  iterated = naive(p[None], math.log(30))[0]
  np.testing.assert_allclose(found.probabilities, iterated, rtol=1e-8)


def test_its_own_entropy_leaves_a_distribution_alone():
  found = double(P, nats(P))
  np.testing.assert_allclose(found.gamma, 1, rtol=1e-11)
  np.testing.assert_allclose(found.probabilities, P, rtol=1e-11)


def test_normalising_again_forgets_the_first_target():
  once = double(P, 0.7).probabilities
  np.testing.assert_allclose(double(once, 0.7).probabilities, once, rtol=1e-11)
  np.testing.assert_allclose(
    double(once, 1.1).probabilities, double(P, 1.1).probabilities, rtol=1e-10
  )


def test_shifts_and_scales_of_logits_change_nothing_but_gamma():
  logits = jax.random.normal(jax.random.key(0), (3, 50))
  plain = normalize(logits, 2.0)
  for factor in (1e-12, 1e-3, 1e3, 1e12):
    found = normalize(logits * factor, 2.0)
    np.testing.assert_allclose(
      found.probabilities, plain.probabilities, atol=2e-6
    )
    np.testing.assert_allclose(found.gamma * factor, plain.gamma, rtol=1e-5)
  found = normalize(logits + 3, 2.0)
  np.testing.assert_allclose(
    found.probabilities, plain.probabilities, atol=2e-6
  )


def test_order_is_kept_and_zeros_stay_zeros():
  logits = jax.random.normal(jax.random.key(1), (30,)).at[::3].set(-jnp.inf)
  for target in (0.3, 1.5, 2.9, 5.0):
    p = normalize(logits, target).probabilities
    assert (p[::3] == 0).all()
    assert (jnp.diff(p[jnp.argsort(logits)]) >= 0).all()


def test_masked_logits_are_zeros_and_the_rest_as_without_them():
  logits = jax.random.normal(jax.random.key(2), (2, 9))
  padded = jnp.concatenate([logits, jnp.full((2, 3), 9.0)], axis=1)
  found = normalize(padded, 1.2, jnp.arange(12) < 9)
  plain = normalize(logits, 1.2)
  np.testing.assert_allclose(
    found.probabilities[:, :9], plain.probabilities, atol=1e-6
  )
  assert (found.probabilities[:, 9:] == 0).all()


def test_targets_may_differ_by_row_and_the_axis_may_be_any():
  logits = jax.random.normal(jax.random.key(3), (2, 40, 3))
  target = jnp.linspace(0.5, 3.0, 6).reshape(2, 3)
  found = normalize(logits, target, axis=1)
  assert found.gamma.shape == found.converged.shape == (2, 3)
  p = np.moveaxis(np.asarray(found.probabilities), 1, -1)
  np.testing.assert_allclose(nats(p), target, atol=2e-6)
  assert found.converged.all()


UNIFORM = [0.25] * 4


@pytest.mark.parametrize(
  ('logits', 'target', 'expected', 'gamma', 'converged'),
  [
    ([1, 1, 0, 0], 0.5, [0.5, 0.5, 0, 0], math.inf, False),
    ([1, 1, 0, 0], math.log(2), [0.5, 0.5, 0, 0], math.inf, True),
    ([3, 2, 1, 0], 0.0, [1, 0, 0, 0], math.inf, True),
    ([3, 2, 1, 0], -1.0, [1, 0, 0, 0], math.inf, False),
    ([3, 2, 1, 0], 2.0, UNIFORM, 0, False),
    ([3, 2, 1, 0], math.log(4), UNIFORM, 0, True),
    ([5, 5, 5, 5], 0.5, UNIFORM, 1, False),
    ([5, 5, 5, 5], 2.0, UNIFORM, 1, False),
    ([5, 5, 5, 5], math.log(4), UNIFORM, 1, True),
    ([0, -math.inf, -math.inf, -math.inf], 0.5, [1, 0, 0, 0], 1, False),
    ([0, -math.inf, -math.inf, -math.inf], 0.0, [1, 0, 0, 0], 1, True),
    ([2, 1, -math.inf, -math.inf], 1.0, [0.5, 0.5, 0, 0], 0, False),
    ([-math.inf] * 4, 1.0, [0, 0, 0, 0], 1, False),
    ([3, 2, 1, 0], math.nan, None, None, False),
  ],
)
def test_unattainable_targets_give_limits_and_no_gradient(
  logits, target, expected, gamma, converged
):
  logits, target = jnp.array(logits, jnp.float32), jnp.float32(target)
  found = normalize(logits, target)
  assert found.converged == converged
  if expected is not None:
    np.testing.assert_array_equal(found.probabilities, expected)
    assert found.gamma == gamma
  weights = jnp.arange(4.0)
  loss = lambda z, h: (normalize(z, h).probabilities * weights).sum()
  for gradient in jax.grad(loss, (0, 1))(logits, target):
    np.testing.assert_array_equal(gradient, 0)


@functools.partial(jax.jit, static_argnames='through_gamma')
def objective(logits, target, weights, through_gamma=False):
  found = normalize_entropy(logits, target)
  loss = (found.probabilities * weights).sum()
  return loss + through_gamma * found.gamma.sum()


@pytest.mark.parametrize('through_gamma', [False, True])
def test_gradients_are_those_of_finite_differences(through_gamma):
  run = functools.partial(objective, through_gamma=through_gamma)
  with jax.enable_x64(True):
    logits, weights = (
      jax.random.normal(jax.random.key(i), (12,), jnp.float64) for i in (0, 1)
    )
    target = jnp.float64(1.4)
    by_logits, by_target = jax.grad(run, (0, 1))(logits, target, weights)
    step = 1e-5
    for i in range(12):
      unit = step * (jnp.arange(12) == i)
      up, down = (run(logits + s * unit, target, weights) for s in (1, -1))
      slope = (up - down) / (2 * step)
      np.testing.assert_allclose(by_logits[i], slope, atol=2e-9)
    up, down = (run(logits, target + s * step, weights) for s in (1, -1))
    np.testing.assert_allclose(by_target, (up - down) / (2 * step), atol=2e-9)


def test_gradients_are_orthogonal_to_shifts_and_scalings():
  with jax.enable_x64(True):
    logits, weights = (
      jax.random.normal(jax.random.key(i), (12,), jnp.float64) for i in (0, 1)
    )
    gradient = jax.grad(objective)(logits, 1.4, weights)
    assert jnp.abs(gradient).max() > 1e-2
    np.testing.assert_allclose(gradient.sum(), 0, atol=1e-13)
    np.testing.assert_allclose(gradient @ logits, 0, atol=1e-13)


def test_nearly_tied_maxima_have_finite_gradients():
  logits = jnp.array([1.0, 1 - 1e-7, 0, -1])
  for target in (0.1, 0.69, 0.70):
    gradient = jax.grad(objective)(logits, target, jnp.arange(4.0))
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize('n', [8, 100, 1000])
def test_the_solver_reaches_any_attainable_target_in_float32(n):
  rng = np.random.default_rng(n)
  spreads = np.repeat([0.01, 0.1, 1, 5, 20], 100)[:, None]
  logits = (rng.normal(size=(500, n)) * spreads).astype(np.float32)
  for fraction in (0.02, 0.1, 0.3, 0.7, 0.95, 0.999):
    target = fraction * math.log(n)
    found = normalize(logits, target)
    np.testing.assert_allclose(nats(found.probabilities), target, atol=5e-6)
    assert found.converged.all()


def test_entropies_are_constant_where_those_of_softmax_span_nats():
  reached, plain, rng = [], [], np.random.default_rng(0)
  for n in (64, 512, 4096):
    for deviation in np.float32([1, 3]):
      logits = rng.normal(size=(64, n)).astype(np.float32) * deviation
      reached.append(nats(normalize(logits, 2.0).probabilities))
      plain.append(entropy(jnp.asarray(logits)))
  assert np.std(reached) < 1e-4
  assert np.ptp(plain) > 2.5


def naive(p, target, steps=10):
  """The article's iteration: Newton's method on the exponent, unguarded."""
  with np.errstate(all='ignore'):
    for _ in range(steps):
      log_p = np.log(p)
      own = -(p * log_p).sum(axis=-1, keepdims=True)
      variance = (p * log_p**2).sum(axis=-1, keepdims=True) - own**2
      p = p ** (1 - (target - own) / variance)
      p = p / p.sum(axis=-1, keepdims=True)
  return p


def test_the_naive_iteration_works_near_the_start():
  found = naive(P[None], 1.1)[0]
  np.testing.assert_allclose(found, double(P, 1.1).probabilities, rtol=1e-6)


def test_the_naive_iteration_fails_on_peaked_rows_and_this_one_does_not():
  p = np.random.default_rng(0).dirichlet([0.05] * 50, size=50)
  assert not np.isfinite(naive(p, 3.5)).all()
  found = double(p, 3.5)
  assert np.isfinite(found.probabilities).all()
  attainable = (p > 0).sum(axis=-1) > math.exp(3.5)
  assert attainable.sum() > 25
  np.testing.assert_allclose(
    nats(found.probabilities)[attainable], 3.5, atol=1e-5
  )
