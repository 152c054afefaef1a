"""Which keys a query may see, described rather than materialised.

A mask is a small frozen pytree. It answers `visible(query_position,
key_position)` for whole arrays or for any block of them, so no caller needs an
`L x M` array to say "causal". Masks combine with `&` and `|`.
"""

from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Int, Real
import numpy as np

from jaxformers.ops import counting
from jaxformers.ops.counting import Term
from jaxformers.ops.counting import Terms
from jaxformers.ops.description import description
from jaxformers.ops.description import distances
from jaxformers.ops.tile import Tile
from jaxformers.ops.tile import cut


class Span(NamedTuple):
  """The smallest and largest position in each of n blocks.

  Attributes:
    low: `[n]`.
    high: `[n]`.
  """

  low: Real[Array, ' n']
  high: Real[Array, ' n']


class Mask:
  """Says which keys each query may see.

  Attributes:
    compares_positions: whether the answer depends on how the position of a
      query relates to that of a key. Then both must count from the same origin.
    causal: whether no query ever sees a key at a later position.
    reach: how many positions from its own the furthest key is that a query may
      see, itself included; None if there is no such limit. Blocks adapt to it.
  """

  compares_positions: bool
  causal: bool
  reach: int | None = None

  def visible(
    self,
    query_position: Real[Array, 'B L'],
    key_position: Real[Array, 'B M'],
  ) -> Bool[Array, 'B H L M']:
    """Returns True where a query may see a key; any axis may have size 1."""
    raise NotImplementedError

  def exists(self, key_position: Real[Array, 'B M']) -> Bool[Array, 'B M']:
    """Returns False for keys that no query whatever may see; axes may be 1.

    Padding and empty slots of a cache may hold anything, so they are set to
    zero before anything is computed from them.
    """
    del key_position
    return jnp.ones((1, 1), bool)

  def may_see(self, query: Span, key: Span) -> Bool[Array, 'n m']:
    """Returns False for blocks of queries that see nothing of a block of keys.

    What a blockwise implementation may skip. True is always right; any axis may
    have size 1. Asked of `padded` masks.

    Args:
      query: positions of n blocks of queries of equal size.
      key: positions of m blocks of keys of equal size.
    """
    del query, key
    return jnp.ones((1, 1), bool)

  def terms(
    self, query_position: Int[Array, 'B L'], key_position: Int[Array, 'B M']
  ) -> Terms | None:
    """Returns terms whose sum is 1 where a query sees a key, and 0 elsewhere.

    What counts visible keys without looking at pairs; None if there are none.
    """
    del query_position, key_position

  def count(
    self, query_position: Real[Array, 'B L'], key_position: Real[Array, 'B M']
  ) -> Int[Array, 'B H L'] | None:
    """Counts the keys that each query sees, without looking at every pair.

    Args:
      query_position: positions of the queries.
      key_position: positions of the keys, in any order.

    Returns:
      int32, exact; any axis may have size 1. None where only counting pairs is
      exact: for a mask without `terms`, and for fractional positions.
    """
    dtype = jnp.result_type(query_position, key_position)
    if not jnp.issubdtype(dtype, jnp.signedinteger):
      return None
    queries = jnp.asarray(query_position, dtype)
    keys = jnp.asarray(key_position, dtype)
    terms = self.terms(queries, keys)
    if terms is None:
      return None
    return counting.count(terms, queries.shape[1], keys)

  def padded(self, queries: int, keys: int) -> 'Mask':
    """Returns the mask with its arrays padded to multiples of block sizes."""
    del queries, keys
    return self

  def block(self, tile: Tile) -> 'Mask':
    """Returns the mask of some rows, queries and keys, for `visible` of them.

    A mask that holds arrays says so itself, for only it knows their axes.

    Raises:
      NotImplementedError: if it does not.
    """
    del tile
    if jax.tree.leaves(self):
      raise NotImplementedError(
        f'{type(self).__name__} holds arrays, so it must define block(tile), and '
        'padded if they have an axis of queries or keys; see Lengths and '
        "Segments. implementation='xla' needs neither."
      )
    return self

  def __and__(self, other: 'Mask') -> 'Mask':
    return Both(self, other)

  def __or__(self, other: 'Mask') -> 'Mask':
    return Either(self, other)


@description()
class NoMask(Mask):
  """Lets every query see every key."""

  compares_positions = False
  causal = False

  def visible(self, query_position, key_position):
    del query_position, key_position
    return jnp.ones((1, 1, 1, 1), bool)

  def terms(self, query_position, key_position):
    del query_position, key_position
    return (Term(),)


@description()
class Causal(Mask):
  """Lets a query at position i see the keys at positions j <= i + offset.

  Attributes:
    offset: how far the positions of the queries are behind the truth, for
      callers that number a chunk of queries from zero: the count of keys that
      came before the chunk. Leave it at 0 if `query_position` is given.
  """

  offset: int = 0

  compares_positions = True

  @property
  def causal(self) -> bool:
    return self.offset <= 0

  def visible(self, query_position, key_position):
    return distances(query_position, key_position) >= -self.offset

  def may_see(self, query, key):
    return key.low[None] <= query.high[:, None] + self.offset

  def terms(self, query_position, key_position):
    del key_position
    return (Term(high=query_position + self.offset),)


@description()
class Window(Mask):
  """Lets a query see itself and the `size - 1` positions before it.

  `0 <= i - j < size`: exactly `size` keys. (`jax.nn.dot_product_attention`
  counts differently: its `local_window_size=(l, r)` means `l + 1 + r` keys.)

  Attributes:
    size: number of visible positions, including the query's own.
  """

  size: int

  compares_positions = True
  causal = True

  def __post_init__(self):
    if self.size < 1:
      raise ValueError(f'Window needs size >= 1, got {self.size}.')

  @property
  def reach(self) -> int:
    return self.size

  def visible(self, query_position, key_position):
    distance = distances(query_position, key_position)
    return (distance >= 0) & (distance < self.size)

  def may_see(self, query, key):
    nearest = query.low[:, None] - key.high[None]
    return (query.high[:, None] >= key.low[None]) & (nearest < self.size)

  def terms(self, query_position, key_position):
    del key_position
    low = query_position - (self.size - 1)
    return (Term(low=low, high=query_position),)


@description(data=('length_B',))
class Lengths(Mask):
  """Lets every query see the keys at positions below a length per sequence.

  Attributes:
    length_B: int `[B]`, number of valid keys of each sequence.
  """

  length_B: Int[Array, ' B']

  compares_positions = False
  causal = False

  def visible(self, query_position, key_position):
    del query_position
    return (key_position < self.length_B[:, None])[:, None, None, :]

  def exists(self, key_position):
    return key_position < self.length_B[:, None]

  def may_see(self, query, key):
    del query
    return (key.low < self.length_B.max())[None]

  def block(self, tile):
    return Lengths(cut(self.length_B, 0, tile.rows))

  def terms(self, query_position, key_position):
    del query_position
    return (Term(is_key=self.exists(key_position)),)


@description(data=('query_BL', 'key_BM'))
class Segments(Mask):
  """Lets a query see the keys of its own segment; segment 0 is padding.

  A padded query sees nothing, and nothing sees a padded key.

  Attributes:
    query_BL: int `[B, L]`, segment of each query.
    key_BM: int `[B, M]`, segment of each key.
  """

  query_BL: Int[Array, 'B L']
  key_BM: Int[Array, 'B M']

  compares_positions = False
  causal = False

  def visible(self, query_position, key_position):
    del query_position, key_position
    query_BLM = self.query_BL[:, :, None]
    key_BLM = self.key_BM[:, None, :]
    return ((query_BLM == key_BLM) & (key_BLM != 0))[:, None]

  def exists(self, key_position):
    del key_position
    return self.key_BM != 0

  def may_see(self, query, key):
    query_low, query_high = _segment_span(self.query_BL, query.low.shape[0])
    key_low, key_high = _segment_span(self.key_BM, key.low.shape[0])
    above = query_high[:, :, None] >= key_low[:, None]
    return (above & (query_low[:, :, None] <= key_high[:, None])).any(axis=0)

  def terms(self, query_position, key_position):
    del query_position
    groups = ((self.query_BL, self.key_BM),)
    return (Term(groups=groups, is_key=self.exists(key_position)),)

  def padded(self, queries, keys):
    return Segments(_pad(self.query_BL, 1, queries), _pad(self.key_BM, 1, keys))

  def block(self, tile):
    return Segments(
      cut(cut(self.query_BL, 0, tile.rows), 1, tile.queries),
      cut(cut(self.key_BM, 0, tile.rows), 1, tile.keys),
    )


def _pad(x, axis, multiple):
  """Appends zeros along an axis, up to a multiple of a length."""
  padding = [(0, 0)] * x.ndim
  padding[axis] = 0, -x.shape[axis] % multiple
  return jnp.pad(x, padding)


def _any_per_block(x, axis, blocks):
  """Returns whether anything is true in each of some blocks along an axis."""
  shape = list(x.shape)
  shape[axis : axis + 1] = blocks, shape[axis] // blocks
  return x.reshape(shape).any(axis=axis + 1)


def _segment_span(segments_BL, blocks):
  """Returns the lowest and highest segment of each block, without padding."""
  ids = segments_BL.reshape(segments_BL.shape[0], blocks, -1)
  none = jnp.iinfo(ids.dtype).max
  return jnp.where(ids == 0, none, ids).min(axis=2), ids.max(axis=2)


def _reaches(mask):
  """Returns the limits that the two parts of a mask have."""
  reaches = mask.left.reach, mask.right.reach
  return [reach for reach in reaches if reach is not None]


@description(data=('visible_BHLM',))
class Dense(Mask):
  """Lets a query see a key where an array says so, whatever their positions.

  For patterns that no formula gives. The array is as large as it is; an axis of
  size 1 stands for all batches, heads, queries or keys.

  It says nothing about order, so it never counts as causal, even if no query
  sees a later key: combine it with `Causal()`.

  Attributes:
    visible_BHLM: bool, broadcast to `[B, H, L, M]`.
  """

  visible_BHLM: Bool[Array, '#B #H #L #M']

  compares_positions = False
  causal = False

  def visible(self, query_position, key_position):
    del query_position, key_position
    self._check()
    return self.visible_BHLM

  def exists(self, key_position):
    del key_position
    return self.visible_BHLM.any(axis=(1, 2))

  def may_see(self, query, key):
    seen_LM = self.visible_BHLM.any(axis=(0, 1))
    for axis, span in enumerate((query, key)):
      if seen_LM.shape[axis] > 1:
        seen_LM = _any_per_block(seen_LM, axis, span.low.shape[0])
    return seen_LM

  def padded(self, queries, keys):
    x = self.visible_BHLM
    for axis, multiple in ((2, queries), (3, keys)):
      if x.shape[axis] > 1:
        x = _pad(x, axis, multiple)
    return Dense(x)

  def block(self, tile):
    x = cut(self.visible_BHLM, 0, tile.rows)
    return Dense(cut(cut(x, 2, tile.queries), 3, tile.keys))

  def _check(self):
    # Here and not when made: trees of masks may hold anything but arrays.
    dtype = getattr(self.visible_BHLM, 'dtype', None)
    if dtype is None or dtype != np.bool_:
      raise ValueError(
        'Dense needs a boolean array, True where a query sees a key, got '
        f'{dtype or type(self.visible_BHLM)}; compare first, as in scores > 0.'
      )
    if self.visible_BHLM.ndim != 4:
      raise ValueError(
        'Dense needs an array [B, H, L, M], any axis of which may have size 1, '
        f'got shape {self.visible_BHLM.shape}.'
      )


@description(data=('left', 'right'))
class Both(Mask):
  """Lets a query see a key that both masks let it see; written `left & right`."""

  left: Mask
  right: Mask

  @property
  def compares_positions(self) -> bool:
    return self.left.compares_positions or self.right.compares_positions

  @property
  def causal(self) -> bool:
    return self.left.causal or self.right.causal

  @property
  def reach(self) -> int | None:
    return min(_reaches(self), default=None)

  def visible(self, query_position, key_position):
    left = self.left.visible(query_position, key_position)
    return left & self.right.visible(query_position, key_position)

  def exists(self, key_position):
    left = self.left.exists(key_position)
    return left & self.right.exists(key_position)

  def may_see(self, query, key):
    return self.left.may_see(query, key) & self.right.may_see(query, key)

  def terms(self, *positions):
    left, right = self.left.terms(*positions), self.right.terms(*positions)
    if left is None or right is None:
      return None
    return counting.product(left, right)

  def padded(self, queries, keys):
    return type(self)(
      self.left.padded(queries, keys), self.right.padded(queries, keys)
    )

  def block(self, tile):
    return type(self)(self.left.block(tile), self.right.block(tile))


@description(data=('left', 'right'))
class Either(Mask):
  """Lets a query see a key that either mask lets it see; `left | right`."""

  left: Mask
  right: Mask

  @property
  def compares_positions(self) -> bool:
    return self.left.compares_positions or self.right.compares_positions

  @property
  def causal(self) -> bool:
    return self.left.causal and self.right.causal

  @property
  def reach(self) -> int | None:
    reaches = _reaches(self)
    return max(reaches) if len(reaches) == 2 else None

  def visible(self, query_position, key_position):
    left = self.left.visible(query_position, key_position)
    return left | self.right.visible(query_position, key_position)

  def exists(self, key_position):
    left = self.left.exists(key_position)
    return left | self.right.exists(key_position)

  def may_see(self, query, key):
    return self.left.may_see(query, key) | self.right.may_see(query, key)

  def terms(self, *positions):
    left, right = self.left.terms(*positions), self.right.terms(*positions)
    if left is None or right is None:
      return None
    return counting.union(left, right)

  def padded(self, queries, keys):
    return type(self)(
      self.left.padded(queries, keys), self.right.padded(queries, keys)
    )

  def block(self, tile):
    return type(self)(self.left.block(tile), self.right.block(tile))
