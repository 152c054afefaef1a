"""Frequencies of longer texts against published and hand-computed numbers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.ops import DynamicNTK
from jaxformers.ops import Interpolation
from jaxformers.ops import InverseSqrt
from jaxformers.ops import Llama3
from jaxformers.ops import MixedBase
from jaxformers.ops import NTKAware
from jaxformers.ops import NTKFixed
from jaxformers.ops import NTKMixed
from jaxformers.ops import NTKOld
from jaxformers.ops import Plain
from jaxformers.ops import Rotary
from jaxformers.ops import Spectrum
from jaxformers.ops import YaRN
from jaxformers.ops import YaRNScale
from jaxformers.ops import rope_frequencies

BASE = 10000.0
PLAIN = rope_frequencies(64, BASE)
LAST = 1.666902e-5


@pytest.mark.parametrize(
  ('spectrum', 'expected'),
  [
    (Plain(), [1, 0.7498942, 1.333521e-2, 1.333521e-4]),
    (NTKOld(8), [1, 0.7027137, 5.031258e-3, 1.778818e-5]),
    (NTKAware(8), [1, 0.7012422, 4.875520e-3, LAST]),
    (NTKFixed(8), [0.9370838, 0.6585017, 4.714710e-3, LAST]),
    (NTKMixed(8), [0.7879213, 0.5192240, 3.462730e-3, LAST]),
    (Interpolation(8), [0.125, 0.7498942 / 8, 1.333521e-2 / 8, LAST]),
  ],
)
def test_eight_times_longer_with_64_coordinates(spectrum, expected):
  frequencies_P = spectrum.frequencies(64, BASE)
  assert frequencies_P.dtype == np.float64
  assert frequencies_P.shape == (32,)
  np.testing.assert_allclose(frequencies_P[[0, 1, 15, 31]], expected, rtol=4e-7)


UNCHANGED = (
  Plain(),
  Interpolation(1),
  NTKOld(1),
  NTKAware(1),
  NTKFixed(1),
  NTKMixed(1),
  MixedBase((1.0,) * 32),
  DynamicNTK(2, max_length=2048, length=2048),
  DynamicNTK(1, max_length=2048, length=2048),
  YaRN(1, original_length=2048),
  Llama3(1),
)


@pytest.mark.parametrize('spectrum', UNCHANGED, ids=lambda s: type(s).__name__)
def test_factor_one_is_plain_rope(spectrum):
  assert isinstance(spectrum, Spectrum)
  np.testing.assert_allclose(
    spectrum.frequencies(64, BASE), PLAIN, rtol=1e-15, atol=0
  )


@pytest.mark.parametrize(
  ('spectrum', 'slowed'),
  [
    (Interpolation(8), 8),
    (NTKAware(8), 8),
    (NTKFixed(8), 8),
    (NTKMixed(8), 8),
    (NTKOld(8), 8 ** (1 - 2 / 64)),
    (MixedBase((4.0, 2.0) + (1.0,) * 30), 8),
    (YaRN(8, original_length=2048), 8),
    (Llama3(8, original_length=2048), 8),
  ],
)
def test_the_slowest_pair_is_slowed_by_the_factor(spectrum, slowed):
  ratio = PLAIN[-1] / spectrum.frequencies(64, BASE)[-1]
  np.testing.assert_allclose(ratio, slowed, rtol=1e-13)


def test_ntk_bases():
  def base(spectrum):
    return spectrum.frequencies(64, BASE)[1] ** -32

  np.testing.assert_allclose(base(NTKAware(8)), 85550.37588568537, rtol=1e-12)
  dynamic = DynamicNTK(2, max_length=2048, length=4096)
  np.testing.assert_allclose(base(dynamic), 31082.236667, rtol=1e-10)
  np.testing.assert_allclose(base(NTKOld(8)), 80000, rtol=1e-12)


def test_dynamic_ntk_is_plain_up_to_the_trained_length():
  for length in (1, 100, 2048):
    dynamic = DynamicNTK(4, max_length=2048, length=length)
    np.testing.assert_array_equal(dynamic.frequencies(64, BASE), PLAIN)
  longer = DynamicNTK(1, max_length=2048, length=6144)
  np.testing.assert_array_equal(
    longer.frequencies(64, BASE), NTKAware(3).frequencies(64, BASE)
  )


def test_ntk_mixed_has_its_neighbours_as_limits():
  a = 0.23835703766602054  # log(8) / 32^0.625
  m = np.arange(1, 33)
  np.testing.assert_allclose(
    NTKMixed(8).frequencies(64, BASE), PLAIN / np.exp(a * m**0.625), rtol=1e-13
  )
  for exponent, limit in ((0, Interpolation(8)), (1, NTKFixed(8))):
    np.testing.assert_allclose(
      NTKMixed(8, exponent).frequencies(64, BASE),
      limit.frequencies(64, BASE),
      rtol=1e-13,
    )


def test_mixed_base_contains_the_other_rules():
  divisors = PLAIN / NTKMixed(8).frequencies(64, BASE)
  falling = np.exp(np.diff(np.log(divisors), prepend=0))
  for ratios, rule in (
    ((8.0,) + (1.0,) * 31, Interpolation(8)),
    ((8 ** (1 / 32),) * 32, NTKFixed(8)),
    (tuple(map(float, falling)), NTKMixed(8)),
  ):
    mixed = MixedBase(ratios)
    np.testing.assert_allclose(mixed.factor, 8, rtol=1e-12)
    np.testing.assert_allclose(
      mixed.frequencies(64, BASE), rule.frequencies(64, BASE), rtol=1e-12
    )


@pytest.mark.parametrize(
  ('dim', 'length', 'bounds'),
  [
    (128, 4096, (20, 46)),
    (128, 2048, (16, 41)),
    (64, 2048, (8, 21)),
    (64, 512, (3, 16)),
    (16, 64, (0, 3)),
  ],
)
def test_yarn_ramps_between_published_pairs(dim, length, bounds):
  yarn = YaRN(4, original_length=length)
  low, high = yarn.bounds(dim, BASE)
  assert (low, high) == bounds
  plain, actual = rope_frequencies(dim, BASE), yarn.frequencies(dim, BASE)
  np.testing.assert_array_equal(actual[: low + 1], plain[: low + 1])
  np.testing.assert_array_equal(actual[high:], plain[high:] / 4)
  middle = (low + high) // 2
  ramp = (middle - low) / (high - low)
  np.testing.assert_allclose(
    actual[middle], plain[middle] * (ramp / 4 + 1 - ramp), rtol=1e-14
  )


def test_yarn_untruncated_begins_where_a_pair_turns_32_times():
  low, high = YaRN(4, 2048, truncate=False).bounds(64, BASE)
  for pair, turns in ((low, 32), (high, 1)):
    wavelength = 2 * math.pi * BASE ** (2 * pair / 64)
    np.testing.assert_allclose(2048 / wavelength, turns, rtol=1e-12)


def test_yarn_with_a_ramp_of_no_length_is_a_step():
  yarn = YaRN(4, original_length=5)
  assert yarn.bounds(4, BASE) == (0, 0)
  np.testing.assert_allclose(yarn.frequencies(4, BASE), [1, 0.01 / 4])


def test_llama3_divides_by_wavelength():
  rope = rope_frequencies(128, 500000.0)
  actual = Llama3().frequencies(128, 500000.0)
  for plain, frequency in zip(rope, actual, strict=True):
    wavelength = 2 * math.pi / plain
    if wavelength < 8192 / 4:
      expected = plain
    elif wavelength > 8192:
      expected = plain / 8
    else:
      share = (8192 / wavelength - 1) / 3
      expected = (1 - share) * plain / 8 + share * plain
    np.testing.assert_allclose(frequency, expected, rtol=1e-14)
  ratios = rope / actual
  assert (ratios == 1).any()
  assert ((ratios > 1.01) & (ratios < 7.99)).any()
  assert ratios[-1] == 8


def test_interpolated_frequencies_are_fractional_positions():
  with jax.enable_x64(True):
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 8), jnp.float64)
    position = jnp.arange(5.0, dtype=jnp.float64)[None]
    np.testing.assert_allclose(
      Rotary(spectrum=Interpolation(3)).store(x, position),
      Rotary().store(x, position / 3),
      rtol=1e-12,
      atol=1e-12,
    )


def test_a_spectrum_acts_on_the_rotated_part_alone():
  x = jnp.ones((1, 1, 1, 6))
  rotary = Rotary(rotary_dim=4, spectrum=NTKAware(2), base=100.0)
  y = rotary.store(x, jnp.array([[1]]))[0, 0, 0]
  slow = 0.1 / 2
  expected = [
    math.cos(1) - math.sin(1),
    math.cos(slow) - math.sin(slow),
    math.cos(1) + math.sin(1),
    math.cos(slow) + math.sin(slow),
    1,
    1,
  ]
  np.testing.assert_allclose(y, expected, rtol=1e-6)


def none_visible():
  raise AssertionError('the scale of YaRN counts no keys')


@pytest.mark.parametrize(
  ('factor', 'amplitude'),
  [
    (1, 1.0),
    (2, 1.0693147),
    (4, 1.1386294),
    (8, 1.2079442),
    (16, 1.2772589),
    (32, 1.3465736),
  ],
)
def test_yarn_multiplies_scores_by_a_squared_amplitude(factor, amplitude):
  actual = YaRNScale(factor).multiplier(none_visible, 64)
  np.testing.assert_allclose(actual, amplitude**2, rtol=1e-7)


def test_yarn_scale_from_two_mscales_or_an_explicit_amplitude():
  def mu_squared(**options):
    return YaRNScale(40, **options).multiplier(none_visible, 64)

  assert mu_squared(mscale=1.0, mscale_all_dim=1.0) == 1
  np.testing.assert_allclose(
    mu_squared(mscale=0.707, mscale_all_dim=1.0),
    (1.2608037774 / 1.3688879454) ** 2,  # log(40) = 3.68887945411
    rtol=1e-9,
  )
  assert mu_squared(attention_factor=1.5) == 2.25
  explicit = mu_squared(mscale=1.0, mscale_all_dim=1.0, attention_factor=1.5)
  assert explicit == 2.25


def test_the_amplitude_of_yarn_multiplies_what_is_rotated_alone():
  yarn = YaRN(4, original_length=5)  # frequencies 1 and 0.01 / 4, see above
  rotary = Rotary(rotary_dim=4, spectrum=yarn, amplitude=YaRNScale(4).amplitude)
  y = rotary.store(jnp.ones((1, 1, 1, 6)), jnp.array([[2]]))[0, 0, 0]
  mu = 1.138629436111989
  expected = [
    mu * (math.cos(2) - math.sin(2)),
    mu * (math.cos(0.005) - math.sin(0.005)),
    mu * (math.cos(2) + math.sin(2)),
    mu * (math.cos(0.005) + math.sin(0.005)),
    1,
    1,
  ]
  np.testing.assert_allclose(y, expected, rtol=1e-6)


def rotate_half(x):
  return np.concatenate(
    [-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1
  )


@pytest.mark.parametrize('rotary_dim', [4, 8])
def test_scores_with_an_amplitude_are_those_of_hugging_face(rotary_dim):
  with jax.enable_x64(True):
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 5, 1, 8), 'f8')
    place = np.arange(5)[None]
    yarn, mu = YaRN(4, original_length=64), YaRNScale(4).amplitude
    rotary = Rotary(rotary_dim=rotary_dim, spectrum=yarn, amplitude=mu)
    stored = rotary.store(key, jnp.asarray(place))
    branch = rotary.branches(query, stored, jnp.asarray(place), None)[0]
    scores = np.einsum('blhk,bmhk->lm', branch.query, branch.key)
    plain = dataclasses.replace(rotary, amplitude=1.0)
    # `apply_rotary_pos_emb` of the Llama model: cos and sin of doubled
    # frequencies, multiplied by `attention_scaling`; the rest passes through.
    angle = place[..., None] * yarn.frequencies(rotary_dim, BASE)
    angle = np.concatenate([angle, angle], axis=-1)[:, :, None]
    cos, sin = np.cos(angle) * mu, np.sin(angle) * mu
    turned = []
    for x in (np.asarray(query), np.asarray(key)):
      part, rest = x[..., :rotary_dim], x[..., rotary_dim:]
      part = part * cos + rotate_half(part) * sin
      turned.append(np.concatenate([part, rest], axis=-1))
    np.testing.assert_allclose(
      scores, np.einsum('blhk,bmhk->lm', *turned), rtol=1e-12, atol=1e-12
    )
    unscaled = np.einsum(
      'blhk,bmhk->lm',
      plain.store(query, jnp.asarray(place)),
      plain.store(key, jnp.asarray(place)),
    )
    # The scale multiplies all coordinates: the same only if all are rotated.
    multiplied = YaRNScale(4).multiplier(none_visible, 8) * unscaled
    same = np.allclose(scores, multiplied, rtol=1e-12, atol=1e-12)
    assert same == (rotary_dim == 8)


def test_yarn_scale_multiplies_with_the_usual_one():
  scale = InverseSqrt() * YaRNScale(4)
  np.testing.assert_allclose(
    scale.multiplier(none_visible, 64), 1.1386294361**2 / 8, rtol=1e-9
  )


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: Interpolation(0.5), 'Interpolation needs a finite factor >= 1'),
    (lambda: NTKOld(0.0), 'NTKOld needs a finite factor >= 1, got 0.0'),
    (lambda: NTKAware(math.inf), 'NTKAware needs a finite factor'),
    (lambda: NTKFixed(math.nan), 'NTKFixed needs a finite factor'),
    (lambda: NTKMixed(0.9), 'NTKMixed needs a finite factor'),
    (lambda: NTKMixed(8, 1.5), r'from 0 \(Interpolation\) to 1.*got 1.5'),
    (lambda: DynamicNTK(0.5, 8, 8), 'DynamicNTK needs a finite factor'),
    (lambda: DynamicNTK(2, 0, 8), 'lengths of at least 1, got max_length=0'),
    (lambda: YaRN(0.5, 8), 'YaRN needs a finite factor'),
    (lambda: YaRN(2, 0), 'original_length >= 1, got 0'),
    (lambda: YaRN(2, 8, fast=1.0), 'fast > slow > 0.*got fast=1.0'),
    (lambda: Llama3(0.5), 'Llama3 needs a finite factor'),
    (lambda: Llama3(original_length=0), 'original_length >= 1, got 0'),
    (lambda: Llama3(high=1.0), 'high > low > 0.*got high=1.0'),
    (lambda: MixedBase((1.0, 2.0)), 'never rise and are at least 1'),
    (lambda: MixedBase((2.0, 0.5)), 'never rise and are at least 1'),
    (lambda: MixedBase((math.inf, 1.0)), 'finite ratios'),
    (lambda: MixedBase([2.0, 1.0]), 'needs a tuple of ratios'),
    (lambda: YaRNScale(0.5), 'YaRNScale needs a finite factor'),
    (lambda: YaRNScale(4, mscale=1.0), 'together or neither'),
    (
      lambda: YaRNScale(4, mscale=0.0, mscale_all_dim=1.0),
      'mscale > 0 or None, got 0.0',
    ),
    (lambda: YaRNScale(4, attention_factor=-1.0), 'attention_factor > 0'),
    (lambda: Rotary(amplitude=0.0), 'finite amplitude > 0, got 0.0'),
    (lambda: rope_frequencies(7), 'even, positive number.*got 7'),
    (lambda: rope_frequencies(0), 'even, positive number.*got 0'),
    (lambda: rope_frequencies(8, 0.0), 'base > 0, got 0.0'),
    (lambda: NTKAware(2).frequencies(2, BASE), 'at least 4 rotated.*got 2'),
    (
      lambda: MixedBase((2.0, 1.0)).frequencies(8, BASE),
      '2 ratios, but 8 rotated coordinates make 4 pairs',
    ),
    (lambda: YaRN(2, 8).frequencies(8, 1.0), 'base > 1, got 1.0'),
    (
      lambda: YaRN(2, 1_000_000).frequencies(8, 2.0),
      'finds no ramp.*too short or too long',
    ),
  ],
)
def test_what_makes_no_sense_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
