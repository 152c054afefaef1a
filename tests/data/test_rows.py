import collections
import pickle

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxformers.data import Pack
from jaxformers.data import Stream
from jaxformers.data import TokenStore
from jaxformers.data import rows as rows_module


def make_store(*sizes):
  """Documents of these sizes; the tokens count 0, 1, 2, ... throughout."""
  offsets = np.cumsum([0, *sizes])
  tokens = np.arange(offsets[-1], dtype=np.uint16)
  return TokenStore(tokens, offsets, np.array(sizes))


def as_lists(rows):
  return [{k: v.tolist() for k, v in rows[i].items()} for i in range(len(rows))]


def targets_of(rows):
  return collections.Counter(
    t for row in as_lists(rows) for t in row['targets'] if t >= 0
  )


def inner_tokens(store):
  """Every token except the first of each document."""
  return set(range(len(store.tokens))) - set(store.offsets[:-1].tolist())


def test_stream_cuts_running_text_into_windows():
  rows = Stream().train_rows(make_store(4, 3), 3)
  assert as_lists(rows) == [
    {'tokens': [0, 1, 2], 'targets': [1, 2, 3], 'segments': [1, 1, 1]},
    {'tokens': [3, 4, 5], 'targets': [4, 5, 6], 'segments': [1, 1, 1]},
  ]


def test_the_last_window_of_a_stream_is_padded():
  rows = Stream().train_rows(make_store(5), 3)
  assert as_lists(rows)[-1] == {
    'tokens': [3, 0, 0],
    'targets': [4, -1, -1],
    'segments': [1, 0, 0],
  }


def test_heldout_windows_stay_inside_documents():
  rows = Stream().heldout_rows(make_store(4, 1, 3), 3)
  assert as_lists(rows) == [
    {'tokens': [0, 1, 2], 'targets': [1, 2, 3], 'segments': [1, 1, 1]},
    {'tokens': [5, 6, 0], 'targets': [6, 7, -1], 'segments': [1, 1, 0]},
  ]


def test_overlap_gives_heldout_windows_context_only():
  rows = Stream(overlap=2).heldout_rows(make_store(7), 4)
  assert as_lists(rows) == [
    {'tokens': [0, 1, 2, 3], 'targets': [1, 2, 3, 4], 'segments': [1] * 4},
    {'tokens': [2, 3, 4, 5], 'targets': [-1, -1, 5, 6], 'segments': [1] * 4},
  ]


def test_overlap_leaves_training_windows_alone():
  store = make_store(20)
  assert as_lists(Stream(overlap=2).train_rows(store, 4)) == as_lists(
    Stream().train_rows(store, 4)
  )


def test_pack_fills_rows_best_fit_first():
  # Pieces of 4, 2 | 3 | 1 inputs, from documents of 7, 4 and 2 tokens.
  rows = Pack().train_rows(make_store(7, 4, 2), 4)
  assert as_lists(rows) == [
    {
      'tokens': [0, 1, 2, 3],
      'targets': [1, 2, 3, 4],
      'segments': [1, 1, 1, 1],
    },
    {
      'tokens': [7, 8, 9, 11],
      'targets': [8, 9, 10, 12],
      'segments': [1, 1, 1, 2],
    },
    {
      'tokens': [4, 5, 0, 0],
      'targets': [5, 6, -1, -1],
      'segments': [1, 1, 0, 0],
    },
  ]


SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=20)


@settings(deadline=None, max_examples=60)
@given(sizes=SIZES, length=st.integers(1, 9))
def test_pack_predicts_every_token_with_a_predecessor_once(sizes, length):
  store = make_store(*sizes, 2)
  rows = Pack().train_rows(store, length)
  assert targets_of(rows) == collections.Counter(inner_tokens(store))


@settings(deadline=None, max_examples=60)
@given(sizes=SIZES, length=st.integers(1, 9))
def test_packed_segments_are_runs_of_one_document(sizes, length):
  store = make_store(*sizes, 2)
  for row in as_lists(Pack().train_rows(store, length)):
    used = [s for s in row['segments'] if s]
    assert row['segments'] == used + [0] * (length - len(used))
    assert used == sorted(used)
    assert set(used) == set(range(1, used[-1] + 1))
    for a, b, segment in zip(*row.values(), strict=True):
      assert b == (a + 1 if segment else -1)
      assert not segment or b in inner_tokens(store)


@settings(deadline=None, max_examples=60)
@given(sizes=SIZES, length=st.integers(1, 9), data=st.data())
def test_heldout_stream_predicts_every_token_once(sizes, length, data):
  store = make_store(*sizes, 2)
  overlap = data.draw(st.integers(0, length - 1))
  rows = Stream(overlap).heldout_rows(store, length)
  assert targets_of(rows) == collections.Counter(inner_tokens(store))
  for row in as_lists(rows):
    inputs = [
      a for a, s in zip(row['tokens'], row['segments'], strict=True) if s
    ]
    assert inputs == list(range(inputs[0], inputs[0] + len(inputs)))


@settings(deadline=None, max_examples=60)
@given(sizes=SIZES, length=st.integers(1, 9))
def test_stream_predicts_every_token_but_the_first_once(sizes, length):
  store = make_store(*sizes, length + 1)
  rows = Stream().train_rows(store, length)
  assert targets_of(rows) == collections.Counter(range(1, len(store.tokens)))


@settings(deadline=None)
@given(
  sizes=st.lists(st.integers(1, 12), min_size=1, max_size=60),
)
def test_best_fit_decreasing_keeps_its_guarantee(sizes):
  row_of = rows_module.best_fit(sorted(sizes, reverse=True), 12)
  loads = np.bincount(row_of, sorted(sizes, reverse=True))
  assert loads.max() <= 12
  assert loads.min() > 0
  assert len(loads) <= 11 / 9 * max(-(-sum(sizes) // 12), 1) + 4


def test_best_fit_takes_the_fullest_row_that_has_room():
  # Rows of 6 and 7 are open; 3 fits both and goes into the fuller one.
  assert rows_module.best_fit([6, 7, 3, 4], 10).tolist() == [0, 1, 1, 0]


def test_rows_have_fixed_types_and_an_end():
  rows = Stream().train_rows(make_store(9), 4)
  assert all(v.dtype == np.int32 and v.shape == (4,) for v in rows[0].values())
  assert len(rows) == len(list(rows)) == 2
  with pytest.raises(IndexError, match='row 2 of 2'):
    rows[2]
  with pytest.raises(IndexError, match='row -1 of 2'):
    rows[-1]


def test_rows_pickle():
  rows = Pack().train_rows(make_store(9, 5), 4)
  assert as_lists(pickle.loads(pickle.dumps(rows))) == as_lists(rows)


def test_a_text_shorter_than_a_window_is_refused():
  with pytest.raises(
    ValueError, match=r'has 4 tokens, .* 4 \+ 1; .* data\.length to at most 3'
  ):
    Stream().train_rows(make_store(2, 2), 4)
  assert len(Stream().train_rows(make_store(2, 3), 4)) == 1


@pytest.mark.parametrize('arrangement', [Stream(), Pack()])
def test_text_without_anything_to_predict_is_refused(arrangement):
  with pytest.raises(ValueError, match='2 documents with 2 tokens in all'):
    arrangement.heldout_rows(make_store(1, 1), 4)


@pytest.mark.parametrize('arrangement', [Stream(), Pack()])
@pytest.mark.parametrize('length', [0, -3])
def test_rows_without_room_are_refused(arrangement, length):
  for make in (arrangement.train_rows, arrangement.heldout_rows):
    with pytest.raises(ValueError, match=f'at least 1, got {length}'):
      make(make_store(9), length)


@pytest.mark.parametrize('overlap', [-1, 4])
def test_an_overlap_that_leaves_no_room_is_refused(overlap):
  with pytest.raises(ValueError, match=rf'\[0, length\), got {overlap} with'):
    Stream(overlap).heldout_rows(make_store(9), 4)
