"""Concentration of weights: hand numbers, quadrature, samples."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate
from scipy import stats

from jaxformers.ops import attention_entropy
from jaxformers.ops import concentration
from jaxformers.ops import decay_concentration
from jaxformers.ops import effective_support
from jaxformers.ops import fit_beta_gamma
from jaxformers.ops import identity_concentration
from jaxformers.ops import linear_concentration
from jaxformers.ops import max_weight
from jaxformers.ops import mean_per_head
from jaxformers.ops import relu_concentration
from jaxformers.ops import relu_squared_concentration
from jaxformers.ops import softmax_concentration
from jaxformers.ops import top_k_mass

DIAGNOSTICS = {
  'concentration': concentration,
  'effective_support': effective_support,
  'top_k_mass': lambda weights, mask=None: top_k_mass(weights, 2, mask),
  'max_weight': max_weight,
  'attention_entropy': attention_entropy,
  'normalized': lambda weights, mask=None: attention_entropy(
    weights, mask, normalized=True
  ),
}


def all_diagnostics(weights, mask=None):
  return [float(f(jnp.array(weights), mask)) for f in DIAGNOSTICS.values()]


@pytest.mark.parametrize(
  ('weights', 'expected'),
  [
    (
      [0.5, 0.25, 0.125, 0.125],
      [0.8528028654, 2.9090909091, 0.75, 0.5, 1.2130075660, 0.875],
    ),
    ([0.0, 0, 1, 0], [0.5, 1, 1, 1, 0, 0]),
    ([0.25] * 4, [1, 4, 0.5, 0.25, math.log(4), 1]),
    ([0.0] * 4, [1, 4, 0.5, 0.25, math.log(4), 1]),
    ([-3.0, 3, 0, 0], [math.sqrt(0.5), 2, 1, 0.5, math.log(2), 0.5]),
    ([7.0], [1, 1, 1, 1, 0, 0]),
  ],
)
def test_small_rows_have_hand_computed_diagnostics(weights, expected):
  np.testing.assert_allclose(
    all_diagnostics(weights), expected, rtol=1e-6, atol=1e-7
  )


def test_without_visible_keys_nothing_carries_weight():
  found = all_diagnostics([1.0, 2.0], jnp.zeros(2, bool))
  assert found == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize('name', DIAGNOSTICS)
def test_padding_and_scaling_change_no_diagnostic(name):
  diagnostic = DIAGNOSTICS[name]
  weights = jax.random.normal(jax.random.key(0), (2, 3, 5, 7))
  plain = diagnostic(weights)
  assert plain.shape == (2, 3, 5)
  padding = jnp.full((2, 3, 5, 4), jnp.nan)
  padded = jnp.concatenate([weights, padding], axis=-1)
  found = diagnostic(padded, jnp.arange(11) < 7)
  np.testing.assert_allclose(found, plain, rtol=1e-6)
  for factor in (-2.0, 1e-30, 1e30):
    np.testing.assert_allclose(diagnostic(factor * weights), plain, rtol=1e-5)


@pytest.mark.parametrize('name', DIAGNOSTICS)
def test_diagnostics_are_float32_and_pass_no_gradient(name):
  diagnostic = DIAGNOSTICS[name]
  weights = jnp.full((1, 512), 1 / 512, jnp.bfloat16)
  assert diagnostic(weights).dtype == jnp.float32
  gradient = jax.grad(lambda w: diagnostic(w).sum())(weights)
  np.testing.assert_array_equal(gradient, 0)


def test_top_k_takes_what_there_is_and_refuses_none():
  assert top_k_mass(jnp.array([3.0, 1.0]), 5) == 1
  with pytest.raises(ValueError, match='needs k >= 1, got 0'):
    top_k_mass(jnp.ones(3), 0)


def test_heads_are_averaged_over_rows_that_have_a_choice():
  values = jnp.arange(12.0).reshape(1, 2, 6).at[0, :, 0].set(jnp.nan)
  found = mean_per_head(values, jnp.arange(1, 7)[None, None])
  np.testing.assert_allclose(found, [3, 9])
  np.testing.assert_array_equal(
    mean_per_head(values, jnp.ones((1, 1, 6), int)), 0
  )


def test_beta_and_gamma_are_mean_and_deviation_of_visible_scores():
  scores = jnp.array([[1.0, 3.0, jnp.nan], [5.0, 5.0, 8.0]])
  mask = jnp.array([[True, True, False], [True, True, True]])
  fit = fit_beta_gamma(scores, mask)
  np.testing.assert_allclose(fit.beta, [2, 6], rtol=1e-6)
  np.testing.assert_allclose(fit.gamma, [1, math.sqrt(2)], rtol=1e-6)
  gradient = jax.grad(lambda s: fit_beta_gamma(s).gamma.sum())(jnp.ones((1, 4)))
  np.testing.assert_array_equal(gradient, 0)


FAMILIES = {
  'exp': (softmax_concentration, np.exp),
  'relu': (relu_concentration, lambda s: np.maximum(s, 0)),
  'relu2': (relu_squared_concentration, lambda s: np.maximum(s, 0) ** 2),
  'identity': (identity_concentration, lambda s: s),
}


@pytest.mark.parametrize(
  ('family', 'beta', 'gamma', 'expected'),
  [
    ('exp', 0, 1, 0.6065306597),
    ('relu', 0, 1, 0.5641895835),
    ('relu2', 0, 1, 0.4082482905),
    ('identity', 0, 1, 0.7978845608),
    ('relu2', 1, 1, 0.6127728879),
    ('identity', 1, 1, 0.8249326496),
    ('relu', 1, 1, 0.7808685120),
    ('relu2', -2, 1, 0.0720063427),
    ('relu', -2, 1, 0.1117901780),
    ('identity', -2, 1, 0.9020215063),
    ('relu2', -3, 2, 0.1276659719),
    ('exp', 0.5, 3, 0.0111089965),
    ('relu2', 0.5, 3, 0.4443756231),
  ],
)
def test_families_have_the_computed_concentration(
  family, beta, gamma, expected
):
  theory, _ = FAMILIES[family]
  np.testing.assert_allclose(theory(beta, gamma), expected, rtol=2e-6)
  with jax.enable_x64(True):
    np.testing.assert_allclose(theory(beta, gamma), expected, atol=6e-11)


@pytest.mark.parametrize('family', FAMILIES)
def test_families_agree_with_quadrature(family):
  theory, function = FAMILIES[family]

  def moment(power, beta, gamma):
    value = lambda t: abs(function(beta + gamma * t)) ** power
    # The kink of relu and of the magnitude is an end of an interval.
    kink = np.clip(-beta / gamma, -12, 30)
    pieces = (
      integrate.quad(lambda t: value(t) * stats.norm.pdf(t), *ends, limit=200)
      for ends in ((-12, kink), (kink, max(kink, 0) + 12))
    )
    return sum(piece[0] for piece in pieces)

  for beta, gamma in ((0.3, 0.7), (-1.0, 1.0), (-1.01, 1), (-3, 1), (2, 0.9)):
    expected = moment(1, beta, gamma) / math.sqrt(moment(2, beta, gamma))
    with jax.enable_x64(True):
      np.testing.assert_allclose(theory(beta, gamma), expected, rtol=1e-8)
    np.testing.assert_allclose(theory(beta, gamma), expected, rtol=5e-6)


def test_relus_concentrate_without_bound_and_stay_finite():
  x = jnp.array([-0.5, -1.0, -2.0, -5.0, -10.0, -100.0])
  for theory in (relu_concentration, relu_squared_concentration):
    found = theory(x, 1.0)
    assert (jnp.diff(found) <= 0).all()
    assert jnp.isfinite(found).all()
    assert found[-2] < 1e-10
    np.testing.assert_allclose(theory(x, 2.0), theory(x / 2, 1.0), rtol=1e-6)


def test_the_identity_never_concentrates():
  beta = jnp.linspace(-5, 5, 101)
  found = identity_concentration(beta, 1.0)
  np.testing.assert_allclose(found, found[::-1], rtol=1e-6)
  assert jnp.argmin(found) == 50
  np.testing.assert_allclose(found[50], math.sqrt(2 / math.pi), rtol=1e-6)


@pytest.mark.parametrize(
  ('decay', 'length', 'expected'),
  [
    (0.9, 64, 0.544220343410),
    (0.99, 64, 0.983310460166),
    (0.5, 8, 0.609985009703),
    (0.99, 1000, 0.446074902438),
    (1.0, 5, 1.0),
    (0.0, 4, 0.5),
  ],
)
def test_decays_have_the_computed_concentration(decay, length, expected):
  with jax.enable_x64(True):
    found = decay_concentration(decay, length)
    np.testing.assert_allclose(found, expected, atol=6e-13)
    weights = jnp.asarray(decay) ** jnp.arange(length)
    np.testing.assert_allclose(concentration(weights), found, rtol=1e-12)
  found = decay_concentration(decay, length)
  np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_a_decay_next_to_one_keeps_its_digits_and_its_gradient():
  found = decay_concentration(jnp.array([1 - 2**-20, 1.0]), 64)
  np.testing.assert_allclose(found, 1, atol=1e-6)
  gradient = jax.grad(lambda d: decay_concentration(d, 64))(1.0)
  assert jnp.isfinite(gradient)


def test_linear_attention_is_known_from_mean_and_covariance_of_keys():
  query = jax.random.uniform(jax.random.key(0), (2, 5, 6))
  key = jax.random.exponential(jax.random.key(1), (2, 30, 6))
  weights = jnp.einsum('BLK,BMK->BLM', query, key)
  np.testing.assert_allclose(
    linear_concentration(query, key), concentration(weights), rtol=1e-6
  )
  visible = jnp.arange(30)[None] < jnp.array([[12], [30]])
  np.testing.assert_allclose(
    linear_concentration(query, key, visible),
    concentration(weights, visible[:, None]),
    rtol=1e-6,
  )
  np.testing.assert_array_equal(linear_concentration(0 * query, key), 1)


def test_independent_features_concentrate_by_noise_and_peaked_queries():
  rng = np.random.default_rng(0)
  key = rng.exponential(size=(200000, 4))  # deviation over mean is 1
  queries = np.array([[1.0, 0, 0, 0], [1, 1, 1, 1], [3, 1, 0, 0]])
  ratio = np.linalg.norm(queries, axis=1) / queries.sum(axis=1)
  np.testing.assert_allclose(
    linear_concentration(queries, key), 1 / np.sqrt(1 + ratio**2), rtol=5e-3
  )


def test_softmax_concentrates_with_longer_vectors_and_linear_does_not():
  n, d = 512, 64
  query, key = jax.random.normal(jax.random.key(0), (2, n, d))
  elu = lambda x: jax.nn.elu(x) + 1
  means = {'softmax': [], 'elu': [], 'identity': [], 'relu2': []}
  for c in (0.5, 1, 2, 4, 8):
    logits = c * c * query @ key.T / math.sqrt(d)
    rows = {
      'softmax': jax.nn.softmax(logits),
      'elu': elu(c * query) @ elu(c * key).T,
      'identity': logits,
      'relu2': jnp.maximum(logits, 0) ** 2,
    }
    for name, weights in rows.items():
      means[name].append(float(concentration(weights).mean()))
  expected = [0.969, 0.613, 0.093, 0.051, 0.046]
  np.testing.assert_allclose(means['softmax'], expected, atol=0.012)
  np.testing.assert_allclose(
    means['elu'], [0.998, 0.995, 0.986, 0.973, 0.963], atol=0.003
  )
  np.testing.assert_allclose(means['identity'], 0.798, atol=0.003)
  np.testing.assert_allclose(means['relu2'], 0.409, atol=0.008)
  # Nothing among 512 keys is below the first number.
  assert 1 / math.sqrt(n) < means['softmax'][-1] < 0.06
  assert means['elu'][-1] > 0.9
  support = effective_support(jax.nn.softmax(64 * query @ key.T / 8)).mean()
  np.testing.assert_allclose(support, 1.07, atol=0.04)
