"""Scales of largest gradient: the article's table, and SciPy beside it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize
from scipy import special

from jaxformers.ops import GradientOptimal
from jaxformers.ops import cosine_optimal_scale
from jaxformers.ops import empirical_optimal_scale
from jaxformers.ops import gaussian_optimal_scale
from jaxformers.ops import softmax_jacobian_l1

LENGTHS = 64, 512, 2048, 8192, 20000
GAUSSIAN = 1.5494, 2.0084, 2.2787, 2.5274, 2.6782
COSINE = {
  32: (10.2495, 14.5343, 17.5426, 20.7250, 22.8841),
  64: (13.4244, 18.2092, 21.3117, 24.3952, 26.3849),
  128: (18.2536, 24.2136, 27.9105, 31.4585, 33.6838),
}


def test_half_the_jacobian_is_alpha_times_one_minus_the_squares():
  scores, alpha = jax.random.normal(jax.random.key(0), (7,)), 1.7
  softmax = lambda s: jax.nn.softmax(alpha * s)
  expected = jnp.abs(jax.jacobian(softmax)(scores)).sum() / 2
  found = softmax_jacobian_l1(softmax(scores), alpha)
  np.testing.assert_allclose(found, expected, atol=1e-6)
  half = softmax_jacobian_l1(jnp.array([0.5, 0.25, 0.125, 0.125]), 2.0)
  np.testing.assert_allclose(half, 2 * (1 - 11 / 32))


@pytest.mark.parametrize(
  ('n', 'expected'), list(zip(LENGTHS, GAUSSIAN, strict=True))
)
def test_gaussian_scales_are_those_of_the_table(n, expected):
  assert round(gaussian_optimal_scale(n), 4) == expected
  w = special.lambertw(n * math.sqrt(math.e) / 2).real
  assert gaussian_optimal_scale(n) == pytest.approx(
    math.sqrt(w - 0.5), rel=1e-14
  )


@pytest.mark.parametrize('n', [8, 64, 512, 20000])
def test_the_closed_form_is_the_maximum(n):
  objective = lambda a: -a * (1 - math.exp(a * a) / n)
  found = optimize.minimize_scalar(
    objective, bounds=(0, 4), method='bounded', options={'xatol': 1e-9}
  )
  # A maximum is flat, so a search by values sees half the digits.
  assert gaussian_optimal_scale(n) == pytest.approx(found.x, abs=1e-6)


def test_single_numbers_of_the_article():
  assert gaussian_optimal_scale(8) == pytest.approx(0.994241, abs=5e-7)
  assert gaussian_optimal_scale(512) == pytest.approx(2.008395, abs=5e-7)
  assert cosine_optimal_scale(512, 256) == pytest.approx(33.183, abs=5e-4)
  assert cosine_optimal_scale(512, 256) / 16 == pytest.approx(2.074, abs=5e-4)


def test_the_gaussian_scale_grows_like_the_root_of_the_logarithm():
  scales = [gaussian_optimal_scale(n) for n in range(2, 20000, 37)]
  assert (np.diff(scales) > 0).all()
  distance = lambda n: abs(
    gaussian_optimal_scale(n) - 0.84 * math.sqrt(math.log(n))
  )
  assert max(distance(n) for n in range(512, 20001, 16)) < 0.1
  assert round(distance(64), 2) == 0.16
  assert gaussian_optimal_scale(1 + 1e-12) < 1e-5


@pytest.mark.parametrize('d', COSINE)
def test_cosine_scales_are_those_of_the_table(d):
  found = [round(cosine_optimal_scale(n, d), 4) for n in LENGTHS]
  assert found == list(COSINE[d])


@pytest.mark.parametrize(('n', 'd'), [(64, 32), (20000, 128), (100, 3)])
def test_cosine_scales_are_those_of_bessel_functions(n, d):
  def log_mean(a):
    order = d / 2 - 1
    log_bessel = math.log(special.ive(order, a)) + a
    return special.gammaln(d / 2) + order * math.log(2 / a) + log_bessel

  def objective(a):
    exponent = log_mean(2 * a) - 2 * log_mean(a)
    return -a * (1 - math.exp(exponent) / n)

  found = optimize.minimize_scalar(
    objective, bounds=(1, 100), method='bounded', options={'xatol': 1e-9}
  )
  assert cosine_optimal_scale(n, d) == pytest.approx(found.x, rel=1e-6)


def test_three_dimensions_have_a_closed_form_far_out():
  # E[exp(a s)] = sinh(a) / a, so that the objective is a (1 - a / n) up to
  # exponentially small terms.
  assert cosine_optimal_scale(20000, 3) == pytest.approx(10000, rel=1e-9)


def test_cosines_in_128_dimensions_want_about_three_and_a_half_log_n():
  for n in (512, 1024, 4096, 20000):
    assert 3.40 < cosine_optimal_scale(n, 128) / math.log(n) < 3.89


def test_wide_cosines_approach_the_gaussian_scale():
  target = gaussian_optimal_scale(512)
  distance = [
    cosine_optimal_scale(512, d) / math.sqrt(d) - target
    for d in (64, 256, 1024, 4096)
  ]
  assert (np.diff(distance) < 0).all()
  assert 0 < distance[-1] < 0.01


def test_the_scale_divides_by_the_root_of_the_head_width():
  found = GradientOptimal(512).multiplier(None, 64)
  assert found == pytest.approx(2.008395 / 8, abs=1e-6)
  assert isinstance(found, float)


def test_the_gradient_at_two_and_a_half_is_more_than_twice_that_at_one():
  for n in (512, 4096):
    scores = jax.random.normal(jax.random.key(n), (200, n))
    mass = [
      softmax_jacobian_l1(jax.nn.softmax(a * scores), a).mean()
      for a in (1.0, 2.5)
    ]
    assert 2.1 < mass[1] / mass[0] < 2.5


@pytest.mark.parametrize(
  ('n', 'expected'), [(16, 2.5), (64, 3.0), (512, 3.5), (4096, 4.0)]
)
def test_the_geometric_mean_peaks_near_the_root_of_two_log_n(n, expected):
  scores = np.random.default_rng(n).normal(size=(600, n))
  found = empirical_optimal_scale(scores)
  assert found == pytest.approx(expected, abs=0.3)
  assert found == pytest.approx(math.sqrt(2 * math.log(n)), rel=0.1)


def test_the_mean_has_no_peak_at_the_closed_form():
  scores = jax.random.normal(jax.random.key(0), (2000, 512))
  found = [
    softmax_jacobian_l1(jax.nn.softmax(a * scores), a).mean()
    for a in (1.0, 2.5, 4.0, 6.0)
  ]
  np.testing.assert_allclose(found, [0.995, 2.24, 2.73, 2.90], atol=0.1)


def test_the_median_peaks_near_seven():
  scores = np.random.default_rng(0).normal(size=(2000, 512))
  assert 5.5 < empirical_optimal_scale(scores, 'median') < 8.5


def test_the_empirical_scale_undoes_scaling_and_skips_masked_keys():
  scores = np.random.default_rng(1).normal(size=(200, 32))
  plain = empirical_optimal_scale(scores)
  assert empirical_optimal_scale(scores * 10) == pytest.approx(
    plain / 10, rel=1e-5
  )
  padded = np.concatenate([scores, np.full((200, 8), 50.0)], axis=1)
  is_visible = np.arange(40) < 32
  found = empirical_optimal_scale(padded, is_visible=is_visible)
  assert found == pytest.approx(plain, rel=1e-5)


def test_two_scores_at_distance_one_have_the_hand_computed_optimum():
  # alpha (1 - sum p^2) = alpha / (2 cosh(alpha / 2)^2), largest where
  # alpha tanh(alpha / 2) = 1.
  for statistic in ('geomean', 'mean', 'median'):
    found = empirical_optimal_scale([[0.0, 1.0]], statistic)
    assert found * math.tanh(found / 2) == pytest.approx(1, abs=1e-5)


def test_what_has_no_optimum_is_refused():
  with pytest.raises(ValueError, match='more than 1 key, got n = 1'):
    gaussian_optimal_scale(1)
  with pytest.raises(ValueError, match='more than 1 key, got n = 1'):
    cosine_optimal_scale(1, 64)
  with pytest.raises(ValueError, match='more than 1 key, got n = 0'):
    GradientOptimal(0)
  with pytest.raises(ValueError, match='need a width d >= 2, got 1'):
    cosine_optimal_scale(64, 1)
  with pytest.raises(ValueError, match='no row has two visible keys'):
    empirical_optimal_scale([[1.0]])
  with pytest.raises(ValueError, match='tied largest scores'):
    empirical_optimal_scale([[1.0, 1.0, 0.0]])
  with pytest.raises(ValueError, match="unknown statistic 'mode'"):
    empirical_optimal_scale([[1.0, 0.0]], 'mode')
