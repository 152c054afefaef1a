"""When the samples of packed and padded rows stand, and how they are cut."""

from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float, Real
import numpy as np

from jaxformers.ops.segments import Places


class Chunk(NamedTuple):
  """Where the places of a chunk stand; B may be 1.

  Attributes:
    since_BC: time before each sample, 0 where a segment begins.
    until_BC: time after it; both are that of the last sample at padding.
    elapsed_B: time before the chunk.
    is_token_BC: False at padding.
    begins_BC: whether a segment begins.
  """

  since_BC: Real[Array, 'B C']
  until_BC: Real[Array, 'B C']
  elapsed_B: Real[Array, ' B']
  is_token_BC: Bool[Array, 'B C']
  begins_BC: Bool[Array, 'B C']

  @property
  def segment_BC(self) -> Array:
    """Running number of the segment, 0 for that of the state."""
    return jnp.cumsum(self.begins_BC, axis=1)

  @property
  def sees_BCM(self) -> Array:
    """Whether the state at the first place holds the sample at the second."""
    segment_BC, length = self.segment_BC, self.since_BC.shape[1]
    sees_BCM = segment_BC[:, :, None] == segment_BC[:, None, :]
    sees_BCM &= np.tril(np.ones((length, length), bool))
    return sees_BCM & self.is_token_BC[:, None, :]


def find_times(
  shape: tuple[int, int],
  elapsed_B: Real[Array, ' B'] | None,
  places: Places | None,
  times_BL: Float[Array, 'B L'] | None,
) -> Chunk:
  """Finds when samples begin and end, as one chunk.

  Args:
    shape: B and L.
    elapsed_B: time before them; None for 0.
    places: see `hippo_memory`.
    times_BL: see `hippo_memory`.

  Returns:
    Arrays whose axis B has size 1 if all rows are alike.
  """
  batch, length = shape
  if places is None:
    rows = 1 if elapsed_B is None and times_BL is None else batch
    is_token_BL = jnp.ones((rows, length), bool)
    begins_BL = ~is_token_BL
  else:
    rows, is_token_BL = batch, places.number_BL > 0
    begins_BL = is_token_BL & (places.position_BL == 0)
  if elapsed_B is None:
    dtype = jnp.int32 if times_BL is None else times_BL.dtype
    elapsed_B = jnp.zeros(rows, dtype)
  if times_BL is None and places is None:
    times_BL = elapsed_B[:, None] + jnp.arange(1, length + 1)
  elif times_BL is None:
    times_BL = places.position_BL + 1
  dtype = jnp.result_type(elapsed_B, times_BL)
  elapsed_B, times_BL = elapsed_B.astype(dtype), times_BL.astype(dtype)
  # At padding the time of the last sample: its place is the largest so far.
  place_BL = jnp.where(is_token_BL, jnp.arange(1, length + 1), 0)
  place_BL = jax.lax.cummax(place_BL, axis=1)
  times_BL = jnp.concatenate([elapsed_B[:, None], times_BL], axis=1)
  until_BL = jnp.take_along_axis(times_BL, place_BL, axis=1)
  since_BL = jnp.concatenate([elapsed_B[:, None], until_BL[:, :-1]], axis=1)
  since_BL = jnp.where(begins_BL, 0, since_BL)
  return Chunk(since_BL, until_BL, elapsed_B, is_token_BL, begins_BL)


def in_chunks(tree: Any, chunk: int) -> Any:
  """Cuts arrays `[B, L, ...]` into `[L / C, B, C, ...]`, zeros at the end.

  Args:
    tree: of arrays.
    chunk: C.
  """

  def cut(x):
    padding = [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

  return jax.tree.map(cut, tree)


def cut_times(whole: Chunk, chunk: int) -> Chunk:
  """Cuts the places of rows into chunks, padded at the end.

  Args:
    whole: of shape `[B, L]`.
    chunk: C.

  Returns:
    Arrays `[L / C, B, C]`, and `[L / C, B]` for the time before each.
  """
  end_B1 = whole.until_BC[:, -1:]
  since, until, is_token, begins = (
    in_chunks(x, chunk)
    for x in (
      _prolonged(whole.since_BC, end_B1, chunk),
      _prolonged(whole.until_BC, end_B1, chunk),
      whole.is_token_BC,
      whole.begins_BC,
    )
  )
  elapsed = jnp.concatenate([whole.elapsed_B[None], until[:-1, :, -1]])
  return Chunk(since, until, elapsed, is_token, begins)


def _prolonged(x_BL, end_B1, chunk):
  """Returns times with the last one repeated up to whole chunks."""
  end_BC = jnp.repeat(end_B1, -x_BL.shape[1] % chunk, axis=1)
  return jnp.concatenate([x_BL, end_BC], axis=1)
