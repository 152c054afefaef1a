import itertools

import numpy as np
import pytest

from jaxformers.data import RowSource
from jaxformers.data import batch_at
from jaxformers.data import batches
from jaxformers.data import heldout_batches


class Numbers:
  """Row i is i, under keys of two shapes and types."""

  def __init__(self, size):
    self.size = size

  def __len__(self):
    return self.size

  def __getitem__(self, i):
    if not 0 <= i < self.size:
      raise IndexError(i)
    tokens_L = np.full(3, i, np.int32)
    weight = np.float32(i)
    return {'tokens': tokens_L, 'targets': tokens_L + 1, 'weight': weight}


def take(count, rows, **options):
  options = {'batch_size': 4, 'seed': 0, **options}
  return list(itertools.islice(batches(rows, **options), count))


def numbers(batches_):
  return [b['tokens'][:, 0].tolist() for b in batches_]


def test_batches_stack_rows():
  (batch,) = take(1, Numbers(10))
  assert {k: v.shape for k, v in batch.items()} == {
    'tokens': (4, 3),
    'targets': (4, 3),
    'weight': (4,),
  }
  assert batch['tokens'].dtype == np.int32
  np.testing.assert_array_equal(batch['targets'], batch['tokens'] + 1)


@pytest.mark.parametrize('first_step', [1, 2, 5, 17])
def test_a_step_has_the_same_batch_wherever_one_starts(first_step):
  whole = take(20, Numbers(10))
  for a, b in zip(
    whole[first_step:],
    take(20 - first_step, Numbers(10), first_step=first_step),
    strict=True,
  ):
    assert {k: v.tobytes() for k, v in a.items()} == {
      k: v.tobytes() for k, v in b.items()
    }


def test_batch_at_equals_the_iterator_also_far_away():
  for step, batch in enumerate(take(7, Numbers(10), seed=3)):
    alone = batch_at(Numbers(10), step, batch_size=4, seed=3)
    np.testing.assert_equal(alone, batch)
  far = 10**10
  (batch,) = take(1, Numbers(10), first_step=far)
  np.testing.assert_equal(
    batch, batch_at(Numbers(10), far, batch_size=4, seed=0)
  )


def test_every_row_comes_once_per_epoch():
  seen = np.array(numbers(take(15, Numbers(12)))).reshape(5, 12)
  for epoch in seen:
    assert sorted(epoch) == list(range(12))


def test_every_epoch_has_another_order():
  seen = np.array(numbers(take(15, Numbers(12)))).reshape(5, 12)
  assert len({tuple(epoch) for epoch in seen}) == 5
  assert all(tuple(epoch) != tuple(range(12)) for epoch in seen)


def test_epochs_need_not_divide_by_the_batch():
  seen = np.array(numbers(take(5, Numbers(10)))).reshape(2, 10)
  for epoch in seen:
    assert sorted(epoch) == list(range(10))


def test_a_batch_may_be_larger_than_the_data():
  (batch,) = take(1, Numbers(3), batch_size=6)
  rows = batch['tokens'][:, 0]
  assert sorted(rows[:3]) == sorted(rows[3:]) == [0, 1, 2]


def test_seeds_differ():
  orders = [numbers(take(3, Numbers(12), seed=seed)) for seed in range(4)]
  assert len({str(order) for order in orders}) == 4


@pytest.mark.parametrize(
  'parts', [[range(4), range(4, 8)], [(0, 1, 6), (2,), (3, 4, 5, 7)]]
)
def test_readers_of_parts_read_the_global_batch_between_them(parts):
  whole = take(6, Numbers(50), batch_size=8)
  read = [take(6, Numbers(50), batch_size=8, part=part) for part in parts]
  for step, batch in enumerate(whole):
    for key, value in batch.items():
      for part, batches_ in zip(parts, read, strict=True):
        np.testing.assert_array_equal(batches_[step][key], value[list(part)])


def test_heldout_batches_are_in_order_and_padded():
  result = list(heldout_batches(Numbers(5), 2))
  assert numbers(result) == [[0, 1], [2, 3], [4, 0]]
  np.testing.assert_array_equal(result[-1]['targets'][1], [-1, -1, -1])
  assert result[-1]['weight'].tolist() == [4, 0]
  assert result[-1]['weight'].dtype == np.float32


def test_heldout_batches_stop_at_the_limit():
  assert numbers(heldout_batches(Numbers(5), 2, 2)) == [[0, 1], [2, 3]]
  assert numbers(heldout_batches(Numbers(4), 2, limit=9)) == [[0, 1], [2, 3]]


def test_heldout_batches_can_be_read_in_parts():
  parts = [
    numbers(heldout_batches(Numbers(5), 4, part=part))
    for part in (range(2), range(2, 4))
  ]
  assert parts == [[[0, 1], [4, 0]], [[2, 3], [0, 0]]]


def first_of_batches(rows, **options):
  return next(batches(rows, **{'batch_size': 4, 'seed': 0, **options}))


def at_step_0(rows, **options):
  return batch_at(rows, 0, **{'batch_size': 4, 'seed': 0, **options})


def first_of_heldout(rows, **options):
  return next(heldout_batches(rows, **{'batch_size': 4, **options}))


@pytest.mark.parametrize(
  'read', [first_of_batches, at_step_0, first_of_heldout]
)
class TestBadSizes:
  def test_batch_size_must_be_positive(self, read):
    with pytest.raises(
      ValueError, match='batch_size must be at least 1, got 0'
    ):
      read(Numbers(9), batch_size=0)

  def test_rows_must_not_be_empty(self, read):
    with pytest.raises(ValueError, match='there are no rows'):
      read(Numbers(0))

  @pytest.mark.parametrize('part', [(0, 4), (-1,), ()])
  def test_the_rows_of_a_part_must_be_those_of_a_batch(self, read, part):
    with pytest.raises(ValueError, match=r'rows in \[0, 4\), got \['):
      read(Numbers(9), part=part)


@pytest.mark.parametrize('seed', [-1, 2**32])
def test_seeds_outside_of_32_bits_are_refused(seed):
  with pytest.raises(ValueError, match=rf'\[0, 2\*\*32\), got {seed}'):
    at_step_0(Numbers(9), seed=seed)


def test_negative_steps_are_refused():
  with pytest.raises(ValueError, match='first_step must be at least 0, got -1'):
    batches(Numbers(9), batch_size=4, seed=0, first_step=-1)
  with pytest.raises(ValueError, match='step must be at least 0, got -1'):
    batch_at(Numbers(9), -1, batch_size=4, seed=0)


def test_a_limit_of_no_batches_is_refused():
  with pytest.raises(ValueError, match='limit must be at least 1 .*got 0'):
    heldout_batches(Numbers(9), 4, 0)


def test_numbers_are_a_row_source():
  assert isinstance(Numbers(3), RowSource)
