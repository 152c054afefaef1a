"""Orthogonal polynomials by their three-term recurrences."""

from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np


def legendre(s: Any, size: int) -> Float[Array, '*N S']:
  """Evaluates the Legendre polynomials of degree 0 to S - 1.

  `(n + 1) P_(n+1) = (2 n + 1) s P_n - n P_(n-1)`, which is stable on [-1, 1],
  as monomials are not.

  Source: Bonnet's recurrence; Abramowitz and Stegun, 1964, 22.7.10.

  Args:
    s: any shape; a jax array, or numbers for float64.
    size: S.
  """
  return _recur(s, size, lambda n, s: ((2 * n + 1) * s, n), s)


def laguerre(s: Any, size: int, alpha: float = 0.0) -> Float[Array, '*N S']:
  """Evaluates the generalised Laguerre polynomials of degree 0 to S - 1.

  Source: Abramowitz and Stegun, 1964, 22.7.12.

  Args:
    s: any shape; a jax array, or numbers for float64.
    size: S.
    alpha: order; 0 for the plain ones.
  """
  return _recur(
    s, size, lambda n, s: (2 * n + 1 + alpha - s, n + alpha), 1 + alpha - s
  )


def _recur(s, size, coefficients, first):
  """Stacks `(n + 1) p_(n+1) = a_n p_n - b_n p_(n-1)` from 1 and `first` on."""
  xp = jnp if isinstance(s, jax.Array) else np
  p = [xp.ones_like(s, dtype=None if xp is jnp else np.float64), first]
  for n in range(1, size - 1):
    a, b = coefficients(n, s)
    p.append((a * p[n] - b * p[n - 1]) / (n + 1))
  return xp.stack(p[:size], axis=-1)
