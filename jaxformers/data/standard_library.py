"""Text that comes with every Python."""

import pathlib
import sysconfig

from jaxformers.data.document import Corpus
from jaxformers.data.document import Document
from jaxformers.data.document import hold_out_every

# Folders that are not the library itself, or are its tests.
LEFT_OUT = frozenset(
  ('test', 'tests', 'idle_test', 'site-packages', 'dist-packages')
  + ('__pycache__', 'lib-dynload')
)


def load_python_topics() -> Corpus:
  """Loads the help topics of Python: half a megabyte of English and markup.

  The text depends on the Python version.

  Returns:
    One document per topic, one in ten held out.

  Source: The Python Language Reference, as module `pydoc_data.topics`.
  """
  from pydoc_data import topics

  documents = [
    Document(name, text.encode())
    for name, text in sorted(topics.topics.items())
  ]
  return hold_out_every('python-topics', documents, every=10)


def load_python_source() -> Corpus:
  """Loads the source of Python's standard library, without tests.

  The text depends on the Python version.

  Returns:
    One document per file, one in twenty held out.

  Source: The Python standard library.
  """
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  names = sorted(
    path.relative_to(root)
    for path in root.rglob('*.py')
    if LEFT_OUT.isdisjoint(path.relative_to(root).parts)
  )
  texts = ((name.as_posix(), (root / name).read_bytes()) for name in names)
  documents = [Document(name, text) for name, text in texts if text]
  return hold_out_every('python-source', documents)
