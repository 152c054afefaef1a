"""The weighted means of RWKV, against their definition as quotients of sums."""

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from jaxformers.ops import wkv
from jaxformers.ops import wkv_state
from jaxformers.ops.segments import advance
from jaxformers.ops.segments import start

B, L, D = 2, 7, 3
METHODS = {'fused': 3, 'chunked': 3, 'associative': None}
rng = np.random.default_rng(0)
KEY, VALUE = rng.normal(size=(2, B, L, D))
LOG_DECAY = -np.exp(rng.normal(size=D))
BONUS = rng.normal(size=D)
SEGMENTS = np.array([[1, 1, 0, 1, 3, 3, 3], [0, 2, 2, 0, 0, 5, 0]])
mean = jax.jit(wkv, static_argnames=('method', 'chunk'))


def by_definition(key_LD, value_LD):
  """Quotients of sums over all pairs, in float64."""
  out_LD = np.zeros_like(key_LD)
  for i in range(len(key_LD)):
    lag = (i - 1 - np.arange(i))[:, None]
    weight = np.exp(lag * LOG_DECAY + key_LD[:i])
    own = np.exp(BONUS + key_LD[i])
    total = (weight * value_LD[:i]).sum(0) + own * value_LD[i]
    out_LD[i] = total / (weight.sum(0) + own)
  return out_LD


@pytest.mark.parametrize('method', METHODS)
def test_any_method_in_any_pieces_equals_the_definition(method):
  expected = np.stack(list(map(by_definition, KEY, VALUE)))
  with jax.enable_x64(True):
    state, outputs = None, []
    for piece in (slice(0, 1), slice(1, 5), slice(5, 7)):
      out, state = mean(
        KEY[:, piece],
        VALUE[:, piece],
        LOG_DECAY,
        BONUS,
        state,
        method=method,
        chunk=METHODS[method],
      )
      outputs.append(out)
  np.testing.assert_allclose(np.concatenate(outputs, 1), expected, rtol=1e-12)


@pytest.mark.parametrize('method', METHODS)
def test_segments_start_anew_and_padding_may_hold_anything(method):
  is_token = SEGMENTS != 0
  key, value = (np.where(is_token[..., None], z, np.nan) for z in (KEY, VALUE))
  with jax.enable_x64(True):
    places, _ = advance(start(B), jnp.asarray(SEGMENTS))
    old = jax.tree.map(lambda z: z + 1.5, wkv_state(B, D, jnp.float64))
    out, last = mean(
      key, value, LOG_DECAY, BONUS, old, places=places, method=method
    )
  assert np.isfinite(out).all()
  for row, segments_L in enumerate(SEGMENTS):
    for segment in set(segments_L) - {0}:
      here = segments_L == segment
      expected = by_definition(KEY[row, here], VALUE[row, here])
      np.testing.assert_allclose(out[row, here], expected, rtol=1e-12)
  # One token is left of the last segment of the second row.
  total_BD, _, peak_BD = map(np.asarray, last)
  np.testing.assert_allclose(
    total_BD[1] * np.exp(peak_BD[1]), np.exp(KEY[1, 5]) * VALUE[1, 5]
  )


def test_a_few_steps_by_hand():
  run = lambda method: wkv(
    jnp.array([0.0, 1.0, -1.0])[None, :, None],
    jnp.array([1.0, 2.0, 3.0])[None, :, None],
    jnp.array([-0.5]),
    jnp.array([0.3]),
    method=method,
  )
  for method in METHODS:
    np.testing.assert_allclose(
      run(method).out_BLD[0, :, 0], [1.0, 1.7858350, 1.9712290], rtol=1e-6
    )


@pytest.mark.parametrize('method', METHODS)
def test_keys_of_any_size_give_means_that_only_differences_decide(method):
  run = lambda key: mean(
    jnp.asarray(key, jnp.float32),
    VALUE,
    LOG_DECAY,
    BONUS,
    method=method,
  ).out_BLD
  plain = run(np.round(KEY * 4) / 4)
  # Quarters are exact beside 80, and exp(160) is infinite in float32.
  for shift in (80, -80, 160):
    np.testing.assert_allclose(
      run(np.round(KEY * 4) / 4 + shift), plain, rtol=0, atol=5e-5
    )
  wild = run(80 * np.sign(KEY))
  assert (wild >= VALUE.min(1, keepdims=True) - 1e-5).all()
  assert (wild <= VALUE.max(1, keepdims=True) + 1e-5).all()


def test_gradients_are_those_of_finite_differences_and_of_any_method():
  with jax.enable_x64(True):
    first = mean(KEY[:, :3], VALUE[:, :3], LOG_DECAY, BONUS).last
    arrays = [jnp.asarray(z) for z in (KEY, VALUE, LOG_DECAY, BONUS)]
    places, _ = advance(start(B), jnp.asarray(SEGMENTS))

    def loss(key, value, decay, bonus, total, method):
      initial = first._replace(total_BD=total)
      free = wkv(key, value, decay, bonus, initial, method=method)
      packed = wkv(key, value, decay, bonus, places=places, method=method)
      packed_BLD = jnp.where(SEGMENTS[..., None], packed.out_BLD, 0)
      return jnp.sin(free.out_BLD).sum() + jnp.sin(packed_BLD).sum()

    arrays.append(first.total_BD)
    gradient = jax.jit(
      jax.grad(loss, argnums=range(5)), static_argnames='method'
    )
    check_grads(
      jax.jit(lambda *arrays: loss(*arrays, 'fused')),
      arrays,
      order=1,
      modes=('rev',),
    )
    expected = gradient(*arrays, method='fused')
    for method in ('chunked', 'associative'):
      for one, other in zip(
        expected, gradient(*arrays, method=method), strict=True
      ):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


def test_the_output_has_the_dtype_of_the_values_and_the_state_more():
  value = jnp.asarray(VALUE, jnp.bfloat16)
  out, last = wkv(value, value, LOG_DECAY, BONUS)
  assert out.dtype == jnp.bfloat16
  assert {z.dtype for z in last} == {jnp.dtype('float32')}


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match='must both be'):
    wkv(KEY, VALUE[:, 1:], LOG_DECAY, BONUS)
  with pytest.raises(ValueError, match=r'bonus must be \[3\]'):
    wkv(KEY, VALUE, LOG_DECAY, BONUS[1:])
  with pytest.raises(ValueError, match=r'sums must be \[2, 3\]'):
    wkv(KEY, VALUE, LOG_DECAY, BONUS, wkv_state(1, D))
  with pytest.raises(ValueError, match="'associative' has no chunks"):
    wkv(KEY, VALUE, LOG_DECAY, BONUS, method='associative', chunk=3)
  with pytest.raises(ValueError, match="unknown method 'tree'"):
    wkv(KEY, VALUE, LOG_DECAY, BONUS, method='tree')
