"""Gradients of an objective with several tasks, combined."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float

from jaxformers.ops.gram import combine
from jaxformers.ops.gram import cosines
from jaxformers.ops.gram import gram
from jaxformers.optim.tasks.combination import Combined
from jaxformers.optim.tasks.combination import combine_stacked
from jaxformers.optim.tasks.combination import merge
from jaxformers.optim.tasks.combination import split
from jaxformers.optim.tasks.combination import start
from jaxformers.optim.tasks.combiner import TaskCombiner
from jaxformers.optim.tasks.contract import Retrospective
from jaxformers.optim.tasks.contract import look_back
from jaxformers.optim.tasks.contract import weigh
from jaxformers.optim.tasks.gradient import backward_passes
from jaxformers.optim.tasks.gradient import multitask_value_and_grad
from jaxformers.train.gradient import GradientFunction
from jaxformers.train.objective import Batch
from jaxformers.train.objective import Losses
from jaxformers.train.parts import parts_of
from jaxformers.train.representation import shapes_at
from jaxformers.train.representation import with_added
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
  gradient: GradientFunction | None = None,
) -> tuple[Any, Losses, Any]:
  """Returns combined gradients, losses, and the next state of the combiner.

  The metrics tell how tasks were weighed and whether they are in conflict:
  `weight/TASK`, and where gradients of single tasks were computed
  `gradient_norm/TASK` and `cosine/TASK/TASK`, over shared parameters or at the
  representation, and `minimized/TASK` where a gradient function minimises
  something else than the loss.

  Args:
    combiner: what combines the tasks.
    losses_of: the objective.
    state: before the step.
    batch: the whole batch.
    key: randomness of the step.
    parts: into which the batch is cut; more than one need a mode that keeps
      gradients, and then give the result of the whole batch.
    gradient: what takes the place of the gradient of each loss; needs such a
      mode as well. Weights are still made of the losses themselves.
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
    backward = _backward(vector, combiner.mode, names, gradient)
    stacked, losses = _of_whole_batch(backward, names, state, batch, key, parts)
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
  elif combiner.representation:
    function = lambda params: vector(params, state.statistics, batch, key)
    combined, losses = _at_representation(
      combiner, function, state, names, shared_mask
    )
    gradients = combined.gradients
  else:
    value_and_grad = multitask_value_and_grad(
      vector,
      combiner.weighting,
      combiner.mode,
      shared_mask=shared_mask,
      has_aux=True,
    )
    arguments = state.params, state.statistics, batch, key
    mask = lambda losses: _presence(losses, names)
    combined, gradients = value_and_grad(
      *arguments, state=state.tasks, mask=mask, metric=metric
    )
    losses = combined.aux
  report = _report(combined, _presence(losses, names), names)
  losses = losses._replace(metrics={**losses.metrics, **report})
  return gradients, losses, combined.state


def tasks_after_step(
  combiner: TaskCombiner,
  losses_of: LossesOf,
  old: TrainState,
  new: TrainState,
  batch: Batch,
  key: Array,
  parts: int = 1,
) -> Any:
  """Returns the state of a combiner that has seen what the step did.

  Costs a forward pass where the weighting is `Retrospective`, else nothing.

  Args:
    combiner: what combines the tasks.
    losses_of: the objective.
    old: before the step.
    new: after it.
    batch: the whole batch.
    key: randomness of the step, so that both losses have the same noise.
    parts: into which the batch is cut.
  """
  if not isinstance(combiner.weighting, Retrospective):
    return new.tasks
  shapes = jax.eval_shape(losses_of, new.params, old.statistics, batch, key)
  names = combiner.names(tuple(shapes.tasks))

  def sums_of(part, key):
    losses = losses_of(new.params, old.statistics, part, key)
    weight_T = _weights(losses, names)
    return weight_T * _vector(losses.tasks, names), weight_T

  if parts == 1:
    total_T, weight_T = sums_of(batch, key)
  else:
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(parts))
    sums = jax.lax.map(lambda x: sums_of(*x), (parts_of(batch, parts), keys))
    total_T, weight_T = jax.tree.map(lambda a: a.sum(axis=0), sums)
  losses_T = total_T / jnp.maximum(weight_T, 1)
  return look_back(combiner.weighting, losses_T, new.tasks, weight_T > 0)


def _backward(vector, mode, names, gradient_function):
  """Returns `(params, *arguments) -> (gradients [T, ...], losses)`."""

  def plain(params, *arguments):
    losses_T, pull, losses = jax.vjp(
      lambda p: vector(p, *arguments), params, has_aux=True
    )
    return backward_passes(lambda e: pull(e)[0], losses_T, mode), losses

  def of_each(params, *arguments):
    def one(task):
      def loss(p, *arguments):
        losses_T, losses = vector(p, *arguments)
        return losses_T[task], losses

      return gradient_function.value_and_grad(loss)(params, *arguments)

    run = jax.vmap(one) if mode == 'stacked' else lambda x: jax.lax.map(one, x)
    (value_T, losses), stacked = run(jnp.arange(len(names)))
    losses = jax.tree.map(lambda a: a[0], losses)  # The same for every task.
    values = zip(names, value_T, strict=True)
    minimized = {f'minimized/{name}': value for name, value in values}
    metrics = {**losses.metrics, **minimized}
    return stacked, losses._replace(metrics=metrics)

  return plain if gradient_function is None else of_each


def _at_representation(combiner, function, state, names, shared_mask):
  """Weighs by inner products at a representation; returns losses as well."""
  shapes = shapes_at(combiner.representation, function, state.params)
  zeros = [jnp.zeros(s.shape, s.dtype) for s in shapes]
  losses_T, pull, losses = jax.vjp(
    with_added(combiner.representation, function),
    zeros,
    state.params,
    has_aux=True,
  )
  mask_T = _presence(losses, names)
  # Of the parameters only those of single tasks are read below: the compiler
  # drops the other passes through what comes before the representation.
  hidden, stacked = backward_passes(pull, losses_T, combiner.mode)
  gram_TT = gram(hidden)
  weights_T, new = weigh(
    combiner.weighting, gram_TT, losses_T, mask_T, state.tasks
  )
  _, update = pull(weights_T)
  shared, _ = split(update, shared_mask)
  _, own = split(stacked, shared_mask)
  gradients = merge(shared, combine(own, mask_T.astype(jnp.float32)))
  return Combined(gradients, weights_T, gram_TT, new), losses


def _of_whole_batch(backward, names, state, batch, key, parts):
  """Returns gradients `[T, ...]` and losses of all parts of a batch."""
  gradient = lambda *arguments: backward(state.params, *arguments)
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
