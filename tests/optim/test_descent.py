"""Transformations of gradient descent against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformers.optim import AdaGradNorm
from jaxformers.optim import Averaged
from jaxformers.optim import Constant
from jaxformers.optim import Flooded
from jaxformers.optim import FromOptax
from jaxformers.optim import InBall
from jaxformers.optim import LinearDecay
from jaxformers.optim import adagrad_norm
from jaxformers.optim import average_iterates
from jaxformers.optim import averaged_params
from jaxformers.optim import project_l2_ball

PARAMS = {'w_DF': jnp.array([[3.0, 0.0]]), 'b_F': jnp.array([4.0])}
SGD = FromOptax('sgd', Constant(0.5), (), None)


def grads(scale):
  return jax.tree.map(lambda p: scale * jnp.ones_like(p), PARAMS)


def run(transform, scales, params=PARAMS):
  state, path = transform.init(params), [params]
  for scale in scales:
    updates, state = transform.update(grads(scale), state, params)
    params = optax.apply_updates(params, updates)
    path.append(params)
  return path, state


def test_adagrad_norm_divides_by_all_gradients_so_far():
  path, _ = run(adagrad_norm(2.0), (0.0, 1.0, 2.0))
  moves = [
    float(a['b_F'][0] - b['b_F'][0])
    for a, b in zip(path, path[1:], strict=False)
  ]
  # Three entries each: norms are sqrt 3 times the scale.
  np.testing.assert_allclose(moves, [0, 2 / 3**0.5, 2 * 2 / 15**0.5], rtol=1e-6)
  ours = AdaGradNorm(LinearDecay(2.0)).build(3)
  path, _ = run(ours, (0.0, 1.0, 2.0))
  np.testing.assert_allclose(
    path[1]['b_F'] - path[2]['b_F'], 1.0 / 3**0.5, rtol=1e-6
  )


def test_adagrad_norm_has_half_more_regret_than_the_best_constant():
  """Its bound, on absolute losses in a ball, for each of several data sets."""
  steps, width, radius = 300, 4, 1.0
  transform = optax.chain(adagrad_norm(2 * radius), project_l2_ball(radius))

  @jax.jit
  def regret(key):
    keys = jax.random.split(key, 2)
    x = jax.random.normal(keys[0], (steps, width))
    y = jax.random.normal(keys[1], (steps,))
    best = jnp.ones(width) / 4

    def step(carry, data):
      theta, state = carry
      loss = lambda w: jnp.abs(data[0] @ w - data[1])
      value, g = jax.value_and_grad(loss)(theta)
      updates, state = transform.update(g, state, theta)
      gap = value - loss(best)
      return (optax.apply_updates(theta, updates), state), (gap, g @ g)

    theta = jnp.zeros(width)
    _, (gaps, squares) = jax.lax.scan(
      step, (theta, transform.init(theta)), (x, y)
    )
    return gaps.mean(), 3 * radius / steps * jnp.sqrt(squares.sum())

  for key in jax.random.split(jax.random.key(0), 5):
    found, bound = regret(key)
    assert found <= bound


@pytest.mark.parametrize('radius', [2.0, 100.0])
def test_a_projection_is_that_of_the_moved_parameters(radius):
  transform = optax.chain(optax.sgd(1.0), project_l2_ball(radius))
  path, _ = run(transform, (-1.0,))
  moved = jax.tree.map(lambda p: p + 1, PARAMS)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
    path[1],
    optax.projections.projection_l2_ball(moved, radius),
  )
  by_name = InBall(radius, FromOptax('sgd', Constant(1.0), (), None)).build(1)
  jax.tree.map(np.testing.assert_array_equal, run(by_name, (-1.0,))[0], path)


def test_averages_weigh_iterates_by_their_learning_rates():
  optimizer = Averaged(FromOptax('sgd', LinearDecay(1.0), (), None))
  path, state = run(optimizer.build(3), (1.0, 2.0, -1.0))
  weights = np.array([0.75, 0.5, 0.25])
  expected = sum(
    w * np.asarray(p['w_DF']) for w, p in zip(weights, path, strict=False)
  )
  mean = averaged_params(state, PARAMS)
  np.testing.assert_allclose(mean['w_DF'], expected / weights.sum(), rtol=1e-6)
  assert optimizer.learning_rate == LinearDecay(1.0)


def test_averages_of_half_precision_are_kept_in_float32():
  params = {'w_DF': jnp.full((2, 2), 1.0, jnp.bfloat16)}
  transform = average_iterates()
  state = transform.init(params)
  _, state = transform.update(params, state, params)
  assert state.average['w_DF'].dtype == jnp.float32
  assert averaged_params(state, params)['w_DF'].dtype == jnp.bfloat16


def test_what_is_missing_is_said():
  with pytest.raises(ValueError, match='radius must be positive, got 0'):
    project_l2_ball(0)
  for transform in (project_l2_ball(1.0), average_iterates()):
    with pytest.raises(ValueError, match=r'needs update\(\.\.\., params\)'):
      transform.update(PARAMS, transform.init(PARAMS))
  with pytest.raises(ValueError, match='one average_iterates in the chain, f'):
    averaged_params(optax.EmptyState(), PARAMS)


def test_flooding_needs_the_loss():
  with pytest.raises(ValueError, match=r'flood needs update\(..., value=loss'):
    Flooded(0.3, SGD).build(1).update(PARAMS, (optax.EmptyState(),) * 2, PARAMS)


def test_a_flooded_optimiser_climbs_below_the_level():
  transform = Flooded(0.3, SGD).build(1)
  state = transform.init(PARAMS)
  for value, sign in ((0.5, -1), (0.3, -1), (0.2, 1)):
    updates, _ = transform.update(
      grads(1.0), state, PARAMS, value=jnp.float32(value)
    )
    np.testing.assert_allclose(updates['b_F'], 0.5 * sign)
