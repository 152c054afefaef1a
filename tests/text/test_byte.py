import numpy as np
import pytest

from jaxformers.text import ByteTokenizer
from jaxformers.text import Tokenizer
from jaxformers.text import token_dtype


def test_every_byte_is_its_own_token():
  text = bytes(range(256))
  ids_L = ByteTokenizer().encode(text)
  assert ids_L.dtype == np.uint8
  np.testing.assert_array_equal(ids_L, np.arange(256))
  assert ByteTokenizer().decode(ids_L) == text


def test_invalid_utf8_survives_a_round_trip():
  text = b'caf\xe9 \xff\xfe\x00'
  assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


def test_decode_takes_lists_and_nothing():
  assert ByteTokenizer().decode([72, 105]) == b'Hi'
  assert ByteTokenizer().decode([]) == b''


@pytest.mark.parametrize('ids', [[256], [-1]])
def test_decode_refuses_what_is_no_byte(ids):
  with pytest.raises(ValueError, match=r'lie in \[0, 256\).*another tokenizer'):
    ByteTokenizer().decode(ids)


def test_encoded_text_can_be_written_to():
  ids_L = ByteTokenizer().encode(b'abc')
  ids_L[0] = 0
  assert ids_L.tolist() == [0, 98, 99]


def test_byte_tokenizer_is_a_tokenizer():
  assert isinstance(ByteTokenizer(), Tokenizer)
  assert ByteTokenizer() == ByteTokenizer()


@pytest.mark.parametrize(
  ('vocab_size', 'dtype'),
  [
    (1, np.uint8),
    (256, np.uint8),
    (257, np.uint16),
    (65536, np.uint16),
    (65537, np.uint32),
  ],
)
def test_dtype_is_the_smallest_that_holds_the_vocabulary(vocab_size, dtype):
  assert token_dtype(vocab_size) == dtype


def test_empty_vocabulary_is_refused():
  with pytest.raises(ValueError, match='between 1 and 2\\*\\*32, got 0'):
    token_dtype(0)
