"""RWKV-4: weighted means over the past, and a gated look at the token before."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from jaxformers.nn.init import Initializer
from jaxformers.nn.init import VarianceScaling
from jaxformers.nn.linear import Linear
from jaxformers.nn.mixers.base import locate
from jaxformers.nn.mixers.short import tokens_only
from jaxformers.nn.placement import on_shares
from jaxformers.ops import segments
from jaxformers.ops.recurrence import WKVMethod
from jaxformers.ops.recurrence import WKVState
from jaxformers.ops.recurrence import short_convolution
from jaxformers.ops.recurrence import wkv
from jaxformers.ops.recurrence import wkv_state


class RWKV4State(NamedTuple):
  """What has been read so far, in constant space.

  Attributes:
    sums: over the tokens of the current segment.
    buffer_B1D: the last token.
    cursor: where the rows stand.
  """

  sums: WKVState
  buffer_B1D: Float[Array, 'B 1 D']
  cursor: segments.Cursor


class TokenShiftState(NamedTuple):
  """The token before.

  Attributes:
    buffer_B1D: the last token.
    cursor: where the rows stand.
  """

  buffer_B1D: Float[Array, 'B 1 D']
  cursor: segments.Cursor


class RWKV4(nn.Module):
  """The time mixing of RWKV-4.

  `out = (sigmoid(r) * wkv(k, v)) W_out`, where r, k and v are linear in
  mixtures of each token with the one before it. A layer is
  `(Block(RWKV4()), Block(RWKV4ChannelMixing()))`, with layer norm.

  The authors begin with W_key, W_receptance and W_out at 0, use no weight
  decay, and learn `log_rate_D` twice and `bonus_D` three times as fast as the
  rest.

  Source: Peng et al., "RWKV", 2023, arXiv 2305.13048, section 3.1; initial
  values as in the authors' code, https://github.com/BlinkDL/RWKV-LM, RWKV-v4neo.

  Attributes:
    layer: which layer this is, counted from 0; on it and on the next depend
      the initial decays and mixtures. In a scanned stack all are one.
    layers: of how many.
    initializer: how the four projections begin.
    method: see `jaxformers.ops.wkv`, like `chunk`.
    chunk: tokens per chunk.
  """

  layer: int = 0
  layers: int = 1
  initializer: Initializer = VarianceScaling()
  method: WKVMethod = 'auto'
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
    shift = _Shift(self, x_BLD, state, places)
    late, width = 1 - self.layer / self.layers, x_BLD.shape[-1]
    depth = self.layer / max(self.layers - 1, 1)
    key_BLD = shift('key', late)
    value_BLD = shift('value', late, 0.3 * depth)
    receptance_BLD = shift('receptance', 0.5 * late)
    log_rate_D = self.param(
      'log_rate_D',
      lambda _, shape: -5
      + 8 * _ramp(shape, shape[0] - 1) ** (0.7 + 1.3 * depth),
      (width,),
    )
    bonus_D = self.param('bonus_D', _bonus, (width,))
    mean_BLD, sums = on_shares(wkv, 'BLD BLD D D BD', 'BLD BD')(
      key_BLD,
      value_BLD,
      -jnp.exp(log_rate_D),
      bonus_D,
      state and state.sums,
      places=places,
      method=self.method,
      chunk=self.chunk,
    )
    out = Linear('DE', (width,), initializer=self.initializer, name='out')
    y_BLD = out(jax.nn.sigmoid(receptance_BLD) * mean_BLD)
    if state is not None:
      state = RWKV4State(sums, shift.buffer_B1D, cursor)
    return y_BLD, state

  def initial_state(self, batch_size, max_length, width, dtype):
    del max_length
    dtype = jnp.promote_types(dtype, jnp.float32)
    return RWKV4State(
      wkv_state(batch_size, width, dtype),
      jnp.zeros((batch_size, 1, width), dtype),
      segments.start(batch_size),
    )


class RWKV4ChannelMixing(nn.Module):
  """The channel mixing of RWKV-4, a feed-forward part with a gate.

  `sigmoid(r) * (relu(k)^2 W_value)`, where r and k are linear in mixtures of
  each token with the one before it. Since it remembers a token it has a state,
  and stands in a `Block` as its mixer. That of RWKV-5 and RWKV-6 is the same;
  their code stores the shares of the token before.

  Source: Peng et al., "RWKV", 2023, arXiv 2305.13048, section 3.1;
  initial values as for `RWKV4`.

  Attributes:
    hidden: F, width of k; None for 4 D.
    layer: which layer this is, counted from 0.
    layers: of how many.
    initializer: how the three projections begin.
  """

  hidden: int | None = None
  layer: int = 0
  layers: int = 1
  initializer: Initializer = VarianceScaling()

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
    shift = _Shift(self, x_BLD, state, places)
    late, width = 1 - self.layer / self.layers, x_BLD.shape[-1]
    key_BLF = shift('key', late, features=('DF', self.hidden or 4 * width))
    gate_BLD = jax.nn.sigmoid(shift('receptance', late))
    value = Linear('FD', (width,), initializer=self.initializer, name='value')
    y_BLD = gate_BLD * value(jnp.square(jax.nn.relu(key_BLF)))
    if state is not None:
      state = TokenShiftState(shift.buffer_B1D, cursor)
    return y_BLD, state

  def initial_state(self, batch_size, max_length, width, dtype):
    del max_length
    dtype = jnp.promote_types(dtype, jnp.float32)
    return TokenShiftState(
      jnp.zeros((batch_size, 1, width), dtype), segments.start(batch_size)
    )


class _Shift:
  """Projects mixtures of each token with the one before it."""

  def __init__(self, mixer, x_BLD, state, places):
    self.mixer = mixer
    self.x_BLD = tokens_only(x_BLD, places)
    self.places = places
    self.buffer_B1D = self.before_B1D = state and state.buffer_B1D

  def __call__(self, name, power, offset=0.0, features=None):
    """Returns the projection of a mixture that begins as `(d / D)^power`."""
    width = self.x_BLD.shape[-1]
    letters, size = features or ('DE', width)
    mix_D = self.mixer.param(
      f'mix_{name}_D',
      lambda _, shape: _ramp(shape, shape[0]) ** power + offset,
      (width,),
    )
    mix = on_shares(short_convolution, 'BLD WD D BND', 'BLD BND')
    mixed_BLD, self.buffer_B1D = mix(
      self.x_BLD,
      jnp.stack([1 - mix_D, mix_D]),
      None,
      self.before_B1D,
      places=self.places,
    )
    initializer = self.mixer.initializer
    return Linear(letters, (size,), initializer=initializer, name=name)(
      mixed_BLD
    )


def _ramp(shape, end):
  return jnp.arange(shape[0]) / max(end, 1)


def _bonus(key, shape):
  """Returns log 0.3, raised and lowered by a half in turns."""
  del key
  return math.log(0.3) + 0.5 * ((jnp.arange(shape[0]) + 1) % 3 - 1)
