"""Linear attention and retention as layers, against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.nn.mixers import LinearAttention
from jaxformers.nn.mixers import Retention

B, L, D, H = 2, 6, 8, 2


def retnet(params, x):
  """Parallel retention, gate and all, in NumPy; K = 4, values of 8."""
  w = {name: leaf.popitem()[1] for name, leaf in params.items()}
  project = lambda name: np.einsum('bld,dhk->blhk', x, w[name])
  query, key, value, gate = map(project, ('query', 'key', 'value', 'gate'))
  angle = np.arange(L)[:, None] * np.array([1, 1e-4])
  spin = np.exp(1j * angle)[None, :, None]
  query, key = ((y[..., ::2] + 1j * y[..., 1::2]) * spin for y in (query, key))
  scores = np.einsum('blhk,bmhk->bhlm', query, key.conj()).real / 2
  distance = np.arange(L)[:, None] - np.arange(L)
  decay = np.array([1 - 1 / 32, 1 - 1 / 64])[:, None, None]
  scores = scores * np.where(distance >= 0, decay**distance, 0)
  out = np.einsum('bhlm,bmhk->blhk', scores, value)
  out = out / np.sqrt((out**2).mean(axis=-1, keepdims=True) + 1e-6)
  out = out * gate / (1 + np.exp(-gate))
  return np.einsum('blhk,hkd->bld', out, w['out'])


def test_retention_is_that_of_retnet():
  mixer = Retention(num_heads=H, chunk=4)
  x_BLD = np.random.default_rng(0).normal(size=(B, L, D))
  with jax.enable_x64(True):
    variables = jax.jit(mixer.init)(jax.random.key(0), x_BLD)
    y_BLD, _ = jax.jit(mixer.apply)(variables, x_BLD)
  params = jax.tree.map(np.asarray, variables['params'])
  # Parameters are float32, products with them float64.
  np.testing.assert_allclose(y_BLD, retnet(params, x_BLD), rtol=1e-11)


def test_retention_begins_with_the_gains_of_retnet():
  mixer = Retention(num_heads=4)
  x_BLD = jnp.zeros((1, 1, 64))
  params = jax.jit(mixer.init)(jax.random.key(0), x_BLD)['params']
  outs = {'query': 64, 'key': 64, 'value': 128, 'gate': 128, 'out': 128}
  for name, fan in outs.items():
    gain = 2**-1 if name == 'out' else 2**-2.5
    (w,) = jax.tree.leaves(params[name])
    bound = gain * np.sqrt(6 / (64 + fan))
    # The largest of thousands of uniform draws is near the bound.
    assert 0.99 * bound < np.abs(w).max() <= bound


@pytest.mark.parametrize(
  'mixer', [Retention(num_heads=H), LinearAttention(num_heads=H)]
)
def test_states_have_one_size_whatever_the_length(mixer):
  short, long = (
    jax.tree.map(jax.typeof, mixer.initial_state(B, n, D, jnp.bfloat16))
    for n in (1, 10**6)
  )
  assert short == long
  sums = [x for x in jax.tree.leaves(short) if x.dtype != jnp.int32]
  assert {x.dtype for x in sums} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
  ('mixer', 'message'),
  [
    (LinearAttention(num_heads=H, feature='identity'), 'may vanish'),
    (LinearAttention(num_heads=3), 'does not divide into 3 heads'),
    (Retention(num_heads=0), 'num_heads >= 1, got 0'),
  ],
)
def test_what_cannot_be_is_refused(mixer, message):
  with pytest.raises(ValueError, match=message):
    mixer.init(jax.random.key(0), jnp.zeros((1, 2, D)))
