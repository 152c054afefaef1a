"""Combining stacked gradients: what is shared is weighed, the rest added."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float

from jaxformers.ops.gram import combine
from jaxformers.ops.gram import gram
from jaxformers.optim.tasks.contract import Combination
from jaxformers.optim.tasks.contract import GramWeighting
from jaxformers.optim.tasks.contract import Scalarizer
from jaxformers.optim.tasks.contract import StackedCombination
from jaxformers.optim.tasks.contract import weigh

SharedMask = Any | Callable[[Any], Any] | None
"""True for each shared parameter, or a function from parameters to that.

The others belong to single tasks, such as the layers of a head, and get the
plain gradients of their own losses but from a `Scalarizer`, which weighs the
losses themselves. None: all are shared.
"""


class Combined(NamedTuple):
  """What became of the gradients of several tasks.

  Attributes:
    gradients: tree of the parameters.
    weights_T: of the gradients of shared parameters.
    gram_TT: their inner products; None where nobody asked for them.
    state: of the combination.
  """

  gradients: Any
  weights_T: Float[Array, ' T']
  gram_TT: Float[Array, 'T T'] | None
  state: Any


def combine_stacked(
  combination: Combination,
  stacked: Any,
  losses_T: Float[Array, ' T'],
  mask_T: Bool[Array, ' T'],
  state: Any,
  *,
  shared_mask: SharedMask = None,
  metric: Any = None,
) -> Combined:
  """Combines gradients `[T, ...]`, those of shared parameters by weights.

  Source: as the combination.

  Args:
    combination: what weighs or combines.
    stacked: tree of the parameters, leaves `[T, ...]`.
    losses_T: of this batch.
    mask_T: False for absent tasks, whose gradients and losses do not count even
      where they are not finite.
    state: of the combination.
    shared_mask: which parameters are shared.
    metric: tree of the parameters, positive multipliers in inner products; None
      for 1.
  """
  shared, own = split(stacked, shared_mask)
  if metric is not None:
    metric, _ = split(metric, shared_mask)
  gram_TT = gram(shared, metric)
  if isinstance(combination, StackedCombination):
    is_finite = jnp.isfinite(jnp.where(mask_T, losses_T, 0)).all()
    is_finite &= jnp.isfinite(jnp.where(mask_T, jnp.diagonal(gram_TT), 0)).all()
    losses_T = jnp.where(mask_T, losses_T, 1)
    update, weights_T, new = combination(shared, losses_T, mask_T, state)
    weights_T = jnp.where(is_finite, weights_T, jnp.nan)
    update = jax.tree.map(lambda g: jnp.where(is_finite, g, jnp.nan), update)
    new = jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, state)
  else:
    weights_T, new = weigh(combination, gram_TT, losses_T, mask_T, state)
    update = combine(shared, weights_T)
  is_objective = isinstance(combination, Scalarizer)
  rest = combine(own, weights_T if is_objective else mask_T.astype(jnp.float32))
  return Combined(merge(update, rest), weights_T, gram_TT, new)


def split(tree: Any, shared_mask: SharedMask) -> tuple[Any, Any]:
  """Splits a tree into shared parameters and the others.

  Source: none; bookkeeping.

  Args:
    tree: of the parameters.
    shared_mask: which are shared.

  Returns:
    Two trees, each with None in the places of the other.
  """
  if shared_mask is None:
    return tree, jax.tree.map(lambda _: None, tree)
  is_shared = shared_mask(tree) if callable(shared_mask) else shared_mask
  shared = jax.tree.map(lambda keep, g: g if keep else None, is_shared, tree)
  own = jax.tree.map(lambda keep, g: None if keep else g, is_shared, tree)
  return shared, own


def merge(shared: Any, own: Any) -> Any:
  """Undoes `split`.

  Source: none; bookkeeping.

  Args:
    shared: one of its trees.
    own: the other.
  """
  is_none = lambda x: x is None
  return jax.tree.map(
    lambda a, b: b if a is None else a, shared, own, is_leaf=is_none
  )


def check_combination(combination: Any) -> None:
  """Raises unless something combines tasks.

  Source: none; bookkeeping.

  Args:
    combination: what was given.
  """
  if not isinstance(
    combination, (Scalarizer, GramWeighting, StackedCombination)
  ):
    raise TypeError(
      f'{combination!r:.60} cannot combine tasks; give an object such as MGDA() '
      'from jaxformers.optim.tasks.'
    )


def start(combination: Combination, tasks: int, params: Any) -> Any:
  """Returns the state of a combination before the first step.

  Source: none; bookkeeping.

  Args:
    combination: any kind.
    tasks: how many.
    params: the shared parameters.
  """
  if isinstance(combination, StackedCombination):
    return combination.init(tasks, params)
  return combination.init(tasks)
