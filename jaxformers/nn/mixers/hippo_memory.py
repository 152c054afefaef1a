"""A linear memory of fixed size per channel, with a learned readout."""

from typing import NamedTuple

import flax.linen as nn
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from jaxformers.nn.init import Initializer
from jaxformers.nn.init import VarianceScaling
from jaxformers.nn.linear import Linear
from jaxformers.nn.mixers.base import locate
from jaxformers.nn.placement import CHANNEL_RULES
from jaxformers.nn.placement import on_shares
from jaxformers.ops import segments
from jaxformers.ops.hippo import Discretization
from jaxformers.ops.hippo import Dynamics
from jaxformers.ops.hippo import LegS
from jaxformers.ops.hippo import Measure
from jaxformers.ops.hippo import MemoryState
from jaxformers.ops.hippo import dynamics_of
from jaxformers.ops.hippo import hippo_memory
from jaxformers.ops.hippo.memory import MemoryMethod


class HippoMemoryState(NamedTuple):
  """What has been read so far, in constant space.

  Attributes:
    x_BSE: float32, coefficients of each channel.
    cursor: where the rows stand.
  """

  x_BSE: Float[Array, 'B S E']
  cursor: segments.Cursor


class HippoMemory(nn.Module):
  """Projects the past of each channel on a fixed basis; learns what to read.

  `y = readout(memory(x W_in)) W_out`: each of E channels has S coefficients,
  whose dynamics are not learned, and a linear readout of its own. With LegS it
  sees the whole history at a resolution that falls as the history grows; with
  LegT a sliding window.

  Where the mesh of a run cuts sequences, devices exchange tokens for channels, and
  each remembers whole sequences of its share of the channels.

  Dynamics hold no parameters, so nothing asks for a learning rate of its own.
  Where the readout shall not decay, its path matches `readout_SE$`.

  Source: Gu et al., "HiPPO", 2020, arXiv 2008.07669; Voelker, Kajic and
  Eliasmith, "Legendre Memory Units", 2019 (linear memory, learned readout).

  Attributes:
    size: S.
    measure: what is remembered; windows are in samples if `step` is 1.
    channels: E; None for D.
    step: length of a sample, see `jaxformers.ops.dynamics_of`.
    discretization: of measures that do not vary.
    initializer: how all parameters begin.
    method: see `jaxformers.ops.hippo_memory`, like `chunk`.
    chunk: samples per chunk.
  """

  size: int = 64
  measure: Measure = LegS()
  channels: int | None = None
  step: float = 1.0
  discretization: Discretization | float = 'zoh'
  initializer: Initializer = VarianceScaling()
  method: MemoryMethod = 'chunked'
  chunk: int | None = None

  @property
  def causal(self) -> bool:
    return True

  @nn.compact
  def __call__(
    self, x_BLD, state=None, *, segments_BL=None, deterministic=True
  ):
    del deterministic
    dynamics = real_dynamics(
      self.measure, self.size, self.step, self.discretization
    )
    places, cursor = locate(
      x_BLD.shape[:2], state and state.cursor, segments_BL
    )
    width = x_BLD.shape[-1]
    channels = self.channels or width
    readout_SE = self.param(
      'readout_SE', self.initializer(0, 1), (self.size, channels)
    )

    def memorize(u_BLD, readout_SD, x_BSD, elapsed_B, places):
      out_BLD, last = hippo_memory(
        u_BLD,
        dynamics,
        None if x_BSD is None else MemoryState(x_BSD, elapsed_B),
        places=places,
        readout_SD=readout_SD,
        method=self.method,
        chunk=self.chunk,
      )
      return out_BLD, last.x_BSD

    memorize = on_shares(
      memorize, 'BLD SD BSD B', 'BLD BSD', rules=CHANNEL_RULES
    )
    read_BLE, x_BSE = memorize(
      self._linear('in', 'DE', channels)(x_BLD),
      readout_SE,
      state and state.x_BSE,
      state and state.cursor.position_B + 1,
      places=places,
    )
    y_BLD = self._linear('out', 'ED', width)(read_BLE.astype(x_BLD.dtype))
    if state is not None:
      state = HippoMemoryState(x_BSE, cursor)
    return y_BLD, state

  def initial_state(self, batch_size, max_length, width, dtype):
    del max_length
    shape = batch_size, self.size, self.channels or width
    dtype = jnp.promote_types(dtype, jnp.float32)
    return HippoMemoryState(jnp.zeros(shape, dtype), segments.start(batch_size))

  def _linear(self, name, letters, features):
    return Linear(letters, (features,), initializer=self.initializer, name=name)


def real_dynamics(
  measure: Measure,
  size: int,
  step: float,
  discretization: Discretization | float,
) -> Dynamics:
  """Returns the dynamics of a measure, if its states are real.

  Args:
    measure: what is remembered.
    size: S.
    step: length of a sample.
    discretization: of measures that do not vary.

  Raises:
    ValueError: if the states are complex, or a window holds a single sample.
  """
  window = getattr(measure, 'window', None)
  if window is not None and window <= step:
    raise ValueError(
      f'{measure} remembers {window / step:g} samples of length {step:g}, where '
      f'it needs more than one; give its window in samples, as '
      f'{type(measure).__name__}(window=128.0), or a shorter step.'
    )
  dynamics = dynamics_of(measure, size, step, discretization)
  if jnp.issubdtype(dynamics.dtype, jnp.complexfloating):
    raise ValueError(
      f'{measure} has complex states, and readouts are real; take a real '
      "measure, such as FouT(form='real')."
    )
  return dynamics
