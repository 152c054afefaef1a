"""The data slot of an experiment with text."""

import dataclasses

import numpy as np

from jaxformers.data.corpora import RegisteredCorpus
from jaxformers.data.document import Corpus
from jaxformers.data.document import Source
from jaxformers.data.prepared import Prepared
from jaxformers.data.rows import Arrangement
from jaxformers.data.rows import Stream
from jaxformers.data.rows import check_length
from jaxformers.data.store import TokenStore
from jaxformers.data.store import open_store
from jaxformers.data.text_files import TextFiles
from jaxformers.text.byte import ByteTokenizer
from jaxformers.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TextData:
  """Text, how it becomes tokens, and how tokens become rows.

  Args:
    source: Where the text comes from.
    path: Short for `source=TextFiles(path)`, and wins over `source`.
    tokenizer: Turns text into tokens.
    length: Tokens per row.
    arrangement: Turns tokens into rows.
  """

  source: Source = RegisteredCorpus('kjv')
  path: str | None = None
  tokenizer: Tokenizer = ByteTokenizer()
  length: int = 256
  arrangement: Arrangement = Stream()

  def load_corpus(self) -> Corpus:
    """Reads the text.

    Returns:
      The corpus.

    Raises:
      ValueError: See the source.
      OSError: See the source.
    """
    source = self.source if self.path is None else TextFiles(self.path)
    return source.load()

  def example(self) -> dict[str, np.ndarray]:
    """Returns a row of the shapes and dtypes of all rows; reads nothing."""
    return {
      name: np.zeros(self.length, np.int32)
      for name in ('tokens', 'targets', 'segments')
    }

  def prepare(self) -> Prepared:
    """Reads, tokenises (once, see `open_store`) and arranges the text.

    Returns:
      Rows and these facts: corpus, tokenizer, vocab_size, length;
      train_documents, train_bytes, train_tokens, train_rows, and the same for
      heldout; heldout_bytes_per_token, which turns a loss per token into one
      per byte.

    Raises:
      ValueError: If there is too little text, or see source and tokenizer.
      OSError: If the text cannot be read or its tokens not be written.
    """
    check_length(self.length)
    corpus = self.load_corpus()
    train = open_store(corpus.train, self.tokenizer)
    heldout = open_store(corpus.heldout, self.tokenizer)
    train_rows = self.arrangement.train_rows(train, self.length)
    heldout_rows = self.arrangement.heldout_rows(heldout, self.length)
    return Prepared(
      train=train_rows,
      heldout=heldout_rows,
      vocab_size=self.tokenizer.vocab_size,
      facts={
        'corpus': corpus.name,
        'tokenizer': type(self.tokenizer).__name__,
        'vocab_size': self.tokenizer.vocab_size,
        'length': self.length,
        **_count('train', train, len(train_rows)),
        **_count('heldout', heldout, len(heldout_rows)),
        'heldout_bytes_per_token': float(
          heldout.byte_counts.sum() / len(heldout.tokens)
        ),
      },
    )


def _count(split: str, store: TokenStore, rows: int) -> dict[str, int]:
  return {
    f'{split}_documents': len(store.byte_counts),
    f'{split}_bytes': int(store.byte_counts.sum()),
    f'{split}_tokens': len(store.tokens),
    f'{split}_rows': rows,
  }
