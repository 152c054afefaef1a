"""Normalisation layers."""

from typing import Literal

import flax.linen as nn
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from jaxformers.ops import norms


class RMSNorm(nn.Module):
  """Scales each feature vector to unit root mean square, times a learned gain.

  Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019,
  arXiv 1910.07467, equation 4.

  Attributes:
    eps: see `jaxformers.ops.rms_norm`.
    eps_on: see `jaxformers.ops.layer_norm`.
    use_scale: whether there is a gain.
  """

  eps: float = 1e-6
  eps_on: Literal['variance', 'deviation'] = 'variance'
  use_scale: bool = True

  @nn.compact
  def __call__(self, x_BLD: Float[Array, '*B D']) -> Float[Array, '*B D']:
    scale_D = None
    if self.use_scale:
      scale_D = self.param('scale_D', nn.initializers.ones, x_BLD.shape[-1:])
    return norms.rms_norm(x_BLD, scale_D, eps=self.eps, eps_on=self.eps_on)


class LayerNorm(nn.Module):
  """Shifts features to mean 0 and variance 1, then by learned gain and offset.

  Source: Ba et al., "Layer Normalization", 2016, arXiv 1607.06450, equation 4.

  Attributes:
    eps: see `jaxformers.ops.layer_norm`, like all that follow.
    eps_on: where eps is added.
    variance: biased or unbiased.
    use_scale: whether there is a gain.
    use_offset: whether there is an offset.
  """

  eps: float = 1e-6
  eps_on: Literal['variance', 'deviation'] = 'variance'
  variance: Literal['biased', 'unbiased'] = 'biased'
  use_scale: bool = True
  use_offset: bool = True

  @nn.compact
  def __call__(self, x_BLD: Float[Array, '*B D']) -> Float[Array, '*B D']:
    shape, scale_D, offset_D = x_BLD.shape[-1:], None, None
    if self.use_scale:
      scale_D = self.param('scale_D', nn.initializers.ones, shape)
    if self.use_offset:
      offset_D = self.param('offset_D', nn.initializers.zeros, shape)
    return norms.layer_norm(
      x_BLD,
      scale_D,
      offset_D,
      eps=self.eps,
      eps_on=self.eps_on,
      variance=self.variance,
    )


class UnitNorm(nn.Module):
  """Scales each feature vector to length 1, without parameters.

  `x / sqrt(sum(x^2) + eps)`. In the `qk_norm` slot of attention it turns scores
  into cosines, which need a multiplier well above 1:
  `scale=ConstantScale(cosine_optimal_scale(n, d))`, or one that is learned,
  `scale=LearnedCosineScale()`.

  Source: Henry et al., "Query-Key Normalization for Transformers", 2020, arXiv
  2010.04245, section 3.

  Attributes:
    eps: keeps the division finite at the zero vector.
  """

  eps: float = 1e-6

  @nn.compact
  def __call__(self, x_BLD: Float[Array, '*B D']) -> Float[Array, '*B D']:
    width = x_BLD.shape[-1]
    scale_D = jnp.full(width, width**-0.5)
    return norms.rms_norm(x_BLD, scale_D, eps=self.eps / width)
