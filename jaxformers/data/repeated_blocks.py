"""A synthetic task: go on with what repeats."""

import dataclasses

import numpy as np

from jaxformers.data.prepared import Prepared

# So many that no run comes to the second epoch; rows are made when asked for.
TRAIN_ROWS = 2**30


@dataclasses.dataclass(frozen=True)
class RepeatedBlocks:
  """Rows that repeat a random block; each token after the first block counts.

  The length of the block is uniform in `shortest ... longest`, and so are its
  tokens among all. From the second repetition on, every token is that of one
  period before, and a model that finds it there is always right. Guessing is
  right once in `vocab_size`.

  Rows have no end of their own: row i at a longer `length` begins with row i at
  a shorter one. So a model can be measured at lengths that it never saw.

  Attributes:
    length: tokens per row.
    vocab_size: number of different tokens.
    shortest: least period.
    longest: largest period; at most `length`, so that each row has a target.
    heldout_rows: number of rows to be measured on.
  """

  length: int = 64
  vocab_size: int = 32
  shortest: int = 8
  longest: int = 24
  heldout_rows: int = 256

  def __post_init__(self):
    if not 1 <= self.shortest <= self.longest <= self.length:
      raise ValueError(
        'RepeatedBlocks needs 1 <= shortest <= longest <= length, got '
        f'shortest={self.shortest}, longest={self.longest} and length='
        f'{self.length}.'
      )
    for name in ('vocab_size', 'heldout_rows'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'RepeatedBlocks needs {name} >= 1, got {getattr(self, name)}.'
        )

  def example(self) -> dict[str, np.ndarray]:
    """Returns a row of the shapes and dtypes of all rows."""
    return {
      name: np.zeros(self.length, np.int32)
      for name in ('tokens', 'targets', 'segments')
    }

  def prepare(self) -> Prepared:
    """Returns rows and these facts: corpus, vocab_size, length, heldout_rows.

    No held-out row is a row to train on, except by chance.
    """
    return Prepared(
      train=BlockRows(self, 0, TRAIN_ROWS),
      heldout=BlockRows(self, 1, self.heldout_rows),
      vocab_size=self.vocab_size,
      facts={
        'corpus': 'repeated blocks',
        'vocab_size': self.vocab_size,
        'length': self.length,
        'heldout_rows': self.heldout_rows,
      },
    )


@dataclasses.dataclass(frozen=True)
class BlockRows:
  """Rows of `RepeatedBlocks`, each a function of its number alone.

  Row i is `{'tokens', 'targets', 'segments'}`, each int32 [L]: the inputs; the
  token after each input, or -1 within the first block; ones.

  Attributes:
    data: the task.
    split: rows of different splits have nothing in common.
    rows: how many there are.
  """

  data: RepeatedBlocks
  split: int
  rows: int

  def __len__(self) -> int:
    return self.rows

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    if not 0 <= i < self.rows:
      raise IndexError(f'row {i} of {self.rows}')
    data, random = self.data, np.random.default_rng((self.split, int(i)))
    period = int(random.integers(data.shortest, data.longest + 1))
    block = random.integers(data.vocab_size, size=period, dtype=np.int32)
    text = np.resize(block, data.length + 1)
    targets_L = text[1:].copy()
    targets_L[: period - 1] = -1
    return {
      'tokens': text[:-1],
      'targets': targets_L,
      'segments': np.ones(data.length, np.int32),
    }
