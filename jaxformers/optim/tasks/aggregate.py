"""Combining gradients of tasks as the first link of a chain of optax.

Where gradients of several tasks are there already, stacked along a leading
axis, `aggregate_tasks` makes an ordinary update tree of them:

```python
optimizer = optax.chain(aggregate_tasks(NashMTL(), tasks=3), optax.adamw(1e-3))
stacked = jax.vmap(pull)(jnp.eye(3))  # leaves [3, ...]
updates, state = optimizer.update(stacked, state, params)
```
"""

from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float
import optax

from jaxformers.optim.tasks.combination import SharedMask
from jaxformers.optim.tasks.combination import check_combination
from jaxformers.optim.tasks.combination import combine_stacked
from jaxformers.optim.tasks.combination import split
from jaxformers.optim.tasks.combination import start
from jaxformers.optim.tasks.contract import Combination
from jaxformers.optim.tasks.contract import Retrospective
from jaxformers.optim.tasks.contract import Scalarizer
from jaxformers.optim.tasks.directions import UnitGradients


class AggregateState(NamedTuple):
  """What a combination carries, and what it last did.

  Attributes:
    combination: its state.
    weights_T: float32, the last weights, to be logged.
    is_finite_T: bool, whether the last losses and gradients of each task were
      finite; absent tasks count as finite.
  """

  combination: Any
  weights_T: Float[Array, ' T']
  is_finite_T: Bool[Array, ' T']


def aggregate_tasks(
  combination: Combination, tasks: int, shared_mask: SharedMask = None
) -> optax.GradientTransformationExtraArgs:
  """Turns gradients stacked by task into one update.

  Comes first in a chain; `init` takes ordinary parameters, `update` updates
  whose leaves are `[T, ...]`. Gradients must be averages over the whole batch:
  inner products of means are not means of inner products. Further arguments of
  `update`: `task_losses` `[T]`, which some combinations need; `task_mask`, bool
  `[T]`, False for tasks of which the batch has nothing; `task_metric`, positive
  multipliers in the structure of the parameters, for inner products as an
  optimiser with a diagonal preconditioner sees them.

  A present task whose loss or gradient is not finite makes all updates of
  shared parameters nan and is named by `is_finite_T` of the state, whose
  combination stays as it was.

  Source: as the combination.

  Args:
    combination: what weighs or combines, such as `MGDA()`.
    tasks: how many tasks.
    shared_mask: True for parameters that tasks share, or a function from
      parameters to that; gradients of the others are added up. None: all are.
  """
  check_combination(combination)
  if isinstance(combination, Retrospective):
    raise ValueError(
      f'{type(combination).__name__} must see what each step made of the '
      'losses, which a link of a chain never does; use '
      'multitask_value_and_grad and look_back.'
    )

  def init_fn(params):
    shared, _ = split(params, shared_mask)
    return AggregateState(
      start(combination, tasks, shared),
      jnp.zeros(tasks),
      jnp.ones(tasks, bool),
    )

  def update_fn(
    updates,
    state,
    params=None,
    *,
    task_losses=None,
    task_mask=None,
    task_metric=None,
    **extra_args,
  ):
    del params, extra_args
    check_stacked(updates, tasks)
    losses_T = _losses(combination, task_losses, tasks)
    mask_T = jnp.ones(tasks, bool) if task_mask is None else task_mask
    combined = combine_stacked(
      combination,
      updates,
      losses_T,
      mask_T,
      state.combination,
      shared_mask=shared_mask,
      metric=task_metric,
    )
    is_finite_T = jnp.isfinite(losses_T)
    is_finite_T &= jnp.isfinite(jnp.diagonal(combined.gram_TT))
    weights_T = combined.weights_T.astype(jnp.float32)
    new = AggregateState(combined.state, weights_T, is_finite_T | ~mask_T)
    return combined.gradients, new

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def normalize_task_gradients(
  eps: float = 1e-12, shared_mask: SharedMask = None
) -> optax.GradientTransformationExtraArgs:
  r"""Adds up gradients of tasks, each divided by its norm.

  $u = \sum_i g_i / (\|g_i\| + \epsilon)$, with norms over all shared
  parameters, so that $\|u\| \le m$. Neither multiplying a loss by a constant
  nor adding one changes the update. Takes updates `[T, ...]`, and `task_mask`
  as `aggregate_tasks` does.

  Source: Su Jianlin, "Multi-task learning (1): in the name of loss", 2022,
  kexue.fm/archives/8870.

  Args:
    eps: added to the norms.
    shared_mask: True for parameters that tasks share, or a function from
      parameters to that; gradients of the others are added up. None: all are.
  """

  def update_fn(updates, state, params=None, *, task_mask=None, **extra_args):
    del params, extra_args
    leaves = jax.tree.leaves(updates)
    tasks = leaves[0].shape[0] if leaves and leaves[0].ndim else 0
    check_stacked(updates, tasks)
    mask_T = jnp.ones(tasks, bool) if task_mask is None else task_mask
    combined = combine_stacked(
      UnitGradients(eps),
      updates,
      jnp.ones(tasks),
      mask_T,
      (),
      shared_mask=shared_mask,
    )
    return combined.gradients, state

  return optax.GradientTransformationExtraArgs(
    optax.init_empty_state, update_fn
  )


def check_stacked(updates: Any, tasks: int) -> None:
  """Raises unless all leaves have a leading axis of tasks.

  Source: none; bookkeeping.

  Args:
    updates: tree of gradients.
    tasks: how many tasks there should be.

  Raises:
    ValueError: names the first leaf that has not.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
    if leaf.ndim == 0 or leaf.shape[0] != tasks:
      raise ValueError(
        f'expected a leading axis of {tasks} tasks, but updates'
        f'{jax.tree_util.keystr(path)} has shape {leaf.shape}; stack the '
        'gradients of the tasks, such as by jax.vmap(pull)(jnp.eye(tasks)).'
      )


def _losses(combination, task_losses, tasks):
  reads = isinstance(combination, Scalarizer) or combination.reads_losses
  if task_losses is None:
    if reads:
      raise ValueError(
        f'{type(combination).__name__} reads losses; pass '
        f'update(..., task_losses=losses) with {tasks} of them.'
      )
    return jnp.ones(tasks)
  task_losses = jnp.asarray(task_losses)
  if task_losses.shape != (tasks,):
    raise ValueError(
      f'task_losses has shape {task_losses.shape}, expected ({tasks},).'
    )
  return task_losses
