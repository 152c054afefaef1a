import dataclasses
import math

import numpy as np
import pytest

from jaxformers.train.study import Judgement
from jaxformers.train.study import Results
from jaxformers.train.study import Study
from jaxformers.train.study import above
from jaxformers.train.study import below
from jaxformers.train.study import check_alike
from jaxformers.train.study import check_shapes
from jaxformers.train.study import check_study
from jaxformers.train.study import clean_measurement
from jaxformers.train.study import verdict_of

RESULTS = Results(
  seeds=(0, 1, 2),
  measurements={
    'plain': {'loss': [1.0, 2.0, 6.0], 'curve': [[1.0, 2.0]] * 3},
    'new': {'loss': [1.0, None, 3.0], 'curve': [[0.0, 4.0], [3.0, 4.0]] * 2},
  },
)


@dataclasses.dataclass(frozen=True)
class Asked(Study):
  claim = 'Something is so.'
  source = 'Somebody.'
  names: tuple[str, ...] = ('a', 'b')

  def variants(self):
    return self.names

  def measure(self, variant, seed, workspace):
    raise AssertionError

  def judge(self, results):
    raise AssertionError

  def draw(self, results, figure):
    raise AssertionError


class Silent(Asked):
  claim = ''


@pytest.mark.parametrize(
  ('relation', 'holds'),
  [('<', False), ('<=', True), ('>', False), ('>=', True)],
)
def test_equal_numbers_satisfy_only_the_weak_relations(relation, holds):
  assert Judgement('x', 1.5, relation, 1.5).holds is holds


def test_a_judgement_says_what_was_seen():
  assert below('loss', np.float32(0.25), 0.5).holds
  assert not above('loss', 0.25, 0.5).holds
  assert str(below('loss in nats', 0.25, 0.5)) == (
    'holds: loss in nats: 0.25 < 0.5'
  )
  assert str(above('gain', 0.25, 0.5)).startswith('does not hold: gain')


@pytest.mark.parametrize('seen', [None, math.nan, math.inf, -math.inf])
def test_what_has_no_number_never_holds(seen):
  for make in (above, below):
    assert make('x', seen, 0.0).holds is False
    assert make('x', seen, 0.0).seen is None


def test_a_criterion_without_a_bound_is_refused():
  with pytest.raises(ValueError, match='loss: the bound is nan'):
    below('loss', 1.0, math.nan)
  with pytest.raises(ValueError, match="or '>=', got '=='"):
    Judgement('loss', 1.0, '==', 1.0)


@pytest.mark.parametrize(
  ('seen', 'verdict'),
  [
    ([1, 1], 'reproduced'),
    ([1, 3], 'partly reproduced'),
    ([3, 3], 'not reproduced'),
  ],
)
def test_the_verdict_counts_what_holds(seen, verdict):
  assert verdict_of([below('x', x, 2.0) for x in seen]) == verdict


def test_means_and_spreads_are_over_seeds():
  assert RESULTS.variants == ('plain', 'new')
  assert RESULTS.names == ('loss', 'curve')
  assert RESULTS.mean('plain', 'loss') == 3.0
  # (4 + 1 + 9) / 2 = 7
  assert RESULTS.spread('plain', 'loss') == pytest.approx(math.sqrt(7))
  np.testing.assert_array_equal(RESULTS.mean('plain', 'curve'), [1.0, 2.0])
  np.testing.assert_array_equal(RESULTS.spread('plain', 'curve'), [0.0, 0.0])


def test_one_seed_has_no_spread():
  one = Results((7,), {'a': {'x': [2.5]}})
  assert (one.mean('a', 'x'), one.spread('a', 'x')) == (2.5, 0.0)


def test_what_has_no_number_makes_a_mean_nan():
  assert math.isnan(RESULTS.mean('new', 'loss'))
  np.testing.assert_array_equal(RESULTS.values('new', 'loss')[[0, 2]], [1, 3])


def test_an_unknown_measurement_names_the_nearest():
  with pytest.raises(KeyError, match="no variant 'plian'; did you mean 'plain"):
    RESULTS.values('plian', 'loss')
  with pytest.raises(
    KeyError, match="no measurement 'los'; did you mean 'loss"
  ):
    RESULTS.mean('plain', 'los')


def test_arrays_and_scalars_become_plain_numbers():
  measured = {
    'a': np.float32(0.5),
    'b': np.arange(2),
    'c': None,
    'd': [1, None],
  }
  clean = clean_measurement(measured)
  assert clean == {'a': 0.5, 'b': [0.0, 1.0], 'c': None, 'd': [1.0, None]}
  assert type(clean['a']) is float


@pytest.mark.parametrize(
  ('measured', 'message'),
  [
    ({'loss': math.nan}, 'loss is nan; return None'),
    ({'curve': [1.0, math.inf]}, r'curve\[1\] is inf; return None'),
    ({'loss': 'low'}, "loss is 'low'; expected a number"),
    ({'loss': np.ones((2, 2))}, 'expected a number, a list of numbers or None'),
    ({}, 'must return numbers by name'),
    (1.5, 'must return numbers by name, got 1.5'),
  ],
)
def test_what_is_no_measurement_is_refused(measured, message):
  with pytest.raises(ValueError, match=message):
    clean_measurement(measured)


def test_measurements_must_be_alike():
  check_alike({'a': 1.0, 'b': None}, {'b': [1.0], 'a': 2.0})
  with pytest.raises(ValueError, match="'b' is missing from some"):
    check_alike({'a': 1.0}, {'a': 1.0, 'b': 2.0})
  with pytest.raises(ValueError, match=r'a has shape \(2,\) with one seed and'):
    check_shapes({'a': [1.0, 2.0]}, {'a': [1.0]})


@pytest.mark.parametrize(
  ('study', 'message'),
  [
    (Asked(seeds=()), 'Asked has no seeds'),
    (Asked(seeds=(1, 1)), r'has seeds twice: \(1, 1\)'),
    (Asked(names=()), 'has no variants'),
    (Asked(names=('a', 'b', 'a')), 'has variants twice'),
    (Asked(names=('a', 2)), 'has a variant 2; use strings'),
    (Silent(), 'Silent needs a class attribute claim'),
  ],
)
def test_what_cannot_be_measured_is_refused(study, message):
  check_study(Asked())
  with pytest.raises(ValueError, match=message):
    check_study(study)
