"""From token ids to vectors."""

import math

import flax.linen as nn
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxformers.nn.init import Initializer
from jaxformers.nn.init import Normal
from jaxformers.nn.placement import LOOKED_UP_RULES
from jaxformers.nn.placement import place


class Embed(nn.Module):
  """Looks up a learned vector per token.

  Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762,
  section 3.4.

  Attributes:
    scale_by_width: whether vectors are multiplied by the square root of D, as
      in the source.
    initializer: how the table begins.
  """

  scale_by_width: bool = False
  initializer: Initializer = Normal(0.02)

  @nn.compact
  def __call__(
    self, tokens_BL: Int[Array, 'B L'], vocab_size: int, width: int
  ) -> tuple[Float[Array, 'B L D'], Float[Array, 'V D']]:
    """Returns the vectors, and the table for a head that shares it."""
    table_VD = self.param(
      'table_VD', self.initializer(in_axis=0, out_axis=1), (vocab_size, width)
    )
    # 'fill' makes an id outside the table nan instead of its nearest row.
    x_BLD = table_VD.at[tokens_BL].get(mode='fill', fill_value=jnp.nan)
    x_BLD = place(place(x_BLD, 'BLD', LOOKED_UP_RULES), 'BLD')
    if self.scale_by_width:
      x_BLD = x_BLD * math.sqrt(width)
    return x_BLD, table_VD
