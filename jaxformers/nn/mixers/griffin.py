"""The recurrent layers of Griffin and Hawk."""

from typing import NamedTuple

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from jaxformers.nn.init import Initializer
from jaxformers.nn.init import VarianceScaling
from jaxformers.nn.linear import Linear
from jaxformers.nn.mixers.base import head_width
from jaxformers.nn.mixers.base import locate
from jaxformers.nn.mixers.short import ShortConvolution
from jaxformers.nn.mixers.short import tokens_only
from jaxformers.nn.placement import on_shares
from jaxformers.ops import segments
from jaxformers.ops.activations import activation
from jaxformers.ops.recurrence import rg_lru
from jaxformers.ops.recurrence import rg_lru_decay

NORMAL = VarianceScaling(1.0, 'fan_in', 'normal')
"""How the authors' projections begin."""


class RGLRUState(NamedTuple):
  """What has been read so far: one number per channel.

  Attributes:
    memory_BD: the recurrent state.
    cursor: where the rows stand.
  """

  memory_BD: Float[Array, 'B D']
  cursor: segments.Cursor


class RGLRU(nn.Module):
  """A real-gated linear recurrent unit, with gates linear in each head.

  Maps D channels to D channels. `decay_HK` had no weight decay.

  Trap: the paper says that the decay of an open gate begins within
  `decay_range`; in the authors' code, and here, it is that of a gate of `1 /
  sharpness`, and an open one begins within [0.43, 0.992].

  Source: De et al., "Griffin", 2024, arXiv 2402.19427, section 2.4; heads and
  initial values as in the authors' code,
  https://github.com/google-deepmind/recurrentgemma.

  Attributes:
    num_heads: H, blocks of channels that the gates see.
    decay_range: between which decays begin, uniform in the square.
    sharpness: c of the paper.
    initializer: how the gates begin; their biases begin with 0.
    chunk: tokens per chunk, see `jaxformers.ops.rg_lru`.
  """

  num_heads: int = 1
  decay_range: tuple[float, float] = (0.9, 0.999)
  sharpness: float = 8.0
  initializer: Initializer = NORMAL
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
    x_BLD = tokens_only(x_BLD, places)
    shape = self.num_heads, head_width(self.num_heads, None, x_BLD.shape[-1])
    decay_HK = self.param('decay_HK', self._decay, shape)
    out_BLD, memory_BD = on_shares(rg_lru, 'BLF BLF BLF F BF', 'BLF BF')(
      x_BLD,
      self._gate('input', x_BLD),
      self._gate('recurrence', x_BLD),
      decay_HK.reshape(-1),
      state and state.memory_BD,
      places=places,
      sharpness=self.sharpness,
      chunk=self.chunk,
    )
    if state is not None:
      state = RGLRUState(memory_BD, cursor)
    return out_BLD, state

  def initial_state(self, batch_size, max_length, width, dtype):
    del max_length
    dtype = jnp.promote_types(dtype, jnp.float32)
    return RGLRUState(
      jnp.zeros((batch_size, width), dtype), segments.start(batch_size)
    )

  def _gate(self, name, x_BLD):
    """Returns a gate before its sigmoid: a linear map of each head."""
    heads = self.num_heads
    x_BLHK = x_BLD.reshape(*x_BLD.shape[:-1], heads, -1)
    width = x_BLHK.shape[-1]
    w_HKE = self.param(
      f'{name}_HKE', self._per_head, (heads, width, width)
    ).astype(x_BLD.dtype)
    b_HK = self.param(f'{name}_HK', nn.initializers.zeros, (heads, width))
    gate_BLHE = jnp.einsum('BLHK,HKE->BLHE', x_BLHK, w_HKE)
    return (gate_BLHE + b_HK.astype(x_BLD.dtype)).reshape(x_BLD.shape)

  def _per_head(self, key, shape):
    # Heads are maps of their own: their number is no part of the fan.
    draw = self.initializer(0, 1)
    return jax.vmap(lambda key: draw(key, shape[1:]))(
      jax.random.split(key, shape[0])
    )

  def _decay(self, key, shape):
    low, high = self.decay_range
    square = jax.random.uniform(key, shape, minval=low**2, maxval=high**2)
    return rg_lru_decay(jnp.sqrt(square).reshape(-1)).reshape(shape)


class RecurrentBlockState(NamedTuple):
  """What has been read so far, in constant space.

  Attributes:
    recurrence: of the recurrent unit; its cursor is that of the block.
    buffer_BNF: the last tokens before the convolution.
  """

  recurrence: RGLRUState
  buffer_BNF: Float[Array, 'B N F']


class RecurrentBlock(nn.Module):
  """The temporal mixer of Hawk, and two of three in Griffin.

  `(recurrence(conv(x W_in)) * gelu(x W_gate)) W_out`. Griffin repeats
  `(Block(RecurrentBlock()), Block(RecurrentBlock()), Block(Attention(mask=
  Window(1024))))`, each with a feed-forward part.

  Source: De et al., "Griffin", 2024, arXiv 2402.19427, section 2.3 and figure
  2c; biases and initial values as in the authors' code,
  https://github.com/google-deepmind/recurrentgemma.

  Attributes:
    width: F, channels of the recurrence; None for D.
    taps: W, tokens that the convolution mixes.
    recurrence: the unit that carries the past.
    activation: of the gate, see `jaxformers.ops.activations`.
    use_bias: whether the three projections have biases.
    initializer: how the projections begin.
    out_initializer: how the last projection begins; None as the others. The
      authors take `VarianceScaling(2 / layers, 'fan_in', 'normal')`.
    conv_initializer: how the convolution begins.
  """

  width: int | None = None
  taps: int = 4
  recurrence: nn.Module = RGLRU()
  activation: str = 'gelu_tanh'
  use_bias: bool = True
  initializer: Initializer = NORMAL
  out_initializer: Initializer | None = None
  conv_initializer: Initializer = VarianceScaling(0.01, 'fan_in', 'normal')

  @property
  def causal(self) -> bool:
    return True

  @nn.compact
  def __call__(
    self, x_BLD, state=None, *, segments_BL=None, deterministic=True
  ):
    cursor = state and state.recurrence.cursor
    places, _ = locate(x_BLD.shape[:2], cursor, segments_BL)
    u_BLD = tokens_only(x_BLD, places)
    width = self.width or x_BLD.shape[-1]
    h_BLF, buffer_BNF = ShortConvolution(
      self.taps, initializer=self.conv_initializer, name='convolution'
    )(
      self._linear('in', 'DF', width)(u_BLD),
      state and state.buffer_BNF,
      places=places,
    )
    h_BLF, recurrence = self.recurrence(
      h_BLF,
      state and state.recurrence,
      segments_BL=segments_BL,
      deterministic=deterministic,
    )
    gate_BLF = self._linear('gate', 'DF', width)(u_BLD)
    h_BLF *= activation(self.activation)(gate_BLF)
    out = self._linear('out', 'FD', x_BLD.shape[-1], self.out_initializer)
    if state is not None:
      state = RecurrentBlockState(recurrence, buffer_BNF)
    return out(h_BLF), state

  def initial_state(self, batch_size, max_length, width, dtype):
    width = self.width or width
    buffer = batch_size, self.taps - 1, width
    return RecurrentBlockState(
      self.recurrence.initial_state(batch_size, max_length, width, dtype),
      jnp.zeros(buffer, jnp.promote_types(dtype, jnp.float32)),
    )

  def _linear(self, name, letters, width, initializer=None):
    initializer = initializer or self.initializer
    return Linear(letters, (width,), self.use_bias, initializer, name=name)
