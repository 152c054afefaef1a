"""What is added to attention scores before the softmax, pair by pair.

A bias is a small frozen pytree whose arrays are its parameters. It gives the
numbers of any rectangle of queries and keys, so that nothing of size `L x M`
needs to exist, and is differentiated through them. The one exception is
`DenseBias`, which is given in full.
"""

import functools
import math

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Int, Real
import numpy as np

from jaxformers.ops.description import description
from jaxformers.ops.description import distances
from jaxformers.ops.tile import Tile
from jaxformers.ops.tile import cut


class Bias:
  """A number for each pair of query and key that is added to its score.

  Arrays of a bias are floating-point parameters; positions and whatever else is
  not differentiated come as arguments or are static fields.

  Attributes:
    compares_positions: whether positions matter; then those of queries and keys
      must count from the same origin.
  """

  compares_positions: bool = True

  def logits(
    self,
    query: Float[Array, 'B L H K'],
    key: Float[Array, 'B M G K'],
    query_position: Real[Array, '#B L'],
    key_position: Real[Array, '#B M'],
  ) -> Float[Array, '#B #H L M']:
    """Returns what is added; axes of batch and heads may have size 1.

    Args:
      query: queries of the first branch, scaled.
      key: keys of the first branch.
      query_position: their positions.
      key_position: their positions.
    """
    raise NotImplementedError

  def padded(self, queries: int, keys: int) -> 'Bias':
    """Returns the bias with its arrays padded to multiples of block sizes."""
    del queries, keys
    return self

  def block(self, tile: Tile) -> 'Bias':
    """Returns what of the bias concerns some rows, queries and keys."""
    del tile
    return self

  def add(self, total: 'Bias', part: 'Bias', tile: Tile) -> 'Bias':
    """Returns the gradient `total` plus that of `block(tile)`."""
    del tile
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, part)


@description(data=('logits_BHLM',))
class DenseBias(Bias):
  """A bias given in full.

  Attributes:
    logits_BHLM: `[B, H, L, M]`; any axis may have size 1.
  """

  logits_BHLM: Float[Array, '#B #H #L #M']

  compares_positions = False

  def logits(self, query, key, query_position, key_position):
    del query, key, query_position, key_position
    return self.logits_BHLM

  def padded(self, queries, keys):
    x = self.logits_BHLM
    padding = [
      (0, -size % block if size > 1 else 0)
      for size, block in zip(x.shape[2:], (queries, keys), strict=True)
    ]
    return DenseBias(jnp.pad(x, ((0, 0), (0, 0), *padding)))

  def block(self, tile):
    x = cut(self.logits_BHLM, 0, tile.rows)
    return DenseBias(cut(cut(x, 2, tile.queries), 3, tile.keys))

  def add(self, total, part, tile):
    total, part = total.logits_BHLM, part.logits_BHLM
    row = 0 if tile.rows is None else tile.rows[0]
    begins = row, 0, tile.queries[0], tile.keys[0]
    starts = [
      jnp.int32(0 if size == 1 else begin)
      for begin, size in zip(begins, total.shape, strict=True)
    ]
    old = jax.lax.dynamic_slice(total, starts, part.shape)
    new = old + part.astype(total.dtype)
    return DenseBias(jax.lax.dynamic_update_slice(total, new, starts))


def as_bias(bias: Bias | Array | None) -> Bias | None:
  """Returns a bias for an array as well.

  Source: none; a property of this library.

  Args:
    bias: one, an array `[B, H, L, M]` whose axes may have size 1, or None.

  Raises:
    ValueError: if an array has not four axes.
  """
  if bias is None or isinstance(bias, Bias):
    return bias
  if jnp.ndim(bias) != 4:
    raise ValueError(
      'a bias must be a Bias or an array [B, H, L, M] whose axes may have size '
      f'1, got {type(bias).__name__} of shape {list(jnp.shape(bias))}.'
    )
  return DenseBias(jnp.asarray(bias))


@description()
class ALiBi(Bias):
  """Lowers a score in proportion to the distance: `-m_h |i - j|`.

  The slopes `m_h` are `2^(-8 (h + 1) / H)`, h = 0 .. H - 1, if H is a power of
  two; otherwise those of the power of two below, followed by every second one
  of the power of two above, as in the released code. Distances count both ways,
  which under a causal mask makes no difference.

  Source: Press et al., "Train Short, Test Long: Attention with Linear Biases
  Enables Input Length Extrapolation", 2021, arXiv 2108.12409, section 3.
  """

  def logits(self, query, key, query_position, key_position):
    del key
    slopes_H = alibi_slopes(query.shape[2])
    distance = jnp.abs(distances(query_position, key_position))
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    return -slopes_H.astype(dtype)[:, None, None] * distance.astype(dtype)


@functools.cache
def alibi_slopes(num_heads: int) -> Float[np.ndarray, ' H']:
  """Returns how fast scores of each head fall with the distance.

  Source: Press et al., "Train Short, Test Long", 2021, arXiv 2108.12409,
  section 3 and, for numbers that are no power of two, the released code.

  Args:
    num_heads: H.
  """
  if num_heads < 1:
    raise ValueError(f'ALiBi needs at least one head, got {num_heads}.')
  below = 2 ** int(math.log2(num_heads))
  slopes = 2 ** (-8 * np.arange(1, below + 1) / below)
  # Every second slope of twice as many heads lies between these.
  between = 2 ** (-8 * np.arange(1, 2 * below, 2) / (2 * below))
  return np.concatenate([slopes, between[: num_heads - below]])


@description(data=('table_NH',))
class T5Bias(Bias):
  """Adds a learned number for each head and bucket of distances.

  Half of the buckets hold one distance each, the others grow logarithmically up
  to `max_distance`; all larger distances share the last. T5 does not divide
  scores by the root of the head width: give it `ConstantScale(1)` for equality
  with published checkpoints.

  Source: Raffel et al., "Exploring the Limits of Transfer Learning with a
  Unified Text-to-Text Transformer", 2019, arXiv 1910.10683, section 2.1;
  buckets as in the released code.

  Attributes:
    table_NH: `[N, H]`, a number for each of N buckets and each head.
    bidirectional: whether later keys have buckets of their own, half of all;
      otherwise they share the bucket of distance 0.
    max_distance: from here on all distances share a bucket.
  """

  table_NH: Float[Array, 'N H']
  bidirectional: bool = False
  max_distance: int = 128

  def logits(self, query, key, query_position, key_position):
    del query, key
    bucket_BLM = t5_bucket(
      distances(query_position, key_position)[:, 0],
      self.table_NH.shape[0],
      bidirectional=self.bidirectional,
      max_distance=self.max_distance,
    )
    return jnp.moveaxis(self.table_NH[bucket_BLM], -1, 1)


def t5_bucket(
  distance: Real[Array, '*B'],
  buckets: int,
  *,
  bidirectional: bool = False,
  max_distance: int = 128,
) -> Int[Array, '*B']:
  """Returns the bucket of each distance, query minus key position.

  Source: Raffel et al., "Exploring the Limits of Transfer Learning with a
  Unified Text-to-Text Transformer", 2019, arXiv 1910.10683, released code
  (`_relative_position_bucket`).

  Args:
    distance: positive for keys before the query.
    buckets: number of buckets.
    bidirectional: see `T5Bias`.
    max_distance: see `T5Bias`.

  Raises:
    ValueError: if the buckets are too few, or odd where halves are needed, or
      `max_distance` does not exceed the distances with a bucket of their own.
  """
  own = buckets // 2 if bidirectional else buckets
  exact = own // 2
  if exact < 1 or (bidirectional and buckets % 2) or max_distance <= exact:
    raise ValueError(
      'T5 buckets need at least 2 buckets, or an even number of at least 4 if '
      'bidirectional, and max_distance beyond the distances that have a bucket '
      f'each, got {buckets} buckets, bidirectional={bidirectional}, '
      f'max_distance={max_distance}.'
    )
  if bidirectional:
    later = jnp.where(distance < 0, own, 0)
    distance = jnp.abs(distance)
  else:
    later = 0
    distance = jnp.maximum(distance, 0)
  # At least 1 in the logarithm: smaller ones take the other branch.
  ratio = jnp.maximum(distance, exact).astype(jnp.float32) / exact
  steps = jnp.log(ratio) / math.log(max_distance / exact) * (own - exact)
  far = jnp.minimum(exact + steps.astype(jnp.int32), own - 1)
  near = distance.astype(jnp.int32)
  return later + jnp.where(distance < exact, near, far)


@description(data=('table_NH',))
class RelativeBias(Bias):
  """Adds a learned number for each head and distance, clipped at both ends.

  Source: Shaw et al., "Self-Attention with Relative Position Representations",
  2018, arXiv 1803.02155, section 3.2: clipped distances, here with one number
  for each instead of a vector.

  Attributes:
    table_NH: `[2 C + 1, H]`: row c is for `i - j = c - C`; distances beyond C
      share the rows at the ends.
  """

  table_NH: Float[Array, 'N H']

  def logits(self, query, key, query_position, key_position):
    del query, key
    if not self.table_NH.shape[0] % 2:
      raise ValueError(
        'RelativeBias needs a table [2 C + 1, H] for distances -C .. C, got '
        f'{list(self.table_NH.shape)}.'
      )
    furthest = self.table_NH.shape[0] // 2
    distance = distances(query_position, key_position)[:, 0]
    row = jnp.clip(distance, -furthest, furthest).astype(jnp.int32) + furthest
    return jnp.moveaxis(self.table_NH[row], -1, 1)
