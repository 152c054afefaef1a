"""What stands between tokens: the contract of all sequence mixers."""

from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxformers.ops import segments
from jaxformers.ops.attention_diagnostics import attention_diagnostics

State = Any
"""A pytree of arrays whose leading axis is the batch; what it holds is the
mixer's own business."""


@runtime_checkable
class Mixer(Protocol):
  """A layer that moves information between the tokens of a sequence.

  One call serves training, segment recurrence, prefill and decoding. With
  `state=None` a fresh sequence begins and nothing is carried: the second result
  is None. With a state any number of tokens may be fed, and feeding a sequence
  in any pieces gives what feeding it whole gives. Positions count from the
  state.

  Side outputs go through `self.sow` into the collections `losses` (scalars to
  be minimised) and `diagnostics` (`sow_attention`); statistics that change while
  training live in the collection `statistics`.
  """

  @property
  def causal(self) -> bool:
    """Whether no output depends on a later input; only then is there a state."""
    ...

  def __call__(
    self,
    x_BLD: Float[Array, 'B L D'],
    state: State | None = None,
    *,
    segments_BL: Int[Array, 'B L'] | None = None,
    deterministic: bool = True,
  ) -> tuple[Float[Array, 'B L D'], State | None]:
    """Mixes.

    Args:
      x_BLD: one vector per token.
      state: what earlier calls returned, or `initial_state`.
      segments_BL: packing ids, 0 for padding; None for one segment, number 1.
        Tokens see their own segment only; padding leaves the state alone, and
        what comes out at it is of no meaning, but finite.
      deterministic: False where dropout and other noise shall act.

    Returns:
      Vectors like `x_BLD`, and the new state, or None if none was given.
    """
    ...

  def initial_state(
    self, batch_size: int, max_length: int, width: int, dtype: Any
  ) -> State:
    """Returns the state of rows of which nothing has been read.

    Args:
      batch_size: number of rows B.
      max_length: how many tokens a row may get in all.
      width: D, the width of the input.
      dtype: of the activations.
    """
    ...


def require_causal(mixer: Mixer) -> None:
  """Raises unless the mixer is causal, for those who want a state of it."""
  if not mixer.causal:
    raise ValueError(
      f'{type(mixer).__name__} sees tokens that come later, so it has no '
      'state and cannot read a sequence in pieces; give it a causal mask, or '
      'feed whole sequences with state=None.'
    )


def locate(
  shape: tuple[int, int],
  cursor: segments.Cursor | None,
  segments_BL: Int[Array, 'B L'] | None,
) -> tuple[segments.Places | None, segments.Cursor | None]:
  """Finds where the tokens of a call stand.

  Args:
    shape: B and L.
    cursor: of the state; None without a state.
    segments_BL: packing ids, as the mixer got them.

  Returns:
    Their places, None for a single segment from position 0; and the next
    cursor, of no meaning without a state.
  """
  if cursor is None and segments_BL is None:
    return None, None
  cursor = segments.start(shape[0]) if cursor is None else cursor
  if segments_BL is None:
    segments_BL = jnp.ones(shape, jnp.int32)
  return segments.advance(cursor, segments_BL)


def head_width(num_heads: int, head_dim: int | None, width: int) -> int:
  """Returns the width of each head: what is said, or an equal share.

  Args:
    num_heads: H.
    head_dim: K; None for a share.
    width: D, which is shared out.

  Raises:
    ValueError: if there is no head, or no equal share.
  """
  if num_heads < 1:
    raise ValueError(f'a mixer needs num_heads >= 1, got {num_heads}.')
  if head_dim is None and width % num_heads:
    raise ValueError(
      f'width {width} does not divide into {num_heads} heads; choose a '
      'num_heads that divides it, or set head_dim.'
    )
  return head_dim or width // num_heads


def sow_attention(
  mixer: nn.Module,
  query_BLHK: Float[Array, 'B L H K'],
  key_BMGK: Float[Array, 'B M G K'],
  **options: Any,
) -> None:
  """Leaves measures of the mixer's attention, if anyone asked for them.

  They go to the collection `diagnostics`, named `attention`. Nothing is computed
  unless that collection is mutable, as it is under
  `jaxformers.diagnostics.attention_report`.

  Args:
    mixer: a bound module.
    query_BLHK: as for `jaxformers.ops.attend`.
    key_BMGK: as for `jaxformers.ops.attend`.
    **options: as for `jaxformers.ops.attention_diagnostics`.
  """
  asked = mixer.is_mutable_collection('diagnostics')
  if asked and not mixer.is_initializing():
    measures = attention_diagnostics(query_BLHK, key_BMGK, **options)
    mixer.sow('diagnostics', 'attention', measures)
