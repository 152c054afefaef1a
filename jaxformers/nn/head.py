"""From vectors to logits over the vocabulary."""

import flax.linen as nn
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from jaxformers.nn.init import Initializer
from jaxformers.nn.init import VarianceScaling


class TiedHead(nn.Module):
  """Scores each token by the product with its embedding.

  Source: Press and Wolf, "Using the Output Embedding to Improve Language
  Models", 2016, arXiv 1608.05859, section 3.

  Attributes:
    use_bias: whether a bias per token is added.
  """

  use_bias: bool = False

  @nn.compact
  def __call__(
    self, x_BLD: Float[Array, '*B D'], table_VD: Float[Array, 'V D']
  ) -> Float[Array, '*B V']:
    """Returns float32 logits."""
    return _logits(self, x_BLD, table_VD.T)


class Head(nn.Module):
  """Scores tokens by a linear map of its own.

  Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762,
  figure 1.

  Attributes:
    use_bias: whether a bias per token is added.
    initializer: how the map begins.
  """

  use_bias: bool = False
  initializer: Initializer = VarianceScaling()

  @nn.compact
  def __call__(
    self, x_BLD: Float[Array, '*B D'], table_VD: Float[Array, 'V D']
  ) -> Float[Array, '*B V']:
    """Returns float32 logits; of the table it takes the shape only."""
    init = self.initializer(in_axis=0, out_axis=1)
    return _logits(self, x_BLD, self.param('w_DV', init, table_VD.shape[::-1]))


def _logits(module, x_BLD, w_DV):
  accumulator = jnp.promote_types(x_BLD.dtype, jnp.float32)
  logits_BLV = jnp.dot(
    x_BLD, w_DV.astype(x_BLD.dtype), preferred_element_type=accumulator
  )
  if module.use_bias:
    b_V = module.param('b_V', nn.initializers.zeros, w_DV.shape[1:])
    logits_BLV = logits_BLV + b_V
  return logits_BLV
