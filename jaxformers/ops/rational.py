"""Convolutions whose kernel is a rational function of z (RTF)."""

from jax import Array
import jax.numpy as jnp
from jaxtyping import Complex, Float
import numpy as np

from jaxformers.ops.recurrence.stepwise import step_through
from jaxformers.ops.segments import Places
from jaxformers.ops.state_spaces import recover_readout


def rtf_kernel(
  numerator_DS: Float[Array, 'D S'],
  denominator_DS: Float[Array, 'D S'],
  length: int,
) -> Float[Array, 'D L']:
  """Returns the kernel of `(b_1 + b_2 z + ...) / (1 + a_1 z + a_2 z^2 + ...)`.

  Two Fourier transforms and a division, whatever the number of states. Values
  at the roots of unity are those of a signal with period L, so the kernel is the
  impulse response of the rational function *folded* at L. It is the kernel of
  the companion matrix of a (`rtf_matrix`) with `b = C (I - Abar^L)` for a
  readout: `rtf_readout` gives the C of a recurrence, and
  `jaxformers.ops.double_readout` the b of twice the length. Where a pole is close
  to the circle, 1 + a_1 z + ... is close to 0: only the start keeps it away.

  Source: Parnichkun et al., "State-Free Inference of State-Space Models: The
  Transfer Function Approach", 2024, arXiv 2405.06147, section 3; Su Jianlin,
  2024, kexue.fm/archives/10180.

  Args:
    numerator_DS: b.
    denominator_DS: a, without the leading 1.
    length: L, more than S.

  Raises:
    ValueError: if the length is not more than S.
  """
  _check_length(denominator_DS, length)
  full_DS = jnp.pad(denominator_DS, ((0, 0), (1, 0)), constant_values=1)
  spectrum_DN = jnp.fft.rfft(numerator_DS, n=length)
  spectrum_DN /= jnp.fft.rfft(full_DS, n=length)
  return jnp.fft.irfft(spectrum_DN, n=length)


def rtf_matrix(denominator_DS: Float[Array, 'D S']) -> Float[Array, 'D S T']:
  """Returns the companion matrix: first row -a, ones below the diagonal.

  Source: Parnichkun et al., 2024, arXiv 2405.06147, section 3.1.

  Args:
    denominator_DS: a.
  """
  width, states = denominator_DS.shape
  shift_ST = jnp.eye(states, k=-1, dtype=denominator_DS.dtype)
  matrix_DST = jnp.broadcast_to(shift_ST, (width, states, states))
  return matrix_DST.at[:, 0].set(-denominator_DS)


def rtf_readout(
  numerator_DS: Float[Array, 'D S'],
  denominator_DS: Float[Array, 'D S'],
  length: int,
) -> Float[Array, 'D S']:
  """Returns the readout C of the recurrence whose folded kernel has b on top.

  See `jaxformers.ops.recover_readout` for its price, and for where it is
  ill-conditioned.

  Source: Parnichkun et al., 2024, arXiv 2405.06147, section 3.1.

  Args:
    numerator_DS: b of `rtf_kernel`.
    denominator_DS: a.
    length: L to which b belongs.

  Raises:
    ValueError: if the length is not more than S.
  """
  _check_length(denominator_DS, length)
  return recover_readout(numerator_DS, rtf_matrix(denominator_DS), length)


def rtf_poles(
  denominator_DS: Float[Array, 'D S'],
) -> Complex[np.ndarray, 'D S']:
  """Returns the poles: the numbers that decay as p^k, in double precision.

  Nothing keeps `|p|` below 1 in training (`sum |a| < 1` would). A kernel of one
  length hides that, because it is folded; a recurrence grows without bound. So
  before an RTF decodes, `jaxformers.ops.check_decay(rtf_poles(denominator_DS))`.

  Source: Parnichkun et al., 2024, arXiv 2405.06147, section 3.3.

  Args:
    denominator_DS: a; not traced.
  """
  matrix_DST = np.asarray(rtf_matrix(jnp.asarray(denominator_DS)), np.float64)
  return np.linalg.eigvals(matrix_DST)


def rtf_convolution(
  input_BLD: Float[Array, 'B L D'],
  readout_DS: Float[Array, 'D S'],
  denominator_DS: Float[Array, 'D S'],
  initial_BDS: Float[Array, 'B D S'],
  *,
  feedthrough_D: Float[Array, ' D'] | None = None,
  places: Places | None = None,
) -> tuple[Float[Array, 'B L D'], Float[Array, 'B D S']]:
  """Runs the companion form step by step, in `O(S)` per channel and step.

  `x_k = (u_k - <a, x_(k-1)>, x_(k-1) without its last)`, a filtered shift
  register, and `y_k = C x_k`; or `y_k = h_0 u_k + C x_(k-1)` with a feedthrough.

  Source: Parnichkun et al., 2024, arXiv 2405.06147, section 3.1 and appendix A.

  Args:
    input_BLD: u.
    readout_DS: C, not the numerator (`rtf_kernel`).
    denominator_DS: a.
    initial_BDS: states before the first token.
    feedthrough_D: h_0; None for none, and no delay.
    places: see `jaxformers.ops.lti_convolution`.

  Returns:
    Outputs, and the last states.
  """
  dtype = denominator_DS.dtype
  denominator, readout = (x.T[:, None] for x in (denominator_DS, readout_DS))

  def dot(weight_S1D, x_SBD):
    # A product with ones: in a loop on CPUs sums take many times as long.
    ones_S = jnp.ones(len(x_SBD), dtype)
    return jnp.einsum(
      'S,SBD->BD', ones_S, weight_S1D * x_SBD, precision='highest'
    )

  def step(x_SBD, u_BD):
    first_BD = u_BD - dot(denominator, x_SBD)
    new_SBD = jnp.concatenate([first_BD[None], x_SBD[:-1]])
    if feedthrough_D is None:
      return new_SBD, dot(readout, new_SBD)
    return new_SBD, feedthrough_D * u_BD + dot(readout, x_SBD)

  initial_SBD = jnp.moveaxis(initial_BDS.astype(dtype), 2, 0)
  out_BLD, last_SBD = step_through(
    step, initial_SBD, input_BLD.astype(dtype), places=places
  )
  return out_BLD.astype(input_BLD.dtype), jnp.moveaxis(last_SBD, 0, 2)


def _check_length(denominator_DS, length):
  """Raises unless a kernel is longer than the states are many."""
  states = denominator_DS.shape[-1]
  if length <= states:
    raise ValueError(
      f'a kernel of {states} states must be longer than them, got '
      f'length={length}; choose a longer one or fewer states.'
    )
