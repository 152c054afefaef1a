import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.decode import Sampler
from jaxformers.decode import apply_temperature
from jaxformers.decode import keep_top_k
from jaxformers.decode import keep_top_p

INF = float('inf')
KEY = jax.random.key(0)


def reference(logits, temperature, top_k, top_p):
  """Float64 probabilities of one row, token by token, straight from papers."""
  logits = np.asarray(logits, np.float64) / temperature
  ranked = sorted(range(logits.size), key=lambda token: (-logits[token], token))
  ranked = ranked[:top_k]
  probability = np.exp(logits[ranked] - logits.max())
  probability /= probability.sum()
  kept, mass = [], 0.0
  for token, p in zip(ranked, probability, strict=True):
    if top_p is not None and mass >= top_p:
      break
    kept.append(token)
    mass += p
  out = np.zeros(logits.size)
  out[kept] = np.exp(logits[kept] - logits.max())
  return out / out.sum()


def kept(logits):
  return np.flatnonzero(np.isfinite(logits)).tolist()


def test_temperature_divides_differences_of_logits():
  out = apply_temperature(jnp.array([1.0, 3.0, 2.0]), 0.5)
  np.testing.assert_array_equal(out, [-4.0, 0.0, -2.0])


def test_temperature_near_zero_is_greedy_without_overflow():
  logits = jnp.array([[1e6, 2e6, -1e6], [5.0, 4.0, -INF]])
  for temperature in (1e-6, 1e-45, 1e-300):
    probability = jax.nn.softmax(apply_temperature(logits, temperature))
    np.testing.assert_array_equal(probability, [[0, 1, 0], [1, 0, 0]])


def test_top_k_keeps_the_k_largest():
  out = keep_top_k(jnp.array([1.0, 4.0, 3.0, 2.0]), 2)
  np.testing.assert_array_equal(out, [-INF, 4, 3, -INF])


def test_top_k_beyond_the_vocabulary_keeps_all():
  logits = jnp.array([1.0, 4.0, 3.0])
  for k in (3, 4, 10**9):
    np.testing.assert_array_equal(keep_top_k(logits, k), logits)


def test_top_p_keeps_the_smallest_set_that_reaches_p():
  logits = jnp.log(jnp.array([0.1, 0.5, 0.3, 0.1]))
  assert kept(keep_top_p(logits, 0.49)) == [1]
  assert kept(keep_top_p(logits, 0.51)) == [1, 2]
  assert kept(keep_top_p(logits, 0.79)) == [1, 2]
  assert kept(keep_top_p(logits, 0.81)) == [0, 1, 2]
  assert kept(keep_top_p(logits, 0.91)) == [0, 1, 2, 3]


def test_top_p_always_keeps_one():
  assert kept(keep_top_p(jnp.array([0.0, 1.0, 0.5]), 1e-30)) == [1]


def test_top_p_of_one_keeps_even_the_faintest():
  logits = jnp.array([0.0, -30.0, -80.0])
  np.testing.assert_array_equal(keep_top_p(logits, 1.0), logits)


def test_ties_go_to_lower_ids():
  uniform = jnp.zeros(4)
  assert kept(keep_top_k(uniform, 3)) == [0, 1, 2]
  assert kept(keep_top_p(uniform, 0.5)) == [0, 1]
  assert kept(keep_top_p(uniform, 0.51)) == [0, 1, 2]
  assert kept(keep_top_k(jnp.array([1.0, 2.0, 1.0, 2.0]), 3)) == [0, 1, 3]


def test_negative_zero_ties_with_zero():
  logits = jnp.array([-1.0, -0.0, 0.0])
  assert kept(keep_top_k(logits, 1)) == [1]
  assert Sampler(temperature=0)(KEY, logits) == 1


def test_excluded_tokens_stay_excluded():
  logits = jnp.array([-INF, 1.0, -INF, 0.0])
  assert kept(keep_top_k(logits, 3)) == [1, 3]
  assert kept(keep_top_p(logits, 0.99)) == [1, 3]


@pytest.mark.parametrize('temperature', [0.5, 2.0])
@pytest.mark.parametrize('top_k', [None, 7])
@pytest.mark.parametrize('top_p', [None, 0.2, 0.9])
def test_distribution_equals_float64_reference(temperature, top_k, top_p):
  rng = np.random.default_rng(1)
  smooth = rng.normal(0, 3, (3, 50))
  tied = np.round(smooth[:2])  # many equal logits
  logits_BV = np.concatenate([smooth, tied]).astype(np.float32)
  expected = [reference(row, temperature, top_k, top_p) for row in logits_BV]
  sampler = Sampler(temperature, top_k, top_p)
  out = jax.jit(lambda x: jax.nn.softmax(sampler.truncate(x)))(logits_BV)
  probability = np.asarray(out)
  np.testing.assert_array_equal(probability > 0, np.array(expected) > 0)
  # float32 softmax after a division: some ulps of values up to 1.
  np.testing.assert_allclose(probability, expected, rtol=1e-5, atol=1e-7)


def test_order_is_temperature_then_top_k_then_top_p():
  logits_BV = jax.random.normal(KEY, (4, 30)) * 2

  @jax.jit
  def one_by_one(logits_BV):
    return keep_top_p(keep_top_k(apply_temperature(logits_BV, 0.7), 10), 0.8)

  @jax.jit
  def top_p_first(logits_BV):
    return keep_top_k(keep_top_p(apply_temperature(logits_BV, 0.7), 0.8), 10)

  out_BV = jax.jit(Sampler(0.7, 10, 0.8).truncate)(logits_BV)
  np.testing.assert_array_equal(out_BV, one_by_one(logits_BV))
  assert not np.array_equal(out_BV, top_p_first(logits_BV))


@pytest.mark.parametrize(
  'sampler',
  [
    Sampler(),
    Sampler(temperature=1.5, top_k=5),
    Sampler(temperature=0.7, top_p=0.9),
    Sampler(temperature=2.0, top_k=6, top_p=0.8),
  ],
  ids=str,
)
def test_frequencies_pass_a_chi_square_test(sampler):
  logits_V = np.random.default_rng(2).normal(0, 1, 8).astype(np.float32)
  expected_V = reference(
    logits_V, sampler.temperature, sampler.top_k, sampler.top_p
  )
  draws = 20_000
  tokens = jax.jit(sampler)(jax.random.key(3), np.tile(logits_V, (draws, 1)))
  count_V = np.bincount(np.asarray(tokens), minlength=8)
  is_kept = expected_V > 0
  assert count_V[~is_kept].sum() == 0
  expected_V = draws * expected_V[is_kept]
  statistic = ((count_V[is_kept] - expected_V) ** 2 / expected_V).sum()
  # The 99.9 % quantile of chi-square with 0..7 degrees of freedom.
  quantile = [0, 10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32]
  assert statistic < quantile[is_kept.sum() - 1]


def test_greedy_is_the_lowest_id_of_the_largest_and_ignores_the_key():
  logits = jnp.array([[1.0, 2.0, 2.0], [3.0, 0.0, 1.0]])
  for sampler in (Sampler(temperature=0), Sampler(0, top_k=2, top_p=0.5)):
    for seed in range(3):
      tokens = sampler(jax.random.key(seed), logits)
      np.testing.assert_array_equal(tokens, [1, 0])
    np.testing.assert_array_equal(
      jax.nn.softmax(sampler.truncate(logits)), [[0, 1, 0], [1, 0, 0]]
    )


def test_top_k_of_one_is_greedy_on_coarse_logits():
  logits = jax.random.normal(KEY, (64, 200)).astype(jnp.bfloat16)
  greedy = Sampler(temperature=0)(KEY, logits)
  largest = logits.max(axis=-1, keepdims=True)
  assert ((logits == largest).sum(axis=-1) > 1).any()  # ties do occur
  np.testing.assert_array_equal(Sampler(top_k=1)(KEY, logits), greedy)


def test_bfloat16_is_computed_in_float32():
  logits = jax.random.normal(KEY, (3, 20)).astype(jnp.bfloat16)
  sampler = Sampler(0.9, 10, 0.9)
  truncate = jax.jit(sampler.truncate)
  out = truncate(logits)
  assert out.dtype == jnp.float32
  np.testing.assert_array_equal(out, truncate(logits.astype('float32')))


@pytest.mark.parametrize('shape', [(5,), (2, 3, 5)])
@pytest.mark.parametrize(
  'sampler', [Sampler(0), Sampler(top_k=2, top_p=0.9)], ids=str
)
def test_any_leading_axes(shape, sampler):
  logits = np.random.default_rng(4).normal(size=shape).astype(np.float32)
  tokens = jax.jit(sampler)(KEY, logits)
  assert tokens.shape == shape[:-1]
  assert tokens.dtype == jnp.int32
  second = np.sort(logits, axis=-1)[..., -2]
  chosen = np.take_along_axis(logits, np.asarray(tokens)[..., None], axis=-1)
  assert (chosen[..., 0] >= second).all()


def test_one_partial_sort_serves_top_k_and_top_p():
  sampler = Sampler(top_k=3, top_p=0.9)
  text = str(jax.make_jaxpr(sampler.truncate)(jnp.zeros((2, 9))))
  assert text.count('top_k[') == 1
  assert 'sort[' not in text


def test_equal_samplers_hash_alike():
  assert hash(Sampler(0.5, 3, 0.9)) == hash(Sampler(0.5, 3, 0.9))
  assert Sampler(0.5, 3, 0.9) == Sampler(0.5, 3, 0.9)
  assert Sampler(0.5) != Sampler(0.6)


@pytest.mark.parametrize('temperature', [-0.1, INF, float('nan')])
def test_a_bad_temperature_is_refused(temperature):
  with pytest.raises(ValueError, match=r'temperature must be 0 \(greedy\) or'):
    Sampler(temperature=temperature)


def test_a_zero_temperature_points_to_greedy():
  message = r'positive and finite, got 0; .* use Sampler\(temperature=0\)'
  with pytest.raises(ValueError, match=message):
    apply_temperature(jnp.zeros(3), 0)


@pytest.mark.parametrize('k', [0, -1, 2.0, True, 'five'])
def test_a_bad_top_k_is_refused(k):
  message = f'top_k must be an integer of at least 1, got {k!r}; None keeps all'
  with pytest.raises(ValueError, match=message):
    Sampler(top_k=k)
  with pytest.raises(ValueError, match=message):
    keep_top_k(jnp.zeros(3), k)


@pytest.mark.parametrize('p', [0, -0.5, 1.01, float('nan')])
def test_a_bad_top_p_is_refused(p):
  message = rf'top_p must lie in \(0, 1\], got {p}; 1 keeps all'
  with pytest.raises(ValueError, match=message):
    Sampler(top_p=p)
  with pytest.raises(ValueError, match=message):
    keep_top_p(jnp.zeros(3), p)
