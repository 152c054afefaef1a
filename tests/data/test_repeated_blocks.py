import pickle

import numpy as np
import pytest

from jaxformers.data import RepeatedBlocks
from jaxformers.data import RowSource
from jaxformers.data import batch_at
from jaxformers.data import heldout_batches

DATA = RepeatedBlocks()


def period(row):
  """The number of tokens before the first target."""
  return int(np.argmax(row['targets'] >= 0)) + 1


def test_a_row_repeats_its_first_block():
  for row in (DATA.prepare().train[i] for i in range(20)):
    tokens, p = row['tokens'].tolist(), period(row)
    assert all(tokens[i] == tokens[i - p] for i in range(p, 64))


def test_targets_are_the_next_tokens_after_the_first_block():
  for row in (DATA.prepare().train[i] for i in range(20)):
    p = period(row)
    assert (row['targets'][: p - 1] == -1).all()
    np.testing.assert_equal(row['targets'][p - 1 : -1], row['tokens'][p:])
    assert row['targets'][-1] == row['tokens'][64 - p]


def test_all_periods_and_tokens_occur():
  rows = [DATA.prepare().train[i] for i in range(600)]
  assert {period(row) for row in rows} == set(range(8, 25))
  tokens = np.concatenate([row['tokens'][:8] for row in rows])
  counts = np.bincount(tokens, minlength=32)
  # 150 of each are expected, with a standard deviation of 12.
  assert len(counts) == 32
  assert counts.min() > 90
  assert counts.max() < 210


def test_a_longer_row_begins_with_the_shorter_one():
  short, long = DATA.prepare(), RepeatedBlocks(length=512).prepare()
  for name in ('tokens', 'targets', 'segments'):
    np.testing.assert_equal(long.heldout[3][name][:64], short.heldout[3][name])


def test_rows_to_train_on_differ_from_held_out_ones():
  prepared = DATA.prepare()
  heldout = {prepared.heldout[i]['tokens'].tobytes() for i in range(256)}
  train = {prepared.train[i]['tokens'].tobytes() for i in range(256)}
  assert len(heldout) == len(train) == 256
  assert not heldout & train


def test_batches_are_a_function_of_seed_and_step():
  def tokens(seed, step):
    rows = DATA.prepare().train
    return batch_at(rows, step, batch_size=4, seed=seed)['tokens']

  np.testing.assert_equal(tokens(0, 5), tokens(0, 5))
  assert (tokens(0, 5) != tokens(1, 5)).any()
  assert (tokens(0, 5) != tokens(0, 6)).any()


def test_held_out_rows_are_all_measured():
  data = RepeatedBlocks(heldout_rows=5)
  batches = list(heldout_batches(data.prepare().heldout, 4))
  assert [batch['tokens'].shape for batch in batches] == [(4, 64), (4, 64)]


def test_the_example_is_shaped_like_every_row():
  prepared = DATA.prepare()
  for rows in (prepared.train, prepared.heldout):
    assert isinstance(rows, RowSource)
    assert {k: (a.shape, a.dtype) for k, a in rows[0].items()} == {
      k: (a.shape, a.dtype) for k, a in DATA.example().items()
    }


def test_rows_pickle():
  rows = DATA.prepare().train
  np.testing.assert_equal(pickle.loads(pickle.dumps(rows))[1], rows[1])


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'shortest': 0}, 'shortest=0'),
    ({'shortest': 25}, 'shortest=25, longest=24'),
    ({'length': 23}, 'longest=24 and length=23'),
    ({'vocab_size': 0}, 'vocab_size >= 1, got 0'),
    ({'heldout_rows': 0}, 'heldout_rows >= 1, got 0'),
  ],
)
def test_impossible_rows_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    RepeatedBlocks(**options)


@pytest.mark.parametrize('i', [-1, 256])
def test_there_is_no_row_beyond_the_last(i):
  with pytest.raises(IndexError, match=f'row {i} of 256'):
    DATA.prepare().heldout[i]
