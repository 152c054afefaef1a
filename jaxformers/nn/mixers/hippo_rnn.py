"""The gated cell of HiPPO-RNN."""

from typing import NamedTuple

import flax.linen as nn
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from jaxformers.nn.init import Initializer
from jaxformers.nn.init import VarianceScaling
from jaxformers.nn.linear import Linear
from jaxformers.nn.mixers.base import locate
from jaxformers.nn.mixers.hippo_memory import real_dynamics
from jaxformers.ops import segments
from jaxformers.ops.hippo import Discretization
from jaxformers.ops.hippo import HippoCell
from jaxformers.ops.hippo import HippoRNNWeights
from jaxformers.ops.hippo import LegS
from jaxformers.ops.hippo import Measure
from jaxformers.ops.hippo import MemoryState
from jaxformers.ops.hippo import hippo_rnn


class HippoRNNState(NamedTuple):
  """What has been read so far, in constant space.

  Attributes:
    h_BE: float32, hidden units.
    x_BSM: float32, coefficients of each memory.
    cursor: where the rows stand.
  """

  h_BE: Float[Array, 'B E']
  x_BSM: Float[Array, 'B S M']
  cursor: segments.Cursor


class HippoRNN(nn.Module):
  """A gated recurrent cell that writes into memories and reads all of them.

  Sequential in training too: see `jaxformers.ops.hippo_rnn`, and `HippoMemory`
  for a mixer that is linear. Where the mesh of a run cuts sequences, nothing is
  gained. A projection of the hidden units follows.

  Source: Gu et al., "HiPPO", 2020, arXiv 2008.07669, section 2.4, as in
  https://github.com/HazyResearch/hippo-code (cell `mm`, gate `G`).

  Attributes:
    size: S.
    memories: M, how many numbers are written per token.
    hidden: E, hidden units; None for D.
    measure: what is remembered, see `HippoMemory`, like the next two.
    step: length of a sample.
    discretization: of measures that do not vary.
    initializer: how weights begin.
  """

  size: int = 64
  memories: int = 1
  hidden: int | None = None
  measure: Measure = LegS()
  step: float = 1.0
  discretization: Discretization | float = 'zoh'
  initializer: Initializer = VarianceScaling()

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
    hidden = self.hidden or x_BLD.shape[-1]
    project = lambda name, letters, width: Linear(
      letters, (width,), True, self.initializer, name=name
    )
    initial = state and HippoCell(
      state.h_BE, MemoryState(state.x_BSM, state.cursor.position_B + 1)
    )
    out_BLE, last = hippo_rnn(
      project('write', 'DM', self.memories)(x_BLD),
      project('gate', 'DE', hidden)(x_BLD),
      project('candidate', 'DE', hidden)(x_BLD),
      self._weights(hidden),
      dynamics,
      initial,
      places=places,
    )
    y_BLD = project('out', 'ED', x_BLD.shape[-1])(out_BLE.astype(x_BLD.dtype))
    if state is not None:
      state = HippoRNNState(last.h_BE, last.memory.x_BSD, cursor)
    return y_BLD, state

  def initial_state(self, batch_size, max_length, width, dtype):
    del max_length
    dtype = jnp.promote_types(dtype, jnp.float32)
    return HippoRNNState(
      jnp.zeros((batch_size, self.hidden or width), dtype),
      jnp.zeros((batch_size, self.size, self.memories), dtype),
      segments.start(batch_size),
    )

  def _weights(self, hidden):
    read = self.size, self.memories, hidden
    begin = self.initializer((0, 1), 2)
    return HippoRNNWeights(
      self.param('write_EM', self.initializer(0, 1), (hidden, self.memories)),
      self.param('gate_SME', begin, read),
      self.param('candidate_SME', begin, read),
    )
