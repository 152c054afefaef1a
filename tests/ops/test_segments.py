"""Positions of packed streams against a plain Python count."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.ops import segments


def counted(ids):
  """Positions and segment numbers of one row, token by token."""
  positions, numbers, last, number, position = [], [], 0, 0, -1
  for i in ids:
    if i and i != last:
      number, position, last = number + 1, -1, i
    position += bool(i)
    positions.append(position)
    numbers.append(number if i else 0)
  return positions, numbers


advance = jax.jit(segments.advance)


@settings(max_examples=40, deadline=None)
@given(
  st.lists(
    st.lists(st.integers(0, 2), min_size=8, max_size=8), min_size=2, max_size=2
  ),
  st.sampled_from([(8,), (1,) * 8, (2,) * 4]),
)
def test_any_pieces_give_what_counting_gives(rows, cuts):
  ids = np.array(rows, np.int32)
  cursor, found, start = segments.start(2), [], 0
  for size in cuts:
    places, cursor = advance(cursor, ids[:, start : start + size])
    found.append(places)
    start += size
  positions, numbers = (
    np.concatenate(a, axis=1) for a in zip(*found, strict=True)
  )
  for b in range(2):
    expected_positions, expected_numbers = counted(rows[b])
    np.testing.assert_array_equal(numbers[b], expected_numbers)
    is_token = ids[b] != 0
    np.testing.assert_array_equal(
      positions[b][is_token], np.array(expected_positions)[is_token]
    )


def test_an_id_that_comes_again_is_a_new_segment():
  places, _ = segments.advance(segments.start(1), jnp.array([[1, 2, 1, 1]]))
  assert places.number_BL.tolist() == [[1, 2, 3, 3]]
  assert places.position_BL.tolist() == [[0, 0, 0, 1]]


def test_the_fields_of_a_fresh_cursor_share_no_buffer():
  pointers = {x.unsafe_buffer_pointer() for x in segments.start(4)}
  assert len(pointers) == 3
