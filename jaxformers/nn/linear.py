"""The linear map that every layer is made of."""

import math

import flax.linen as nn
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from jaxformers.nn.init import Initializer
from jaxformers.nn.init import VarianceScaling


class Linear(nn.Module):
  """Maps the last axes of its input linearly to new axes, named by letters.

  `Linear('DHK', (H, K))` maps `[..., D]` to `[..., H, K]` by a parameter
  `w_DHK`; `Linear('HKD', (D,))` maps `[..., H, K]` back by `w_HKD`. The letters
  are what the sharding table reads. Parameters are float32; the product runs in
  the dtype of the input.

  Attributes:
    letters: one capital letter per axis of the parameter, none twice.
    features: sizes of the output axes.
    use_bias: whether a bias, zero at first, is added.
    initializer: how the parameter begins.
  """

  letters: str
  features: tuple[int, ...]
  use_bias: bool = False
  initializer: Initializer = VarianceScaling()

  @nn.compact
  def __call__(self, x: Float[Array, '...']) -> Float[Array, '...']:
    ins = len(self.letters) - len(self.features)
    axes = tuple(range(len(self.letters)))
    shape = (*x.shape[-ins:], *self.features)
    w = self.param(
      f'w_{self.letters}', self.initializer(axes[:ins], axes[ins:]), shape
    )
    # One matrix product, whatever the axes: CPU and TPU compilers do best so.
    flat = x.reshape(*x.shape[:-ins], math.prod(shape[:ins]))
    w = w.astype(x.dtype).reshape(flat.shape[-1], math.prod(self.features))
    y = jnp.dot(flat, w).reshape(*x.shape[:-ins], *self.features)
    if self.use_bias:
      name = f'b_{self.letters[ins:]}'
      b = self.param(name, nn.initializers.zeros, self.features)
      y = y + b.astype(y.dtype)
    return y
