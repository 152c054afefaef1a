"""Bytes as tokens."""

from collections.abc import Sequence
import dataclasses

from jaxtyping import Integer, UInt
import numpy as np


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
  """One token per byte, 256 tokens, nothing to learn and nothing to lose.

  Any bytes are fine, invalid UTF-8 too: `decode(encode(text)) == text`.

  Source: Xue et al., ByT5: Towards a token-free future with pre-trained
    byte-to-byte models, 2021, arXiv 2105.13626 (without its special tokens).
  """

  @property
  def vocab_size(self) -> int:
    """Always 256."""
    return 256

  @property
  def fingerprint(self) -> str:
    """Always 'bytes'."""
    return 'bytes'

  def encode(self, text: bytes) -> UInt[np.ndarray, ' L']:
    """Turns text into its bytes.

    Args:
      text: Any bytes.

    Returns:
      uint8 [L], L = len(text).
    """
    return np.frombuffer(text, np.uint8).copy()

  def decode(self, ids: Sequence[int] | Integer[np.ndarray, ' L']) -> bytes:
    """Turns ids in [0, 256) into bytes.

    Args:
      ids: Integers [L].

    Returns:
      L bytes.

    Raises:
      ValueError: If an id is not a byte.
    """
    ids_L = np.asarray(ids)
    if ids_L.size and not 0 <= ids_L.min() <= ids_L.max() < 256:
      raise ValueError(
        'byte tokens lie in [0, 256), got values from '
        f'{ids_L.min()} to {ids_L.max()}; was the model trained with another '
        'tokenizer?'
      )
    return ids_L.astype(np.uint8).tobytes()
