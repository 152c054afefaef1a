"""Absolute positions: vectors that are added to embeddings."""

from typing import Literal

import flax.linen as nn
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxformers.nn.init import Initializer
from jaxformers.nn.init import Normal
from jaxformers.ops import positions


class Sinusoidal(nn.Module):
  """Codes positions by sines and cosines; nothing is learned.

  Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762,
  section 3.5.

  Attributes:
    base: see `jaxformers.ops.sinusoidal`, like all that follow.
    layout: order of sines and cosines.
    spacing: of the periods.
  """

  base: float = 10000.0
  layout: Literal['interleaved', 'concat'] = 'interleaved'
  spacing: Literal['paper', 't2t'] = 'paper'

  @property
  def max_length(self) -> None:
    return None

  @nn.compact
  def __call__(
    self, position_BL: Int[Array, 'B L'], width: int
  ) -> Float[Array, 'B L D']:
    return positions.sinusoidal(
      position_BL,
      width,
      base=self.base,
      layout=self.layout,
      spacing=self.spacing,
    )


class Learned(nn.Module):
  """Codes each position by a learned vector.

  Source: Gehring et al., "Convolutional Sequence to Sequence Learning", 2017,
  arXiv 1705.03122, section 3.1; initialised as in Devlin et al., "BERT", 2018.

  Attributes:
    max_length: number of positions; a longer input is an error.
    initializer: how the table begins.
  """

  max_length: int
  initializer: Initializer = Normal(0.02)

  @nn.compact
  def __call__(
    self, position_BL: Int[Array, 'B L'], width: int
  ) -> Float[Array, 'B L D']:
    check_length(self, position_BL.shape[-1])
    table_LD = self.param(
      'table_LD',
      self.initializer(in_axis=0, out_axis=1),
      (self.max_length, width),
    )
    # A plain gather would clamp; nan shows a position that only running knows.
    return table_LD.at[position_BL].get(mode='fill', fill_value=jnp.nan)


def check_length(position: nn.Module | None, length: int) -> None:
  """Raises if a position module has fewer positions than `length`."""
  limit = getattr(position, 'max_length', None)
  if limit is not None and length > limit:
    raise ValueError(
      f'{length} tokens, but {type(position).__name__} has {limit} '
      'positions; raise its max_length or shorten the input.'
    )
