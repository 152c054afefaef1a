"""State-space models whose matrix is diagonal: how it begins, and its steps."""

import difflib
from typing import Literal, NamedTuple, get_args

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Complex, Float, Inexact
import numpy as np

from jaxformers.ops.recurrence import LinearMethod
from jaxformers.ops.recurrence import linear_recurrence

Discretization = Literal['zoh', 'bilinear']


class NormalLegS(NamedTuple):
  """The matrix of HiPPO-LegS as a normal matrix less one of rank 1.

  `A = V diag(eigenvalues) V^* - p p^T`, with V unitary. Arrays are NumPy's, in
  double precision.

  Attributes:
    eigenvalues_S: real parts -1/2, imaginary parts ascending: those of the first
      half are negative, those of the second half positive, in pairs.
    vectors_NS: V, one column per eigenvalue; its first row is real and positive,
      so that vectors of a pair are conjugate.
    low_rank_N: p.
    input_N: the vector B by which a signal enters.
  """

  eigenvalues_S: Complex[np.ndarray, ' S']
  vectors_NS: Complex[np.ndarray, 'N S']
  low_rank_N: Float[np.ndarray, ' N']
  input_N: Float[np.ndarray, ' N']


def normal_legs(size: int) -> NormalLegS:
  """Splits the matrix of HiPPO-LegS into a normal part and one of rank 1.

  `A + p p^T` has -1/2 on its diagonal and is skew-symmetric beside, so that a
  Hermitian eigensolver finds its eigenvalues, whatever the size. A itself must
  not be diagonalised: its eigenvectors have condition 8e10 at size 16.

  Source: Gu et al., "Efficiently Modeling Long Sequences with Structured State
  Spaces", 2021, arXiv 2111.00396, theorem 1 and appendix C.1.

  Args:
    size: N, rows of A.

  Raises:
    ValueError: if it is less than 1.
  """
  if size < 1:
    raise ValueError(f'a state needs size >= 1, got {size}.')
  n = np.arange(size)
  input_N = np.sqrt(2 * n + 1)
  low_rank_N = np.sqrt(n + 0.5)
  # The product of p with itself is half the product of B with itself.
  outer_NN = np.outer(low_rank_N, low_rank_N)
  skew_NN = np.triu(outer_NN, 1) - np.tril(outer_NN, -1)
  imaginary_S, vectors_NS = np.linalg.eigh(-1j * skew_NN)
  vectors_NS = vectors_NS * np.exp(-1j * np.angle(vectors_NS[0]))
  return NormalLegS(-0.5 + 1j * imaginary_S, vectors_NS, low_rank_N, input_N)


class Discretized(NamedTuple):
  """What a step of a diagonal system does.

  Attributes:
    decay: what the state is multiplied by.
    gain: what the input is multiplied by besides B.
  """

  decay: Inexact[Array, '...']
  gain: Inexact[Array, '...']


def discretize(
  eigenvalues: Inexact[Array, '...'],
  step: Float[Array, '...'],
  method: Discretization = 'zoh',
) -> Discretized:
  """Turns `x' = a x + B u` into `x_k = decay x_(k-1) + gain B u_k`.

  `'zoh'` is exact for an input that stays constant during a step:
  `exp(a dt)` and `(exp(a dt) - 1) / a`. `'bilinear'` is the trapezoidal rule:
  `(1 + a dt / 2) / (1 - a dt / 2)` and `dt / (1 - a dt / 2)`.

  Source: Gu et al., "On the Parameterization and Initialization of Diagonal
  State Space Models", 2022, arXiv 2206.11893, section 3.1.

  Args:
    eigenvalues: a, real or complex; 0 gives decay 1 and gain dt.
    step: dt, which broadcasts against them.
    method: see above.

  Raises:
    ValueError: if the method is unknown.
  """
  if method not in get_args(Discretization):
    near = difflib.get_close_matches(method, get_args(Discretization), 1, 0)
    raise ValueError(
      f'unknown discretisation {method!r}; did you mean {near[0]!r}? '
      f'Known: {", ".join(get_args(Discretization))}.'
    )
  z = eigenvalues * step
  if method == 'bilinear':
    return Discretized((1 + z / 2) / (1 - z / 2), step / (1 - z / 2))
  # Not exp(z) - 1, which has lost all digits in float32 at z = 1e-7.
  is_zero = eigenvalues == 0
  divisor = jnp.where(is_zero, 1, eigenvalues)
  gain = jnp.where(is_zero, step, jnp.expm1(z) / divisor)
  return Discretized(jnp.exp(z), gain)


class DiagonalOutput(NamedTuple):
  """What a diagonal system makes of a sequence.

  Attributes:
    out_BLE: `[B, L, E]`, in the dtype of the input.
    last_BS: `[B, S]` in at least float32, the state after the last step.
  """

  out_BLE: Float[Array, 'B L E']
  last_BS: Inexact[Array, 'B S']


def diagonal_system(
  x_BLD: Float[Array, 'B L D'],
  decay_S: Inexact[Array, ' S'],
  in_DS: Inexact[Array, 'D S'],
  out_SE: Inexact[Array, 'S E'],
  initial_BS: Inexact[Array, 'B S'] | None = None,
  *,
  reset: Bool[Array, 'B L'] | None = None,
  skip: Bool[Array, 'B L'] | None = None,
  reverse: bool = False,
  method: LinearMethod = 'auto',
  chunk: int | None = None,
  axis_name: str | None = None,
) -> DiagonalOutput:
  """Runs `h_t = decay h_(t-1) + x_t B`, `y_t = Re(h_t C)`.

  All channels share the states, so that most of the time goes into the two
  products. They are real: `x [Re B, Im B]` and `[Re h, Im h] [Re C; -Im C]`.

  Source: Smith et al., "Simplified State Space Layers for Sequence Modeling",
  2022, arXiv 2208.04933, section 3.2; Orvieto et al., "Resurrecting Recurrent
  Neural Networks for Long Sequences", 2023, arXiv 2303.06349, section 3.

  Args:
    x_BLD: what comes in.
    decay_S: what states are multiplied by, all real or, like B and C, complex.
    in_DS: B.
    out_SE: C.
    initial_BS: state before the first step; None for 0.
    reset: see `jaxformers.ops.linear_recurrence`, like what follows.
    skip: steps that leave the state alone.
    reverse: whether to go from the end.
    method: how.
    chunk: steps per chunk.
    axis_name: of the mesh axis along which steps are split.
  """
  dtype = jnp.promote_types(x_BLD.dtype, jnp.float32)
  product = lambda x, w: jnp.dot(
    x.astype(x_BLD.dtype),
    w.astype(x_BLD.dtype),
    preferred_element_type=dtype,
  )
  is_complex = jnp.iscomplexobj(decay_S)
  if is_complex:
    in_DS = jnp.concatenate([in_DS.real, in_DS.imag], axis=1)
    out_SE = jnp.concatenate([out_SE.real, -out_SE.imag])
  input_BLS = product(x_BLD, in_DS)
  if is_complex:
    input_BLS = jax.lax.complex(*jnp.split(input_BLS, 2, axis=-1))
  states_BLS, last_BS = linear_recurrence(
    decay_S,
    input_BLS,
    initial_BS,
    reset=reset,
    skip=skip,
    reverse=reverse,
    method=method,
    chunk=chunk,
    axis_name=axis_name,
  )
  if is_complex:
    parts = states_BLS.real, states_BLS.imag
    states_BLS = jnp.concatenate(parts, axis=-1)
  out_BLE = product(states_BLS, out_SE).astype(x_BLD.dtype)
  return DiagonalOutput(out_BLE, last_BS)
