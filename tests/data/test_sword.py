import struct
import zlib

import pytest

from jaxformers.data import external
from jaxformers.data import kjv
from jaxformers.data import sword

INTRODUCTION = '<div type="x-p"/> <title level="1">A book</title> Foreword.'


def chapter(book, number, verses):
  opening = f'<chapter n="{number}" osisID="{book}.{number}" sID="x"/>'
  ending = f'<chapter eID="{book}.{number}"/>'
  return [opening, *verses[:-1], verses[-1] + ending]


def write_module(folder, testament, books):
  """Writes each book as one zlib block, as the format has it."""
  index = packed = places = b''
  for block, entries in enumerate(books):
    text = b''
    for entry in entries:
      places += struct.pack('<IIH', block, len(text), len(entry.encode()))
      text += entry.encode()
    data = zlib.compress(text)
    index += struct.pack('<III', len(packed), len(data), len(text))
    packed += data
  folder.mkdir(parents=True, exist_ok=True)
  for suffix, content in zip('svz', (index, places, packed), strict=True):
    (folder / f'{testament}.bz{suffix}').write_bytes(content)


@pytest.fixture
def folder(tmp_path):
  genesis = [
    *('', INTRODUCTION),
    *chapter('Gen', 1, ['<w lemma="x">In</w> the beginning.', '', 'Two &amp;']),
    *chapter('Gen', 2, ['Three.']),
    INTRODUCTION,
  ]
  write_module(tmp_path / 'web', 'ot', [genesis, chapter('Tob', 1, ['No.'])])
  write_module(tmp_path / 'web', 'nt', [chapter('Matt', 1, ['“Book”'])])
  return tmp_path / 'web'


def test_chapters_and_verses_are_found_and_introductions_are_not(folder):
  assert sword.read_chapters(folder) == {
    'Gen': [['In the beginning.', 'Two &'], ['Three.']],
    'Tob': [['No.']],
    'Matt': [['“Book”']],
  }


def test_books_wanted_become_documents(folder):
  documents = sword.read_documents(folder, {'Gen': 'Genesis', 'Matt': 'M'})
  assert [(d.name, d.text.decode()) for d in documents] == [
    ('Genesis', 'In the beginning.\nTwo &\n\nThree.\n'),
    ('M', '“Book”\n'),
  ]


@pytest.mark.parametrize(
  ('markup', 'text'),
  [
    ('<w>God</w><note n="1">or <i>gods</i></note><w>made</w>.', 'God made.'),
    ('earth<note>a</note>, and', 'earth, and'),
    (
      '<title type="x">A Psalm</title>Blessed  is\n<milestone/>he',
      'Blessed is he',
    ),
    ('a<title/>b<note>c</note>', 'ab'),
  ],
)
def test_notes_titles_and_tags_are_removed(markup, text):
  assert sword.plain_text(markup) == text


def test_a_missing_book_is_named(folder):
  with pytest.raises(ValueError, match='lacks Exod, Lev'):
    sword.read_documents(folder, {'Exod': 'Exodus', 'Lev': 'Leviticus'})


def test_a_damaged_module_is_named(folder):
  (folder / 'ot.bzz').write_bytes(b'damaged' * 9)
  with pytest.raises(ValueError, match=r'web/ot.* is no readable zText module'):
    list(sword.read_entries(folder, 'ot'))


def test_the_bible_loader_takes_66_books_and_no_others(tmp_path, monkeypatch):
  monkeypatch.setattr(external, 'SWORD_FOLDER', tmp_path)
  books = [chapter(osis, 1, [osis]) for osis in ('Tob', *external.OSIS_BOOKS)]
  write_module(tmp_path / 'engWEBx', 'ot', books[:40])
  write_module(tmp_path / 'engWEBx', 'nt', books[40:])
  corpus = external.load_world_english_bible()
  assert {d.name for d in corpus.heldout} == kjv.HELDOUT_BOOKS
  assert len(corpus.train) == 58
  by_name = {d.name: d.text for d in corpus.train + corpus.heldout}
  assert by_name['Song of Solomon'] == b'Song\n'
  assert by_name['Philemon'] == b'Phlm\n'


@pytest.mark.skipif(
  not list(external.SWORD_FOLDER.glob('engWEB*/ot.bzs')),
  reason='Debian package sword-text-web is not installed',
)
def test_the_installed_bible_has_its_verses():
  corpus = external.load_world_english_bible()
  text = b''.join(d.text for d in corpus.train + corpus.heldout)
  verses = [line for line in text.split(b'\n') if line]
  assert 31_080 <= len(verses) <= 31_105
  assert b'Jesus wept.' in text
  assert b'<' not in text
