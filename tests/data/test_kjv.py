import hashlib
import importlib.resources
import lzma

import pytest

from jaxformers.data import kjv

SHIPPED = importlib.resources.files('jaxformers.data') / 'shipped'


@pytest.fixture(scope='module')
def corpus():
  return kjv.load_kjv()


def test_there_are_66_books_1189_chapters_31102_verses(corpus):
  books = [*corpus.train, *corpus.heldout]
  chapters = [c for book in books for c in book.text.split(b'\n\n')]
  verses = [v for chapter in chapters for v in chapter.strip().split(b'\n')]
  assert (len(books), len(chapters), len(verses)) == (66, 1189, 31102)
  assert all(verses)


def test_eight_fixed_books_are_held_out_in_order(corpus):
  assert [book.name for book in corpus.heldout] == [
    *('Ruth', 'Esther', 'Ecclesiastes', 'Hosea', 'Habakkuk', 'John', 'Titus'),
    'James',
  ]
  kept = [name for name in kjv.BOOKS if name not in kjv.HELDOUT_BOOKS]
  assert [book.name for book in corpus.train] == kept


def test_books_begin_and_end_as_they_should(corpus):
  by_name = {book.name: book.text for book in corpus.train + corpus.heldout}
  assert by_name['Genesis'].startswith(
    b'In the beginning God created the heaven and the earth.\nAnd the earth '
  )
  assert by_name['Revelation'].endswith(b'be with you all. Amen.\n')
  assert b'Jesus wept.\n' in by_name['John']
  assert len(by_name['2 John'].strip().split(b'\n')) == 13
  assert len(by_name['Psalms'].split(b'\n\n')) == 150


def test_text_has_no_numbers_headings_or_markup(corpus):
  text = b''.join(book.text for book in corpus.train + corpus.heldout)
  assert text.isascii()
  assert not any(c in text for c in b'#0123456789<>\r\t')


def test_the_shipped_file_is_small_and_documented():
  packed = (SHIPPED / 'kjv.txt.xz').read_bytes()
  assert len(packed) <= 1_100_000
  text = lzma.decompress(packed)
  notes = (SHIPPED / 'kjv.md').read_text()
  assert hashlib.sha256(text).hexdigest() == kjv.SHA256
  for fact in (kjv.SHA256, '66 books', '1189 chapters', '31,102 verses'):
    assert fact in notes
  assert f'{len(text):,} bytes; {len(packed):,} compressed' in notes
  assert (
    ', '.join(
      name
      for name in kjv.BOOKS
      if name in kjv.HELDOUT_BOOKS and name != 'Titus' and name != 'James'
    )
    in notes
  )


def test_another_text_is_refused():
  with pytest.raises(ValueError, match=r'damaged; reinstall.*SHA-256'):
    kjv.decompress(lzma.compress(b'# Genesis\n\nIn the beginning\n'))


def test_a_cut_file_is_refused():
  packed = (SHIPPED / 'kjv.txt.xz').read_bytes()
  with pytest.raises(ValueError, match=r'kjv\.txt\.xz is damaged; reinstall'):
    kjv.decompress(packed[:1000])


def test_headings_split_books_unambiguously():
  books = kjv.parse_books(b'# A\n\na1\na2\n\na3\n\n# 1 B\n\nb1\n')
  assert [(b.name, b.text) for b in books] == [
    ('A', b'a1\na2\n\na3\n'),
    ('1 B', b'b1\n'),
  ]
