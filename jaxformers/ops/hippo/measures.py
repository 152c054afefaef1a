"""What a memory of fixed size remembers: bases, their dynamics, their inverses.

A measure says which part of the past u(t - age) is projected on which functions.
The coefficients c obey a linear ODE, `c' = A c + B u`, or `c' = (A c + B u) / t`
where the whole history is stretched over one basis, and `decoder` turns them
back into the signal. Matrices are float64 and built on the host; nothing in
them is learned.

Letters: S (and T, a second axis of the same size) states.

Source: Gu, Dao, Ermon, Rudra and Re, "HiPPO: Recurrent Memory with Optimal
Polynomial Projections", 2020, arXiv 2008.07669; Gu et al., "How to Train Your
HiPPO", 2022, arXiv 2206.12037; Su Jianlin, "Revisiting SSM", 1 and 2, 2024,
kexue.fm/archives/10114 and 10137.
"""

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Inexact
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class LinearSystem:
  """A linear system with one input, in continuous or in discrete time.

  Attributes:
    a_ST: float64 or complex128.
    b_S: what the input does.
  """

  a_ST: Inexact[np.ndarray, 'S T']
  b_S: Inexact[np.ndarray, ' S']

  def scaled(self, scale_S: Any) -> 'LinearSystem':
    """Returns the dynamics of the states times `scale_S`."""
    scale_S = np.asarray(scale_S)
    a_ST = scale_S[:, None] * self.a_ST / scale_S
    return LinearSystem(a_ST, scale_S * self.b_S)


@runtime_checkable
class Measure(Protocol):
  """A basis for the past, and the linear dynamics of its coefficients.

  Attributes:
    varies: whether the dynamics are divided by the time since the start.
  """

  varies: ClassVar[bool]

  def system(self, size: int) -> LinearSystem:
    """Returns A and B.

    Args:
      size: S, number of coefficients.
    """
    ...

  def decoder(
    self, size: int, age: Any, elapsed: Any = None
  ) -> Float[np.ndarray, '*N S']:
    """Returns the rows that give u(t - age) from coefficients at time t.

    Args:
      size: S.
      age: how long ago, any shape; numbers, or jax arrays to trace.
      elapsed: t, of a shape that broadcasts with `age`; needed by measures of
        the whole history alone.
    """
    ...


def reconstruct(
  measure: Measure,
  x_BSD: Inexact[Array, 'B S D'],
  age_N: Float[Array, ' N'],
  elapsed_B: Float[Array, ' B'] | None = None,
) -> Float[Array, 'B N D']:
  """Returns what a memory knows of the past: `u(t - age)`.

  Samples that were held from j to j + 1 are best read in the middle, so after
  k of them the age of sample j is `k - j - 1/2` steps.

  Source: Gu et al., 2020, arXiv 2008.07669, section 2.2.

  Args:
    measure: of the memory.
    x_BSD: its states.
    age_N: how long ago.
    elapsed_B: time since the start of each row, for measures of the whole
      history.
  """
  size = x_BSD.shape[-2]
  if elapsed_B is not None:
    elapsed_B = jnp.asarray(elapsed_B)[:, None]
  decoder_BNS = measure.decoder(size, age_N, elapsed_B)
  return jnp.real(jnp.matmul(decoder_BNS, x_BSD, precision='highest'))


def share(age: Any, elapsed: Any, name: str) -> Any:
  """Returns ages in units of the whole history.

  Args:
    age: how long ago.
    elapsed: time since the start.
    name: of the measure, for the message.

  Raises:
    ValueError: if nothing is said of the start, or it lies after an age.
  """
  if elapsed is None:
    raise ValueError(
      f'{name} stretches its basis over all that has passed, so decoding needs '
      'elapsed, the time since the start.'
    )
  elapsed = as_array(elapsed)
  return within(as_array(age), elapsed) / elapsed


def within(age: Any, window: Any) -> Any:
  """Returns ages, if they lie in a window; traced ones are taken as given.

  Args:
    age: how long ago.
    window: how long ago it may be.

  Raises:
    ValueError: if one does not.
  """
  known = not isinstance(age, Array) and not isinstance(window, Array)
  slack = 1e-9 * np.max(window) if known else 0
  if known and ((age < -slack) | (age > window + slack)).any():
    raise ValueError(
      f'ages from {age.min():g} to {age.max():g} leave the window of '
      f'{np.max(window):g}, of which alone the memory knows.'
    )
  return age


def as_array(x: Any) -> Any:
  """Returns a jax array as it is, and numbers in float64."""
  return x if isinstance(x, Array) else np.asarray(x, np.float64)


def numpy_of(x: Any) -> Any:
  """Returns the module whose functions compute with an array."""
  return jnp if isinstance(x, Array) else np


def check_size(size: int) -> None:
  """Raises unless there is at least one state."""
  if size < 1:
    raise ValueError(f'a memory needs at least one state, got size={size}.')


def check_window(window: float) -> None:
  """Raises unless a window is longer than 0."""
  if not window > 0:
    raise ValueError(f'a window must be longer than 0, got {window}.')
