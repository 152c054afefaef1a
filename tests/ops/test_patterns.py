"""Sparse patterns: numbers of the papers, reach, skipping, attention.

Their definitions are checked pair by pair in `test_masks`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.ops import BlockSummary
from jaxformers.ops import Causal
from jaxformers.ops import Dense
from jaxformers.ops import Lengths
from jaxformers.ops import Local1D
from jaxformers.ops import Local2D
from jaxformers.ops import Segments
from jaxformers.ops import Strided
from jaxformers.ops import Window
from jaxformers.ops import attend
from jaxformers.ops import from_block_raster
from jaxformers.ops import to_block_raster
from jaxformers.ops.masks import Span

B, L, H, G, K = 2, 21, 4, 2, 3


def seen(mask, length):
  """Returns who sees whom in a sequence, `[L, M]`."""
  position = np.arange(length)[None]
  visible = mask.visible(position, position)[0, 0]
  return np.broadcast_to(visible, (length, length))


def seen_from(mask, length, i):
  return seen(mask, length)[i].nonzero()[0].tolist()


def test_the_sets_of_position_ten_are_those_of_the_definition():
  assert seen_from(Window(4 + 1), 16, 10) == [6, 7, 8, 9, 10]
  assert seen_from(Strided(4), 16, 10) == [2, 6, 10]
  assert seen_from(Local1D(4), 16, 10) == [8, 9, 10]
  assert seen_from(BlockSummary(4, 1), 16, 10) == [3, 7]


@pytest.mark.parametrize(
  ('mask', 'length', 'pairs'),
  [
    (Window(8), 64, 484),
    (Strided(8), 64, 288),
    (Local1D(8), 64, 288),
    (BlockSummary(8, 2), 64, 472),
    (Causal(), 64, 2080),
    (Window(8) | Strided(8), 64, 484 + 288 - 64),
    (Window(5) | Strided(16), 256, 3190),
    (Local1D(8, 8), 256, 3136),
    (Local1D(16, 16), 256, 6016),
    (Local2D(image=(16, 16), tile=(4, 4), memory=(1, 1)), 256, 4000),
  ],
)
def test_as_many_pairs_are_visible_as_were_counted(mask, length, pairs):
  assert seen(mask, length).sum() == pairs


def test_each_head_has_its_own_columns_of_a_block():
  heads = BlockSummary(16, 2, sub_block=(0, 1, 2, 3))
  position = np.arange(16)[None]
  last = heads.visible(position, position)[0, :, -1]
  columns = [row.nonzero()[0].tolist() for row in last]
  assert columns == [[14, 15], [12, 13], [10, 11], [8, 9]]


def test_two_steps_of_strided_attention_reach_everything_before():
  local, strided = seen(Window(8), 64), seen(Strided(8), 64)
  past = seen(Causal(), 64)
  np.testing.assert_array_equal(local @ strided, past)
  np.testing.assert_array_equal(strided @ local, past)


def test_merged_but_not_interleaved_fixed_attention_reaches_everything():
  local, summary = seen(Local1D(8), 64), seen(BlockSummary(8, 2), 64)
  merged = seen(Local1D(8) | BlockSummary(8, 2), 64)
  np.testing.assert_array_equal(merged @ merged, seen(Causal(), 64))
  assert (summary @ local).sum() == 1912
  assert (local @ summary).sum() == 472


def test_one_block_for_everything_is_causal_attention():
  past = seen(Causal(), 24)
  for mask in (
    Local1D(24),
    Window(24),
    Local2D(image=(4, 6), tile=(4, 6)),
    Local2D(image=(4, 6), tile=(9, 7)),
  ):
    np.testing.assert_array_equal(seen(mask, 24), past)


def test_tiles_without_memory_know_nothing_of_each_other():
  expected = np.kron(np.eye(4, dtype=bool), np.tril(np.ones((6, 6), bool)))
  tiles = Local2D(image=(4, 6), tile=(2, 3))
  np.testing.assert_array_equal(seen(tiles, 24), expected)
  np.testing.assert_array_equal(seen(Local1D(6), 24), expected)


def test_a_tile_sees_above_and_left_but_never_right():
  # Tiles of 2 by 3 in an image of 3 by 3 tiles; the fifth is in the middle.
  mask = Local2D(image=(6, 9), tile=(2, 3), memory=(2, 1))
  visible = seen(mask, 54)[24:30]
  assert visible[0].sum() == 10 + 2 + 1
  assert visible[-1].sum() == 10 + 2 + 6
  picture = np.asarray(from_block_raster(visible[-1:], (6, 9), (2, 3)))
  expected = np.zeros((6, 9), bool)
  expected[0:2, 2:7] = True  # Two rows of five above,
  expected[2:4, 2:6] = True  # one column to the left, and the tile itself.
  np.testing.assert_array_equal(picture.reshape(6, 9), expected)


def test_block_raster_goes_through_tiles_and_back():
  image = np.arange(5 * 7).reshape(1, 35)
  tiled = to_block_raster(image, (5, 7), (2, 4))
  np.testing.assert_array_equal(
    tiled[0],
    [0, 1, 2, 3, 7, 8, 9, 10, 4, 5, 6, 11, 12, 13]
    + [14, 15, 16, 17, 21, 22, 23, 24, 18, 19, 20, 25, 26, 27]
    + [28, 29, 30, 31, 32, 33, 34],
  )
  np.testing.assert_array_equal(from_block_raster(tiled, (5, 7), (2, 4)), image)
  features = jnp.stack([image, -image], axis=-1)
  both = to_block_raster(features, (5, 7), (2, 4))
  np.testing.assert_array_equal(both[..., 1], -tiled)


def blocks_seen(mask, size, length=64):
  blocks = np.arange(length).reshape(-1, size)
  span = Span(blocks[:, 0], blocks[:, -1])
  return int(mask.may_see(span, span).sum())


@pytest.mark.parametrize(
  ('mask', 'size', 'blocks'),
  [
    (Local1D(8), 8, 8),
    (Local1D(8, 8), 8, 15),
    (Local1D(8, 8, causal=False), 8, 22),
    # Even differences of sixteen blocks.
    (Strided(8), 4, 72),
    # One block in four holds summaries.
    (BlockSummary(16, 4), 4, 28),
    # Four rows of two tiles: those above, the one to the left, the own.
    (Local2D(image=(8, 8), tile=(2, 4), memory=(2, 4)), 8, 3 + 3 * 7),
    (Local2D(image=(8, 8), tile=(2, 4), memory=(2, 0)), 8, 2 + 3 * 4),
    # Blocks of one row of a tile: those above meet only its lower row.
    (Local2D(image=(8, 8), tile=(2, 4), memory=(1, 0)), 4, 6 + 6 * 5),
    (Local2D(image=(8, 8), tile=(2, 4), causal=False), 8, 8),
  ],
)
def test_as_many_blocks_are_computed_as_hold_something(mask, size, blocks):
  visible = seen(mask, 64).reshape(64 // size, size, -1, size)
  assert visible.any(axis=(1, 3)).sum() == blocks
  assert blocks_seen(mask, size) == blocks


def arrays():
  shapes = (B, L, H, K), (B, L, G, K), (B, L, G, K)
  return [
    jax.random.normal(jax.random.key(i), shape, jnp.float64)
    for i, shape in enumerate(shapes)
  ]


IDS = np.array([[1] * 6 + [2] * 9 + [0] * 6, [1] * 15 + [3] * 6], np.int32)
RANDOM = np.random.default_rng(0)
PATTERNS = Local1D(8, 2) | BlockSummary(8, 2, (0, 1, 3, 2)) | Strided(5)
IMAGE = Local2D((3, 7), (2, 3), (1, 2)) & Lengths(jnp.array([0, 13]))
MASKS = {
  'patterns': PATTERNS & Segments(IDS, IDS),
  'arrays': Dense(RANDOM.random((B, H, L, L)) < 0.05)
  | Dense(RANDOM.random((B, 1, 1, L)) < 0.05)
  | IMAGE,
}


def outputs(mask, **options):
  """Returns attention and its gradients."""

  def loss(*arguments):
    out = attend(*arguments, mask=mask, **options)
    return jnp.sin(out).sum(), out

  return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays())


materialised = jax.jit(lambda mask: outputs(mask, implementation='xla'))


@pytest.mark.parametrize('name', MASKS)
def test_attention_block_by_block_equals_the_materialised_one(name):
  position = np.arange(L)[None]
  visible = np.asarray(MASKS[name].visible(position, position))
  with jax.enable_x64(True):
    expected = materialised(Dense(np.broadcast_to(visible, (B, H, L, L))))
    actual = jax.jit(
      lambda: outputs(MASKS[name], implementation='blockwise', block=4)
    )()
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12),
    actual,
    expected,
  )


def test_sorted_by_residue_strided_attention_is_causal_within_segments():
  order = np.argsort(np.arange(64) % 8, kind='stable')
  residue = (order % 8 + 1)[None].astype(np.int32)
  mask = Causal() & Segments(residue, residue)
  np.testing.assert_array_equal(
    mask.visible(order[None], order[None])[0, 0],
    seen(Strided(8), 64)[order][:, order],
  )
  blocks = order.reshape(8, 8)
  span = Span(blocks.min(axis=1), blocks.max(axis=1))
  assert mask.may_see(span, span).sum() == 8


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: Strided(0), 'Strided needs stride >= 1, got 0'),
    (lambda: Local1D(0), 'Local1D needs size >= 1, got 0'),
    (lambda: Local1D(4, -1), 'Local1D needs memory >= 0, got -1'),
    (lambda: BlockSummary(8, 0), 'BlockSummary needs columns >= 1, got 0'),
    (lambda: BlockSummary(8, 3, (0, 2)), 'no room for sub-block 2 of 3'),
    (lambda: BlockSummary(8, 3, (-1,)), 'needs sub_block >= 0, got -1'),
    (lambda: BlockSummary(8, 3, ()), 'sub_block must name at least one'),
    (lambda: Local2D((4, 4), (0, 2)), r'tile must be .* >= 1, got \(0, 2\)'),
    (lambda: Local2D([4, 4], (2, 2)), r'image must be a tuple .*\[4, 4\]'),
    (lambda: Local2D((4, 4), (2, 2), (0, -1)), 'memory must be .* >= 0'),
    (
      lambda: to_block_raster(np.zeros((1, 5)), (2, 3), (1, 1)),
      r'2 by 3 has 6 cells, so x must have shape \[B, 6, ...\], got \(1, 5\)',
    ),
  ],
)
def test_what_cannot_be_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
