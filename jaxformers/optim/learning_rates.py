"""Learning rates that minimise the bounds of `jaxformers.optim.bounds`.

Schedules are functions of the optimiser's count, which is 0 at the first step
(t = 1 in the bounds).
"""

from collections.abc import Sequence
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
import optax


def linear_decay(peak: float, steps: int) -> optax.Schedule:
  """Returns `peak (1 - t / (T + 1))`: optimal for the last iterate.

  It would be 0 one step after the last. The best peak is R / (G sqrt T).

  Source: Defazio et al., "Optimal Linear Decay Learning Rate Schedules and
  Further Refinements", 2023, arXiv 2310.07831; Su Jianlin, 2025,
  kexue.fm/archives/11494.

  Args:
    peak: what it falls from.
    steps: T.
  """
  return lambda count: peak * (1 - (count + 1) / (steps + 1))


def inv_sqrt(peak: float) -> optax.Schedule:
  """Returns `peak / sqrt t`: within a logarithm of optimal at every step.

  Source: Zinkevich, "Online Convex Programming and Generalized Infinitesimal
  Gradient Ascent", 2003, theorem 1; Su Jianlin, 2023, kexue.fm/archives/9902.

  Args:
    peak: the first; best for the regret is D / (G sqrt 2).
  """
  return lambda count: peak / jnp.sqrt(count + 1.0)


def horizon_constant(
  distance: float, gradient_bound: float, steps: int
) -> optax.Schedule:
  """Returns the constant `R / (G sqrt T)`: optimal for the mean iterate.

  Source: Zinkevich, 2003; Su Jianlin, 2025, kexue.fm/archives/11469.

  Args:
    distance: R, or the diameter of the domain.
    gradient_bound: G.
    steps: T.
  """
  return optax.constant_schedule(distance / (gradient_bound * math.sqrt(steps)))


def refined_from_grad_norms(
  norms: Sequence[float] | np.ndarray,
  distance: float = 1.0,
  kind: Literal['average', 'last', 'anytime'] = 'last',
  steps: int | None = None,
) -> optax.Schedule:
  """Returns the learning rates that are optimal for given gradient norms.

  With `Q_t = sum_(k<=t) G_k^-2`:

  - `'average'`, for the mean iterate weighted by them: `R G_t^-2 / sqrt Q_T`;
  - `'last'`, for the last iterate: that times `1 - Q_t / Q_T`. It warms up where
    gradients are large and then decays; constant norms give linear decay. The
    last learning rate is 0;
  - `'anytime'`, a heuristic that sees no future norm:
    `R G_t^-2 / sqrt Q_t (1 - t / T)`.

  Source: Defazio et al., 2023, arXiv 2310.07831; Su Jianlin, 2025,
  kexue.fm/archives/11530.

  Args:
    norms: of the gradients of an earlier run, positive, evenly spaced over its
      steps. Smooth them first (`smoothed`).
    distance: R.
    kind: see above.
    steps: of the run to come, if other than the number of norms; the learning
      rates are interpolated, and scaled by the bound's 1 / sqrt T.

  Raises:
    ValueError: if a norm is not positive, or the kind unknown.
  """
  rates = distance * refined_rates(norms, kind)
  steps = len(rates) if steps is None else steps
  return from_rates(rates * math.sqrt(len(rates) / steps), steps)


def refined_rates(
  norms: Sequence[float] | np.ndarray, kind: str = 'last'
) -> np.ndarray:
  """Returns the learning rates of `refined_from_grad_norms` for R = 1.

  Source: see there.

  Args:
    norms: see there.
    kind: see there.

  Raises:
    ValueError: if a norm is not positive, or the kind unknown.
  """
  norms = np.asarray(norms, np.float64)
  if norms.ndim != 1 or norms.size == 0 or not (norms > 0).all():
    raise ValueError(
      f'norms must be positive numbers, got shape {norms.shape} with smallest '
      f'{norms.min(initial=0)}; smooth them to fill gaps.'
    )
  inverse = norms**-2.0
  so_far = np.cumsum(inverse)
  progress = np.arange(1, len(norms) + 1) / len(norms)
  rates = {
    'average': inverse / math.sqrt(so_far[-1]),
    'last': inverse / math.sqrt(so_far[-1]) * (1 - so_far / so_far[-1]),
    'anytime': inverse / np.sqrt(so_far) * (1 - progress),
  }
  if kind not in rates:
    raise ValueError(f'kind must be one of {[*rates]}, got {kind!r}.')
  return rates[kind]


def from_rates(
  rates: Sequence[float] | np.ndarray, steps: int
) -> optax.Schedule:
  """Returns the schedule that stretches given learning rates over a run.

  Source: none; linear interpolation.

  Args:
    rates: evenly spaced over the run, the last at its last step.
    steps: of the run; later steps repeat the last.
  """
  old = np.arange(1, len(rates) + 1) / len(rates)
  new = np.arange(1, steps + 1) / steps
  table = np.interp(new, old, rates).astype(np.float32)
  return lambda count: jnp.asarray(table)[jnp.clip(count, 0, steps - 1)]


def smoothed(norms: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
  """Returns the running median over a window, as refined schedules want.

  Source: Defazio et al., 2023, arXiv 2310.07831: a median filter.

  Args:
    norms: one per step.
    window: number of neighbours, odd; near the ends it is cut off.

  Raises:
    ValueError: if the window is not odd and positive.
  """
  if window < 1 or window % 2 == 0:
    raise ValueError(f'window must be odd and positive, got {window}.')
  reach = window // 2
  norms = np.asarray(norms, np.float64)
  padded = np.pad(norms, reach, constant_values=np.nan)
  windows = np.lib.stride_tricks.sliding_window_view(padded, window)
  return np.nanmedian(windows, axis=1)
