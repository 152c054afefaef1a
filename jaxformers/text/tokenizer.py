"""The contract of a tokenizer."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Integer, UInt
import numpy as np


def token_dtype(vocab_size: int) -> np.dtype:
  """Chooses the smallest unsigned integer type that holds every token.

  Args:
    vocab_size: Number of tokens, so the largest token is one less.

  Returns:
    uint8, uint16 or uint32.

  Raises:
    ValueError: If the vocabulary is empty or has more than 2^32 tokens.
  """
  for dtype in (np.uint8, np.uint16, np.uint32):
    if 1 <= vocab_size <= np.iinfo(dtype).max + 1:
      return np.dtype(dtype)
  raise ValueError(
    f'vocab_size must lie between 1 and 2**32, got {vocab_size}.'
  )


@runtime_checkable
class Tokenizer(Protocol):
  """Maps bytes to token ids and back.

  Text is bytes everywhere in this library: what a file holds is what a model
  is measured on, so that bits per byte compare across tokenizers.
  """

  @property
  def vocab_size(self) -> int:
    """Number of tokens; every id is smaller."""
    ...

  @property
  def fingerprint(self) -> str:
    """Name of what `encode` computes; equal names give equal ids."""
    ...

  def encode(self, text: bytes) -> UInt[np.ndarray, ' L']:
    """Turns text into ids of type `token_dtype(vocab_size)`, shape [L]."""
    ...

  def decode(self, ids: Sequence[int] | Integer[np.ndarray, ' L']) -> bytes:
    """Turns ids into text."""
    ...
