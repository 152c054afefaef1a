"""Measures whose bases are Legendre polynomials."""

import dataclasses
import math
from typing import Any, ClassVar, Literal

from jaxtyping import Float
import numpy as np

from jaxformers.ops.hippo.measures import LinearSystem
from jaxformers.ops.hippo.measures import as_array
from jaxformers.ops.hippo.measures import check_size
from jaxformers.ops.hippo.measures import check_window
from jaxformers.ops.hippo.measures import numpy_of
from jaxformers.ops.hippo.measures import share
from jaxformers.ops.hippo.measures import within
from jaxformers.ops.hippo.polynomials import legendre

Normalization = Literal['paper', 'orthonormal', 'legendre']


def normalization_scale(
  normalization: str, size: int
) -> Float[np.ndarray, ' S']:
  r"""Returns what turns coefficients of the paper's normalisation into others.

  The signal is $\sum c_n \sqrt{2n+1} P_n$ (`'paper'`), $\sum c_n
  \sqrt{(2n+1)/2} P_n$ (`'orthonormal'` on [-1, 1]), $\sum c_n P_n$
  (`'legendre'`, whose components are of more equal size), or $\sum c_n (-1)^n
  P_n$ (`'lmu'`, the newest at -1). Su's text for LegT prints $2/\sqrt{2n+1}$
  for the ratio of the third to the second, which makes B too small by
  $\sqrt 2$; it is $\sqrt{2/(2n+1)}$.

  Source: Su Jianlin, 2024, kexue.fm/archives/10114; Voelker, Kajic and
  Eliasmith, "Legendre Memory Units", 2019, equations 1 and 2 (lmu).

  Args:
    normalization: one of the four.
    size: S.

  Raises:
    ValueError: for another name.
  """
  n = np.arange(size)
  scales = {
    'paper': np.ones(size),
    'orthonormal': np.full(size, math.sqrt(2)),
    'legendre': np.sqrt(2 * n + 1),
    'lmu': (-1.0) ** n * np.sqrt(2 * n + 1),
  }
  if normalization not in scales:
    raise ValueError(
      f'unknown normalization {normalization!r}; choose one of '
      f'{", ".join(scales)}.'
    )
  return scales[normalization]


def _roots(size):
  """Returns the square roots of 2n + 1."""
  check_size(size)
  return np.sqrt(2 * np.arange(size) + 1.0)


@dataclasses.dataclass(frozen=True)
class LegS:
  """The whole history, all of it alike: Legendre polynomials on [0, t].

  The one measure without any approximation: the truncated system returns exactly
  the first S coefficients of the projection. Its step has no size
  (`legs_change`), and it forgets polynomially. A diverges from its normal
  relatives so far that it must not be diagonalised: the condition of its
  eigenvectors is 8e10 at S = 16.

  Source: Gu et al., 2020, arXiv 2008.07669, theorem 2.

  Attributes:
    normalization: see `normalization_scale`.
  """

  normalization: Normalization = 'paper'
  varies: ClassVar[bool] = True

  def system(self, size: int) -> LinearSystem:
    root_S = _roots(size)
    a_ST = np.diag(np.arange(size)) - np.tril(np.outer(root_S, root_S))
    scale_S = normalization_scale(self.normalization, size)
    return LinearSystem(a_ST, root_S).scaled(scale_S)

  def decoder(self, size: int, age: Any, elapsed: Any = None) -> Any:
    age = share(age, elapsed, 'LegS')
    scale_S = normalization_scale(self.normalization, size)
    return legendre(1 - 2 * age, size) * (_roots(size) / scale_S)


@dataclasses.dataclass(frozen=True)
class ExponentialLegS:
  """LegS in logarithmic time: A and B of LegS in a system that does not vary.

  What S4 does: history is weighted by exp(-age), and forgotten exponentially.
  The kernel of state n is `sqrt(2n+1) e^-age P_n(2 e^-age - 1)`. The
  well-behaved memory of exponential weight, where LagT is not.

  Source: Gu et al., 2022, arXiv 2206.12037, section 3.2; Su Jianlin, 2024,
  kexue.fm/archives/10162.
  """

  varies: ClassVar[bool] = False

  def system(self, size: int) -> LinearSystem:
    return LegS().system(size)

  def decoder(self, size: int, age: Any, elapsed: Any = None) -> Any:
    del elapsed
    age = as_array(age)
    return legendre(2 * numpy_of(age).exp(-age) - 1, size) * _roots(size)


@dataclasses.dataclass(frozen=True)
class LegT:
  """A window of the last `window`: Legendre polynomials, translated.

  Approximate: what leaves the window is replaced by its own expansion. Codes of
  one name have several windows: 1 in the paper's and in `visualizations.py` of
  S4, 2 in the `transition` of S4.

  Source: Gu et al., 2020, arXiv 2008.07669, theorem 1 and appendix D.1; Voelker,
  Kajic and Eliasmith, "Legendre Memory Units", 2019 (`'lmu'`).

  Attributes:
    window: w, in the unit of the steps.
    normalization: see `normalization_scale`.
  """

  window: float = 1.0
  normalization: Literal['paper', 'orthonormal', 'legendre', 'lmu'] = 'paper'
  varies: ClassVar[bool] = False

  def __post_init__(self):
    check_window(self.window)

  def system(self, size: int) -> LinearSystem:
    root_S, n = _roots(size), np.arange(size)
    sign_ST = np.where(n < n[:, None], 1.0, (-1.0) ** (n[:, None] - n))
    a_ST = -np.outer(root_S, root_S) * sign_ST
    system = LinearSystem(a_ST / self.window, root_S / self.window)
    return system.scaled(normalization_scale(self.normalization, size))

  def decoder(self, size: int, age: Any, elapsed: Any = None) -> Any:
    del elapsed
    age = within(as_array(age), self.window) / self.window
    scale_S = normalization_scale(self.normalization, size)
    return legendre(1 - 2 * age, size) * (_roots(size) / scale_S)
