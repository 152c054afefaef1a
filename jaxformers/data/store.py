"""Tokenised text in memory-mapped files."""

import atexit
from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np

from jaxformers.data.document import Document
from jaxformers.text.tokenizer import Tokenizer

_LOGGER = logging.getLogger(__name__)
# Part of every key: change it with the format.
_MAGIC = b'jaxformers tokens 1\n'
_HEADER_BYTES = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStore:
  """The tokens of a sequence of documents.

  A store that was read from a file pickles as its path, so that sending one to
  another process does not copy the text.

  Args:
    tokens: Unsigned integers [N], all documents one after the other; an
      `np.memmap` if it comes from a file.
    offsets: int64 [documents + 1]; document i is
      `tokens[offsets[i]:offsets[i + 1]]`.
    byte_counts: int64 [documents], bytes of text of each document.
    path: The file, if there is one.
  """

  tokens: np.ndarray
  offsets: np.ndarray
  byte_counts: np.ndarray
  path: pathlib.Path | None = None

  def __reduce__(self) -> tuple[Any, ...]:
    if self.path is not None:
      return read_store, (self.path,)
    return TokenStore, (self.tokens, self.offsets, self.byte_counts)


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer) -> TokenStore:
  """Tokenises documents in memory.

  Args:
    documents: Any number.
    tokenizer: Turns each into ids.

  Returns:
    The store.

  Raises:
    ValueError: If the tokenizer makes a token that is not in its vocabulary.
  """
  pieces = [tokenizer.encode(document.text) for document in documents]
  offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
  tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.uint8)
  if tokens.size and tokens.max() >= tokenizer.vocab_size:
    raise ValueError(
      f'{tokenizer} made token {tokens.max()}, but its vocabulary has only '
      f'{tokenizer.vocab_size}; its encode or its vocab_size is wrong.'
    )
  byte_counts = np.array([len(d.text) for d in documents], np.int64)
  return TokenStore(tokens, offsets, byte_counts)


def open_store(
  documents: Sequence[Document], tokenizer: Tokenizer
) -> TokenStore:
  """Opens the tokens of these documents, tokenising them the first time only.

  They are kept in `cache_directory()` under a hash of the texts and the
  tokenizer's fingerprint. The file appears there whole or not at all, so
  several processes may do this at once; one that was damaged since is made
  again.

  Args:
    documents: Any number.
    tokenizer: Turns each into ids.

  Returns:
    The store, memory-mapped.

  Raises:
    OSError: If the cache cannot be written; says how to move it.
    ValueError: If a text does not suit the tokenizer.
  """
  path = cache_directory() / f'{_key(documents, tokenizer)}.tokens'
  if path.exists():
    try:
      return read_store(path)
    except ValueError as error:
      _LOGGER.info('%s; making it again', error)
  write_store(tokenize(documents, tokenizer), path)
  return read_store(path)


def cache_directory() -> pathlib.Path:
  """Finds the folder that keeps tokenised text, and makes it.

  `$JAXFORMERS_CACHE`, else `$XDG_CACHE_HOME/jaxformers`, else
  `~/.cache/jaxformers`; if that cannot be written, a temporary folder that
  lives as long as this process, which a log message names.

  Returns:
    A folder that can be written.
  """
  base = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  wanted = os.environ.get('JAXFORMERS_CACHE') or f'{base}/jaxformers'
  folder = pathlib.Path(wanted).expanduser()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      return folder
  except OSError as error:
    return _temporary_directory(f'{folder} cannot be written ({error})')


@functools.cache
def _temporary_directory(reason: str) -> pathlib.Path:
  folder = tempfile.mkdtemp(prefix='jaxformers-')
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  _LOGGER.warning(
    '%s; keeping tokenised text in %s for this run. Set JAXFORMERS_CACHE to a '
    'folder of yours to keep it longer.',
    reason,
    folder,
  )
  return pathlib.Path(folder)


def write_store(store: TokenStore, path: pathlib.Path) -> None:
  """Writes a store to a file, atomically.

  Args:
    store: What to write.
    path: The file; replaced if it exists.

  Raises:
    OSError: If that fails, for example on a full disk; nothing is left behind.
  """
  body = [
    store.offsets.astype('<i8').tobytes(),
    store.byte_counts.astype('<i8').tobytes(),
    store.tokens.astype(store.tokens.dtype.newbyteorder('<')).data,
  ]
  header = {
    'dtype': store.tokens.dtype.name,
    'tokens': len(store.tokens),
    'documents': len(store.byte_counts),
    'sha256': _hash(body),
  }
  head = (_MAGIC + json.dumps(header).encode()).ljust(_HEADER_BYTES, b'\n')
  try:
    _write_atomically(path, [head, *body])
  except OSError as error:
    raise OSError(
      error.errno,
      f'cannot write tokenised text to {path.parent} ({error.strerror}); make '
      'room there or set JAXFORMERS_CACHE to another folder',
    ) from error


def _write_atomically(path: pathlib.Path, parts: Sequence[Any]) -> None:
  descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix='.part')
  try:
    with open(descriptor, 'wb') as file:
      for part in parts:
        file.write(part)
    os.replace(temporary, path)
  except BaseException:
    pathlib.Path(temporary).unlink(missing_ok=True)
    raise


def read_store(path: pathlib.Path) -> TokenStore:
  """Opens a file of `write_store`, checking size and hash.

  Args:
    path: The file.

  Returns:
    The store, memory-mapped.

  Raises:
    ValueError: If the file is damaged.
  """
  with open(path, 'rb') as file:
    head = file.read(_HEADER_BYTES)
  try:
    if not head.startswith(_MAGIC):
      raise ValueError('it does not start as one')
    header = json.loads(head[len(_MAGIC) :])
    return _map(path, header)
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{path} is no intact token file: {error}') from error


def _map(path: pathlib.Path, header: dict[str, Any]) -> TokenStore:
  count, documents = header['tokens'], header['documents']
  dtype = np.dtype(header['dtype']).newbyteorder('<')
  numbers = 2 * documents + 1
  expected = _HEADER_BYTES + 8 * numbers + dtype.itemsize * count
  if path.stat().st_size != expected:
    raise ValueError(f'{path.stat().st_size} bytes, expected {expected}')
  body = np.memmap(path, np.uint8, 'r', offset=_HEADER_BYTES)
  if _hash([body]) != header['sha256']:
    raise ValueError('its content does not have the hash in its header')
  table = np.array(body[: 8 * numbers]).view('<i8')
  return TokenStore(
    tokens=body[8 * numbers :].view(dtype),
    offsets=table[: documents + 1],
    byte_counts=table[documents + 1 :],
    path=path,
  )


def _hash(parts: Sequence[Any]) -> str:
  digest = hashlib.sha256()
  for part in parts:
    digest.update(part)
  return digest.hexdigest()


def _key(documents: Sequence[Document], tokenizer: Tokenizer) -> str:
  digest = hashlib.sha256(_MAGIC + tokenizer.fingerprint.encode())
  for document in documents:
    digest.update(hashlib.sha256(document.text).digest())
  return digest.hexdigest()[:40]
