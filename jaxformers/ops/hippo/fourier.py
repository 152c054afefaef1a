"""Measures whose bases are sines and cosines."""

import dataclasses
from typing import Any, ClassVar, Literal

import numpy as np

from jaxformers.ops.hippo.measures import LinearSystem
from jaxformers.ops.hippo.measures import as_array
from jaxformers.ops.hippo.measures import check_size
from jaxformers.ops.hippo.measures import check_window
from jaxformers.ops.hippo.measures import numpy_of
from jaxformers.ops.hippo.measures import share
from jaxformers.ops.hippo.measures import within


@dataclasses.dataclass(frozen=True)
class FouT:
  """A window of the last `window`: a Fourier series, translated.

  At the seam of a period the series converges to the mean of both ends, so what
  leaves the window is `2 sum c_n - u`: kappa = 2. Su's derivation takes
  `sum c_n` for it, kappa = 1, which leaves echoes: the mean's impulse
  response is 2/3 in the window, 2/9 in the next, 2/27, ... That one is the
  `fourier_decay` of S4.

  In the real form states are (cos_0, sin_0, cos_1, sin_1, ...), of which sin_0
  is dead and keeps sizes even; in the complex one frequencies run from -M to M
  with 2 M + 1 = S.

  Source: Gu et al., 2022, arXiv 2206.12037, section 4; Su Jianlin, 2024,
  kexue.fm/archives/10114 (complex, kappa = 1).

  Attributes:
    window: w, in the unit of the steps.
    kappa: see above.
    form: of the states.
  """

  window: float = 1.0
  kappa: float = 2.0
  form: Literal['real', 'complex'] = 'real'
  varies: ClassVar[bool] = False

  def __post_init__(self):
    check_window(self.window)
    if self.form not in ('real', 'complex'):
      raise ValueError(f"form must be 'real' or 'complex', got {self.form!r}.")

  def system(self, size: int) -> LinearSystem:
    if self.form == 'real':
      a_ST, b_S = _fourier(size, self.window)
    else:
      a_ST = 2j * np.pi / self.window * np.diag(_frequencies(size))
      b_S = np.ones(size)
    rate = self.kappa / self.window
    return LinearSystem(a_ST - rate * np.outer(b_S, b_S), rate * b_S)

  def decoder(self, size: int, age: Any, elapsed: Any = None) -> Any:
    del elapsed
    age = within(as_array(age), self.window) / self.window
    xp = numpy_of(age)
    if self.form == 'complex':
      return xp.exp(-2j * np.pi * _frequencies(size) * age[..., None])
    _, b_S = _fourier(size, self.window)
    angle = 2 * np.pi * np.arange(size // 2) * age[..., None]
    waves = xp.stack([b_S[::2] * xp.cos(angle), b_S[::2] * xp.sin(angle)], -1)
    return waves.reshape(*age.shape, size)


@dataclasses.dataclass(frozen=True)
class FouD:
  """The frequencies of FouT, damped instead of cut off: `diag` but for pairs.

  A has the eigenvalues -1/2 +- 2 pi i j exactly, so it is normal. It projects on
  no orthogonal basis, hence has no decoder.

  Source: Gu et al., 2022, arXiv 2206.12037, as in the authors' code
  (`fourier_diag`).
  """

  varies: ClassVar[bool] = False

  def system(self, size: int) -> LinearSystem:
    a_ST, b_S = _fourier(size, 1.0)
    return LinearSystem(a_ST - np.eye(size) / 2, b_S)

  def decoder(self, size: int, age: Any, elapsed: Any = None) -> Any:
    raise ValueError(
      'FouD projects on no orthogonal basis, so nothing can be decoded; FouT has '
      'the same frequencies and a decoder.'
    )


@dataclasses.dataclass(frozen=True)
class FouS:
  """The whole history in a Fourier series, complex. For study only.

  Unlike LegS it is not exact: coefficients of a sine of 3 cycles are off by 0.28,
  0.18, 0.12 and 0.07 of their norm for 2 M + 1 states, M = 4, 8, 16 and 32: about
  `M^(-2/3)`, whatever the length. Sums of 1, 2 and 3 cycles with random phases are
  off by 0.17 to 0.26 at M = 4, and less in the same proportions.

  Source: Su Jianlin, "Revisiting SSM (2)", 2024, kexue.fm/archives/10137.
  """

  varies: ClassVar[bool] = True

  def system(self, size: int) -> LinearSystem:
    n = _frequencies(size)[:, None]
    gap_ST = n - n.T
    a_ST = -n / np.where(gap_ST == 0, 1, gap_ST) + 0j
    np.fill_diagonal(a_ST, 1j * np.pi * n[:, 0] - 1)
    return LinearSystem(a_ST, np.ones(size))

  def decoder(self, size: int, age: Any, elapsed: Any = None) -> Any:
    age = share(age, elapsed, 'FouS')
    turns = -2j * np.pi * _frequencies(size)
    return numpy_of(age).exp(turns * age[..., None])


def _fourier(size, window):
  """Returns the rotations of all frequencies, and what the input does."""
  check_size(size)
  if size % 2:
    raise ValueError(f'a real Fourier basis needs an even size, got {size}.')
  rate = np.zeros(size - 1)
  rate[::2] = 2 * np.pi * np.arange(size // 2) / window
  b_S = np.zeros(size)
  b_S[::2] = np.sqrt(2)
  b_S[0] = 1
  return np.diag(rate, -1) - np.diag(rate, 1), b_S


def _frequencies(size):
  if size < 1 or size % 2 == 0:
    raise ValueError(
      f'complex Fourier states run from -M to M, an odd number; got {size}.'
    )
  return np.arange(size) - size // 2
