"""Absolute positions: vectors that are added to embeddings."""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Hierarchical:
  """Reads a position as two digits, to reach N^2 positions with N vectors.

  With `x = p // N`, `y = p mod N` and vectors P, the code of position p is
  `alpha u_x + (1 - alpha) u_y`, `u = (P - alpha P_0) / (1 - alpha)`, which is
  `P_y + alpha / (1 - alpha) (P_x - P_0)`: exactly P_p below N. Nothing is
  learned anew, so that a trained table serves longer inputs at once.

  Source: Su Jianlin, "Hierarchical decomposition of position codes", 2020,
  https://kexue.fm/archives/7947.

  Attributes:
    alpha: between 0 and 1, how much the slow digit weighs; 0.4 as in
      bert4keras. With 0.5 the digits could not be told apart.
  """

  alpha: float = 0.4

  def __post_init__(self):
    if not 0 < self.alpha < 1 or self.alpha == 0.5:
      raise ValueError(
        'Hierarchical needs 0 < alpha < 1 and not 0.5, which would give '
        f'swapped digits one code; got {self.alpha}.'
      )

  def reach(self, max_length: int) -> int:
    """Returns the number of positions that `max_length` vectors reach."""
    return max_length**2

  def codes(
    self, table_LD: Float[Array, 'N D'], position_BL: Int[Array, 'B L']
  ) -> Float[Array, 'B L D']:
    """Returns the codes of positions; nan beyond the reach."""
    slow_BL, quick_BL = jnp.divmod(position_BL, table_LD.shape[0])
    weight = self.alpha / (1 - self.alpha)
    slow_BLD = _rows(table_LD, slow_BL) - table_LD[0]
    return _rows(table_LD, quick_BL) + weight * slow_BLD


class Learned(nn.Module):
  """Codes each position by a learned vector.

  Source: Gehring et al., "Convolutional Sequence to Sequence Learning", 2017,
  arXiv 1705.03122, section 3.1; initialised as in Devlin et al., "BERT", 2018.

  Attributes:
    max_length: number of vectors; an input that has more positions than they
      reach is an error.
    initializer: how the table begins.
    extension: how the vectors reach further, such as `Hierarchical()`; it may
      be added after training. None for one position each.
  """

  max_length: int
  initializer: Initializer = Normal(0.02)
  extension: Hierarchical | None = None

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
    if self.extension is not None:
      return self.extension.codes(table_LD, position_BL)
    return _rows(table_LD, position_BL)


def _rows(table_LD, position_BL):
  # A plain gather would clamp; nan shows a position that only running knows.
  return table_LD.at[position_BL].get(mode='fill', fill_value=jnp.nan)


def check_length(position: nn.Module | None, length: int) -> None:
  """Raises if a position module has fewer positions than `length`."""
  limit = getattr(position, 'max_length', None)
  extension = getattr(position, 'extension', None)
  if limit is not None and extension is not None:
    limit = extension.reach(limit)
  if limit is not None and length > limit:
    raise ValueError(
      f'{length} tokens, but {type(position).__name__} has {limit} '
      'positions; raise its max_length or shorten the input.'
    )
