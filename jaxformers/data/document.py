"""Documents, corpora, and how a corpus is split."""

from collections.abc import Sequence
import dataclasses
import itertools
from typing import Protocol, runtime_checkable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Document:
  """A text that stands on its own: a book, a file, a record.

  Args:
    name: For people.
    text: Any bytes.
  """

  name: str
  text: bytes


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents to learn from and documents to be measured on.

  Args:
    name: For people.
    train: Documents to learn from.
    heldout: Documents never learned from.
  """

  name: str
  train: tuple[Document, ...]
  heldout: tuple[Document, ...]


@runtime_checkable
class Source(Protocol):
  """Where a corpus comes from: a frozen dataclass that can load it."""

  def load(self) -> Corpus:
    """Reads the corpus."""
    ...


def hold_out_every(
  name: str, documents: Sequence[Document], every: int = 20
) -> Corpus:
  """Holds out every n-th document, which samples all parts of a collection.

  Args:
    name: Of the corpus.
    documents: In a fixed order.
    every: Documents number `every`, `2 * every`, ... are held out.

  Returns:
    The corpus.

  Raises:
    ValueError: If nothing would be held out.
  """
  if len(documents) < every:
    raise ValueError(
      f'holding out one document in {every} of {name} needs at least {every} '
      f'documents, got {len(documents)}.'
    )
  return Corpus(
    name,
    tuple(d for i, d in enumerate(documents, 1) if i % every),
    tuple(d for i, d in enumerate(documents, 1) if not i % every),
  )


def hold_out_tail(
  name: str, documents: Sequence[Document], fraction: float
) -> Corpus:
  """Holds out the last documents, or the end of the only one.

  Args:
    name: Of the corpus.
    documents: At least one, none empty, in a fixed order.
    fraction: Share of the bytes to hold out, met as nearly as whole documents
      (at least one on either side) or lines of the only one allow.

  Returns:
    The corpus.

  Raises:
    ValueError: If there is a single document of a single byte.
  """
  if len(documents) == 1:
    return _hold_out_lines(name, documents[0], fraction)
  sizes = [len(document.text) for document in documents]
  heads_N = np.array(list(itertools.accumulate(sizes)))
  cut = 1 + int(np.argmin(np.abs(heads_N[:-1] - (1 - fraction) * heads_N[-1])))
  return Corpus(name, tuple(documents[:cut]), tuple(documents[cut:]))


def _hold_out_lines(name: str, document: Document, fraction: float) -> Corpus:
  text = document.text
  if len(text) < 2:
    raise ValueError(
      f'{document.name} has {len(text)} byte; splitting it into training and '
      'held-out text needs at least 2.'
    )
  cut = _line_start_near(text, round((1 - fraction) * len(text)))
  head = Document(f'{document.name} (beginning)', text[:cut])
  tail = Document(f'{document.name} (end)', text[cut:])
  return Corpus(name, (head,), (tail,))


def _line_start_near(text: bytes, place: int) -> int:
  """Finds the start of a line near a place, or at least of a character."""
  place = min(max(place, 1), len(text) - 1)
  starts = (text.rfind(b'\n', 0, place) + 1, text.find(b'\n', place) + 1)
  near = [
    start
    for start in starts
    if 0 < start < len(text) and abs(start - place) <= len(text) // 4
  ]
  if near:
    return min(near, key=lambda start: abs(start - place))
  for start in range(place, max(place - 4, 0), -1):
    if text[start] & 0xC0 != 0x80:  # not a continuation byte of UTF-8
      return start
  return place
