"""How a recurrence goes on over devices that share out a sequence.

Within `jax.shard_map` each device of a mesh axis holds a share: consecutive
tokens, as many as the others. What a share makes of the state that enters it is
said by two small things, what it keeps of that state and what it writes itself.
All devices gather these of all, and follow the state up to their own share.
Gradients take the same way back. Without an axis a sequence is one share.

Source of all: Blelloch, "Prefix Sums and Their Applications", 1990, section
1.4; Martin and Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence
Length", 2018, arXiv 1709.04057, algorithm 1.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from jaxformers.ops.recurrence.varying import varying_alike


def affine(kept: Array, written: Array, state: Array) -> Array:
  """Returns the state after a share of a linear recurrence.

  Args:
    kept: what the share multiplies by.
    written: what it adds.
    state: before it.
  """
  return kept * state + written


def entering(
  axis_name: str,
  kept: Any,
  written: Any,
  initial: Any,
  *,
  after: Callable[[Any, Any, Any], Any] = affine,
  down: bool = False,
) -> Any:
  """Returns the state that enters the share of this device.

  Args:
    axis_name: of the mesh axis along which tokens are split, in order.
    kept: a tree that says what is left of a state after this device's share.
    written: the state after the share, if none enters.
    initial: the state that enters the first share, the same on all devices.
    after: `(kept, written, state)` to the state after a share.
    down: whether to go from the end.
  """
  kept, written, initial = varying_alike((kept, written, initial))
  shares = jax.lax.all_gather((kept, written), axis_name)

  def over(state, share):
    return after(*share, state), state

  _, states = jax.lax.scan(over, initial, shares, reverse=down)
  index = jax.lax.axis_index(axis_name)
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), states
  )


def last_of_all(axis_name: str | None, last: Any, *, down: bool = False) -> Any:
  """Returns the state after the last share, the same on all devices.

  Args:
    axis_name: of the mesh axis; None for none.
    last: the state after the share of this device.
    down: whether to go from the end.
  """
  if axis_name is None:
    return last
  end = 0 if down else jax.lax.axis_size(axis_name) - 1
  is_end = jax.lax.axis_index(axis_name) == end
  return jax.tree.map(
    lambda x: jax.lax.psum(jnp.where(is_end, x, 0), axis_name), last
  )


def positions(axis_name: str | None, length: int) -> Array:
  """Returns positions `[L]` of the tokens of this device in the sequence.

  Args:
    axis_name: of the mesh axis; None for none.
    length: of each share.
  """
  position_L = jnp.arange(length)
  if axis_name is None:
    return position_L
  return position_L + length * jax.lax.axis_index(axis_name)


def mirrored(axis_name: str | None, x: Array) -> Array:
  """Returns `[B, L, ...]` in the opposite order, shares included.

  Args:
    axis_name: of the mesh axis; None for none.
    x: what this device has.
  """
  x = x[:, ::-1]
  if axis_name is None:
    return x
  devices = range(jax.lax.axis_size(axis_name))
  pairs = list(zip(devices, devices[::-1], strict=True))
  return jax.lax.ppermute(x, axis_name, pairs)
