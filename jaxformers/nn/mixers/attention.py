"""Multi-head attention over one sequence."""

from typing import NamedTuple

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from jaxformers.nn.init import Initializer
from jaxformers.nn.init import VarianceScaling
from jaxformers.nn.linear import Linear
from jaxformers.nn.mixers.base import require_causal
from jaxformers.nn.mixers.base import sow_attention
from jaxformers.nn.placement import ROWS
from jaxformers.nn.placement import axes_of
from jaxformers.nn.placement import sequence_mesh
from jaxformers.ops import segments
from jaxformers.ops.attention import Implementation
from jaxformers.ops.attention import attend
from jaxformers.ops.biases import Bias
from jaxformers.ops.kinds import Kind
from jaxformers.ops.kinds import Softmax
from jaxformers.ops.masks import Causal
from jaxformers.ops.masks import Mask
from jaxformers.ops.masks import Segments
from jaxformers.ops.positions import NoPosition
from jaxformers.ops.positions import PositionScheme
from jaxformers.ops.ring import ring_attend
from jaxformers.ops.scales import InverseSqrt
from jaxformers.ops.scales import Scale


class AttentionState(NamedTuple):
  """Keys and values read so far, in M slots per row.

  Attributes:
    key_BMGK: keys, in the form that the position scheme stores.
    value_BMGK: values.
    position_BM: int32, position of each slot's token within its segment.
    segment_BM: int32, running number of its segment; 0 for an empty slot.
    length_B: int32, number of slots in use.
    cursor: where the rows stand.
  """

  key_BMGK: Float[Array, 'B M G K']
  value_BMGK: Float[Array, 'B M G K']
  position_BM: Int[Array, 'B M']
  segment_BM: Int[Array, 'B M']
  length_B: Int[Array, ' B']
  cursor: segments.Cursor


class Attention(nn.Module):
  """Multi-head attention of a sequence to itself, with an explicit state.

  The state grows by the tokens that are fed, row by row: padding takes no
  slot, so rows of one batch may differ in length. More tokens in one call than
  there are slots are an error; a row that outgrows its state call by call, which
  only running can tell, gives nan from there on.

  Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762,
  section 3.2; grouped heads: Ainslie et al., "GQA", 2023, arXiv 2305.13245.

  Attributes:
    num_heads: H.
    head_dim: K; None for D / H.
    num_kv_heads: G, heads of keys and values, a divisor of H; None for H.
    mask: who sees whom, besides segments.
    position: how positions enter the scores.
    scale: multiplier of the scores; or a module that owns parameters and gives
      one when called with H (`jaxformers.nn.LearnedSSMax`).
    bias: what is added to the scores (`jaxformers.ops.ALiBi`); or a module that
      owns parameters and gives it when called with H
      (`jaxformers.nn.LearnedT5Bias`); None for nothing.
    kind: how scores become weights.
    qk_norm: a norm for queries and keys, applied per head before positions
      (Dehghani et al., 2023, arXiv 2302.05442); None for none.
    use_bias: whether the four projections have biases.
    initializer: how they begin.
    implementation: see `jaxformers.ops.attend`.
  """

  num_heads: int
  head_dim: int | None = None
  num_kv_heads: int | None = None
  mask: Mask = Causal()
  position: PositionScheme = NoPosition()
  scale: Scale | nn.Module = InverseSqrt()
  bias: Bias | nn.Module | None = None
  kind: Kind = Softmax()
  qk_norm: nn.Module | None = None
  use_bias: bool = False
  initializer: Initializer = VarianceScaling()
  implementation: Implementation = 'auto'

  @property
  def causal(self) -> bool:
    return self.mask.causal

  @nn.compact
  def __call__(
    self, x_BLD, state=None, *, segments_BL=None, deterministic=True
  ):
    del deterministic
    query_BLHK, key_BLGK, value_BLGK = self._project(x_BLD)
    if state is None:
      out_BLHK = self._attend_alone(
        query_BLHK, key_BLGK, value_BLGK, segments_BL
      )
    else:
      require_causal(self)
      out_BLHK, state = self._attend_state(
        query_BLHK, key_BLGK, value_BLGK, segments_BL, state
      )
    return self._linear('out', 'HKD', x_BLD.shape[-1:])(out_BLHK), state

  def initial_state(self, batch_size, max_length, width, dtype):
    require_causal(self)
    _, groups, head_dim = self._widths(width)
    shape = batch_size, max_length, groups, head_dim
    return AttentionState(
      key_BMGK=jnp.zeros(shape, dtype),
      value_BMGK=jnp.zeros(shape, dtype),
      position_BM=jnp.zeros(shape[:2], jnp.int32),
      segment_BM=jnp.zeros(shape[:2], jnp.int32),
      length_B=jnp.zeros(batch_size, jnp.int32),
      cursor=segments.start(batch_size),
    )

  def _widths(self, width):
    """Returns H, G and K for inputs of that width."""
    heads = self.num_heads
    groups = heads if self.num_kv_heads is None else self.num_kv_heads
    if heads < 1 or groups < 1 or heads % groups:
      raise ValueError(
        f'{heads} query heads cannot share {groups} key-value heads equally; '
        'choose a num_kv_heads that divides num_heads.'
      )
    if self.head_dim is None and width % heads:
      raise ValueError(
        f'width {width} does not divide into {heads} heads; choose a '
        'num_heads that divides it, or set head_dim.'
      )
    return heads, groups, self.head_dim or width // heads

  def _linear(self, name, letters, features):
    return Linear(letters, features, self.use_bias, self.initializer, name=name)

  def _project(self, x_BLD):
    heads, groups, width = self._widths(x_BLD.shape[-1])
    query_BLHK = self._linear('query', 'DHK', (heads, width))(x_BLD)
    key_BLGK = self._linear('key', 'DGK', (groups, width))(x_BLD)
    value_BLGK = self._linear('value', 'DGK', (groups, width))(x_BLD)
    if self.qk_norm is not None:
      query_BLHK = self.qk_norm.copy(name='query_norm')(query_BLHK)
      key_BLGK = self.qk_norm.copy(name='key_norm')(key_BLGK)
    return query_BLHK, key_BLGK, value_BLGK

  def _given(self, part, name):
    """Returns a part of the score, asked of its module if it is one."""
    if isinstance(part, nn.Module):
      return part.copy(name=name)(self.num_heads)
    return part

  def _attend(self, query, key, value, mask, **positions):
    options = {
      'mask': mask,
      'position': self.position,
      'scale': self._given(self.scale, 'score'),
      'bias': self._given(self.bias, 'score_bias'),
      'kind': self.kind,
      **positions,
    }
    sow_attention(self, query, key, **options)
    return attend(
      query, key, value, implementation=self.implementation, **options
    )

  def _attend_alone(self, query, key, value, segments_BL):
    mesh = sequence_mesh(query.shape[1])
    if mesh is not None and self._may_go_round():
      return self._attend_ring(mesh, query, key, value, segments_BL)
    if segments_BL is None:
      return self._attend(query, key, value, self.mask)
    begin = segments.start(query.shape[0])
    (position_BL, number_BL), _ = segments.advance(begin, segments_BL)
    return self._attend(
      query,
      key,
      value,
      self.mask & Segments(number_BL, number_BL),
      query_position=position_BL,
      key_position=position_BL,
    )

  def _may_go_round(self):
    """Whether keys may visit the queries of other devices in turn."""
    return (
      self.bias is None
      and isinstance(self.kind, Softmax)
      and not isinstance(self.scale, nn.Module)
      and not jax.tree.leaves(self.mask)
      and self.implementation in ('auto', 'blockwise')
      and not self.is_mutable_collection('diagnostics')
    )

  def _attend_ring(self, mesh, query, key, value, segments_BL):
    """Attends with sequences cut over the devices of `sequence`."""
    if segments_BL is None:
      position, number_BL = jnp.arange(query.shape[1]), None
    else:
      begin = segments.start(query.shape[0])
      (position, number_BL), _ = segments.advance(begin, segments_BL)
    rows = axes_of(mesh, ROWS, query.shape[0])
    heads = axes_of(mesh, ('tensor',), key.shape[2])

    def attended(query, key, value, position, number_BL):
      return ring_attend(
        query,
        key,
        value,
        axis_name='sequence',
        query_position=position,
        key_position=position,
        query_segment=number_BL,
        key_segment=number_BL,
        position=self.position,
        scale=self.scale,
        mask=self.mask,
      )

    tokens = PartitionSpec(rows, 'sequence')
    per_head = PartitionSpec(rows, 'sequence', heads)
    return jax.shard_map(
      attended,
      mesh=mesh,
      in_specs=(
        per_head,
        per_head,
        per_head,
        tokens if position.ndim == 2 else PartitionSpec('sequence'),
        tokens,
      ),
      out_specs=per_head,
      check_vma=False,
    )(query, key, value, position, number_BL)

  def _attend_state(self, query, key, value, segments_BL, state):
    if segments_BL is None:
      _check_room(query.shape[1], state)
      segments_BL = jnp.ones(query.shape[:2], jnp.int32)
    (position_BL, number_BL), cursor = segments.advance(
      state.cursor, segments_BL
    )
    key = self.position.store(key, position_BL)
    state, fits_B = _write(state, key, value, position_BL, number_BL)
    out_BLHK = self._attend(
      query,
      state.key_BMGK,
      state.value_BMGK,
      self.mask & Segments(number_BL, state.segment_BM),
      query_position=position_BL,
      key_position=state.position_BM,
      keys_stored=True,
    )
    out_BLHK = jnp.where(fits_B[:, None, None, None], out_BLHK, jnp.nan)
    return out_BLHK, state._replace(cursor=cursor)


def _write(state, key_BLGK, value_BLGK, position_BL, number_BL):
  """Puts each token into the next free slot of its row, and padding nowhere."""
  slots = state.key_BMGK.shape[1]
  is_token = number_BL != 0
  slot_BL = state.length_B[:, None] + jnp.cumsum(is_token, 1, jnp.int32) - 1
  slot_BL = jnp.where(is_token, slot_BL, slots)
  row_B1 = jnp.arange(slot_BL.shape[0])[:, None]

  def put(old, new):
    return old.at[row_B1, slot_BL].set(new.astype(old.dtype), mode='drop')

  length_B = state.length_B + is_token.sum(axis=1, dtype=jnp.int32)
  return state._replace(
    key_BMGK=put(state.key_BMGK, key_BLGK),
    value_BMGK=put(state.value_BMGK, value_BLGK),
    position_BM=put(state.position_BM, position_BL),
    segment_BM=put(state.segment_BM, number_BL),
    length_B=length_B,
  ), length_B <= slots


def _check_room(length, state):
  """Raises if so many tokens cannot fit, as far as is known while tracing."""
  if length > (slots := state.key_BMGK.shape[1]):
    raise ValueError(
      f'{length} tokens do not fit a state made for {slots}; make it with a '
      'larger max_length.'
    )
