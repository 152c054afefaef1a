"""Arrangements: how documents become rows of equal length."""

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Int64
import numpy as np

from jaxformers.data.store import TokenStore


class Plan(NamedTuple):
  """Which pieces of text stand in which row.

  A piece of size n covers n + 1 tokens: n inputs, each with the token after it
  as its target.
  """

  starts: np.ndarray  # int64 [pieces]; first token of the piece
  sizes: np.ndarray  # int64 [pieces]; inputs
  contexts: np.ndarray  # int64 [pieces]; leading inputs without target
  row_offsets: np.ndarray  # int64 [rows + 1]; pieces of row i, as a range


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
  """Rows of a token store, at random access.

  Row i is `{'tokens', 'targets', 'segments'}`, each int32 [L]: the inputs; the
  token after each input, or -1 where nothing is to be predicted; the number
  1, 2, ... of the piece in the row, or 0 for padding.

  Args:
    store: The tokens.
    length: L.
    plan: What stands where.
  """

  store: TokenStore
  length: int
  plan: Plan

  def __len__(self) -> int:
    return len(self.plan.row_offsets) - 1

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    if not 0 <= i < len(self):
      raise IndexError(f'row {i} of {len(self)}')
    tokens_L = np.zeros(self.length, np.int32)
    targets_L = np.full(self.length, -1, np.int32)
    segments_L = np.zeros(self.length, np.int32)
    at = 0
    pieces = range(*self.plan.row_offsets[i : i + 2].tolist())
    for segment, piece in enumerate(pieces, 1):
      start, size, context = (int(a[piece]) for a in self.plan[:3])
      window = self.store.tokens[start : start + size + 1].view(np.ndarray)
      tokens_L[at : at + size] = window[:-1]
      targets_L[at + context : at + size] = window[context + 1 :]
      segments_L[at : at + size] = segment
      at += size
    return {'tokens': tokens_L, 'targets': targets_L, 'segments': segments_L}


@runtime_checkable
class Arrangement(Protocol):
  """Turns a token store into rows, for learning and for measuring."""

  def train_rows(self, store: TokenStore, length: int) -> Rows:
    """Arranges text to learn from."""
    ...

  def heldout_rows(self, store: TokenStore, length: int) -> Rows:
    """Arranges text to be measured on; no row mixes documents unmarked."""
    ...


@dataclasses.dataclass(frozen=True)
class Stream:
  """Cuts running text into windows.

  To learn from, all documents form one stream, and a row is a window of
  length + 1 tokens that shares one token with the next: every token except
  the very first is a target exactly once. To be measured on, each document is
  cut on its own, and its last row is padded.

  Args:
    overlap: Tokens that a held-out row repeats from the row before it in the
      same document, as context only. 0 measures each window on its own, which
      is fastest; more gives the first tokens of a row something to look back
      on (sliding-window evaluation) at length / (length - overlap) the cost.
      Either way every token except a document's first is a target once.
  """

  overlap: int = 0

  def train_rows(self, store: TokenStore, length: int) -> Rows:
    """Cuts all documents as one stream.

    Args:
      store: The tokens.
      length: Tokens per row.

    Returns:
      The rows.

    Raises:
      ValueError: If the text is shorter than one window.
    """
    check_length(length)
    if len(store.tokens) < length + 1:
      raise ValueError(
        f'the training text has {len(store.tokens)} tokens, less than one '
        f'window of {length} + 1; give more text or lower data.length to at '
        f'most {max(len(store.tokens) - 1, 1)}.'
      )
    plan = plan_windows(np.array([0, len(store.tokens)]), length)
    return Rows(store, length, plan)

  def heldout_rows(self, store: TokenStore, length: int) -> Rows:
    """Cuts each document on its own.

    Args:
      store: The tokens.
      length: Tokens per row.

    Returns:
      The rows.

    Raises:
      ValueError: If there is nothing to predict, or the overlap leaves no
        room in a row.
    """
    check_length(length)
    if not 0 <= self.overlap < length:
      raise ValueError(
        f'overlap must lie in [0, length), got {self.overlap} with length '
        f'{length}; half the length is usual.'
      )
    plan = plan_windows(store.offsets, length, overlap=self.overlap)
    return Rows(store, length, check_plan(plan, store))


@dataclasses.dataclass(frozen=True)
class Pack:
  """Puts several documents into one row, each with its own segment id.

  Documents are cut into pieces of at most length + 1 tokens, which overlap by
  one, so that every token except a document's first is a target exactly once.
  Full pieces have a row to themselves; the rests are packed by best fit in
  order of decreasing size. A document of one token has nothing to predict and
  is left out.

  The plan is made once, in O(n log n), from the lengths alone. It is not
  grain's iterator packing, because that decides while reading, and then
  neither row i nor the batch of step n can be had without all before it.

  Source: Johnson, Near-optimal bin packing algorithms, 1973 (best-fit
    decreasing uses at most 11/9 of the optimal number of rows, plus 4);
    Krell et al., Efficient sequence packing without cross-contamination,
    2021, arXiv 2107.02027.
  """

  def train_rows(self, store: TokenStore, length: int) -> Rows:
    """Packs the documents.

    Args:
      store: The tokens.
      length: Tokens per row.

    Returns:
      The rows.

    Raises:
      ValueError: If there is nothing to predict.
    """
    check_length(length)
    plan = plan_packing(store.offsets, length)
    return Rows(store, length, check_plan(plan, store))

  heldout_rows = train_rows


def check_length(length: int) -> None:
  """Refuses rows without room.

  Args:
    length: Tokens per row.

  Raises:
    ValueError: If it is less than 1.
  """
  if length < 1:
    raise ValueError(f'data.length must be at least 1, got {length}.')


def check_plan(plan: Plan, store: TokenStore) -> Plan:
  """Refuses a plan without rows.

  Args:
    plan: What stands where.
    store: What it was made for.

  Returns:
    The plan.

  Raises:
    ValueError: If there are no rows.
  """
  if len(plan.row_offsets) < 2:
    raise ValueError(
      f'nothing to predict: {len(store.byte_counts)} documents with '
      f'{len(store.tokens)} tokens in all, and none has the 2 tokens that a '
      'prediction takes; give more text.'
    )
  return plan


def plan_windows(
  offsets: Int64[np.ndarray, ' N'], length: int, *, overlap: int = 0
) -> Plan:
  """Cuts each document into windows, one per row.

  Args:
    offsets: int64 [documents + 1], where documents begin and the last ends.
    length: Inputs per row.
    overlap: Inputs of a window that the window before has already predicted.

  Returns:
    The plan.
  """
  pairs = np.maximum(np.diff(offsets) - 1, 0)
  stride = length - overlap
  later = -(-np.maximum(pairs - length, 0) // stride)
  counts = np.where(pairs > 0, 1 + later, 0)
  document = np.repeat(np.arange(len(counts)), counts)
  index = np.arange(counts.sum()) - np.repeat(
    np.cumsum(counts) - counts, counts
  )
  return Plan(
    starts=offsets[document] + index * stride,
    sizes=np.minimum(length, pairs[document] - index * stride),
    contexts=np.where(index > 0, overlap, 0),
    row_offsets=np.arange(len(index) + 1),
  )


def plan_packing(offsets: Int64[np.ndarray, ' N'], length: int) -> Plan:
  """Packs the windows of all documents into as few rows as best fit finds.

  Args:
    offsets: int64 [documents + 1], where documents begin and the last ends.
    length: Inputs per row.

  Returns:
    The plan; pieces stand in the order of rows.
  """
  windows = plan_windows(offsets, length)
  by_size = np.argsort(-windows.sizes, kind='stable')
  row_by_size = best_fit(windows.sizes[by_size].tolist(), length)
  by_row = np.argsort(row_by_size, kind='stable')
  order = by_size[by_row]
  counts = np.bincount(row_by_size)
  return Plan(
    starts=windows.starts[order],
    sizes=windows.sizes[order],
    contexts=windows.contexts[order],
    row_offsets=np.concatenate([[0], np.cumsum(counts)]),
  )


def best_fit(sizes: Sequence[int], capacity: int) -> Int64[np.ndarray, ' N']:
  """Puts each item, in the order given, into the fullest row it fits into.

  Rows are kept by the room they have left; which amounts of room occur is one
  integer with a bit for each, so finding the best takes O(capacity / 64).

  Args:
    sizes: Integers in [1, capacity].
    capacity: Of every row.

  Returns:
    int64 [items], the row of each; rows are numbered as they are opened.
  """
  rows_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
  occurring = 0
  opened = 0
  row_of = np.zeros(len(sizes), np.int64)
  for item, size in enumerate(sizes):
    fitting = occurring >> size
    if fitting:
      room = size + (fitting & -fitting).bit_length() - 1
      row = rows_with_room[room].pop()
      occurring &= ~(int(not rows_with_room[room]) << room)
    else:
      room, row, opened = capacity, opened, opened + 1
    row_of[item] = row
    if room > size:
      rows_with_room[room - size].append(row)
      occurring |= 1 << (room - size)
  return row_of
