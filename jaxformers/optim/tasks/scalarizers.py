"""Weights from the losses: they make losses comparable, and cost nothing."""

import dataclasses
from typing import NamedTuple

from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxformers.ops.task_losses import dwa_weights
from jaxformers.ops.task_losses import power_mean_weights
from jaxformers.optim.tasks.contract import Scalarizer
from jaxformers.optim.tasks.contract import Stateless


@dataclasses.dataclass(frozen=True)
class Equal(Stateless, Scalarizer):
  """Minimises the mean of the losses of the tasks that are present.

  Invariant to adding a constant to a loss, not to multiplying one.

  Source: none; the arithmetic mean.
  """

  def __call__(self, losses_T, mask_T, state):
    return power_mean_weights(losses_T, 1.0, mask_T), state


class InitialLossState(NamedTuple):
  """The first losses.

  Attributes:
    total_T: float32, their sum.
    count_T: int32, how many.
  """

  total_T: Float[Array, ' T']
  count_T: Int[Array, ' T']


@dataclasses.dataclass(frozen=True)
class InitialLoss(Scalarizer):
  """Divides each loss by its mean over the first batches.

  Multiplying a loss by a constant changes nothing; adding one does. During the
  first batches the mean is that of the batches so far.

  Source: Su Jianlin, "Multi-task learning (1): in the name of loss", 2022,
  kexue.fm/archives/8870.

  Attributes:
    steps: how many batches that have the task.
  """

  steps: int = 1

  def __post_init__(self):
    if self.steps < 1:
      raise ValueError(f'steps must be at least 1, got {self.steps}.')

  def init(self, tasks):
    return InitialLossState(jnp.zeros(tasks), jnp.zeros(tasks, jnp.int32))

  def __call__(self, losses_T, mask_T, state):
    counts_T = mask_T & (state.count_T < self.steps)
    count_T = state.count_T + counts_T
    total_T = state.total_T + jnp.where(counts_T, losses_T, 0)
    weights_T = count_T / jnp.where(count_T > 0, total_T, 1)
    return weights_T, InitialLossState(total_T, count_T)


@dataclasses.dataclass(frozen=True)
class ReferenceLoss(Stateless, Scalarizer):
  """Divides each loss by a number that is known beforehand.

  Such as the loss of a model that knows nothing (`initial_cross_entropy`,
  `initial_squared_error` of `jaxformers.ops`), or that of the best one without
  input, which knows the prior (`prior_cross_entropy`, `prior_squared_error`).

  Source: Su Jianlin, "Multi-task learning (1): in the name of loss", 2022,
  kexue.fm/archives/8870.

  Attributes:
    losses: one positive number per task, in the order of the tasks.
  """

  losses: tuple[float, ...]

  def __post_init__(self):
    if not self.losses or min(self.losses) <= 0:
      raise ValueError(f'losses must be positive, got {self.losses}.')

  def init(self, tasks):
    if tasks != len(self.losses):
      raise ValueError(
        f'ReferenceLoss has {len(self.losses)} losses for {tasks} tasks; give '
        'one per task.'
      )
    return ()

  def __call__(self, losses_T, mask_T, state):
    return 1 / jnp.asarray(self.losses, losses_T.dtype), state


@dataclasses.dataclass(frozen=True)
class InverseLoss(Stateless, Scalarizer):
  r"""Divides each loss by itself: the gradient of $\sum_i \log L_i$.

  Multiplying a loss by a constant changes nothing; adding one does. As a loss
  approaches 0 its weight blows up: use an optimiser that normalises its steps,
  or a floor of about a thousandth of the first loss.

  Source: Su Jianlin, "Multi-task learning (1): in the name of loss", 2022,
  kexue.fm/archives/8870.

  Attributes:
    floor: smaller losses count as this.
  """

  floor: float = 1e-8

  def __call__(self, losses_T, mask_T, state):
    return 1 / jnp.maximum(losses_T, self.floor), state


@dataclasses.dataclass(frozen=True)
class PowerMean(Stateless, Scalarizer):
  r"""Minimises $(\frac1m \sum_i L_i^\gamma)^{1/\gamma}$.

  Source: Su Jianlin, "Multi-task learning (1): in the name of loss", 2022,
  kexue.fm/archives/8870.

  Attributes:
    gamma: 1 for the arithmetic mean, 0 for the geometric, infinity for the
      largest loss.
    floor: smaller losses count as this.
  """

  gamma: float = 0.0
  floor: float = 1e-8

  def __call__(self, losses_T, mask_T, state):
    losses_T = jnp.maximum(losses_T, self.floor)
    return power_mean_weights(losses_T, self.gamma, mask_T), state


class DWAState(NamedTuple):
  """Mean losses of the running epoch and the two before it.

  Attributes:
    step: int32 `[]`, steps so far.
    total_T: float32, sum over the running epoch.
    count_T: int32, batches of it that had the task.
    latest_T: float32, means of the epoch before.
    earlier_T: float32, means of the one before that.
  """

  step: Int[Array, '']
  total_T: Float[Array, ' T']
  count_T: Int[Array, ' T']
  latest_T: Float[Array, ' T']
  earlier_T: Float[Array, ' T']


@dataclasses.dataclass(frozen=True)
class DWA(Scalarizer):
  """Weighs tasks by how slowly their losses fell over the last two epochs.

  All weights are 1 during the first two epochs.

  Source: Liu, Johns and Davison, "End-to-End Multi-Task Learning with
  Attention", 2019, arXiv 1803.10704 (dynamic weight average).

  Attributes:
    steps_per_epoch: over which losses are averaged.
    temperature: evens out the weights.
  """

  steps_per_epoch: int
  temperature: float = 2.0

  def __post_init__(self):
    if self.steps_per_epoch < 1:
      raise ValueError(
        f'steps_per_epoch must be at least 1, got {self.steps_per_epoch}.'
      )

  def init(self, tasks):
    zeros_T, ones_T = jnp.zeros(tasks), jnp.ones(tasks)
    count_T = jnp.zeros(tasks, jnp.int32)
    return DWAState(
      jnp.zeros([], jnp.int32), zeros_T, count_T, ones_T, jnp.copy(ones_T)
    )

  def __call__(self, losses_T, mask_T, state):
    known = state.step >= 2 * self.steps_per_epoch
    latest_T = jnp.where(known, state.latest_T, 1)
    earlier_T = jnp.where(known, state.earlier_T, 1)
    weights_T = dwa_weights(latest_T, earlier_T, self.temperature, mask_T)
    return weights_T, self._count(losses_T, mask_T, state)

  def _count(self, losses_T, mask_T, state):
    """Adds the losses of a batch; closes the epoch after its last."""
    total_T = state.total_T + jnp.where(mask_T, losses_T, 0)
    count_T = state.count_T + mask_T
    step = state.step + 1
    ends = step % self.steps_per_epoch == 0
    mean_T = jnp.where(
      count_T > 0, total_T / jnp.maximum(count_T, 1), state.latest_T
    )
    return DWAState(
      step,
      jnp.where(ends, 0, total_T),
      jnp.where(ends, 0, count_T),
      jnp.where(ends, mean_T, state.latest_T),
      jnp.where(ends, state.latest_T, state.earlier_T),
    )
