"""What a trainer gets from any kind of data."""

from collections.abc import Mapping
import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class RowSource(Protocol):
  """Rows by number: pure, picklable, safe to read from several threads.

  All rows have the same keys, shapes and dtypes. A key `targets` marks with -1
  what is not to be predicted, a key `segments` with 0 what is padding.
  """

  def __len__(self) -> int:
    """Number of rows."""
    ...

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    """Returns row i."""
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
  """Data ready for batches.

  Args:
    train: Rows to learn from.
    heldout: Rows never learned from.
    vocab_size: Every token and target is smaller.
    facts: Plain numbers and names to show, see whoever makes it.
  """

  train: RowSource
  heldout: RowSource
  vocab_size: int
  facts: Mapping[str, int | float | str]
