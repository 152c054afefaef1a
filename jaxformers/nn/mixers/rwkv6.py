"""RWKV-5 and RWKV-6: matrices whose rows decay at rates of their own."""

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
from jaxformers.nn.mixers.short import tokens_only
from jaxformers.nn.norm import LayerNorm
from jaxformers.nn.placement import on_shares
from jaxformers.ops import segments
from jaxformers.ops.recurrence import Method
from jaxformers.ops.recurrence import decays_in_segments
from jaxformers.ops.recurrence import outer_recurrence
from jaxformers.ops.recurrence import short_convolution

PROJECTIONS = 'receptance', 'key', 'value', 'gate'


class RWKV6State(NamedTuple):
  """What has been read so far, in constant space.

  Attributes:
    memory_BHKN: decayed sum of `k v^T`; N is K.
    buffer_B1D: the last token.
    cursor: where the rows stand.
  """

  memory_BHKN: Float[Array, 'B H K N']
  buffer_B1D: Float[Array, 'B 1 D']
  cursor: segments.Cursor


class RWKV6(nn.Module):
  """The time mixing of RWKV-6 (Finch), or of RWKV-5 (Eagle).

  `S_i = diag(w_i) S_(i-1) + k_i v_i^T`, `o_i = (S_(i-1) + diag(u) k_i v_i^T)^T
  r_i`, `out = (norm(o) * silu(g)) W_out`, with a norm for each head. Receptance
  r, key k, value v and gate g are linear in mixtures of each token with the one
  before it; decays are `w = exp(-exp(.))`, for each channel of each head. In
  RWKV-6 mixtures and decays depend on the token, through maps of low rank, which
  begin at 0. `RWKV6(mix_rank=None, decay_rank=None)` is RWKV-5.

  The authors begin with W_out at 0 and with orthogonal maps, those of keys and
  gates a tenth in size. They learn `log_rate_HK` twice as fast as the rest, and
  only matrices (`'w_'`) have weight decay: see `matching` in `jaxformers.optim`.

  Source: Peng et al., "Eagle and Finch", 2024, arXiv 2404.05892, sections 4.1
  and 4.2; eps and initial values as in the authors' code,
  https://github.com/BlinkDL/RWKV-LM, RWKV-v5 (x052 and x060).

  Attributes:
    num_heads: H.
    head_dim: K, width of keys and values; None for D / H. The authors' is 64.
    mix_rank: through which mixtures depend on the token; None if they do not.
    decay_rank: through which decays do; None if they do not.
    layer: which layer this is, counted from 0; on it and on the next depend the
      initial decays, mixtures, bonus and gain. In a scanned stack all are one.
    layers: of how many.
    norm: of each head's output, without gain and offset, which follow.
    initializer: how the five projections begin.
    method: see `jaxformers.ops.outer_recurrence`, like `chunk`.
    chunk: tokens per chunk.
  """

  num_heads: int
  head_dim: int | None = None
  mix_rank: int | None = 32
  decay_rank: int | None = 64
  layer: int = 0
  layers: int = 1
  norm: nn.Module = LayerNorm(eps=64e-5, use_scale=False, use_offset=False)
  initializer: Initializer = VarianceScaling()
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
    mixed, buffer_B1D = self._mix(x_BLD, state and state.buffer_B1D, places)
    heads = self.num_heads, self._width(x_BLD.shape[-1])
    receptance, key, value, gate = (
      Linear('DHK', heads, initializer=self.initializer, name=name)(mixed[name])
      for name in PROJECTIONS
    )
    # Padding, all of whose mixtures are those of the token before, writes none.
    if places is not None:
      key = jnp.where(places.number_BL[..., None, None] == 0, 0, key)
    log_decay = self._log_decay(mixed.get('decay'), heads)
    log_decay = decays_in_segments(log_decay, places)
    decay = 'BLHK'[-log_decay.ndim :]
    recur = on_shares(
      outer_recurrence,
      f'BLHK BLHK BLHK {decay} BH',
      'BLHK BH',
      bonus_HK='HK',
    )
    out_BLHK, memory_BHKN = recur(
      receptance,
      key,
      value,
      log_decay,
      state and state.memory_BHKN,
      bonus_HK=self.param('bonus_HK', self._bonus, heads),
      method=self.method,
      chunk=self.chunk,
    )
    y_BLHK = self._normed(out_BLHK).astype(gate.dtype) * jax.nn.silu(gate)
    out = Linear(
      'HKD', x_BLD.shape[-1:], initializer=self.initializer, name='out'
    )
    if state is not None:
      state = RWKV6State(memory_BHKN, buffer_B1D, cursor)
    return out(y_BLHK), state

  def initial_state(self, batch_size, max_length, width, dtype):
    del max_length
    dtype = jnp.promote_types(dtype, jnp.float32)
    head_dim = self._width(width)
    return RWKV6State(
      jnp.zeros((batch_size, self.num_heads, head_dim, head_dim), dtype),
      jnp.zeros((batch_size, 1, width), dtype),
      segments.start(batch_size),
    )

  def _mix(self, x_BLD, buffer_B1D, places):
    """Returns mixtures of each token with the one before it, by name."""
    width = x_BLD.shape[-1]
    only_before = jnp.zeros((2, width)).at[0].set(1)
    look_back = on_shares(short_convolution, 'BLD WD D BND', 'BLD BND')
    before_BLD, buffer_B1D = look_back(
      x_BLD, only_before, None, buffer_B1D, places=places
    )
    change_BLD = before_BLD - x_BLD
    names = PROJECTIONS + (('decay',) if self.decay_rank else ())
    shares = {name: self._share(name, width) for name in names}
    if self.mix_rank:
      base_BLD = x_BLD + change_BLD * self._share('base', width).astype(
        x_BLD.dtype
      )
      shift_BLND = self._shift(base_BLD, len(names))
      for i, name in enumerate(names):
        shares[name] += shift_BLND[:, :, i]
    mixed = {
      name: x_BLD + change_BLD * share.astype(x_BLD.dtype)
      for name, share in shares.items()
    }
    return mixed, buffer_B1D

  def _share(self, name, width):
    """Returns the share of the token before in a mixture, `[D]`."""
    late = 1 - self.layer / self.layers
    power = late / 2 if name in ('receptance', 'gate') else late
    offset = 0.3 * self._depth if name == 'value' else 0.0
    begin = lambda _, shape: 1 - (jnp.arange(width) / width) ** power - offset
    return self.param(f'mix_{name}_D', begin, (width,))

  def _shift(self, base_BLD, number):
    """Returns what a token adds to its shares, `[B, L, N, D]`."""
    width, rank = base_BLD.shape[-1], self.mix_rank
    in_DNR = self.param(
      'mix_in_DNR', nn.initializers.zeros, (width, number, rank)
    )
    out_NRD = self.param('mix_out_NRD', _small, (number, rank, width))
    dtype = base_BLD.dtype
    low_BLNR = jnp.tanh(
      jnp.einsum('BLD,DNR->BLNR', base_BLD, in_DNR.astype(dtype))
    )
    return jnp.einsum('BLNR,NRD->BLND', low_BLNR, out_NRD.astype(dtype))

  def _log_decay(self, x_BLD, heads):
    """Returns logarithms of decays, `[H, K]` or `[B, L, H, K]`, in float32."""
    log_rate = self.param('log_rate_HK', self._log_rates, heads)
    if x_BLD is not None:
      # All decays depend on these small maps: they are made in float32.
      x_BLD = x_BLD.astype(jnp.result_type(x_BLD, jnp.float32))
      rank = self.decay_rank
      in_DR = self.param(
        'decay_in_DR', nn.initializers.zeros, (x_BLD.shape[-1], rank)
      )
      out_RHK = self.param('decay_out_RHK', _small, (rank, *heads))
      low_BLR = jnp.tanh(x_BLD @ in_DR)
      log_rate = log_rate + jnp.einsum('BLR,RHK->BLHK', low_BLR, out_RHK)
    return -jnp.exp(log_rate)

  def _normed(self, out_BLHK):
    """Normalises each head, with gain and offset for each channel."""
    heads = out_BLHK.shape[2:]
    gain = ((1 + self.layer) / self.layers) ** 0.7
    gain_HK = self.param('gain_HK', nn.initializers.constant(gain), heads)
    offset_HK = self.param('offset_HK', nn.initializers.zeros, heads)
    return self.norm(out_BLHK) * gain_HK + offset_HK

  @property
  def _depth(self):
    return self.layer / max(self.layers - 1, 1)

  def _log_rates(self, key, shape):
    """Returns the initial logarithms of `-log w`, from slow to fast."""
    del key
    return -6 + 5 * _ramp(shape) ** (0.7 + 1.3 * self._depth)

  def _bonus(self, key, shape):
    """Returns the initial bonus, raised and lowered by a tenth in turns."""
    del key
    zigzag = (jnp.arange(1, shape[0] * shape[1] + 1) % 3 - 1) * 0.1
    return self._depth * (1 - _ramp(shape)) + zigzag.reshape(shape)

  def _width(self, width):
    return head_width(self.num_heads, self.head_dim, width)


def _small(key, shape):
  return jax.random.uniform(key, shape, minval=-0.01, maxval=0.01)


def _ramp(shape):
  """Returns numbers from 0 to 1 in all channels of all heads."""
  size = shape[0] * shape[1]
  return (jnp.arange(size) / max(size - 1, 1)).reshape(shape)
