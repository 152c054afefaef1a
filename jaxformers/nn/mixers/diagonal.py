"""What mixers over diagonal systems have in common."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float, Inexact, Int

from jaxformers.nn.mixers.base import locate
from jaxformers.nn.placement import on_shares
from jaxformers.ops import segments
from jaxformers.ops.diagonal import DiagonalOutput
from jaxformers.ops.diagonal import diagonal_system


class DiagonalState(NamedTuple):
  """What a diagonal system has read so far, in constant space.

  Attributes:
    parts: real and imaginary part of the states, or the real part alone.
    cursor: where the rows stand.
  """

  parts: tuple[Float[Array, 'B S'], ...]
  cursor: segments.Cursor


def fresh(
  batch_size: int, size: int, dtype: Any, *, is_real: bool = False
) -> DiagonalState:
  """Returns the state of rows of which nothing has been read.

  Args:
    batch_size: number of rows B.
    size: number of states S.
    dtype: of the activations; states have at least float32.
    is_real: whether there are no imaginary parts.
  """
  dtype = jnp.promote_types(dtype, jnp.float32)
  count = 1 if is_real else 2
  # Arrays of their own: a donated state must not hold one buffer twice.
  parts = tuple(jnp.zeros((batch_size, size), dtype) for _ in range(count))
  return DiagonalState(parts, segments.start(batch_size))


def joined(state: DiagonalState | None) -> Inexact[Array, 'B S'] | None:
  """Returns the states as numbers, None for no state."""
  if state is None:
    return None
  return (
    state.parts[0] if len(state.parts) == 1 else jax.lax.complex(*state.parts)
  )


def follows(
  state: DiagonalState | None,
  last_BS: Inexact[Array, 'B S'],
  cursor: segments.Cursor | None,
) -> DiagonalState | None:
  """Returns the next state, None if there was none."""
  if state is None:
    return None
  is_complex = jnp.iscomplexobj(last_BS)
  parts = (last_BS.real, last_BS.imag) if is_complex else (last_BS,)
  return DiagonalState(parts, cursor)


class Reading(NamedTuple):
  """What padding and packing mean to a recurrence.

  Attributes:
    x_BLD: the input, 0 at padding.
    reset: where segments begin; None for nowhere.
    skip: where padding stands; None for nowhere.
    cursor: of the next state.
  """

  x_BLD: Float[Array, 'B L D']
  reset: Bool[Array, 'B L'] | None
  skip: Bool[Array, 'B L'] | None
  cursor: segments.Cursor | None


def read(
  x_BLD: Float[Array, 'B L D'],
  cursor: segments.Cursor | None,
  segments_BL: Int[Array, 'B L'] | None,
) -> Reading:
  """Finds where segments begin and padding stands.

  Args:
    x_BLD: the input of a mixer.
    cursor: of its state; None without a state.
    segments_BL: packing ids, as the mixer got them.
  """
  places, cursor = locate(x_BLD.shape[:2], cursor, segments_BL)
  if places is None:
    return Reading(x_BLD, None, None, cursor)
  skip = places.number_BL == 0
  reset = (places.position_BL == 0) & ~skip
  return Reading(jnp.where(skip[..., None], 0, x_BLD), reset, skip, cursor)


def run(
  reading: Reading,
  decay_S: Inexact[Array, ' S'],
  in_DS: Inexact[Array, 'D S'],
  outs: list[Inexact[Array, 'S D']],
  state: DiagonalState | None,
  segments_BL: Int[Array, 'B L'] | None,
  **options: Any,
) -> DiagonalOutput:
  """Runs a diagonal system from the start, and perhaps another from the end.

  Args:
    reading: the input.
    decay_S: of both.
    in_DS: of both.
    outs: the readout from the start, and the one from the end if there is one.
    state: before the first token; None for nothing read.
    segments_BL: packing ids, as the mixer got them.
    **options: see `jaxformers.ops.linear_recurrence`.
  """
  recur = on_shares(diagonal_system, 'BLD S DS SD BS', 'BLD BS')
  x_BLD, options = reading.x_BLD, {'skip': reading.skip, **options}
  y_BLD, last_BS = recur(
    x_BLD,
    decay_S,
    in_DS,
    outs[0],
    joined(state),
    reset=reading.reset,
    **options,
  )
  for out_SD in outs[1:]:
    back = {'reset': ends(segments_BL), 'reverse': True, **options}
    y_BLD += recur(x_BLD, decay_S, in_DS, out_SD, None, **back)[0]
  return DiagonalOutput(y_BLD, last_BS)


def sow_decay(mixer: nn.Module, decay_S: Inexact[Array, ' S']) -> None:
  """Leaves the size of the largest decay, if anyone asked for it.

  It goes to the collection `decays`, see `jaxformers.diagnostics.decay_report`.

  Args:
    mixer: a bound module, whose decays may be larger than 1.
    decay_S: its decays.
  """
  if mixer.is_mutable_collection('decays') and not mixer.is_initializing():
    mixer.sow('decays', 'largest_decay', jnp.abs(decay_S).max())


def ends(segments_BL: Int[Array, 'B L'] | None) -> Bool[Array, 'B L'] | None:
  """Returns where segments end; None for a single one."""
  if segments_BL is None:
    return None
  start = segments.start(segments_BL.shape[0])
  places, _ = segments.advance(start, segments_BL[:, ::-1])
  return ((places.position_BL == 0) & (places.number_BL != 0))[:, ::-1]
