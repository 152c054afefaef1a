import json
import pickle
import random
import sys

import numpy as np
import pytest

from jaxformers.text import HuggingFaceTokenizer
from jaxformers.text import Tokenizer
from jaxformers.text import hugging_face

tokenizers = pytest.importorskip('tokenizers')

TEXT = (
  'In the beginning God created\nthe heaven and the earth.\n\n  Ünïcödé 天地'
)


def train(path, *, pre_tokenizer=None, vocab_size=300, added=()):
  """Trains a small byte-level BPE tokenizer and returns ours around it."""
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = pre_tokenizer or tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  model.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
  )
  model.train_from_iterator([TEXT] * 3, trainer)
  model.add_special_tokens(list(added))
  model.save(str(path))
  return HuggingFaceTokenizer(str(path))


@pytest.fixture
def tokenizer(tmp_path):
  return train(tmp_path / 'tokenizer.json')


def test_byte_level_text_round_trips(tokenizer):
  ids_L = tokenizer.encode(TEXT.encode())
  assert ids_L.dtype == np.uint16
  assert len(ids_L) < len(TEXT.encode())
  assert tokenizer.decode(ids_L) == TEXT.encode()


def test_ids_equal_the_packages_own(tokenizer):
  peer = tokenizers.Tokenizer.from_file(tokenizer.path)
  assert tokenizer.encode(TEXT.encode()).tolist() == peer.encode(TEXT).ids
  assert tokenizer.vocab_size == peer.get_vocab_size()


def test_empty_text_has_no_tokens(tokenizer):
  assert tokenizer.encode(b'').tolist() == []
  assert tokenizer.decode([]) == b''


def test_special_tokens_are_not_added_but_recognised(tmp_path):
  tokenizer = train(tmp_path / 't.json', added=['<end>'])
  plain = tokenizer.encode(b'God')
  ids_L = tokenizer.encode(b'God<end>')
  assert ids_L.tolist() == [*plain.tolist(), tokenizer.vocab_size - 1]
  assert tokenizer.decode(ids_L) == b'God<end>'


def test_truncation_padding_and_dropout_are_off(tmp_path):
  plain = train(tmp_path / 'a.json').encode(TEXT.encode())
  spec = json.loads((tmp_path / 'a.json').read_text())
  spec['model']['dropout'] = 0.9
  spec['truncation'] = {
    'direction': 'Right',
    'max_length': 4,
    'strategy': 'LongestFirst',
    'stride': 0,
  }
  (tmp_path / 'b.json').write_text(json.dumps(spec))
  other = HuggingFaceTokenizer(str(tmp_path / 'b.json'))
  np.testing.assert_array_equal(other.encode(TEXT.encode()), plain)


def random_text(size):
  rng = random.Random(0)
  words = ['God', 'the', ' ', '  ', '\n', '\n\n', '\r\n', ',', "'s", '42', '天']
  return ''.join(rng.choice(words) for _ in range(size))


def test_pieces_give_the_ids_of_the_whole(tokenizer, monkeypatch):
  text = random_text(2000)
  peer = tokenizers.Tokenizer.from_file(tokenizer.path)
  monkeypatch.setattr(hugging_face, 'PIECE_BYTES', 16)
  pieces = list(hugging_face._line_pieces(text))
  assert len(pieces) > 20
  assert ''.join(pieces) == text
  assert tokenizer.encode(text.encode()).tolist() == peer.encode(text).ids


@pytest.mark.parametrize('add_prefix_space', [False, True])
def test_only_safe_pre_tokenizers_see_pieces(tmp_path, add_prefix_space):
  pre = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
  train(tmp_path / 't.json', pre_tokenizer=pre)
  spec = json.loads((tmp_path / 't.json').read_text())
  assert hugging_face._splits_at_lines(spec) is not add_prefix_space


def test_a_token_that_strips_its_left_forbids_pieces(tmp_path):
  mask = tokenizers.AddedToken('<mask>', lstrip=True)
  train(tmp_path / 't.json', added=[mask])
  spec = json.loads((tmp_path / 't.json').read_text())
  assert not hugging_face._splits_at_lines(spec)


def test_invalid_utf8_names_position_and_bytes(tokenizer):
  with pytest.raises(ValueError, match='byte 3 starts .*0xe9.*ByteTokenizer'):
    tokenizer.encode(b'caf\xe9!')


def test_missing_file_is_named(tmp_path):
  path = str(tmp_path / 'none.json')
  with pytest.raises(FileNotFoundError, match=r'none\.json does not exist'):
    HuggingFaceTokenizer(path).encode(b'a')


def test_directory_is_refused_with_advice(tmp_path):
  with pytest.raises(ValueError, match=r'directory.*tokenizer\.json'):
    HuggingFaceTokenizer(str(tmp_path)).encode(b'a')


@pytest.mark.parametrize('content', [b'{"a": 1}', b'not json', b'\xff\xfe'])
def test_another_file_is_refused(tmp_path, content):
  (tmp_path / 'x.json').write_bytes(content)
  with pytest.raises(ValueError, match=r'x\.json is not a tokenizer\.json'):
    HuggingFaceTokenizer(str(tmp_path / 'x.json')).encode(b'a')


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  with pytest.raises(ImportError, match=r"pip install 'jaxformers\[hf\]'"):
    HuggingFaceTokenizer(str(tmp_path / 'y.json')).encode(b'a')


def test_ids_outside_of_the_vocabulary_are_refused(tokenizer):
  with pytest.raises(ValueError, match=r'lie in \[0, 300\).*another tokenizer'):
    tokenizer.decode([300])


def test_making_one_reads_nothing_and_equality_is_by_path():
  assert HuggingFaceTokenizer('a.json') == HuggingFaceTokenizer('a.json')
  assert HuggingFaceTokenizer('a.json') != HuggingFaceTokenizer('b.json')
  assert (
    len({HuggingFaceTokenizer('a.json')} | {HuggingFaceTokenizer('a.json')})
    == 1
  )


def test_fingerprint_is_of_the_content_not_the_path(tmp_path):
  a = train(tmp_path / 'a.json')
  (tmp_path / 'b.json').write_bytes((tmp_path / 'a.json').read_bytes())
  assert HuggingFaceTokenizer(str(tmp_path / 'b.json')).fingerprint == (
    a.fingerprint
  )
  other = train(tmp_path / 'c.json', vocab_size=290)
  assert other.fingerprint != a.fingerprint


def test_it_pickles_and_is_a_tokenizer(tokenizer):
  copy = pickle.loads(pickle.dumps(tokenizer))
  assert copy == tokenizer
  assert copy.encode(b'God').tolist() == tokenizer.encode(b'God').tolist()
  assert isinstance(tokenizer, Tokenizer)
