"""Small layers against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import nn
from jaxformers.ops import layer_norm
from jaxformers.ops import rms_norm

X = jax.random.normal(jax.random.key(0), (2, 3, 8))


def made(module):
  variables = module.init(jax.random.key(1), X)
  return variables.get('params'), module.apply(variables, X)


def test_linear_equals_einsum_over_several_axes():
  x = X.reshape(2, 3, 2, 4)
  module = nn.Linear('HKDE', (5, 6), use_bias=True)
  variables = module.init(jax.random.key(1), x)
  params = dict(variables['params'])
  params['b_DE'] = jax.random.normal(jax.random.key(2), (5, 6))
  expected = jnp.einsum('BLHK,HKDE->BLDE', x, params['w_HKDE'])
  np.testing.assert_allclose(
    module.apply({'params': params}, x),
    expected + params['b_DE'],
    rtol=1e-5,
    atol=1e-5,
  )


def test_initial_variance_is_one_over_all_inputs():
  w = nn.VarianceScaling()((0, 1), (2,))(jax.random.key(0), (8, 32, 64))
  np.testing.assert_allclose(w.std(), 1 / np.sqrt(8 * 32), rtol=0.02)
  w = nn.Normal(0.5)((0,), (1,))(jax.random.key(0), (100, 100))
  np.testing.assert_allclose(w.std(), 0.5, rtol=0.02)


def test_feed_forward_by_its_formula():
  params, y = made(nn.FeedForward(hidden=12, activation='relu'))
  hidden = jnp.maximum(X @ params['in']['w_DF'], 0)
  np.testing.assert_allclose(y, hidden @ params['out']['w_FD'], rtol=1e-5)


def test_gated_feed_forward_by_its_formula():
  params, y = made(nn.GatedFeedForward(hidden=12))
  gate = X @ params['gate']['w_DF']
  hidden = gate / (1 + jnp.exp(-gate)) * (X @ params['in']['w_DF'])
  np.testing.assert_allclose(
    y, hidden @ params['out']['w_FD'], rtol=1e-4, atol=1e-6
  )


def test_an_unknown_activation_is_refused():
  with pytest.raises(ValueError, match="did you mean 'relu'"):
    made(nn.FeedForward(hidden=4, activation='rellu'))


def test_norm_modules_call_their_op_with_all_options():
  _, y = made(nn.RMSNorm(eps=0.3, eps_on='deviation', use_scale=False))
  np.testing.assert_array_equal(y, rms_norm(X, eps=0.3, eps_on='deviation'))
  options = {'eps': 0.3, 'eps_on': 'deviation', 'variance': 'unbiased'}
  params, y = made(nn.LayerNorm(**options))
  assert set(params) == {'scale_D', 'offset_D'}
  np.testing.assert_allclose(y, layer_norm(X, **options), rtol=1e-6)


def test_residuals_put_the_norm_where_they_say():
  def branch(x):
    return 3 * x, 'aux'

  def out(residual):
    return residual.init_with_output(jax.random.key(0), X, branch)[0]

  y, aux = out(nn.PreNorm())
  np.testing.assert_allclose(y, X + 3 * rms_norm(X), rtol=1e-5, atol=1e-6)
  assert aux == 'aux'
  y, _ = out(nn.PostNorm(nn.LayerNorm()))
  np.testing.assert_allclose(y, layer_norm(4 * X), rtol=1e-4, atol=1e-5)


def _sigmoid(x):
  return 1 / (1 + np.exp(-np.asarray(x)))


def test_gated_output_by_the_formulas_of_its_gates():
  f = np.asarray(jax.nn.gelu(X, approximate=False))
  for gate, number in ('none', 0), ('half_glu1', 1), ('half_glu2', 1):
    params, y = made(nn.GatedOutput(gate=gate))
    w = np.zeros((8, 8)) if not number else params['gate_map']['w_DNE'][:, 0]
    weight = 1 if not number else _sigmoid(f @ w)
    kept = np.asarray(X) if gate == 'half_glu2' else f
    np.testing.assert_allclose(y, kept * weight, rtol=1e-4, atol=1e-6)
  params, y = made(nn.GatedOutput())
  # A map to 2 D channels, of which the second half gates the first.
  both = f @ np.asarray(params['gate_map']['w_DNE']).reshape(8, 16)
  np.testing.assert_allclose(
    y, both[..., :8] * _sigmoid(both[..., 8:]), rtol=1e-4, atol=1e-6
  )


def test_gated_output_drops_channels_of_all_tokens_together_if_tied():
  def dropped(module):
    rngs = {'dropout': jax.random.key(3)}
    module = module.clone(gate='none', activation='identity', dropout=0.5)
    return np.asarray(module.apply({}, X, deterministic=False, rngs=rngs))

  tied = dropped(nn.GatedOutput(tied=True)) == 0
  assert (tied == tied[:, :1]).all()
  assert (tied[0] != tied[1]).any()
  free = dropped(nn.GatedOutput()) == 0
  assert (free != free[:, :1]).any()


def test_an_unknown_gate_is_refused():
  with pytest.raises(ValueError, match="did you mean 'full_glu'"):
    made(nn.GatedOutput(gate='glu'))
