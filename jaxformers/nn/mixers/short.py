"""A short causal convolution as a part of mixers."""

import flax.linen as nn
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from jaxformers.nn.init import Initializer
from jaxformers.nn.init import VarianceScaling
from jaxformers.nn.placement import on_shares
from jaxformers.ops.recurrence import ShortConvolved
from jaxformers.ops.recurrence import short_convolution
from jaxformers.ops.segments import Places


def tokens_only(
  x_BLD: Float[Array, 'B L D'], places: Places | None
) -> Float[Array, 'B L D']:
  """Puts out what stands at padding, so that all that follows is finite.

  Source: none.

  Args:
    x_BLD: input of a mixer.
    places: where its tokens stand; None if there is no padding.
  """
  if places is None:
    return x_BLD
  return jnp.where(places.number_BL[..., None] != 0, x_BLD, 0)


class ShortConvolution(nn.Module):
  """Mixes each token with the few before it, channel by channel.

  Source: Gu and Dao, "Mamba", 2023, arXiv 2312.00752, section 3.4.

  Attributes:
    taps: W, how many tokens are mixed.
    use_bias: whether a bias is added.
    initializer: how the weights begin, W of which are added up.
    bias_initializer: how the bias begins, as if it were one more of them.
  """

  taps: int
  use_bias: bool = True
  initializer: Initializer = VarianceScaling()
  bias_initializer: Initializer | None = None

  @nn.compact
  def __call__(
    self,
    x_BLF: Float[Array, 'B L F'],
    buffer_BNF: Float[Array, 'B N F'] | None = None,
    *,
    places: Places | None = None,
  ) -> ShortConvolved:
    shape = self.taps, x_BLF.shape[-1]
    weight_WF = self.param('w_WF', self.initializer(0, 1), shape)
    bias_F = None
    if self.use_bias:
      bias_F = self.param('b_F', self._bias, shape)
    convolve = on_shares(short_convolution, 'BLF WF F BNF', 'BLF BNF')
    return ShortConvolved(
      *convolve(x_BLF, weight_WF, bias_F, buffer_BNF, places=places)
    )

  def _bias(self, key, shape):
    if self.bias_initializer is None:
      return jnp.zeros(shape[1:])
    return self.bias_initializer(0, 1)(key, shape)[0]
