"""Scales of attention: tables of the articles, sampled entropies, one state."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from jaxformers import nn
from jaxformers.nn.mixers import Attention
from jaxformers.ops import Causal
from jaxformers.ops import ConstantScale
from jaxformers.ops import InverseSqrt
from jaxformers.ops import Lengths
from jaxformers.ops import Llama4Temperature
from jaxformers.ops import LogLength
from jaxformers.ops import LogLengthRetrofit
from jaxformers.ops import NoMask
from jaxformers.ops import Product
from jaxformers.ops import Segments
from jaxformers.ops import SSMax
from jaxformers.ops import attend
from jaxformers.ops import cosine_optimal_scale
from jaxformers.train.record import from_record
from jaxformers.train.record import known_classes
from jaxformers.train.record import to_record


def factors(scale, counts, head_dim=64):
  counts = jnp.array(counts, jnp.int32)
  result = scale.multiplier(lambda: counts[None, None], head_dim)
  return np.asarray(jnp.broadcast_to(result, (1, 1, len(counts))))[0, 0]


def test_the_factor_is_one_at_the_base_length():
  for length in (2, 512, 4096):
    np.testing.assert_allclose(
      factors(LogLength(length, least=1), [length]), 1, rtol=2e-7
    )


def test_the_multipliers_are_those_of_the_article():
  counts = [2, 16, 64, 512, 1024, 4096]
  expected = [0.013889, 0.055556, 0.083333, 0.125, 0.138889, 0.166667]
  found = factors(InverseSqrt() * LogLength(512, least=1), counts)
  np.testing.assert_allclose(found, expected, atol=6e-7)
  kappa = found[3] * 64 / math.log(512)
  np.testing.assert_allclose(kappa, 1.2823955919, rtol=3e-7)


def test_few_keys_count_as_sixteen():
  found = factors(LogLength(512), [0, 1, 2, 16, 17])
  np.testing.assert_array_equal(found[:4], found[3])
  assert found[4] > found[3]


def test_one_key_multiplies_with_zero_if_it_may():
  assert factors(LogLength(512, least=1), [1]) == 0


def test_counts_above_256_keep_all_their_digits():
  counts = np.arange(257, 300)
  expected = np.log(counts.astype(np.float64)) / np.log(512)
  np.testing.assert_allclose(factors(LogLength(), counts), expected, rtol=3e-7)


def test_the_retrofit_is_exactly_one_up_to_the_training_length():
  for length in (2, 10, 512, 1000, 4097):
    found = factors(LogLengthRetrofit(length), [0, 1, length - 1, length])
    np.testing.assert_array_equal(found, 1)
  found = factors(LogLengthRetrofit(64), [65, 4096])
  np.testing.assert_allclose(found, [math.log(65) / math.log(64), 2], rtol=1e-6)


def test_llama_4_steps_every_8192_keys():
  counts = [1, 8191, 8192, 16383, 16384]
  steps = np.array([1, 1, 2, 2, 3])
  np.testing.assert_allclose(
    factors(Llama4Temperature(), counts), 1 + 0.1 * np.log(steps), rtol=1e-6
  )


def test_ssmax_has_a_factor_per_head():
  scale = SSMax(jnp.array([0.43, 1.0]))
  counts = jnp.array([[[0, 1, 2, 512]]])
  found = scale.multiplier(lambda: counts, 64)
  log = np.array([0, 0, math.log(2), math.log(512)])
  np.testing.assert_allclose(
    found, [np.outer([0.43, 1.0], log)], rtol=1e-6, atol=0
  )


def test_products_multiply_and_pass_through_jit():
  scale = ConstantScale(2.0) * (InverseSqrt() * SSMax(jnp.array([0.5, 1.0])))
  assert isinstance(scale, Product)
  apply = jax.jit(lambda s: s.multiplier(lambda: jnp.array([[[8]]]), 4))
  expected = np.array([0.5, 1.0])[None, :, None] * math.log(8)
  np.testing.assert_allclose(apply(scale), expected, rtol=1e-6)
  assert InverseSqrt() * LogLength() == InverseSqrt() * LogLength()
  assert hash(InverseSqrt() * LogLength()) == hash(InverseSqrt() * LogLength())


def test_lengths_that_cannot_be_divided_by_are_refused():
  with pytest.raises(ValueError, match='needs base_length >= 2, got 1'):
    LogLength(1)
  with pytest.raises(ValueError, match='needs train_length >= 2, got 1'):
    LogLengthRetrofit(1)
  with pytest.raises(ValueError, match='needs least >= 1, got 0'):
    LogLength(512, least=0)
  with pytest.raises(ValueError, match='needs floor >= 1, got 0'):
    Llama4Temperature(floor=0)
  with pytest.raises(ValueError, match='needs train_length >= 2, got 1'):
    nn.LearnedSSMax(1).init(jax.random.key(0), 2)


sampled = jax.jit(attend, static_argnames=('statistics',))


def sampled_entropy(n, deviation, scale):
  """Mean entropy of rows of n independent normal scores."""
  key_BMGK = deviation * jax.random.normal(jax.random.key(n), (400, n, 1, 1))
  return sampled(
    jnp.ones((400, 1, 1, 1)),
    key_BMGK,
    key_BMGK,
    scale=scale,
    statistics=True,
  ).entropy.mean()


@pytest.mark.parametrize(
  ('deviation', 'n', 'plain', 'scaled'),
  [
    (1, 64, 3.69, 3.94),
    (1, 512, 5.74, 5.74),
    (1, 4096, 7.82, 7.43),
    (2, 64, 2.65, 3.36),
    (2, 512, 4.40, 4.40),
    (2, 4096, 6.37, 5.09),
    (3, 64, 1.81, 2.65),
    (3, 512, 2.97, 2.97),
    (3, 4096, 4.40, 2.96),
    (4, 64, 1.31, 2.05),
    (4, 512, 2.05, 2.05),
    (4, 4096, 3.00, 1.92),
  ],
)
def test_sampled_entropies_are_those_of_normal_scores(
  deviation, n, plain, scaled
):
  # The standard error of a mean over 400 rows is below 0.04 for deviation 4.
  tolerance = 0.05 if deviation < 3 else 0.1
  found = sampled_entropy(n, deviation, ConstantScale(1.0))
  np.testing.assert_allclose(found, plain, atol=tolerance)
  found = sampled_entropy(n, deviation, LogLength(512))
  np.testing.assert_allclose(found, scaled, atol=tolerance)


def test_the_log_factor_keeps_the_entropy_of_peaked_heads():
  plain, scaled = (
    [sampled_entropy(n, 3, scale) for n in (512, 4096)]
    for scale in (ConstantScale(1.0), LogLength(512))
  )
  assert abs(scaled[1] - scaled[0]) < 0.15
  assert plain[1] - plain[0] > 1.2


@pytest.mark.parametrize('n', [512, 4096])
def test_unit_scores_lose_half_a_nat(n):
  found = sampled_entropy(n, 1, ConstantScale(1.0))
  np.testing.assert_allclose(found, math.log(n) - 0.5, atol=0.02)


def test_keys_on_a_sphere_lose_what_the_formula_says():
  d, multiplier = 64, 1 / 8
  root = math.sqrt(1 + 4 * multiplier**2)
  c = (root - 1) / (2 * multiplier)
  np.testing.assert_allclose(d / 2 * math.log(1 - c * c), -0.4887, atol=5e-5)

  def moment(power):
    a = multiplier * d
    density = lambda s: s**power * math.exp(a * s) * (1 - s * s) ** 30.5
    return integrate.quad(density, -1, 1)[0]

  norm = integrate.quad(lambda s: (1 - s * s) ** 30.5, -1, 1)[0]
  loss = math.log(moment(0) / norm) - multiplier * d * moment(1) / moment(0)
  np.testing.assert_allclose(loss, -0.4890, atol=5e-5)

  keys = jax.random.normal(jax.random.key(0), (16, 4096, 1, d))
  keys *= math.sqrt(d) / jnp.linalg.norm(keys, axis=-1, keepdims=True)
  found = attend(
    keys[:, :64], keys[::-1], keys, scale=InverseSqrt(), statistics=True
  ).entropy.mean()
  np.testing.assert_allclose(found - math.log(4096), loss, atol=0.01)


def arrays(length, heads=2, width=8):
  keys = jax.random.split(jax.random.key(0), 3)
  return [jax.random.normal(k, (2, length, heads, width)) for k in keys]


jitted = jax.jit(attend, static_argnames=('scale',))
LOG = InverseSqrt() * LogLength(8, least=2)


def test_the_retrofitted_model_is_bit_identical_where_it_was_trained():
  x = arrays(24)
  plain = jitted(*x, mask=Causal(), scale=InverseSqrt())
  found = jitted(*x, mask=Causal(), scale=InverseSqrt() * LogLengthRetrofit(16))
  np.testing.assert_array_equal(found[:, :16], plain[:, :16])
  assert (np.abs(found - plain)[:, 16:].max(axis=(0, 2, 3)) > 0).all()


@pytest.mark.parametrize('scale', [LOG, InverseSqrt() * LogLengthRetrofit(4)])
def test_appended_tokens_change_no_earlier_row(scale):
  x = arrays(24)
  whole = jitted(*x, mask=Causal(), scale=scale)
  for length in (1, 9, 23):
    part = jitted(*(a[:, :length] for a in x), mask=Causal(), scale=scale)
    np.testing.assert_allclose(part, whole[:, :length], atol=2e-6)


def test_packed_sequences_are_scaled_as_if_alone():
  x = arrays(12)
  ids = jnp.array([[1] * 5 + [2] * 7] * 2)
  packed = jitted(*x, mask=Causal() & Segments(ids, ids), scale=LOG)
  for part in (slice(0, 5), slice(5, 12)):
    alone = jitted(*(a[:, part] for a in x), mask=Causal(), scale=LOG)
    np.testing.assert_allclose(packed[:, part], alone, atol=2e-6)


def test_padded_sequences_are_scaled_by_their_valid_length():
  x = arrays(12)
  padded = jitted(*x, mask=Lengths(jnp.array([7, 12])), scale=LOG)
  alone = jitted(*(a[:1, :7] for a in x), mask=NoMask(), scale=LOG)
  np.testing.assert_allclose(padded[:1, :7], alone, atol=2e-6)


def test_float64_stays_float64():
  query, key, value = (np.asarray(a, np.float64) for a in arrays(6))
  logits = np.einsum('BLHK,BMHK->BHLM', query, key) / math.sqrt(8)
  powers = np.exp(logits * math.log(6) / math.log(8))
  weights = powers / powers.sum(axis=-1, keepdims=True)
  with jax.enable_x64(True):
    found = jitted(query, key, value, scale=LOG)
  expected = np.einsum('BHLM,BMHK->BLHK', weights, value)
  np.testing.assert_allclose(found, expected, atol=1e-14)


MIXERS = {
  'log_length': Attention(num_heads=2, scale=LOG),
  'ssmax': Attention(num_heads=4, scale=nn.LearnedSSMax(8)),
  'cosine': Attention(
    num_heads=2,
    qk_norm=nn.UnitNorm(),
    scale=ConstantScale(cosine_optimal_scale(12, 8)),
  ),
}


@pytest.mark.parametrize('name', MIXERS)
def test_decoding_gives_what_reading_the_whole_gives(name):
  mixer = MIXERS[name]
  x_BLD = jax.random.normal(jax.random.key(1), (2, 7, 16))
  params = jax.jit(mixer.init)(jax.random.key(0), x_BLD)
  step = jax.jit(mixer.apply)
  whole, _ = step(params, x_BLD)
  state, found = mixer.initial_state(2, 12, 16, jnp.float32), []
  for piece in (x_BLD[:, :3], *(x_BLD[:, i : i + 1] for i in range(3, 7))):
    y_BLD, state = step(params, piece, state)
    found.append(y_BLD)
  np.testing.assert_allclose(jnp.concatenate(found, 1), whole, atol=2e-6)


@pytest.mark.parametrize('name', MIXERS)
def test_a_record_gives_the_mixer_back(name):
  mixer = MIXERS[name]
  assert from_record(to_record(mixer), known_classes()) == mixer
  assert hash(mixer.clone()) == hash(mixer)


def test_unit_norm_makes_scores_cosines_times_the_scale():
  query, key, value = arrays(6)
  norm = nn.UnitNorm(eps=0.0)
  found = jitted(
    norm.apply({}, query), norm.apply({}, key), value, scale=ConstantScale(5.0)
  )
  query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
  query /= np.linalg.norm(query, axis=-1, keepdims=True)
  key /= np.linalg.norm(key, axis=-1, keepdims=True)
  powers = np.exp(5 * np.einsum('BLHK,BMHK->BHLM', query, key))
  weights = powers / powers.sum(axis=-1, keepdims=True)
  expected = np.einsum('BHLM,BMHK->BLHK', weights, value)
  np.testing.assert_allclose(found, expected, atol=2e-6)


def test_ssmax_starts_as_one_at_the_training_length_and_is_learned():
  x = jax.random.normal(jax.random.key(1), (1, 9, 8))
  learned = Attention(num_heads=2, scale=nn.LearnedSSMax(9))
  params = jax.jit(learned.init)(jax.random.key(0), x)
  assert params['params']['score']['s_H'].shape == (2,)
  rest = {k: v for k, v in params['params'].items() if k != 'score'}
  plain = jax.jit(Attention(num_heads=2).apply)({'params': rest}, x)[0]

  @jax.jit
  def run(params):
    found = learned.apply(params, x)[0]
    return (found**2).sum(), found

  (_, found), gradient = jax.value_and_grad(run, has_aux=True)(params)
  np.testing.assert_allclose(found[:, -1], plain[:, -1], atol=1e-6)
  assert np.abs(found - plain)[:, 1:-1].max() > 1e-3
  assert (gradient['params']['score']['s_H'] != 0).all()


def test_unit_norm_has_length_one_and_a_finite_gradient_at_zero():
  x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
  y = nn.UnitNorm().apply({}, x)
  np.testing.assert_allclose(y, [[0.6, 0.8], [0, 0]], rtol=1e-6)
  gradient = jax.grad(lambda x: nn.UnitNorm().apply({}, x).sum())(x)
  assert jnp.isfinite(gradient).all()
  assert nn.UnitNorm().apply({}, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
