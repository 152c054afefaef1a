"""Measures whose bases are Laguerre polynomials."""

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np

from jaxformers.ops.hippo.measures import LinearSystem
from jaxformers.ops.hippo.measures import as_array
from jaxformers.ops.hippo.measures import check_size
from jaxformers.ops.hippo.measures import numpy_of
from jaxformers.ops.hippo.polynomials import laguerre


@dataclasses.dataclass(frozen=True)
class LagT:
  """All of the past with exponential weight: Laguerre polynomials.

  State n is u convolved with `exp(-(1 + beta) age / 2) L_n(age)`. For study:
  `ExponentialLegS` serves better.

  Source: Gu et al., 2020, arXiv 2008.07669, theorem 1 (beta = 1) and appendix
  D.2; beta = 0 as in the authors' code.

  Attributes:
    beta: 0 for functions that are orthonormal in themselves, 1 for polynomials
      under a weight, the paper's untilted variant.
  """

  beta: float = 0.0
  varies: ClassVar[bool] = False

  def system(self, size: int) -> LinearSystem:
    return _laguerre_system(size, 0.0, self.beta)

  def decoder(self, size: int, age: Any, elapsed: Any = None) -> Any:
    del elapsed
    age = as_array(age)
    weight = numpy_of(age).exp(-(1 - self.beta) * age / 2)
    return weight[..., None] * laguerre(age, size)


@dataclasses.dataclass(frozen=True)
class GeneralLagT:
  """LagT with generalised Laguerre polynomials, and scaled as in the paper.

  Stable where alpha = 0 and beta is small.

  Source: Gu et al., 2020, arXiv 2008.07669, appendix D.2, as in the authors'
  code (`glagt`).

  Attributes:
    alpha: order of the polynomials, above -1 and below 1.
    beta: tilt, above 0.
  """

  alpha: float = 0.0
  beta: float = 0.01
  varies: ClassVar[bool] = False

  def __post_init__(self):
    if not -1 < self.alpha < 1 or self.beta <= 0:
      raise ValueError(
        'GeneralLagT needs -1 < alpha < 1 and beta > 0, got '
        f'{self.alpha} and {self.beta}; LagT has beta = 0.'
      )

  def system(self, size: int) -> LinearSystem:
    system = _laguerre_system(size, self.alpha, self.beta)
    return system.scaled(self._gain() / self._norm(size))

  def decoder(self, size: int, age: Any, elapsed: Any = None) -> Any:
    del elapsed
    age = as_array(age)
    xp = numpy_of(age)
    weight = age**self.alpha * xp.exp(-(1 - self.beta) * age / 2)
    scale_S = self._gain() * self._norm(size)
    return weight[..., None] * laguerre(age, size, self.alpha) / scale_S

  def _norm(self, size):
    """Returns the norms of the polynomials."""
    gammas = [math.gamma(self.alpha + 1)]
    for n in range(1, size):
      gammas.append(gammas[-1] * (n + self.alpha) / n)
    return np.sqrt(gammas)

  def _gain(self):
    power = self.beta ** ((1 - self.alpha) / 2)
    return power / math.sqrt(math.gamma(1 - self.alpha))


def _laguerre_system(size, alpha, beta):
  """Returns the dynamics of `exp(-(1 + beta) t / 2) L_n^alpha(t)`."""
  check_size(size)
  a_ST = -(1 + beta) / 2 * np.eye(size) - np.tril(np.ones((size, size)), -1)
  return LinearSystem(a_ST, laguerre(np.zeros(()), size, alpha))
