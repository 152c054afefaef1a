import concurrent.futures
import dataclasses
import errno
import logging
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from jaxformers.data import Document
from jaxformers.data import cache_directory
from jaxformers.data import open_store
from jaxformers.data import store as store_module
from jaxformers.text import ByteTokenizer

DOCUMENTS = (Document('a', b'hello'), Document('b', b'worlds!'))


@dataclasses.dataclass(frozen=True)
class CountingTokenizer:
  """Two bytes of text per token, and a list of what it was asked."""

  asked: list = dataclasses.field(default_factory=list)
  fingerprint: str = 'counting'
  vocab_size: int = 65536

  def encode(self, text):
    self.asked.append(text)
    padded = text + b'\0' * (len(text) % 2)
    return np.frombuffer(padded, '<u2')

  def decode(self, ids):
    return np.asarray(ids, '<u2').tobytes()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('JAXFORMERS_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache'


def test_store_holds_tokens_boundaries_and_byte_counts():
  store = open_store(DOCUMENTS, CountingTokenizer())
  assert isinstance(store.tokens, np.memmap)
  assert store.tokens.dtype == np.uint16
  assert store.offsets.tolist() == [0, 3, 7]
  assert store.byte_counts.tolist() == [5, 7]
  assert store.tokens[3:7].tobytes() == b'worlds!\0'


def test_second_use_does_not_tokenise_again(cache):
  tokenizer = CountingTokenizer()
  open_store(DOCUMENTS, tokenizer)
  store = open_store(DOCUMENTS, tokenizer)
  assert tokenizer.asked == [b'hello', b'worlds!']
  assert store.offsets.tolist() == [0, 3, 7]
  assert len(list(cache.iterdir())) == 1


def test_other_text_boundaries_or_tokenizer_have_their_own_file(cache):
  open_store(DOCUMENTS, ByteTokenizer())
  open_store(DOCUMENTS, CountingTokenizer())
  open_store((Document('ab', b'helloworlds!'),), ByteTokenizer())
  open_store(
    (Document('a', b'hellow'), Document('b', b'orlds!')), ByteTokenizer()
  )
  assert len(list(cache.iterdir())) == 4


def cut(content):
  return content[:-1]


def flip(content):
  return content[:-1] + bytes([content[-1] ^ 1])


def empty(content):
  return b''


def spoil_header(content):
  return content.replace(b'"tokens"', b'"nekots"')


def spoil_magic(content):
  return b'x' + content[1:]


@pytest.mark.parametrize(
  'damage', [cut, flip, empty, spoil_header, spoil_magic]
)
def test_a_damaged_file_is_made_again(cache, damage):
  open_store(DOCUMENTS, ByteTokenizer())
  (path,) = cache.iterdir()
  content = path.read_bytes()
  path.write_bytes(damage(content))
  with pytest.raises(ValueError, match=r'tokens is no intact token file'):
    store_module.read_store(path)
  store = open_store(DOCUMENTS, ByteTokenizer())
  assert store.tokens.tobytes() == b'helloworlds!'
  assert path.read_bytes() == content


def test_several_builders_at_once_all_succeed(cache):
  documents = [Document(str(i), os.urandom(1000)) for i in range(50)]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    stores = list(
      pool.map(lambda _: open_store(documents, ByteTokenizer()), range(16))
    )
  text = b''.join(d.text for d in documents)
  assert all(store.tokens.tobytes() == text for store in stores)
  assert [path.suffix for path in cache.iterdir()] == ['.tokens']


def test_two_processes_at_once_both_succeed(cache):
  code = (
    'from jaxformers.data.store import open_store\n'
    'from jaxformers.data.document import Document\n'
    'from jaxformers.text.byte import ByteTokenizer\n'
    "store = open_store([Document('a', b'xyz' * 100000)], ByteTokenizer())\n"
    'print(store.tokens.sum())'
  )
  command = [sys.executable, '-c', code]
  processes = [
    subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)
  ]
  outputs = [process.communicate()[0].split() for process in processes]
  assert outputs == [[str(sum(b'xyz') * 100000).encode()]] * 2
  assert len(list(cache.iterdir())) == 1


def test_a_store_pickles_as_its_path():
  store = open_store([Document('a', bytes(100_000))], ByteTokenizer())
  pickled = pickle.dumps(store)
  assert len(pickled) < 1000
  np.testing.assert_array_equal(pickle.loads(pickled).tokens, store.tokens)


def test_a_store_in_memory_pickles_with_its_tokens():
  store = store_module.tokenize(DOCUMENTS, ByteTokenizer())
  copy = pickle.loads(pickle.dumps(store))
  assert copy.tokens.tobytes() == b'helloworlds!'
  assert copy.offsets.tolist() == [0, 5, 12]


def test_a_full_disk_leaves_nothing_and_says_what_to_do(cache, monkeypatch):
  def fill(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(os, 'replace', fill)
  with pytest.raises(OSError, match='No space left.*set JAXFORMERS_CACHE'):
    open_store(DOCUMENTS, ByteTokenizer())
  assert list(cache.iterdir()) == []


def test_a_token_outside_of_the_vocabulary_is_refused():
  tokenizer = CountingTokenizer(vocab_size=300)
  with pytest.raises(ValueError, match='made token .*has only 300'):
    open_store(DOCUMENTS, tokenizer)


def test_no_documents_make_an_empty_store():
  store = open_store((), ByteTokenizer())
  assert len(store.tokens) == 0
  assert store.offsets.tolist() == [0]


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
  assert cache_directory() == tmp_path / 'cache'
  monkeypatch.delenv('JAXFORMERS_CACHE')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
  assert cache_directory() == tmp_path / 'xdg' / 'jaxformers'
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  assert cache_directory() == tmp_path / 'home' / '.cache' / 'jaxformers'


def test_a_cache_that_cannot_be_written_moves_and_says_so(
  tmp_path, monkeypatch, caplog
):
  (tmp_path / 'file').touch()
  monkeypatch.setenv('JAXFORMERS_CACHE', str(tmp_path / 'file'))
  with caplog.at_level(logging.WARNING):
    first, second = cache_directory(), cache_directory()
  assert first == second != tmp_path / 'file'
  assert pathlib.Path(first).is_dir()
  assert len(caplog.records) == 1
  assert 'cannot be written' in caplog.text
  assert 'Set JAXFORMERS_CACHE' in caplog.text
