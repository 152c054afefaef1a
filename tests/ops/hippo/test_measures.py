"""Matrices, kernels and decoders of the HiPPO measures, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from scipy.linalg import expm

from jaxformers.ops import ExponentialLegS
from jaxformers.ops import FouD
from jaxformers.ops import FouS
from jaxformers.ops import FouT
from jaxformers.ops import GeneralLagT
from jaxformers.ops import LagT
from jaxformers.ops import LegS
from jaxformers.ops import LegT
from jaxformers.ops import discretize_system
from jaxformers.ops import reconstruct
from jaxformers.ops.hippo import S4_MEASURES
from jaxformers.ops.hippo import normalization_scale

N = 6
n, k = np.arange(N)[:, None], np.arange(N)
ODD = 2 * np.arange(N) + 1


def kernel(measure, size, times):
  """Returns what states hold some time after an impulse."""
  system = measure.system(size)
  return np.stack([expm(t * system.a_ST) @ system.b_S for t in times])


def near(actual, expected, tolerance=1e-12):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def test_the_matrices_of_four_states_are_those_of_the_paper():
  rows = [
    [-1, 0, 0, 0],
    [-1.7320508, -2, 0, 0],
    [-2.2360680, -3.8729833, -3, 0],
    [-2.6457513, -4.5825757, -5.9160798, -4],
  ]
  near(LegS().system(4).a_ST, rows, 1e-7)
  first = [-1, 1.7320508, -2.2360680, 2.6457513]
  near(LegT().system(4).a_ST[0], first, 1e-7)


def test_normalizations_are_those_of_their_tables():
  root = np.sqrt(np.outer(ODD, ODD))
  below = lambda low, diagonal: np.where(
    k < n, -low, np.where(k == n, -diagonal, 0.0)
  )
  expected = {
    'paper': (below(root, n + 1), np.sqrt(ODD)),
    'orthonormal': (below(root, n + 1), np.sqrt(2 * ODD)),
    'legendre': (below(ODD[:, None], n + 1), ODD),
  }
  for name, (a, b) in expected.items():
    system = LegS(name).system(N)
    near(system.a_ST, a)
    near(system.b_S, b)
  w = 2.5
  lmu = np.where(n < k, -1.0, (-1.0) ** (n - k + 1)) * ODD[:, None] / w
  system = LegT(w, 'lmu').system(N)
  near(system.a_ST, lmu)
  near(system.b_S, (-1.0) ** np.arange(N) * ODD / w)
  # sqrt(2 / (2n + 1)), not the 2 / sqrt(2n + 1) that is printed for LegT.
  scales = [LegT(w, x).system(N).b_S for x in ('orthonormal', 'legendre')]
  near(scales[0] / scales[1], np.sqrt(2 / ODD))


@pytest.mark.parametrize('measure', [LegS(), LegT(2.5)])
def test_a_constant_is_remembered_by_the_first_coefficient_alone(measure):
  system = measure.system(N)
  near(-np.linalg.solve(system.a_ST, system.b_S), np.eye(N)[0])


def test_eigenvalues_are_those_of_the_source():
  near(np.sort(np.diag(LegS().system(N).a_ST)), -np.arange(N, 0, -1.0))
  for size in (9, 33):
    values = np.linalg.eigvals(FouS().system(size).a_ST)
    near(values.real, -1, 1e-7)
  values = np.linalg.eigvals(FouD().system(N).a_ST)
  angles = 2 * np.pi * np.array([-2, -1, 0, 0, 1, 2])
  near(np.sort_complex(values), -0.5 + 1j * angles)
  a = LegS().system(16).a_ST
  assert 1e10 < np.linalg.cond(np.linalg.eig(a)[1]) < 1e11


def test_an_impulse_leaves_the_basis_functions():
  times = np.array([0.0, 0.5, 2.0])
  index = np.arange(N)
  laguerre = lambda alpha: special.eval_genlaguerre(
    index, alpha, times[:, None]
  )
  decay = lambda rate: np.exp(-rate * times)[:, None]
  near(kernel(LagT(), N, times), decay(0.5) * laguerre(0))
  near(
    kernel(LagT(), 4, [0.5])[0], [0.778801, 0.3894, 0.09735, -0.113575], 1e-6
  )
  near(kernel(LagT(beta=1.0), N, times), decay(1.0) * laguerre(0))
  near(LagT(beta=1.0).system(N).a_ST, -np.tril(np.ones((N, N))))
  alpha, beta = 0.3, 0.1
  norm = np.exp(
    (special.gammaln(index + alpha + 1) - special.gammaln(index + 1)) / 2
  )
  gain = special.gamma(1 - alpha) ** -0.5 * beta ** ((1 - alpha) / 2)
  expected = gain * decay((1 + beta) / 2) * laguerre(alpha) / norm
  near(kernel(GeneralLagT(alpha, beta), N, times), expected)
  share = np.exp(-times)[:, None]
  expected = np.sqrt(ODD) * share * special.eval_legendre(index, 2 * share - 1)
  near(kernel(ExponentialLegS(), N, times), expected)


def test_a_window_keeps_an_impulse_and_lets_it_go():
  mean = kernel(LegT(), 32, [0.2, 0.6, 1.2])[:, 0]
  np.testing.assert_allclose(mean, [1.017, 0.96, 0.007], atol=6e-4)
  system = discretize_system(LegT().system(32), 1 / 16)
  x = np.zeros(32)
  for _ in range(32 + 16):
    x = system.a_ST @ x + system.b_S
  near(x, np.eye(32)[0], 1e-3)


def test_half_the_correction_of_the_end_of_a_window_leaves_echoes():
  middles = [0.3, 1.3, 2.3]
  mean = lambda kappa: (
    kernel(FouT(kappa=kappa, form='complex'), 65, middles)[:, 32]
  )
  near(mean(1.0), [2 / 3, 2 / 9, 2 / 27], 6e-3)
  near(mean(2.0), [1, 0, 0], 8e-3)


def test_real_and_complex_fourier_windows_are_the_same():
  times = np.array([0.1, 0.7, 1.1])
  size, w = 8, 1.5
  ages = np.array([0.2, 0.9])

  def seen(form, size):
    measure = FouT(w, form=form)
    return measure.decoder(size, ages) @ kernel(measure, size, times).T

  # sin_0 is dead, so 8 real states are frequencies up to 3, as 7 complex ones.
  near(seen('real', size), seen('complex', 7))
  assert (kernel(FouT(w), size, times)[:, 1] == 0).all()


def test_names_stand_for_what_they_are_in_the_code_of_s4():
  b = np.array([1, 0, np.sqrt(2), 0])
  skew = np.zeros((4, 4))
  skew[2, 3], skew[3, 2] = -1, 1
  for name, rate, turn in (
    ('fourier', 1, np.pi),
    ('fourier2', 2, 2 * np.pi),
    ('fourier_decay', 0.5, np.pi),
  ):
    system = S4_MEASURES[name].system(4)
    near(system.a_ST, turn * skew - rate * np.outer(b, b))
    near(system.b_S, rate * b)
  halved = LegT(window=1.0).system(4).a_ST / 2
  near(S4_MEASURES['legt'].system(4).a_ST, halved)


def signal(time):
  return np.sin(2 * np.pi * time) + 0.3 * np.cos(np.pi * time)


STEP = 1 / 256


def remembered(measure, size, end):
  """Returns the state at a time, with samples that are held."""
  system = discretize_system(measure.system(size), STEP)
  x = np.zeros(size, system.a_ST.dtype)
  for u in signal(np.arange(0, end, STEP) + STEP / 2):
    x = system.a_ST @ x + system.b_S * u
  return x


@pytest.mark.parametrize(
  ('measure', 'size', 'tolerance'),
  [
    (LegT(), 16, 1e-4),
    (LegT(1.5, 'lmu'), 16, 1e-4),
    (LegT(1.5, 'legendre'), 16, 1e-4),
    # Fourier series of what does not repeat converge slowly.
    (FouT(), 64, 1e-2),
    (FouT(form='complex'), 65, 1e-2),
    (FouT(2.0), 64, 1e-2),
    (ExponentialLegS(), 64, 1e-2),
  ],
)
def test_the_past_is_rebuilt_from_the_state(measure, size, tolerance):
  ages, end = np.array([0.1, 0.25, 0.5, 0.77, 0.9]), 3
  x_S = remembered(measure, size, end)
  rebuilt = reconstruct(measure, x_S[None, :, None], ages)
  np.testing.assert_allclose(
    rebuilt[0, :, 0], signal(end - ages), atol=tolerance
  )


@pytest.mark.parametrize(
  'measure', [LagT(), LagT(1.0), GeneralLagT(0.0, 0.3), GeneralLagT(0.3, 0.1)]
)
def test_laguerre_coefficients_of_a_polynomial_give_it_back(measure):
  """Of age^p times what the decoder weighs the polynomials by."""
  size, ages = 4, np.array([0.5, 1.0, 3.0])
  beta, alpha = measure.beta, getattr(measure, 'alpha', 0.0)
  past = lambda age: (
    (1 - age + age**2) * age**alpha * np.exp(-(1 - beta) * age / 2)
  )
  # Gauss-Laguerre quadrature of the kernel against the past.
  node, weight = special.roots_genlaguerre(20, alpha)
  bare = past(node) * np.exp(node) / node**alpha
  x_S = weight * bare @ kernel(measure, size, node)
  near(measure.decoder(size, ages) @ x_S, past(ages), 1e-9)


def test_decoders_of_traced_ages_are_those_of_numbers():
  ages = np.array([0.2, 0.6])
  for measure, size in (
    (LegS(), N),
    (LegT(normalization='lmu'), N),
    (ExponentialLegS(), N),
    (LagT(), N),
    (FouT(), N),
    (FouS(), N + 1),
  ):
    expected = measure.decoder(size, ages, 2.0)
    traced = jax.jit(measure.decoder, static_argnums=0)(size, ages, 2.0)
    near(traced, expected, 2e-6)
  with_rows = reconstruct(LegS(), jnp.ones((2, N, 1)), ages, jnp.array([1, 2]))
  alone = reconstruct(LegS(), jnp.ones((1, N, 1)), ages, jnp.array([2]))
  near(with_rows[1], alone[0], 1e-6)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: normalization_scale('lmuu', 2), "unknown normalization 'lmuu'"),
    (lambda: LegS('lmu').decoder(2, 1.0), 'needs elapsed'),
    (lambda: LegT(0.0), 'longer than 0, got 0.0'),
    (lambda: LegT().decoder(2, 1.5), 'leave the window of 1'),
    (lambda: LegS().decoder(2, 3.0, 2.0), 'leave the window of 2'),
    (lambda: LegS().system(0), 'at least one state, got size=0'),
    (lambda: FouT().system(3), 'an even size, got 3'),
    (lambda: FouS().system(4), 'an odd number; got 4'),
    (lambda: FouT(form='both'), "'real' or 'complex', got 'both'"),
    (lambda: FouD().decoder(2, 1.0), 'FouT has'),
    (lambda: GeneralLagT(beta=0.0), 'LagT has beta = 0'),
  ],
)
def test_what_cannot_be_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
