"""Attention against paper-sized numbers and a float64 NumPy reference."""

import itertools

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from jaxformers.ops import Causal
from jaxformers.ops import InverseSqrt
from jaxformers.ops import Lengths
from jaxformers.ops import Rotary
from jaxformers.ops import Segments
from jaxformers.ops import Window
from jaxformers.ops import attend
from jaxformers.ops.positions import Branch
from jaxformers.ops.positions import NoPosition

B, L, M, H, G, K, V = 2, 5, 7, 4, 2, 6, 3


class Times:
  def __init__(self, factor):
    self.factor = factor

  def multiplier(self, visible_keys, head_dim):
    return self.factor


def arrays(dtype=jnp.float32, length=L, keys=M):
  shapes = (B, length, H, K), (B, keys, G, K), (B, keys, G, V)
  return [
    jax.random.normal(jax.random.key(i), shape, dtype)
    for i, shape in enumerate(shapes)
  ]


def reference(query, key, value, visible, scale=None, bias=None):
  """Attention by four nested loops in float64."""
  query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
  scale = 1 / np.sqrt(query.shape[3]) if scale is None else scale
  out = np.zeros((*query.shape[:3], value.shape[3]))
  for b, i, h in itertools.product(*map(range, query.shape[:3])):
    group = h // (query.shape[2] // key.shape[2])
    seen = [j for j in range(key.shape[1]) if visible(b, i, j)]
    if not seen:
      continue
    logits = np.array([scale * query[b, i, h] @ key[b, j, group] for j in seen])
    if bias is not None:
      logits += np.array([bias[b, h, i, j] for j in seen])
    powers = np.exp(logits - logits.max())
    out[b, i, h] = powers @ value[b, seen, group] / powers.sum()
  return out


def test_weights_of_one_two_four_give_the_mean_by_sevenths():
  query = jnp.array([1.0, 0])[None, None, None]
  key = jnp.array([[0, 0], [np.log(2), 0], [np.log(4), 1]])[None, :, None]
  value = jnp.array([[1.0, 0], [0, 1], [1, 1]])[None, :, None]
  result = attend(
    query, key.astype('f4'), value, scale=Times(1.0), statistics=True
  )
  np.testing.assert_allclose(result.out[0, 0, 0], [5 / 7, 6 / 7], rtol=1e-6)
  np.testing.assert_allclose(result.log_normalizer, np.log(7), rtol=1e-6)
  p = np.array([1, 2, 4]) / 7
  np.testing.assert_allclose(result.entropy, -(p @ np.log(p)), rtol=1e-6)
  np.testing.assert_allclose(result.effective_support, 49 / 21, rtol=1e-6)
  logits = np.log([1, 2, 4])
  variance = p @ (logits - p @ logits) ** 2
  np.testing.assert_allclose(result.variance, variance, rtol=1e-6)


MASKS = {
  'causal': (Causal(), lambda b, i, j: j <= i + 2),
  'window': (Window(3), lambda b, i, j: 0 <= i + 2 - j < 3),
  'lengths': (
    Lengths(jnp.array([3, 6])),
    lambda b, i, j: j < (3, 6)[b],
  ),
  'and': (
    Causal() & Lengths(jnp.array([3, 6])),
    lambda b, i, j: j <= i + 2 and j < (3, 6)[b],
  ),
  'or': (
    Window(2) | Lengths(jnp.array([1, 2])),
    lambda b, i, j: 0 <= i + 2 - j < 2 or j < (1, 2)[b],
  ),
}


@pytest.mark.parametrize('name', MASKS)
def test_masked_grouped_attention_equals_nested_loops(name):
  mask, visible = MASKS[name]
  with jax.enable_x64(True):
    query, key, value = arrays(jnp.float64)
    out = attend(query, key, value, mask=mask, query_position=jnp.arange(L) + 2)
    expected = reference(query, key, value, visible)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-14)


def test_causal_offset_says_how_many_keys_came_before():
  query, key, value = arrays()
  positions = {'query_position': jnp.arange(L)}
  out = attend(query, key, value, mask=Causal(offset=2), **positions)
  visible = MASKS['causal'][1]
  np.testing.assert_allclose(
    out, reference(query, key, value, visible), rtol=2e-5, atol=2e-6
  )


def test_segments_see_themselves_and_padding_sees_nothing():
  query, key, value = arrays(length=M)
  ids = np.array([[1, 1, 2, 2, 2, 0, 0], [5, 5, 5, 5, 0, 3, 3]], np.int32)
  out = attend(query, key, value, mask=Segments(ids, ids))
  expected = reference(
    query, key, value, lambda b, i, j: ids[b, i] == ids[b, j] != 0
  )
  np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)
  assert (np.asarray(out)[ids == 0] == 0).all()


def test_float64_is_exact_to_float64():
  with jax.enable_x64(True):
    query, key, value = arrays(jnp.float64)
    out = attend(query, key, value)
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(
      out, reference(query, key, value, lambda b, i, j: True), rtol=1e-12
    )


def test_plain_case_equals_jax_nn():
  query, key, value = arrays(length=M)
  value = jnp.concatenate([value, value], -1)  # jax.nn wants V = K.
  actual = attend(query, key, value, mask=Causal())
  expected = jax.nn.dot_product_attention(query, key, value, is_causal=True)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_bias_is_added_to_scaled_scores():
  query, key, value = arrays()
  bias = jax.random.normal(jax.random.key(9), (B, H, L, M))
  out = attend(query, key, value, bias=bias)
  expected = reference(query, key, value, lambda b, i, j: True, None, bias)
  np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)


def test_a_scale_may_differ_by_row_and_know_how_many_keys_are_visible():
  class LogCount:
    def multiplier(self, visible_keys, head_dim):
      return jnp.log(visible_keys()) / head_dim

  query, key, value = arrays(length=M)
  out = attend(query, key, value, scale=LogCount(), mask=Causal())
  for i in range(M):
    row = reference(
      query[:, i : i + 1],
      key,
      value,
      lambda b, _, j, i=i: j <= i,
      np.log(i + 1) / K,
    )
    np.testing.assert_allclose(out[:, i : i + 1], row, rtol=2e-5, atol=2e-6)


def test_a_later_branch_overrides_where_its_region_holds():
  class FarReversed(NoPosition):
    def branches(self, query, key, query_position, key_position):
      def far(q, k):
        return (q[:, None, :, None] - k[:, None, None, :]) >= 2

      return Branch(query, key), Branch(-query, key, far)

  query, key, value = arrays(length=M)
  out = attend(query, key, value, position=FarReversed())
  scores = np.einsum(
    'blhk,bmhk->bhlm', *(np.asarray(a) for a in (query, jnp.repeat(key, 2, 2)))
  )
  i, j = np.indices((M, M))
  scores = np.where(i - j >= 2, -scores, scores) / np.sqrt(K)
  weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
  expected = np.einsum('bhlm,bmhv->blhv', weights, np.repeat(value, 2, 2))
  np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)


def test_rows_that_see_nothing_give_zero_with_zero_gradient():
  query, key, value = arrays()
  mask = Lengths(jnp.array([0, 4]))

  def total(query, key, value):
    result = attend(query, key, value, mask=mask, statistics=True)
    return result.out.sum() + result.entropy.sum(), result

  with jax.debug_nans(True):
    gradients, result = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(
      query, key, value
    )
  assert (result.out[0] == 0).all()
  assert (result.entropy[0] == 0).all()
  assert (result.log_normalizer[0] == -jnp.inf).all()
  for gradient in gradients:
    assert (gradient[0] == 0).all()
    assert np.isfinite(gradient).all()
    assert (gradient[1] != 0).any()


def test_unseen_keys_and_values_do_not_leak_even_if_nan():
  query, key, value = arrays()
  mask = Lengths(jnp.array([3, 3]))
  holes = jnp.arange(M)[None, :, None, None] >= 3

  def loss(query, key, value):
    return jnp.sin(attend(query, key, value, mask=mask)).sum()

  clean = jax.value_and_grad(loss)(query, key, value)
  dirty = jax.value_and_grad(loss)(
    query, jnp.where(holes, jnp.nan, key), jnp.where(holes, jnp.nan, value)
  )
  jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_gradients_equal_finite_differences():
  with jax.enable_x64(True):
    query, key, value = arrays(jnp.float64)

    def loss(query, key, value):
      result = attend(
        query,
        key,
        value,
        mask=Causal(),
        position=Rotary(),
        query_position=jnp.arange(L) + 2,
        statistics=True,
      )
      return jnp.sin(result.out).sum() + (result.log_normalizer**2).sum()

    loss = jax.jit(loss)
    check_grads(loss, (query, key, value), order=2, modes=('fwd', 'rev'))


def test_attention_does_not_depend_on_the_order_of_keys():
  query, key, value = arrays()
  order = jax.random.permutation(jax.random.key(5), M)
  np.testing.assert_allclose(
    attend(query, key[:, order], value[:, order]),
    attend(query, key, value),
    rtol=1e-5,
    atol=1e-6,
  )


def test_rotary_scores_depend_on_distances_alone():
  query, key, value = arrays(length=M)
  near = attend(query, key, value, position=Rotary(), mask=Causal())
  far = attend(
    query,
    key,
    value,
    position=Rotary(),
    mask=Causal(),
    query_position=jnp.arange(M) + 100,
    key_position=jnp.arange(M) + 100,
  )
  np.testing.assert_allclose(near, far, rtol=1e-4, atol=1e-5)


def test_bfloat16_accumulates_in_float32():
  query, key, value = arrays(jnp.bfloat16)
  out = attend(query, key, value)
  assert out.dtype == jnp.bfloat16
  expected = reference(
    *(np.asarray(a, np.float32) for a in (query, key, value)),
    lambda b, i, j: True,
  )
  np.testing.assert_allclose(
    np.asarray(out, np.float32), expected, rtol=0.02, atol=0.02
  )


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'query': (B, L, 3, K)}, '3 query heads cannot share 2 key heads'),
    ({'key': (B, M, G, K + 1)}, 'equally wide'),
    ({'value': (B, M + 1, G, V)}, 'must agree in batch, length and heads'),
    ({'query': (L, H, K)}, 'needs arrays'),
  ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
  shapes = {'query': (B, L, H, K), 'key': (B, M, G, K), 'value': (B, M, G, V)}
  with pytest.raises(ValueError, match=message):
    attend(*(jnp.zeros(shape) for shape in (shapes | change).values()))


def test_positions_must_be_given_where_lengths_differ():
  with pytest.raises(ValueError, match='5 queries against 7 keys: pass query_'):
    attend(*arrays(), mask=Causal())
  with pytest.raises(ValueError, match='pass query_position'):
    attend(*arrays(), position=Rotary())


def test_positions_of_the_wrong_length_are_refused():
  with pytest.raises(ValueError, match=r'key_position must have shape \[7\]'):
    attend(*arrays(), key_position=jnp.arange(3))


def test_impossible_implementations_are_refused():
  with pytest.raises(ValueError, match="unknown implementation 'flash'"):
    attend(*arrays(), implementation='flash')
  with pytest.raises(ValueError, match="'xla' takes none; leave block=None"):
    attend(*arrays(), block=4)


def test_a_window_must_hold_the_query_itself():
  with pytest.raises(ValueError, match='size >= 1, got 0'):
    Window(0)


def test_inverse_sqrt_divides_by_the_root_of_the_width():
  assert InverseSqrt().multiplier(None, 16) == 0.25
