"""Adversarial losses by hand, and through operators with own backward passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.losses import fgm_loss
from jaxformers.losses import pgd_loss
from jaxformers.losses import vat_loss
from jaxformers.ops import Causal
from jaxformers.ops import L2Ball
from jaxformers.ops import MaxBall
from jaxformers.ops import attend

X = jax.random.normal(jax.random.key(0), (3, 4, 2))
W = jax.random.normal(jax.random.key(1), (4, 2, 5))


def loss(w, x):
  return jnp.mean(jnp.sin(jnp.einsum('bij,ijk->bk', jnp.tanh(x), w)))


def logits(w, x):
  return jnp.einsum('...ij,ijk->...k', jnp.tanh(x), w)


def test_the_loss_is_that_at_a_perturbation_of_given_length():
  seen = []

  def spy(w, x):
    seen.append(x)
    return loss(w, x)

  fgm_loss(spy, W, X, L2Ball(0.1))
  lengths = jnp.linalg.norm((seen[-1] - X).reshape(3, -1), axis=1)
  np.testing.assert_allclose(lengths, 0.1, rtol=1e-5)
  fgm_loss(spy, W, X, MaxBall(0.1))
  np.testing.assert_allclose(jnp.abs(seen[-1] - X), 0.1, rtol=1e-4)
  fgm_loss(spy, W, X, L2Ball(0.1, per_example=False))
  np.testing.assert_allclose(jnp.linalg.norm(seen[-1] - X), 0.1, rtol=1e-5)


def test_the_loss_grows_by_epsilon_times_the_gradient():
  with jax.enable_x64(True):
    x, w = X.astype(jnp.float64), W.astype(jnp.float64)
    norm = jnp.linalg.norm(jax.grad(loss, 1)(w, x))
    ball = L2Ball(1e-5, per_example=False)
    growth = fgm_loss(loss, w, x, ball) - loss(w, x)
    np.testing.assert_allclose(growth, 1e-5 * norm, rtol=1e-4)


def test_the_gradient_takes_the_perturbation_as_constant():
  step = L2Ball(0.3).extreme(jax.grad(loss, 1)(W, X))
  expected = jax.grad(loss)(W, X + step)
  found = jax.jit(jax.grad(lambda w: fgm_loss(loss, w, X, L2Ball(0.3))))(W)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_padding_is_neither_moved_nor_part_of_the_norm():
  mask = jnp.arange(4) < jnp.array([[4], [2], [0]])
  x = jnp.where(mask[..., None], X, 0)
  short = fgm_loss(loss, W[:2], x[1:2, :2], L2Ball(0.5))
  long = fgm_loss(loss, W, x[1:2], L2Ball(0.5), mask=mask[1:2])
  np.testing.assert_allclose(long, short, rtol=1e-6)
  np.testing.assert_allclose(
    fgm_loss(loss, W, x[2:], mask=mask[2:]), loss(W, x[2:]), rtol=1e-6
  )


def test_a_mask_of_another_shape_is_refused():
  with pytest.raises(ValueError, match=r'mask has shape \(2,\)'):
    fgm_loss(loss, W, X, mask=jnp.ones(2, bool))


@pytest.mark.parametrize('ball', [L2Ball(0.3), MaxBall(0.3)])
def test_several_steps_stay_in_the_ball_and_find_larger_losses(ball):
  square = lambda w, x: jnp.sum(jnp.sin(3 * logits(w, x)))
  one = pgd_loss(square, W, X, ball, steps=1, stride=1)
  np.testing.assert_allclose(one, fgm_loss(square, W, X, ball), rtol=1e-6)
  seen = []

  def spy(w, x):
    seen.append(x)
    return square(w, x)

  assert pgd_loss(spy, W, X, ball, steps=8, stride=0.3) > one
  delta = (seen[-1] - X).reshape(3, -1)
  order = 2 if isinstance(ball, L2Ball) else jnp.inf
  assert (jnp.linalg.norm(delta, ord=order, axis=1) < 0.3001).all()
  with pytest.raises(ValueError, match='at least one step'):
    pgd_loss(square, W, X, ball, steps=0)


def test_vat_finds_the_direction_in_which_outputs_move_most():
  """The Hessian of the divergence is the Fisher information of the inputs."""
  with jax.enable_x64(True):
    w, x = W.astype(jnp.float64), X[:1].astype(jnp.float64)
    jacobian = jax.jacobian(lambda x: logits(w, x))(x[0]).reshape(5, -1)
    p = jax.nn.softmax(logits(w, x[0]))
    fisher = jacobian.T @ (jnp.diag(p) - jnp.outer(p, p)) @ jacobian
    r, key = 1e-3, jax.random.key(3)
    worst = r**2 / 2 * jnp.linalg.eigvalsh(fisher)[-1]
    names = 'iterations', 'xi', 'ball'
    vat = jax.jit(functools.partial(vat_loss, logits), static_argnames=names)
    run = lambda **options: vat(w, x, key, ball=L2Ball(r), **options)
    np.testing.assert_allclose(run(iterations=60), worst, rtol=1e-2)
    np.testing.assert_allclose(run(xi=1e-5), run(), rtol=1e-3)
    assert 0 < run(iterations=0) < run() < worst * 1.01


def test_vat_is_zero_for_a_constant_model():
  constant = lambda w, x: jnp.broadcast_to(w[0, 0], (*x.shape[:1], 5))
  assert vat_loss(constant, W, X, jax.random.key(0)) == 0


def test_vat_moves_only_what_the_mask_allows():
  mask = jnp.zeros((3, 4), bool).at[1, 2].set(True)
  free = lambda w, x: logits(w, jnp.where(mask[..., None], 0.0, x))
  loss = vat_loss(free, W, X, jax.random.key(0), mask=mask)
  np.testing.assert_allclose(loss, 0, atol=1e-7)
  assert vat_loss(logits, W, X, jax.random.key(0), mask=mask) > 1e-3


def test_vat_can_differentiate_its_target_too():
  key = jax.random.key(0)

  def gradient(fixed):
    loss = lambda w: vat_loss(logits, w, X, key, fixed_target=fixed)
    return jax.jit(jax.grad(loss))(W)

  assert jnp.abs(gradient(True) - gradient(False)).max() > 1e-3


def test_gradients_pass_operators_with_backward_passes_of_their_own():
  """Blockwise attention against the same in plain operations."""

  def model(implementation):
    def function(w, x):
      x = jnp.einsum('bld,dhk->blhk', x, w)
      return attend(x, x, x, mask=Causal(), implementation=implementation).sum(
        axis=(1, 2)
      )

    return function

  w = jax.random.normal(jax.random.key(0), (2, 1, 3))

  def losses(function):
    key = jax.random.key(1)
    square = lambda w, x: jnp.sum(function(w, x) ** 2)
    return lambda w: (
      vat_loss(function, w, X, key) + pgd_loss(square, w, X, steps=2)
    )

  found, expected = (
    jax.jit(jax.grad(losses(model(name))))(w) for name in ('blockwise', 'xla')
  )
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
