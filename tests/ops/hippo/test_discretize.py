"""Systems in discrete time, against SciPy and numbers of the sources."""

import numpy as np
import pytest
from scipy.linalg import expm
from scipy.signal import cont2discrete

from jaxformers.ops import FouT
from jaxformers.ops import LegS
from jaxformers.ops import LegT
from jaxformers.ops import LinearSystem
from jaxformers.ops import discretize_system
from jaxformers.ops import matrix_exponential


def near(actual, expected, tolerance=1e-12):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
  'a',
  [
    LegS().system(64).a_ST / 10,
    LegT(0.01).system(16).a_ST,
    FouT(form='complex').system(9).a_ST,
    np.triu(np.ones((4, 4)), 1),
    np.zeros((2, 2)),
  ],
)
def test_the_exponential_is_that_of_scipy(a):
  near(matrix_exponential(a), expm(a), 1e-11)


@pytest.mark.parametrize(
  ('method', 'theirs', 'alpha'),
  [
    ('zoh', 'zoh', None),
    ('bilinear', 'bilinear', None),
    ('forward_euler', 'euler', None),
    ('backward_euler', 'backward_diff', None),
    (0.3, 'gbt', 0.3),
  ],
)
def test_methods_are_those_of_scipy(method, theirs, alpha):
  system, step = LegT().system(8), 1 / 64
  ours = discretize_system(system, step, method)
  matrices = system.a_ST, system.b_S[:, None], np.eye(8), np.zeros((8, 1))
  a, b, *_ = cont2discrete(matrices, step, theirs, alpha)
  near(ours.a_ST, a)
  near(ours.b_S, b[:, 0])


def test_two_states_of_legs_by_hand():
  bilinear = discretize_system(LegS().system(2), 0.1, 'bilinear')
  near(bilinear.a_ST, [[0.904762, 0], [-0.149961, 0.818182]], 1e-5)
  near(bilinear.b_S, [0.095238, 0.149961], 1e-5)
  exact = discretize_system(LegS().system(2), 0.1)
  near(exact.a_ST, [[0.904837, 0], [-0.149141, 0.818731]], 1e-5)
  near(exact.b_S, [0.095163, 0.149141], 1e-5)


def test_a_singular_system_is_integrated_exactly():
  integrators = LinearSystem(np.array([[0.0, 1], [0, 0]]), np.array([0.0, 1]))
  step = discretize_system(integrators, 0.5)
  near(step.a_ST, [[1, 0.5], [0, 1]])
  near(step.b_S, [0.125, 0.5])


@pytest.mark.parametrize(
  ('step', 'method', 'message'),
  [
    (0.0, 'zoh', 'longer than 0, got 0.0'),
    (1.0, 'tustin', "from 0 to 1, got 'tustin'"),
    (1.0, 1.5, 'from 0 to 1, got 1.5'),
  ],
)
def test_what_cannot_be_is_refused(step, method, message):
  with pytest.raises(ValueError, match=message):
    discretize_system(LegS().system(2), step, method)
