"""Low-rank changes against numbers from paper and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.ops import LowRank
from jaxformers.ops import lora_apply
from jaxformers.ops import lora_factors
from jaxformers.ops import lora_init
from jaxformers.ops import lora_merge
from jaxformers.ops import lora_unmerge

KEY = jax.random.key(0)
PARAMS = {
  'query': {'w_DHK': (6, 2, 3)},
  'out': {'w_HKD': (2, 3, 6), 'b_D': (6,)},
  'experts': {'w_XDF': (4, 6, 5)},
  'scanned_0': {'w_FD': (7, 5, 6), 'scale_D': (7, 6)},
  'embed': {'table_VD': (9, 6)},
  'flax': {'kernel': (3, 3, 2, 6), 'bias': (6,)},
}
RULES = ('query', 'out', 'experts', 'scanned', 'embed', ('flax/kernel', 'iiio'))


@pytest.fixture(scope='module')
def params():
  is_shape = lambda x: type(x) is tuple
  leaves, structure = jax.tree.flatten(PARAMS, is_leaf=is_shape)
  rng = np.random.default_rng(0)
  arrays = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in leaves]
  return structure.unflatten(arrays)


def random_adapters(params, low_rank):
  adapters = lora_init(KEY, params, low_rank)
  return jax.tree.map(
    lambda a: jax.random.normal(jax.random.key(a.size), a.shape), adapters
  )


def test_the_example_on_paper():
  params = {'w_DE': jnp.eye(2)}
  low_rank = LowRank(('w_DE',), rank=1, alpha=2.0)
  adapters = {
    'w_DE': {
      'lora_in_DR': jnp.array([[1.0], [2.0]]),
      'lora_out_RE': jnp.array([[3.0, -1.0]]),
    }
  }
  merged = lora_merge(params, adapters, low_rank)
  np.testing.assert_array_equal(merged['w_DE'], [[7, -2], [12, -3]])
  apply = lora_apply(lambda params, x: x @ params['w_DE'], low_rank)
  x = jnp.ones(2)
  y, back = jax.vjp(lambda a: apply(params, a, x), adapters)
  np.testing.assert_array_equal(y, [19, -5])
  (gradient,) = back(jnp.ones(2))
  np.testing.assert_array_equal(gradient['w_DE']['lora_in_DR'], [[4], [4]])
  np.testing.assert_array_equal(gradient['w_DE']['lora_out_RE'], [[6, 6]])


def test_names_and_shapes_follow_the_matrices(params):
  adapters = lora_init(KEY, params, LowRank(RULES, rank=2))
  assert jax.tree.map(jnp.shape, adapters) == {
    'query': {'w_DHK': {'lora_in_DR': (6, 2), 'lora_out_RHK': (2, 2, 3)}},
    'out': {'w_HKD': {'lora_in_HKR': (2, 3, 2), 'lora_out_RD': (2, 6)}},
    'experts': {'w_XDF': {'lora_in_XDR': (4, 6, 2), 'lora_out_XRF': (4, 2, 5)}},
    'scanned_0': {'w_FD': {'lora_in_FR': (7, 5, 2), 'lora_out_RD': (7, 2, 6)}},
    'embed': {'table_VD': {'lora_in_VR': (9, 2), 'lora_out_RD': (2, 6)}},
    'flax': {'kernel': {'lora_in': (3, 3, 2, 2), 'lora_out': (2, 6)}},
  }
  query = adapters['query']['w_DHK']
  assert sum(a.size for a in query.values()) == 2 * (6 + 2 * 3)
  short = lora_init(KEY, {'w_DR': params['embed']['table_VD']}, LowRank(('w',)))
  assert set(short['w_DR']) == {'lora_in_DN', 'lora_out_NR'}


@pytest.mark.parametrize(
  'start', ['uniform', 'gaussian', 'he_uniform', 'output']
)
def test_at_first_nothing_changes(params, start):
  low_rank = LowRank(RULES, start=start)
  adapters = lora_init(KEY, params, low_rank)
  merged = jax.jit(lambda a: lora_merge(params, a, low_rank))(adapters)
  jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_merging_adds_products_of_the_factors(params):
  low_rank = LowRank(RULES, rank=2, alpha=3.0)
  adapters = random_adapters(params, low_rank)
  merged = lora_merge(params, adapters, low_rank)
  wide = lambda tree: [np.float64(a) for a in tree.values()]
  lora_in, lora_out = wide(adapters['query']['w_DHK'])
  change = 1.5 * np.einsum('dr,rhk->dhk', lora_in, lora_out)
  expected = params['query']['w_DHK'] + change
  np.testing.assert_allclose(merged['query']['w_DHK'], expected, rtol=1e-5)
  for name, leaf in (('experts', 'w_XDF'), ('scanned_0', 'w_FD')):
    lora_in, lora_out = wide(adapters[name][leaf])
    for layer, w in enumerate(np.float64(params[name][leaf])):
      np.testing.assert_allclose(
        merged[name][leaf][layer],
        w + 1.5 * lora_in[layer] @ lora_out[layer],
        rtol=1e-4,
        atol=1e-5,
      )
  lora_in, lora_out = wide(adapters['flax']['kernel'])
  np.testing.assert_allclose(
    merged['flax']['kernel'],
    params['flax']['kernel'] + 1.5 * lora_in @ lora_out,
    rtol=1e-4,
    atol=1e-5,
  )
  np.testing.assert_array_equal(merged['out']['b_D'], params['out']['b_D'])


def test_the_change_has_the_rank(params):
  low_rank = LowRank(('query',), rank=2)
  merged = lora_merge(params, random_adapters(params, low_rank), low_rank)
  change = merged['query']['w_DHK'] - params['query']['w_DHK']
  assert np.linalg.matrix_rank(change.reshape(6, 6), tol=1e-4) == 2


def test_unmerging_undoes_merging(params):
  low_rank = LowRank(RULES, rank=3)
  adapters = random_adapters(params, low_rank)
  merged = lora_merge(params, adapters, low_rank)
  back = lora_unmerge(merged, adapters, low_rank)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    back,
    params,
  )


def test_half_precision_is_merged_in_float32():
  low_rank = LowRank(('w',), rank=1, alpha=1.0)
  params = {'w_DE': jnp.ones((1, 1), jnp.bfloat16)}
  adapters = lora_init(KEY, params, low_rank)
  assert adapters['w_DE']['lora_in_DR'].dtype == jnp.float32
  factor = jnp.full((1, 1), 2**-4.5)  # 1 + 2^-9 rounds to 1, 1 + 2^-7 does not.
  adapters = {'w_DE': {'lora_in_DR': factor, 'lora_out_RE': 4 * factor}}
  merged = lora_merge(params, adapters, low_rank)['w_DE']
  assert merged.dtype == jnp.bfloat16
  assert merged == 1 + 2**-7


def test_starts_have_the_spread_of_their_formulas():
  params = {'w_DE': jnp.zeros((400, 300)), 'table_VD': jnp.zeros((400, 300))}
  spreads = {
    'uniform': (1 / np.sqrt(3 * 400), 0, 0, 1),
    'gaussian': (1 / 50, 0, 0, 1),
    'he_uniform': (np.sqrt(2 / 400), 0, 0, 1),
    'output': (0, 1 / np.sqrt(50), 0, 1),
    'symmetric': (1 / np.sqrt(400), 1 / np.sqrt(50), 1, 1 / np.sqrt(50)),
  }
  for start, expected in spreads.items():
    low_rank = LowRank(('w_', 'table'), rank=50, start=start)
    adapters = lora_init(KEY, params, low_rank)
    factors = (*adapters['w_DE'].values(), *adapters['table_VD'].values())
    np.testing.assert_allclose(
      [a.std() for a in factors], expected, rtol=0.03, err_msg=start
    )
    limit = {'uniform': 1 / 20, 'he_uniform': np.sqrt(6) / 20}.get(start)
    if limit:
      assert 0.99 * limit < abs(factors[0]).max() <= limit


def test_the_scale_is_alpha_over_the_rank_or_its_root():
  assert LowRank(('w',), rank=16, alpha=8.0).scale == 0.5
  assert LowRank(('w',), rank=16, alpha=8.0, rank_stabilized=True).scale == 2


@pytest.mark.parametrize(
  ('rules', 'message'),
  [
    (('qeury',), "'qeury' finds no matrix; the nearest are query/w_DHK"),
    (('out/b_D',), "'out/b_D' finds no matrix"),
    (('flax',), r"flax/kernel has 4 axes.*\('flax/kernel', 'iiio'\)"),
    ((('query', 'io'),), "query/w_DHK has 3 axes, which the layout 'io'"),
    ((('query', 'iii'),), "the layout 'iii' does not"),
  ],
)
def test_rules_that_do_not_fit_are_refused(params, rules, message):
  with pytest.raises(ValueError, match=message):
    lora_init(KEY, params, LowRank(rules))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'rank': 0}, 'rank must be at least 1'),
    ({'start': 'zero'}, "start must be one of .*'symmetric'"),
    ({'dropout': 1.0}, r'dropout must lie in \[0, 1\)'),
    ({'rules': 'query'}, 'rules must be a tuple such as'),
    ({'rules': (('query', 'xo'),)}, "consists of 's', 'i', 'o'; got 'xo'"),
  ],
)
def test_bad_options_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    LowRank(**{'rules': ('query',), **changes})


def test_adapters_of_other_parameters_name_the_nearest_paths(params):
  low_rank = LowRank(('query', 'out'))
  adapters = lora_init(KEY, params, low_rank)
  strange = {**adapters, 'queries': adapters['query']}
  with pytest.raises(
    ValueError, match="no matrix 'queries/w_DHK'.*query/w_DHK"
  ):
    lora_merge(params, strange, low_rank)
  missing = {'out': adapters['out']}
  with pytest.raises(ValueError, match='of query/w_DHK must have .* got none'):
    lora_factors(params, missing, low_rank)
  larger = LowRank(('query', 'out'), rank=9)
  with pytest.raises(
    ValueError, match=r'lora_in_HKR of shape \(2, 3, 9\).*got'
  ):
    lora_merge(params, adapters, larger)
