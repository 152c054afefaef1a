"""The King James Bible, shipped with the library."""

import hashlib
import importlib.resources
import lzma

from jaxformers.data.document import Corpus
from jaxformers.data.document import Document

SHA256 = 'e8df465b27ab317c6522fdbe756703b910477c322ff4844b5e932b2a757b8ff2'

BOOKS = (
  *('Genesis', 'Exodus', 'Leviticus', 'Numbers', 'Deuteronomy', 'Joshua'),
  *('Judges', 'Ruth', '1 Samuel', '2 Samuel', '1 Kings', '2 Kings'),
  *('1 Chronicles', '2 Chronicles', 'Ezra', 'Nehemiah', 'Esther', 'Job'),
  *('Psalms', 'Proverbs', 'Ecclesiastes', 'Song of Solomon', 'Isaiah'),
  *('Jeremiah', 'Lamentations', 'Ezekiel', 'Daniel', 'Hosea', 'Joel', 'Amos'),
  *('Obadiah', 'Jonah', 'Micah', 'Nahum', 'Habakkuk', 'Zephaniah', 'Haggai'),
  *('Zechariah', 'Malachi', 'Matthew', 'Mark', 'Luke', 'John', 'Acts'),
  *('Romans', '1 Corinthians', '2 Corinthians', 'Galatians', 'Ephesians'),
  *('Philippians', 'Colossians', '1 Thessalonians', '2 Thessalonians'),
  *('1 Timothy', '2 Timothy', 'Titus', 'Philemon', 'Hebrews', 'James'),
  *('1 Peter', '2 Peter', '1 John', '2 John', '3 John', 'Jude', 'Revelation'),
)

# Chosen once: history, wisdom, prophecy, gospel and letters, old and new, and
# none that repeats a training book verse by verse as the Kings, the
# Chronicles and the first three gospels do.
HELDOUT_BOOKS = frozenset(
  ('Ruth', 'Esther', 'Ecclesiastes', 'Hosea', 'Habakkuk', 'John', 'James')
  + ('Titus',)
)


def load_kjv() -> Corpus:
  """Loads the King James Bible: 66 books, one document each.

  A document holds one verse per line, without numbers, and an empty line
  between chapters. Books are held out whole, since passages run on from
  verse to verse.

  Returns:
    58 books to learn from and the eight of `HELDOUT_BOOKS`.

  Raises:
    ValueError: If the shipped file is damaged.

  Source: The Holy Bible, Authorized (King James) Version, 1611 (in the
    orthography of 1769); Debian package bible-kjv-text 4.38.
  """
  file = importlib.resources.files('jaxformers.data') / 'shipped/kjv.txt.xz'
  return split_by_book('kjv', parse_books(decompress(file.read_bytes())))


def decompress(packed: bytes) -> bytes:
  """Decompresses the shipped text and checks it against `SHA256`.

  Args:
    packed: Content of kjv.txt.xz.

  Returns:
    The text.

  Raises:
    ValueError: If it is not the text that was shipped.
  """
  try:
    text = lzma.decompress(packed)
  except (lzma.LZMAError, EOFError) as error:
    raise ValueError(f'{_DAMAGED} ({error}).') from error
  digest = hashlib.sha256(text).hexdigest()
  if digest != SHA256:
    raise ValueError(f'{_DAMAGED} (SHA-256 {digest}, expected {SHA256}).')
  return text


_DAMAGED = (
  'the shipped file jaxformers/data/shipped/kjv.txt.xz is damaged; reinstall '
  'jaxformers'
)


def parse_books(text: bytes) -> tuple[Document, ...]:
  r"""Splits the shipped format at its headings.

  Args:
    text: Books `# Name\n\nchapter\n\nchapter\n\n# Name ...`, where no verse
      begins with `#`.

  Returns:
    A document per book, without its heading.
  """
  books = (b'\n\n' + text.rstrip(b'\n')).split(b'\n\n# ')[1:]
  pairs = (book.split(b'\n\n', 1) for book in books)
  return tuple(Document(name.decode(), body + b'\n') for name, body in pairs)


def split_by_book(name: str, books: tuple[Document, ...]) -> Corpus:
  """Holds out the books of `HELDOUT_BOOKS`.

  Args:
    name: Of the corpus.
    books: Documents named as in `BOOKS`.

  Returns:
    The corpus, books in their order.
  """
  return Corpus(
    name,
    tuple(book for book in books if book.name not in HELDOUT_BOOKS),
    tuple(book for book in books if book.name in HELDOUT_BOOKS),
  )
