import dataclasses
import pickle

import numpy as np
import pytest

from jaxformers.data import Corpus
from jaxformers.data import Document
from jaxformers.data import Pack
from jaxformers.data import RegisteredCorpus
from jaxformers.data import Source
from jaxformers.data import Stream
from jaxformers.data import TextData
from jaxformers.data import batch_at


@dataclasses.dataclass(frozen=True)
class Sentences:
  def load(self):
    train = (Document('a', b'abcdef'), Document('b', b'ghi'))
    return Corpus('sentences', train, (Document('c', b'jklm'),))


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
  folder = tmp_path_factory.getbasetemp() / 'cache'
  monkeypatch.setenv('JAXFORMERS_CACHE', str(folder))


def test_prepared_text_has_rows_and_facts():
  prepared = TextData(source=Sentences(), length=3).prepare()
  assert prepared.vocab_size == 256
  assert prepared.train[1]['tokens'].tolist() == list(b'def')
  assert prepared.heldout[0]['targets'].tolist() == list(b'klm')
  assert prepared.facts == {
    'corpus': 'sentences',
    'tokenizer': 'ByteTokenizer',
    'vocab_size': 256,
    'length': 3,
    'train_documents': 2,
    'train_bytes': 9,
    'train_tokens': 9,
    'train_rows': 3,
    'heldout_documents': 1,
    'heldout_bytes': 4,
    'heldout_tokens': 4,
    'heldout_rows': 1,
    'heldout_bytes_per_token': 1.0,
  }


def test_facts_are_plain():
  facts = TextData(source=Sentences(), length=3).prepare().facts
  assert {type(value) for value in facts.values()} == {str, int, float}


def test_arrangement_is_an_object_in_a_slot():
  data = TextData(source=Sentences(), length=5, arrangement=Pack())
  rows = data.prepare().train
  assert rows[0]['segments'].tolist() == [1, 1, 1, 1, 1]
  assert rows[1]['segments'].tolist() == [1, 1, 0, 0, 0]


def test_the_default_is_the_shipped_bible():
  prepared = TextData().prepare()
  assert prepared.facts['corpus'] == 'kjv'
  assert prepared.facts['train_documents'] == 58
  assert prepared.facts['heldout_tokens'] == 222_002
  batch = batch_at(prepared.train, 0, batch_size=4, seed=0)
  assert batch['tokens'].shape == (4, 256)
  assert bytes(batch['tokens'][0].astype(np.uint8)).isascii()


def test_path_wins_over_source(tmp_path):
  (tmp_path / 'mine.txt').write_bytes(b'0123456789\n' * 100)
  prepared = TextData(path=str(tmp_path / 'mine.txt'), length=10).prepare()
  assert prepared.facts['corpus'] == 'mine.txt'
  assert prepared.facts['train_bytes'] + prepared.facts['heldout_bytes'] == 1100


def test_a_file_shorter_than_a_window_is_refused(tmp_path):
  (tmp_path / 'short.txt').write_bytes(b'too short\n')
  with pytest.raises(ValueError, match=r'9 tokens, .*lower data\.length'):
    TextData(path=str(tmp_path / 'short.txt')).prepare()


def test_length_is_checked_before_anything_is_read():
  with pytest.raises(ValueError, match=r'data\.length must be at least 1'):
    TextData(source=RegisteredCorpus('unknown'), length=0).prepare()


def test_text_data_is_a_value():
  assert TextData() == TextData(arrangement=Stream())
  assert hash(TextData()) == hash(TextData())
  assert pickle.loads(pickle.dumps(TextData())) == TextData()


def test_sources_are_sources():
  assert isinstance(Sentences(), Source)
  assert isinstance(RegisteredCorpus(), Source)


def test_prepared_rows_pickle():
  rows = TextData(source=Sentences(), length=3).prepare().train
  copy = pickle.loads(pickle.dumps(rows))
  np.testing.assert_equal(copy[1], rows[1])


@pytest.mark.parametrize('arrangement', [Stream(), Pack()])
def test_the_example_is_shaped_like_every_row(arrangement):
  data = TextData(source=Sentences(), length=3, arrangement=arrangement)
  prepared = data.prepare()
  for row in (prepared.train[0], prepared.heldout[0]):
    assert {k: (a.shape, a.dtype) for k, a in row.items()} == {
      k: (a.shape, a.dtype) for k, a in data.example().items()
    }
