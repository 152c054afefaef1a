"""Small quadratic programs over non-negative numbers, solved on the device.

Everything that combines gradients of several tasks without conflict comes down
to one of these, with as many unknowns as tasks. No solver is called on the
host, nothing is iterated for eight unknowns or fewer, and a batch of problems
is a `jax.vmap`.
"""

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float
import numpy as np

ENUMERATED = 8
"""Up to so many unknowns all supports are tried."""

_SWEEPS = 300
_REFINEMENTS = 3


@jax.jit
@jax.default_matmul_precision('highest')
def nnqp(
  q_NN: Float[Array, 'N N'],
  c_N: Float[Array, ' N'],
  mask_N: Bool[Array, ' N'] | None = None,
) -> Float[Array, ' N']:
  r"""Minimises $\frac12 x^\top Q x + c^\top x$ over $x \ge 0$.

  Some minimiser solves a linear system on its support and is zero elsewhere. Up
  to eight unknowns, all `2^N` supports are solved in one batch, after scaling
  Q to a unit diagonal, with a small ridge whose effect refinement removes; the
  candidate that breaks the conditions for a minimum least is taken. More
  unknowns go through cyclic coordinate descent, whose support is then solved in
  the same way.

  Source: Karush, "Minima of Functions of Several Variables with Inequalities as
  Side Conditions", 1939 (the conditions); Hildreth, "A quadratic programming
  procedure", 1957 (coordinate descent).

  Args:
    q_NN: symmetric, positive semidefinite; may be singular.
    c_N: linear term; in the range of Q, or at least such that the problem is
      bounded. An unknown whose row of Q is zero is left at 0.
    mask_N: False for unknowns that are absent; they get 0. None for none.

  Returns:
    At least float32; the error of Q x is some 1e-7 of c, more where rows of Q
    nearly coincide.
  """
  dtype = jnp.promote_types(jnp.result_type(q_NN, c_N), jnp.float32)
  q_NN, c_N = q_NN.astype(dtype), c_N.astype(dtype)
  diagonal_N = jnp.diagonal(q_NN)
  is_free_N = diagonal_N > 0
  if mask_N is not None:
    is_free_N &= mask_N
  unit_N = jnp.sqrt(jnp.where(is_free_N, diagonal_N, 1))
  eye_NN = jnp.eye(len(c_N), dtype=dtype)
  is_free_NN = is_free_N[:, None] & is_free_N
  q_NN = jnp.where(is_free_NN, q_NN / unit_N[:, None] / unit_N, eye_NN)
  c_N = jnp.where(is_free_N, c_N / unit_N, 0)
  if len(c_N) <= ENUMERATED:
    x_N = _by_enumeration(q_NN, c_N)
  else:
    x_N = _by_descent(q_NN, c_N)
  return x_N / unit_N


@jax.jit
def min_norm_weights(
  gram_TT: Float[Array, 'T T'], mask_T: Bool[Array, ' T'] | None = None
) -> Float[Array, ' T']:
  r"""Finds the shortest vector in the convex hull of vectors.

  Minimises $a^\top K a$ over the simplex as `nnqp` of $K + \tau 1 1^\top$ and
  $-\tau 1$, divided by its sum: with x = s a the objective is, but for a
  constant, $(s^2 a^\top K a + \tau (s - 1)^2) / 2$, whose best a is the same
  for every s and every $\tau > 0$.

  Source: Désidéri, "Multiple-gradient descent algorithm (MGDA) for
  multiobjective optimization", 2012, definition of the minimum-norm element;
  Sener and Koltun, 2018, arXiv 1810.04650, equation 3.

  Args:
    gram_TT: inner products of the vectors.
    mask_T: False for vectors that are absent; they get 0. None for none.

  Returns:
    At least float32, non-negative, of sum 1 unless all are absent. Vectors of
    norm zero, if there are any, share the weight equally.
  """
  mask_T = jnp.ones(len(gram_TT), bool) if mask_T is None else mask_T
  diagonal_T = jnp.diagonal(gram_TT)
  is_zero_T = mask_T & (diagonal_T <= 0)
  tau = jnp.min(jnp.where(mask_T & ~is_zero_T, diagonal_T, jnp.inf))
  tau = jnp.where(jnp.isfinite(tau), tau, 1).astype(gram_TT.dtype)
  x_T = nnqp(gram_TT + tau, jnp.full_like(diagonal_T, -tau), mask_T)
  x_T = jnp.where(is_zero_T.any(), is_zero_T.astype(x_T.dtype), x_T)
  total = x_T.sum()
  return x_T / jnp.where(total > 0, total, 1)


def _by_enumeration(q_NN, c_N):
  """Returns the best of the candidates of all supports."""
  n = len(c_N)
  bits_ZN = np.arange(2**n)[:, None] >> np.arange(n) & 1
  x_ZN = jax.vmap(_on_support, (None, None, 0))(q_NN, c_N, bits_ZN == 1)
  violation_Z = jax.vmap(_violation, (None, None, 0))(q_NN, c_N, x_ZN)
  return x_ZN[jnp.argmin(violation_Z)]


def _by_descent(q_NN, c_N):
  """Returns where coordinate descent arrives, polished on its support."""

  def coordinate(i, x_N):
    slope = q_NN[i] @ x_N + c_N[i]  # The diagonal is 1.
    return x_N.at[i].set(jnp.maximum(x_N[i] - slope, 0))

  def sweep(carry):
    x_N, count = carry
    return jax.lax.fori_loop(0, len(c_N), coordinate, x_N), count + 1

  tolerance = 4 * jnp.finfo(c_N.dtype).eps * jnp.max(jnp.abs(c_N))

  def unfinished(carry):
    x_N, count = carry
    return (count < _SWEEPS) & (_violation(q_NN, c_N, x_N) > tolerance)

  x_N, _ = jax.lax.while_loop(unfinished, sweep, (jnp.zeros_like(c_N), 0))
  polished_N = _on_support(q_NN, c_N, x_N > 0)
  better = _violation(q_NN, c_N, polished_N) < _violation(q_NN, c_N, x_N)
  return jnp.where(better, polished_N, x_N)


def _on_support(q_NN, c_N, is_in_N):
  """Solves for the unknowns of a support; negative ones become 0."""
  ridge = 1e-6 if q_NN.dtype == jnp.float32 else 1e-10
  is_in_NN = is_in_N[:, None] & is_in_N
  eye_NN = jnp.eye(len(c_N), dtype=q_NN.dtype)
  inverse_NN = jnp.linalg.inv(
    jnp.where(is_in_NN, q_NN, eye_NN) + ridge * eye_NN
  )
  x_N = jnp.zeros_like(c_N)
  for _ in range(1 + _REFINEMENTS):
    x_N += inverse_NN @ jnp.where(is_in_N, -c_N - q_NN @ x_N, 0)
  return jnp.maximum(x_N, 0)


def _violation(q_NN, c_N, x_N):
  """Returns how far x is from meeting the conditions for a minimum."""
  return jnp.max(jnp.abs(x_N - jnp.maximum(x_N - q_NN @ x_N - c_N, 0)))
