"""Against a naive implementation with dictionaries, on small alphabets."""

import collections
import math

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxformers.data import ByteNgrams
from jaxformers.data import ngram_bits_per_byte
from jaxformers.data.kjv import load_kjv
from jaxformers.data.ngram import discounts_of


def as_bytes(text):
  return np.frombuffer(text, np.uint8)


def naive_discounts(counts):
  n = collections.Counter(counts.values())
  if not all(n[i] for i in (1, 2, 3, 4)):
    return [0, 0.5, 1, 1.5]
  y = n[1] / (n[1] + 2 * n[2])
  d = [i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3)]
  return [0, *d] if min(d) > 0 else [0, 0.5, 1, 1.5]


class Naive:
  """Kneser-Ney as in the paper, one dictionary per order."""

  def __init__(self, text, context):
    counts = collections.Counter(
      text[i : i + context + 1] for i in range(len(text) - context)
    )
    self.orders = []
    for _ in range(context + 1):
      self.orders.insert(0, (counts, naive_discounts(counts)))
      counts = collections.Counter(gram[1:] for gram in counts)

  def probability(self, context, byte):
    if not context:
      lower = 1 / 256
    else:
      lower = self.probability(context[1:], byte)
    counts, discounts = self.orders[len(context)]
    after = {g: c for g, c in counts.items() if g[:-1] == context}
    if not after:
      return lower
    total = sum(after.values())
    count = after.get(context + byte, 0)
    left = sum(discounts[min(c, 3)] for c in after.values())
    return (count - discounts[min(count, 3)] + left * lower) / total


SMALL_TEXT = st.text('abc', min_size=12, max_size=80).map(str.encode)


@settings(deadline=None, max_examples=30)
@given(
  text=SMALL_TEXT,
  document=st.text('abcd', min_size=1, max_size=9),
  context=st.integers(0, 4),
)
def test_probabilities_equal_the_naive_ones(text, document, context):
  document = document.encode()
  model = ByteNgrams(as_bytes(text), context=context)
  naive = Naive(text, context)
  expected = [
    naive.probability(document[max(i - context, 0) : i], document[i : i + 1])
    for i in range(len(document))
  ]
  np.testing.assert_allclose(
    model.probabilities(as_bytes(document)), expected, rtol=1e-12
  )


def test_naive_discounts_are_reached_by_a_long_text():
  rng = np.random.default_rng(0)
  text = rng.choice(list(b'abcdefgh'), 3000, p=np.arange(8, 0, -1) / 36)
  text = bytes(text.astype(np.uint8))
  naive = Naive(text, 3)
  assert naive.orders[3][1] != [0, 0.5, 1, 1.5]
  document = text[:40] + b'xyz' + text[100:120]
  model = ByteNgrams(as_bytes(text), context=3)
  expected = [
    naive.probability(document[max(i - 3, 0) : i], document[i : i + 1])
    for i in range(len(document))
  ]
  np.testing.assert_allclose(
    model.probabilities(as_bytes(document)), expected, rtol=1e-12
  )


@settings(deadline=None, max_examples=20)
@given(
  text=SMALL_TEXT, prefix=st.text('abcd', max_size=6), context=st.integers(0, 7)
)
def test_probabilities_of_256_bytes_sum_to_one(text, prefix, context):
  model = ByteNgrams(as_bytes(text), context=context)
  p = [
    model.probabilities(as_bytes(prefix.encode() + bytes([b])))[-1]
    for b in range(256)
  ]
  assert min(p) > 0
  assert math.isclose(math.fsum(p), 1, rel_tol=1e-12)


def test_discounts_follow_the_formula():
  # n1..n4 = 8, 4, 2, 1: Y = 1/2; D = 1 - 2/4, 2 - 3/4, 3 - 4/4.
  counts = np.repeat([1, 2, 3, 4], [8, 4, 2, 1])
  np.testing.assert_allclose(discounts_of(counts), [0, 0.5, 1.25, 2])


@pytest.mark.parametrize(
  'counts', [[1, 1, 2], [7], [1] * 10 + [2] + [3] * 5 + [4]]
)
def test_small_samples_have_fixed_discounts(counts):
  assert discounts_of(np.array(counts)).tolist() == [0, 0.5, 1, 1.5]


def test_bits_are_a_mean_over_all_bytes():
  train = as_bytes(b'abracadabra' * 20)
  documents = [as_bytes(b'abra'), as_bytes(b'cad'), as_bytes(b'')]
  model = ByteNgrams(train, context=2)
  bits = sum(-np.log2(model.probabilities(d)).sum() for d in documents)
  result = ngram_bits_per_byte(train, documents, context=2)
  assert math.isclose(result, bits / 7)


def test_text_of_chance_costs_its_entropy():
  rng = np.random.default_rng(0)
  text = rng.integers(0, 16, 200_000).astype(np.uint8)
  bits = ngram_bits_per_byte(text[:190_000], [text[190_000:]], context=2)
  assert 4 < bits < 4.1


def test_more_context_helps_where_there_is_some():
  train, heldout = (
    as_bytes(b'the cat sat on the mat. ' * 50),
    as_bytes(b'the mat'),
  )
  bits = [ngram_bits_per_byte(train, [heldout], context=c) for c in (0, 1, 2)]
  assert bits[0] > bits[1] > bits[2]


def test_a_text_shorter_than_the_context_is_enough():
  bits = ngram_bits_per_byte(as_bytes(b'a'), [as_bytes(b'aa')], context=5)
  # One byte seen once: discount 1/2, so p(a) = 1/2 + 1/2 / 256.
  assert math.isclose(bits, -math.log2(0.5 + 0.5 / 256))


@pytest.mark.parametrize('context', [-1, 8])
def test_contexts_that_do_not_fit_are_refused(context):
  with pytest.raises(ValueError, match=rf'\[0, 7\] bytes, got {context}'):
    ngram_bits_per_byte(as_bytes(b'abc'), [as_bytes(b'a')], context=context)


def test_nothing_to_count_is_refused():
  with pytest.raises(ValueError, match='at least one byte to count'):
    ngram_bits_per_byte(as_bytes(b''), [as_bytes(b'a')])


def test_nothing_to_measure_is_refused():
  with pytest.raises(ValueError, match='at least one held-out byte'):
    ngram_bits_per_byte(as_bytes(b'abc'), [])


def test_the_bible_costs_what_the_docstring_says():
  corpus = load_kjv()
  train = as_bytes(b''.join(d.text for d in corpus.train))
  bits = ngram_bits_per_byte(train, [as_bytes(d.text) for d in corpus.heldout])
  assert f'{bits:.3f}' == '1.660'
  assert '1.660 bits' in ngram_bits_per_byte.__doc__
