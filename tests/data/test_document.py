import pytest

from jaxformers.data.document import Document
from jaxformers.data.document import hold_out_every
from jaxformers.data.document import hold_out_tail


def documents(*sizes):
  return [Document(str(i), b'x' * size) for i, size in enumerate(sizes)]


def names(docs):
  return [d.name for d in docs]


def test_every_third_document_is_held_out():
  corpus = hold_out_every('c', documents(1, 1, 1, 1, 1, 1, 1), 3)
  assert names(corpus.heldout) == ['2', '5']
  assert names(corpus.train) == ['0', '1', '3', '4', '6']


def test_too_few_documents_for_every_are_refused():
  with pytest.raises(ValueError, match='at least 20 documents, got 3'):
    hold_out_every('c', documents(1, 1, 1))


@pytest.mark.parametrize(
  ('sizes', 'fraction', 'heldout'),
  [
    ((10, 10, 10, 10), 0.05, ['3']),
    ((10, 10, 10, 10), 0.5, ['2', '3']),
    ((10, 10, 10, 10), 0.99, ['1', '2', '3']),
    ((90, 4, 3, 3), 0.05, ['2', '3']),
    ((1, 99), 0.05, ['1']),
  ],
)
def test_last_documents_of_about_the_fraction_are_held_out(
  sizes, fraction, heldout
):
  corpus = hold_out_tail('c', documents(*sizes), fraction)
  assert names(corpus.heldout) == heldout
  assert len(corpus.train) + len(corpus.heldout) == len(sizes)


@pytest.mark.parametrize(
  ('text', 'fraction', 'head'),
  [
    (b'aa\nbb\ncc\ndd\n', 0.25, b'aa\nbb\ncc\n'),
    (b'aa\nbb\ncc\ndd\n', 0.3, b'aa\nbb\ncc\n'),
    (b'aa\nbb\ncc\ndd\n', 0.01, b'aa\nbb\ncc\n'),
    (b'aa\nbbbbbbbbb', 0.25, b'aa\nbbbbbb'),
    (b'aaaaaaaaa\nbb', 0.5, b'aaaaaa'),
    (b'aaaaaa\nbbb', 0.5, b'aaaaaa\n'),
    (b'abcdefghij', 0.2, b'abcdefgh'),
    (b'ab', 0.01, b'a'),
    ('天地玄黄'.encode(), 0.4, '天地'.encode()),
  ],
)
def test_a_single_document_is_cut_at_a_line_or_character(text, fraction, head):
  corpus = hold_out_tail('c', [Document('d', text)], fraction)
  assert corpus.train[0].text == head
  assert corpus.train[0].text + corpus.heldout[0].text == text


def test_one_byte_cannot_be_split():
  with pytest.raises(ValueError, match='d has 1 byte.*at least 2'):
    hold_out_tail('c', [Document('d', b'x')], 0.5)
