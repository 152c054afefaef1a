"""Retention: linear attention that forgets at a rate of each head's own."""

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
from jaxformers.nn.norm import RMSNorm
from jaxformers.nn.placement import on_shares
from jaxformers.ops import segments
from jaxformers.ops.frequencies import RetNetSpectrum
from jaxformers.ops.linear_attention import retention
from jaxformers.ops.linear_attention import retention_log_decay
from jaxformers.ops.positions import PositionScheme
from jaxformers.ops.positions import Rotary
from jaxformers.ops.recurrence import Method


class RetentionState(NamedTuple):
  """What has been read so far, in constant space.

  Attributes:
    outer_BHKV: decayed sum of `k v^T` over the tokens of the current segment.
    cursor: where the rows stand.
  """

  outer_BHKV: Float[Array, 'B H K V']
  cursor: segments.Cursor


class Retention(nn.Module):
  """Gated multi-scale retention, the sequence mixer of RetNet.

  `(silu(x W_gate) * norm(retention(x W_query, x W_key, x W_value))) W_out`: head
  h decays by `1 - 2^(-5-h)` per token, and each head's output is normalised by
  itself, without gain.

  Source: Sun et al., "Retentive Network", 2023, arXiv 2307.08621, section 2.2;
  rotation, initialisation and eps as in the authors' code,
  https://github.com/microsoft/torchscale.

  Attributes:
    num_heads: H.
    head_dim: K, width of queries and keys; None for D / H.
    value_dim: width of each head's values and gates; None for 2 K, as in RetNet.
    position: a scheme that turns queries and keys each by itself.
    stabilise: whether rows are divided by the root of their sum of decays, which
      the norm undoes but for its eps. RetNet's other row factor, which depends
      on the scores, is left out here: no state can know it
      (`jaxformers.ops.retention`).
    norm: of each head's output.
    initializer: how all projections but the last begin; Xavier with gain
      `2^(-5/2)`.
    out_initializer: how the last begins; Xavier with gain 1/2.
    method: see `jaxformers.ops.outer_recurrence`, like `chunk`.
    chunk: tokens per chunk.
  """

  num_heads: int
  head_dim: int | None = None
  value_dim: int | None = None
  position: PositionScheme = Rotary(
    pairing='interleaved', spectrum=RetNetSpectrum()
  )
  stabilise: bool = False
  norm: nn.Module = RMSNorm(use_scale=False)
  initializer: Initializer = VarianceScaling(2**-5, 'fan_avg', 'uniform')
  out_initializer: Initializer = VarianceScaling(2**-2, 'fan_avg', 'uniform')
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
    key_dim, value_dim = self._widths(x_BLD.shape[-1])
    retain = on_shares(retention, 'BLH BLH BLH BH', 'BLH BH', log_decay_H='H')
    out_BLHK, outer_BHKV = retain(
      self._project('query', key_dim, x_BLD),
      self._project('key', key_dim, x_BLD),
      self._project('value', value_dim, x_BLD),
      state and state.outer_BHKV,
      log_decay_H=retention_log_decay(self.num_heads),
      position=self.position,
      places=places,
      stabilise='decay' if self.stabilise else 'none',
      method=self.method,
      chunk=self.chunk,
    )
    gate_BLHK = jax.nn.silu(self._project('gate', value_dim, x_BLD))
    out_BLHK = gate_BLHK * self.norm(out_BLHK)
    y_BLD = Linear(
      'HKD',
      x_BLD.shape[-1:],
      initializer=self.out_initializer,
      name='out',
    )(out_BLHK)
    if state is not None:
      state = RetentionState(outer_BHKV, cursor)
    return y_BLD, state

  def initial_state(self, batch_size, max_length, width, dtype):
    del max_length
    dtype = jnp.promote_types(dtype, jnp.float32)
    shape = batch_size, self.num_heads, *self._widths(width)
    return RetentionState(jnp.zeros(shape, dtype), segments.start(batch_size))

  def _widths(self, width):
    """Returns widths of keys and of values for inputs of that width."""
    key_dim = head_width(self.num_heads, self.head_dim, width)
    return key_dim, self.value_dim or 2 * key_dim

  def _project(self, name, width, x_BLD):
    # Values and gates are named by K too: V is the vocabulary to the table that
    # splits parameters among devices.
    features = self.num_heads, width
    return Linear('DHK', features, initializer=self.initializer, name=name)(
      x_BLD
    )
