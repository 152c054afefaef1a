"""Combinations that inner products of the gradients do not suffice for."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Int

from jaxformers.ops.gram import combine
from jaxformers.ops.gram import task_norms
from jaxformers.ops.task_balance import sign_dropout
from jaxformers.optim.tasks.contract import StackedCombination


class GradDropState(NamedTuple):
  """Where the draws of signs stand.

  Attributes:
    count: int32 `[]`, steps so far.
  """

  count: Int[Array, '']


@dataclasses.dataclass(frozen=True)
class GradDrop(StackedCombination):
  """Keeps, entry by entry, the positive or the negative gradients only.

  Source: Chen et al., "Just Pick a Sign: Optimizing Deep Multitask Models with
  Gradient Sign Dropout", 2020, arXiv 2010.06808, algorithm 1.

  Attributes:
    seed: of the signs.
    leak: part of all gradients that is kept in any case.
  """

  seed: int = 0
  leak: float = 0.0

  def __post_init__(self):
    if not 0 <= self.leak <= 1:
      raise ValueError(f'leak must lie in [0, 1], got {self.leak}.')

  def init(self, tasks, params):
    return GradDropState(jnp.zeros([], jnp.int32))

  def __call__(self, stacked, losses_T, mask_T, state):
    key = jax.random.fold_in(jax.random.key(self.seed), state.count)
    leak_T = jnp.full(len(mask_T), self.leak)
    update = sign_dropout(stacked, key, mask_T, leak_T)
    return update, mask_T.astype(losses_T.dtype), GradDropState(state.count + 1)


class DBMTLState(NamedTuple):
  """Averages of the gradients.

  Attributes:
    count: int32 `[]`, steps so far.
    average: tree of `[T, ...]`, gradients of the logarithms of the losses.
  """

  count: Int[Array, '']
  average: Any


@dataclasses.dataclass(frozen=True)
class DBMTL(StackedCombination):
  r"""Averages gradients of log losses over time, and makes them equally long.

  $b_t = g_t + \beta t^{-\sigma} (b_{t-1} - g_t)$, and $u = \sum_i b_i \max_j
  \|b_j\| / \|b_i\|$. Holds one more copy of the gradients per task.

  Source: Lin et al., "Dual-Balancing for Multi-Task Learning", 2023, arXiv
  2308.12029; decay as in LibMTL.

  Attributes:
    decay: beta.
    power: sigma.
    floor: added to losses and norms.
  """

  reads_losses: ClassVar[bool] = True
  decay: float = 0.9
  power: float = 0.0
  floor: float = 1e-8

  def init(self, tasks, params):
    zeros = jax.tree.map(
      lambda p: jnp.zeros((tasks, *p.shape), p.dtype), params
    )
    return DBMTLState(jnp.zeros([], jnp.int32), zeros)

  def __call__(self, stacked, losses_T, mask_T, state):
    count = state.count + 1
    decay = self.decay / count.astype(jnp.float32) ** self.power

    def average(g, old):
      shape = -1, *[1] * (g.ndim - 1)
      mask, losses = mask_T.reshape(shape), losses_T.reshape(shape)
      log_gradient = g / (losses + self.floor)
      new = log_gradient + decay * (old - log_gradient)
      return jnp.where(mask, new, old).astype(old.dtype)

    average = jax.tree.map(average, stacked, state.average)
    norms_T = task_norms(average)
    longest = jnp.max(jnp.where(mask_T, norms_T, 0))
    weights_T = jnp.where(mask_T, longest / (norms_T + self.floor), 0)
    return combine(average, weights_T), weights_T, DBMTLState(count, average)
