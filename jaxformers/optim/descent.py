"""Transformations that the bounds of gradient descent speak of."""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float
import optax

from jaxformers.ops.tree import tree_dot
from jaxformers.ops.tree import tree_norm
from jaxformers.optim.optimizer import AdamW
from jaxformers.optim.optimizer import Optimizer
from jaxformers.optim.schedule import Constant
from jaxformers.optim.schedule import Schedule


class AdaGradNormState(NamedTuple):
  """State of `scale_by_adagrad_norm`.

  Source: none; see there.

  Attributes:
    sum_of_squares: float32 `[]`, of the norms of all gradients so far.
  """

  sum_of_squares: Float[Array, '']


def scale_by_adagrad_norm() -> optax.GradientTransformationExtraArgs:
  """Divides gradients by the root of the sum of their squared norms so far.

  `g_t / sqrt(sum_(k<=t) |g_k|^2)`, with one number for all parameters. Times the
  diameter of the domain, the mean regret is at most 1.5 times that of the best
  constant in hindsight. Gradients of zero change nothing.

  Source: Streeter and McMahan, "Less Regret via Online Conditioning", 2010,
  arXiv 1002.4862; Su Jianlin, 2025, kexue.fm/archives/11530.
  """

  def init(params):
    del params
    return AdaGradNormState(jnp.zeros([], jnp.float32))

  def update(updates, state, params=None, **extra):
    del params, extra
    total = state.sum_of_squares + tree_dot(updates, updates).astype(
      state.sum_of_squares.dtype
    )
    scale = jnp.where(
      total > 0, jax.lax.rsqrt(jnp.where(total > 0, total, 1)), 0
    )
    return _scaled(scale, updates), AdaGradNormState(total)

  return optax.GradientTransformationExtraArgs(init, update)


def adagrad_norm(
  learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
  """Descends by `D g_t / sqrt(sum_(k<=t) |g_k|^2)`.

  Source: see `scale_by_adagrad_norm`.

  Args:
    learning_rate: D, best the diameter of the domain.
  """
  return optax.chain(
    scale_by_adagrad_norm(), optax.scale_by_learning_rate(learning_rate)
  )


@dataclasses.dataclass(frozen=True)
class AdaGradNorm:
  """Gradient descent that learns its step from the norms of gradients.

  Source: see `scale_by_adagrad_norm`.

  Attributes:
    learning_rate: best the diameter of the domain.
  """

  learning_rate: Schedule = Constant(1.0)

  def build(self, steps: int) -> optax.GradientTransformationExtraArgs:
    return adagrad_norm(self.learning_rate.schedule(steps))


def project_l2_ball(radius: Any) -> optax.GradientTransformationExtraArgs:
  """Keeps parameters within a ball around 0; the last link of a chain.

  Replaces the update by `Pi(theta + update) - theta`, where Pi scales longer
  parameters down to the radius. Parameters that start outside are moved inside
  by the first update.

  Source: Zinkevich, "Online Convex Programming and Generalized Infinitesimal
  Gradient Ascent", 2003, section 2.1; Su Jianlin, 2023, kexue.fm/archives/9902.

  Args:
    radius: half the diameter of the domain.

  Raises:
    ValueError: if the radius is not positive; of `update` without parameters.
  """
  if isinstance(radius, (int, float)) and not radius > 0:
    raise ValueError(f'radius must be positive, got {radius}.')

  def update(updates, state, params=None, **extra):
    del extra
    if params is None:
      raise ValueError('project_l2_ball needs update(..., params).')
    moved = jax.tree.map(lambda p, u: p + u, params, updates)
    norm = tree_norm(moved)
    outside = norm > radius
    scale = jnp.where(outside, radius / jnp.where(outside, norm, 1), 1)
    updates = jax.tree.map(
      lambda p, m, u: jnp.where(outside, scale * m - p, u).astype(u.dtype),
      params,
      moved,
      updates,
    )
    return updates, state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )


@dataclasses.dataclass(frozen=True)
class InBall:
  """Any optimiser, with all parameters kept within a ball around 0.

  Source: see `project_l2_ball`.

  Attributes:
    radius: of the ball.
    optimizer: what moves the parameters.
  """

  radius: float
  optimizer: Optimizer = AdamW()

  @property
  def learning_rate(self) -> Schedule:
    """That of the optimiser."""
    return self.optimizer.learning_rate

  def build(self, steps: int) -> optax.GradientTransformationExtraArgs:
    return optax.chain(
      self.optimizer.build(steps), project_l2_ball(self.radius)
    )


class AverageState(NamedTuple):
  """State of `average_iterates`.

  Source: none; see there.

  Attributes:
    count: int32 `[]`, number of updates so far.
    total: float32 `[]`, sum of the weights so far.
    average: like the parameters, at least float32.
  """

  count: Array
  total: Float[Array, '']
  average: Any


def average_iterates(
  weight: optax.ScalarOrSchedule = 1.0,
) -> optax.GradientTransformationExtraArgs:
  """Keeps the weighted mean of the parameters at which gradients were taken.

  `mean <- mean + w_t / w_(1:t) (theta_t - mean)`, exact, unlike an exponential
  average. Updates pass unchanged, so it may stand anywhere in a chain.
  `averaged_params` reads the mean.

  Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by
  Averaging", 1992; weighted by learning rates: Su Jianlin, 2025,
  kexue.fm/archives/11469.

  Args:
    weight: w, or a schedule: that of the learning rate for the iterate of
      `weighted_average_bound`.

  Raises:
    ValueError: of `update` without parameters.
  """

  def init(params):
    zero = jnp.zeros([], jnp.float32)
    return AverageState(
      jnp.zeros([], jnp.int32), zero, jax.tree.map(_at_least_float32, params)
    )

  def update(updates, state, params=None, **extra):
    del extra
    if params is None:
      raise ValueError('average_iterates needs update(..., params).')
    w = jnp.asarray(
      weight(state.count) if callable(weight) else weight, jnp.float32
    )
    total = state.total + w
    share = w / jnp.where(total > 0, total, 1)
    average = jax.tree.map(
      lambda a, p: (a + share * (p - a)).astype(a.dtype), state.average, params
    )
    count = optax.safe_increment(state.count)
    return updates, AverageState(count, total, average)

  return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True)
class Averaged:
  """Any optimiser that also keeps the mean of all parameters on its way.

  The mean counts each step by its learning rate. A run evaluates it, samples
  from it and gives it to those who open the run; `averaged_params` reads it from
  a state.

  Source: see `average_iterates`.

  Attributes:
    optimizer: what moves the parameters.
  """

  optimizer: Optimizer = AdamW()

  @property
  def learning_rate(self) -> Schedule:
    """That of the optimiser."""
    return self.optimizer.learning_rate

  def build(self, steps: int) -> optax.GradientTransformationExtraArgs:
    weight = self.learning_rate.schedule(steps)
    return optax.chain(average_iterates(weight), self.optimizer.build(steps))


def averaged_params(optimizer_state: Any, params: Any) -> Any:
  """Returns the mean that `average_iterates` keeps, in the dtypes of `params`.

  Source: none; reads the state.

  Args:
    optimizer_state: of a chain with `average_iterates`.
    params: the last iterate.

  Raises:
    ValueError: if the chain has none, or several.
  """
  states = _averages(optimizer_state)
  if len(states) != 1:
    raise ValueError(
      f'expected one average_iterates in the chain, found {len(states)}.'
    )
  return jax.tree.map(lambda a, p: a.astype(p.dtype), states[0].average, params)


def keeps_average(optimizer_state: Any) -> bool:
  """Returns whether `averaged_params` has something to read.

  Source: none; reads the state.

  Args:
    optimizer_state: of any chain.
  """
  return bool(_averages(optimizer_state))


def _averages(optimizer_state):
  leaves = jax.tree.leaves(optimizer_state, is_leaf=_is_average)
  return [x for x in leaves if _is_average(x)]


def _is_average(x):
  return isinstance(x, AverageState)


def _at_least_float32(x):
  return jnp.array(x, jnp.promote_types(x.dtype, jnp.float32))


def _scaled(scale, tree):
  return jax.tree.map(lambda a: (scale * a).astype(a.dtype), tree)
