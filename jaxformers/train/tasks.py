"""Gradients of an objective with several tasks, combined."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float

from jaxformers.ops.gram import cosines
from jaxformers.optim.tasks.combination import combine_stacked
from jaxformers.optim.tasks.combination import split
from jaxformers.optim.tasks.combination import start
from jaxformers.optim.tasks.combiner import TaskCombiner
from jaxformers.optim.tasks.gradient import backward_passes
from jaxformers.optim.tasks.gradient import multitask_value_and_grad
from jaxformers.train.objective import Batch
from jaxformers.train.objective import Losses
from jaxformers.train.parts import parts_of
from jaxformers.train.state import TrainState

LossesOf = Callable[[Any, Any, Batch, Array], Losses]
"""From parameters, statistics, a batch and a key to losses."""


def start_tasks(combiner: TaskCombiner, losses: Losses, params: Any) -> Any:
  """Returns the state of a combiner before the first step.

  Args:
    combiner: what combines the tasks.
    losses: of any batch, or their shapes.
    params: the parameters.
  """
  names = combiner.names(tuple(losses.tasks))
  shared, _ = split(params, combiner.shared_mask(params))
  return start(combiner.weighting, len(names), shared)


def task_gradients(
  combiner: TaskCombiner,
  losses_of: LossesOf,
  state: TrainState,
  batch: Batch,
  key: Array,
  parts: int = 1,
) -> tuple[Any, Losses, Any]:
  """Returns combined gradients, losses, and the next state of the combiner.

  The metrics tell how tasks were weighed and whether they are in conflict:
  `weight/TASK`, and where gradients of single tasks were computed
  `gradient_norm/TASK` and `cosine/TASK/TASK`, over shared parameters.

  Args:
    combiner: what combines the tasks.
    losses_of: the objective.
    state: before the step.
    batch: the whole batch.
    key: randomness of the step.
    parts: into which the batch is cut; more than one need a mode that keeps
      gradients, and then give the result of the whole batch.
  """
  shapes = jax.eval_shape(losses_of, state.params, state.statistics, batch, key)
  names = combiner.names(tuple(shapes.tasks))
  metric = None
  if combiner.metric is not None:
    metric = combiner.metric.of(state.optimizer_state)
  shared_mask = combiner.shared_mask(state.params)

  def vector(params, statistics, batch, key):
    losses = losses_of(params, statistics, batch, key)
    return _vector(losses.tasks, names), losses

  if combiner.mode != 'gram_then_backward':
    make = functools.partial(_stacked, vector, names, combiner.mode)
    stacked, losses = make(state, batch, key, parts)
    combined = combine_stacked(
      combiner.weighting,
      stacked,
      _vector(losses.tasks, names),
      _presence(losses, names),
      state.tasks,
      shared_mask=shared_mask,
      metric=metric,
    )
    gradients = combined.gradients
  else:
    gradient = multitask_value_and_grad(
      vector,
      combiner.weighting,
      combiner.mode,
      shared_mask=shared_mask,
      has_aux=True,
    )
    arguments = state.params, state.statistics, batch, key
    mask = lambda losses: _presence(losses, names)
    combined, gradients = gradient(
      *arguments, state=state.tasks, mask=mask, metric=metric
    )
    losses = combined.aux
  report = _report(combined, _presence(losses, names), names)
  losses = losses._replace(metrics={**losses.metrics, **report})
  return gradients, losses, combined.state


def _stacked(vector, names, mode, state, batch, key, parts):
  """Returns gradients `[T, ...]` and losses of the whole batch."""

  def gradient(statistics, part, key):
    losses_T, pull, losses = jax.vjp(
      lambda p: vector(p, statistics, part, key), state.params, has_aux=True
    )
    stacked = backward_passes(lambda e: pull(e)[0], losses_T, mode)
    return stacked, losses

  if parts == 1:
    return gradient(state.statistics, batch, key)

  def add(carry, part_and_index):
    part, index = part_and_index
    statistics, sums, weight, weight_T = carry
    stacked, losses = gradient(statistics, part, jax.random.fold_in(key, index))
    own_T = _weights(losses, names)
    own = (
      _scaled(stacked, own_T),
      own_T * _vector(losses.tasks, names),
      jax.tree.map(lambda a: losses.weight * a, losses.metrics),
    )
    sums = jax.tree.map(jnp.add, sums, own)
    statistics = {**statistics, **losses.variables}
    return (statistics, sums, weight + losses.weight, weight_T + own_T), None

  cut = parts_of(batch, parts)
  first = jax.tree.map(lambda a: a[0], cut)
  stacked, losses = jax.eval_shape(gradient, state.statistics, first, key)
  zero_T = jnp.zeros(len(names), jnp.float32)
  zeros = jax.tree.map(
    lambda a: jnp.zeros(a.shape, a.dtype), (stacked, zero_T, losses.metrics)
  )
  carry = state.statistics, zeros, jnp.zeros([], jnp.float32), zero_T
  (statistics, sums, weight, weight_T), _ = jax.lax.scan(
    add, carry, (cut, jnp.arange(parts))
  )
  scale_T = 1 / jnp.maximum(weight_T, 1)
  stacked, losses_T, metrics = sums
  losses_T *= scale_T
  scale = 1 / jnp.maximum(weight, 1)
  return _scaled(stacked, scale_T), Losses(
    dict(zip(names, losses_T, strict=True)),
    jax.tree.map(lambda a: a * scale, metrics),
    statistics,
    weight,
    dict(zip(names, weight_T, strict=True)),
  )


def _scaled(stacked, scale_T):
  return jax.tree.map(
    lambda g: (g * scale_T.reshape(-1, *[1] * (g.ndim - 1))).astype(g.dtype),
    stacked,
  )


def _vector(by_name, names):
  return jnp.stack([by_name[name].astype(jnp.float32) for name in names])


def _weights(losses: Losses, names) -> Float[Array, ' T']:
  """Returns how many targets each loss is a mean over."""
  if losses.task_weights is None:
    return jnp.broadcast_to(losses.weight, len(names))
  return _vector(losses.task_weights, names)


def _presence(losses: Losses, names) -> Bool[Array, ' T']:
  """Returns False for tasks of which the batch has nothing."""
  if losses.task_weights is None:
    return jnp.ones(len(names), bool)
  return _weights(losses, names) > 0


def _report(combined, mask_T, names) -> dict[str, Array]:
  weights = zip(names, combined.weights_T, strict=True)
  report = {f'weight/{name}': weight for name, weight in weights}
  if combined.gram_TT is None:
    return report
  gram_TT = jnp.where(mask_T[:, None] & mask_T, combined.gram_TT, 0)
  norms_T = jnp.sqrt(jnp.maximum(jnp.diagonal(gram_TT), 0))
  cosine_TT = cosines(gram_TT)
  for i, name in enumerate(names):
    report[f'gradient_norm/{name}'] = norms_T[i]
    for j in range(i):
      report[f'cosine/{names[j]}/{name}'] = cosine_TT[j, i]
  return report
