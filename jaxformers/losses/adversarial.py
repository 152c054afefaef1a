"""Losses at inputs that were moved to where the loss is larger.

The inputs are arrays that gradients can reach, such as embedded tokens
`[B, L, D]`, or the embedding table itself. The functions take the parameters
apart from them so that the search for a perturbation is not differentiated.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float

from jaxformers.ops.balls import Ball
from jaxformers.ops.balls import L2Ball

LossFn = Callable[[Any, Array], Float[Array, '']]


def fgm_loss(
  loss_fn: LossFn,
  params: Any,
  inputs: Float[Array, 'B ...'],
  ball: Ball = L2Ball(),
  *,
  mask: Bool[Array, 'B ...'] | None = None,
) -> Float[Array, '']:
  """Computes the loss at inputs moved along its gradient (fast gradient).

  `L(x + r G / (|G| + 1e-8))` with G the gradient at x; r sign(G) in a
  `MaxBall`. To first order the loss grows by `r |G|`. For one perturbation of an
  embedding table use `L2Ball(r, per_example=False)` and the table as inputs.
  The mean of this and of the clean loss is adversarial training as Goodfellow
  et al. have it.

  Source: Miyato et al., "Adversarial Training Methods for Semi-Supervised Text
  Classification", 2017, arXiv 1605.07725; of the table: Su
  Jianlin, 2020, kexue.fm/archives/7234.

  Args:
    loss_fn: mean loss of parameters and inputs.
    params: differentiable parameters.
    inputs: see above; gradients reach them too.
    ball: where the perturbation ends.
    mask: True where inputs may be moved, with their leading axes, such as
      `[B, L]` without the padding; None for everywhere.
  """
  return pgd_loss(loss_fn, params, inputs, ball, steps=1, stride=1, mask=mask)


def pgd_loss(
  loss_fn: LossFn,
  params: Any,
  inputs: Float[Array, 'B ...'],
  ball: Ball = L2Ball(),
  *,
  steps: int = 3,
  stride: float = 0.5,
  mask: Bool[Array, 'B ...'] | None = None,
) -> Float[Array, '']:
  """Computes the loss at inputs moved along its gradient in several steps.

  Starts from the inputs; each step is projected back to the ball. One step of
  stride 1 is `fgm_loss`.

  Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial
  Attacks", 2017, arXiv 1706.06083, section 2.1.

  Args:
    loss_fn: see `fgm_loss`.
    params: see `fgm_loss`.
    inputs: see `fgm_loss`.
    ball: see `fgm_loss`.
    steps: gradients that are taken.
    stride: length of a step over the radius of the ball.
    mask: see `fgm_loss`.

  Raises:
    ValueError: if there is no step.
  """
  if steps < 1:
    raise ValueError(f'pgd_loss needs at least one step, got {steps}.')
  fixed_params, fixed = jax.lax.stop_gradient((params, inputs))
  visible = _where_allowed(mask, fixed)

  def ascend(_, delta):
    gradient = jax.grad(loss_fn, argnums=1)(fixed_params, fixed + delta)
    step = ball.extreme(jnp.where(visible, gradient, 0))
    return ball.project(delta + jnp.asarray(stride, step.dtype) * step)

  delta = jax.lax.fori_loop(0, steps, ascend, jnp.zeros_like(fixed))
  return loss_fn(params, inputs + delta)


def vat_loss(
  function: Callable[[Any, Array], Float[Array, '... V']],
  params: Any,
  inputs: Float[Array, 'B ...'],
  key: Array,
  *,
  ball: L2Ball = L2Ball(),
  iterations: int = 1,
  xi: float | None = None,
  mask: Bool[Array, 'B ...'] | None = None,
  fixed_target: bool = True,
  divergence: Callable[[Array, Array], Float[Array, '']] | None = None,
) -> Float[Array, '']:
  """Computes how far outputs move at the worst small perturbation of inputs.

  `D(f(x + r u), f(x))` with u from power iterations
  `u <- grad_r D(f(x + xi u), f(x))` of a normal draw, normalised like the ball
  is. It needs no labels.

  The limit of small xi, the default, is an exact product with the Hessian of D
  by forward over reverse. A finite xi must be large enough for the dtype: 1e-6
  is lost in float32 among inputs of unit size.

  Source: Miyato et al., "Virtual Adversarial Training", 2018, arXiv 1704.03976,
  algorithm 1; Su Jianlin, 2020, kexue.fm/archives/7466 (xi 10, r 1, one
  iteration, on the embedding table).

  Args:
    function: finite logits of parameters and inputs; their last axis is that
      of the outcomes.
    params: see `fgm_loss`.
    inputs: see `fgm_loss`.
    key: of the normal draw.
    ball: its radius is r.
    iterations: power iterations; 0 perturbs at random.
    xi: length of the perturbation that the iterations look at; None for the
      limit 0.
    mask: see `fgm_loss`.
    fixed_target: whether no gradient flows through f(x) in the result.
    divergence: D, of logits at the moved inputs and of logits at the inputs;
      None for the mean Kullback-Leibler divergence `KL(f(x) | f(x + r u))`.

  Returns:
    At least 0, and 0 if the outputs do not depend on the inputs.
  """
  divergence = _mean_kl if divergence is None else divergence
  fixed_params, fixed = jax.lax.stop_gradient((params, inputs))
  target = function(params, inputs)
  fixed_of_target = jax.lax.stop_gradient(target)
  visible = _where_allowed(mask, fixed)
  unit = L2Ball(1.0, ball.per_example)

  def gradient(delta):
    moved = lambda d: divergence(
      function(fixed_params, fixed + d), fixed_of_target
    )
    return jax.grad(moved)(delta)

  def iterate(_, u):
    u = unit.extreme(u)
    if xi is None:
      u = jax.jvp(gradient, (jnp.zeros_like(u),), (u,))[1]
    else:
      u = gradient(jnp.asarray(xi, u.dtype) * u)
    return jnp.where(visible, _of_unit_size(u, ball.per_example), 0)

  u = jax.random.normal(key, fixed.shape, fixed.dtype)
  u = jax.lax.fori_loop(0, iterations, iterate, jnp.where(visible, u, 0))
  moved = function(params, inputs + ball.extreme(u))
  return divergence(moved, fixed_of_target if fixed_target else target)


def _where_allowed(mask, inputs):
  """Returns the mask with as many axes as the inputs."""
  if mask is None:
    return jnp.ones((1,) * inputs.ndim, bool)
  if mask.shape != inputs.shape[: mask.ndim]:
    raise ValueError(
      f'mask has shape {mask.shape}; expected the leading axes of the inputs, '
      f'which have shape {inputs.shape}.'
    )
  return mask.reshape(mask.shape + (1,) * (inputs.ndim - mask.ndim))


def _of_unit_size(u, per_example):
  """Keeps gradients of a flat divergence from vanishing beside 1e-8."""
  axes = tuple(range(int(per_example), u.ndim))
  largest = jnp.max(jnp.abs(u), axis=axes, keepdims=True)
  return u / jnp.where(largest > 0, largest, 1)


def _mean_kl(moved, target):
  """Mean of KL(target | moved), in at least float32."""
  dtype = jnp.promote_types(moved.dtype, jnp.float32)
  log_q = jax.nn.log_softmax(moved.astype(dtype))
  log_p = jax.nn.log_softmax(target.astype(dtype))
  # p - q sums to 0: the added terms make every summand non-negative.
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  return jnp.mean(jnp.sum(p * (log_p - log_q) - p + q, axis=-1))
