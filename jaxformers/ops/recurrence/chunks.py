"""How a loop over tokens keeps no more than the states between chunks."""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

CHUNK = 64
"""Tokens between states that are kept, where nothing else is said."""


def scan_chunks(
  body: Callable[[Any, Any], tuple[Any, Array]],
  state: Any,
  inputs: Any,
  chunk: int | None,
) -> tuple[Any, Array]:
  """Runs `body` over chunks of tokens, and again in the backward pass.

  Chunks are of one size, at most as asked. The last may have to be filled up,
  with zeros; `body` must leave the state alone there.

  Args:
    body: `(state, inputs) -> (state, out)`; takes and returns `[C, B, ...]`.
    state: before the first token.
    inputs: a tree of arrays `[B, L, ...]`.
    chunk: C; None for `CHUNK`.

  Returns:
    Last state, and outputs `[B, L, ...]`.

  Raises:
    ValueError: if a chunk has less than one token.
  """
  chunk = CHUNK if chunk is None else chunk
  if chunk < 1:
    raise ValueError(f'chunks need at least 1 token, got chunk={chunk}.')
  length = jax.tree.leaves(inputs)[0].shape[1]
  count = math.ceil(length / chunk)
  chunk = math.ceil(length / count)

  def cut(z_BL):
    batch, _, *rest = z_BL.shape
    filling = [(0, 0), (0, count * chunk - length)] + [(0, 0)] * len(rest)
    z_BNC = jnp.pad(z_BL, filling).reshape(batch, count, chunk, *rest)
    return jnp.moveaxis(z_BNC, 0, 2)

  body = jax.checkpoint(body, prevent_cse=False)
  state, out_NCB = jax.lax.scan(body, state, jax.tree.map(cut, inputs))
  out_BNC = jnp.moveaxis(out_NCB, 2, 0)
  out_BL = out_BNC.reshape(out_BNC.shape[0], -1, *out_BNC.shape[3:])
  return state, out_BL[:, :length]
