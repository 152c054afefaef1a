"""Batches as pure functions of (seed, step)."""

from collections.abc import Iterator, Sequence
import itertools
from typing import Any

import numpy as np

from jaxformers.data.prepared import RowSource

Batch = dict[str, np.ndarray]

# Two threads keep a few batches ahead of a device without taking its cores;
# reading rows is mostly copying from memory.
READ_THREADS = 2
READ_AHEAD = 4
LAST_STEP = 2**62


def batches(
  rows: RowSource,
  *,
  batch_size: int,
  seed: int,
  first_step: int = 0,
  part: Sequence[int] | None = None,
) -> Iterator[Batch]:
  """Yields the batches of step `first_step`, `first_step` + 1, ... for ever.

  The global batch of step n is rows n B to (n + 1) B - 1 of the endless
  sequence that visits all rows in a new order every epoch. It depends on
  nothing but the seed and n, so a run resumes exactly by saying where, on any
  number of processes, each of which reads what its devices need. Threads read
  ahead.

  Args:
    rows: Rows to learn from.
    batch_size: B, rows per step over all readers.
    seed: In [0, 2^32).
    first_step: Where to start.
    part: Which rows of each batch to read, as numbers in [0, B); None for all.

  Returns:
    Iterator over dicts of arrays [rows of the part, ...].

  Raises:
    ValueError: If the sizes do not fit, or there are no rows.
  """
  import grain

  part = _part(batch_size, part)
  shuffled = _shuffled(rows, seed)
  if first_step < 0:
    raise ValueError(f'first_step must be at least 0, got {first_step}.')
  steps = grain.MapDataset.range(first_step, LAST_STEP)
  read = steps.map(lambda step: _take(shuffled, step * batch_size, part))
  options = grain.ReadOptions(
    num_threads=READ_THREADS, prefetch_buffer_size=READ_AHEAD
  )
  return iter(read.to_iter_dataset(options))


def batch_at(
  rows: RowSource,
  step: int,
  *,
  batch_size: int,
  seed: int,
  part: Sequence[int] | None = None,
) -> Batch:
  """Returns the batch that `batches` yields at one step.

  Args:
    rows: Rows to learn from.
    step: At least 0.
    batch_size: Rows per step over all readers.
    seed: In [0, 2^32).
    part: Which rows of the batch to read; None for all.

  Returns:
    Dict of arrays [rows of the part, ...].

  Raises:
    ValueError: If the sizes do not fit, or there are no rows.
  """
  part = _part(batch_size, part)
  shuffled = _shuffled(rows, seed)
  if step < 0:
    raise ValueError(f'step must be at least 0, got {step}.')
  return _take(shuffled, step * batch_size, part)


def heldout_batches(
  rows: RowSource,
  batch_size: int,
  limit: int | None = None,
  *,
  part: Sequence[int] | None = None,
) -> Iterator[Batch]:
  """Yields all rows once, in order.

  The last batch is filled up with empty rows: zeros, and -1 in `targets`.

  Args:
    rows: Rows to be measured on.
    batch_size: Rows per step over all readers.
    limit: At most so many batches; all if None.
    part: Which rows of each batch to read; None for all.

  Returns:
    Iterator over dicts of arrays [rows of the part, ...].

  Raises:
    ValueError: If the sizes do not fit, or there are no rows.
  """
  part = _part(batch_size, part)
  _check_rows(rows)
  if limit is not None and limit < 1:
    raise ValueError(
      f'limit must be at least 1 batch, or None for all, got {limit}.'
    )
  starts = itertools.islice(range(0, len(rows), batch_size), limit)
  empty = _empty_like(rows[0])
  return (
    _stack([rows[start + i] if start + i < len(rows) else empty for i in part])
    for start in starts
  )


def _part(batch_size: int, part: Sequence[int] | None) -> Sequence[int]:
  """Returns the places within the global batch that are asked for."""
  if batch_size < 1:
    raise ValueError(f'batch_size must be at least 1, got {batch_size}.')
  if part is None:
    return range(batch_size)
  if not part or min(part) < 0 or max(part) >= batch_size:
    raise ValueError(
      f'part must name rows in [0, {batch_size}), got {list(part)}.'
    )
  return part


def _check_rows(rows: RowSource) -> None:
  if not len(rows):
    raise ValueError('there are no rows to make batches of; give more data.')


def _shuffled(rows: RowSource, seed: int) -> Any:
  """Returns the endless dataset that visits all rows anew every epoch."""
  import grain

  _check_rows(rows)
  if not 0 <= seed < 2**32:
    raise ValueError(f'seed must lie in [0, 2**32), got {seed}.')
  return grain.MapDataset.source(rows).seed(seed).shuffle().repeat()


def _take(dataset: Any, start: int, part: Sequence[int]) -> Batch:
  return _stack([dataset[start + i] for i in part])


def _stack(rows: list[Batch]) -> Batch:
  return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _empty_like(row: Batch) -> Batch:
  return {
    key: np.full_like(value, -1 if key == 'targets' else 0)
    for key, value in row.items()
  }
