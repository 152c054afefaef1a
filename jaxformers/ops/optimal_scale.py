"""The attention scale that gives the softmax its largest gradient.

For `p = softmax(alpha s)` the entries of the Jacobian sum to
`2 alpha (1 - sum p^2)` in magnitude. That vanishes as alpha goes to 0, and, where
the maximum is unique, as it goes to infinity; between, there is a best alpha.
All functions but `softmax_jacobian_l1` run on the host and return Python
floats, which go into a scale:

- dot products: `scale=GradientOptimal(n)`, that is `alpha / sqrt(d)`;
- cosines: `qk_norm=UnitNorm(), scale=ConstantScale(cosine_optimal_scale(n, d))`.

In a decoder n differs by row, but the best scale varies slowly: take the one of
half the longest length. Masked keys do not count in n.

Two caveats. The closed forms replace the mean of `sum p^2` by a quotient of
means, which at their own optimum is outside its range of validity: for sampled
scores the mean objective does not peak there but rises to a plateau, made by
rows whose two largest scores nearly tie. `empirical_optimal_scale` measures
instead. And a large gradient at initialisation is not fast training: no speed-up
over `alpha = 1` was seen with dot products; what does hold is that cosine
scores need a multiplier well above 1.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Literal

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np
from numpy.typing import ArrayLike

from jaxformers.ops.scales import Factor

Statistic = Literal['mean', 'median', 'geomean']


def softmax_jacobian_l1(
  weights: Float[Array, '*B M'], alpha: float = 1.0
) -> Float[Array, '*B']:
  """Computes the size of the Jacobian of a softmax from its weights.

  `alpha (1 - sum p^2)`, exactly half the sum of `|dp_i / ds_j|` for
  `p = softmax(alpha s)`; also `alpha (1 - 1 / N)` with the effective support N.

  Source: Su Jianlin, "Attention scale from gradient maximisation", 2023,
  kexue.fm/archives/9812.

  Args:
    weights: probabilities along the last axis.
    alpha: the multiplier of the scores that gave them.

  Returns:
    Numbers from 0 to alpha, in at least float32.
  """
  p = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
  return alpha * (1 - (p * p).sum(axis=-1))


def gaussian_optimal_scale(n: float) -> float:
  """Computes the best alpha for n scores of a standard normal distribution.

  Maximises `alpha (1 - exp(alpha^2) / n)`. The slope vanishes where
  `exp(alpha^2) (1 + 2 alpha^2) = n`, so `alpha = sqrt(W(n sqrt(e) / 2) - 1 / 2)`
  with Lambert's W. The article fits it by `0.84 sqrt(log n)` and recommends 2.5.

  Source: Su Jianlin, "Attention scale from gradient maximisation", 2023,
  kexue.fm/archives/9812; the closed form is ours.

  Args:
    n: number of keys, above 1.

  Returns:
    The multiplier for scores of unit variance: divide by `sqrt(d)` for dot
    products of standard normal vectors of width d.

  Raises:
    ValueError: if n is 1 or less.
  """
  _check_keys(n)
  return math.sqrt(max(_lambert_w(n * math.sqrt(math.e) / 2) - 0.5, 0))


def cosine_optimal_scale(n: float, d: int) -> float:
  """Computes the best alpha for cosines with n random directions.

  Maximises `alpha (1 - E[exp(2 alpha s)] / (n E[exp(alpha s)]^2))` for s of
  density proportional to `(1 - s^2)^((d - 3) / 2)` between -1 and 1. For
  d = 128 that is about `3.5 log(n)`, far above 1.

  Source: Su Jianlin, "Attention scale from gradient maximisation", 2023,
  kexue.fm/archives/9812.

  Args:
    n: number of keys, above 1.
    d: width of the vectors, at least 2.

  Returns:
    The multiplier for scores between -1 and 1.

  Raises:
    ValueError: if n is 1 or less, or d below 2.
  """
  _check_keys(n)
  if d < 2:
    raise ValueError(f'directions need a width d >= 2, got {d}.')
  quadrature = _directions(d)

  def slope(alpha):
    """Sign of minus the slope of the objective: rises from below 0."""
    log_1, mean_1 = _tilted(quadrature, alpha)
    log_2, mean_2 = _tilted(quadrature, 2 * alpha)
    growth = 2 * alpha * (mean_2 - mean_1)
    return log_2 - 2 * log_1 - math.log(n) + math.log1p(growth)

  high = 1.0
  while slope(high) < 0:
    high *= 2
  return _root(slope, 0.0, high)


def empirical_optimal_scale(
  scores: ArrayLike,
  statistic: Statistic = 'geomean',
  *,
  is_visible: ArrayLike | None = None,
) -> float:
  """Finds the alpha that maximises the softmax gradient of given scores.

  What is maximised is a statistic over rows of `alpha (1 - sum p^2)`. For
  normal scores the geometric mean peaks near `sqrt(2 log n)`; the mean rises to
  a plateau, and says little.

  Source: Su Jianlin, "Attention scale from gradient maximisation", 2023,
  kexue.fm/archives/9812; the statistics are ours.

  Args:
    scores: any leading axes, keys last; as scaled so far.
    statistic: how rows are summarised.
    is_visible: which scores count, broadcast to `scores`; None for all.

  Returns:
    The multiplier, to six digits. Rows with fewer than two keys are left out.

  Raises:
    ValueError: if no row has two keys, the statistic is unknown, or no multiplier
      is best, because most rows have tied maxima.
  """
  gaps, spread = _gaps(scores, is_visible)
  summary = _summary(statistic)

  def objective(log_alpha):
    return summary(math.exp(log_alpha), gaps)

  steps = np.linspace(math.log(2.0**-6), math.log(2.0**14), 81)
  steps -= math.log(spread)
  best = int(np.argmax([objective(step) for step in steps]))
  if best in (0, len(steps) - 1):
    raise ValueError(
      'the objective has no maximum: tied largest scores keep the gradient '
      'growing with the scale. Pass scores without ties.'
    )
  return math.exp(_peak(objective, steps[best - 1], steps[best + 1]))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class GradientOptimal(Factor):
  """Multiplies scores by `gaussian_optimal_scale(length) / sqrt(d)`.

  Replaces `InverseSqrt`, it does not multiply with it.

  Source: Su Jianlin, "Attention scale from gradient maximisation", 2023,
  kexue.fm/archives/9812.

  Attributes:
    length: number of keys; in a decoder, half the longest length.
  """

  length: int

  def __post_init__(self):
    _check_keys(self.length)

  def multiplier(self, visible_keys, head_dim):
    del visible_keys
    return gaussian_optimal_scale(self.length) / math.sqrt(head_dim)


def _check_keys(n):
  if not n > 1:
    raise ValueError(
      f'the gradient of a softmax needs more than 1 key, got n = {n}.'
    )


def _lambert_w(x):
  """Solves `w exp(w) = x` for x > 0 by Newton's method."""
  w = math.log1p(x)
  for _ in range(10):
    w -= (w - x * math.exp(-w)) / (1 + w)
  return w


def _directions(d):
  """Nodes `1 - s` and log weights of the density of cosines in d dimensions.

  With s = tanh(x) the density is `cosh(x)^(1 - d)`, smooth on the whole line,
  where the trapezoidal rule converges exponentially; and the nodes crowd
  towards s = 1, where large alpha looks.
  """
  step = min(0.02, 0.3 / math.sqrt(d))
  x = np.arange(-40, 40 + step, step)
  log_cosh = np.logaddexp(x, -x) - math.log(2)
  log_weight = (1 - d) * log_cosh
  return 2 / (1 + np.exp(2 * x)), log_weight - _log_sum(log_weight)


def _log_sum(x):
  return x.max() + math.log(np.exp(x - x.max()).sum())


def _tilted(quadrature, alpha):
  """Returns `log E[exp(alpha (s - 1))]` and the mean of s - 1 under it."""
  gap, log_weight = quadrature
  log_tilted = log_weight - alpha * gap
  log_total = _log_sum(log_tilted)
  return log_total, -float(np.exp(log_tilted - log_total) @ gap)


def _root(f, low, high):
  """Bisects a rising function down to neighbouring floats."""
  while low < (middle := (low + high) / 2) < high:
    low, high = (low, middle) if f(middle) > 0 else (middle, high)
  return high


def _peak(f: Callable[[float], float], low: float, high: float) -> float:
  """Narrows a bracket of a maximum by the golden section."""
  ratio = (math.sqrt(5) - 1) / 2
  left, right = high - ratio * (high - low), low + ratio * (high - low)
  f_left, f_right = f(left), f(right)
  while high - low > 1e-7:
    if f_left > f_right:
      high, right, f_right = right, left, f_left
      f_left = f(left := high - ratio * (high - low))
    else:
      low, left, f_left = left, right, f_right
      f_right = f(right := low + ratio * (high - low))
  return (low + high) / 2


def _gaps(scores, is_visible):
  """Returns how far each score is below its row's largest, and their spread.

  The largest itself, and what is invisible, is infinitely far below.
  """
  scores = np.asarray(scores, np.float64)
  if is_visible is not None:
    scores = np.where(is_visible, scores, -np.inf)
  rows = np.sort(scores.reshape(-1, scores.shape[-1]), axis=-1)
  rows = rows[np.isfinite(rows).sum(axis=-1) >= 2]
  if not rows.size:
    raise ValueError(
      'no row has two visible keys, so no scale gives a gradient; '
      f'scores have shape {scores.shape}.'
    )
  spread = rows[np.isfinite(rows)].std()
  return rows[:, :-1] - rows[:, -1:], spread if spread > 0 else 1.0


def _jacobian(alpha, gaps):
  """`alpha (1 - sum p^2)` by row, also where p rounds to one-hot."""
  powers = np.exp(alpha * gaps)
  rest, squares = powers.sum(axis=-1), (powers * powers).sum(axis=-1)
  return alpha * (rest * (2 + rest) - squares) / (1 + rest) ** 2


def _log_geomean(alpha, gaps):
  """Mean logarithm of `_jacobian`, also where all powers underflow."""
  nearest = alpha * gaps[:, -1:]
  powers = np.exp(alpha * gaps - nearest)
  rest, squares = powers.sum(axis=-1), (powers * powers).sum(axis=-1)
  unit = np.exp(nearest[:, 0])
  size = rest * (2 + unit * rest) - unit * squares
  log_size = np.log(size) + nearest[:, 0] - 2 * np.log1p(unit * rest)
  return math.log(alpha) + log_size.mean()


def _summary(statistic):
  summaries = {
    'mean': lambda alpha, gaps: _jacobian(alpha, gaps).mean(),
    'median': lambda alpha, gaps: np.median(_jacobian(alpha, gaps)),
    'geomean': _log_geomean,
  }
  if statistic not in summaries:
    raise ValueError(
      f'unknown statistic {statistic!r}; known: {", ".join(summaries)}.'
    )
  return summaries[statistic]
