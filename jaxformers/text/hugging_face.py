"""Any tokenizer that comes as a `tokenizer.json`."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any, NamedTuple

from jaxtyping import Integer, UInt
import numpy as np

from jaxformers.text.tokenizer import token_dtype

PIECE_BYTES = 1 << 20


class _Loaded(NamedTuple):
  """A tokenizer file in memory."""

  tokenizer: Any  # tokenizers.Tokenizer
  vocab_size: int
  fingerprint: str
  splits_at_lines: bool


@dataclasses.dataclass(frozen=True)
class HuggingFaceTokenizer:
  r"""Wraps a `tokenizer.json` of the package `tokenizers` (extra `hf`).

  The file is read on first use and kept; two tokenizers are equal when their
  paths are. No special tokens are added; padding, truncation and the random
  merges of BPE dropout, should the file ask for them, are switched off, so
  that a text always has the same ids. Special tokens written out in the text
  are recognised, as the package does it.

  With byte-level tokenizers (GPT-2, RoBERTa, Llama 3, Qwen) decoding gives the
  text back exactly; normalising ones (BERT, T5) lose what they normalise. Ids
  that end inside a character decode to U+FFFD there.

  Long texts are encoded in pieces of about 1 MiB only if the file has GPT-2's
  pre-tokenizer (`ByteLevel` with its regular expression and no prefix space),
  no normaliser, and no added token that looks at its surroundings. There a line
  feed between two characters that are not white space always ends a
  pre-token, and merges never cross pre-tokens, so cutting after it changes
  nothing. Any other tokenizer sees each text whole.

  Args:
    path: The `tokenizer.json`.
  """

  path: str

  @property
  def vocab_size(self) -> int:
    """The largest id plus one, added tokens included."""
    return _load(self.path).vocab_size

  @property
  def fingerprint(self) -> str:
    """Hash of the file's content."""
    return _load(self.path).fingerprint

  def encode(self, text: bytes) -> UInt[np.ndarray, ' L']:
    """Turns UTF-8 text into ids.

    Args:
      text: UTF-8.

    Returns:
      uint8, uint16 or uint32 [L].

    Raises:
      ValueError: If the text is not UTF-8; names the position.
    """
    loaded = _load(self.path)
    string = _decode_utf8(text)
    pieces = _line_pieces(string) if loaded.splits_at_lines else [string]
    dtype = token_dtype(loaded.vocab_size)
    ids = [
      np.array(
        loaded.tokenizer.encode(piece, add_special_tokens=False).ids, dtype
      )
      for piece in pieces
    ]
    return np.concatenate([np.zeros(0, dtype), *ids])

  def decode(self, ids: Sequence[int] | Integer[np.ndarray, ' L']) -> bytes:
    """Turns ids into UTF-8 text, special tokens written out.

    Args:
      ids: Integers [L].

    Returns:
      UTF-8.

    Raises:
      ValueError: If an id is outside of the vocabulary.
    """
    loaded = _load(self.path)
    ids_L = np.asarray(ids, np.int64)
    if ids_L.size and not 0 <= ids_L.min() <= ids_L.max() < loaded.vocab_size:
      raise ValueError(
        f'tokens of {self.path} lie in [0, {loaded.vocab_size}), got values '
        f'from {ids_L.min()} to {ids_L.max()}; was the model trained with '
        'another tokenizer?'
      )
    text = loaded.tokenizer.decode(ids_L.tolist(), skip_special_tokens=False)
    return text.encode()


@functools.lru_cache(maxsize=8)
def _load(path: str) -> _Loaded:
  try:
    import tokenizers
  except ImportError as error:
    raise ImportError(
      'HuggingFaceTokenizer needs the package tokenizers: '
      "pip install 'jaxformers[hf]'"
    ) from error
  content = _read(path)
  try:
    tokenizer = tokenizers.Tokenizer.from_str(content.decode())
  except Exception as error:  # the package raises plain Exception
    raise ValueError(
      f'{path} is not a tokenizer.json of the package tokenizers: {error}'
    ) from error
  _make_deterministic(tokenizer)
  ids = tokenizer.get_vocab(with_added_tokens=True).values()
  if not ids:
    raise ValueError(f'the tokenizer {path} has an empty vocabulary.')
  digest = hashlib.sha256(content).hexdigest()
  return _Loaded(
    tokenizer=tokenizer,
    vocab_size=max(ids) + 1,
    fingerprint=f'hf-{digest}',
    splits_at_lines=_splits_at_lines(json.loads(content)),
  )


def _read(path: str) -> bytes:
  file = pathlib.Path(path).expanduser()
  if file.is_dir():
    raise ValueError(
      f'expected a tokenizer.json, got the directory {path}; pass '
      f'{pathlib.Path(path) / "tokenizer.json"} if that is the one.'
    )
  if not file.exists():
    raise FileNotFoundError(
      f'tokenizer file {path} does not exist; pass the path of a '
      'tokenizer.json.'
    )
  return file.read_bytes()


def _make_deterministic(tokenizer: Any) -> None:
  """Switches off what would make ids depend on length or chance."""
  tokenizer.no_truncation()
  tokenizer.no_padding()
  if getattr(tokenizer.model, 'dropout', None):
    tokenizer.model.dropout = None


def _splits_at_lines(spec: dict[str, Any]) -> bool:
  """Whether cutting after a lone line feed leaves all ids as they are."""
  pre = spec.get('pre_tokenizer') or {}
  return (
    pre.get('type') == 'ByteLevel'
    and pre.get('use_regex', True)
    and not pre.get('add_prefix_space', True)
    and not spec.get('normalizer')
    and not any(
      token.get('lstrip')
      or token.get('rstrip')
      or token.get('single_word')
      or any(c.isspace() for c in token['content'])
      for token in spec.get('added_tokens', ())
    )
  )


def _line_pieces(text: str) -> Iterator[str]:
  """Yields pieces cut after line feeds with no white space on either side."""
  start = 0
  while start < len(text):
    cut = text.find('\n', start + PIECE_BYTES)
    while cut >= 0 and not _stands_alone(text, cut):
      cut = text.find('\n', cut + 1)
    stop = len(text) if cut < 0 else cut + 1
    yield text[start:stop]
    start = stop


def _stands_alone(text: str, i: int) -> bool:
  has_both = 0 < i < len(text) - 1
  return has_both and not (text[i - 1].isspace() or text[i + 1].isspace())


def _decode_utf8(text: bytes) -> str:
  try:
    return text.decode()
  except UnicodeDecodeError as error:
    bad = ' '.join(f'0x{byte:02x}' for byte in text[error.start : error.end])
    raise ValueError(
      f'this tokenizer needs UTF-8, but byte {error.start} starts an invalid '
      f'sequence ({bad}: {error.reason}); convert the text, or use '
      'ByteTokenizer(), which takes any bytes.'
    ) from error
