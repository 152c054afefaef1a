"""Classical models whose result stands beside that of a trained one."""

import dataclasses
from typing import Any, Protocol

import numpy as np

from jaxformers.data import TextData
from jaxformers.data import ngram_bits_per_byte


class Baseline(Protocol):
  """A model that needs no training worth mentioning.

  Attributes:
    label: short name for tables and figures.
  """

  label: str

  def bits_per_byte(self, data: Any) -> float | None:
    """Returns its held-out bits per byte, or None if the data is not text.

    Args:
      data: the `data` of an experiment.
    """
    ...


@dataclasses.dataclass(frozen=True)
class NGram:
  """An n-gram model of bytes with Kneser-Ney smoothing.

  Source: see `jaxformers.data.ngram_bits_per_byte`.

  Attributes:
    context: number of bytes that predict the next one.
  """

  context: int = 5

  @property
  def label(self) -> str:
    return f'order-{self.context} n-gram'

  def bits_per_byte(self, data: Any) -> float | None:
    if not isinstance(data, TextData):
      return None
    corpus = data.load_corpus()
    train = b''.join(document.text for document in corpus.train)
    return ngram_bits_per_byte(
      np.frombuffer(train, np.uint8),
      [np.frombuffer(d.text, np.uint8) for d in corpus.heldout],
      context=self.context,
    )
