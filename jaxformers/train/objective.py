"""What a run minimises: the contract between models and the trainer."""

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from jaxformers.diagnostics.attention import attention_by_layer
from jaxformers.diagnostics.attention import attention_metrics
from jaxformers.diagnostics.decays import decay_metrics
from jaxformers.losses.cross_entropy import cross_entropy

Batch = dict[str, Array]
Variables = dict[str, Any]


class Losses(NamedTuple):
  """What an objective says of one batch.

  Attributes:
    tasks: named losses, float32 scalars; their sum is minimised.
    metrics: further scalars to report.
    variables: the collections of variables that the model has changed.
    weight: float32 `[]`, how many targets the losses are means over. Gradient
      accumulation and evaluation weigh batches by it, so that every target
      counts alike wherever it fell.
    task_weights: the same for each task, where tasks have numbers of targets of
      their own; 0 for those of which the batch has nothing, whose losses are
      any finite number. None if every task has `weight`.
  """

  tasks: dict[str, Float[Array, '']]
  metrics: dict[str, Float[Array, '']]
  variables: Variables
  weight: Float[Array, '']
  task_weights: dict[str, Float[Array, '']] | None = None

  @property
  def total(self) -> Float[Array, '']:
    """What is minimised."""
    return functools.reduce(jnp.add, self.tasks.values())


class Objective(Protocol):
  """Turns a model and a batch into losses."""

  def init(self, model: nn.Module, key: Array, batch: Batch) -> Variables:
    """Returns the first variables of the model; runs inside `jit`."""
    ...

  def loss(
    self,
    model: nn.Module,
    variables: Variables,
    batch: Batch,
    key: Array,
    deterministic: bool,
  ) -> Losses:
    """Returns the losses of a batch.

    Args:
      model: the model.
      variables: its variables.
      batch: arrays with the batch as leading axis.
      key: randomness for this call.
      deterministic: True where dropout and other noise shall not act.
    """
    ...


@dataclasses.dataclass(frozen=True)
class NextToken:
  """Predicts each next token.

  Layers whose decays may grow larger than 1 report the largest at each step
  (`jaxformers.diagnostics.decay_report`).

  Batches hold int32 `[B, L]` arrays: `tokens`, `targets` (negative where
  nothing is to be predicted) and `segments` (0 for padding).

  Source: Bengio et al., "A Neural Probabilistic Language Model", 2003, equation
  1; z-loss: Chowdhery et al., "PaLM", 2022, arXiv 2204.02311, section 5.

  Attributes:
    z_loss: multiplies the mean squared log-normaliser, a task of its own that
      keeps logits from drifting.
    label_smoothing: see `jaxformers.losses.cross_entropy`.
    packed: whether rows hold several segments that must not see each other. If
      not, segments only say what is padding, which a causal model never sees.
    diagnostics: whether evaluations also report how much the attention of each
      layer concentrates (`jaxformers.diagnostics.attention_metrics`). Training
      steps never do, and pay nothing.
  """

  z_loss: float = 0.0
  label_smoothing: float = 0.0
  packed: bool = False
  diagnostics: bool = False

  def init(self, model, key, batch):
    variables = model.init(key, batch['tokens'][:1])
    kept = 'params', 'statistics', 'frozen'
    return {k: v for k, v in variables.items() if k in kept}

  def loss(self, model, variables, batch, key, deterministic):
    measures = self.diagnostics and deterministic
    (logits_BLV, _), changed = model.apply(
      variables,
      batch['tokens'],
      segments_BL=batch['segments'] if self.packed else None,
      deterministic=deterministic,
      rngs={'dropout': key},
      mutable=['statistics', 'losses', 'decays', *['diagnostics'] * measures],
    )
    auxiliary = changed.pop('losses', {})
    decays, sown = (changed.pop(k, {}) for k in ('decays', 'diagnostics'))
    smoothing = 0.0 if deterministic else self.label_smoothing
    losses = cross_entropy(
      logits_BLV, batch['targets'], label_smoothing=smoothing
    )
    weight = losses.is_target_BL.sum(dtype=jnp.float32)
    count = jnp.maximum(weight, 1)
    tasks = {'cross_entropy': losses.cross_entropy_BL.sum() / count}
    if self.z_loss:
      square_BL = jnp.square(losses.log_normalizer_BL) * losses.is_target_BL
      tasks['z_loss'] = self.z_loss * square_BL.sum() / count
    for path, leaf in jax.tree_util.tree_leaves_with_path(auxiliary):
      name = str(path[-2].key if hasattr(path[-2], 'key') else path[-2])
      tasks[name] = tasks.get(name, 0) + leaf.sum()
    of_model = variables.get('frozen', variables['params'])
    metrics = decay_metrics(decays, of_model)
    if measures:
      metrics |= attention_metrics(attention_by_layer(sown, of_model))
    return Losses(tasks, metrics, changed, weight)
