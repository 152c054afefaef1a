"""Entropy of softmax distributions, and giving them one that is prescribed.

All functions read logits, not probabilities: they are what gradients flow
through, and a logit of -inf, like a masked one, is a probability of zero. For
given probabilities pass `jnp.log(p)`. Entropies are in nats.
"""

from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float

# The solver's unknown is the logarithm of gamma times the range of the logits.
# Below this bracket everything is uniform, above it only the maximum is left.
_LOWEST, _HIGHEST = -9.2, 20.7
_ITERATIONS = 40
# How close to the entropies of gamma = 0 and infinity a target may come.
_MARGIN = 1e-6
_TOLERANCE = 1e-5


class NormalizedEntropy(NamedTuple):
  """A distribution of prescribed entropy.

  Source: Su Jianlin, "Entropy normalisation of probability distributions",
  2021, kexue.fm/archives/8829.

  Attributes:
    probabilities: like the logits.
    gamma: at least float32, without the normalised axis: multiplier of the
      logits whose softmax this is. 0 where the target is too high, infinite
      where it is too low, 1 where all visible logits are equal.
    converged: bool, like gamma: whether the entropy is the target, to 1e-5
      nats.
  """

  probabilities: Float[Array, '...']
  gamma: Float[Array, '...']
  converged: Bool[Array, '...']


def entropy(
  logits: Float[Array, '...'],
  mask: Bool[Array, '...'] | None = None,
  axis: int = -1,
) -> Float[Array, '...']:
  """Computes the entropy of softmax distributions, in nats.

  `log sum exp(z) - sum p z`. Zero probabilities have no part in it, nor in the
  gradient.

  Source: Shannon, "A Mathematical Theory of Communication", 1948, theorem 2.

  Args:
    logits: unnormalised logarithms of probabilities; -inf, or the lowest number
      of their type, for probability 0.
    mask: True where a logit counts, broadcast to them; None for all.
    axis: along which they are normalised.

  Returns:
    At least float32, without the axis, from 0 to the logarithm of the number of
    logits that count; 0 where none does.
  """
  z, is_support = _shifted(logits, mask, axis)
  return _moments(z, is_support, 1).entropy[..., 0]


def renyi_entropy(
  logits: Float[Array, '...'],
  order: float,
  mask: Bool[Array, '...'] | None = None,
  axis: int = -1,
) -> Float[Array, '...']:
  """Computes the Renyi entropy of softmax distributions, in nats.

  `log(sum p^order) / (1 - order)`: the logarithm of the number of possible
  outcomes at order 0, the entropy at 1, that of the effective support at 2,
  minus the logarithm of the largest probability at infinity. Falls with the
  order. Near order 1, but not at it, digits cancel.

  Source: Renyi, "On Measures of Entropy and Information", 1961, equation 1.21.

  Args:
    logits: see `entropy`.
    order: at least 0; may be infinite.
    mask: see `entropy`.
    axis: see `entropy`.

  Returns:
    Like `entropy`.

  Raises:
    ValueError: if the order is negative.
  """
  if not order >= 0:
    raise ValueError(f'a Renyi entropy needs an order >= 0, got {order}.')
  if order == 1:
    return entropy(logits, mask, axis)
  z, is_support = _shifted(logits, mask, axis)
  log_total = _log_total(z, is_support)
  if order == float('inf'):
    return log_total
  return (_log_total(order * z, is_support) - order * log_total) / (1 - order)


def normalize_entropy(
  logits: Float[Array, '...'],
  target: Float[Array, '...'] | float,
  mask: Bool[Array, '...'] | None = None,
  axis: int = -1,
) -> NormalizedEntropy:
  """Gives softmax distributions a prescribed entropy, keeping their order.

  `softmax(gamma z)` with the one gamma > 0 for which its entropy is the target.
  There is one where the target lies between the logarithm of the number of
  maximal logits and that of all; a higher target gives the uniform distribution,
  a lower one the uniform distribution over the maxima, and neither passes
  gradients. The result does not change if logits are shifted, or multiplied
  with any positive number.

  A Newton iteration kept inside a bracket, in 40 passes over the logits whatever
  they are; the residual is about 1e-6 nats in float32. The article's plain
  Newton iteration on probabilities diverges from peaked distributions to higher
  targets. Gradients are those of the implicit function, for logits and target,
  through the probabilities and gamma.

  Source: Su Jianlin, "Entropy normalisation of probability distributions",
  2021, kexue.fm/archives/8829; bracket and gradients are ours.

  Args:
    logits: unnormalised logarithms of probabilities.
    target: entropy in nats, one number or one per distribution.
    mask: True where a logit counts, broadcast to them; None for all. Where none
      does, all probabilities are 0.
    axis: along which they are normalised.

  Returns:
    See `NormalizedEntropy`.
  """
  z, is_support = _shifted(logits, mask, axis)
  target = jnp.broadcast_to(jnp.asarray(target, z.dtype), z.shape[:-1])[
    ..., None
  ]
  lowest, highest = _bounds(z, is_support)
  is_inside = (target > lowest + _MARGIN) & (target < highest - _MARGIN)
  # The spread may count as a constant, because the result ignores scaling.
  spread = -jax.lax.stop_gradient(z).min(axis=-1, keepdims=True)
  u = z / (spread := jnp.where(spread > 0, spread, 1))
  # Outside, a target that exists keeps the numbers finite that are not used.
  gamma = _solve(u, is_support, jnp.where(is_inside, target, highest / 2))
  solved = _Solution(_softmax(gamma * u, is_support), gamma / spread)
  limit = _limit(z, is_support, target > lowest + _MARGIN)
  solution = jax.tree.map(
    lambda inside, outside: jnp.where(is_inside, inside, outside), solved, limit
  )
  reached = _entropy_of(jax.lax.stop_gradient(solution.probabilities))
  converged = jnp.abs(reached - target) <= _TOLERANCE
  p, gamma = jax.tree.map(
    lambda x: jnp.where(converged & is_inside, x, jax.lax.stop_gradient(x)),
    solution,
  )
  return NormalizedEntropy(
    jnp.moveaxis(p, -1, axis).astype(logits.dtype),
    gamma[..., 0],
    converged[..., 0],
  )


class _Moments(NamedTuple):
  """Of `softmax(gamma z)`, each `[..., 1]`."""

  entropy: Array
  mean: Array
  variance: Array


class _Solution(NamedTuple):
  probabilities: Array  # [..., N]
  gamma: Array  # [..., 1]


class _Search(NamedTuple):
  """Where the search for the logarithm of gamma stands, each `[..., 1]`."""

  at: Array
  low: Array
  high: Array
  error: Array  # of the point before
  best: Array
  best_error: Array


def _shifted(logits, mask, axis):
  """Moves the axis last and the maximum to 0; returns also what counts.

  The shift comes before any multiplication with gamma, which may be 1e5 and
  would leave unshifted float32 errors of a tenth of a nat. The lowest finite
  number is what others mask with, so it counts as -inf.
  """
  is_support = logits > jnp.finfo(logits.dtype).min
  if mask is not None:
    is_support &= mask
  dtype = jnp.promote_types(logits.dtype, jnp.float32)
  z = jnp.moveaxis(logits.astype(dtype), axis, -1)
  is_support = jnp.moveaxis(is_support, axis, -1)
  top = jnp.where(is_support, z, -jnp.inf).max(axis=-1, keepdims=True)
  top = jax.lax.stop_gradient(
    jnp.where(is_support.any(-1, keepdims=True), top, 0)
  )
  z = jnp.where(is_support, z, top) - top
  return jnp.maximum(z, jnp.finfo(dtype).min), is_support


def _powers(z, is_support):
  """Exponentials, and their sum, which is 1 where nothing counts."""
  powers = jnp.where(is_support, jnp.exp(z), 0)
  total = powers.sum(axis=-1, keepdims=True)
  return powers, jnp.where(is_support.any(axis=-1, keepdims=True), total, 1)


def _softmax(z, is_support):
  powers, total = _powers(z, is_support)
  return powers / total


def _log_total(z, is_support):
  return jnp.log(_powers(z, is_support)[1])[..., 0]


def _moments(z, is_support, gamma):
  powers, total = _powers(gamma * z, is_support)
  mean = (powers * z).sum(axis=-1, keepdims=True) / total
  squares = (powers * (z - mean) ** 2).sum(axis=-1, keepdims=True)
  return _Moments(jnp.log(total) - gamma * mean, mean, squares / total)


def _entropy_of(p):
  # `entr` of 1 is 0, and spares the logarithm of 0.
  positive = jnp.where(p > 0, p, 1)
  return -(positive * jnp.log(positive)).sum(axis=-1, keepdims=True)


def _bounds(z, is_support):
  """Entropies of the uniform distributions over maxima and over all."""
  maxima = is_support & (z == 0)
  counts = (c.sum(axis=-1, keepdims=True) for c in (maxima, is_support))
  return [jnp.log(jnp.maximum(c, 1).astype(z.dtype)) for c in counts]


def _limit(z, is_support, is_high):
  """The answer to targets beyond those of any gamma between 0 and infinity."""
  maxima = is_support & (z == 0)
  chosen = jnp.where(is_high, is_support, maxima)
  is_flat = (maxima == is_support).all(axis=-1, keepdims=True)
  gamma = jnp.where(is_flat, 1, jnp.where(is_high, 0, jnp.inf))
  return _Solution(_softmax(jnp.zeros_like(z), chosen), gamma.astype(z.dtype))


@jax.custom_vjp
def _solve(u, is_support, target):
  """Returns the gamma whose softmax has the target entropy, `[..., 1]`.

  Args:
    u: logits, at most 0 and at least -1.
    is_support: which of them count.
    target: `[..., 1]`.
  """

  def improve(_, search):
    return _improve(search, u, is_support, target)

  first = jnp.full_like(target, jnp.inf)
  start = jnp.zeros_like(target)
  search = _Search(
    start, start + _LOWEST, start + _HIGHEST, first, start, first
  )
  search = jax.lax.fori_loop(0, _ITERATIONS, improve, search)
  return jnp.exp(search.best)


def _improve(search, u, is_support, target):
  """Takes a Newton step in log gamma, or halves the bracket where that fails."""
  at = search.at
  moments = _moments(u, is_support, jnp.exp(at))
  residual = moments.entropy - target
  error = jnp.abs(residual)
  low = jnp.where(residual > 0, at, search.low)
  high = jnp.where(residual > 0, search.high, at)
  slope = jnp.exp(2 * at) * moments.variance
  newton = at + residual / jnp.where(slope > 0, slope, 1)
  is_trusted = (newton > low) & (newton < high) & (slope > 0)
  is_trusted &= error <= 0.5 * search.error
  is_better = error < search.best_error
  return _Search(
    jnp.where(is_trusted, newton, (low + high) / 2),
    low,
    high,
    error,
    jnp.where(is_better, at, search.best),
    jnp.minimum(error, search.best_error),
  )


def _solve_forward(u, is_support, target):
  gamma = _solve(u, is_support, target)
  return gamma, (u, is_support, gamma)


def _solve_backward(residuals, gradient):
  """Implicit derivative: entropy falls with gamma by gamma times variance."""
  u, is_support, gamma = residuals
  moments = _moments(u, is_support, gamma)
  has_slope = moments.variance > 0
  variance = jnp.where(has_slope, moments.variance, 1)
  per_variance = jnp.where(has_slope, gradient / variance, 0)
  p = _softmax(gamma * u, is_support)
  return (
    -per_variance * gamma * p * (u - moments.mean),
    None,
    -per_variance / gamma,
  )


_solve.defvjp(_solve_forward, _solve_backward)
