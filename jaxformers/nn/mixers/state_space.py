"""What the state-space mixers share: their state and their parameters."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Complex, Float
import numpy as np

from jaxformers.ops import segments


class ModesState(NamedTuple):
  """What has been read so far, in constant space: complex modes, per channel.

  Attributes:
    real_BDS: real parts.
    imag_BDS: imaginary parts.
    cursor: where the rows stand.
  """

  real_BDS: Float[Array, 'B D S']
  imag_BDS: Float[Array, 'B D S']
  cursor: segments.Cursor

  @property
  def modes_BDS(self) -> Complex[Array, 'B D S']:
    """The modes."""
    return jax.lax.complex(self.real_BDS, self.imag_BDS)

  @classmethod
  def zeros(
    cls, batch_size: int, width: int, states: int, dtype: jnp.dtype
  ) -> 'ModesState':
    """Returns the state of rows of which nothing has been read."""
    dtype = jnp.promote_types(dtype, jnp.float32)
    shape = batch_size, width, states
    return cls(
      jnp.zeros(shape, dtype),
      jnp.zeros(shape, dtype),
      segments.start(batch_size),
    )


def widened(x_BLD: Float[Array, 'B L D']) -> Float[Array, 'B L D']:
  """Returns an input in at least float32, in which states are kept.

  Args:
    x_BLD: the input.
  """
  return x_BLD.astype(jnp.promote_types(x_BLD.dtype, jnp.float32))


def prepared(
  module: nn.Module, name: str, compute: Callable[[], Array]
) -> Array:
  """Returns what is made of parameters, once for many calls.

  A call with `mutable=['prepared']` returns, in that collection, what it has
  made; later calls that are given it, beside the parameters of which it was
  made, take it from there. `jaxformers.decode.generate` does so.

  Args:
    module: a bound module, whose parameters they are.
    name: of the variable.
    compute: makes it.
  """
  if module.has_variable('prepared', name):
    return module.get_variable('prepared', name)
  value = compute()
  if module.is_mutable_collection('prepared') and not module.is_initializing():
    module.put_variable('prepared', name, value)
  return value


def reversed_places(places: segments.Places | None) -> segments.Places | None:
  """Returns the places of rows that are read from their ends.

  Args:
    places: None for single segments.
  """
  if places is None:
    return None
  number_BL = places.number_BL[:, ::-1]
  return segments.advance(segments.start(len(number_BL)), number_BL)[0]


def stable_param(
  module: nn.Module,
  letters: str,
  eigenvalues: Complex[np.ndarray, '*S'],
  shape: tuple[int, ...],
) -> Complex[Array, '*S']:
  """Makes eigenvalues in the left half plane: `-exp(log_rate) + i frequency`.

  Args:
    module: a bound module, whose parameters they are.
    letters: of their axes.
    eigenvalues: what they begin as; broadcast to the shape. Real parts are at
      most -1e-4, as in the published code of S4.
    shape: of the parameters.
  """
  log_rate = np.log(np.maximum(-eigenvalues.real, 1e-4))
  log_rate = constant_param(module, f'log_rate_{letters}', log_rate, shape)
  frequency = constant_param(
    module, f'frequency_{letters}', eigenvalues.imag, shape
  )
  return jax.lax.complex(-jnp.exp(log_rate), frequency)


def input_param(
  module: nn.Module,
  letters: str,
  value: Complex[np.ndarray, '*S'],
  shape: tuple[int, ...],
  clip: float | None = None,
  name: str = 'input',
) -> Complex[Array, '*S']:
  """Makes a complex parameter that begins as a given vector.

  Args:
    module: a bound module, whose parameters they are.
    letters: of its axes.
    value: what it begins as; broadcast to the shape.
    shape: of the parameter.
    clip: largest imaginary part at first; None for any.
    name: of the parameter.
  """
  imag = value.imag if clip is None else np.clip(value.imag, -clip, clip)
  return jax.lax.complex(
    constant_param(module, f'{name}_re_{letters}', value.real, shape),
    constant_param(module, f'{name}_im_{letters}', imag, shape),
  )


def readout_param(
  module: nn.Module, name: str, shape: tuple[int, int]
) -> Complex[Array, 'D S']:
  """Makes a complex parameter `[D, S]` drawn with `E |C|^2 = 1`.

  Args:
    module: a bound module, whose parameters they are.
    name: of the parameter.
    shape: of the parameter.
  """
  normal = nn.initializers.normal(math.sqrt(0.5))
  return jax.lax.complex(
    module.param(f'{name}_re_DS', normal, shape),
    module.param(f'{name}_im_DS', normal, shape),
  )


def step_param(
  module: nn.Module,
  letters: str,
  steps: tuple[float, float],
  shape: tuple[int, ...],
) -> Float[Array, '*D']:
  """Makes steps `exp(log_step)`, drawn with uniform logarithm.

  Args:
    module: a bound module, whose parameters they are.
    letters: of their axes.
    steps: the shortest and the longest.
    shape: of the parameter.

  Raises:
    ValueError: if the two are not positive and rising.
  """
  low, high = steps
  if not 0 < low <= high:
    raise ValueError(f'steps must be 0 < shortest <= longest, got {steps}.')

  def draw(key, shape):
    return jax.random.uniform(
      key, shape, minval=math.log(low), maxval=math.log(high)
    )

  return jnp.exp(module.param(f'log_step_{letters}', draw, shape))


def constant_param(
  module: nn.Module, name: str, value: Any, shape: tuple[int, ...]
) -> Array:
  """Makes a parameter that begins as a given array.

  Args:
    module: a bound module, whose parameter it is.
    name: of the parameter.
    value: what it begins as; broadcast to the shape.
    shape: of the parameter.
  """

  def begin(key, shape):
    del key
    return jnp.broadcast_to(jnp.asarray(value, jnp.float32), shape)

  return module.param(name, begin, shape)
