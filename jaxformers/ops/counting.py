"""How many keys each query sees, without looking at every pair.

The indicator of a mask, 1 where a query sees a key and 0 elsewhere, is a signed
sum of simple terms: `1[a & b] = 1[a] 1[b]` and `1[a | b] = 1[a] + 1[b] -
1[a] 1[b]`. A simple term is a range of positions within a group of keys, so
sorting keys by group and position counts it in `O((L + M) log(L + M))`.
"""

from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Int
import numpy as np


class Term(NamedTuple):
  """Sees the keys of a query's own groups whose positions lie in a range.

  Attributes:
    sign: 1 or -1, what a pair counts.
    low: int `[B, L]`, smallest position that a query sees; None for any.
    high: int `[B, L]`, largest position that it sees; None for any.
    groups: pairs of int `[B, L]` and `[B, M]`, which must be equal.
    is_key: `[B, M]`, False for keys that no query sees; None for none of them.
  """

  sign: int = 1
  low: Int[Array, 'B L'] | None = None
  high: Int[Array, 'B L'] | None = None
  groups: tuple[tuple[Int[Array, 'B L'], Int[Array, 'B M']], ...] = ()
  is_key: Bool[Array, 'B M'] | None = None


Terms = tuple[Term, ...]
"""Terms whose sum is the indicator of a mask."""


def product(left: Terms, right: Terms) -> Terms:
  """Returns the terms of what both see.

  Source: none; the indicator of an intersection is a product.
  """
  return tuple(
    Term(
      a.sign * b.sign,
      _combine(jnp.maximum, a.low, b.low),
      _combine(jnp.minimum, a.high, b.high),
      a.groups + b.groups,
      _combine(jnp.logical_and, a.is_key, b.is_key),
    )
    for a in left
    for b in right
  )


def union(left: Terms, right: Terms) -> Terms:
  """Returns the terms of what either sees.

  Source: none; inclusion and exclusion.
  """
  both = (term._replace(sign=-term.sign) for term in product(left, right))
  return *left, *right, *both


def count(
  terms: Terms, queries: int, key_position: Int[Array, 'B M']
) -> Int[Array, 'B 1 L']:
  """Counts the keys that each query sees.

  Source: none; sorting.

  Args:
    terms: the indicator of a mask.
    queries: number of queries L.
    key_position: positions of the keys.

  Returns:
    int32; axes B and L may have size 1.
  """
  return sum(t.sign * _count_term(t, queries, key_position) for t in terms)


def _combine(operation, a, b):
  if a is None or b is None:
    return b if a is None else a
  return operation(a, b)


def _count_term(term, queries, key_position):
  keys = key_position.shape[1]
  is_key = jnp.ones((1, 1), bool) if term.is_key is None else term.is_key
  is_key = jnp.broadcast_to(is_key, (is_key.shape[0], keys))
  if not term.groups and term.low is None and term.high is None:
    return is_key.sum(axis=1, dtype=jnp.int32)[:, None, None]
  limits = jnp.iinfo(key_position.dtype)
  low = limits.min if term.low is None else term.low
  high = limits.max if term.high is None else term.high
  columns = [
    (low, key_position, high),
    *((query, key, query) for query, key in term.groups),
  ]
  batches = (np.shape(part)[:1] for column in columns for part in column)
  (batch,) = np.broadcast_shapes(is_key.shape[:1], *batches)

  def widened(part, width):
    return jnp.broadcast_to(part, (batch, width))

  columns = [
    jnp.concatenate([*map(widened, column, (queries, keys, queries))], axis=1)
    for column in columns
  ]
  return jax.vmap(_count_row)(columns, widened(is_key, keys))[:, None]


def _count_row(columns, is_key):
  """Counts the keys between limits: `[low limits, keys, high limits]`.

  Args:
    columns: what to sort by, the least important first, `[L + M + L]` each.
    is_key: `[M]`.
  """
  keys = is_key.shape[0]
  queries = (columns[0].shape[0] - keys) // 2
  # At equal positions a low limit stands before the keys, a high one after.
  side = np.repeat(np.arange(3), [queries, keys, queries])
  order = jnp.lexsort((side, *columns))
  counted = jnp.pad(is_key.astype(jnp.int32), queries)
  before = jnp.zeros_like(counted).at[order].set(jnp.cumsum(counted[order]))
  return jnp.maximum(before[queries + keys :] - before[:queries], 0)
