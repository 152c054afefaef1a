"""How parameters begin.

An initialiser knows its rule; the layer that calls it knows which axes of its
parameter are inputs and which are outputs.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp


@runtime_checkable
class Initializer(Protocol):
  """A rule for the first values of a parameter."""

  def __call__(
    self, in_axis: int | Sequence[int], out_axis: int | Sequence[int]
  ) -> Callable[..., jax.Array]:
    """Returns a function `(key, shape, dtype) -> array`.

    Args:
      in_axis: the axes that a product with the parameter sums over.
      out_axis: the axes that remain.
    """
    ...


@dataclasses.dataclass(frozen=True)
class VarianceScaling:
  """Draws with variance `scale / fan`; the default is LeCun's rule.

  Source: LeCun et al., "Efficient BackProp", 1998, section 4.6 (fan_in);
  Glorot and Bengio, 2010, equation 16 (fan_avg).

  Attributes:
    scale: 1 keeps the variance of activations through a linear layer.
    mode: which fan divides.
    distribution: a truncated normal is cut at two standard deviations and
      widened so that its variance is as asked.
  """

  scale: float = 1.0
  mode: Literal['fan_in', 'fan_out', 'fan_avg'] = 'fan_in'
  distribution: Literal['truncated_normal', 'normal', 'uniform'] = (
    'truncated_normal'
  )

  def __call__(self, in_axis, out_axis):
    return jax.nn.initializers.variance_scaling(
      self.scale, self.mode, self.distribution, in_axis, out_axis
    )


@dataclasses.dataclass(frozen=True)
class Normal:
  """Draws from a normal distribution of mean 0, whatever the shape.

  Source: Radford et al., "Improving Language Understanding by Generative
  Pre-Training", 2018, section 4.1 (0.02).

  Attributes:
    stddev: standard deviation.
  """

  stddev: float = 0.02

  def __call__(self, in_axis, out_axis):
    del in_axis, out_axis
    return jax.nn.initializers.normal(self.stddev)


TORCH = VarianceScaling(1 / 3, 'fan_in', 'uniform')
"""PyTorch's default: uniform within one over the root of the fan."""


def softplus_steps(
  key: jax.Array,
  shape: Sequence[int],
  step_range: tuple[float, float],
  floor: float,
) -> jax.Array:
  """Draws what a softplus makes random step sizes of.

  Source: Gu and Dao, "Mamba", 2023, arXiv 2312.00752, section 3.6.

  Args:
    key: randomness.
    shape: of the result.
    step_range: steps are uniform in their logarithm within this.
    floor: smaller steps become this.
  """
  low, high = map(math.log, step_range)
  steps = jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))
  steps = jnp.maximum(steps, floor)
  return steps + jnp.log(-jnp.expm1(-steps))
