"""Linear attention over one sequence."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jaxformers.nn.init import Initializer
from jaxformers.nn.init import VarianceScaling
from jaxformers.nn.linear import Linear
from jaxformers.nn.mixers.base import head_width
from jaxformers.nn.mixers.base import locate
from jaxformers.nn.mixers.base import require_causal
from jaxformers.nn.placement import on_shares
from jaxformers.ops import segments
from jaxformers.ops.activations import activation
from jaxformers.ops.linear_attention import LinearMemory
from jaxformers.ops.linear_attention import linear_attention
from jaxformers.ops.positions import NoPosition
from jaxformers.ops.positions import PositionScheme
from jaxformers.ops.recurrence import Method

NOT_NEGATIVE = 'elu_plus_one', 'relu', 'sigmoid', 'squared_relu'
"""Features whose products may be normalised by their sum."""


class LinearAttentionState(NamedTuple):
  """What has been read so far, in constant space.

  Attributes:
    memory: sums over the tokens of the current segment.
    cursor: where the rows stand.
  """

  memory: LinearMemory
  cursor: segments.Cursor


class LinearAttention(nn.Module):
  """Multi-head linear attention of a sequence to itself.

  Time is linear in the length, and the state of a causal one has constant size.

  Source: Katharopoulos et al., "Transformers are RNNs", 2020, arXiv 2006.16236;
  positions in the numerator only: Su et al., "RoFormer", 2021, arXiv
  2104.09864, equation 19; a norm instead of the normaliser: Qin et al., "The
  Devil in Linear Transformer", 2022, arXiv 2210.10340 (NormAttention).

  Attributes:
    num_heads: H.
    head_dim: K; None for D / H.
    feature: name of the map phi of queries and keys, see
      `jaxformers.ops.activations`; `'identity'` for none.
    normalize: whether weights are divided by their sum, which asks for one of
      the features `NOT_NEGATIVE`.
    position: a scheme that turns queries and keys each by itself, as `Rotary`.
    causal: whether tokens see no later ones.
    out_norm: a norm for what each head returns; None for none. Without
      `normalize` outputs grow with the length, and this keeps them at bay.
    use_bias: whether the four projections have biases.
    initializer: how they begin.
    method: see `jaxformers.ops.outer_recurrence`, like `chunk`.
    chunk: tokens per chunk.
  """

  num_heads: int
  head_dim: int | None = None
  feature: str = 'elu_plus_one'
  normalize: bool = True
  position: PositionScheme = NoPosition()
  causal: bool = True
  out_norm: nn.Module | None = None
  use_bias: bool = False
  initializer: Initializer = VarianceScaling()
  method: Method = 'auto'
  chunk: int | None = None

  @nn.compact
  def __call__(
    self, x_BLD, state=None, *, segments_BL=None, deterministic=True
  ):
    del deterministic
    self._check_feature()
    if state is not None:
      require_causal(self)
    places, cursor = locate(
      x_BLD.shape[:2], state and state.cursor, segments_BL
    )
    heads, width = self.num_heads, self._width(x_BLD.shape[-1])
    project = lambda name: self._linear(name, 'DHK', (heads, width))(x_BLD)
    attend = on_shares(linear_attention, 'BLH BLH BLH BH', 'BLH BH')
    out_BLHK, memory = attend(
      project('query'),
      project('key'),
      project('value'),
      state and state.memory,
      feature=activation(self.feature),
      normalize=self.normalize,
      position=self.position,
      places=places,
      causal=self.causal,
      method=self.method,
      chunk=self.chunk,
    )
    if self.out_norm is not None:
      out_BLHK = self.out_norm(out_BLHK)
    y_BLD = self._linear('out', 'HKD', x_BLD.shape[-1:])(out_BLHK)
    if state is not None:
      state = LinearAttentionState(memory, cursor)
    return y_BLD, state

  def initial_state(self, batch_size, max_length, width, dtype):
    del max_length
    require_causal(self)
    head_dim = self._width(width)
    shape = batch_size, self.num_heads, head_dim, head_dim
    dtype = jnp.promote_types(dtype, jnp.float32)
    total_BHK = jnp.zeros(shape[:3], dtype) if self.normalize else None
    return LinearAttentionState(
      LinearMemory(jnp.zeros(shape, dtype), total_BHK),
      segments.start(batch_size),
    )

  def _check_feature(self):
    if self.normalize and self.feature not in NOT_NEGATIVE:
      raise ValueError(
        f'the sum of products of feature {self.feature!r} may vanish, so it '
        f'cannot normalise; choose one of {", ".join(NOT_NEGATIVE)}, or '
        'normalize=False.'
      )

  def _width(self, width):
    return head_width(self.num_heads, self.head_dim, width)

  def _linear(self, name, letters, features):
    return Linear(letters, features, self.use_bias, self.initializer, name=name)
