"""Makes jaxformers/data/shipped/kjv.txt.xz from the Debian package bible-kjv.

Run: apt-get install bible-kjv bible-kjv-text; python scripts/build_kjv.py
Prints the counts and the SHA-256 that kjv.md and jaxformers/data/kjv.py record.
"""

from collections.abc import Iterator
import hashlib
import itertools
import lzma
import pathlib
import re
import subprocess

from jaxformers.data.kjv import BOOKS
from jaxformers.data.kjv import SHA256

SHIPPED = pathlib.Path(__file__).parents[1] / 'jaxformers/data/shipped'
# Numbers of a book, a chapter and a verse, then the verse: `1Sm3:10 And ...`.
VERSE = re.compile(r'(\d?[A-Za-z]+)(\d+):(\d+) (.*)')
# Text has no use for alignment to four bytes, and gains from longer contexts.
FILTER = {
  'id': lzma.FILTER_LZMA2,
  'preset': 9 | lzma.PRESET_EXTREME,
  'lc': 4,
  'lp': 0,
  'pb': 0,
}


def read_verses() -> list[tuple[str, int, int, str]]:
  """Returns (book, chapter, verse, text) of all verses, in order."""
  command = ['bible', '-f', 'gen1:1-rev22:21']
  output = subprocess.run(command, capture_output=True, check=True, text=True)
  matches = [VERSE.fullmatch(line) for line in output.stdout.splitlines()]
  if not all(matches):
    raise SystemExit(f'cannot read line {matches.index(None) + 1} of {command}')
  return [(m[1], int(m[2]), int(m[3]), m[4].strip()) for m in matches if m]


def check_numbers(verses: list[tuple[str, int, int, str]]) -> None:
  """Stops unless chapters and verses count up without gaps."""
  for (book, chapter, verse, _), after in itertools.pairwise(verses):
    following = (book, chapter, verse + 1), (book, chapter + 1, 1)
    if after[:3] not in following and after[1:3] != (1, 1):
      raise SystemExit(f'{after[:3]} follows {(book, chapter, verse)}')


def write_books(verses: list[tuple[str, int, int, str]]) -> Iterator[str]:
  """Yields each book: a heading, then paragraphs, which are its chapters."""
  books = itertools.groupby(verses, key=lambda verse: verse[0])
  for name, (_, book) in zip(BOOKS, books, strict=True):
    chapters = itertools.groupby(book, key=lambda verse: verse[1])
    paragraphs = ('\n'.join(v[3] for v in chapter) for _, chapter in chapters)
    yield '\n\n'.join([f'# {name}', *paragraphs])


def main() -> None:
  """Writes the file and says whether it is the one the library expects."""
  verses = read_verses()
  check_numbers(verses)
  if any('#' in text or not text for *_, text in verses):
    raise SystemExit('a verse is empty or looks like a heading')
  text = ('\n\n'.join(write_books(verses)) + '\n').encode('ascii')
  packed = lzma.compress(text, lzma.FORMAT_XZ, filters=[FILTER])
  SHIPPED.mkdir(exist_ok=True)
  (SHIPPED / 'kjv.txt.xz').write_bytes(packed)
  digest = hashlib.sha256(text).hexdigest()
  chapters = len({verse[:2] for verse in verses})
  print(f'{len(BOOKS)} books, {chapters} chapters, {len(verses)} verses')
  print(f'{len(text)} bytes, {len(packed)} compressed, sha256 {digest}')
  print('as recorded' if digest == SHA256 else f'recorded was {SHA256}')


if __name__ == '__main__':
  main()
