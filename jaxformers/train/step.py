"""One update of the parameters, and one measurement."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import optax

from jaxformers.diagnostics.alignment import measurements_of
from jaxformers.train.experiment import Experiment
from jaxformers.train.objective import Batch
from jaxformers.train.objective import Losses
from jaxformers.train.parts import parts_of
from jaxformers.train.state import TrainState
from jaxformers.train.tasks import start_tasks
from jaxformers.train.tasks import task_gradients
from jaxformers.train.tasks import tasks_after_step

Metrics = dict[str, Array]


def init_state(experiment: Experiment, batch: Batch) -> TrainState:
  """Returns the state before the first step; a function of the seed alone.

  Args:
    experiment: the run.
    batch: arrays, or anything with their shapes and dtypes.
  """
  batch = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), batch)
  key = jax.random.fold_in(jax.random.key(experiment.seed), 0)
  variables = experiment.objective.init(experiment.model, key, batch)
  params = variables.pop('params')
  optimizer = experiment.optimizer.build(experiment.steps)
  tasks = ()
  if experiment.tasks is not None:
    losses = jax.eval_shape(
      _losses_of(experiment), params, variables, batch, key
    )
    tasks = start_tasks(experiment.tasks, losses, params)
  zero = jnp.zeros([], jnp.int32)
  return TrainState(
    step=zero,
    params=params,
    frozen=variables.pop('frozen', None),
    statistics=variables,
    optimizer_state=optimizer.init(params),
    skipped=jnp.copy(zero),
    tasks=tasks,
  )


def train_step_of(
  experiment: Experiment,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Returns the function that updates a state by one batch.

  The update is that of the whole batch whatever `accumulate` is. Metrics are
  float32 scalars: `loss`, each task if there are several, the objective's own,
  those of `experiment.tasks` (`weight/TASK`, `cosine/TASK/TASK`, ...),
  `minimized` where `experiment.gradient` minimises something else than `loss`,
  `gradient_norm` before clipping, `learning_rate`, `targets` (how many were
  predicted) and `skipped` (updates skipped so far), and what the optimiser
  measures itself (`jaxformers.diagnostics.measurements_of`).
  """
  optimizer = experiment.optimizer.build(experiment.steps)
  rate = experiment.optimizer.learning_rate.schedule(experiment.steps)

  def train_step(state, batch):
    key = jax.random.fold_in(jax.random.key(experiment.seed), state.step + 1)
    gradients, losses, tasks = _gradients(experiment, state, batch, key)
    norm = optax.tree.norm(gradients)
    updates, optimizer_state = optimizer.update(
      gradients, state.optimizer_state, state.params, value=losses.total
    )
    new = state._replace(
      params=optax.apply_updates(state.params, updates),
      statistics={**state.statistics, **losses.variables},
      optimizer_state=optimizer_state,
      tasks=tasks,
    )
    if experiment.tasks is not None:
      losses_of = _losses_of(experiment, state.frozen)
      tasks = tasks_after_step(
        experiment.tasks,
        losses_of,
        state,
        new,
        batch,
        key,
        experiment.accumulate,
      )
      new = new._replace(tasks=tasks)
    if experiment.non_finite == 'skip':
      new = _unless(jnp.isfinite(losses.total + norm), new, state)
    metrics = {
      'loss': losses.total,
      **(losses.tasks if len(losses.tasks) > 1 else {}),
      **losses.metrics,
      'gradient_norm': norm,
      'learning_rate': jnp.asarray(rate(state.step), jnp.float32),
      'targets': losses.weight,
      'skipped': new.skipped.astype(jnp.float32),
      **measurements_of(new.optimizer_state),
    }
    return new._replace(step=state.step + 1), metrics

  return train_step


def _unless(finite, new, old):
  """Returns `new`, or `old` with one more skipped step if not finite."""
  kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
  return kept._replace(
    skipped=old.skipped + jnp.where(finite, 0, 1), frozen=new.frozen
  )


def evaluate_step_of(
  experiment: Experiment,
) -> Callable[[TrainState, Batch], Losses]:
  """Returns the function that measures the losses of a held-out batch.

  It measures the mean of the parameters where the optimiser keeps it.
  """

  def evaluate_step(state, batch):
    key = jax.random.key(experiment.seed)
    losses = experiment.objective.loss(
      experiment.model, state.result, batch, key, deterministic=True
    )
    return losses._replace(variables={})

  return evaluate_step


def _losses_of(experiment, frozen=None):
  """Returns the objective as a function of parameters, batch and key."""
  fixed = {} if frozen is None else {'frozen': frozen}

  def losses_of(params, statistics, batch, key):
    variables = {'params': params, **fixed, **statistics}
    return experiment.objective.loss(
      experiment.model, variables, batch, key, deterministic=False
    )

  return losses_of


def _gradients(experiment, state, batch, key):
  """Returns gradients, losses of the whole batch, and the state of tasks."""
  losses_of = _losses_of(experiment, state.frozen)
  parts = experiment.accumulate
  if experiment.tasks is not None:
    return task_gradients(
      experiment.tasks,
      losses_of,
      state,
      batch,
      key,
      parts,
      experiment.gradient,
    )

  def objective(params, statistics, part, key):
    losses = losses_of(params, statistics, part, key)
    return losses.total, losses

  gradient = _backward(experiment, objective)
  if parts == 1:
    return *gradient(state.params, state.statistics, batch, key), state.tasks

  def add(carry, part_and_index):
    part, index = part_and_index
    statistics, sums, weight = carry
    gradients, losses = gradient(
      state.params, statistics, part, jax.random.fold_in(key, index)
    )
    own = gradients, losses.tasks, losses.metrics
    sums = jax.tree.map(lambda s, a: s + losses.weight * a, sums, own)
    statistics = {**statistics, **losses.variables}
    return (statistics, sums, weight + losses.weight), None

  cut = parts_of(batch, parts)
  first = jax.tree.map(lambda a: a[0], cut)
  zeros = _zeros_like_result(gradient, state, first, key)
  carry = state.statistics, zeros, jnp.zeros([], jnp.float32)
  (statistics, sums, weight), _ = jax.lax.scan(
    add, carry, (cut, jnp.arange(parts))
  )
  scale = 1 / jnp.maximum(weight, 1)
  gradients, tasks, metrics = jax.tree.map(lambda s: s * scale, sums)
  losses = Losses(tasks, metrics, statistics, weight)
  return gradients, losses, state.tasks


def _backward(experiment, objective):
  """Returns `(params, *arguments) -> (gradients, losses)` of an objective."""
  if experiment.gradient is None:
    return jax.grad(objective, has_aux=True)
  value_and_grad = experiment.gradient.value_and_grad(objective)

  def gradient(*arguments):
    (value, losses), gradients = value_and_grad(*arguments)
    metrics = {**losses.metrics, 'minimized': value}
    return gradients, losses._replace(metrics=metrics)

  return gradient


def _zeros_like_result(gradient, state, part, key) -> Any:
  gradients, losses = jax.eval_shape(
    gradient, state.params, state.statistics, part, key
  )
  if losses.task_weights is not None:
    raise ValueError(
      'tasks with numbers of targets of their own do not add up over parts of '
      'a batch; set tasks=TaskCombiner(Equal(), mode="stacked"), or another '
      'weighting, or accumulate=1.'
    )
  shapes = gradients, losses.tasks, losses.metrics
  return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
