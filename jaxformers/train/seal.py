"""Checksums of every file of a folder, kept in the folder itself.

The format in which checkpoints are written protects its index, but not the
numbers: a flipped bit in a data file is read back as another weight, without
any complaint. So each checkpoint carries a seal, the size and CRC-32 of each of
its files. It is written before the folder gets its final name, so a checkpoint
either has its seal or does not exist, and checked before anything is restored.

CRC-32 through zlib runs at 2.2 GB/s on one core here, Adler-32 at 1.7 GB/s;
sealing happens in the thread that saves, away from the training loop.
"""

from collections.abc import Container, Iterator
import json
import pathlib
import zlib

_NAME = 'seal.json'
_BLOCK = 1 << 20


def _checksum(path: pathlib.Path) -> list[int]:
  """Returns the size in bytes and the CRC-32 of a file."""
  size, crc = 0, 0
  with path.open('rb') as file:
    while block := file.read(_BLOCK):
      size += len(block)
      crc = zlib.crc32(block, crc)
  return [size, crc]


def _files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields all files below a folder, in the order of their names."""
  for path in sorted(folder.iterdir()):  # the paths of etils have no rglob
    if path.is_dir():
      yield from _files(path)
    else:
      yield path


def write_seal(folder: pathlib.Path, *, without: Container[str] = ()) -> None:
  """Writes the seal of all files that are in `folder` now.

  Args:
    folder: a folder whose files are complete.
    without: names of files that may still change.
  """
  sums = {
    path.relative_to(folder).as_posix(): _checksum(path)
    for path in _files(folder)
    if path.name != _NAME and path.name not in without
  }
  (folder / _NAME).write_text(json.dumps(sums, indent=1))


def find_damage(folder: pathlib.Path) -> str | None:
  """Says what is wrong with a sealed folder.

  Files that were added after sealing are ignored.

  Args:
    folder: the folder to check; all of its sealed files are read.

  Returns:
    A short reason that names the first file that differs, or None if every
    sealed file is as it was.
  """
  try:
    sums = json.loads((folder / _NAME).read_text())
    for name, expected in sums.items():
      found = _checksum(folder / name)
      if found != expected:
        return (
          f'{name} has {found[0]} bytes with checksum {found[1]:08x} instead'
          f' of {expected[0]} bytes with checksum {expected[1]:08x}'
        )
  except FileNotFoundError as error:
    missing = pathlib.Path(error.filename).relative_to(folder)
    return f'{missing} is missing'
  except OSError as error:
    return f'{error.filename} cannot be read: {error.strerror}'
  except (ValueError, AttributeError, TypeError, LookupError):
    return f'{_NAME} is damaged'
  return None
