"""S4, S4D and RTF, against powers of dense matrices in float64."""

import functools

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from jaxformers.ops import Modes
from jaxformers.ops import check_decay
from jaxformers.ops import discretize
from jaxformers.ops import lti_convolution
from jaxformers.ops import mode_kernel
from jaxformers.ops import rational
from jaxformers.ops import segments
from jaxformers.ops import state_spaces
from jaxformers.ops.recurrence import kernel_convolution

D = 3
STEP = np.array([1e-3, 1e-2, 1e-1])
rng = np.random.default_rng(0)


def near(actual, expected, tolerance=1e-12):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def hippo(measure, size, window=1.0):
  """A and B entry by entry."""
  a, b = np.zeros((size, size)), np.zeros(size)
  for n in range(size):
    for k in range(size):
      root = np.sqrt((2 * n + 1) * (2 * k + 1))
      if measure == 'legs':
        a[n, k] = -root if k < n else -(n + 1) * (k == n)
      elif measure == 'legt':
        a[n, k] = -root / window * (1 if k < n else (-1) ** (n - k))
      elif measure == 'lagt':
        a[n, k] = 0.5 * (n == k) - (k <= n)
      else:
        basis = lambda i: 0 if i % 2 else (1 if i == 0 else np.sqrt(2))
        a[n, k] = -2 / window * basis(n) * basis(k)
        if n // 2 == k // 2 and n != k:
          a[n, k] += (1 if n > k else -1) * 2 * np.pi * (n // 2) / window
    b[n] = {
      'legs': np.sqrt(2 * n + 1),
      'legt': np.sqrt(2 * n + 1) / window,
      'lagt': 1,
      'fourier': 2 / window * (0 if n % 2 else np.sqrt(2) if n else 1),
    }[measure]
  return a, b


def both(x, axis=-1):
  return np.concatenate([x, np.conj(x)], axis=axis)


@pytest.mark.parametrize('measure', ['legs', 'legt', 'fourier', 'lagt'])
def test_a_normal_form_is_the_matrix_of_its_measure(measure):
  window = 2.0 if measure in ('legt', 'fourier') else 1.0
  for size in (2, 16):
    form = state_spaces.normal_form(measure, size, window=window)
    v = both(form.vectors_NS)
    near(v @ v.conj().T, np.eye(size))
    low_rank = both(form.low_rank_SR, axis=0)
    matrix = np.diag(both(form.eigenvalues_S)) - low_rank @ low_rank.conj().T
    a, b = hippo(measure, size, window)
    near(v @ matrix @ v.conj().T, a, 1e-10)
    near(v @ both(form.input_S), b, 1e-10)
    assert (form.eigenvalues_S.imag <= 0).all()


def test_the_first_values_of_the_diagonal_inits():
  imaginary = lambda init, size: state_spaces.diagonal_form(init, size)[0].imag
  near(imaginary('inv', 4), [3.8197, 0.4244], 1e-4)
  near(imaginary('inv', 64)[:2], [1283.4255, 414.2273], 1e-7)
  near(imaginary('quad', 4), np.array([1, 9]) / np.pi)
  near(imaginary('legs', 4), [-4.6033, -0.5565], 1e-4)
  assert imaginary('legs', 64).min() == pytest.approx(-1303.27, abs=0.01)
  assert imaginary('legs', 16).min() == pytest.approx(-80.97, abs=0.01)
  eigenvalues, inputs = state_spaces.diagonal_form('real', 6)
  assert (eigenvalues == [-1, -2, -3]).all()
  assert (inputs == 1).all()


def test_the_kernel_of_lin_by_hand():
  eigenvalues, inputs = state_spaces.diagonal_form('lin', 4)
  with jax.enable_x64(True):
    decay, gain = discretize(eigenvalues, 0.1)
    ones = jnp.ones((1, 2), complex)
    modes = Modes(decay[None], (gain * inputs)[None], 2 * ones)
    kernel = mode_kernel(modes, 4)
  near(kernel[0], [0.3870112, 0.3503412, 0.3009850, 0.2440202], 1e-7)


def test_a_small_step_gives_the_continuous_kernel():
  eigenvalues, inputs = state_spaces.diagonal_form('inv', 8)
  step, length = 1e-4, 2000
  with jax.enable_x64(True):
    for method in ('zoh', 'bilinear'):
      decay, gain = discretize(eigenvalues, step, method)
      write = gain * inputs / step
      kernel = mode_kernel(
        Modes(decay[None], write[None], jnp.ones((1, 4), complex)), length
      )
      time = step * (np.arange(length) + 0.5)
      waves = np.exp(time[:, None] * eigenvalues).sum(axis=1).real
      # Of order dt^2 in the middle of each step.
      near(kernel[0], waves, 2e-6)


def test_modes_beyond_the_band_are_silent():
  eigenvalues = jnp.array([[-0.5 + 1j, -0.5 + 3j, -0.5 - 4j]])
  modes = Modes(*[jnp.ones((1, 3), jnp.complex64)] * 3)
  limited = state_spaces.bandlimited(modes, eigenvalues, 1.0, 1.0)
  assert limited.readout.tolist() == [[1, 1, 0]]


def system_of(measure, size, seed=0):
  """A system with one copy per channel, and its dense bilinear steps."""
  form = state_spaces.normal_form(measure, size)
  draw = np.random.default_rng(seed)
  readout = draw.normal(size=(D, size // 2)) + 1j * draw.normal(
    size=(D, size // 2)
  )
  a, b = hippo(measure, size)
  c = (both(readout) @ both(form.vectors_NS).conj().T).real
  eye = np.eye(size)
  abar = np.stack(
    [np.linalg.solve(eye - s / 2 * a, eye + s / 2 * a) for s in STEP]
  )
  bbar = np.stack([np.linalg.solve(eye - s / 2 * a, s * b) for s in STEP])
  shared = [np.broadcast_to(x, (D, *x.shape)) for x in form[:3]]
  return state_spaces.LowRankSystem(*shared, readout), (abar, bbar, c)


def kernel_by_powers(abar, bbar, c, length):
  kernel, x = np.zeros((D, length)), bbar
  for k in range(length):
    kernel[:, k] = np.sum(c * x, axis=1)
    x = np.einsum('dnm,dm->dn', abar, x)
  return kernel


@functools.partial(jax.jit, static_argnums=2)
def truncated_kernel(system, step, length):
  matrix = state_spaces.s4_matrix(system, step)
  row = state_spaces.truncate_readout(
    state_spaces.real_readout(system.readout_S), matrix, length
  )
  again = state_spaces.recover_readout(row, matrix, length)
  doubled = state_spaces.double_readout(row, matrix, length)
  kernels = [
    state_spaces.s4_kernel(
      system._replace(readout_S=state_spaces.complex_readout(r)), step, n
    )
    for r, n in ((row, length), (doubled, 2 * length))
  ]
  return *kernels, state_spaces.complex_readout(again), matrix


@pytest.mark.parametrize(
  ('measure', 'length'),
  [('legs', 64), ('lagt', 65), ('legt', 33), ('fourier', 32)],
)
def test_the_kernel_of_s4_is_that_of_powers(measure, length):
  system, dense = system_of(measure, 16)
  expected = kernel_by_powers(*dense, 2 * length)
  with jax.enable_x64(True):
    kernel, doubled, readout, matrix = truncated_kernel(
      jax.tree.map(jnp.asarray, system), jnp.asarray(STEP), length
    )
  near(kernel, expected[:, :length])
  near(doubled, expected, 1e-11)
  # A state that is never written has no readout to be recovered.
  assert np.isnan(readout).any() == (measure == 'fourier')
  if measure != 'fourier':
    near(readout, system.readout_S, 1e-9)
  # Both matrices have the same eigenvalues, in other bases.
  assert matrix.shape == dense[0].shape
  near(np.trace(matrix, axis1=1, axis2=2), np.trace(dense[0], axis1=1, axis2=2))
  single = jax.tree.map(lambda x: jnp.asarray(x, jnp.complex64), system)
  kernel = truncated_kernel(single, jnp.asarray(STEP, jnp.float32), length)[0]
  assert np.abs(kernel - expected[:, :length]).max() < 1e-5


def test_gradients_at_an_eigenvalue_of_0_are_those_of_finite_differences():
  system, _ = system_of('fourier', 4)

  def kernel(low_rank, readout):
    low_rank = system.low_rank_SR * low_rank
    # What is written stays along P.
    changed = system._replace(
      low_rank_SR=low_rank,
      input_S=low_rank[..., 0],
      readout_S=jax.lax.complex(*readout),
    )
    return state_spaces.s4_kernel(changed, jnp.asarray(STEP), 6)

  with jax.enable_x64(True):
    point = jnp.ones((D, 2, 1)), jnp.asarray(rng.normal(size=(2, D, 2)))
    check_grads(jax.jit(kernel), point, order=1, modes=('rev',))


@pytest.mark.parametrize('measure', ['legs', 'legt'])
def test_steps_of_s4_convolve_with_its_kernel(measure):
  length, batch, size = 12, 2, 8
  system, dense = system_of(measure, size)
  x = rng.normal(size=(batch, length, D))
  kernel = kernel_by_powers(*dense, length)
  segments_BL = np.array([[1] * 12, [2, 2, 0, 0, 2, 3, 3, 3, 0, 3, 3, 3]])
  zero = np.zeros((batch, D, size // 2), complex)
  with jax.enable_x64(True):
    run = jax.jit(state_spaces.s4_convolution)
    out, last = run(x, system, STEP, zero)
    near(out, kernel_convolution(x, kernel), 1e-11)
    first, state = run(x[:, :5], system, STEP, zero)
    second, again = run(x[:, 5:], system, STEP, state)
    near(np.concatenate([first, second], axis=1), out)
    near(again, last)
    places, _ = segments.advance(segments.start(batch), segments_BL)
    packed, _ = run(x, system, STEP, zero, places=places)
    near(packed[0], out[0])
    for segment in (2, 3):
      own = segments_BL[1] == segment
      near(packed[1, own], run(x[1:, own], system, STEP, zero[1:])[0][0])


def test_steps_of_legs_with_two_states_by_hand():
  system, (abar, bbar, _) = system_of('legs', 2)
  near(abar[2], [[0.904762, 0], [-0.149961, 0.818182]], 1e-5)
  near(bbar[2], [0.095238, 0.149961], 1e-5)
  form = state_spaces.normal_form('legs', 2)
  with jax.enable_x64(True):
    x = np.zeros((1, 2, D))
    x[:, 0] = 1
    zero = np.zeros((1, D, 1), complex)
    _, state = state_spaces.s4_convolution(x[:, :1], system, STEP, zero)
    _, later = state_spaces.s4_convolution(x, system, STEP, zero)
  original = lambda z: both(np.asarray(z[0, 2])) @ both(form.vectors_NS).T
  near(original(state).real, bbar[2])
  near(original(later).real, abar[2] @ bbar[2])


RTF = np.array([[-0.5, 0.2, -0.1, 0.05]]), np.array([[1, 0.5, -0.3, 0.2]])


def test_the_rational_kernel_is_that_of_its_companion():
  denominator, numerator = RTF
  length = 16
  with jax.enable_x64(True):
    kernel = rational.rtf_kernel(numerator, denominator, length)
    near(kernel[0, :4], [0.999994, 0.999999, -0.000003, 0.099998], 1e-6)
    matrix = rational.rtf_matrix(jnp.asarray(denominator))
    readout = rational.rtf_readout(numerator, jnp.asarray(denominator), length)
    again = state_spaces.truncate_readout(readout, matrix, length)
    doubled = state_spaces.double_readout(numerator, matrix, length)
    longer = rational.rtf_kernel(doubled, denominator, 2 * length)
    x = rng.normal(size=(2, length, 1))
    zero = np.zeros((2, 1, 4))
    run = jax.jit(rational.rtf_convolution)
    out, _ = run(x, readout, denominator, zero)
    delayed, _ = run(x, readout, denominator, zero, feedthrough_D=np.ones(1))
    near(out, kernel_convolution(x, kernel))
  kernel, longer, out, delayed, readout, matrix = map(
    np.asarray, (kernel, longer, out, delayed, readout, matrix)
  )
  near(again, numerator)
  near(longer[:, :length], kernel)
  near(delayed[:, 0], x[:, 0])
  near(delayed[:, 1:], x[:, 1:] + out[:, :-1])
  powers, state, c = [], np.eye(4)[0], readout[0]
  for _ in range(length):
    powers.append(c @ state)
    state = matrix[0] @ state
  near(kernel[0], powers, 1e-14)


def test_poles_tell_whether_a_rational_kernel_grows():
  # (z - 2) (z - 0.5) and (z - 0.9 i) (z + 0.9 i).
  poles = rational.rtf_poles(np.array([[-2.5, 1.0], [0.0, 0.81]], np.float32))
  near(np.sort(abs(poles)), [[0.5, 2], [0.9, 0.9]], 1e-6)
  check_decay(poles[1])
  with pytest.raises(ValueError, match=r'the first with \|decay\| = 2'):
    check_decay(poles[0])


def test_one_pole_makes_a_geometric_kernel():
  with jax.enable_x64(True):
    kernel = rational.rtf_kernel(np.array([[2.0]]), np.array([[-0.9]]), 8)
  near(kernel[0], 2 * 0.9 ** np.arange(8) / (1 - 0.9**8))


def test_descent_finds_a_delay_of_as_many_steps_as_there_are_states():
  length, states = 32, 8
  x = jnp.asarray(rng.normal(size=(4, length, 1)), jnp.float32)
  target = jnp.pad(x, ((0, 0), (states - 1, 0), (0, 0)))[:, :length]
  denominator = jnp.zeros((1, states))

  def loss(numerator):
    kernel = rational.rtf_kernel(numerator, denominator, length)
    return jnp.mean((kernel_convolution(x, kernel) - target) ** 2)

  def step(numerator, _):
    return numerator - 0.4 * jax.grad(loss)(numerator), None

  start = jnp.zeros((1, states))
  numerator, _ = jax.jit(lambda b: jax.lax.scan(step, b, length=200))(start)
  assert loss(numerator) ** 0.5 < 1e-3


def test_a_diagonal_system_is_s4_without_its_low_rank():
  system, _ = system_of('legs', 8)
  length = 9
  x = rng.normal(size=(1, length, D))
  none = system._replace(low_rank_SR=0 * system.low_rank_SR)
  zero = np.zeros((1, D, 4), complex)
  with jax.enable_x64(True):
    decay, gain = discretize(none.eigenvalues_S, STEP[:, None], 'bilinear')
    modes = Modes(decay, gain * none.input_S, 2 * none.readout_S)
    expected = lti_convolution(jnp.asarray(x), modes)
    out, last = state_spaces.s4_convolution(jnp.asarray(x), none, STEP, zero)
  near(out, expected.out)
  near(last, expected.last)


def test_what_does_not_fit_is_said():
  for match, function in (
    ("did you mean 'legs'", lambda: state_spaces.normal_form('legss', 4)),
    ("did you mean 'lin'", lambda: state_spaces.diagonal_form('linear', 4)),
    ('must be even', lambda: state_spaces.diagonal_form('lin', 3)),
    ('longer than', lambda: rational.rtf_kernel(*RTF, 4)),
    ('longer than', lambda: rational.rtf_readout(*RTF[::-1], 4)),
  ):
    with pytest.raises(ValueError, match=match):
      function()
