"""Masks against their definitions, pair by pair; skipping and counting."""

import dataclasses
import functools

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
from jaxformers.ops import LogLength
from jaxformers.ops import Mask
from jaxformers.ops import NoMask
from jaxformers.ops import Segments
from jaxformers.ops import Strided
from jaxformers.ops import Window
from jaxformers.ops import attend
from jaxformers.ops import attention
from jaxformers.ops.masks import Span

B, H, L, M = 8, 3, 11, 14

RANDOM = np.random.default_rng(0)
SPARSE = RANDOM.random((B, H, L, M)) < 0.02
QUERY_IDS = RANDOM.integers(0, 4, (B, L))
KEY_IDS = RANDOM.integers(0, 4, (B, M))
LENGTHS = 4, 0, 9, 1, 30, 12, 7, 3


def generation_order(image, tile):
  """Lists (row, column, top, left) of each cell as it is generated."""
  cells = []
  for top in range(0, image[0], tile[0]):
    for left in range(0, image[1], tile[1]):
      for row in range(top, min(top + tile[0], image[0])):
        for column in range(left, min(left + tile[1], image[1])):
          cells.append((row, column, top, left))
  return cells


IMAGE, TILE, MEMORY = (5, 7), (2, 3), (1, 2)
CELLS = generation_order(IMAGE, TILE)


def local_2d(i, j, causal):
  """The definition in its parts: top, left and centre, or one window."""
  if not (0 <= i < len(CELLS) and 0 <= j < len(CELLS)):
    return False
  _, _, top, left = CELLS[i]
  row, column, key_top, key_left = CELLS[j]
  (height, width), (rows, columns) = TILE, MEMORY
  across = left - columns <= column < left + width + columns
  if not causal:
    return across and top - rows <= row < top + height + rows
  above = top - rows <= row < top and across
  beside = top <= row < top + height and left - columns <= column < left
  own = (key_top, key_left) == (top, left) and j <= i
  return above or beside or own


def summary(i, j, s):
  return 6 - 2 * (s + 1) <= j % 6 < 6 - 2 * s and j <= i


# Each mask with its definition: whether the query at position i, the lth of row
# b, sees in head h the key at position j, the mth.
SINGLE = {
  'none': (NoMask(), lambda i, j, b, h, l, m: True),
  'causal': (Causal(), lambda i, j, b, h, l, m: j <= i),
  'offset': (Causal(3), lambda i, j, b, h, l, m: j <= i + 3),
  'behind': (Causal(-2), lambda i, j, b, h, l, m: j <= i - 2),
  'window': (Window(4), lambda i, j, b, h, l, m: 0 <= i - j < 4),
  'lengths': (
    Lengths(jnp.array(LENGTHS)),
    lambda i, j, b, h, l, m: j < LENGTHS[b],
  ),
  'segments': (
    Segments(jnp.array(QUERY_IDS), jnp.array(KEY_IDS)),
    lambda i, j, b, h, l, m: QUERY_IDS[b, l] == KEY_IDS[b, m] != 0,
  ),
  'dense': (
    Dense(jnp.array(SPARSE)),
    lambda i, j, b, h, l, m: SPARSE[b, h, l, m],
  ),
  'dense_keys': (
    Dense(jnp.array(SPARSE[:, :1, :1])),
    lambda i, j, b, h, l, m: SPARSE[b, 0, 0, m],
  ),
  'strided': (
    Strided(4),
    lambda i, j, b, h, l, m: j <= i and (i - j) % 4 == 0,
  ),
  'dilated': (
    Strided(4, causal=False),
    lambda i, j, b, h, l, m: (i - j) % 4 == 0,
  ),
  'summary': (BlockSummary(6, 2), lambda i, j, b, h, l, m: summary(i, j, 0)),
  'summary_heads': (
    BlockSummary(6, 2, sub_block=(0, 2, 1)),
    lambda i, j, b, h, l, m: summary(i, j, (0, 2, 1)[h]),
  ),
  'summary_both': (
    BlockSummary(6, 2, causal=False),
    lambda i, j, b, h, l, m: j % 6 >= 4,
  ),
  'local_1d': (
    Local1D(4, 3),
    lambda i, j, b, h, l, m: i // 4 * 4 - 3 <= j <= i,
  ),
  'local_1d_both': (
    Local1D(4, 3, causal=False),
    lambda i, j, b, h, l, m: i // 4 * 4 - 3 <= j < (i // 4 + 1) * 4 + 3,
  ),
  'local_2d': (
    Local2D(IMAGE, TILE, MEMORY),
    lambda i, j, b, h, l, m: local_2d(i, j, True),
  ),
  'local_2d_both': (
    Local2D(IMAGE, TILE, MEMORY, causal=False),
    lambda i, j, b, h, l, m: local_2d(i, j, False),
  ),
}


def both(a, b):
  (mask, sees), (other, also) = SINGLE[a], SINGLE[b]
  return mask & other, lambda *place: sees(*place) and also(*place)


def either(a, b):
  (mask, sees), (other, also) = SINGLE[a], SINGLE[b]
  return mask | other, lambda *place: sees(*place) or also(*place)


def packed(a, b):
  mask, sees = either(a, b)
  other, also = SINGLE['segments']
  return mask & other, lambda *place: sees(*place) and also(*place)


TABLE = SINGLE | {
  'causal & segments': both('causal', 'segments'),
  'window & lengths': both('window', 'lengths'),
  'strided & segments': both('strided', 'segments'),
  'local_2d & dense': both('local_2d', 'dense'),
  'causal & behind': both('causal', 'behind'),
  'window | lengths': either('window', 'lengths'),
  'dense | summary': either('dense', 'summary_heads'),
  'window | strided': either('window', 'strided'),
  '(local_1d | summary) & segments': packed('local_1d', 'summary'),
}
UNCOUNTED = {
  'dense', 'dense_keys', 'summary_heads', 'local_2d', 'local_2d_both',
  'local_2d & dense', 'dense | summary',
}  # fmt: skip


def draw_rows():
  """Positions in order behind a cache, restarting with empty slots, or any."""
  yield np.arange(3, 3 + L), np.arange(M)
  yield np.arange(L) % 6, np.where(np.arange(M) < 9, np.arange(M), 0)
  for _ in range(B - 2):
    yield tuple(RANDOM.integers(-4, 40, n) for n in (L, M))


ROWS = list(draw_rows())
QUERY, KEY = (np.stack(rows) for rows in zip(*ROWS, strict=True))


@pytest.fixture(scope='module', params=TABLE)
def case(request):
  """Name, mask, and what the mask should see by definition."""
  mask, sees = TABLE[request.param]
  expected = np.zeros((B, H, L, M), bool)
  for b, h, l, m in np.ndindex(expected.shape):
    expected[b, h, l, m] = sees(int(QUERY[b, l]), int(KEY[b, m]), b, h, l, m)
  return request.param, mask, expected


def seen_blocks(mask, query, key, sizes):
  """Returns which pairs may be seen, as blocks of some sizes say, `[L, M]`.

  Args:
    mask: the mask.
    query: positions `[L]`.
    key: positions `[M]`.
    sizes: queries and keys per block.
  """
  spans = []
  for position, size in zip((query, key), sizes, strict=True):
    position = np.pad(position, (0, -len(position) % size), mode='edge')
    blocks = position.reshape(-1, size)
    spans.append(Span(blocks.min(axis=1), blocks.max(axis=1)))
  may_see = mask.padded(*sizes).may_see(*spans)
  may_see = np.broadcast_to(may_see, [len(span.low) for span in spans])
  return np.kron(may_see, np.ones(sizes, bool))[: len(query), : len(key)]


def test_it_sees_what_its_definition_says(case):
  _, mask, expected = case
  visible = mask.visible(QUERY, KEY)
  np.testing.assert_array_equal(
    np.broadcast_to(visible, expected.shape), expected
  )


def test_keys_that_do_not_exist_are_seen_by_nobody(case):
  _, mask, expected = case
  assert not (expected.any(axis=(1, 2)) & ~mask.exists(KEY)).any()


def test_blocks_that_are_skipped_hold_nothing_visible(case):
  _, mask, _ = case
  for row, (query, key) in enumerate(ROWS[:5]):
    if row > 2:  # Otherwise blocks span everything.
      query, key = np.sort(query), np.sort(key)
    visible = np.asarray(mask.visible(query[None], key[None])).any(axis=(0, 1))
    may_see = seen_blocks(mask, query, key, (4, 4))
    assert not (visible & ~may_see).any()


def test_what_it_says_of_the_order_of_time_is_true(case):
  _, mask, expected = case
  sees_later = (expected & (KEY[:, None, None] > QUERY[:, None, :, None])).any()
  assert mask.causal != sees_later


def test_it_counts_visible_keys_without_looking_at_pairs(case):
  name, mask, expected = case
  count = mask.count(QUERY, KEY)
  assert (count is None) == (name in UNCOUNTED)
  if count is not None:
    expected = expected.sum(axis=-1)
    assert count.dtype == np.int32
    np.testing.assert_array_equal(
      np.broadcast_to(count, expected.shape), expected
    )


def test_blocks_of_a_single_pair_are_judged_exactly():
  # They leave no room for caution.
  i = np.arange(35)
  for name in ('window', 'strided', 'dilated', 'summary', 'local_1d_both'):
    mask, _ = SINGLE[name]
    visible = np.broadcast_to(mask.visible(i[None], i[None])[0, 0], (35, 35))
    np.testing.assert_array_equal(seen_blocks(mask, i, i, (1, 1)), visible)


def test_fractional_positions_are_not_counted_by_sorting():
  assert Causal().count(jnp.arange(3.0)[None], jnp.arange(3)[None]) is None


def test_counts_hold_at_the_ends_of_the_integers():
  ends = jnp.array([[-(2**31), 0, 2**31 - 1]], jnp.int32)
  lengths = Lengths(jnp.array([2**31 - 1]))
  ids = jnp.ones((1, 3), jnp.int32)
  mask = Segments(ids, ids)
  np.testing.assert_array_equal(mask.count(ends, ends)[0, 0], [3, 3, 3])
  np.testing.assert_array_equal(
    (mask & lengths).count(ends, ends)[0, 0], [2] * 3
  )


def test_scales_that_count_look_at_pairs_only_where_queries_are_few(
  monkeypatch,
):
  def refuse(*arguments):
    raise AssertionError('looks at pairs')

  monkeypatch.setattr(attention, 'count_visible', refuse)

  def trace(length, keys):
    shapes = [
      jax.ShapeDtypeStruct((1, n, 1, 2), jnp.float32)
      for n in (length, keys, keys)
    ]
    run = functools.partial(
      attend,
      mask=Causal(),
      scale=LogLength(),
      query_position=jnp.arange(length),
      implementation='blockwise',
    )
    jax.eval_shape(run, *shapes)

  trace(attention.MANY, 2)
  with pytest.raises(AssertionError, match='looks at pairs'):
    trace(1, attention.MANY)


def test_sorting_and_looking_at_pairs_give_the_same_scale(monkeypatch):
  monkeypatch.setattr(attention, 'MANY', 1)
  mask = TABLE['causal & segments'][0]
  query, key, value = (
    jax.random.normal(jax.random.key(i), (B, n, H, 2))
    for i, n in enumerate((L, M, M))
  )

  def run(implementation):
    return attend(
      query,
      key,
      value,
      mask=mask,
      scale=LogLength(4, least=1),
      query_position=jnp.array(QUERY),
      key_position=jnp.array(KEY),
      implementation=implementation,
    )

  expected, actual = map(jax.jit(run, static_argnums=0), ('xla', 'blockwise'))
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_dense_masks_skip_blocks_in_which_nothing_is_true():
  diagonal = jnp.eye(64, dtype=bool)[None, None]
  positions = np.zeros(64, int)
  seen = seen_blocks(Dense(diagonal), positions, positions, (8, 8))
  assert seen.sum() == 8 * 8 * 8
  columns = seen_blocks(
    Dense(diagonal[:, :, 9:10]), positions, positions, (8, 8)
  )
  np.testing.assert_array_equal(columns[0].nonzero()[0], np.arange(8, 16))


@pytest.mark.parametrize('implementation', ['xla', 'blockwise'])
def test_arrays_that_are_no_masks_are_refused(implementation):
  query, key = jnp.zeros((B, L, H, 2)), jnp.zeros((B, M, H, 2))

  def run(array):
    return attend(
      query, key, key, mask=Dense(array), implementation=implementation
    )

  with pytest.raises(ValueError, match='boolean array.*got float32; compare'):
    run(jnp.zeros((1, 1, L, M)))
  with pytest.raises(ValueError, match='boolean array.*list'):
    run([[True]])
  with pytest.raises(ValueError, match=r'needs an array \[B, H, L, M\]'):
    run(jnp.zeros((L, M), bool))
  with pytest.raises(
    ValueError, match=r'= \[1, 1, 11, 11\], but .*\[8, 3, 11,'
  ):
    run(jnp.zeros((1, 1, L, L), bool))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerHead(Mask):
  """A mask that holds an array and does not say how to cut it."""

  seen_H: jax.Array

  compares_positions = False
  causal = False

  def visible(self, query_position, key_position):
    return self.seen_H[None, :, None, None]


def test_blocks_of_a_mask_that_cannot_cut_its_arrays_are_refused():
  inputs = [jnp.ones((1, 4, 2, 3))] * 3
  mask = PerHead(jnp.array([True, False]))
  with pytest.raises(NotImplementedError, match=r'PerHead holds arrays.*block'):
    attend(*inputs, mask=mask, implementation='blockwise')
  out = attend(*inputs, mask=mask, implementation='xla')
  assert (out[:, :, 0] == 1).all()
  assert (out[:, :, 1] == 0).all()
