"""The argument `--mesh`: how many devices lie along each axis."""

import argparse
import re
from typing import Any

AXES = 'data', 'fsdp', 'tensor', 'sequence', 'dcn'


def add(parser: argparse.ArgumentParser, others: str, default: str) -> None:
  """Declares `--mesh`.

  Args:
    parser: That of a command.
    others: How many devices axes have that are not named.
    default: What holds without the argument.
  """
  parser.add_argument(
    '--mesh',
    metavar='AXIS=N,...',
    help='devices along each axis of the mesh, such as data=64,tensor=4; axes'
    f' that are not named have {others} (default: {default})',
  )


def sizes(text: str | None) -> dict[str, int]:
  """Reads `data=64,tensor=4`.

  Args:
    text: The argument; None for none.

  Returns:
    The size of each axis that is named.

  Raises:
    ValueError: If the text names no axes and sizes.
  """
  found = {}
  for word in filter(None, (text or '').split(',')):
    axis, _, size = word.partition('=')
    if axis not in AXES or not re.fullmatch(r'-?\d+', size):
      raise ValueError(
        f'--mesh {word!r}: write AXIS=NUMBER with an axis of {", ".join(AXES)},'
        ' such as data=64,tensor=4.'
      )
    found[axis] = int(size)
  return found


def shape(text: str | None) -> Any:
  """Reads the same as a mesh whose other axes have one device.

  Args:
    text: The argument; None for none.

  Returns:
    A `MeshShape`, or None for None.
  """
  from jaxformers.train.sharding import MeshShape

  if text is None:
    return None
  return MeshShape(**(dict.fromkeys(AXES, 1) | sizes(text)))
