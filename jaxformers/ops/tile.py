"""A rectangle of the scores: which rows, queries and keys it holds."""

from typing import NamedTuple

import jax
from jax import Array

Part = tuple[int | Array, int]
"""Where a part of an axis starts, static or traced, and its size."""


class Tile(NamedTuple):
  """Some rows of a batch, some queries and some keys.

  Attributes:
    rows: of the batch; None for all.
    queries: along the axis of queries.
    keys: along the axis of keys.
  """

  rows: Part | None
  queries: Part
  keys: Part


def cut(x: Array, axis: int, part: Part | None) -> Array:
  """Returns a part of an array; an axis of size 1 stands for all and stays.

  Args:
    x: the array.
    axis: where to cut.
    part: what to keep; None for all.
  """
  if part is None or x.shape[axis] in (1, part[1]):
    return x
  return jax.lax.dynamic_slice_in_dim(x, *part, axis)
