"""Memories over sequences, against the closed form and loops in NumPy."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

from jaxformers.ops import ApproximateLegS
from jaxformers.ops import ConstantDynamics
from jaxformers.ops import ExactLegS
from jaxformers.ops import FouS
from jaxformers.ops import FouT
from jaxformers.ops import LegS
from jaxformers.ops import LegT
from jaxformers.ops import MemoryState
from jaxformers.ops import dynamics_of
from jaxformers.ops import hippo_memory
from jaxformers.ops import legs_projection
from jaxformers.ops import legs_transition
from jaxformers.ops.hippo.dynamics import LegSScheme
from jaxformers.ops.hippo.memory import MemoryMethod
from jaxformers.ops.segments import advance
from jaxformers.ops.segments import start

B, L, D, S, C = 2, 11, 2, 5, 4
METHODS = get_args(MemoryMethod)
U = np.random.default_rng(0).normal(size=(B, L, D))


@functools.partial(
  jax.jit, static_argnums=1, static_argnames=('method', 'chunk')
)
def run(u, dynamics, initial=None, places=None, times=None, **options):
  return hippo_memory(
    u, dynamics, initial, places=places, times_BL=times, **options
  )


def near(actual, expected, tolerance=1e-12):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def projected(u_LD, size):
  """Returns coefficients of the step function of the samples, `[S, D]`."""
  length = len(u_LD)
  node, weight = np.polynomial.legendre.leggauss(size)
  expected = 0
  for j, u_D in enumerate(u_LD):
    s = (2 * j + 1 + node) / length - 1
    basis = np.polynomial.legendre.legvander(s, size - 1)
    integral = weight @ basis / (2 * length)
    expected = expected + integral[:, None] * u_D
  return np.sqrt(2 * np.arange(size) + 1)[:, None] * expected


@pytest.mark.parametrize('method', METHODS)
def test_three_samples_by_hand(method):
  u = jnp.array([1.0, 2.0, 4.0])[None, :, None]
  out = run(u, ExactLegS(3), method=method).out[0, :, :, 0]
  expected = [[1, 0, 0], [1.5, 0.4330127, 0], [2.3333333, 1.1547005, 0.165635]]
  near(out, expected, 1e-6)


@pytest.mark.parametrize(
  ('scheme', 'expected'),
  [
    ('bilinear', [3, 1.732051, 0.106479]),
    ('bilinear_step', [2, 1.443376, 0.202311]),
    ('bilinear_start', [2.6, 1.270171, 0.191663]),
  ],
)
def test_bilinear_schemes_of_other_code_by_hand(scheme, expected):
  u = jnp.array([1.0, 2.0, 4.0])[None, :, None]
  dynamics = ApproximateLegS(3, scheme)
  out = run(u, dynamics, method='sequential').out
  near(out[0, -1, :, 0], expected, 1e-5)


@pytest.mark.parametrize('method', METHODS)
def test_exact_legs_is_the_projection_of_all_samples_in_any_pieces(method):
  expected = np.stack(
    [[projected(U[b, : i + 1], S) for i in range(L)] for b in range(B)]
  )
  with jax.enable_x64(True):
    whole = run(U, ExactLegS(S), method=method, chunk=C)
    near(whole.out, expected)
    state, outputs = None, []
    for piece in np.split(U, (1, 6), axis=1):
      out, state = run(piece, ExactLegS(S), state, method=method, chunk=C)
      outputs.append(out)
    near(np.concatenate(outputs, axis=1), expected)
    near(state.x_BSD, expected[:, -1])
  assert state.elapsed_B.tolist() == [L] * B


@pytest.mark.parametrize('method', METHODS)
def test_samples_of_any_duration_are_as_if_repeated(method):
  times = np.cumsum([[1, 2, 1, 4], [3, 1, 1, 2]], axis=1)
  u = U[:, :4]
  expected = [
    projected(np.repeat(u[b], np.diff(times[b], prepend=0), axis=0), S)
    for b in range(B)
  ]
  with jax.enable_x64(True):
    options = {'times': times / 7.0, 'method': method, 'chunk': 3}
    last = run(u, ExactLegS(S), **options).last
    near(last.x_BSD, expected)
    near(last.elapsed_B, times[:, -1] / 7)
    # Without times, and cut where rows have seen different numbers of samples.
    first = [projected(u[:1, :2].repeat(k, axis=1)[0], S) for k in (1, 3)]
    state = MemoryState(jnp.asarray(first), jnp.array([2, 6]))
    u = np.stack([u[0, :2], u[0, :2]])
    last = run(u, ExactLegS(S), state, method=method).last
  near(last.x_BSD[0], projected(U[0, [0, 1, 0, 1]], S))
  index = [0, 0, 0, 1, 1, 1, 0, 1]
  near(last.x_BSD[1], projected(U[0, index], S))


def scheme_by_algebra(scheme, u, size):
  """Returns the last state, from dense solves in the form of the sources."""
  system, eye = LegS().system(size), np.eye(size)
  a, x = system.a_ST, u[0] * np.eye(size)[0]
  if scheme == 'bilinear_step':
    x = np.linalg.solve(eye - a / 2, system.b_S * u[0])
  for k in range(1, len(u)):
    alpha, beta, gamma = {
      'midpoint': (1 / (2 * k + 1), 1 / (2 * k + 1), 2 / (2 * k + 1)),
      'bilinear_log': (1 / (2 * (k + 1)), 1 / (2 * k), np.log((k + 1) / k)),
      'bilinear': (1 / (2 * (k + 1)), 1 / (2 * k), 1 / k),
      'bilinear_start': (1 / (2 * k), 1 / (2 * k), 1 / k),
      'bilinear_step': (1 / (2 * (k + 1)), 1 / (2 * (k + 1)), 1 / (k + 1)),
      'forward_euler': (0, 1 / k, 1 / k),
      'backward_euler': (1 / (k + 1), 0, 1 / (k + 1)),
    }[scheme]
    right = x + beta * a @ x + gamma * system.b_S * u[k]
    x = np.linalg.solve(eye - alpha * a, right)
  return x


# Errors that the source of the numbers saw with another draw of phases.
SEEN = {
  'midpoint': 9e-4,
  'bilinear_log': 1.2e-3,
  'bilinear': 4.8e-3,
  'bilinear_start': 1.1e-2,
  'bilinear_step': 1.2e-2,
  'backward_euler': 9.7e-2,
  'forward_euler': 1.1e-1,
}


def smooth(length):
  phases = np.random.default_rng(0).uniform(0, 2 * np.pi, 5)
  angle = np.arange(1, 6) * (np.arange(length)[:, None] + 0.5) / length
  return np.sin(2 * np.pi * angle + phases).sum(axis=1)


@pytest.mark.parametrize('scheme', get_args(LegSScheme))
def test_schemes_err_as_the_source_says(scheme):
  size, u = 16, smooth(512)
  last = scheme_by_algebra(scheme, u, 64)
  exact = projected(u[:, None], 64)[:, 0]
  error = np.linalg.norm(last - exact) / np.linalg.norm(exact)
  assert 0.5 * SEEN[scheme] < error < 2 * SEEN[scheme]
  dynamics = ApproximateLegS(size, scheme)
  with jax.enable_x64(True):
    u = u[None, :40, None]
    ours = run(u, dynamics, method='sequential').last.x_BSD
  near(ours[0, :, 0], scheme_by_algebra(scheme, u[0, :, 0], size), 1e-10)


def test_time_stamps_of_hippo_code_are_steps_relative_to_their_end():
  """Bilinear with h / t_1, h = t_1 - t_0, as its cell for irregular data."""
  times = np.array([0.5, 0.7, 2.0, 2.1])
  system, x = LegS().system(S), np.zeros((S, D))
  before = 0.0
  for t, u in zip(times, U[0, :4], strict=True):
    half = (t - before) / t / 2 * system.a_ST
    right = x + half @ x + (t - before) / t * np.outer(system.b_S, u)
    x, before = np.linalg.solve(np.eye(S) - half, right), t
  dynamics = ApproximateLegS(S, 'bilinear_step')
  with jax.enable_x64(True):
    last = run(U[:1, :4], dynamics, times=times[None], method='sequential').last
  near(last.x_BSD[0], x)


def test_exact_steps_from_an_empty_memory_at_time_1_are_off_by_2_percent():
  """What the `zoh` of S4's `visualizations.py` does."""
  u, size = smooth(512)[None, :, None].astype(np.float32), 32
  exact = projected(u[0], size)
  errors = []
  for elapsed in (0, 1):
    state = MemoryState(jnp.zeros((1, size, 1)), jnp.array([elapsed]))
    last = run(u, ExactLegS(size), state).last.x_BSD[0]
    errors.append(np.linalg.norm(last - exact) / np.linalg.norm(exact))
  assert errors[0] < 3e-6
  assert 0.01 < errors[1] < 0.04


def test_many_states_step_by_step_are_those_of_the_closed_form():
  project = jax.jit(legs_projection, static_argnums=1)
  last = lambda u, size: run(u, ExactLegS(size), method='sequential').last.x_BSD
  u = smooth(64)[None, :, None]
  with jax.enable_x64(True):
    near(last(u, 64), project(u, 64), 1e-12)
    expected = np.asarray(project(u, 256))
  actual = np.asarray(last(u.astype(np.float32), 256))
  error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
  assert error < 2e-5


def test_fourier_coefficients_of_the_whole_history_are_not_exact():
  length, time = 512, (np.arange(512) + 0.5) / 512
  u = np.sin(2 * np.pi * 3 * time).astype(np.float32)
  for size, seen in ((9, 0.28), (65, 0.073)):
    dynamics = dynamics_of(FouS(), size)
    last = run(u[None, :, None], dynamics, method='sequential').last.x_BSD
    waves = np.exp(-2j * np.pi * (np.arange(size) - size // 2) * time[:, None])
    exact = u @ waves / length
    error = np.linalg.norm(last[0, :, 0] - exact) / np.linalg.norm(exact)
    np.testing.assert_allclose(error, seen, atol=5e-3)


def test_a_fourier_memory_steps_by_exponentials_in_any_pieces():
  system, size = FouS().system(S), S
  rest, x = np.linalg.solve(system.a_ST, system.b_S), np.zeros((S, D), complex)
  x[size // 2] = U[0, 0]
  for i in range(1, L):
    power = expm(np.log((i + 1) / i) * system.a_ST)
    x = power @ (x + np.outer(rest, U[0, i])) - np.outer(rest, U[0, i])
  dynamics = dynamics_of(FouS(), S)
  with jax.enable_x64(True):
    first = run(U[:, :4], dynamics, method='sequential').last
    last = run(U[:, 4:], dynamics, first, method='sequential').last
  near(last.x_BSD[0], x)


@pytest.mark.parametrize('method', ['chunked', 'sequential'])
def test_float32_loses_no_digits_to_long_histories(method):
  u = 1 + smooth(4096)[None, :, None]
  with jax.enable_x64(True):
    exact = np.asarray(run(u, ExactLegS(24), method=method).last.x_BSD)
  near(exact[0], projected(u[0], 24), 1e-11)
  last = run(u.astype(np.float32), ExactLegS(24), method=method).last.x_BSD
  assert np.linalg.norm(np.asarray(last) - exact) < 4e-6 * np.linalg.norm(exact)


def test_there_is_no_largest_length():
  rng = np.random.default_rng(0)
  x, elapsed = rng.normal(size=(1, S, D)), 10**7
  step = legs_transition(S, elapsed / (elapsed + 1))
  state = MemoryState(jnp.asarray(x, jnp.float32), jnp.array([elapsed]))
  last = run(1e6 * U[:1, :1].astype(np.float32), ExactLegS(S), state).last
  expected = step.a_ST @ x[0] + step.b_S[:, None] * 1e6 * U[0, 0]
  near(last.x_BSD[0], expected, 1e-6)


SEGMENTS = np.array([[0, 1, 1, 0, 1, 2, 2, 2, 0, 3, 3], [5] * 11])


WINDOW = dynamics_of(LegT(6.0), S)


def windowed(u_LD):
  x = np.zeros((S, D))
  for u_D in u_LD:
    x = WINDOW.system.a_ST @ x + np.outer(WINDOW.system.b_S, u_D)
  return x


def by_midpoints(u_LD):
  return np.stack([scheme_by_algebra('midpoint', u, S) for u in u_LD.T], axis=1)


@pytest.mark.parametrize(
  ('dynamics', 'method', 'alone'),
  [
    *((ExactLegS(S), method, lambda u: projected(u, S)) for method in METHODS),
    (ApproximateLegS(S), 'sequential', by_midpoints),
    (WINDOW, 'chunked', windowed),
    (WINDOW, 'sequential', windowed),
  ],
)
def test_packed_segments_are_as_if_alone(dynamics, method, alone):
  places, _ = advance(start(B), jnp.asarray(SEGMENTS))
  u = np.where(SEGMENTS[..., None] == 0, np.nan, U)
  with jax.enable_x64(True):
    packed = run(u, dynamics, places=places, method=method, chunk=C)
  for row in range(B):
    for segment in set(SEGMENTS[row]) - {0}:
      (place,) = np.nonzero(SEGMENTS[row] == segment)
      for i in range(len(place)):
        expected = alone(U[row, place[: i + 1]])
        near(packed.out[row, place[i]], expected)
  assert packed.last.elapsed_B.tolist() == [2, 11]


@pytest.mark.parametrize('measure', [LegT(3.0), FouT(4.0, form='complex')])
def test_constant_dynamics_are_a_loop(measure):
  dynamics = dynamics_of(measure, S)
  a, b = dynamics.system.a_ST, dynamics.system.b_S
  x = np.zeros((B, S, D), a.dtype)
  readout = np.random.default_rng(1).normal(size=(S, D))
  states = []
  for i in range(L):
    x = a @ x + b[:, None] * U[:, i, None]
    states.append(x)
  states = np.stack(states, axis=1)
  with jax.enable_x64(True):
    for method in ('chunked', 'sequential'):
      near(run(U, dynamics, method=method, chunk=C).out, states)
      read = run(U, dynamics, readout_SD=readout, method=method).out
      near(read, np.einsum('blsd,sd->bld', states, readout))


def test_all_methods_have_the_same_gradients():
  length = 5
  _, cursor = advance(start(B), jnp.array([[1] * 3, [5] * 3]))
  places, _ = advance(cursor, jnp.asarray(SEGMENTS[:, 2 : 2 + length]))
  readout = np.random.default_rng(1).normal(size=(S, D))
  x = np.random.default_rng(2).normal(size=(B, S, D))

  def function(method, u, x, readout):
    out, last = hippo_memory(
      u,
      ExactLegS(S),
      MemoryState(x, jnp.array([3, 3])),
      places=places,
      readout_SD=readout,
      method=method,
      chunk=2,
    )
    return jnp.sum(jnp.sin(out)) + jnp.sum(last.x_BSD**2)

  point = U[:, :length], x, readout
  with jax.enable_x64(True):
    gradients = [
      jax.jit(jax.grad(functools.partial(function, m), argnums=(0, 1, 2)))(
        *point
      )
      for m in METHODS
    ]
  for other in gradients[1:]:
    jax.tree.map(near, other, gradients[0])


def test_states_of_a_readout_are_not_kept():
  def temporaries(length):
    shape = jax.ShapeDtypeStruct((1, length, 8), jnp.float32)
    readout = jnp.ones((32, 8))

    def function(u):
      out = hippo_memory(u, ExactLegS(32), readout_SD=readout, chunk=16).out
      return jnp.sum(out**2)

    compiled = jax.jit(jax.grad(function)).lower(shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 4

  growth = (temporaries(2048) - temporaries(1024)) / 1024
  # A state per token is S D = 256 numbers; a sixteenth is kept.
  assert growth < 80


@pytest.mark.parametrize(
  ('arguments', 'options', 'message'),
  [
    ((U[0], ExactLegS(2)), {}, r'needs samples \[B, L, D\]'),
    ((U[:, :0], ExactLegS(2)), {}, 'at least one step'),
    (
      (U, ExactLegS(2), MemoryState(U[:, :3], U[:, 0, 0])),
      {},
      r'must have shape \[2, 2, 2\], got \[2, 3, 2\]',
    ),
    ((U, ExactLegS(2)), {'times_BL': U[:, 0]}, r'times_BL must have shape'),
    ((U, ExactLegS(2)), {'method': 'fast'}, "unknown method 'fast'"),
    ((U, ExactLegS(2)), {'chunk': 0}, 'at least 1 sample'),
    (
      (U, ApproximateLegS(2)),
      {},
      "ApproximateLegS cannot go by method='chunked'",
    ),
    (
      (U, dynamics_of(LegT(), 2)),
      {'method': 'associative'},
      "ConstantDynamics cannot go by method='associative'",
    ),
    (
      (U, dynamics_of(LegT(), 2)),
      {'times_BL': U[..., 0]},
      'takes no times',
    ),
  ],
)
def test_what_does_not_fit_is_refused(arguments, options, message):
  with pytest.raises(ValueError, match=message):
    hippo_memory(*arguments, **options)


def test_dynamics_that_do_not_exist_are_refused():
  with pytest.raises(ValueError, match="unknown scheme 'heun'"):
    ApproximateLegS(2, 'heun')
  with pytest.raises(ValueError, match='has no exact steps'):
    dynamics_of(LegS('legendre'), 3)
  with pytest.raises(ValueError, match='an odd number; got 4'):
    dynamics_of(FouS(), 4)
  with pytest.raises(ValueError, match='at least one state'):
    ExactLegS(0)
  assert isinstance(dynamics_of(LegT(), 2), ConstantDynamics)


def test_times_may_follow_a_state_that_counted_samples():
  half = np.array([[2.5, 3.0]])
  first = projected(U[0, :2], S)[None]
  state = MemoryState(jnp.asarray(first, jnp.float32), jnp.array([2]))
  u = U[:1, 2:4].astype(np.float32)
  last = run(u, ExactLegS(S), state, times=half).last
  expected = projected(U[0, [0, 0, 1, 1, 2, 3]], S)
  near(last.x_BSD[0], expected, 1e-5)
  near(last.elapsed_B, [3.0])
