"""The selective scan, against a NumPy loop, hand-made numbers and a kernel."""

import functools

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from jaxformers.ops import selective_recurrence
from jaxformers.ops.recurrence import selective_tpu
from jaxformers.ops.segments import advance
from jaxformers.ops.segments import start

B, L, E, S, G = 2, 7, 4, 3, 2
METHODS = {'fused': 3, 'chunked': 3, 'associative': None, 'sequential': None}
rng = np.random.default_rng(0)
X = rng.normal(size=(B, L, E))
STEP = rng.normal(size=(B, L, E))
A = -np.exp(rng.normal(size=(E, S)))
ROTATING = A + 1j * rng.normal(size=(E, S))
PER_TOKEN = rng.normal(size=(2, B, L, S))
GROUPED = rng.normal(size=(2, B, L, G, S))
CONSTANT = rng.normal(size=(2, E, S)) + 1j * rng.normal(size=(2, E, S))
SKIP, BIAS = rng.normal(size=(2, E))
INITIAL = rng.normal(size=(B, S, E))
SEGMENTS = np.array([[1, 1, 0, 1, 3, 3, 3], [0, 2, 2, 0, 0, 5, 0]])


def per_channel(z):
  """Returns `[B, L, E, S]`, whatever shape b or c has."""
  if z.ndim == 2:
    return np.broadcast_to(z, (B, L, E, S))
  z = z[:, :, None] if z.ndim == 3 else z
  return np.repeat(z, E // z.shape[2], axis=2)


def looped(a, b, c, initial, discretization='euler', segments=None):
  """The definition, token by token."""
  step = np.log1p(np.exp(STEP + BIAS))
  b, c = per_channel(b), per_channel(c)
  out = np.zeros((B, L, E))
  last = np.zeros((B, E, S), np.result_type(a, initial))
  for row in range(B):
    state, before = initial[row].T, None
    for i in range(L):
      segment = 1 if segments is None else segments[row, i]
      if segment == 0:
        continue
      if segments is not None and segment != before:
        state = np.zeros_like(state)
      before = segment
      t = step[row, i, :, None]
      gain = t if discretization == 'euler' else (np.exp(t * a) - 1) / a
      state = np.exp(t * a) * state + gain * b[row, i] * X[row, i, :, None]
      y = (c[row, i] * state).sum(axis=1)
      y = 2 * y.real if np.iscomplexobj(a) else y
      out[row, i] = y + SKIP * X[row, i]
    last[row] = state
  return out, last.swapaxes(1, 2)


@functools.partial(
  jax.jit, static_argnames=('discretization', 'method', 'chunk')
)
def select(x, step, a, b, c, initial, places=None, **options):
  return selective_recurrence(
    x,
    step,
    a,
    b,
    c,
    jnp.asarray(SKIP),
    initial,
    step_bias_E=jnp.asarray(BIAS),
    softplus=True,
    places=places,
    **options,
  )


def agree(actual, expected):
  for one, other in zip(actual, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('discretization', ['euler', 'zoh'])
@pytest.mark.parametrize('method', METHODS)
def test_any_method_equals_the_loop(method, discretization):
  options = {'discretization': discretization, 'method': method}
  with jax.enable_x64(True):
    for a, (b, c) in ((A, PER_TOKEN), (A, GROUPED), (ROTATING, CONSTANT)):
      actual = select(
        X, STEP, a, b, c, INITIAL, chunk=METHODS[method], **options
      )
      agree(actual, looped(a, b, c, INITIAL, discretization))


@pytest.mark.parametrize('method', METHODS)
def test_segments_start_anew_and_padding_may_hold_anything(method):
  b, c = PER_TOKEN
  expected, expected_last = looped(A, b, c, INITIAL, segments=SEGMENTS)
  with jax.enable_x64(True):
    places, _ = advance(start(B), jnp.asarray(SEGMENTS))
    is_token = SEGMENTS != 0
    tokens = [np.where(is_token[..., None], z, np.nan) for z in (X, STEP, b, c)]
    x, step, b, c = tokens
    out, last = select(
      x, step, A, b, c, INITIAL, places, method=method, chunk=METHODS[method]
    )
  assert np.isfinite(out).all()
  agree((out[is_token], last), (expected[is_token], expected_last))


def test_pieces_with_a_carried_state_give_the_whole():
  b, c = GROUPED
  expected, expected_last = looped(A, b, c, INITIAL)
  with jax.enable_x64(True):
    state, outputs, begin = INITIAL, [], 0
    for length in (1, 4, 2):
      piece = slice(begin, begin + length)
      out, state = select(
        X[:, piece], STEP[:, piece], A, b[:, piece], c[:, piece], state, chunk=3
      )
      outputs.append(out)
      begin += length
  agree((np.concatenate(outputs, 1), state), (expected, expected_last))


def test_gradients_are_those_of_finite_differences_and_of_any_method():
  b, c = GROUPED
  with jax.enable_x64(True):
    arrays = [jnp.asarray(z) for z in (X, STEP, A, b, c, INITIAL)]
    places, _ = advance(start(B), jnp.asarray(SEGMENTS))

    def loss(*arrays, method):
      out, last = select(*arrays, places, method=method, chunk=METHODS[method])
      return jnp.sin(out).sum() + jnp.cos(last).sum()

    fused = functools.partial(loss, method='fused')
    check_grads(jax.jit(fused), arrays, order=1, modes=('fwd', 'rev'))
    gradient = jax.jit(
      jax.grad(loss, argnums=range(6)), static_argnames='method'
    )
    expected = gradient(*arrays, method='fused')
    for method in ('chunked', 'sequential'):
      agree(gradient(*arrays, method=method), expected)


@pytest.mark.parametrize('discretization', ['euler', 'zoh'])
def test_the_kernels_for_tpus_compute_the_same(discretization, monkeypatch):
  # Blocks of 8 tokens and 128 channels, of which there are several.
  monkeypatch.setattr(selective_tpu, 'NUMBERS', 8 * 3 * 128)
  monkeypatch.setattr(selective_tpu, 'LANES', 128)
  draw = np.random.default_rng(1).normal
  length, channels = 19, 260
  shapes = (
    (B, length, channels),
    (channels, S),
    (B, length, 2, S),
    (B, S, channels),
  )
  x, step, rate, b, c, initial = (
    jnp.asarray(draw(size=shapes[i]), jnp.float32) for i in (0, 0, 1, 2, 2, 3)
  )
  arrays = x, step, -jnp.exp(rate).at[0, 0].set(0), b, c, initial
  number_BL = np.ones((B, length), int)
  number_BL[0, 9:12], number_BL[1, 4:], number_BL[1, 17:] = 0, 7, 0
  places, _ = advance(start(B), jnp.asarray(number_BL))

  def loss(*arrays, places, method):
    *arrays, initial = arrays
    out, last = selective_recurrence(
      *arrays,
      None,
      initial,
      softplus=True,
      places=places,
      discretization=discretization,
      method=method,
    )
    return jnp.sin(out).sum() + jnp.cos(last).sum(), (out, last)

  run = jax.jit(
    jax.value_and_grad(loss, range(6), has_aux=True), static_argnames='method'
  )
  for packing in (None, places):
    expected = run(*arrays, places=packing, method='sequential')
    actual = run(*arrays, places=packing, method='pallas')
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4),
      actual,
      expected,
    )


def test_a_few_steps_by_hand():
  ones = jnp.ones((1, 3, 1))
  run = functools.partial(
    selective_recurrence,
    ones * jnp.array([1.0, 2.0, -1.0])[:, None],
    ones * jnp.array([0.1, 0.2, 0.3])[:, None],
    jnp.array([[-1.0, -2.0]]),
    jnp.array([[[1.0, 1.0], [1.0, 0.0], [0.5, 0.5]]]),
    jnp.array([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]]),
  )
  out, last = run()
  np.testing.assert_allclose(
    out[0, :, 0], [0.1, 0.067032, 0.093768], rtol=0, atol=1e-6
  )
  np.testing.assert_allclose(
    last[0, :, 0], [0.206980, -0.113212], rtol=0, atol=1e-6
  )
  # (1 - exp(-0.1)) for a = -1.
  exact, _ = run(discretization='zoh')
  np.testing.assert_allclose(exact[0, 0, 0], 0.0951626, rtol=1e-6)


def test_constant_systems_are_convolutions():
  step, (b, c) = 0.1, np.real(CONSTANT)
  out, _ = selective_recurrence(
    jnp.asarray(X), jnp.full((B, L, E), step), A, jnp.asarray(b), jnp.asarray(c)
  )
  lag = np.arange(L)[:, None, None]
  kernel_LE = (c * np.exp(lag * step * A) * step * b).sum(-1)
  expected = [
    [
      np.convolve(X[row, :, e], kernel_LE[:, e])[:L] for e in range(E)
    ]
    for row in range(B)
  ]  # fmt: skip
  np.testing.assert_allclose(
    out, np.swapaxes(expected, 1, 2), rtol=1e-4, atol=1e-5
  )


def test_steps_gate_between_freezing_and_forgetting():
  b, c = PER_TOKEN
  run = lambda step: selective_recurrence(
    jnp.asarray(X), jnp.full((B, L, E), step), A, b, c, None, INITIAL
  )
  np.testing.assert_array_equal(run(0.0).last_BSE, INITIAL.astype('float32'))
  far = run(1e4).last_BSE
  newest = 1e4 * b[:, -1, :, None] * X[:, -1, None]
  np.testing.assert_allclose(far, newest, rtol=1e-4)
  # A rate of 0 integrates under either rule.
  still = selective_recurrence(
    jnp.asarray(X), jnp.full((B, L, E), 0.1), 0 * A, b, c, discretization='zoh'
  )
  total = 0.1 * np.einsum('ble,bls->bse', X, b)
  np.testing.assert_allclose(still.last_BSE, total, rtol=1e-4, atol=1e-5)


def test_the_output_has_the_dtype_of_the_input_and_the_state_more():
  x = jnp.asarray(X, jnp.bfloat16)
  out, last = selective_recurrence(x, x, A, *PER_TOKEN, softplus=True)
  assert (out.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)


def test_what_does_not_fit_is_refused():
  b, c = PER_TOKEN
  run = functools.partial(selective_recurrence, X, STEP)
  with pytest.raises(ValueError, match=r'a must be \[channels, states\]'):
    run(A[1:], b, c)
  with pytest.raises(ValueError, match=r'c must be \[4, 3\] \(constant\)'):
    run(A, b, c[:, 1:])
  with pytest.raises(ValueError, match='must divide 4 channels'):
    run(A, np.zeros((B, L, 3, S)), c)
  with pytest.raises(ValueError, match='a must be complex too'):
    run(A, b, CONSTANT[0])
  with pytest.raises(ValueError, match=r'skip must be \[4\]'):
    run(A, b, c, SKIP[1:])
  with pytest.raises(ValueError, match=r'state must be \[2, 3, 4\]'):
    run(A, b, c, None, INITIAL[:1])
  with pytest.raises(ValueError, match="'bilinear'"):
    run(A, b, c, discretization='bilinear')
  with pytest.raises(ValueError, match='chunk=4 needs'):
    run(A, b, c, method='associative', chunk=4)
  with pytest.raises(ValueError, match=r'got float32, b \[4, 3\]'):
    run(A, np.real(CONSTANT[0]), c, method='pallas')
  with pytest.raises(ValueError, match='got complex64'):
    run(ROTATING, b, c, method='pallas')
  with pytest.raises(ValueError, match='at least one token'):
    selective_recurrence(X[:, :0], STEP[:, :0], A, b, c)
