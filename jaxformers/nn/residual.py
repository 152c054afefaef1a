"""How the output of a layer joins its input."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
from jax import Array
from jaxtyping import Float

from jaxformers.nn.norm import RMSNorm

Branch = Callable[[Float[Array, 'B L D']], tuple[Float[Array, 'B L D'], Any]]


@runtime_checkable
class Residual(Protocol):
  """Owns the norm and the skip connection around a branch.

  The branch returns `(y, aux)`, as a mixer returns its output and its state;
  `aux` passes through untouched, so that state never hides in a closure.
  """

  def __call__(
    self, x_BLD: Float[Array, 'B L D'], branch: Branch
  ) -> tuple[Float[Array, 'B L D'], Any]: ...


class PreNorm(nn.Module):
  """`x + branch(norm(x))`: the skip path is never normalised.

  Source: Xiong et al., "On Layer Normalization in the Transformer
  Architecture", 2020, arXiv 2002.04745, figure 1b.

  Attributes:
    norm: the norm.
  """

  norm: nn.Module = RMSNorm()

  @nn.compact
  def __call__(self, x_BLD, branch):
    y_BLD, aux = branch(self.norm(x_BLD))
    return x_BLD + y_BLD, aux


class PostNorm(nn.Module):
  """`norm(x + branch(x))`: the original arrangement, which needs warm-up.

  Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762,
  section 3.1.

  Attributes:
    norm: the norm.
  """

  norm: nn.Module = RMSNorm()

  @nn.compact
  def __call__(self, x_BLD, branch):
    y_BLD, aux = branch(x_BLD)
    return self.norm(x_BLD + y_BLD), aux
