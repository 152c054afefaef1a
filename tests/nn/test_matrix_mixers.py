"""Mamba-2 and RWKV-5 and 6 as layers, against loops over their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.nn.mixers import RWKV6
from jaxformers.nn.mixers import Mamba2
from jaxformers.ops import ssd

B, L, D = 2, 6, 8
X = np.random.default_rng(0).normal(size=(B, L, D))


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def run(mixer):
  """Returns parameters that are all at work, and the output, in float64."""
  with jax.enable_x64(True):
    variables = jax.jit(mixer.init)(jax.random.key(0), X)
    leaves, tree = jax.tree.flatten(variables)
    noise = np.random.default_rng(1)
    leaves = [x + 0.1 * noise.normal(size=x.shape) for x in leaves]
    variables = jax.tree.unflatten(tree, leaves)
    y_BLD, _ = jax.jit(mixer.apply)(variables, X)
  return jax.tree.map(np.asarray, variables['params']), y_BLD


def convolved(x, weight, bias):
  """Mixes the last tokens, the weight's last row being the token's own."""
  out = np.zeros_like(x) + bias
  for i in range(x.shape[1]):
    for j in range(min(len(weight), i + 1)):
      out[:, i] += weight[len(weight) - 1 - j] * x[:, i - j]
  return out


def mamba2(params, heads, groups, size, norm_first, step_limit):
  """The definition, step by step."""
  project = lambda name: X @ params[name]['w'].reshape(D, -1)
  convolve = lambda name, x: silu(
    convolved(x, params[name]['w_WF'], params[name]['b_F'])
  )
  width = params['gain_HK'].shape[1]
  x = convolve('input_convolution', project('in'))
  x = x.reshape(B, L, heads, width)
  select = convolve('select_convolution', project('select'))
  select = select.reshape(B, L, groups, 2, size)
  b, c = (
    np.repeat(y, heads // groups, axis=2)
    for y in (select[:, :, :, 0], select[:, :, :, 1])
  )
  step = np.log1p(np.exp(project('step') + params['step_bias_H']))
  step = np.clip(step, *step_limit)
  rate = -np.exp(params['a_log_H'])
  state = np.zeros((B, heads, width, size))
  out = np.zeros((B, L, heads, width))
  for i in range(L):
    state *= np.exp(step[:, i] * rate)[..., None, None]
    moved = step[:, i, :, None] * x[:, i]
    state += moved[..., :, None] * b[:, i, :, None, :]
    out[:, i] = np.einsum('bhps,bhs->bhp', state, c[:, i])
    out[:, i] += params['skip_H'][:, None] * x[:, i]
  gate = silu(project('gate'))
  out = out.reshape(B, L, -1) * (1 if norm_first else gate)
  grouped = out.reshape(B, L, groups, -1)
  grouped = grouped / np.sqrt((grouped**2).mean(-1, keepdims=True) + 1e-5)
  out = grouped.reshape(B, L, -1) * params['gain_HK'].ravel()
  out = out * (gate if norm_first else 1)
  return out @ params['out']['w'].reshape(-1, D)


@pytest.mark.parametrize(
  ('norm_first', 'step_limit'), [(False, (0.0, np.inf)), (True, (0.02, 0.05))]
)
def test_mamba2_is_its_definition(norm_first, step_limit):
  mixer = Mamba2(
    head_dim=4,
    state_size=3,
    groups=2,
    norm_first=norm_first,
    step_limit=step_limit,
    chunk=4,
  )
  params, y_BLD = run(mixer)
  for name in ('in', 'select', 'gate', 'step', 'out'):
    (params[name]['w'],) = params[name].values()
  expected = mamba2(params, 4, 2, 3, norm_first, step_limit)
  np.testing.assert_allclose(y_BLD, expected, rtol=1e-11, atol=1e-12)


def test_the_state_of_two_steps_of_ssd_by_hand():
  x = jnp.array([2.0, 4.0]).reshape(1, 2, 1, 1)
  step = jnp.array([0.5, 1.0]).reshape(1, 2, 1)
  b = jnp.array([[1.0, 0.0], [1.0, 2.0]]).reshape(1, 2, 1, 2)
  c = jnp.array([[3.0, 1.0], [1.0, 1.0]]).reshape(1, 2, 1, 2)
  rate = jnp.log(jnp.array([0.25]))
  out, last = ssd(x, step, rate, b, c, jnp.array([10.0]))
  # States (1, 0) and (1/4 + 4, 8); what is skipped is not multiplied by steps.
  np.testing.assert_allclose(out.ravel(), [3 + 20, 12.25 + 40], rtol=1e-6)
  np.testing.assert_allclose(last.ravel(), [4.25, 8], rtol=1e-6)


def test_mamba2_begins_with_the_rates_and_steps_of_the_authors():
  mixer = Mamba2(expand=64, head_dim=1, state_size=1)
  params = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D)))[
    'params'
  ]
  rate, step = (
    jnp.exp(params['a_log_H']),
    jax.nn.softplus(params['step_bias_H']),
  )
  # Hundreds of uniform draws come near both ends.
  assert 1 <= rate.min() < 1.2
  assert 15.8 < rate.max() <= 16
  assert 1e-3 * 0.999 <= step.min() < 1.1e-3
  assert 0.09 < step.max() <= 0.1 * 1.001
  # The mean of log-uniform numbers is that of their logarithms.
  np.testing.assert_allclose(jnp.log(step).mean(), np.log(1e-2), atol=0.2)
  assert (params['skip_H'] == 1).all()


def rwkv(params, heads, dynamic):
  """The definition of RWKV-5 and RWKV-6, step by step."""
  before = np.concatenate([np.zeros((B, 1, D)), X[:, :-1]], axis=1)
  change = before - X
  names = ['receptance', 'key', 'value', 'gate'] + ['decay'] * dynamic
  shift = np.zeros((B, L, len(names), D))
  if dynamic:
    base = X + change * params['mix_base_D']
    low = np.tanh(np.einsum('bld,dnr->blnr', base, params['mix_in_DNR']))
    shift = np.einsum('blnr,nrd->blnd', low, params['mix_out_NRD'])
  mixed = {
    name: X + change * (params[f'mix_{name}_D'] + shift[:, :, i])
    for i, name in enumerate(names)
  }
  r, k, v, g = (
    np.einsum('bld,dhk->blhk', mixed[name], params[name]['w_DHK'])
    for name in names[:4]
  )
  log_rate = np.broadcast_to(params['log_rate_HK'], r.shape)
  if dynamic:
    low = np.tanh(mixed['decay'] @ params['decay_in_DR'])
    log_rate = log_rate + np.einsum(
      'blr,rhk->blhk', low, params['decay_out_RHK']
    )
  w, u = np.exp(-np.exp(log_rate)), params['bonus_HK']
  state = np.zeros((B, heads, D // heads, D // heads))
  out = np.zeros_like(r)
  for i in range(L):
    written = k[:, i, :, :, None] * v[:, i, :, None, :]
    out[:, i] = np.einsum(
      'bhk,bhkn->bhn', r[:, i], state + u[..., None] * written
    )
    state = w[:, i, :, :, None] * state + written
  out = out - out.mean(axis=-1, keepdims=True)
  out = out / np.sqrt((out**2).mean(axis=-1, keepdims=True) + 64e-5)
  out = (out * params['gain_HK'] + params['offset_HK']) * silu(g)
  return np.einsum('blhk,hkd->bld', out, params['out']['w_HKD'])


@pytest.mark.parametrize('rank', [3, None])
def test_rwkv_is_its_definition(rank):
  mixer = RWKV6(num_heads=2, mix_rank=rank, decay_rank=rank, chunk=4)
  params, y_BLD = run(mixer)
  expected = rwkv(params, 2, rank is not None)
  np.testing.assert_allclose(y_BLD, expected, rtol=1e-11, atol=1e-12)


def test_rwkv_begins_with_the_values_of_the_authors():
  mixer = RWKV6(num_heads=2, layer=1, layers=3)
  params = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D)))[
    'params'
  ]
  n = np.arange(D)
  close = lambda name, expected: np.testing.assert_allclose(
    np.ravel(params[name]), expected, rtol=1e-5, atol=1e-6
  )
  close('log_rate_HK', -6 + 5 * (n / 7) ** 1.35)
  close('bonus_HK', 0.5 * (1 - n / 7) + np.resize([0, 0.1, -0.1], D))
  close('mix_key_D', 1 - (n / D) ** (2 / 3))
  close('mix_value_D', 1 - (n / D) ** (2 / 3) - 0.15)
  close('mix_gate_D', 1 - (n / D) ** (1 / 3))
  close('gain_HK', (2 / 3) ** 0.7 * np.ones(D))
  assert not params['mix_in_DNR'].any()
  assert not params['decay_in_DR'].any()


@pytest.mark.parametrize('mixer', [Mamba2(head_dim=4), RWKV6(num_heads=2)])
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
    (Mamba2(head_dim=5), 'must divide into heads of 5'),
    (Mamba2(head_dim=4, groups=3), 'into 3 groups'),
    (RWKV6(num_heads=3), 'does not divide into 3 heads'),
  ],
)
def test_what_cannot_be_is_refused(mixer, message):
  with pytest.raises(ValueError, match=message):
    mixer.init(jax.random.key(0), jnp.zeros((1, 2, D)))


def test_steps_rates_and_skips_that_do_not_fit_are_refused():
  x, step, bc = (
    jnp.zeros((1, 2, 2, 3)),
    jnp.zeros((1, 2, 2)),
    jnp.zeros((1, 2, 1, 4)),
  )
  with pytest.raises(ValueError, match='rates one number per head'):
    ssd(x, step, jnp.zeros(3), bc, bc)
  with pytest.raises(ValueError, match='skip must have shape'):
    ssd(x, step, jnp.zeros(2), bc, bc, jnp.zeros(3))
