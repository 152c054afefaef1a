"""Your own text."""

import dataclasses
import difflib
import pathlib

from jaxformers.data.document import Corpus
from jaxformers.data.document import Document
from jaxformers.data.document import hold_out_tail


@dataclasses.dataclass(frozen=True)
class TextFiles:
  """A text file, or all matching files below a directory, sorted by path.

  Every file is a document; empty ones are skipped. With several files the last
  ones are held out, with a single one its end. Files are taken as bytes, so
  invalid UTF-8 passes through.

  Args:
    path: File or directory.
    pattern: Which files of a directory to take, at any depth.
    heldout_fraction: About which share of the bytes to hold out.
  """

  path: str
  pattern: str = '*.txt'
  heldout_fraction: float = 0.05

  def load(self) -> Corpus:
    """Reads and splits the files.

    Returns:
      The corpus, named after the path.

    Raises:
      FileNotFoundError: If there is no such path, or no file matches.
      PermissionError: If a file cannot be read.
      ValueError: If all files are empty, or the fraction is not inside (0, 1).
    """
    if not 0 < self.heldout_fraction < 1:
      raise ValueError(
        'heldout_fraction must lie inside (0, 1), got '
        f'{self.heldout_fraction}; 0.05 is usual.'
      )
    root = pathlib.Path(self.path).expanduser()
    texts = [(file, _read(file)) for file in self._find(root)]
    documents = [Document(_name(file, root), t) for file, t in texts if t]
    if not documents:
      what = 'it' if root.is_file() else f'each of its {len(texts)} files'
      raise ValueError(f'no text in {self.path}: {what} is empty.')
    return hold_out_tail(root.name, documents, self.heldout_fraction)

  def _find(self, root: pathlib.Path) -> list[pathlib.Path]:
    if not root.exists():
      raise FileNotFoundError(f'{self.path} does not exist{_nearest(root)}.')
    if not root.is_dir():
      return [root]
    files = sorted(path for path in root.rglob(self.pattern) if path.is_file())
    if not files:
      raise FileNotFoundError(
        f'no file below {self.path} matches {self.pattern!r}; pass another '
        'pattern, or the path of a file.'
      )
    return files


def _name(file: pathlib.Path, root: pathlib.Path) -> str:
  return file.name if file == root else file.relative_to(root).as_posix()


def _read(file: pathlib.Path) -> bytes:
  try:
    return file.read_bytes()
  except PermissionError as error:
    raise PermissionError(
      f'no permission to read {file}; change it (chmod +r), or pass text that '
      'you may read.'
    ) from error


def _nearest(path: pathlib.Path) -> str:
  """Names what the user may have meant, if the parent is there to look in."""
  if not path.parent.is_dir():
    return f', nor does the directory {path.parent}'
  names = [sibling.name for sibling in path.parent.iterdir()]
  nearest = difflib.get_close_matches(path.name, names, n=1)
  return f'; did you mean {path.parent / nearest[0]}?' if nearest else ''
