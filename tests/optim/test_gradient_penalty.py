"""Penalised gradients against closed forms, each other, and gradient flow."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformers.losses import input_gradient_penalty
from jaxformers.ops import Causal
from jaxformers.ops import attend
from jaxformers.optim import GradientPenalty
from jaxformers.optim import implicit_regularization
from jaxformers.optim import with_gradient_penalty
from jaxformers.optim import with_input_gradient_penalty

MODES = ('fwd_rev', 'rev_rev', 'finite_diff')


def attention_losses(params, x, implementation='blockwise'):
  q = jnp.einsum('bld,dhk->blhk', x, params['w_DHK'])
  y = attend(q, q, q, mask=Causal(), implementation=implementation)
  return jnp.sum(y**2 * params['scale_K'], axis=(1, 2, 3))


def attention_loss(params, x):
  return attention_losses(params, x).mean()


def materialised_loss(params, x):
  return attention_losses(params, x, 'xla').mean()


@pytest.fixture(scope='module')
def attention():
  keys = jax.random.split(jax.random.key(0), 3)
  params = {
    'w_DHK': jax.random.normal(keys[0], (3, 2, 2)),
    'scale_K': jax.random.normal(keys[1], (2,)),
  }
  return params, jax.random.normal(keys[2], (2, 5, 3))


def close(a, b, **tolerances):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, **tolerances), a, b
  )


@pytest.mark.parametrize('mode', MODES)
def test_a_quadratic_by_its_formula(mode):
  with jax.enable_x64(True):
    a = jnp.array([[2.0, 0.5], [0.5, 1.0]])
    x = jnp.array([1.0, -2.0])
    run = with_gradient_penalty(lambda x: x @ a @ x / 2, 0.3, mode)
    value, gradient = jax.jit(run)(x)
    np.testing.assert_allclose(gradient, (a + 0.3 * a @ a) @ x, rtol=1e-9)
    square = jnp.sum((a @ x) ** 2)
    np.testing.assert_allclose(value, x @ a @ x / 2 + 0.15 * square, rtol=1e-12)


@pytest.mark.parametrize('squared', [True, False])
def test_forward_over_reverse_passes_blockwise_attention(attention, squared):
  """Against reverse over reverse, which only plain operations can do."""
  runs = [
    with_gradient_penalty(loss, 0.1, mode, squared=squared)
    for loss, mode in (
      (attention_loss, 'fwd_rev'),
      (materialised_loss, 'rev_rev'),
    )
  ]
  with jax.enable_x64(True):
    arguments = jax.tree.map(lambda a: a.astype(jnp.float64), attention)
    close(*(jax.jit(run)(*arguments) for run in runs), rtol=1e-6, atol=1e-6)


def test_finite_differences_approach_the_product_with_the_hessian(attention):
  with jax.enable_x64(True):
    arguments = jax.tree.map(lambda a: a.astype(jnp.float64), attention)
    exact = jax.jit(with_gradient_penalty(attention_loss, 0.1))(*arguments)
    near = jax.jit(
      with_gradient_penalty(attention_loss, 0.1, 'finite_diff', step=1e-7)
    )(*arguments)
    close(near, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('mode', MODES)
def test_no_strength_changes_nothing(attention, mode):
  plain = jax.jit(jax.value_and_grad(materialised_loss))(*attention)
  run = with_gradient_penalty(materialised_loss, 0.0, mode)
  close(jax.jit(run)(*attention), plain, rtol=1e-5, atol=1e-5)


def test_the_norm_by_finite_differences_is_sharpness_aware_minimisation():
  a = jnp.array([[2.0, 0.5], [0.5, 1.0]])
  loss = lambda x: x @ a @ x / 2 + jnp.sum(x**3) / 3
  x, rho = jnp.array([1.0, -2.0]), 0.1
  run = with_gradient_penalty(loss, rho, 'finite_diff', squared=False, step=rho)
  climb = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
  sam = optax.contrib.sam(optax.sgd(1.0), climb, opaque_mode=True)
  update, _ = sam.update(
    jax.grad(loss)(x), sam.init(x), x, grad_fn=lambda p, i: jax.grad(loss)(p)
  )
  np.testing.assert_allclose(run(x)[1], -update, rtol=1e-6)


@pytest.mark.parametrize('squared', [True, False])
@pytest.mark.parametrize('mode', MODES)
def test_at_a_stationary_point_nothing_acts(mode, squared):
  run = with_gradient_penalty(
    lambda x: jnp.sum(x**2), 0.5, mode, squared=squared
  )
  value, gradient = run(jnp.zeros(3))
  assert value == 0
  np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize('mode', MODES)
def test_the_gradient_of_some_parameters_may_be_penalised(mode):
  loss = lambda p: jnp.sum(p['a'] ** 2) * jnp.sum(p['b'])
  params = {'a': jnp.array([1.0, 2.0]), 'b': jnp.array([3.0])}
  run = with_gradient_penalty(loss, 0.1, mode, parameters='^a$', step=1e-3)
  value, gradient = run(params)
  # The penalty is 0.05 |2 a b|^2 = 0.2 |a|^2 b^2.
  np.testing.assert_allclose(value, 15 + 0.2 * 5 * 9, rtol=1e-5)
  np.testing.assert_allclose(gradient['a'], [6 + 3.6, 12 + 7.2], rtol=2e-3)
  np.testing.assert_allclose(gradient['b'], [5 + 6], rtol=2e-3)
  with pytest.raises(
    ValueError, match="no parameter matches 'c'; there are: a"
  ):
    with_gradient_penalty(loss, 0.1, parameters='c')(params)


def test_aux_and_dtypes_are_those_of_the_loss():
  loss = lambda p, x: (jnp.sum(p['w'] ** 4) * x, p['w'] + 1)
  params = {'w': jnp.ones(2, jnp.bfloat16)}
  run = with_gradient_penalty(loss, 0.5, has_aux=True)
  (value, aux), gradient = run(params, 2.0)
  np.testing.assert_array_equal(aux, [2, 2])
  assert value == 4 + 0.25 * 128
  assert gradient['w'].dtype == jnp.bfloat16
  with pytest.raises(ValueError, match="mode must be one of .* got 'reverse'"):
    GradientPenalty(0.1, mode='reverse')
  with pytest.raises(ValueError, match='step must be positive, got 0'):
    GradientPenalty(0.1, mode='finite_diff', step=0)


def test_a_penalty_on_input_gradients_is_that_of_the_penalised_loss(attention):
  """Forward over reverse against reverse over reverse in plain operations."""

  def penalised(params, x):
    plain = lambda x: attention_losses(params, x, 'xla')
    penalty = input_gradient_penalty(plain, x).mean()
    return plain(x).mean() + 0.1 / 2 * penalty

  with jax.enable_x64(True):
    arguments = jax.tree.map(lambda a: a.astype(jnp.float64), attention)
    run = with_input_gradient_penalty(attention_losses, 0.1)
    close(
      jax.jit(run)(*arguments),
      jax.jit(jax.value_and_grad(penalised))(*arguments),
      rtol=1e-6,
      atol=1e-6,
    )


def test_inputs_may_depend_on_parameters():
  """Zeros that are added to embedded tokens stand for them."""
  ids = jnp.array([0, 2])
  head = lambda h: jnp.sum(jnp.sin(h) * h, axis=-1)
  table = jax.random.normal(jax.random.key(0), (3, 4))
  run = with_input_gradient_penalty(lambda t, d: head(t[ids] + d), 0.2)

  def penalised(t):
    h = t[ids]
    return head(h).mean() + 0.1 * input_gradient_penalty(head, h).mean()

  close(
    jax.jit(run)(table, jnp.zeros((2, 4))),
    jax.jit(jax.value_and_grad(penalised))(table),
    rtol=1e-5,
    atol=1e-6,
  )


def two_parameters(x):
  return (x[0] * x[1] - 0.6) ** 2 / 2


def flow(field, x, time, steps=200):
  """Integrates dx/dt = -field(x) by the classical Runge-Kutta method."""
  h = time / steps

  def step(x, _):
    k1 = -field(x)
    k2 = -field(x + h / 2 * k1)
    k3 = -field(x + h / 2 * k2)
    k4 = -field(x + h * k3)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

  return jax.lax.scan(step, x, length=steps)[0]


def test_gradient_descent_follows_the_flow_of_the_penalised_loss():
  """Its distance to the plain flow is O(h), to the penalised one O(h^2)."""
  with jax.enable_x64(True):
    x = jnp.array([0.9, 1.4])
    gradient = jax.grad(two_parameters)

    @jax.jit
    def penalised_end(h):
      # Half the learning rate is the strength that matches it.
      run = with_gradient_penalty(two_parameters, h / 2)
      return flow(lambda x: run(x)[1], x, 1.0)

    plain_end = jax.jit(lambda: flow(gradient, x, 1.0))()
    errors = []
    for steps in (20, 40):
      h = 1 / steps
      descend = lambda x, _, h=h: (x - h * gradient(x), None)
      end = jax.lax.scan(descend, x, length=steps)[0]
      errors.append(
        [jnp.linalg.norm(end - y) for y in (plain_end, penalised_end(h))]
      )
    slopes = np.log2(np.array(errors[0]) / np.array(errors[1]))
    np.testing.assert_allclose(slopes, [1, 2], atol=0.1)


def test_shuffled_batches_follow_the_flow_with_the_penalty_per_batch():
  """Local errors fall 8 times per halving; 4 times without or of the whole."""
  with jax.enable_x64(True):
    x = jnp.array([0.9, 1.4])
    batches = jnp.array([0.2, 0.5, 1.3])
    loss = lambda x, c: (x[0] * x[1] - c) ** 2 / 2 + c * jnp.sin(x[0])
    whole = lambda x: jnp.mean(jax.vmap(lambda c: loss(x, c))(batches))
    orders = jnp.array([*itertools.permutations(range(3))])

    @jax.jit
    def errors(h):
      def epoch(order):
        step = lambda x, c: (x - h * jax.grad(loss)(x, c), None)
        return jax.lax.scan(step, x, batches[order])[0]

      def modified(x):
        return sum(implicit_regularization(loss, x, batches, h))

      def of_whole(x):
        return sum(
          implicit_regularization(lambda x, _: whole(x), x, batches[:1], h)
        )

      end = jax.vmap(epoch)(orders).mean(axis=0)
      ends = [
        flow(jax.grad(f), x, 3 * h, 20) for f in (modified, of_whole, whole)
      ]
      return jnp.stack([jnp.linalg.norm(end - e) for e in ends])

    ratios = errors(0.002) / errors(0.001)
    np.testing.assert_allclose(ratios, [8, 4, 4], atol=0.1)


def test_implicit_regularisation_by_hand():
  batches = jnp.array([1.0, 3.0])
  measured = implicit_regularization(
    lambda x, c: c * x**2, jnp.float32(2.0), batches, 0.1
  )
  assert measured.loss == 8
  # h / (4 m) times the sum of 4^2 and 12^2.
  np.testing.assert_allclose(measured.penalty, 0.1 / 8 * 160, rtol=1e-6)
