"""Linear systems in discrete time, of inputs that are held during each step."""

import math
from typing import Literal

from jaxtyping import Inexact
import numpy as np

from jaxformers.ops.hippo.measures import LinearSystem

Discretization = Literal['zoh', 'bilinear', 'forward_euler', 'backward_euler']
IMPLICIT = {'forward_euler': 0.0, 'bilinear': 0.5, 'backward_euler': 1.0}


def discretize_system(
  system: LinearSystem, step: float, method: Discretization | float = 'zoh'
) -> LinearSystem:
  """Returns the system that goes on by one step: `x+ = A x + B u`.

  With a share alpha of the step taken implicitly,

  `x+ = (I - alpha dt A)^-1 [(I + (1 - alpha) dt A) x + dt B u]`,

  which is Euler's method forward (0), the bilinear one (1/2) or Euler's backward
  (1). `'zoh'` is exact: `x+ = e^(dt A) x + (integral of e^(s A) B over the step)
  u`, from the exponential of the block matrix `[[A, B], [0, 0]] dt`, so A may be
  singular. Forward Euler is unstable for most of these systems.

  Source: Gu et al., "HiPPO", 2020, arXiv 2008.07669, appendix B.3; the block
  matrix: Van Loan, "Computing Integrals Involving the Matrix Exponential", 1978.

  Args:
    system: in continuous time.
    step: dt, above 0.
    method: a name, or alpha from 0 to 1.

  Raises:
    ValueError: for another method, or a step that is not positive.
  """
  if not step > 0:
    raise ValueError(f'a step must be longer than 0, got {step}.')
  a_ST, b_S = system.a_ST, system.b_S
  size = len(b_S)
  if method == 'zoh':
    block = np.zeros((size + 1, size + 1), np.result_type(a_ST, b_S))
    block[:size, :size], block[:size, size] = a_ST, b_S
    block = matrix_exponential(step * block)
    return LinearSystem(block[:size, :size], block[:size, size])
  alpha = IMPLICIT.get(method, method)
  if isinstance(alpha, str) or not 0 <= alpha <= 1:
    raise ValueError(
      f'method must be zoh, {", ".join(IMPLICIT)} or a number from 0 to 1, got '
      f'{method!r}.'
    )
  left_ST = np.eye(size) - alpha * step * a_ST
  right_ST = np.eye(size) + (1 - alpha) * step * a_ST
  return LinearSystem(
    np.linalg.solve(left_ST, right_ST), np.linalg.solve(left_ST, step * b_S)
  )


def matrix_exponential(
  a_ST: Inexact[np.ndarray, 'S T'],
) -> Inexact[np.ndarray, 'S T']:
  """Computes e^A in float64, by scaling, a Pade approximant and squaring.

  Source: Higham, "The Scaling and Squaring Method for the Matrix Exponential
  Revisited", 2005, algorithm 2.3 with degree 13.

  Args:
    a_ST: real or complex.
  """
  bound, degree = 5.371920351148152, 13
  norm = np.linalg.norm(a_ST, 1)
  squarings = math.ceil(math.log2(norm / bound)) if norm > bound else 0
  a_ST = a_ST / 2.0**squarings
  eye_ST = np.eye(len(a_ST))
  # c_k = (26 - k)! 13! / (26! k! (13 - k)!), as a product.
  coefficient, power_ST = 1.0, eye_ST
  even_ST, odd_ST = eye_ST, np.zeros_like(a_ST)
  for k in range(1, degree + 1):
    coefficient *= (degree + 1 - k) / (k * (2 * degree + 1 - k))
    power_ST = power_ST @ a_ST
    if k % 2:
      odd_ST = odd_ST + coefficient * power_ST
    else:
      even_ST = even_ST + coefficient * power_ST
  result_ST = np.linalg.solve(even_ST - odd_ST, even_ST + odd_ST)
  for _ in range(squarings):
    result_ST = result_ST @ result_ST
  return result_ST
