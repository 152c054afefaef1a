"""Measuring a model on rows that it never learned from."""

from collections.abc import Callable, Iterable
import math

import jax
from jax import Array

from jaxformers.train.objective import Batch
from jaxformers.train.objective import Losses
from jaxformers.train.state import TrainState


def evaluate(
  evaluate_step: Callable[[TrainState, Batch], Losses],
  state: TrainState,
  batches: Iterable[Batch],
  bytes_per_token: float | None = None,
) -> dict[str, float]:
  """Averages losses over batches, every target counting alike.

  Args:
    evaluate_step: measures one batch.
    state: holds the variables.
    batches: placed on the mesh.
    bytes_per_token: of the held-out text; None if it is not text.

  Returns:
    `loss` (nats per target), each task and metric by its name, `targets`, and
    `bits_per_byte` where `bytes_per_token` is given. Tasks that have numbers of
    targets of their own are averaged over those.
  """
  sums: dict[str, float] = {}
  weights: dict[str, float] = {}
  targets = 0.0
  # One batch behind the device, so that it never waits for the addition.
  for losses in _one_behind(evaluate_step(state, batch) for batch in batches):
    targets += float(losses.weight)
    own = losses.task_weights or {}
    for name, value in _named(losses).items():
      weight = float(own.get(name, losses.weight))
      weights[name] = weights.get(name, 0.0) + weight
      sums[name] = sums.get(name, 0.0) + weight * float(value)
  if not targets:
    raise ValueError('there was nothing to predict in the held-out batches.')
  means = {name: total / (weights[name] or 1) for name, total in sums.items()}
  if own:
    means['loss'] = sum(means[name] for name in losses.tasks)
  if bytes_per_token is not None and 'cross_entropy' in means:
    nats = means['cross_entropy']
    means['bits_per_byte'] = nats / math.log(2) / bytes_per_token
  return {**means, 'targets': targets}


def _one_behind(results):
  pending = None
  for result in results:
    if pending is not None:
      yield jax.device_get(pending)
    pending = result
  if pending is not None:
    yield jax.device_get(pending)


def _named(losses: Losses) -> dict[str, Array]:
  return {'loss': losses.total, **losses.tasks, **losses.metrics}
