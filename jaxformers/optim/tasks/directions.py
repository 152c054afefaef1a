"""Weights from the inner products of the tasks' gradients."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Int

from jaxformers.ops.common_descent import cagrad_weights
from jaxformers.ops.common_descent import hybrid_weights
from jaxformers.ops.common_descent import primary_weights
from jaxformers.ops.common_descent import upgrad_weights
from jaxformers.ops.nnqp import min_norm_weights
from jaxformers.ops.task_balance import aligned_weights
from jaxformers.ops.task_balance import config_weights
from jaxformers.ops.task_balance import imtl_g_weights
from jaxformers.ops.task_balance import nash_weights
from jaxformers.ops.task_balance import pcgrad_weights
from jaxformers.optim.tasks.contract import GramWeighting
from jaxformers.optim.tasks.contract import Stateless


@dataclasses.dataclass(frozen=True)
class UnitGradients(Stateless, GramWeighting):
  r"""Adds up gradients of norm 1, $w_i = 1 / (\|g_i\| + \epsilon)$.

  Neither multiplying a loss by a constant nor adding one changes anything. The
  sum of two such gradients conflicts with neither; that of three may.

  Source: Su Jianlin, "Multi-task learning (1): in the name of loss", 2022,
  kexue.fm/archives/8870.

  Attributes:
    eps: added to the norms.
  """

  eps: float = 1e-12

  def __call__(self, gram_TT, losses_T, mask_T, state):
    norms_T = jnp.sqrt(jnp.maximum(jnp.diagonal(gram_TT), 0))
    return 1 / (norms_T + self.eps), state


@dataclasses.dataclass(frozen=True)
class MGDA(Stateless, GramWeighting):
  """Takes the shortest mixture of gradients, along which all losses fall.

  A task with a tiny gradient dominates, and one with none stops the training:
  see `Normalized`, and mask tasks that a batch does not have.

  Source: Désidéri, "Multiple-gradient descent algorithm (MGDA) for
  multiobjective optimization", 2012; Sener and Koltun, 2018, arXiv 1810.04650,
  equation 3.
  """

  def __call__(self, gram_TT, losses_T, mask_T, state):
    return min_norm_weights(gram_TT, mask_T), state


class PCGradState(NamedTuple):
  """Where the draws of orders stand.

  Attributes:
    count: int32 `[]`, steps so far.
  """

  count: Int[Array, '']


@dataclasses.dataclass(frozen=True)
class PCGrad(GramWeighting):
  """Projects each gradient off those it conflicts with, in random order.

  Source: Yu et al., "Gradient Surgery for Multi-Task Learning", 2020, arXiv
  2001.06782, algorithm 1.

  Attributes:
    seed: of the orders.
  """

  seed: int = 0

  def init(self, tasks):
    return PCGradState(jnp.zeros([], jnp.int32))

  def __call__(self, gram_TT, losses_T, mask_T, state):
    key = jax.random.fold_in(jax.random.key(self.seed), state.count)
    tasks = len(gram_TT)
    keys_T = jax.random.split(key, tasks)
    order_TT = jax.vmap(jax.random.permutation, (0, None))(keys_T, tasks)
    weights_T = pcgrad_weights(gram_TT, order_TT, mask_T)
    return weights_T, PCGradState(state.count + 1)


@dataclasses.dataclass(frozen=True)
class CAGrad(Stateless, GramWeighting):
  """Stays near the mean gradient, and there helps the worst-off task most.

  Source: Liu et al., "Conflict-Averse Gradient Descent for Multi-task
  Learning", 2021, arXiv 2110.14048, algorithm 1.

  Attributes:
    c: radius around the mean gradient, relative to its norm.
    rescale: whether to divide by 1 + c^2, as the authors' code does.
  """

  c: float = 0.5
  rescale: bool = False

  def __call__(self, gram_TT, losses_T, mask_T, state):
    weights_T = cagrad_weights(gram_TT, self.c, mask_T)
    return weights_T / (1 + self.c**2 if self.rescale else 1), state


@dataclasses.dataclass(frozen=True)
class IMTLG(Stateless, GramWeighting):
  """Gives the direction equal projections onto all unit gradients.

  Source: Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021,
  openreview IMPnRXEWpvr (IMTL-G).
  """

  def __call__(self, gram_TT, losses_T, mask_T, state):
    return imtl_g_weights(gram_TT, mask_T), state


@dataclasses.dataclass(frozen=True)
class NashMTL(Stateless, GramWeighting):
  """Finds the bargaining solution; the scale of a loss does not matter.

  Source: Navon et al., "Multi-Task Learning as a Bargaining Game", 2022, arXiv
  2202.01017, claim 3.1.

  Attributes:
    max_norm: longer directions are scaled down to it; None for never.
  """

  max_norm: float | None = 1.0

  def __call__(self, gram_TT, losses_T, mask_T, state):
    return nash_weights(gram_TT, mask_T, self.max_norm), state


@dataclasses.dataclass(frozen=True)
class AlignedMTL(Stateless, GramWeighting):
  """Makes gradients orthogonal and equally long before their mean.

  Source: Senushkin et al., "Independent Component Alignment for Multi-Task
  Learning", CVPR 2023, arXiv 2305.19000.

  Attributes:
    scale: which eigenvalue of the Gram matrix sets the length.
  """

  scale: Literal['min', 'median', 'rmse'] = 'min'

  def __call__(self, gram_TT, losses_T, mask_T, state):
    return aligned_weights(gram_TT, mask_T, self.scale), state


@dataclasses.dataclass(frozen=True)
class UPGrad(Stateless, GramWeighting):
  """Averages the gradients, each projected so that it conflicts with none.

  Source: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization",
  2024, arXiv 2406.16232 (UPGrad).
  """

  def __call__(self, gram_TT, losses_T, mask_T, state):
    return upgrad_weights(gram_TT, mask_T), state


@dataclasses.dataclass(frozen=True)
class ConFIG(Stateless, GramWeighting):
  """Takes the direction of equal cosines with all gradients.

  Source: Liu et al., "ConFIG: Towards Conflict-free Training of Physics
  Informed Neural Networks", 2024, arXiv 2408.11104.
  """

  def __call__(self, gram_TT, losses_T, mask_T, state):
    return config_weights(gram_TT, mask_T), state


@dataclasses.dataclass(frozen=True)
class Primary(Stateless, GramWeighting):
  """Minimises one loss, and increases no other.

  Scaling an auxiliary loss changes nothing.

  Source: Su Jianlin, "Multi-task learning (3): in the name of primary and
  secondary", 2022, kexue.fm/archives/8907.

  Attributes:
    task: number of the primary task.
  """

  task: int = 0

  def init(self, tasks):
    if not 0 <= self.task < tasks:
      raise ValueError(f'there is no task {self.task} among {tasks} tasks.')
    return ()

  def __call__(self, gram_TT, losses_T, mask_T, state):
    return primary_weights(gram_TT, self.task, mask_T), state


@dataclasses.dataclass(frozen=True)
class Hybrid(Stateless, GramWeighting):
  """Decreases all primary losses, and increases no auxiliary one.

  Source: Su Jianlin, "Multi-task learning (3): in the name of primary and
  secondary", 2022, kexue.fm/archives/8907.

  Attributes:
    primaries: how many tasks, the first ones, are primary.
  """

  primaries: int

  def init(self, tasks):
    if not 1 <= self.primaries <= tasks:
      raise ValueError(
        f'primaries must be 1 to {tasks}, the number of tasks, got '
        f'{self.primaries}.'
      )
    return ()

  def __call__(self, gram_TT, losses_T, mask_T, state):
    is_primary_T = jnp.arange(len(gram_TT)) < self.primaries
    return hybrid_weights(gram_TT, is_primary_T, mask_T), state


@dataclasses.dataclass(frozen=True)
class Normalized(GramWeighting):
  """Lets another weighting see scaled gradients, and combines those.

  With the weights of scaled gradients, unscaled ones would be combined into a
  direction without the guarantees of either.

  Source: Sener and Koltun, 2018, arXiv 1810.04650 (the authors' code names
  them `'l2'`, `'loss'` and `'loss+'`).

  Attributes:
    weighting: of the scaled gradients.
    by: what each gradient is divided by: `'l2'` its norm, `'loss'` its loss,
      `'loss+'` both.
  """

  weighting: GramWeighting = MGDA()
  by: Literal['l2', 'loss', 'loss+'] = 'l2'

  def __post_init__(self):
    if self.by not in ('l2', 'loss', 'loss+'):
      raise ValueError(f"by must be 'l2', 'loss' or 'loss+', got {self.by!r}.")

  @property
  def reads_losses(self) -> bool:
    """Whether losses must be given as well."""
    return self.by != 'l2' or self.weighting.reads_losses

  def init(self, tasks: int) -> Any:
    return self.weighting.init(tasks)

  def __call__(self, gram_TT, losses_T, mask_T, state):
    norms_T = jnp.sqrt(jnp.maximum(jnp.diagonal(gram_TT), 0))
    size_T = 1 if self.by == 'loss' else jnp.where(norms_T > 0, norms_T, 1)
    if self.by != 'l2':
      size_T *= losses_T
    scaled_TT = gram_TT / size_T[:, None] / size_T
    weights_T, state = self.weighting(scaled_TT, losses_T, mask_T, state)
    return weights_T / size_T, state
