"""Linear systems of the S4 family: how they begin, their kernels, their steps.

Of states that come in conjugate pairs one each is stored: S complex ones stand
for N = 2 S real ones.
"""

import difflib
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Complex, Float
import numpy as np

from jaxformers.ops.diagonal import normal_legs
from jaxformers.ops.recurrence.convolution import Modes
from jaxformers.ops.recurrence.stepwise import step_through
from jaxformers.ops.segments import Places

FREQUENCIES = 64
"""Frequencies of the S4 kernel that are evaluated at a time."""

DiagonalInit = Literal['lin', 'inv', 'legs', 'quad', 'real']
LowRankMeasure = Literal['legs', 'legt', 'fourier', 'lagt']


class LowRankSystem(NamedTuple):
  """A normal matrix less one of low rank, and vectors, in its eigenbasis.

  `A = diag(eigenvalues) - P P^*`, `x' = A x + B u`, `y = 2 Re(C x)`; sums
  run over the stored states and their conjugates. Arrays may have leading axes,
  such as the channels.

  Attributes:
    eigenvalues_S: complex, of the normal part; imaginary parts not positive.
    low_rank_SR: complex, P.
    input_S: complex, B.
    readout_S: complex, C; or what `truncate_readout` makes of it.
  """

  eigenvalues_S: Complex[Array, '*D S']
  low_rank_SR: Complex[Array, '*D S R']
  input_S: Complex[Array, '*D S']
  readout_S: Complex[Array, '*D S']


class NormalForm(NamedTuple):
  """A matrix of HiPPO as a normal matrix less one of low rank.

  With V and its conjugate side by side, and likewise the rest,
  `A = V (diag(eigenvalues) - P P^*) V^*`. Arrays are NumPy's, in double
  precision.

  Attributes:
    eigenvalues_S: of the normal part, one of each pair.
    low_rank_SR: P.
    input_S: `V^* B`.
    vectors_NS: V.
  """

  eigenvalues_S: Complex[np.ndarray, ' S']
  low_rank_SR: Complex[np.ndarray, 'S R']
  input_S: Complex[np.ndarray, ' S']
  vectors_NS: Complex[np.ndarray, 'N S']


def normal_form(
  measure: LowRankMeasure,
  size: int,
  *,
  window: float = 1.0,
  kappa: float = 2.0,
) -> NormalForm:
  """Returns a matrix of HiPPO as a normal one less one of low rank.

  The rank is 2 for `'legt'` and 1 for the others. The real parts of the normal
  matrix are -1/2 for `'legs'` and 0 for the others.

  Source: Gu, Goel and Ré, "Efficiently Modeling Long Sequences with Structured
  State Spaces", 2021, arXiv 2111.00396, theorem 1 and appendix C.1; Gu et al.,
  "How to Train Your HiPPO", 2022, arXiv 2206.12037 (`'fourier'`).

  Args:
    measure: scaled Legendre, translated Legendre, Fourier, Laguerre.
    size: N, even.
    window: what `'legt'` and `'fourier'` remember, in time. The published code
      has 2 for both.
    kappa: of `'fourier'`; 2 for a window, 1 for one with echoes.

  Raises:
    ValueError: if the measure is unknown or the size is not even.
  """
  check_choice('measure', measure, LowRankMeasure)
  _check_even(size)
  n = np.arange(size)
  if measure == 'fourier':
    return _fourier_form(size, window, kappa)
  if measure == 'legs':
    eigenvalues_N, vectors_NM, p_N, b_N = normal_legs(size)
    return _halved(eigenvalues_N, vectors_NM, p_N[:, None], b_N)
  if measure == 'legt':
    p_N = np.sqrt((2 * n + 1) / window)
    p_NR = p_N[:, None] * (n[:, None] % 2 == np.arange(2))
    b_N = np.sqrt(2 * n + 1) / window
    outer_NM = np.where((n[:, None] - n) % 2, np.outer(p_N, p_N), 0)
  else:
    p_NR, b_N = np.full((size, 1), math.sqrt(0.5)), np.ones(size)
    outer_NM = np.full((size, size), 0.5)
  # A + P P^T is skew-symmetric.
  skew_NM = np.triu(outer_NM, 1) - np.tril(outer_NM, -1)
  imaginary_N, vectors_NM = np.linalg.eigh(-1j * skew_NM)
  return _halved(1j * imaginary_N, vectors_NM, p_NR, b_N)


def diagonal_form(
  init: DiagonalInit, size: int
) -> tuple[Complex[np.ndarray, ' S'], Complex[np.ndarray, ' S']]:
  """Returns the eigenvalues and inputs that a diagonal system begins with.

  With n = 0, ..., S - 1 for N = 2 S real states,

  - `'lin'`: `-1/2 + i pi n`;
  - `'inv'`: `-1/2 + i N / pi (N / (2 n + 1) - 1)`;
  - `'legs'`: those of the normal part of HiPPO-LegS, whose imaginary parts are
    negative here, with its inputs. Theory asks for half the inputs, the
    published code drops the factor;
  - `'quad'`: `-1/2 + i (2 n + 1)^2 / pi`;
  - `'real'`: `-(n + 1)`.

  Inputs are 1 where nothing else is said.

  Source: Gu et al., "On the Parameterization and Initialization of Diagonal
  State Space Models", 2022, arXiv 2206.11893, section 4 and appendix; Quad:
  the authors' code, https://github.com/state-spaces/s4.

  Args:
    init: see above.
    size: N, even.

  Raises:
    ValueError: if the name is unknown or the size is not even.
  """
  check_choice('init', init, DiagonalInit)
  _check_even(size)
  if init == 'legs':
    form = normal_form('legs', size)
    return form.eigenvalues_S, form.input_S
  n = np.arange(size // 2)
  eigenvalues_S = {
    'lin': -0.5 + 1j * np.pi * n,
    'inv': -0.5 + 1j * size / np.pi * (size / (2 * n + 1) - 1),
    'quad': -0.5 + 1j * (2 * n + 1) ** 2 / np.pi,
    'real': -(n + 1.0) + 0j,
  }[init]
  return eigenvalues_S, np.ones(size // 2, complex)


def bandlimited(
  modes: Modes,
  eigenvalues_DS: Complex[Array, 'D S'],
  step: Float[Array, '...'],
  bandlimit: float,
) -> Modes:
  """Silences the modes whose frequency the sampling cannot show.

  A mode is silent where `dt |Im a| / (2 pi) >= bandlimit / 2`: at a limit of 1
  those beyond half the sampling frequency, which come out as lower ones. It
  serves models that run at other steps than they were trained with.

  Source: Nguyen et al., "S4ND", 2022, arXiv 2210.06583, section 3.3.

  Args:
    modes: the system.
    eigenvalues_DS: a.
    step: dt, which broadcasts against them.
    bandlimit: see above.
  """
  frequency_DS = jnp.abs(eigenvalues_DS.imag) * step / (2 * jnp.pi)
  readout_DS = jnp.where(frequency_DS < bandlimit / 2, modes.readout, 0)
  return modes._replace(readout=readout_DS)


def s4_kernel(
  system: LowRankSystem, step_D: Float[Array, ' D'], length: int
) -> Float[Array, 'D L']:
  """Returns the kernel `C Abar^k Bbar`, k = 0, ..., length - 1, of S4.

  Abar and Bbar are the bilinear discretisation. The kernel is the inverse
  transform of `C~ (I - z Abar)^-1 Bbar` at the roots of unity z, where the
  readout must be `C~ = C (I - Abar^length)` (`truncate_readout`). With
  `r(x, y) = sum x y dt / (2 (1 - z) - dt eigenvalues (1 + z))` that is

  `2 [r(C~, B) - (1 + z) r(C~, P) (I + (1 + z) r(P^*, P))^-1 r(P^*, B)]`,

  which unlike the published form has no division by 1 + z, 0 at z = -1. An
  eigenvalue of 0, as `'fourier'` has, divides by 0 at z = 1, where the formula is
  replaced by its limit. There the first column of P must be, up to a real factor,
  what is written, and real, as it is for that measure; the gradient for the
  eigenvalue itself leaves z = 1 out. (Layers begin at -1e-4 instead.)

  `O((S + log L) L)` per channel; a few frequencies are evaluated at a time, so
  nothing of size `[D, S, L]` is ever there.

  Source: Gu, Goel and Ré, 2021, arXiv 2111.00396, section 3.2 and appendix C.3;
  Su Jianlin, 2024, kexue.fm/archives/10162; without the singularity: ours.

  Args:
    system: leading axes are the channels D.
    step_D: dt.
    length: L; `C~` belongs to it.
  """
  eigenvalues, low_rank, input_, readout = _paired(system)
  rank = low_rank.shape[-1]
  columns_DSR = jnp.concatenate([input_[..., None], low_rank], axis=-1)
  rows_DSR = jnp.concatenate([readout[..., None], low_rank.conj()], axis=-1)
  products_DSN = rows_DSR[..., :, None] * columns_DSR[..., None, :]
  products_DSN = products_DSN.reshape(*input_.shape, -1)
  products_DSN = products_DSN * step_D[:, None, None]
  count = length // 2 + 1
  chunk = min(FREQUENCIES, count)
  square = lambda x: x.reshape(len(x), rank + 1, rank + 1, -1)
  # What 1 / divisor multiplies where it is infinite.
  is_zero_DS1 = (eigenvalues == 0)[..., None]
  pole = square(jnp.sum(jnp.where(is_zero_DS1, products_DSN, 0), axis=1))

  @jax.checkpoint
  def spectrum(z_C):
    poles_DSC = (eigenvalues * step_D[:, None])[..., None]
    divisor_DSC = 2 * (1 - z_C) - poles_DSC * (1 + z_C)
    is_pole_DSC = divisor_DSC == 0
    inverse_DSC = 1 / jnp.where(is_pole_DSC, 1, divisor_DSC)
    sums_DNC = jnp.einsum(
      'DSN,DSC->DNC',
      products_DSN,
      jnp.where(is_pole_DSC, 0, inverse_DSC),
      precision='highest',
    )
    sums = square(sums_DNC)
    # Gauss elimination of the unit matrix plus (1 + z) r(P^*, P).
    for i in range(rank, 0, -1):
      pivot = 1 + (1 + z_C) * sums[:, i, i]
      outer = sums[:, :i, i][:, :, None] * sums[:, i, :i][:, None]
      rest = sums[:, :i, :i] - ((1 + z_C) / pivot)[:, None, None] * outer
      if i == 1:
        at_rest = _limit_at_rest(pole, sums)
        is_pole_DC = is_pole_DSC.any(axis=1) & (pole[:, 1, 1] != 0)
        rest = jnp.where(is_pole_DC[:, None, None], at_rest, rest)
      sums = rest
    return 2 * sums[:, 0, 0]

  index_NC = jnp.arange(-(-count // chunk) * chunk).reshape(-1, chunk)
  z_NC = jnp.exp(-2j * jnp.pi * index_NC / length).astype(eigenvalues.dtype)
  spectrum_NDC = jax.lax.map(spectrum, z_NC)
  spectrum_DN = jnp.moveaxis(spectrum_NDC, 0, 1).reshape(len(step_D), -1)
  return jnp.fft.irfft(spectrum_DN[:, :count], n=length)


def _limit_at_rest(pole, sums):
  """Returns the limit of a step of elimination of `pole / d + sums`, d to 0.

  At z = 1, for a pole of rank 1: what is of order 1 / d cancels.
  """
  column, row = pole[:, :1, 1][:, :, None], pole[:, 1, :1][:, None]
  cross = column * sums[:, 1, :1][:, None] + sums[:, :1, 1][:, :, None] * row
  divisor = jnp.where(pole[:, 1, 1] == 0, 1, pole[:, 1, 1])[:, None, None]
  second = (0.5 + sums[:, 1, 1])[:, None, None] * column * row / divisor
  return sums[:, :1, :1] + (second - cross) / divisor


def s4_convolution(
  input_BLD: Float[Array, 'B L D'],
  system: LowRankSystem,
  step_D: Float[Array, ' D'],
  initial_BDS: Complex[Array, 'B D S'],
  *,
  places: Places | None = None,
) -> tuple[Float[Array, 'B L D'], Complex[Array, 'B D S']]:
  """Runs S4 as a recurrence, step by step, in `O(S)` per channel and step.

  The bilinear step has the inverse of a diagonal matrix plus one of low rank,
  which is another such. It needs the true readout C: `recover_readout`.

  Source: Gu, Goel and Ré, 2021, arXiv 2111.00396, theorem 2 and appendix C.2.

  Args:
    input_BLD: u.
    system: leading axes are the channels D.
    step_D: dt.
    initial_BDS: states before the first token.
    places: see `jaxformers.ops.lti_convolution`.

  Returns:
    `2 Re(C x)` for each token, and the last states.
  """
  dtype = system.input_S.real.dtype
  initial = jnp.moveaxis(initial_BDS.astype(system.input_S.dtype), 2, 0)
  out_BLD, last_SBD = step_through(
    _s4_step(system, step_D), initial, input_BLD.astype(dtype), places=places
  )
  return out_BLD.astype(input_BLD.dtype), jnp.moveaxis(last_SBD, 0, 2)


def s4_matrix(
  system: LowRankSystem, step_D: Float[Array, ' D']
) -> Float[Array, 'D N M']:
  """Returns Abar of S4 as a dense matrix of real and imaginary parts.

  The state is (Re x, Im x), of N = 2 S numbers.

  Source: Gu, Goel and Ré, 2021, arXiv 2111.00396, section 2.3.

  Args:
    system: leading axes are the channels D.
    step_D: dt.
  """
  states = system.input_S.shape[-1]
  step = _s4_step(system, step_D)
  eye_NM = jnp.eye(2 * states, dtype=step_D.dtype)
  # A batch of unit vectors, one per state, in all channels.
  unit_SN1 = jax.lax.complex(eye_NM[:states], eye_NM[states:])[..., None]
  ones_D = jnp.ones_like(step_D)
  new_SND, _ = step(unit_SN1 * ones_D, 0 * eye_NM[:, :1] * ones_D)
  return jnp.concatenate([new_SND.real, new_SND.imag]).transpose(2, 0, 1)


def _s4_step(system, step_D):
  """Returns the step of S4, from states `[S, B, D]`."""
  last_first = lambda x: jnp.moveaxis(x, 0, -1)[..., None, :]
  eigenvalues, low_rank, input_, readout = map(last_first, system)
  # [S, 1, D], and [S, R, 1, D].
  rate = 2 / step_D
  left = 1 / (rate - eigenvalues)
  # Both a state and its conjugate count.
  project = lambda x: 2 * jnp.sum((low_rank.conj() * x[:, None]).real, axis=0)
  solved = left[:, None] * low_rank
  gram = 2 * jnp.einsum('SRXD,SNXD->DRN', low_rank.conj(), solved).real
  inverse_DRN = jnp.linalg.inv(jnp.eye(gram.shape[-1]) + gram)

  def step(x_SBD, u_BD):
    low_RBD = project(x_SBD)
    v_SBD = (rate + eigenvalues) * x_SBD + 2 * input_ * u_BD
    v_SBD -= jnp.sum(low_rank * low_RBD, axis=1)
    low_RBD = jnp.einsum('DRN,NBD->RBD', inverse_DRN, project(left * v_SBD))
    x_SBD = left * v_SBD - jnp.sum(solved * low_RBD, axis=1)
    return x_SBD, 2 * jnp.sum((readout * x_SBD).real, axis=0)

  return step


def truncate_readout(
  readout_DN: Float[Array, 'D N'],
  matrix_DNM: Float[Array, 'D N M'],
  length: int,
) -> Float[Array, 'D N']:
  """Returns `C~ = C (I - Abar^L)`: the readout that a kernel of L ends with.

  Source: Gu, Goel and Ré, 2021, arXiv 2111.00396, appendix C.3, lemma C.2.

  Args:
    readout_DN: C, of real states.
    matrix_DNM: Abar.
    length: L.
  """
  return readout_DN - _times_power(readout_DN, matrix_DNM, length)


def recover_readout(
  truncated_DN: Float[Array, 'D N'],
  matrix_DNM: Float[Array, 'D N M'],
  length: int,
) -> Float[Array, 'D N']:
  """Returns the C of which `truncated_DN` is `C (I - Abar^L)`.

  It is what a recurrence reads. Takes `O(N^3 log L)` per channel. Where states
  outlive the length, Abar^L is near I and the solution is ill-conditioned; there
  is none where one lives for ever, as the dead state of `'fourier'` does.

  Source: Gu, Goel and Ré, 2021, arXiv 2111.00396, appendix C.3.

  Args:
    truncated_DN: C~.
    matrix_DNM: Abar.
    length: L.
  """
  power_DNM = jnp.linalg.matrix_power(matrix_DNM, length)
  left_DNM = jnp.eye(matrix_DNM.shape[-1]) - power_DNM
  solved = jnp.linalg.solve(left_DNM.swapaxes(1, 2), truncated_DN[..., None])
  return solved[..., 0]


def double_readout(
  truncated_DN: Float[Array, 'D N'],
  matrix_DNM: Float[Array, 'D N M'],
  length: int,
) -> Float[Array, 'D N']:
  """Returns C~ for twice the length: `C~ (I + Abar^L)`.

  Source: none; `(I - A^L) (I + A^L) = I - A^(2 L)`, as in the authors' code of
  S4.

  Args:
    truncated_DN: C~ for L.
    matrix_DNM: Abar.
    length: L.
  """
  return truncated_DN + _times_power(truncated_DN, matrix_DNM, length)


def _times_power(row_DN, matrix_DNM, length):
  power_DNM = jnp.linalg.matrix_power(matrix_DNM, length)
  return jnp.einsum('DN,DNM->DM', row_DN, power_DNM, precision='highest')


def real_readout(readout_DS: Complex[Array, 'D S']) -> Float[Array, 'D N']:
  """Returns the row that reads `2 Re(C x)` from (Re x, Im x).

  Source: none; the definition of the real part.

  Args:
    readout_DS: C.
  """
  return 2 * jnp.concatenate([readout_DS.real, -readout_DS.imag], axis=-1)


def complex_readout(readout_DN: Float[Array, 'D N']) -> Complex[Array, 'D S']:
  """Undoes `real_readout`.

  Source: none; the definition of the real part.

  Args:
    readout_DN: a row for (Re x, Im x).
  """
  real_DS, imag_DS = jnp.split(readout_DN / 2, 2, axis=-1)
  return jax.lax.complex(real_DS, -imag_DS)


def _paired(system):
  """Returns the arrays of a system with the conjugate states appended."""
  axes = -1, -2, -1, -1
  return [
    jnp.concatenate([x, x.conj()], axis=axis)
    for x, axis in zip(system, axes, strict=True)
  ]


def _halved(eigenvalues_N, vectors_NM, p_NR, b_N):
  """Keeps those of negative imaginary parts, which come first."""
  half = len(eigenvalues_N) // 2
  v_NS = vectors_NM[:, :half]
  adjoint_SN = v_NS.conj().T
  return NormalForm(
    eigenvalues_N[:half], adjoint_SN @ p_NR, adjoint_SN @ b_N, v_NS
  )


def _fourier_form(size, window, kappa):
  """The eigenvectors of rotations are known, also of the one by nothing."""
  half = size // 2
  b_N = np.zeros(size)
  b_N[::2] = math.sqrt(2)
  b_N[0] = 1
  v_NS = np.zeros((size, half), complex)
  n = np.arange(half)
  v_NS[2 * n, n], v_NS[2 * n + 1, n] = math.sqrt(0.5), 1j * math.sqrt(0.5)
  eigenvalues_S = -2j * np.pi * n / window
  adjoint_SN = v_NS.conj().T
  p_N1 = math.sqrt(kappa / window) * b_N[:, None]
  b_N = kappa / window * b_N
  return NormalForm(eigenvalues_S, adjoint_SN @ p_N1, adjoint_SN @ b_N, v_NS)


def check_choice(what: str, given: str, known: Any) -> None:
  """Raises unless a name is known.

  Source: none; for messages.

  Args:
    what: what is chosen.
    given: the name.
    known: a Literal of names.

  Raises:
    ValueError: naming the nearest one.
  """
  names = get_args(known)
  if given not in names:
    near = difflib.get_close_matches(given, names, 1, 0)
    raise ValueError(
      f'unknown {what} {given!r}; did you mean {near[0]!r}? '
      f'Known: {", ".join(names)}.'
    )


def _check_even(size):
  if size < 2 or size % 2:
    raise ValueError(
      f'states come in conjugate pairs, so their number must be even, got {size}.'
    )
