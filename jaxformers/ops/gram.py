"""Inner products and combinations of gradients stacked by task."""

from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float


def gram(stacked: Any, metric: Any = None) -> Float[Array, 'T T']:
  r"""Computes all inner products of T trees stacked along a leading axis.

  $K_{ij} = \sum_l \langle g_i^{(l)}, g_j^{(l)} \rangle$. Each leaf contracts all
  its axes but the first, without being reshaped: split over devices, it takes
  an all-reduce of T x T numbers and nothing is gathered.

  Source: Gram, "Ueber die Entwickelung reeller Functionen in Reihen mittelst
  der Methode der kleinsten Quadrate", 1883.

  Args:
    stacked: tree whose leaves are `[T, ...]`.
    metric: positive multipliers P of the products, $g_i^\top P g_j$, in the
      structure of one tree; None for 1.

  Returns:
    At least float32; products accumulate in it whatever the leaves are.
  """
  leaves = jax.tree.leaves(stacked)
  factors = [None] * len(leaves) if metric is None else jax.tree.leaves(metric)
  if len(factors) != len(leaves):
    raise ValueError(
      f'metric has {len(factors)} leaves, the gradients have {len(leaves)}; '
      'give one multiplier per parameter.'
    )
  products = map(_leaf_gram, leaves, factors)
  return sum(products, jnp.zeros([], jnp.float32))


def _leaf_gram(g, factor):
  dtype = jnp.promote_types(g.dtype, jnp.float32)
  if factor is not None:
    g = g.astype(dtype) * jnp.sqrt(factor).astype(dtype)
  rest = tuple(range(1, g.ndim))
  return jax.lax.dot_general(
    g,
    g,
    ((rest, rest), ((), ())),
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=dtype,
  )


def combine(stacked: Any, weights_T: Float[Array, ' T']) -> Any:
  r"""Computes the weighted sum $\sum_i w_i g_i$ of trees stacked by task.

  Source: none; a linear combination, accumulated in at least float32.

  Args:
    stacked: tree whose leaves are `[T, ...]`.
    weights_T: their weights. What has weight 0 does not count even where it is
      not finite.
  """

  def leaf(g):
    dtype = jnp.promote_types(g.dtype, jnp.float32)
    weight = weights_T.astype(dtype).reshape(-1, *[1] * (g.ndim - 1))
    return jnp.sum(jnp.where(weight == 0, 0, weight * g), 0).astype(g.dtype)

  return jax.tree.map(leaf, stacked)


def cosines(gram_TT: Float[Array, 'T T']) -> Float[Array, 'T T']:
  r"""Computes $K_{ij} / \sqrt{K_{ii} K_{jj}}$; 0 beside vectors of norm zero.

  Source: none; the definition of the cosine between two vectors.

  Args:
    gram_TT: inner products.
  """
  norms_T = jnp.sqrt(jnp.maximum(jnp.diagonal(gram_TT), 0))
  products_TT = norms_T[:, None] * norms_T
  return jnp.where(
    products_TT == 0, 0, gram_TT / jnp.where(products_TT == 0, 1, products_TT)
  )


def task_norms(stacked: Any) -> Float[Array, ' T']:
  """Computes the norm of each of T trees stacked along a leading axis.

  Source: none; the Euclidean norm, accumulated in at least float32.

  Args:
    stacked: tree whose leaves are `[T, ...]`.
  """

  def squares(g):
    g = g.astype(jnp.promote_types(g.dtype, jnp.float32))
    return jnp.sum(jnp.square(g), axis=tuple(range(1, g.ndim)))

  total_T = sum(map(squares, jax.tree.leaves(stacked)), jnp.zeros([]))
  return jnp.sqrt(total_T)
