r"""Directions that no task objects to, as weights of the tasks' gradients.

Gradients $g_i$ enter by their inner products K alone, as `gram` gives them, and
a direction is $u = \sum_i w_i g_i$; the update is $-\eta u$. Every
programme here is a small `nnqp`. A mask is False for tasks of which the batch
has nothing: their weight is 0.
"""

from typing import Literal

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float

from jaxformers.ops.nnqp import min_norm_weights
from jaxformers.ops.nnqp import nnqp

_BISECTIONS = 40


@jax.default_matmul_precision('highest')
def frank_wolfe_weights(
  gram_TT: Float[Array, 'T T'],
  iterations: int = 100,
  step: Literal['exact', 'average'] = 'exact',
) -> Float[Array, ' T']:
  """Approaches the weights of `min_norm_weights`, slowly.

  Kept as a reference: after 100 iterations weights are still off by hundredths,
  where `min_norm_weights` is exact.

  Source: Su Jianlin, "Multi-task learning (2): in the name of gradient", 2022,
  kexue.fm/archives/8896; Sener and Koltun, 2018, arXiv 1810.04650, algorithm 2.

  Args:
    gram_TT: inner products of the gradients.
    iterations: how many.
    step: towards the vertex that conflicts most: `'exact'` minimises along the
      line, `'average'` takes the mean of all vertices so far.
  """
  if step not in ('exact', 'average'):
    raise ValueError(f"step must be 'exact' or 'average', got {step!r}.")
  gram_TT = jnp.asarray(gram_TT)
  tasks = len(gram_TT)

  def move(k, a_T):
    slope_T = gram_TT @ a_T
    worst = jnp.argmin(slope_T)
    b, c, d = a_T @ slope_T, gram_TT[worst, worst], slope_T[worst]
    line = (b - d) / jnp.where(b + c > 2 * d, b + c - 2 * d, 1)
    exact = jnp.where(c <= d, 1, jnp.where(b <= d, 0, line))
    gamma = exact if step == 'exact' else 1 / (k + 2)
    vertex_T = jnp.arange(tasks) == worst
    return (1 - gamma) * a_T + gamma * vertex_T

  start_T = jnp.full(tasks, 1 / tasks, gram_TT.dtype)
  return jax.lax.fori_loop(0, iterations, move, start_T)


@jax.default_matmul_precision('highest')
def softmax_descent_weights(
  gram_TT: Float[Array, 'T T'],
  logits_T: Float[Array, ' T'],
  learning_rate: float,
  steps: int = 1,
  mask_T: Bool[Array, ' T'] | None = None,
) -> tuple[Float[Array, ' T'], Float[Array, ' T']]:
  r"""Approaches the weights of `min_norm_weights` by descent on their logits.

  With $a = \mathrm{softmax}(\beta)$ the slope of $\frac12 a^\top K a$ is
  $a_i ((K a)_i - a^\top K a)$. K is divided by the mean of its diagonal, so
  that learning rates have no unit. A vertex of the simplex is only reached in
  the limit, and left slowly.

  Source: Su Jianlin, "Multi-task learning (2): in the name of gradient", 2022,
  kexue.fm/archives/8896.

  Args:
    gram_TT: inner products of the gradients.
    logits_T: beta, 0 at first.
    learning_rate: of plain gradient descent.
    steps: how many.
    mask_T: False for absent tasks, whose logits stay; None for none.

  Returns:
    Weights of sum 1, unless all are absent, and the logits they come from.
  """
  gram_TT = jnp.asarray(gram_TT)
  mask_T = jnp.ones(len(gram_TT), bool) if mask_T is None else mask_T
  gram_TT = jnp.where(mask_T[:, None] & mask_T, gram_TT, 0)
  mean = jnp.trace(gram_TT) / jnp.maximum(mask_T.sum(), 1)
  gram_TT = gram_TT / jnp.where(mean > 0, mean, 1)

  def shares(logits_T):
    lowest = jnp.finfo(logits_T.dtype).min
    a_T = jax.nn.softmax(jnp.where(mask_T, logits_T, lowest))
    return jnp.where(mask_T, a_T, 0)

  def move(_, logits_T):
    a_T = shares(logits_T)
    slope_T = gram_TT @ a_T
    return logits_T - learning_rate * a_T * (slope_T - a_T @ slope_T)

  logits_T = jax.lax.fori_loop(0, steps, move, logits_T)
  return shares(logits_T), logits_T


@jax.default_matmul_precision('highest')
def cagrad_weights(
  gram_TT: Float[Array, 'T T'],
  c: float = 0.5,
  mask_T: Bool[Array, ' T'] | None = None,
) -> Float[Array, ' T']:
  r"""Helps the worst-off task as far as a ball around the mean gradient allows.

  $\max_u \min_i \langle g_i, u\rangle$ subject to $\|u - g_0\| \le c \|g_0\|$,
  with $g_0$ the mean, is $u = g_0 + g_w / \lambda$, where w minimises
  $\langle g_w, g_0\rangle + c \|g_0\| \|g_w\|$ over the simplex and
  $\lambda = \|g_w\| / (c \|g_0\|)$. For given $\lambda$, w is the
  minimum-norm point of the gradients $g_i + \lambda g_0$; $\lambda$ is found by
  bisection. Where $g_w = 0$ the mean is left as it is.

  Source: Liu et al., "Conflict-Averse Gradient Descent for Multi-task
  Learning", 2021, arXiv 2110.14048, algorithm 1.

  Args:
    gram_TT: inner products of the gradients.
    c: radius of the ball; 0 gives the mean, infinity approaches the direction
      of `min_norm_weights`.
    mask_T: False for absent tasks; None for none.
  """
  mask_T = _mask(gram_TT, mask_T)
  gram_TT = _present(gram_TT, mask_T)
  mean_T = mask_T / jnp.maximum(mask_T.sum(), 1)
  along_T = gram_TT @ mean_T
  square = mean_T @ along_T
  radius = c * jnp.sqrt(jnp.maximum(square, 0))

  def point(scale):
    shift_TT = scale * (along_T[:, None] + along_T) + scale**2 * square
    w_T = min_norm_weights(gram_TT + shift_TT, mask_T)
    return w_T, jnp.sqrt(jnp.maximum(w_T @ gram_TT @ w_T, 0))

  def halve(_, interval):
    low, high = interval
    middle = (low + high) / 2
    too_low = point(middle)[1] > radius * middle
    return jnp.where(too_low, middle, low), jnp.where(too_low, high, middle)

  largest = jnp.max(jnp.diagonal(gram_TT))
  high = jnp.sqrt(largest) / jnp.where(radius > 0, radius, 1)
  interval = jnp.zeros_like(high), high
  _, high = jax.lax.fori_loop(0, _BISECTIONS, halve, interval)
  w_T, norm = point(high)
  is_zero = norm**2 <= jnp.finfo(norm.dtype).eps * len(w_T) * largest
  return (
    mean_T + jnp.where(is_zero, 0, radius / jnp.where(is_zero, 1, norm)) * w_T
  )


def primary_weights(
  gram_TT: Float[Array, 'T T'],
  primary: int = 0,
  mask_T: Bool[Array, ' T'] | None = None,
) -> Float[Array, ' T']:
  r"""Follows one gradient as far as it increases no other loss.

  The projection of $g_0$ onto $\{u : \langle u, g_i\rangle \ge 0\}$ is
  $u = g_0 + \sum_i \lambda_i g_i$ with $\lambda \ge 0$ minimising $\|u\|$.

  Source: Su Jianlin, "Multi-task learning (3): in the name of primary and
  secondary", 2022, kexue.fm/archives/8907 (solved exactly: its iteration can
  stall); Lopez-Paz and Ranzato, 2017, arXiv 1706.08840 (GEM, margin 0); one
  auxiliary task is A-GEM, Chaudhry et al., 2018, arXiv 1812.00420, section 4.

  Args:
    gram_TT: inner products of the gradients.
    primary: number of the task that is minimised.
    mask_T: False for absent tasks; None for none. Without the primary task all
      weights are 0.
  """
  mask_T = _mask(gram_TT, mask_T)
  is_primary_T = jnp.arange(len(gram_TT)) == primary
  lambda_T = nnqp(gram_TT, gram_TT[primary], mask_T & ~is_primary_T)
  return jnp.where(mask_T[primary], lambda_T + is_primary_T, 0)


def hybrid_weights(
  gram_TT: Float[Array, 'T T'],
  is_primary_T: Bool[Array, ' T'],
  mask_T: Bool[Array, ' T'] | None = None,
) -> Float[Array, ' T']:
  r"""Decreases all primary losses and increases no auxiliary one.

  Minimises $\|\sum_i a_i g_i + \sum_j \lambda_j g_j\|$, a on the simplex of
  the primary tasks and $\lambda \ge 0$: `min_norm_weights` without auxiliary
  tasks, `primary_weights` with one primary task.

  Source: Su Jianlin, "Multi-task learning (3): in the name of primary and
  secondary", 2022, kexue.fm/archives/8907.

  Args:
    gram_TT: inner products of the gradients.
    is_primary_T: True for the primary tasks.
    mask_T: False for absent tasks; None for none. Without any primary task all
      weights are 0.
  """
  mask_T = _mask(gram_TT, mask_T)
  is_primary_T = is_primary_T & mask_T
  is_block_TT = is_primary_T[:, None] & is_primary_T
  norms_T = jnp.where(is_primary_T, jnp.diagonal(gram_TT), jnp.inf)
  tau = jnp.min(jnp.where(norms_T > 0, norms_T, jnp.inf))
  tau = jnp.where(jnp.isfinite(tau), tau, 1).astype(gram_TT.dtype)
  x_T = nnqp(
    gram_TT + tau * is_block_TT,
    -tau * is_primary_T.astype(gram_TT.dtype),
    mask_T,
  )
  total = jnp.sum(x_T, where=is_primary_T)
  return jnp.where(total > 0, x_T / jnp.where(total > 0, total, 1), 0)


def upgrad_weights(
  gram_TT: Float[Array, 'T T'], mask_T: Bool[Array, ' T'] | None = None
) -> Float[Array, ' T']:
  """Averages the gradients after freeing each of its conflicts with all.

  The mean over the tasks of `primary_weights`.

  Source: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization",
  2024, arXiv 2406.16232 (UPGrad).

  Args:
    gram_TT: inner products of the gradients.
    mask_T: False for absent tasks; None for none.
  """
  mask_T = _mask(gram_TT, mask_T)
  lambda_UT = jax.vmap(nnqp, (None, 0, None))(gram_TT, gram_TT, mask_T)
  sums_T = jnp.sum(jnp.where(mask_T[:, None], lambda_UT, 0), axis=0)
  return (sums_T + mask_T) / jnp.maximum(mask_T.sum(), 1)


def _mask(gram_TT, mask_T):
  return jnp.ones(len(gram_TT), bool) if mask_T is None else mask_T


def _present(gram_TT, mask_T):
  return jnp.where(mask_T[:, None] & mask_T, gram_TT, 0)
