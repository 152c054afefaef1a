"""A model of token sequences, read from left to right."""

from typing import Any, NamedTuple

import flax.linen as nn
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxformers.nn.depth import Stack
from jaxformers.nn.embed import Embed
from jaxformers.nn.head import TiedHead
from jaxformers.nn.norm import RMSNorm
from jaxformers.nn.position import check_length
from jaxformers.ops import segments


class LanguageModelState(NamedTuple):
  """What a language model carries from one piece of text to the next.

  Attributes:
    layers: the states of the stack.
    cursor: where the rows stand.
  """

  layers: Any
  cursor: segments.Cursor


class LanguageModel(nn.Module):
  """Embeds tokens, runs a stack of layers, scores the next token.

  Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762
  (decoder); Radford et al., "Improving Language Understanding by Generative
  Pre-Training", 2018 (decoder alone).

  Attributes:
    vocab_size: V.
    width: D.
    stack: the layers.
    embed: from ids to vectors.
    position: absolute positions that are added to the vectors, such as
      `Sinusoidal()`; None where layers know positions themselves.
    norm: applied before the head; None for none, as after `PostNorm` layers.
    head: from vectors to logits.
    dropout: probability of dropping a number of the embedded input.
    dtype: of the activations and products; parameters are float32, and so are
      norms, softmax and logits.
  """

  vocab_size: int
  width: int
  stack: Stack
  embed: nn.Module = Embed()
  position: nn.Module | None = None
  norm: nn.Module | None = RMSNorm()
  head: nn.Module = TiedHead()
  dropout: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    tokens_BL: Int[Array, 'B L'],
    state: LanguageModelState | None = None,
    *,
    segments_BL: Int[Array, 'B L'] | None = None,
    deterministic: bool = True,
  ) -> tuple[Float[Array, 'B L V'], LanguageModelState | None]:
    """Scores, after each token, what comes next.

    Args:
      tokens_BL: int `[B, L]`.
      state: what an earlier call returned, or `initial_state`; None for a fresh
        sequence of which nothing is carried.
      segments_BL: packing ids, 0 for padding; None for one segment.
      deterministic: False where dropout shall act; then pass
        `rngs={'dropout': key}`.

    Returns:
      float32 logits `[B, L, V]`, and the new state, or None if none was given.
    """
    x_BLD, table_VD = self.embed(tokens_BL, self.vocab_size, self.width)
    layers = cursor = None
    if state is not None:
      layers, cursor = state
    if self.position is not None or state is not None:
      position_BL, cursor = _positions(cursor, tokens_BL, segments_BL)
    if self.position is not None:
      x_BLD = x_BLD + self.position(position_BL, self.width)
    x_BLD = x_BLD.astype(self.dtype)
    x_BLD = nn.Dropout(self.dropout, deterministic=deterministic)(x_BLD)
    x_BLD, layers = self.stack(
      x_BLD, layers, segments_BL=segments_BL, deterministic=deterministic
    )
    if self.norm is not None:
      x_BLD = self.norm(x_BLD)
    logits_BLV = self.head(x_BLD, table_VD)
    return logits_BLV, state and LanguageModelState(layers, cursor)

  def initial_state(
    self, batch_size: int, max_length: int
  ) -> LanguageModelState:
    """Returns the state of rows of which nothing has been read.

    Args:
      batch_size: number of rows.
      max_length: how many tokens a row may get in all.

    Raises:
      ValueError: if a layer is not causal, or there are fewer positions.
    """
    check_length(self.position, max_length)
    layers = self.stack.initial_state(
      batch_size, max_length, self.width, self.dtype
    )
    return LanguageModelState(layers, segments.start(batch_size))


def _positions(cursor, tokens_BL, segments_BL):
  if cursor is None:
    cursor = segments.start(tokens_BL.shape[0])
  if segments_BL is None:
    segments_BL = jnp.ones(tokens_BL.shape, jnp.int32)
  places, cursor = segments.advance(cursor, segments_BL)
  return places.position_BL, cursor
