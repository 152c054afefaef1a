"""Layers that work on each token alone."""

import flax.linen as nn
from jax import Array
from jaxtyping import Float

from jaxformers.nn.init import Initializer
from jaxformers.nn.init import VarianceScaling
from jaxformers.nn.linear import Linear
from jaxformers.ops.activations import activation


class FeedForward(nn.Module):
  """A perceptron with one hidden layer: `f(x W_in) W_out`.

  Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762,
  equation 2.

  Attributes:
    hidden: width F of the hidden layer.
    activation: name of f, see `jaxformers.ops.activations`.
    use_bias: whether both maps have biases.
    initializer: how `W_in` and `W_out` begin.
  """

  hidden: int
  activation: str = 'gelu'
  use_bias: bool = False
  initializer: Initializer = VarianceScaling()

  @nn.compact
  def __call__(self, x_BLD: Float[Array, '*B D']) -> Float[Array, '*B D']:
    linear = _linears(self)
    h_BLF = activation(self.activation)(linear('in', 'DF', self.hidden)(x_BLD))
    return linear('out', 'FD', x_BLD.shape[-1])(h_BLF)


class GatedFeedForward(nn.Module):
  """A perceptron with a gate: `(f(x W_gate) * x W_in) W_out`.

  With `'silu'` this is SwiGLU. It has three maps: at `hidden = 8/3 D` it is
  about as large as `FeedForward` at `hidden = 4 D`.

  Source: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv 2002.05202,
  equation 6.

  Attributes:
    hidden: width F of the hidden layer.
    activation: name of f, see `jaxformers.ops.activations`.
    use_bias: whether the three maps have biases.
    initializer: how they begin.
  """

  hidden: int
  activation: str = 'silu'
  use_bias: bool = False
  initializer: Initializer = VarianceScaling()

  @nn.compact
  def __call__(self, x_BLD: Float[Array, '*B D']) -> Float[Array, '*B D']:
    linear = _linears(self)
    gate_BLF = linear('gate', 'DF', self.hidden)(x_BLD)
    h_BLF = linear('in', 'DF', self.hidden)(x_BLD)
    h_BLF = activation(self.activation)(gate_BLF) * h_BLF
    return linear('out', 'FD', x_BLD.shape[-1])(h_BLF)


def _linears(module):
  """Returns a maker of the linear maps of `module`."""
  return lambda name, letters, features: Linear(
    letters, (features,), module.use_bias, module.initializer, name=name
  )
