"""What stochastic gradient descent guarantees for a schedule.

For losses that are convex in the parameters, gradients of at most length G, and
T steps `theta <- theta - eta_t g_t`. Sums are in float64 on the host: tails of
float32 sums are lost from 1e5 steps on.

Arguments shared by all functions: `learning_rates` is eta, positive, one per
step; `gradient_bound` is G, or one number per step.
"""

from collections.abc import Sequence

import numpy as np

Numbers = float | Sequence[float] | np.ndarray


def average_regret_bound(
  learning_rates: Numbers, diameter: float, gradient_bound: Numbers
) -> float:
  """Bounds the mean regret within a bounded domain, whatever the data.

  `D^2 / (2 T eta_T) + sum eta_t G^2 / (2 T)` bounds the mean over steps of
  `L(x_t, theta_t) - L(x_t, theta*)` for any sequence of losses, if steps are
  projected to a convex domain of diameter D and learning rates never rise. A
  constant `D / (G sqrt T)` gives `D G / sqrt T`.

  Source: Zinkevich, "Online Convex Programming and Generalized Infinitesimal
  Gradient Ascent", 2003, theorem 1; Su Jianlin, 2023, kexue.fm/archives/9902.

  Args:
    learning_rates: see the module; never rising.
    diameter: D.
    gradient_bound: see the module.

  Raises:
    ValueError: if a learning rate is not positive, or they rise.
  """
  eta, square = _checked(learning_rates, gradient_bound, never_rising=True)
  steps = len(eta)
  return float(
    diameter**2 / (2 * steps * eta[-1]) + np.sum(eta * square) / (2 * steps)
  )


def average_bound(
  learning_rates: Numbers, distance: float, gradient_bound: Numbers
) -> float:
  """Bounds the mean loss of all iterates over the best, without a domain.

  `(R^2 + sum eta_t^2 G^2) / (2 T eta_T)`, in expectation over independent data,
  for learning rates that never rise; by convexity it also bounds the loss at
  the mean iterate.

  Source: Su Jianlin, 2025, kexue.fm/archives/11469.

  Args:
    learning_rates: see the module; never rising.
    distance: R, of the first iterate from the best parameters.
    gradient_bound: see the module.

  Raises:
    ValueError: if a learning rate is not positive, or they rise.
  """
  eta, square = _checked(learning_rates, gradient_bound, never_rising=True)
  total = distance**2 + np.sum(eta**2 * square)
  return float(total / (2 * len(eta) * eta[-1]))


def weighted_average_bound(
  learning_rates: Numbers, distance: float, gradient_bound: Numbers
) -> float:
  """Bounds the mean loss with learning rates as weights, over the best.

  `(R^2 + sum eta_t^2 G^2) / (2 sum eta_t)`, for any learning rates; by convexity
  it also bounds the loss at the iterate averaged with these weights
  (`average_iterates`).

  Source: Su Jianlin, 2025, kexue.fm/archives/11469.

  Args:
    learning_rates: see the module.
    distance: see `average_bound`.
    gradient_bound: see the module.

  Raises:
    ValueError: if a learning rate is not positive.
  """
  eta, square = _checked(learning_rates, gradient_bound)
  total = distance**2 + np.sum(eta**2 * square)
  return float(total / (2 * np.sum(eta)))


def last_iterate_bound(
  learning_rates: Numbers, distance: float, gradient_bound: Numbers
) -> float:
  """Bounds the loss of the last iterate over the best.

  `R^2 / (2 eta_(1:T)) + sum_t eta_t^2 G^2 / (2 eta_(min(t+1, T):T))`, in
  expectation, where `eta_(k:T)` sums from k to T; for any learning rates. Linear
  decay from `R / (G sqrt T)` gives `2 R G / sqrt T` for large T.

  Source: Defazio et al., "Optimal Linear Decay Learning Rate Schedules and
  Further Refinements", 2023, arXiv 2310.07831; Su Jianlin, 2025,
  kexue.fm/archives/11494.

  Args:
    learning_rates: see the module.
    distance: see `average_bound`.
    gradient_bound: see the module.

  Raises:
    ValueError: if a learning rate is not positive.
  """
  eta, square = _checked(learning_rates, gradient_bound)
  tails = np.cumsum(eta[::-1])[::-1]
  after = np.append(tails[1:], tails[-1])
  return float(
    distance**2 / (2 * tails[0]) + np.sum(eta**2 * square / after) / 2
  )


def last_iterate_bound_never_rising(
  learning_rates: Numbers, distance: float, gradient_bound: Numbers
) -> float:
  """Bounds the loss of the last iterate for learning rates that never rise.

  `R^2 / (2 T eta_T) + sum_t (eta_t^2 G^2 / eta_T) / (2 max(1, T - t))`, in
  expectation: weaker than `last_iterate_bound` where rates fall to near 0.

  Source: Su Jianlin, 2025, kexue.fm/archives/11480.

  Args:
    learning_rates: see the module; never rising.
    distance: see `average_bound`.
    gradient_bound: see the module.

  Raises:
    ValueError: if a learning rate is not positive, or they rise.
  """
  eta, square = _checked(learning_rates, gradient_bound, never_rising=True)
  steps = len(eta)
  left = np.maximum(1, steps - np.arange(1, steps + 1))
  total = distance**2 / steps + np.sum(eta**2 * square / left)
  return float(total / (2 * eta[-1]))


def _checked(learning_rates, gradient_bound, never_rising=False):
  """Returns learning rates and squared bounds, float64 `[T]`."""
  eta = np.atleast_1d(np.asarray(learning_rates, np.float64))
  if eta.ndim != 1 or eta.size == 0 or not (eta > 0).all():
    raise ValueError(
      'learning_rates must be positive, one per step; a schedule that ends at 0 '
      f'has no bound: got shape {eta.shape}, smallest {eta.min(initial=0)}.'
    )
  if never_rising and (np.diff(eta) > 0).any():
    raise ValueError(
      'this bound holds for learning rates that never rise; use '
      'weighted_average_bound or last_iterate_bound.'
    )
  bound = np.broadcast_to(np.asarray(gradient_bound, np.float64), eta.shape)
  return eta, bound**2
