"""Reads the `zText` modules of the SWORD project."""

from collections.abc import Iterator
import html
import pathlib
import re
import struct
import zlib

from jaxformers.data.document import Document

_CHAPTER = re.compile(r'<chapter\b[^>]*\bosisID="(\w+)\.(\d+)"[^>]*>')
_CHAPTER_END = re.compile(r'<chapter\b[^>]*\beID=')
_ASIDE = re.compile(r'<(note|title)\b[^>]*(?<!/)>.*?</\1>', re.DOTALL)
_TAG = re.compile(r'<[^>]*>')
_LOOSE_STOP = re.compile(r'\s+([,.;:!?’”)])')


def read_entries(folder: pathlib.Path, testament: str) -> Iterator[str]:
  """Yields the raw OSIS entries of one testament, in versification order.

  `.bzs` holds 12-byte records (offset, compressed size, size) into `.bzz`, a
  sequence of zlib blocks; `.bzv` holds 10-byte records (block, start, length).

  Args:
    folder: Where the module's files are.
    testament: 'ot' or 'nt'.

  Yields:
    Markup of introductions, chapter openings and verses; '' for empty slots.

  Raises:
    ValueError: If the files do not fit this description.

  Source: The SWORD Project, driver zText (CompressType=ZIP).
  """
  index, packed, verses = (
    (folder / f'{testament}.{suffix}').read_bytes()
    for suffix in ('bzs', 'bzz', 'bzv')
  )
  try:
    blocks = [
      zlib.decompress(packed[offset : offset + size])
      for offset, size, _ in struct.iter_unpack('<III', index)
    ]
    for block, start, length in struct.iter_unpack('<IIH', verses):
      yield blocks[block][start : start + length].decode() if length else ''
  except (zlib.error, struct.error, IndexError, UnicodeDecodeError) as error:
    raise ValueError(
      f'{folder}/{testament}.bz[svz] is no readable zText module: {error}'
    ) from error


def plain_text(markup: str) -> str:
  """Removes notes, titles and tags from an OSIS entry.

  Args:
    markup: OSIS.

  Returns:
    One line of text.
  """
  text = _TAG.sub('', _ASIDE.sub(' ', markup))
  return _LOOSE_STOP.sub(r'\1', ' '.join(html.unescape(text).split()))


def read_chapters(folder: pathlib.Path) -> dict[str, list[list[str]]]:
  """Reads both testaments.

  Entries count as verses between the opening of a chapter and its end; what
  stands outside is introductions.

  Args:
    folder: Where the module's files are.

  Returns:
    OSIS book name -> chapters -> verses, in the order of the module.

  Raises:
    ValueError: If a file is damaged.
  """
  books: dict[str, list[list[str]]] = {}
  for testament in ('ot', 'nt'):
    chapter: list[str] | None = None
    for entry in read_entries(folder, testament):
      if opening := _CHAPTER.search(entry):
        chapter = []
        books.setdefault(opening[1], []).append(chapter)
        entry = entry[opening.end() :]
      if chapter is not None and (verse := plain_text(entry)):
        chapter.append(verse)
      if _CHAPTER_END.search(entry):
        chapter = None
  return books


def read_documents(
  folder: pathlib.Path, names: dict[str, str]
) -> tuple[Document, ...]:
  """Reads books as documents: a verse per line, a paragraph per chapter.

  Args:
    folder: Where the module's files are.
    names: OSIS book name -> document name, for the books wanted.

  Returns:
    The documents, in the order of `names`.

  Raises:
    ValueError: If a book is missing.
  """
  books = read_chapters(folder)
  if missing := [osis for osis in names if osis not in books]:
    raise ValueError(f'the module in {folder} lacks {", ".join(missing)}.')
  texts = {
    osis: '\n\n'.join('\n'.join(verses) for verses in books[osis]) + '\n'
    for osis in names
  }
  return tuple(
    Document(name, texts[osis].encode()) for osis, name in names.items()
  )
