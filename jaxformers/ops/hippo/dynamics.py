"""How a memory goes on: by exact LegS, by approximations of it, by a constant.

A `Dynamics` knows one step, which may depend on the times before and after it. An
exact one can also go through a chunk of samples at once.
"""

import dataclasses
import functools
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Inexact
import numpy as np

from jaxformers.ops.hippo.discretize import Discretization
from jaxformers.ops.hippo.discretize import discretize_system
from jaxformers.ops.hippo.fourier import FouS
from jaxformers.ops.hippo.legendre import LegS
from jaxformers.ops.hippo.legs import LegsChange
from jaxformers.ops.hippo.legs import at_nodes
from jaxformers.ops.hippo.legs import change_at_nodes
from jaxformers.ops.hippo.legs import integrals
from jaxformers.ops.hippo.legs import legs_change
from jaxformers.ops.hippo.legs import legs_multiply
from jaxformers.ops.hippo.legs import legs_solve
from jaxformers.ops.hippo.legs import shrinkage
from jaxformers.ops.hippo.measures import LinearSystem
from jaxformers.ops.hippo.measures import Measure
from jaxformers.ops.hippo.measures import check_size
from jaxformers.ops.hippo.times import Chunk


@runtime_checkable
class Dynamics(Protocol):
  """One step of a memory.

  Attributes:
    size: S.
    dtype: smallest dtype of the states.
  """

  size: int
  dtype: Any

  def steps(self, chunk: Chunk, dtype: Any) -> Any:
    """Returns what the steps need, a tree of arrays `[B, C, ...]`; B may be 1.

    Args:
      chunk: where they stand.
      dtype: of the states.
    """
    ...

  def step(
    self, step: Any, x_BSD: Inexact[Array, 'B S D'], u_BD: Float[Array, 'B D']
  ) -> Inexact[Array, 'B S D']:
    """Goes on by one sample.

    Args:
      step: `steps` at one place.
      x_BSD: state before.
      u_BD: the sample.
    """
    ...


@dataclasses.dataclass(frozen=True)
class ExactLegS:
  """The whole history, without any error but rounding. The default.

  Source: Gu et al., "HiPPO", 2020, arXiv 2008.07669, theorem 2; within chunks by
  the integrals of `legs_projection`.

  Attributes:
    size: S.
  """

  size: int
  dtype: Any = jnp.float32

  def __post_init__(self):
    check_size(self.size)

  def steps(self, chunk: Chunk, dtype: Any) -> LegsChange:
    return legs_change(chunk.since_BC, chunk.until_BC, self.size, dtype)

  def step(self, step: LegsChange, x_BSD: Array, u_BD: Array) -> Array:
    return x_BSD + _added(step, x_BSD, u_BD)

  def within(self, chunk: Chunk, u_BCD: Array) -> Array:
    """Returns what the samples of a chunk add to its states, `[B, C, S, D]`."""
    dtype = u_BCD.dtype
    elapsed_B1 = chunk.elapsed_B[:, None]
    edge_B1M = jnp.concatenate([elapsed_B1, chunk.until_BC], axis=1)[:, None]
    now_BC1 = chunk.until_BC[:, :, None]
    total_BC1 = jnp.where(now_BC1 > 0, now_BC1, 1).astype(dtype)
    old_BCM = jnp.clip((now_BC1 - edge_B1M).astype(dtype) / total_BC1, 0, 1)
    new_BCM = jnp.clip(edge_B1M.astype(dtype) / total_BC1, 0, 1)
    at_edges = integrals(old_BCM, new_BCM, self.size)
    # Integrals up to the start of a segment are 0.
    begins_B1M1 = chunk.begins_BC[:, None, :, None]
    rest = at_edges[:, :, 1:] - jnp.where(begins_B1M1, 0, at_edges[:, :, :-1])
    length_B1M = (chunk.until_BC - chunk.since_BC)[:, None].astype(dtype)
    mean = (length_B1M / total_BC1)[..., None]
    weights = jnp.concatenate([mean, rest], axis=-1)
    weights = jnp.where(chunk.sees_BCM[..., None], weights, 0)
    return _rows(jnp.swapaxes(weights, 2, 3), u_BCD)

  def carried(self, chunk: Chunk, x_BSD: Array) -> Array:
    """Returns what is left of the state at each place, `[B, C, S, D]`."""
    elapsed_B1 = chunk.elapsed_B[:, None]
    shrink_BC = shrinkage(elapsed_B1, chunk.until_BC, x_BSD.dtype)
    change_BCSQ = change_at_nodes(shrink_BC, self.size)
    left_BCSD = x_BSD[:, None] + _rows(change_BCSQ, at_nodes(x_BSD))
    return jnp.where(chunk.segment_BC[..., None, None] == 0, left_BCSD, 0)

  def joined(self, earlier: Any, later: Any) -> Any:
    """Joins stretches `(since, until, added)`; never multiplies transitions."""
    since_BC, _, added_BCSD = earlier
    start_BC, until_BC, more_BCSD = later
    shrink_BC = shrinkage(start_BC, until_BC, added_BCSD.dtype)
    change_BCSQ = change_at_nodes(shrink_BC, self.size)
    flat = added_BCSD.reshape(-1, *added_BCSD.shape[2:])
    values = at_nodes(flat).reshape(*added_BCSD.shape)
    moved_BCSD = jnp.matmul(change_BCSQ, values, precision='highest')
    since_BC = jnp.where(start_BC == 0, 0, since_BC)
    return since_BC, until_BC, added_BCSD + moved_BCSD + more_BCSD


LegSScheme = Literal[
  'midpoint',
  'bilinear_log',
  'bilinear',
  'bilinear_start',
  'bilinear_step',
  'forward_euler',
  'backward_euler',
]


@dataclasses.dataclass(frozen=True)
class ApproximateLegS:
  r"""LegS by a difference scheme, O(S) per step and channel.

  `(I - alpha A) x+ = (I + beta A) x + gamma B u` from time m to n:

  | scheme | alpha | beta | gamma | relative error |
  | --- | --- | --- | --- | --- |
  | `'midpoint'` | h/(n+m) | h/(n+m) | 2h/(n+m) | 9e-4 |
  | `'bilinear_log'` | h/2n | h/2m | ln(n/m) | 1.2e-3 |
  | `'bilinear'`, Su's text | h/2n | h/2m | h/m | 4.8e-3 |
  | `'bilinear_start'`, hippo-code's cell | h/2m | h/2m | h/m | 1.1e-2 |
  | `'bilinear_step'`, S4, hippo-code's time stamps | h/2n | h/2n | h/n | 1.2e-2 |
  | `'backward_euler'` | h/n | 0 | h/n | 1e-1 |
  | `'forward_euler'` | 0 | h/m | h/m | 1e-1 |

  where h = n - m; errors of the coefficients of a signal of 5 cycles after 512
  samples, 64 states. The exact scheme has 1e-12 in float64 and 1e-6 in float32.
  The first sample is taken exactly, except by `'bilinear_step'`, which starts
  from nothing. Forward Euler overflows float32 with 64 states; Su's split
  scheme grows in its first three steps, up to 1.8-fold.

  Source: Su Jianlin, "Revisiting SSM (2)", 2024, kexue.fm/archives/10137 (the
  split form, and O(S)); Gu et al., "HiPPO", 2020, arXiv 2008.07669, appendix
  B.3, and https://github.com/HazyResearch/hippo-code; midpoint and ln: the
  implicit midpoint rule, and the exact integral of 1/t.

  Attributes:
    size: S.
    scheme: see above.
  """

  size: int
  scheme: LegSScheme = 'midpoint'
  dtype: Any = jnp.float32

  def __post_init__(self):
    check_size(self.size)
    if self.scheme not in get_args(LegSScheme):
      raise ValueError(
        f'unknown scheme {self.scheme!r}; choose one of '
        f'{", ".join(get_args(LegSScheme))}, or ExactLegS.'
      )

  def steps(self, chunk: Chunk, dtype: Any) -> tuple[Array, ...]:
    m, n = (x.astype(dtype) for x in (chunk.since_BC, chunk.until_BC))
    is_first = m == 0
    h, n = n - m, jnp.where(n > 0, n, 1)
    # The first sample: what is divided by m is not used.
    m = jnp.where(is_first, n, m)
    return *self._coefficients(h, m, n), is_first

  def _coefficients(self, h, m, n):
    zero = jnp.zeros_like(h)
    return {
      'midpoint': (h / (n + m), h / (n + m), 2 * h / (n + m)),
      'bilinear_log': (h / (2 * n), h / (2 * m), jnp.log1p(h / m)),
      'bilinear': (h / (2 * n), h / (2 * m), h / m),
      'bilinear_start': (h / (2 * m), h / (2 * m), h / m),
      'bilinear_step': (h / (2 * n), h / (2 * n), h / n),
      'forward_euler': (zero, h / m, h / m),
      'backward_euler': (h / n, zero, h / n),
    }[self.scheme]

  def step(self, step: Any, x_BSD: Array, u_BD: Array) -> Array:
    alpha, beta, gamma, is_first = step
    beta, gamma = beta[:, None, None], gamma[:, None, None]
    u_B1D = u_BD[:, None]
    input_S1 = np.sqrt(2 * np.arange(self.size) + 1)[:, None].astype(u_BD.dtype)
    right = x_BSD + beta * legs_multiply(x_BSD) + gamma * (input_S1 * u_B1D)
    x_BSD = legs_solve(right, alpha)
    if self.scheme == 'bilinear_step':
      return x_BSD
    first_S1 = np.eye(self.size, 1, dtype=u_BD.dtype)
    return jnp.where(is_first[:, None, None], first_S1 * u_B1D, x_BSD)


@dataclasses.dataclass(frozen=True, eq=False)
class ConstantDynamics:
  """A system that is the same at all steps: windows, exponential memories.

  `x+ = A x + B u`, see `discretize_system`.

  Attributes:
    system: in discrete time.
  """

  system: LinearSystem

  @property
  def size(self) -> int:
    """S."""
    return len(self.system.b_S)

  @property
  def dtype(self) -> Any:
    """Complex for complex systems."""
    is_complex = np.iscomplexobj(self.system.a_ST)
    return jnp.complex64 if is_complex else jnp.float32

  def steps(self, chunk: Chunk, dtype: Any) -> LegsChange:
    one = 1, chunk.since_BC.shape[1]
    change_ST = jnp.asarray(self.system.a_ST - np.eye(self.size), dtype)
    return LegsChange(
      jnp.broadcast_to(change_ST, one + change_ST.shape),
      jnp.broadcast_to(jnp.asarray(self.system.b_S, dtype), (*one, self.size)),
    )

  def step(self, step: LegsChange, x_BSD: Array, u_BD: Array) -> Array:
    return x_BSD + _added(step, x_BSD, u_BD)

  def within(self, chunk: Chunk, u_BCD: Array) -> Array:
    """Returns what the samples of a chunk add to its states, `[B, C, S, D]`."""
    count_BC = jnp.cumsum(chunk.is_token_BC, axis=1)
    _, kernel_CS = self._powers(count_BC.shape[1])
    lag_BCM = jnp.maximum(count_BC[:, :, None] - count_BC[:, None], 0)
    weights = jnp.asarray(kernel_CS, u_BCD.dtype)[lag_BCM]
    weights = jnp.where(chunk.sees_BCM[..., None], weights, 0)
    return _rows(jnp.swapaxes(weights, 2, 3), u_BCD)

  def carried(self, chunk: Chunk, x_BSD: Array) -> Array:
    """Returns what is left of the state at each place, `[B, C, S, D]`."""
    count_BC = jnp.cumsum(chunk.is_token_BC, axis=1)
    powers, _ = self._powers(count_BC.shape[1])
    left_BCSD = _rows(jnp.asarray(powers, x_BSD.dtype)[count_BC], x_BSD)
    return jnp.where(chunk.segment_BC[..., None, None] == 0, left_BCSD, 0)

  def _powers(self, length):
    """Returns A^0 to A^C, and A^0 B to A^(C - 1) B, in float64."""
    powers = [np.eye(self.size)]
    for _ in range(length):
      powers.append(self.system.a_ST @ powers[-1])
    return np.stack(powers), np.stack(powers[:-1]) @ self.system.b_S


@dataclasses.dataclass(frozen=True)
class SteppedFouS:
  """The whole history in a Fourier series, step by step. For study only.

  With `A = V diag(a) V^-1` and `A e_0 = -B`, from time m to n
  `x+ = x + V (exp(a ln(n / m)) - 1) V^-1 (x - e_0 u)`: `O(S^2)` per step and
  channel. The step is exact, so that what is off is what the dynamics leave out,
  see `FouS`. V has a condition of 6 at 65 states.

  Source: Su Jianlin, "Revisiting SSM (2)", 2024, kexue.fm/archives/10137.

  Attributes:
    size: S, odd.
  """

  size: int
  dtype: Any = jnp.complex64

  def __post_init__(self):
    FouS().system(self.size)

  def steps(self, chunk: Chunk, dtype: Any) -> Array:
    real = jnp.finfo(dtype).dtype
    m, n = (x.astype(real) for x in (chunk.since_BC, chunk.until_BC))
    is_first = ((m == 0) & (n > 0))[..., None]
    passed_BC1 = jnp.log1p((n - m) / jnp.where(m > 0, m, 1))[..., None]
    eigenvalues_S, _, _ = _fourier_modes(self.size)
    change_BCS = jnp.expm1(jnp.asarray(eigenvalues_S, dtype) * passed_BC1)
    return jnp.where(is_first, -1, change_BCS)

  def step(self, step: Array, x_BSD: Array, u_BD: Array) -> Array:
    _, *maps = _fourier_modes(self.size)
    vectors_ST, inverse_ST = (jnp.asarray(x, x_BSD.dtype) for x in maps)
    rest_BSD = x_BSD.at[:, self.size // 2].add(-u_BD)
    rest_BSD = jnp.matmul(inverse_ST, rest_BSD, precision='highest')
    change_BSD = step[..., None] * rest_BSD
    return x_BSD + jnp.matmul(vectors_ST, change_BSD, precision='highest')


@functools.cache
def _fourier_modes(size):
  """Returns eigenvalues, eigenvectors and their inverse, of A of FouS."""
  eigenvalues_S, vectors_ST = np.linalg.eig(FouS().system(size).a_ST)
  return eigenvalues_S, vectors_ST, np.linalg.inv(vectors_ST)


def dynamics_of(
  measure: Measure,
  size: int,
  step: float = 1.0,
  method: Discretization | float = 'zoh',
) -> Dynamics:
  """Returns the dynamics of a measure for samples of one length.

  Args:
    measure: in the paper's normalisation, if it is LegS. FouS goes step by step.
    size: S.
    step: length of a sample, in the unit of the measure's window; LegS has no
      unit.
    method: see `discretize_system`.

  Raises:
    ValueError: for other normalisations of LegS.
  """
  if not measure.varies:
    return ConstantDynamics(
      discretize_system(measure.system(size), step, method)
    )
  if measure == FouS():
    return SteppedFouS(size)
  if measure != LegS():
    raise ValueError(
      f'{measure} has no exact steps; take LegS() in the normalisation of the '
      'paper, or a window.'
    )
  return ExactLegS(size)


def _added(step, x_BSD, u_BD):
  """Returns the change of the state by one step."""
  change = jnp.matmul(step.change_ST, x_BSD, precision='highest')
  return change + step.gain_S[..., None] * u_BD[:, None]


def _rows(weights, values):
  """Multiplies `[B, C, S, M]` and `[B, M, D]` in one product per row."""
  rows, length, size, inner = weights.shape
  weights = weights.reshape(rows, length * size, inner)
  out = jnp.matmul(weights, values, precision='highest')
  return out.reshape(*out.shape[:1], length, size, out.shape[-1])
