"""Mamba, the recurrent block of Griffin, and RWKV-4, against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.nn.mixers import RGLRU
from jaxformers.nn.mixers import RWKV4
from jaxformers.nn.mixers import Mamba
from jaxformers.nn.mixers import RecurrentBlock
from jaxformers.nn.mixers import RWKV4ChannelMixing

L, D = 6, 4
X = np.random.default_rng(0).normal(size=(1, L, D))


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def convolved(params, x_LF):
  weight_WF = params['w_WF']
  line = np.concatenate([np.zeros((len(weight_WF) - 1, x_LF.shape[1])), x_LF])
  windows = [line[i : i + len(weight_WF)] for i in range(len(x_LF))]
  return np.einsum('lwf,wf->lf', windows, weight_WF) + params.get('b_F', 0)


def mamba(params, x_LD):
  """The whole block in NumPy, step by step."""
  u_LF, z_LF = (x_LD @ params[name]['w_DF'] for name in ('in', 'gate'))
  u_LF = silu(convolved(params['convolution'], u_LF))
  rank = len(params['step']['w_RF'])
  selected = u_LF @ params['select']['w_FN']
  size = (selected.shape[1] - rank) // 2
  low, b, c = np.split(selected, (rank, rank + size), axis=1)
  raw = low @ params['step']['w_RF'] + params['step_bias_F']
  step = np.log1p(np.exp(raw))
  a = -np.exp(params['a_log_FS'])
  state, out = np.zeros_like(a), []
  for t, u, b_S, c_S in zip(step, u_LF, b, c, strict=True):
    write = (t * u)[:, None] * b_S
    state = np.exp(t[:, None] * a) * state + write
    out.append(state @ c_S + params['skip_F'] * u)
  return np.array(out) * silu(z_LF) @ params['out']['w_FD']


def recurrent_block(params, x_LD):
  """The block of Griffin in NumPy; two heads."""
  linear = lambda name, x: x @ params[name]['w_DF'] + params[name]['b_F']
  x_LF = convolved(params['convolution'], linear('in', x_LD))
  unit = params['recurrence']
  heads = x_LF.reshape(L, 2, -1)
  gate = lambda name: sigmoid(
    np.einsum('lhk,hke->lhe', heads, unit[f'{name}_HKE']) + unit[f'{name}_HK']
  )
  a = np.exp(-8 * gate('recurrence') * np.log1p(np.exp(unit['decay_HK'])))
  write = np.sqrt(1 - a**2) * gate('input') * heads
  state, out = gate('input')[0] * heads[0], []
  out.append(state)
  for i in range(1, L):
    state = a[i] * state + write[i]
    out.append(state)
  y = linear('gate', x_LD)
  cubic = np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)
  h = np.reshape(out, x_LF.shape) * y * (1 + np.tanh(cubic)) / 2
  return h @ params['out']['w_FD'] + params['out']['b_D']


def shifted(params, name, x_LD):
  before = np.concatenate([np.zeros((1, D)), x_LD[:-1]])
  mix = params[f'mix_{name}_D']
  (weight,) = params[name].values()
  return (mix * x_LD + (1 - mix) * before) @ weight


def rwkv4(params, x_LD):
  """Time mixing in NumPy, by sums over all pairs."""
  key, value, gate = (
    shifted(params, name, x_LD) for name in ('key', 'value', 'receptance')
  )
  decay, bonus = -np.exp(params['log_rate_D']), params['bonus_D']
  out = []
  for i in range(L):
    lag = (i - 1 - np.arange(i + 1))[:, None]
    weight = np.exp(np.where(lag < 0, bonus, lag * decay) + key[: i + 1])
    out.append((weight * value[: i + 1]).sum(0) / weight.sum(0))
  return sigmoid(gate) * np.array(out) @ params['out']['w_DE']


def channel_mixing(params, x_LD):
  hidden = np.maximum(shifted(params, 'key', x_LD), 0) ** 2
  gate = sigmoid(shifted(params, 'receptance', x_LD))
  return gate * (hidden @ params['value']['w_FD'])


@pytest.mark.parametrize(
  ('mixer', 'formula'),
  [
    (Mamba(state_size=3), mamba),
    (RecurrentBlock(width=6, recurrence=RGLRU(num_heads=2)), recurrent_block),
    (RWKV4(layer=2, layers=3), rwkv4),
    (RWKV4ChannelMixing(), channel_mixing),
  ],
  ids=lambda x: getattr(x, '__name__', ''),
)
def test_layers_compute_their_formulas(mixer, formula):
  with jax.enable_x64(True):
    variables = jax.jit(mixer.init)(jax.random.key(0), X)
    # Biases are 0 at first, which would hide them.
    variables = jax.tree.map(lambda p: (p + 0.1).astype('float64'), variables)
    y_BLD, _ = jax.jit(mixer.apply)(variables, X)
  params = jax.tree.map(np.asarray, variables['params'])
  np.testing.assert_allclose(y_BLD[0], formula(params, X[0]), rtol=1e-10)


def test_mamba_begins_as_published():
  mixer = Mamba(expand=64)
  params = jax.jit(mixer.init)(jax.random.key(0), X)['params']
  np.testing.assert_allclose(params['a_log_FS'][7], np.log(np.arange(1, 17)))
  steps = np.log1p(np.exp(np.asarray(params['step_bias_F'], np.float64)))
  assert 1e-3 * 0.999 < steps.min() < 1.2e-3
  assert 0.08 < steps.max() < 0.1001
  assert abs(np.log(steps).mean() - np.log(1e-2)) < 0.3
  # Uniform within 1 / sqrt(fan), with a fan of 4 taps and of a rank of 1.
  for name, limit in (('convolution', 0.5), ('step', 1.0)):
    for leaf in params[name].values():
      assert 0.9 * limit < np.abs(leaf).max() <= limit
  assert np.all(params['skip_F'] == 1)
  # Inverse softplus of the ends of the range.
  for step, bias in ((1e-3, -6.9072552), (1e-1, -2.2521685)):
    one = Mamba(step_range=(step, step))
    params = jax.jit(one.init)(jax.random.key(0), X)['params']
    np.testing.assert_allclose(params['step_bias_F'], bias, rtol=1e-6)


def test_griffin_and_rwkv_begin_as_published():
  unit = jax.jit(RGLRU(num_heads=2).init)(
    jax.random.key(0), jnp.zeros((1, 1, 512))
  )['params']
  decay = np.exp(-np.log1p(np.exp(np.asarray(unit['decay_HK'], np.float64))))
  assert 0.9 < decay.min() < 0.902
  assert 0.997 < decay.max() < 0.999
  # Uniform in the square.
  middle = (0.9**2 + 0.999**2) / 2
  assert abs((decay**2).mean() - middle) < 0.01
  np.testing.assert_allclose(np.std(unit['input_HKE']), 1 / 16, rtol=0.02)
  params = jax.jit(RWKV4(layer=1, layers=3).init)(jax.random.key(0), X)
  params = params['params']
  np.testing.assert_allclose(
    params['log_rate_D'], -5 + 8 * (np.arange(4) / 3) ** 1.35, rtol=1e-5
  )
  np.testing.assert_allclose(
    params['bonus_D'] - np.log(0.3), [0, 0.5, -0.5, 0], atol=1e-6
  )
  np.testing.assert_allclose(
    params['mix_value_D'], (np.arange(4) / 4) ** (2 / 3) + 0.15, rtol=1e-5
  )
