"""Mamba-2: a selective state-space model with one decay per head."""

import math
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
from jaxformers.nn.norm import RMSNorm
from jaxformers.nn.placement import on_shares
from jaxformers.ops import segments
from jaxformers.ops.recurrence import Method
from jaxformers.ops.recurrence import ssd


class Mamba2State(NamedTuple):
  """What has been read so far, in constant space.

  Attributes:
    memory_BHSK: states of all heads.
    input_BNF: the last inputs before the convolution.
    select_BNF: the last b and c before the convolution.
    cursor: where the rows stand.
  """

  memory_BHSK: Float[Array, 'B H S K']
  input_BNF: Float[Array, 'B N F']
  select_BNF: Float[Array, 'B N F']
  cursor: segments.Cursor


class Mamba2(nn.Module):
  """The block of Mamba-2, a mixer that needs no feed-forward part beside it.

  Input x, gate z, b, c and step are linear in the token; x, b and c go through a
  short convolution and silu; `out = norm(ssd(x) * silu(z)) W_out`. Widths within
  are F = expand D, in heads of width K. `Block(mixer=Mamba2())` is a layer of
  the paper's models.

  Parameters of the recurrence had no weight decay: with
  `matching(r'(a_log|skip|step_bias)_', params)` a mask can find them.

  Traps: the gate comes before the norm; the bias of the step is added once,
  within the softplus; the skip passes x without its step.

  Source: Dao and Gu, "Transformers are SSMs", 2024, arXiv 2405.21060, section
  7; order, options and initial values as in the authors' code,
  https://github.com/state-spaces/mamba.

  Attributes:
    expand: F / D.
    head_dim: K, width of each of the F / K heads.
    state_size: S, numbers per channel.
    groups: G; each b and c is shared by H / G heads.
    taps: tokens that the convolution mixes.
    rate_range: between which decay rates begin, uniformly.
    step_range: between which steps begin, log-uniformly.
    step_floor: least step at first.
    step_limit: between which steps are kept.
    skip_channels: whether each channel has a skip of its own, not each head.
    norm: of the output of each group, without a gain, which follows; None for
      no norm and no gain.
    norm_first: whether the norm comes before the gate.
    use_bias: whether the projections have biases.
    conv_bias: whether the convolution has one.
    initializer: how projections and convolution begin.
    out_initializer: how the last projection begins; None as the others. The
      authors divide it by the root of the number of layers:
      `VarianceScaling(1 / 3 / layers, 'fan_in', 'uniform')`.
    method: see `jaxformers.ops.outer_recurrence`, like `chunk`.
    chunk: tokens per chunk.
  """

  expand: int = 2
  head_dim: int = 64
  state_size: int = 128
  groups: int = 1
  taps: int = 4
  rate_range: tuple[float, float] = (1.0, 16.0)
  step_range: tuple[float, float] = (1e-3, 1e-1)
  step_floor: float = 1e-4
  step_limit: tuple[float, float] = (0.0, math.inf)
  skip_channels: bool = False
  norm: nn.Module | None = RMSNorm(eps=1e-5, use_scale=False)
  norm_first: bool = False
  use_bias: bool = False
  conv_bias: bool = True
  initializer: Initializer = TORCH
  out_initializer: Initializer | None = None
  method: Method = 'auto'
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
    heads, width = self._heads(x_BLD.shape[-1]), x_BLD.shape[-1]
    inputs = self._linear('in', 'DHK', (heads, self.head_dim))(x_BLD)
    x_BLHK, input_BNF = self._convolve(
      'input_convolution', inputs, state and state.input_BNF, places
    )
    select = self._linear('select', 'DGN', (self.groups, 2 * self.state_size))
    select_BLGN, select_BNF = self._convolve(
      'select_convolution', select(x_BLD), state and state.select_BNF, places
    )
    b_BLGS, c_BLGS = jnp.split(select_BLGN, 2, axis=-1)
    recur = on_shares(ssd, 'BLH BLH H BLG BLG H BH', 'BLH BH')
    y_BLHK, memory_BHSK = recur(
      x_BLHK,
      self._step(x_BLD, heads),
      -jnp.exp(self.param('a_log_H', self._rates, (heads,))),
      b_BLGS,
      c_BLGS,
      self._skip(heads),
      state and state.memory_BHSK,
      places=places,
      method=self.method,
      chunk=self.chunk,
    )
    gate_BLHK = self._linear('gate', 'DHK', (heads, self.head_dim))(x_BLD)
    y_BLHK = self._gated(y_BLHK, jax.nn.silu(gate_BLHK))
    out = self._linear('out', 'HKD', (width,), self.out_initializer)
    if state is not None:
      state = Mamba2State(memory_BHSK, input_BNF, select_BNF, cursor)
    return out(y_BLHK), state

  def initial_state(self, batch_size, max_length, width, dtype):
    del max_length
    dtype = jnp.promote_types(dtype, jnp.float32)
    heads = self._heads(width)
    zeros = lambda *shape: jnp.zeros((batch_size, *shape), dtype)
    return Mamba2State(
      zeros(heads, self.state_size, self.head_dim),
      zeros(self.taps - 1, heads * self.head_dim),
      zeros(self.taps - 1, 2 * self.groups * self.state_size),
      segments.start(batch_size),
    )

  def _heads(self, width):
    """Returns H for inputs of that width."""
    heads, rest = divmod(self.expand * width, self.head_dim)
    if rest or not heads or heads % self.groups:
      raise ValueError(
        f'{self.expand} times width {width} must divide into heads of '
        f'{self.head_dim}, and these into {self.groups} groups; change expand, '
        'head_dim or groups.'
      )
    return heads

  def _convolve(self, name, x, buffer_BNF, places):
    """Convolves channels that may have several axes, and activates."""
    convolution = ShortConvolution(
      self.taps,
      self.conv_bias,
      self.initializer,
      self.initializer,
      name=name,
    )
    x_BLF = x.reshape(*x.shape[:2], -1)
    y_BLF, buffer_BNF = convolution(x_BLF, buffer_BNF, places=places)
    return jax.nn.silu(y_BLF).reshape(x.shape), buffer_BNF

  def _step(self, x_BLD, heads):
    """Returns steps `[B, L, H]`, in at least float32."""
    raw_BLH = self._linear('step', 'DH', (heads,))(x_BLD)
    bias_H = self.param('step_bias_H', self._step_bias, (heads,))
    raw_BLH = raw_BLH.astype(jnp.result_type(raw_BLH, jnp.float32)) + bias_H
    return jnp.clip(jax.nn.softplus(raw_BLH), *self.step_limit)

  def _skip(self, heads):
    ones = nn.initializers.ones
    if self.skip_channels:
      return self.param('skip_HK', ones, (heads, self.head_dim))
    return self.param('skip_H', ones, (heads,))

  def _gated(self, y_BLHK, gate_BLHK):
    """Applies gate and norm, in their order."""
    if self.norm is None:
      return y_BLHK * gate_BLHK
    if not self.norm_first:
      y_BLHK *= gate_BLHK
    by_group = y_BLHK.reshape(*y_BLHK.shape[:2], self.groups, -1)
    y_BLHK = self.norm(by_group).reshape(y_BLHK.shape)
    gain_HK = self.param('gain_HK', nn.initializers.ones, y_BLHK.shape[2:])
    y_BLHK *= gain_HK.astype(y_BLHK.dtype)
    return y_BLHK * gate_BLHK if self.norm_first else y_BLHK

  def _rates(self, key, shape):
    low, high = self.rate_range
    return jnp.log(jax.random.uniform(key, shape, minval=low, maxval=high))

  def _step_bias(self, key, shape):
    return softplus_steps(key, shape, self.step_range, self.step_floor)

  def _linear(self, name, letters, features, initializer=None):
    initializer = initializer or self.initializer
    return Linear(letters, features, self.use_bias, initializer, name=name)
