"""Cutting a batch into parts."""

from typing import Any

import jax


def parts_of(batch: Any, parts: int) -> Any:
  """Cuts arrays `[B, ...]` into `[parts, B / parts, ...]`, over all devices.

  Rows are dealt out in turn, so that a part of a batch that is sharded in
  contiguous pieces has rows on every device and none has to move.

  Args:
    batch: tree of arrays.
    parts: a divisor of B.
  """

  def deal(array):
    dealt = array.reshape(array.shape[0] // parts, parts, *array.shape[1:])
    return dealt.swapaxes(0, 1)

  return jax.tree.map(deal, batch)
