"""LRU and S5 as layers, against loops and what their authors say of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.nn import GatedOutput
from jaxformers.nn.mixers import LRU
from jaxformers.nn.mixers import S4D
from jaxformers.nn.mixers import S5
from jaxformers.ops import linear_recurrence
from jaxformers.ops import normal_legs

B, L, D = 2, 7, 4
PLAIN = GatedOutput(gate='none', activation='identity')
X = np.random.default_rng(0).normal(size=(B, L, D)).astype(np.float32)


def made(mixer, width=D):
  x_BLD = jnp.zeros((1, 1, width))
  return jax.jit(mixer.init)(jax.random.key(0), x_BLD)['params']


def run(mixer, params, x=X):
  return mixer.apply({'params': params}, jnp.asarray(x))[0]


def looped(params, decay, gain, factor=1):
  """A diagonal system in complex128, step by step."""
  b, c = params['in_NDS'], params['out_NSD']
  b, c = (np.asarray(x[0]) + 1j * np.asarray(x[1]) for x in (b, c))
  state, outputs = np.zeros((B, len(decay)), complex), []
  for t in range(L):
    state = decay * state + X[:, t] @ (b * gain)
    outputs.append(factor * (state @ c).real + params['skip_D'] * X[:, t])
  return np.stack(outputs, axis=1)


def test_lru_is_its_recurrence():
  mixer = LRU(state_size=3, output=PLAIN)
  params = made(mixer)
  nu, theta, gamma = (
    np.asarray(params[name], np.float64)
    for name in ('nu_S', 'theta_S', 'gamma_S')
  )
  decay = np.exp(-np.exp(nu) + 1j * np.exp(theta))
  expected = looped(params, decay, np.exp(gamma))
  np.testing.assert_allclose(run(mixer, params), expected, rtol=1e-4, atol=1e-5)


def test_lru_begins_on_its_ring_with_states_of_equal_size():
  params = made(LRU(state_size=2000, r_min=0.4, r_max=0.9, max_phase=1.0), 1)
  size = np.exp(-np.exp(params['nu_S']))
  assert 0.4 <= size.min() < 0.41 < 0.89 < size.max() <= 0.9
  # Uniform in area: half of the numbers are beyond the root mean square radius.
  assert abs(np.mean(size**2 > (0.4**2 + 0.9**2) / 2) - 0.5) < 0.05
  assert 0 < np.exp(params['theta_S']).max() <= 1
  near = made(LRU(state_size=2, r_min=0.9 - 1e-6, r_max=0.9), 1)
  np.testing.assert_allclose(near['nu_S'], -2.2503673, rtol=1e-5)
  np.testing.assert_allclose(np.exp(near['gamma_S']), 0.4358899, rtol=1e-5)
  # White noise of variance 1, times gamma, gives states of variance 1.
  noise = jax.random.normal(jax.random.key(1), (4, 50000, 8))
  decay_S = jnp.asarray(size[:8])
  gain_S = jnp.exp(params['gamma_S'][:8])
  states = jax.jit(linear_recurrence)(decay_S, noise * gain_S).states
  np.testing.assert_allclose(np.var(states, axis=(0, 1)), 1, atol=0.03)


def test_a_real_lru_can_be_a_moving_average():
  mixer = LRU(state_size=1, is_real=True, output=PLAIN)
  params = {
    'nu_S': jnp.log(-jnp.log(jnp.array([0.8]))),
    'gamma_S': jnp.log(jnp.array([0.2])),
    'in_DS': jnp.ones((1, 1)),
    'out_SD': jnp.ones((1, 1)),
    'skip_D': jnp.zeros(1),
  }
  assert jax.tree.map(jnp.shape, made(mixer, 1)) == jax.tree.map(
    jnp.shape, params
  )
  average, expected = 0.0, []
  for x in X[0, :, 0]:
    average = 0.8 * average + 0.2 * x
    expected.append(average)
  actual = run(mixer, params, X[:1, :, :1])
  np.testing.assert_allclose(actual[0, :, 0], expected, rtol=1e-5, atol=1e-6)


def test_s5_is_its_recurrence():
  mixer = S5(state_size=8, blocks=2, output=PLAIN)
  params = made(mixer)
  a = np.asarray(params['a_re_S']) + 1j * np.asarray(params['a_im_S'])
  step = np.exp(np.asarray(params['step_S'], np.float64))
  assert ((step > 1e-3) & (step < 1e-1)).all()
  decay, gain = np.exp(a * step), np.expm1(a * step) / a
  actual = run(mixer, params)
  np.testing.assert_allclose(
    actual, looped(params, decay, gain, 2), rtol=1e-4, atol=1e-5
  )
  longer = run(mixer.clone(step_rescale=2.0), params)
  stepped = {**params, 'step_S': params['step_S'] + np.log(2)}
  np.testing.assert_allclose(longer, run(mixer, stepped), rtol=1e-4, atol=1e-6)
  half = a * step / 2
  trapezoidal = looped(params, (1 + half) / (1 - half), step / (1 - half), 2)
  mixer = mixer.clone(discretization='bilinear')
  np.testing.assert_allclose(
    run(mixer, params), trapezoidal, rtol=1e-4, atol=1e-5
  )


def test_s5_begins_with_blocks_of_legs():
  size, blocks, width = 64, 4, 50
  params = made(S5(state_size=size, blocks=blocks), width)
  legs = normal_legs(size // blocks)
  half = size // blocks // 2
  expected = np.tile(legs.eigenvalues_S[:half], blocks)
  a = np.asarray(params['a_re_S']) + 1j * np.asarray(params['a_im_S'])
  np.testing.assert_allclose(a, expected, rtol=1e-5)
  vectors = legs.vectors_NS[:, :half]
  b = np.asarray(params['in_NDS'][0]) + 1j * np.asarray(params['in_NDS'][1])
  b = b.reshape(width, blocks, half)
  # Back from the basis of eigenvectors, B is real with variance 1 / size.
  real = 2 * np.einsum('RS,DXS->DXR', vectors, b).real
  np.testing.assert_allclose(
    np.einsum('RS,DXR->DXS', vectors.conj(), real), b, atol=1e-5
  )
  np.testing.assert_allclose(real.std(), size**-0.5, rtol=0.05)


@pytest.mark.parametrize(
  ('readout', 'variance'),
  [
    ('trunc_standard_normal', 1 / 64),
    ('lecun_normal', 1 / 64 / 50),
    ('complex_normal', 1 / 2),
  ],
)
def test_s5_reads_out_with_the_variance_of_the_published_code(
  readout, variance
):
  params = made(S5(state_size=64, blocks=4, readout=readout), 50)
  assert params['out_NSD'].shape == (2, 32, 50)
  # A unitary map keeps the variance of complex numbers.
  assert 0.93 < params['out_NSD'].var() / variance < 1.07


def test_half_of_the_modes_stands_for_conjugate_pairs():
  mixer = S5(state_size=8, blocks=1, output=PLAIN)
  params = made(mixer)
  both = lambda x: jnp.concatenate([x, x])
  signs = jnp.array([1.0, -1.0])
  pairs = {
    'a_re_S': both(params['a_re_S']),
    'a_im_S': jnp.concatenate([params['a_im_S'], -params['a_im_S']]),
    'step_S': both(params['step_S']),
    'in_NDS': jnp.concatenate(
      [params['in_NDS'], signs[:, None, None] * params['in_NDS']], axis=2
    ),
    'out_NSD': jnp.concatenate(
      [params['out_NSD'], signs[:, None, None] * params['out_NSD']], axis=1
    ),
    'skip_D': params['skip_D'],
  }
  whole = mixer.clone(conj_sym=False)
  np.testing.assert_allclose(
    run(whole, pairs), run(mixer, params), rtol=1e-4, atol=1e-5
  )


def test_one_block_and_one_channel_of_s5_are_s4d_with_legs():
  theirs = made(S4D(state_size=8, start='legs', output=PLAIN), 1)
  first = made(S5(state_size=8, blocks=1, output=PLAIN), 1)
  params = {
    'a_re_S': -jnp.exp(theirs['log_rate_DS'][0]),
    'a_im_S': theirs['frequency_DS'][0],
    'step_S': jnp.repeat(theirs['log_step_D'], 4),
    'in_NDS': jnp.stack([theirs['input_re_DS'], theirs['input_im_DS']]),
    'out_NSD': jnp.stack(
      [theirs['readout_re_DS'].T, theirs['readout_im_DS'].T]
    ),
    'skip_D': theirs['skip_D'],
  }
  assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, params)
  for name in ('a_re_S', 'a_im_S'):
    np.testing.assert_allclose(first[name], params[name], rtol=1e-6)
  for rule in ('zoh', 'bilinear'):
    s5 = S5(state_size=8, blocks=1, discretization=rule, output=PLAIN)
    s4d = S4D(state_size=8, start='legs', discretization=rule, output=PLAIN)
    x = X[..., :1]
    expected = run(s4d, theirs, x)
    np.testing.assert_allclose(
      run(s5, params, x), expected, rtol=1e-4, atol=1e-5
    )


BOTH_WAYS = (
  (S5(state_size=8, blocks=2, bidirectional=True, output=PLAIN), 'NSD'),
  (LRU(state_size=3, bidirectional=True, output=PLAIN), 'NSD'),
  (LRU(state_size=3, bidirectional=True, is_real=True, output=PLAIN), 'SD'),
)


@pytest.mark.parametrize(('mixer', 'letters'), BOTH_WAYS)
def test_both_directions_are_each_others_mirror(mixer, letters):
  params = made(mixer)
  out, back = f'out_{letters}', f'back_{letters}'
  swapped = {**params, out: params[back], back: params[out]}
  mirrored = run(mixer, swapped, X[:, ::-1])[:, ::-1]
  np.testing.assert_allclose(run(mixer, params), mirrored, rtol=1e-4, atol=1e-5)


def test_clipped_eigenvalues_do_not_grow():
  mixer = S5(state_size=8, blocks=2, output=PLAIN)
  params = made(mixer)
  growing = {**params, 'a_re_S': jnp.full(4, 3.0)}
  least = {**params, 'a_re_S': jnp.full(4, -1e-4)}
  clipped = run(mixer.clone(clip_eigs=True), growing)
  np.testing.assert_allclose(clipped, run(mixer, least))
  assert np.abs(run(mixer, growing) - clipped).max() > 1e-3


def test_layers_that_cannot_be_are_refused():
  for mixer, message in (
    (LRU(state_size=0), 'state_size >= 1, got 0'),
    (LRU(state_size=4, r_min=0.9, r_max=0.5), '0 <= r_min < r_max <= 1'),
    (S5(state_size=10, blocks=2), 'blocks of pairs; choose a multiple of 4'),
    (S5(step_min=0.1, step_max=0.01), '0 < step_min < step_max'),
    (S5(readout='lecun'), "unknown readout 'lecun'"),
    (S5(discretization='euler'), "unknown discretisation 'euler'"),
  ):
    with pytest.raises(ValueError, match=message):
      mixer.init(jax.random.key(0), jnp.zeros((1, 1, 4)))
