"""Mamba: a state-space model whose steps, inputs and readouts are selected."""

from typing import NamedTuple

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from jaxformers.nn.init import TORCH
from jaxformers.nn.init import Initializer
from jaxformers.nn.init import softplus_steps
from jaxformers.nn.linear import Linear
from jaxformers.nn.mixers.base import locate
from jaxformers.nn.mixers.short import ShortConvolution
from jaxformers.nn.mixers.short import tokens_only
from jaxformers.nn.placement import on_shares
from jaxformers.ops import segments
from jaxformers.ops.recurrence import Discretization
from jaxformers.ops.recurrence import SelectiveMethod
from jaxformers.ops.recurrence import selective_recurrence


class MambaState(NamedTuple):
  """What has been read so far, in constant space.

  Attributes:
    memory_BSF: states of all channels.
    buffer_BNF: the last tokens before the convolution.
    cursor: where the rows stand.
  """

  memory_BSF: Float[Array, 'B S F']
  buffer_BNF: Float[Array, 'B N F']
  cursor: segments.Cursor


class Mamba(nn.Module):
  """The block of Mamba, a mixer that needs no feed-forward part beside it.

  `x, z = u W_in, u W_gate`; `x = silu(conv(x))`; step, b and c are linear in x;
  `out = (selective(x) * silu(z)) W_out`. Widths within are F = expand D.

  Parameters of the recurrence had no weight decay: with
  `matching(r'(a_log|skip|step_bias)_', params)` a mask can find them.
  `Block(mixer=Mamba(), feedforward=None)` is a layer of the paper's models.

  Trap: b is multiplied by the step, where the paper's equation 4 integrates
  (`discretization='zoh'`).

  Source: Gu and Dao, "Mamba", 2023, arXiv 2312.00752, sections 3.4 to 3.6 and
  algorithm 2; initial values as in the authors' code,
  https://github.com/state-spaces/mamba.

  Attributes:
    expand: F / D.
    state_size: S, numbers per channel.
    taps: W, tokens that the convolution mixes.
    rank: R, through which steps are computed; None for D / 16, rounded up.
    step_range: between which steps begin, log-uniformly.
    step_floor: least step at first.
    selective: whether step, b and c depend on the token. If not, they are
      parameters of each channel, and the recurrence is a convolution.
    use_bias: whether the projections in and out have biases.
    conv_bias: whether the convolution has one.
    initializer: how projections and convolution begin.
    out_initializer: how the last projection begins; None as the others. The
      authors divide it by the root of the number of layers:
      `VarianceScaling(1 / 3 / layers, 'fan_in', 'uniform')`.
    discretization: see `jaxformers.ops.selective_recurrence`, like the rest.
    method: how the recurrence is computed.
    chunk: tokens per chunk.
  """

  expand: int = 2
  state_size: int = 16
  taps: int = 4
  rank: int | None = None
  step_range: tuple[float, float] = (1e-3, 1e-1)
  step_floor: float = 1e-4
  selective: bool = True
  use_bias: bool = False
  conv_bias: bool = True
  initializer: Initializer = TORCH
  out_initializer: Initializer | None = None
  discretization: Discretization = 'euler'
  method: SelectiveMethod = 'auto'
  chunk: int | None = None

  @property
  def causal(self) -> bool:
    return True

  @nn.compact
  def __call__(
    self, x_BLD, state=None, *, segments_BL=None, deterministic=True
  ):
    del deterministic
    places, cursor = locate(
      x_BLD.shape[:2], state and state.cursor, segments_BL
    )
    u_BLD = tokens_only(x_BLD, places)
    width = self.expand * u_BLD.shape[-1]
    convolution = ShortConvolution(
      self.taps,
      self.conv_bias,
      self.initializer,
      self.initializer,
      name='convolution',
    )
    x_BLF, buffer_BNF = convolution(
      self._linear('in', 'DF', width)(u_BLD),
      state and state.buffer_BNF,
      places=places,
    )
    x_BLF = jax.nn.silu(x_BLF)
    y_BLF, memory_BSF = self._recur(
      x_BLF, state and state.memory_BSF, self._rank(u_BLD.shape[-1]), places
    )
    y_BLF *= jax.nn.silu(self._linear('gate', 'DF', width)(u_BLD))
    out = self._linear('out', 'FD', x_BLD.shape[-1], self.out_initializer)
    if state is not None:
      state = MambaState(memory_BSF, buffer_BNF, cursor)
    return out(y_BLF), state

  def initial_state(self, batch_size, max_length, width, dtype):
    del max_length
    dtype = jnp.promote_types(dtype, jnp.float32)
    zeros = lambda size: jnp.zeros(
      (batch_size, size, self.expand * width), dtype
    )
    return MambaState(
      zeros(self.state_size), zeros(self.taps - 1), segments.start(batch_size)
    )

  def _recur(self, x_BLF, memory_BSF, rank, places):
    """Declares the parameters of the recurrence and runs it."""
    width, states = x_BLF.shape[-1], self.state_size
    a_log_FS = self.param('a_log_FS', _rates, (width, states))
    step_bias_F = self.param('step_bias_F', self._step_bias, (width,))
    skip_F = self.param('skip_F', nn.initializers.ones, (width,))
    if self.selective:
      step_BLF, b, c = self._select(x_BLF, rank)
    else:
      step_BLF = jnp.zeros_like(x_BLF)
      b = self.param('b_FS', nn.initializers.ones, (width, states))
      c = self.param('c_FS', nn.initializers.normal(1.0), (width, states))
    system = 'BLS' if self.selective else 'FS'
    recur = on_shares(
      selective_recurrence,
      f'BLF BLF FS {system} {system} F BSF',
      'BLF BSF',
      step_bias_E='F',
    )
    return recur(
      x_BLF,
      step_BLF,
      -jnp.exp(a_log_FS),
      b,
      c,
      skip_F,
      memory_BSF,
      step_bias_E=step_bias_F,
      softplus=True,
      places=places,
      discretization=self.discretization,
      method=self.method,
      chunk=self.chunk,
    )

  def _select(self, x_BLF, rank):
    """Returns steps before bias and softplus, b and c, of each token."""
    sizes = rank + 2 * self.state_size
    selected = Linear(
      'FN', (sizes,), initializer=self.initializer, name='select'
    )
    step_BLR, b_BLS, c_BLS = jnp.split(
      selected(x_BLF), (rank, rank + self.state_size), axis=-1
    )
    # Steps, on which all decays depend, are made in float32.
    step_BLR = step_BLR.astype(jnp.promote_types(step_BLR.dtype, jnp.float32))
    step = Linear('RF', x_BLF.shape[-1:], initializer=TORCH, name='step')
    return step(step_BLR), b_BLS, c_BLS

  def _step_bias(self, key, shape):
    return softplus_steps(key, shape, self.step_range, self.step_floor)

  def _rank(self, width):
    return -(-width // 16) if self.rank is None else self.rank

  def _linear(self, name, letters, width, initializer=None):
    initializer = initializer or self.initializer
    return Linear(letters, (width,), self.use_bias, initializer, name=name)


def _rates(key, shape):
  """Returns the logarithms of 1, 2, ..., S for each channel."""
  del key
  return jnp.broadcast_to(jnp.log(jnp.arange(1.0, shape[1] + 1)), shape)
