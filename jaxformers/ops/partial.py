"""Attention over a part of the keys, to be merged with that over the rest.

Softmax attention over disjoint sets of keys merges exactly, in any order: the
parts form a commutative monoid. Long caches, sequence shards, near and far
regions and hashed buckets are all computed apart and merged.
"""

from collections.abc import Iterable
import functools
from typing import NamedTuple

from jax import Array
import jax.numpy as jnp
from jaxtyping import Float


class Partial(NamedTuple):
  """Attention over some keys: a weighted sum and the sum of its weights.

  Weights are `exp(score - maximum)`, so that nothing overflows. A query that
  saw nothing has numerator and denominator 0; that is the neutral element.

  Source: Milakov and Gimelshein, "Online normalizer calculation for softmax",
  2018, arXiv 1805.02867, section 3.1.

  Attributes:
    numerator: `[B, L, H, V]`, sum of weighted values.
    denominator: `[B, L, H]`, sum of weights.
    maximum: `[B, L, H]`, what was subtracted from scores; finite.
  """

  numerator: Float[Array, 'B L H V']
  denominator: Float[Array, 'B L H']
  maximum: Float[Array, 'B L H']

  @property
  def out(self) -> Float[Array, 'B L H V']:
    """The weighted mean; 0 for a query that saw nothing."""
    safe = jnp.where(self.denominator > 0, self.denominator, 1)
    return self.numerator / safe[..., None]

  @property
  def log_normalizer(self) -> Float[Array, 'B L H']:
    """Logarithm of the sum of exponentiated scores; -inf without any."""
    seen = self.denominator > 0
    safe = jnp.where(seen, self.denominator, 1)
    return jnp.where(seen, self.maximum + jnp.log(safe), -jnp.inf)


def partial_of(
  out_BLHV: Float[Array, 'B L H V'], log_normalizer_BLH: Float[Array, 'B L H']
) -> Partial:
  """Returns the partial result that normalised attention stands for.

  Source: see `Partial`.

  Args:
    out_BLHV: weighted means.
    log_normalizer_BLH: their normalisers; -inf where nothing was seen.
  """
  seen = log_normalizer_BLH > -jnp.inf
  lowest = jnp.finfo(log_normalizer_BLH.dtype).min
  return Partial(
    jnp.where(seen[..., None], out_BLHV, 0),
    seen.astype(log_normalizer_BLH.dtype),
    jnp.where(seen, log_normalizer_BLH, lowest),
  )


def merge(partials: Iterable[Partial]) -> Partial:
  """Merges attention over disjoint sets of keys into that over all of them.

  Exact, differentiable, and indifferent to order and grouping.

  Source: Milakov and Gimelshein, "Online normalizer calculation for softmax",
  2018, arXiv 1805.02867, equation 4.

  Args:
    partials: one or more of them, of equal shapes.

  Returns:
    Their sum, as `Partial`.

  Raises:
    ValueError: if there is none.
  """
  partials = list(partials)
  if not partials:
    raise ValueError('merge needs at least one partial result, got none.')
  return functools.reduce(_add, partials)


def _add(a: Partial, b: Partial) -> Partial:
  maximum = jnp.maximum(a.maximum, b.maximum)
  shrink_a = jnp.exp(a.maximum - maximum)
  shrink_b = jnp.exp(b.maximum - maximum)
  return Partial(
    a.numerator * shrink_a[..., None] + b.numerator * shrink_b[..., None],
    a.denominator * shrink_a + b.denominator * shrink_b,
    maximum,
  )
