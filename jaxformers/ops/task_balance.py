r"""Directions that treat tasks alike, as weights of the tasks' gradients.

As in `jaxformers.ops.common_descent`, gradients enter by their inner products K
and a direction is $u = \sum_i w_i g_i$; a mask is False for absent tasks,
whose weight is 0. Gradients of norm zero count as absent but where a function
says otherwise.
"""

from typing import Any, Literal, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from jaxformers.ops.nnqp import min_norm_weights
from jaxformers.ops.tree import leaf_keys

_NEWTON_STEPS = 60


@jax.default_matmul_precision('highest')
def pcgrad_weights(
  gram_TT: Float[Array, 'T T'],
  order_TT: Int[Array, 'T T'],
  mask_T: Bool[Array, ' T'] | None = None,
) -> Float[Array, ' T']:
  r"""Projects each gradient onto the normal plane of those it conflicts with.

  For each i in turn over j in a random order: where $\langle v_i, g_j\rangle <
  0$, $v_i$ loses its part along $g_j$; $u = \sum_i v_i$. With more than two
  tasks the result depends on the order and may still conflict.

  Source: Yu et al., "Gradient Surgery for Multi-Task Learning", 2020, arXiv
  2001.06782, algorithm 1.

  Args:
    gram_TT: inner products of the gradients.
    order_TT: row i holds the tasks in the order in which i meets them.
    mask_T: False for absent tasks; None for none.
  """
  gram_TT, mask_T = _present(gram_TT, mask_T)
  diagonal_T = jnp.diagonal(gram_TT)

  def project(i, order_T):
    def meet(v_T, j):
      overlap = jnp.where(i == j, 0, jnp.minimum(v_T @ gram_TT[j], 0))
      square = diagonal_T[j]
      return v_T.at[j].add(-overlap / jnp.where(square > 0, square, 1)), None

    start_T = (jnp.arange(len(gram_TT)) == i).astype(gram_TT.dtype)
    return jax.lax.scan(meet, start_T, order_T)[0]

  v_UT = jax.vmap(project)(jnp.arange(len(gram_TT)), order_TT)
  return jnp.sum(jnp.where(mask_T[:, None], v_UT, 0), axis=0)


def imtl_g_weights(
  gram_TT: Float[Array, 'T T'], mask_T: Bool[Array, ' T'] | None = None
) -> Float[Array, ' T']:
  r"""Gives the direction equal projections onto all unit gradients.

  Solves $K v = \sqrt{\mathrm{diag} K}$ and divides by the sum of v; weights may
  be negative. The pseudo-inverse is used where K is singular; where v sums to
  zero, as for opposite gradients, all weights are 0.

  Source: Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021,
  openreview IMPnRXEWpvr (IMTL-G).

  Args:
    gram_TT: inner products of the gradients.
    mask_T: False for absent tasks; None for none.
  """
  unit = _unit(gram_TT, mask_T)
  v_T = _pseudo_solve(unit.gram_TT, unit.mask_T) / unit.norm_T
  total = v_T.sum()
  vanishes = jnp.abs(total) <= 1e-4 * jnp.abs(v_T).sum()
  return jnp.where(vanishes, 0, v_T / jnp.where(vanishes, 1, total))


def config_weights(
  gram_TT: Float[Array, 'T T'], mask_T: Bool[Array, ' T'] | None = None
) -> Float[Array, ' T']:
  r"""Takes the direction of equal cosines, as long as the gradients along it.

  $u = \sum_i \langle g_i, \hat v\rangle \hat v$ with $v = \hat G^+ 1$, the
  pseudo-inverse of the unit gradients. All 0 where v is, as for opposite
  gradients.

  Source: Liu et al., "ConFIG: Towards Conflict-free Training of Physics
  Informed Neural Networks", 2024, arXiv 2408.11104.

  Args:
    gram_TT: inner products of the gradients.
    mask_T: False for absent tasks; None for none.
  """
  unit = _unit(gram_TT, mask_T)
  v_T = _pseudo_solve(unit.gram_TT, unit.mask_T)
  cosine_T = _times(unit.gram_TT, v_T)
  square = jnp.sum(v_T * cosine_T)
  length = jnp.sum(unit.norm_T * cosine_T, where=unit.mask_T)
  vanishes = square <= jnp.finfo(square.dtype).eps
  factor = jnp.where(vanishes, 0, length / jnp.where(vanishes, 1, square))
  return factor * v_T / unit.norm_T


def nash_weights(
  gram_TT: Float[Array, 'T T'],
  mask_T: Bool[Array, ' T'] | None = None,
  max_norm: float | None = 1.0,
) -> Float[Array, ' T']:
  r"""Finds the bargaining solution, $K w = 1 / w$ with $w > 0$.

  It minimises the convex $w^\top K w / 2 - \sum_i \log w_i$, here by damped
  Newton steps. Then $\|u\|^2 = m$, $\langle g_i, u\rangle = 1 / w_i$, and the
  scale of a task does not matter. Where zero lies in the convex hull of the
  gradients (one of norm zero included) there is no solution and u = 0.

  Source: Navon et al., "Multi-Task Learning as a Bargaining Game", 2022, arXiv
  2202.01017, claim 3.1; damping: Nesterov and Nemirovskii, "Interior-Point
  Polynomial Algorithms in Convex Programming", 1994, section 2.2.

  Args:
    gram_TT: inner products of the gradients.
    mask_T: False for absent tasks; None for none.
    max_norm: longer directions are scaled down to it; None for never.
  """
  present_TT, mask_T = _present(gram_TT, mask_T)
  is_zero = jnp.any(mask_T & (jnp.diagonal(present_TT) <= 0))
  unit = _unit(present_TT, mask_T)
  a_T = min_norm_weights(unit.gram_TT, unit.mask_T)
  distance = jnp.sum(a_T * _times(unit.gram_TT, a_T))
  eps = jnp.finfo(distance.dtype).eps
  is_stationary = is_zero | (distance <= 8 * len(a_T) * eps)
  w_T = jnp.where(unit.mask_T, _bargain(unit, is_stationary), 0)
  if max_norm is not None:
    norm = jnp.sqrt(jnp.maximum(jnp.sum(w_T * _times(unit.gram_TT, w_T)), 0))
    w_T *= jnp.minimum(1, max_norm / jnp.where(norm > 0, norm, 1))
  return jnp.where(is_stationary, 0, w_T / unit.norm_T)


@jax.default_matmul_precision('highest')
def _bargain(unit, is_stationary):
  """Returns w with K w = 1 / w for unit gradients; absent ones decouple."""
  tasks = len(unit.mask_T)
  eye_TT = jnp.eye(tasks, dtype=unit.gram_TT.dtype)
  gram_TT = unit.gram_TT + jnp.where(unit.mask_T, 0, 1) * eye_TT
  # Without a solution Newton would wander off to infinity.
  gram_TT = jnp.where(is_stationary, eye_TT, gram_TT)

  def newton(_, w_T):
    slope_T = gram_TT @ w_T - 1 / w_T
    step_T = jnp.linalg.solve(gram_TT + jnp.diag(w_T**-2), slope_T)
    decrement = jnp.sqrt(jnp.maximum(slope_T @ step_T, 0))
    length = jnp.where(decrement > 0.25, 1 / (1 + decrement), 1)
    return jnp.maximum(w_T - length * step_T, 0.1 * w_T)

  start_T = jnp.full(tasks, tasks**-0.5, gram_TT.dtype)
  return jax.lax.fori_loop(0, _NEWTON_STEPS, newton, start_T)


@jax.default_matmul_precision('highest')
def aligned_weights(
  gram_TT: Float[Array, 'T T'],
  mask_T: Bool[Array, ' T'] | None = None,
  scale: Literal['min', 'median', 'rmse'] = 'min',
) -> Float[Array, ' T']:
  r"""Makes the gradients orthogonal and equally long before their mean.

  $w = \sqrt{\lambda_s} V \Lambda^{-1/2} V^\top p$ of the eigenvectors of K whose
  eigenvalue is not zero, with preferences p = 1 / m.

  Source: Senushkin et al., "Independent Component Alignment for Multi-Task
  Learning", CVPR 2023, arXiv 2305.19000. The authors' code
  has p = 1, m times as much.

  Args:
    gram_TT: inner products of the gradients.
    mask_T: False for absent tasks; None for none.
    scale: which eigenvalue $\lambda_s$ is: the smallest, the median, or the
      mean of them.
  """
  gram_TT, mask_T = _present(gram_TT, mask_T)
  lam_R, v_TR, is_kept_R = _eigen(gram_TT)
  match scale:
    case 'min':
      chosen = jnp.min(jnp.where(is_kept_R, lam_R, jnp.inf))
    case 'median':
      chosen = jnp.nanmedian(jnp.where(is_kept_R, lam_R, jnp.nan))
    case 'rmse':
      chosen = jnp.sum(lam_R, where=is_kept_R) / jnp.maximum(is_kept_R.sum(), 1)
    case _:
      raise ValueError(
        f"scale must be 'min', 'median' or 'rmse', got {scale!r}."
      )
  mean_T = mask_T / jnp.maximum(mask_T.sum(), 1)
  factor_R = jnp.where(
    is_kept_R, jnp.sqrt(chosen / jnp.where(is_kept_R, lam_R, 1)), 0
  )
  return v_TR @ (factor_R * (mean_T @ v_TR))


def sign_dropout(
  stacked: Any,
  key: Array,
  mask_T: Bool[Array, ' T'],
  leak_T: Float[Array, ' T'] | None = None,
) -> Any:
  r"""Keeps, entry by entry, the positive or the negative gradients only.

  The positive ones with probability $(1 + \sum_i g_i / \sum_i |g_i|) / 2$.

  Source: Chen et al., "Just Pick a Sign: Optimizing Deep Multitask Models with
  Gradient Sign Dropout", 2020, arXiv 2010.06808, algorithm 1.

  Args:
    stacked: tree of gradients `[T, ...]`.
    key: of the draws.
    mask_T: False for absent tasks.
    leak_T: part of each task's gradient that is kept in any case; None for 0.

  Returns:
    The sum of what is kept, without the axis of tasks.
  """

  def leaf(g, key):
    shape = -1, *[1] * (g.ndim - 1)
    g = jnp.where(mask_T.reshape(shape), g, 0)
    size = jnp.sum(jnp.abs(g), axis=0)
    purity = (1 + g.sum(axis=0) / jnp.where(size > 0, size, 1)) / 2
    is_positive = jax.random.uniform(key, size.shape) < purity
    kept = jnp.where(is_positive, jnp.maximum(g, 0), jnp.minimum(g, 0))
    if leak_T is not None:
      leak = leak_T.reshape(shape)
      kept = leak * g + (1 - leak) * kept
    return kept.sum(axis=0).astype(g.dtype)

  return jax.tree.map(leaf, stacked, leaf_keys(key, 0, stacked))


class _Unit(NamedTuple):
  """Gradients of norm 1: inner products, former norms, which there are."""

  gram_TT: Float[Array, 'T T']
  norm_T: Float[Array, ' T']
  mask_T: Bool[Array, ' T']


def _unit(gram_TT, mask_T):
  gram_TT, mask_T = _present(gram_TT, mask_T)
  diagonal_T = jnp.diagonal(gram_TT)
  mask_T &= diagonal_T > 0
  norm_T = jnp.sqrt(jnp.where(mask_T, diagonal_T, 1))
  return _Unit(gram_TT / norm_T[:, None] / norm_T, norm_T, mask_T)


def _present(gram_TT, mask_T):
  mask_T = jnp.ones(len(gram_TT), bool) if mask_T is None else mask_T
  return jnp.where(mask_T[:, None] & mask_T, gram_TT, 0), mask_T


def _eigen(gram_TT):
  """Returns eigenvalues, eigenvectors, and which eigenvalues are not zero."""
  lam_R, v_TR = jnp.linalg.eigh(gram_TT)
  cutoff = jnp.max(lam_R) * len(gram_TT) * jnp.finfo(gram_TT.dtype).eps
  return lam_R, v_TR, lam_R > jnp.maximum(cutoff, 0)


@jax.default_matmul_precision('highest')
def _pseudo_solve(gram_TT, mask_T):
  """Returns the shortest least-squares solution of K v = 1."""
  lam_R, v_TR, is_kept_R = _eigen(gram_TT)
  along_R = mask_T.astype(gram_TT.dtype) @ v_TR
  inverse_R = jnp.where(is_kept_R, 1 / jnp.where(is_kept_R, lam_R, 1), 0)
  return v_TR @ (inverse_R * along_R)


@jax.default_matmul_precision('highest')
def _times(gram_TT, w_T):
  return gram_TT @ w_T
