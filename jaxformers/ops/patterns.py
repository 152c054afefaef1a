"""Sparse patterns of attention, computed from positions.

With stride or block length l and c columns, the patterns of the Sparse
Transformer are

- strided: `Window(l)` and `Strided(l)`. The paper's local set has one key more,
  `Window(l + 1)`; its released kernels have l;
- fixed: `Local1D(l)` and `BlockSummary(l, c)`.

Give one layer the first mask and the next layer the second, or merge them in
one attention, `Local1D(l) | BlockSummary(l, c)`. The fixed pattern is best
merged: by itself a `BlockSummary` leaves the first queries without any key.

The patterns of the Image Transformer are `Local1D` and `Local2D`.
"""

import dataclasses
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Shaped
import numpy as np

from jaxformers.ops.counting import Term
from jaxformers.ops.masks import Mask


class _Pattern(Mask):
  """A relation between positions, of which the causal form keeps the past."""

  compares_positions = True

  def visible(self, query_position, key_position):
    query = query_position[:, None, :, None]
    key = key_position[:, None, None, :]
    relates = self._relates(query, key)
    return relates & (key <= query) if self.causal else relates

  def may_see(self, query, key):
    may_relate = self._may_relate(query, key)
    is_past = key.low[None] <= query.high[:, None]
    return may_relate & is_past if self.causal else may_relate


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Strided(_Pattern):
  """Lets a query see every `stride`-th position, counted back from itself.

  `(i - j) mod stride = 0`. With a `Window` of the same size every position is
  reached in two steps. Meant for data with that period, such as images with so
  many tokens per row.

  Each run of `stride` keys holds one that is visible, so blocks of keys as long
  as that cannot be skipped. Long sequences are better sorted by `residue =
  position % stride`: then `Causal() & Segments(residue + 1, residue + 1)`, given
  the sorted positions, is the same mask with all other residues skipped.

  Source: Child et al., "Generating Long Sequences with Sparse Transformers",
  2019, arXiv 1904.10509, section 4.3, A^(2) of strided attention; without
  `causal`, the dilated attention of Su Jianlin, 2019,
  https://kexue.fm/archives/6853.

  Attributes:
    stride: l, about the square root of the length.
    causal: whether later keys are hidden.
  """

  stride: int
  causal: bool = True

  def __post_init__(self):
    _check_at_least(1, 'Strided', stride=self.stride)

  def _relates(self, query, key):
    return (query - key) % self.stride == 0

  def _may_relate(self, query, key):
    nearest = query.low[:, None] - key.high[None]
    farthest = query.high[:, None] - key.low[None]
    if self.causal:
      nearest = jnp.maximum(nearest, 0)
    return farthest // self.stride * self.stride >= nearest

  def terms(self, query_position, key_position):
    groups = ((query_position % self.stride, key_position % self.stride),)
    high = query_position if self.causal else None
    return (Term(high=high, groups=groups),)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BlockSummary(_Pattern):
  """Lets a query see the last columns of each block, which sum the block up.

  `l - c (s + 1) <= j mod l < l - c s` with s the sub-block of the head: s = 0
  takes the last c positions of each block of l. Queries before the first such
  position see nothing.

  Source: Child et al., "Generating Long Sequences with Sparse Transformers",
  2019, arXiv 1904.10509, section 4.3, A^(2) of fixed attention; sub-blocks:
  code at https://github.com/openai/sparse_attention.

  Attributes:
    size: l, positions per block; 128 or 256 in the paper.
    columns: c, positions of a block that are visible; 8 to 32 in the paper.
    sub_block: s, one for all heads or one per head, such as `(0, 1, 2, 3) * 2`
      for eight heads.
    causal: whether later keys are hidden.
  """

  size: int
  columns: int
  sub_block: tuple[int, ...] = (0,)
  causal: bool = True

  def __post_init__(self):
    _check_at_least(1, 'BlockSummary', size=self.size, columns=self.columns)
    if not self.sub_block:
      raise ValueError(
        'BlockSummary: sub_block must name at least one, such as (0,) for the '
        'last columns of a block.'
      )
    _check_at_least(0, 'BlockSummary', sub_block=min(self.sub_block))
    if self.columns * (max(self.sub_block) + 1) > self.size:
      raise ValueError(
        f'a block of {self.size} has no room for sub-block '
        f'{max(self.sub_block)} of {self.columns} columns; take fewer or '
        'smaller sub-blocks.'
      )

  @property
  def compares_positions(self) -> bool:
    return self.causal

  def _first(self):
    """Returns the first visible column of each head, `[H]`."""
    return self.size - self.columns * (np.array(self.sub_block) + 1)

  def _relates(self, query, key):
    del query
    column = key % self.size - self._first()[:, None, None]
    return (0 <= column) & (column < self.columns)

  def _may_relate(self, query, key):
    # How far from the lowest key the next visible one is, for any of the heads.
    column = (key.low[:, None] - self._first()) % self.size
    step = jnp.where(column < self.columns, 0, self.size - column).min(axis=1)
    next_key = key.low + step
    may_relate = (next_key <= key.high)[None]
    if self.causal:
      may_relate &= next_key[None] <= query.high[:, None]
    return may_relate

  def terms(self, query_position, key_position):
    if len(self.sub_block) > 1:
      return None
    is_key = self._relates(None, key_position[:, None, None])[:, 0, 0]
    return (Term(high=query_position if self.causal else None, is_key=is_key),)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Local1D(_Pattern):
  """Lets the queries of a block see that block and some positions beside it.

  Query i of block b = floor(i / l) sees `b l - m <= j < (b + 1) l + m`, and if
  causal no key after itself. Without memory these are blocks that do not know
  of each other, the local part of the Sparse Transformer's fixed attention.

  Source: Parmar et al., "Image Transformer", 2018, arXiv 1802.05751, section
  3.3, 1D local attention; the form that is not causal: `local_attention_1d` of
  https://github.com/tensorflow/tensor2tensor. Without memory: Child et al.,
  2019, arXiv 1904.10509, section 4.3, A^(1) of fixed attention.

  Attributes:
    size: l, queries per block; 256 in the released code.
    memory: m, positions before the block that it sees, and after it if not
      causal; the released code of the paper takes m = l.
    causal: whether later keys are hidden.
  """

  size: int
  memory: int = 0
  causal: bool = True

  def __post_init__(self):
    _check_at_least(1, 'Local1D', size=self.size)
    _check_at_least(0, 'Local1D', memory=self.memory)

  @property
  def reach(self) -> int:
    return self.size + self.memory

  def _range(self, first_query, last_query):
    """Returns the first key that the queries see, and one past the last."""
    low = first_query // self.size * self.size - self.memory
    return low, (last_query // self.size + 1) * self.size + self.memory

  def _relates(self, query, key):
    low, high = self._range(query, query)
    return (low <= key) & (key < high)

  def _may_relate(self, query, key):
    low, high = self._range(query.low, query.high)
    return (low[:, None] <= key.high[None]) & (key.low[None] < high[:, None])

  def terms(self, query_position, key_position):
    del key_position
    low, high = self._range(query_position, query_position)
    return (Term(low=low, high=query_position if self.causal else high - 1),)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Local2D(_Pattern):
  """Lets the queries of a tile of an image see it and what surrounds it.

  Positions count in the order of generation, `to_block_raster`: tiles come one
  after the other, row by row, and so do the cells within each. Tiles at the
  right and bottom edge may be smaller.

  With `(R, C)` the upper left corner of its tile, a query sees the rows `R -
  rows` to `R + height + rows - 1` and the columns `C - columns` to `C + width +
  columns - 1`, and if causal nothing after itself: that leaves the rows above,
  the columns to the left, and the part of its own tile that came before. What
  lies outside of the image neither sees nor is seen.

  Blocks of attention skip best if each holds whole tiles, or whole rows of one.

  Source: Parmar et al., "Image Transformer", 2018, arXiv 1802.05751, section
  3.3, 2D local attention; code: `masked_local_attention_2d` of
  https://github.com/tensorflow/tensor2tensor.

  Attributes:
    image: rows and columns of the image. Channels that are tokens of their own
      count as columns.
    tile: height and width of a block of queries; (16, 16) in the released code.
    memory: rows above (if not causal, also below) and columns on either side
      that a tile sees besides itself; (16, 32) in the released code.
    causal: whether later keys are hidden.
  """

  image: tuple[int, int]
  tile: tuple[int, int]
  memory: tuple[int, int] = (0, 0)
  causal: bool = True

  def __post_init__(self):
    _check_pair(1, 'image', self.image)
    _check_pair(1, 'tile', self.tile)
    _check_pair(0, 'memory', self.memory)

  def _window(self, first, last):
    """Returns what the queries of the tiles from `first` to `last` see."""
    rows, columns = self.memory
    tiles = _tiles(first, last, self.image, self.tile)
    return _Rectangle(
      tiles.top - rows,
      tiles.bottom + rows,
      tiles.left - columns,
      tiles.right + columns,
    )

  def _relates(self, query, key):
    query_cell = _cell(query, self.image, self.tile)
    window = self._window(query_cell, query_cell)
    _, _, row, column = _cell(key, self.image, self.tile)
    cells = self.image[0] * self.image[1]
    are_inside = (query >= 0) & (query < cells) & (key >= 0) & (key < cells)
    return are_inside & _meet(window, _Rectangle(row, row, column, column))

  def _may_relate(self, query, key):
    final = self.image[0] * self.image[1] - 1
    query_cells, key_cells = (
      [_cell(jnp.clip(end, 0, final), self.image, self.tile) for end in span]
      for span in (query, key)
    )
    window = self._window(*query_cells)
    tiles = _tiles(*key_cells, self.image, self.tile)
    # Within one tile, as many rows as the keys take.
    first, last = key_cells
    is_one = (first.top == last.top) & (first.left == last.left)
    tiles = tiles._replace(
      top=jnp.where(is_one, first.row, tiles.top),
      bottom=jnp.where(is_one, last.row, tiles.bottom),
    )
    return _meet(
      _Rectangle(*(edge[:, None] for edge in window)),
      _Rectangle(*(edge[None] for edge in tiles)),
    )


def to_block_raster(
  x: Shaped[Array, 'B L *rest'], image: tuple[int, int], tile: tuple[int, int]
) -> Shaped[Array, 'B L *rest']:
  """Orders the cells of images tile by tile, as `Local2D` counts them.

  Source: Parmar et al., "Image Transformer", 2018, arXiv 1802.05751, section
  3.3.

  Args:
    x: something per cell, in raster order: row by row.
    image: rows and columns of the image, as for `Local2D`.
    tile: height and width of a tile.
  """
  return x[:, _raster_index(x, image, tile)]


def from_block_raster(
  x: Shaped[Array, 'B L *rest'], image: tuple[int, int], tile: tuple[int, int]
) -> Shaped[Array, 'B L *rest']:
  """Orders the cells of images row by row; the inverse of `to_block_raster`.

  Source: Parmar et al., "Image Transformer", 2018, arXiv 1802.05751, section
  3.3.

  Args:
    x: something per cell, tile by tile.
    image: rows and columns of the image.
    tile: height and width of a tile.
  """
  return x[:, np.argsort(_raster_index(x, image, tile))]


class _Cell(NamedTuple):
  """Where positions stand in an image, and their tile's upper left corner."""

  top: Array
  left: Array
  row: Array
  column: Array


class _Rectangle(NamedTuple):
  """Rows and columns of an image, all four inclusive."""

  top: Array
  bottom: Array
  left: Array
  right: Array


def _cell(position, image, tile):
  """Finds positions of the order of generation in the image."""
  (height, width), (rows, columns) = image, tile
  top = position // (rows * width) * rows
  position = position % (rows * width)
  rows = (height - top).clip(1, rows)  # Fewer at the bottom edge.
  left = position // (rows * columns) * columns
  position = position % (rows * columns)
  columns = (width - left).clip(1, columns)
  return _Cell(top, left, top + position // columns, left + position % columns)


def _tiles(first, last, image, tile):
  """Returns the smallest rectangle around the tiles between two cells."""
  is_one_row = first.top == last.top
  return _Rectangle(
    first.top,
    last.top + tile[0] - 1,
    jnp.where(is_one_row, first.left, 0),
    jnp.where(is_one_row, last.left + tile[1], image[1]) - 1,
  )


def _meet(a, b):
  rows_meet = (a.top <= b.bottom) & (b.top <= a.bottom)
  return rows_meet & (a.left <= b.right) & (b.left <= a.right)


def _raster_index(x, image, tile):
  """Returns the place in raster order of each position, `[L]`."""
  _check_pair(1, 'image', image)
  _check_pair(1, 'tile', tile)
  height, width = image
  if x.ndim < 2 or x.shape[1] != height * width:
    raise ValueError(
      f'an image of {height} by {width} has {height * width} cells, so x must '
      f'have shape [B, {height * width}, ...], got {x.shape}.'
    )
  cell = _cell(np.arange(height * width), image, tile)
  return cell.row * width + cell.column


def _check_at_least(least, name, **fields):
  for field, value in fields.items():
    if value < least:
      raise ValueError(f'{name} needs {field} >= {least}, got {value}.')


def _check_pair(least, field, pair):
  if not isinstance(pair, tuple) or len(pair) != 2 or min(pair) < least:
    raise ValueError(
      f'{field} must be a tuple (rows, columns) of numbers >= {least}, got '
      f'{pair}.'
    )
