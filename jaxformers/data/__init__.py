"""Data: corpora, token stores, rows, batches, and the n-gram baseline."""

from jaxformers.data.batches import batch_at as batch_at
from jaxformers.data.batches import batches as batches
from jaxformers.data.batches import heldout_batches as heldout_batches
from jaxformers.data.corpora import CORPORA as CORPORA
from jaxformers.data.corpora import CorpusEntry as CorpusEntry
from jaxformers.data.corpora import RegisteredCorpus as RegisteredCorpus
from jaxformers.data.document import Corpus as Corpus
from jaxformers.data.document import Document as Document
from jaxformers.data.document import Source as Source
from jaxformers.data.ngram import ByteNgrams as ByteNgrams
from jaxformers.data.ngram import ngram_bits_per_byte as ngram_bits_per_byte
from jaxformers.data.prepared import Prepared as Prepared
from jaxformers.data.prepared import RowSource as RowSource
from jaxformers.data.repeated_blocks import RepeatedBlocks as RepeatedBlocks
from jaxformers.data.rows import Arrangement as Arrangement
from jaxformers.data.rows import Pack as Pack
from jaxformers.data.rows import Rows as Rows
from jaxformers.data.rows import Stream as Stream
from jaxformers.data.store import TokenStore as TokenStore
from jaxformers.data.store import cache_directory as cache_directory
from jaxformers.data.store import open_store as open_store
from jaxformers.data.text_data import TextData as TextData
from jaxformers.data.text_files import TextFiles as TextFiles
from jaxformers.data.tfds import TfdsText as TfdsText
