"""Where the tokens of packed and padded streams stand.

A row of a batch is a stream of segments (documents), each a run of tokens with
one id, with padding (id 0) anywhere. The stream may arrive in pieces of any
length; a `Cursor` carries what the next piece needs to know.
"""

from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Int


class Cursor(NamedTuple):
  """How far each row of a stream has been read.

  Attributes:
    segment_B: int32 `[B]`, id of the segment that the last token belonged to;
      0 before the first token.
    number_B: int32 `[B]`, how many segments have begun.
    position_B: int32 `[B]`, position of the last token within its segment;
      -1 before the first token.
  """

  segment_B: Int[Array, ' B']
  number_B: Int[Array, ' B']
  position_B: Int[Array, ' B']


class Places(NamedTuple):
  """Where the tokens of one piece of a stream stand.

  Attributes:
    position_BL: int32 `[B, L]`, counted from 0 in each segment; meaningless at
      padding.
    number_BL: int32 `[B, L]`, running number 1, 2, ... of the segment within
      the whole row; 0 at padding. Unlike ids it never comes twice in a row.
  """

  position_BL: Int[Array, 'B L']
  number_BL: Int[Array, 'B L']


def start(batch_size: int) -> Cursor:
  """Returns the cursor of rows of which nothing has been read."""
  # Three arrays of their own: a donated state must not hold one buffer twice.
  return Cursor(
    jnp.zeros(batch_size, jnp.int32),
    jnp.zeros(batch_size, jnp.int32),
    jnp.full(batch_size, -1, jnp.int32),
  )


def advance(
  cursor: Cursor, segments_BL: Int[Array, 'B L']
) -> tuple[Places, Cursor]:
  """Finds position and running number of each token, and the next cursor.

  A token continues its predecessor's segment if both have the same id; padding
  between them does not count. Any way of cutting a stream into pieces gives
  the same places.

  Args:
    cursor: where the rows stand before this piece.
    segments_BL: int `[B, L]`, segment id of each token, 0 for padding.
  """
  is_token = segments_BL != 0
  before_BL = _previous_token(cursor.segment_B, segments_BL)
  begins = is_token & (segments_BL != before_BL)
  number_BL = cursor.number_B[:, None] + jnp.cumsum(begins, 1, jnp.int32)
  # Rank among the tokens of this piece, counted so that a segment carried over
  # from the last piece began at -(position + 1).
  rank_BL = jnp.cumsum(is_token, 1, jnp.int32) - 1
  carried_B1 = -(cursor.position_B[:, None] + 1)
  begin_BL = jax.lax.cummax(jnp.where(begins, rank_BL, carried_B1), axis=1)
  position_BL = rank_BL - begin_BL
  places = Places(position_BL, jnp.where(is_token, number_BL, 0))
  last_B = _previous_token(cursor.segment_B, segments_BL, inclusive=True)[:, -1]
  return places, Cursor(last_B, number_BL[:, -1], position_BL[:, -1])


def _previous_token(segment_B, segments_BL, *, inclusive=False):
  """Returns the id of the nearest token before each place (or at it)."""
  length = segments_BL.shape[1]
  index_BL = jnp.where(segments_BL != 0, jnp.arange(1, length + 1), 0)
  nearest_BL = jax.lax.cummax(index_BL, axis=1)
  if not inclusive:
    nearest_BL = jnp.pad(nearest_BL, ((0, 0), (1, 0)))[:, :-1]
  ids_BL = jnp.concatenate([segment_B[:, None], segments_BL], axis=1)
  return jnp.take_along_axis(ids_BL, nearest_BL, axis=1)
