"""How a training run combines the tasks of its objective."""

from collections.abc import Sequence
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxformers.optim.tasks.combination import check_combination
from jaxformers.optim.tasks.contract import Combination
from jaxformers.optim.tasks.contract import GramWeighting
from jaxformers.optim.tasks.gradient import Mode
from jaxformers.optim.tasks.gradient import check_mode


@dataclasses.dataclass(frozen=True)
class AdamMetric:
  r"""Sees gradients as Adam rescales them, $P = 1 / (\sqrt{v} + \epsilon)$.

  What a direction promises, $\langle g_i, u\rangle \ge 0$, holds for the steps
  of an optimiser only if inner products are those of its preconditioner.
  Momentum, and that v lags behind by a step, are left out.

  Source: Kingma and Ba, "Adam", 2014, arXiv 1412.6980, algorithm 1.

  Attributes:
    eps: added to the root of the second moment.
  """

  eps: float = 1e-8

  def of(self, optimizer_state: Any) -> Any:
    """Returns the multipliers, in the structure of the parameters.

    Args:
      optimizer_state: of a chain that contains one Adam; all 1 before its first
        step.
    """
    second = optax.tree.get_all_with_path(optimizer_state, 'nu')
    if len(second) != 1:
      raise ValueError(
        f'the optimiser has {len(second)} second moments nu, expected one; use '
        'an Adam, or metric=None.'
      )
    ((_, nu),) = second
    moved = jnp.stack([jnp.any(x > 0) for x in jax.tree.leaves(nu)]).any()
    return jax.tree.map(
      lambda v: jnp.where(moved, 1 / (jnp.sqrt(v) + self.eps), 1), nu
    )


@dataclasses.dataclass(frozen=True)
class TaskCombiner:
  """Combines the gradients of the tasks of an objective.

  What an `Experiment` takes as `tasks`, in place of the sum of all losses.

  Source: as the weighting.

  Attributes:
    weighting: what weighs or combines the tasks.
    mode: `'gram_then_backward'`, `'stacked'` or `'sequential'`, see
      `multitask_value_and_grad`; in parts of a batch the first is refused.
    order: names of the tasks; what a weighting numbers, such as the primary
      task 0, it numbers in this order. Empty for that of the alphabet.
    own: regular expressions for the paths of parameters that belong to single
      tasks, such as `"'head'"`; they get plain gradients of their own losses.
    metric: of inner products; None for plain ones.
    representation: path of a submodule, such as `'stack'`, at whose output
      inner products are taken in place of those at the parameters. Each task
      then costs a backward pass of what follows it alone, and what serves one
      task there belongs into `own`. A heuristic: see
      `representation_value_and_grad`. Empty for the parameters.
  """

  weighting: Combination
  mode: Mode = 'gram_then_backward'
  order: tuple[str, ...] = ()
  own: tuple[str, ...] = ()
  metric: AdamMetric | None = None
  representation: str = ''

  def __post_init__(self):
    check_combination(self.weighting)
    check_mode(self.weighting, self.mode)
    if self.representation:
      self._check_representation()

  def _check_representation(self):
    if not isinstance(self.weighting, GramWeighting):
      raise ValueError(
        f'{type(self.weighting).__name__} does not weigh by inner products of '
        "gradients; set representation=''."
      )
    if self.mode != 'gram_then_backward' or self.metric is not None:
      raise ValueError(
        'inner products at a representation need '
        f"mode='gram_then_backward' and metric=None, got {self.mode!r} and "
        f'{self.metric}.'
      )

  def names(self, tasks: Sequence[str]) -> tuple[str, ...]:
    """Returns the tasks of an objective in order.

    Args:
      tasks: their names.

    Raises:
      ValueError: if `order` names others.
    """
    names = self.order or tuple(sorted(tasks))
    if sorted(names) != sorted(tasks):
      raise ValueError(
        f'tasks.order is {self.order}, but the objective has the tasks '
        f'{sorted(tasks)}; name each of them once.'
      )
    return names

  def shared_mask(self, params: Any) -> Any:
    """Returns True for each parameter that no pattern of `own` matches.

    Args:
      params: tree of anything.

    Raises:
      ValueError: if a pattern matches no parameter.
    """
    paths = [
      jax.tree_util.keystr(path)
      for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    for pattern in self.own:
      if not any(re.search(pattern, path) for path in paths):
        raise ValueError(
          f'tasks.own: no parameter matches {pattern!r}; there are such as '
          f'{", ".join(paths[:4])}.'
        )
    is_shared = lambda path: not any(re.search(p, path) for p in self.own)
    return jax.tree.structure(params).unflatten(map(is_shared, paths))
