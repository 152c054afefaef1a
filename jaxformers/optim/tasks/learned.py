"""Weights that are learned beside the model, by an Adam of their own."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float
import optax

from jaxformers.ops.task_losses import gradnorm_loss
from jaxformers.ops.task_losses import gradnorm_weights
from jaxformers.ops.task_losses import imtl_l_loss
from jaxformers.ops.task_losses import uncertainty_loss
from jaxformers.optim.tasks.contract import GramWeighting
from jaxformers.optim.tasks.contract import Scalarizer


class LearnedState(NamedTuple):
  """Learned numbers, one per task.

  Attributes:
    value_T: float32.
    adam: state of their optimiser.
  """

  value_T: Float[Array, ' T']
  adam: Any


@dataclasses.dataclass(frozen=True)
class Uncertainty(Scalarizer):
  """Learns the variance of each task, and divides its loss by twice that.

  Follows `InverseLoss` with a lag. To learn the variances with the optimiser of
  the model instead, put them among its parameters and minimise
  `jaxformers.ops.uncertainty_loss`.

  Source: Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to
  Weigh Losses", 2018, arXiv 1705.07115, equation 7.

  Attributes:
    learning_rate: of the logarithms of the variances.
    start: their first value.
  """

  learning_rate: float = 0.01
  start: float = 0.0

  def init(self, tasks):
    return _start(tasks, self.start, self.learning_rate)

  def __call__(self, losses_T, mask_T, state):
    slope_T = jax.grad(uncertainty_loss, 1)(losses_T, state.value_T, mask_T)
    learned = _learn(slope_T, mask_T, state, self.learning_rate)
    return jnp.exp(-state.value_T) / 2, learned


@dataclasses.dataclass(frozen=True)
class IMTLL(Scalarizer):
  """Learns a scale for each task that brings its scaled loss to 1.

  `Uncertainty` with twice the weights and the other sign of the logarithm.

  Source: Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021,
  openreview IMPnRXEWpvr (IMTL-L).

  Attributes:
    learning_rate: of the logarithms of the scales.
    start: their first value.
  """

  learning_rate: float = 0.01
  start: float = 0.0

  def init(self, tasks):
    return _start(tasks, self.start, self.learning_rate)

  def __call__(self, losses_T, mask_T, state):
    slope_T = jax.grad(imtl_l_loss, 1)(losses_T, state.value_T, mask_T)
    learned = _learn(slope_T, mask_T, state, self.learning_rate)
    return jnp.exp(state.value_T), learned


class GradNormState(NamedTuple):
  """Learned logits, and the losses that progress is measured from.

  Attributes:
    learned: logits of the weights.
    first_T: float32, first loss of each task, 1 until it is seen.
    is_seen_T: bool.
  """

  learned: LearnedState
  first_T: Float[Array, ' T']
  is_seen_T: Bool[Array, ' T']


@dataclasses.dataclass(frozen=True)
class GradNorm(GramWeighting):
  """Learns weights under which slow tasks get the longer gradients.

  Source: Chen et al., "GradNorm", 2018, arXiv 1711.02257, algorithm 1; weights
  are m times a softmax.

  Attributes:
    alpha: how strongly slow tasks are favoured; 0 makes norms equal.
    learning_rate: of the logits.
  """

  reads_losses: ClassVar[bool] = True
  alpha: float = 1.5
  learning_rate: float = 0.025

  def init(self, tasks):
    learned = _start(tasks, 0.0, self.learning_rate)
    return GradNormState(learned, jnp.ones(tasks), jnp.zeros(tasks, bool))

  def __call__(self, gram_TT, losses_T, mask_T, state):
    first_T = jnp.where(state.is_seen_T, state.first_T, losses_T)
    norms_T = jnp.sqrt(jnp.maximum(jnp.diagonal(gram_TT), 0))
    logits_T = state.learned.value_T
    slope_T = jax.grad(gradnorm_loss)(
      logits_T, norms_T, losses_T, first_T, self.alpha, mask_T
    )
    learned = _learn(slope_T, mask_T, state.learned, self.learning_rate)
    is_seen_T = state.is_seen_T | mask_T
    new = GradNormState(learned, jnp.where(is_seen_T, first_T, 1), is_seen_T)
    return gradnorm_weights(logits_T, mask_T), new


def _start(tasks, value, learning_rate):
  value_T = jnp.full(tasks, value, jnp.float32)
  return LearnedState(value_T, optax.adam(learning_rate).init(value_T))


def _learn(slope_T, mask_T, state, learning_rate):
  """Takes a step of Adam; what belongs to absent tasks stays as it is."""
  adam = optax.adam(learning_rate)
  update_T, new = adam.update(slope_T, state.adam)
  value_T = state.value_T + jnp.where(mask_T, update_T, 0)
  return LearnedState(value_T, new)
