"""Weights that are learned beside the model, by descent of their own."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float
import optax

from jaxformers.ops.common_descent import softmax_descent_weights
from jaxformers.ops.task_losses import famo_loss
from jaxformers.ops.task_losses import famo_weights
from jaxformers.ops.task_losses import gradnorm_loss
from jaxformers.ops.task_losses import gradnorm_weights
from jaxformers.ops.task_losses import imtl_l_loss
from jaxformers.ops.task_losses import uncertainty_loss
from jaxformers.optim.tasks.contract import GramWeighting
from jaxformers.optim.tasks.contract import Retrospective
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
  Weigh Losses", 2018, arXiv 1705.07115, section 3.2.

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


class FAMOState(NamedTuple):
  """Learned logits, and the losses that were weighed last.

  Attributes:
    learned: logits of the shares.
    before_T: float32.
  """

  learned: LearnedState
  before_T: Float[Array, ' T']


@dataclasses.dataclass(frozen=True)
class FAMO(Retrospective):
  """Learns weights under which all losses fall at one rate, from losses alone.

  What `MGDA` of log losses finds from gradients, approached over many steps: one
  backward pass, and a forward pass more to see what the step did. Multiplying a
  loss by a constant changes nothing. Losses must be positive; take off a loss
  what it cannot fall below. The authors also clip gradients to norm 1.

  Source: Liu et al., "FAMO: Fast Adaptive Multitask Optimization", 2023, arXiv
  2306.03792, algorithm 2 (appendix), whose Adam and decay these are.

  Attributes:
    learning_rate: of the logits.
    decay: added to their slopes as so many times the logits, which brings the
      shares back to equal ones.
    floor: smaller losses count as this.
  """

  learning_rate: float = 0.025
  decay: float = 1e-3
  floor: float = 1e-8

  def init(self, tasks):
    learned = _start(tasks, 0.0, self.learning_rate)
    return FAMOState(learned, jnp.ones(tasks))

  def __call__(self, losses_T, mask_T, state):
    losses_T = jnp.maximum(losses_T, self.floor)
    weights_T = famo_weights(losses_T, state.learned.value_T, mask_T)
    return weights_T, FAMOState(state.learned, losses_T)

  def after(self, losses_T, mask_T, state):
    losses_T = jnp.maximum(losses_T, self.floor)
    logits_T = state.learned.value_T
    slope_T = jax.grad(famo_loss)(logits_T, state.before_T, losses_T, mask_T)
    slope_T += self.decay * logits_T
    learned = _learn(slope_T, mask_T, state.learned, self.learning_rate)
    return FAMOState(learned, state.before_T)


class SoftmaxMGDAState(NamedTuple):
  """Where the search for the shortest mixture stands.

  Attributes:
    logits_T: float32, of the weights.
  """

  logits_T: Float[Array, ' T']


@dataclasses.dataclass(frozen=True)
class SoftmaxMGDA(GramWeighting):
  """Follows the shortest mixture of gradients by descent on softmax weights.

  `MGDA` solves for it in each step; this goes on from the weights of the step
  before, which averages noisy gradients over some `1 / learning_rate` steps, and
  guarantees nothing before it has arrived.

  Source: Su Jianlin, "Multi-task learning (2): in the name of gradient", 2022,
  kexue.fm/archives/8896.

  Attributes:
    learning_rate: of the logits, for gradients whose mean squared norm is 1.
    steps: of descent per step of training.
  """

  learning_rate: float = 0.1
  steps: int = 1

  def __post_init__(self):
    if self.steps < 1:
      raise ValueError(f'steps must be at least 1, got {self.steps}.')

  def init(self, tasks):
    return SoftmaxMGDAState(jnp.zeros(tasks))

  def __call__(self, gram_TT, losses_T, mask_T, state):
    weights_T, logits_T = softmax_descent_weights(
      gram_TT, state.logits_T, self.learning_rate, self.steps, mask_T
    )
    return weights_T, SoftmaxMGDAState(logits_T)


def _start(tasks, value, learning_rate):
  value_T = jnp.full(tasks, value, jnp.float32)
  return LearnedState(value_T, optax.adam(learning_rate).init(value_T))


def _learn(slope_T, mask_T, state, learning_rate):
  """Takes a step of Adam; what belongs to absent tasks stays as it is."""
  adam = optax.adam(learning_rate)
  update_T, new = adam.update(slope_T, state.adam)
  value_T = state.value_T + jnp.where(mask_T, update_T, 0)
  return LearnedState(value_T, new)
