"""Which keys a query may see, described rather than materialised.

A mask is a small frozen pytree. It answers `visible(query_position,
key_position)` for whole arrays or for any block of them, so no caller needs an
`L x M` array to say "causal". Masks combine with `&` and `|`.
"""

import dataclasses

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Int, Real


def _mask(*, data: tuple[str, ...] = ()):
  """Registers a frozen dataclass as a pytree whose arrays are `data`."""

  def decorate(cls):
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    meta = [name for name in names if name not in data]
    return jax.tree_util.register_dataclass(cls, list(data), meta)

  return decorate


class Mask:
  """Says which keys each query may see.

  Attributes:
    compares_positions: whether the answer depends on how the position of a
      query relates to that of a key. Then both must count from the same origin.
    causal: whether no query ever sees a key at a later position.
  """

  compares_positions: bool
  causal: bool

  def visible(
    self,
    query_position: Real[Array, 'B L'],
    key_position: Real[Array, 'B M'],
  ) -> Bool[Array, 'B H L M']:
    """Returns True where a query may see a key; any axis may have size 1."""
    raise NotImplementedError

  def __and__(self, other: 'Mask') -> 'Mask':
    return Both(self, other)

  def __or__(self, other: 'Mask') -> 'Mask':
    return Either(self, other)


def _distance(query_position, key_position):
  """Returns query minus key position, `[B, 1, L, M]`."""
  return query_position[:, None, :, None] - key_position[:, None, None, :]


@_mask()
class NoMask(Mask):
  """Lets every query see every key."""

  compares_positions = False
  causal = False

  def visible(self, query_position, key_position):
    del query_position, key_position
    return jnp.ones((1, 1, 1, 1), bool)


@_mask()
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
    return _distance(query_position, key_position) >= -self.offset


@_mask()
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

  def visible(self, query_position, key_position):
    distance = _distance(query_position, key_position)
    return (distance >= 0) & (distance < self.size)


@_mask(data=('length_B',))
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


@_mask(data=('query_BL', 'key_BM'))
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


@_mask(data=('left', 'right'))
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

  def visible(self, query_position, key_position):
    left = self.left.visible(query_position, key_position)
    return left & self.right.visible(query_position, key_position)


@_mask(data=('left', 'right'))
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

  def visible(self, query_position, key_position):
    left = self.left.visible(query_position, key_position)
    return left | self.right.visible(query_position, key_position)
