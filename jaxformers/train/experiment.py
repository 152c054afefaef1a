"""A run as one value."""

import dataclasses
from typing import Any, Literal, Protocol

import flax.linen as nn
import numpy as np

from jaxformers.data import Prepared
from jaxformers.data import TextData
from jaxformers.optim.optimizer import AdamW
from jaxformers.optim.optimizer import Optimizer
from jaxformers.optim.tasks import TaskCombiner
from jaxformers.train.baseline import Baseline
from jaxformers.train.gradient import GradientFunction
from jaxformers.train.objective import NextToken
from jaxformers.train.objective import Objective
from jaxformers.train.sharding import MeshShape


class Start(Protocol):
  """Where a run takes the variables that it begins with.

  A model may have a method `adopt(variables, base) -> variables` that says how
  it begins at the variables of another, as `jaxformers.nn.LoRA` does. All others
  take them over as they are.
  """

  def variables(self) -> dict[str, Any]:
    """Returns the variables of a trained model."""
    ...


class Data(Protocol):
  """Where the batches of a run come from."""

  def example(self) -> dict[str, np.ndarray]:
    """Returns a row of the shapes and dtypes of all rows, reading nothing.

    A trained model can then be opened where its data is not.
    """
    ...

  def prepare(self) -> Prepared:
    """Returns rows to train on, held-out rows, and facts to display."""
    ...


@dataclasses.dataclass(frozen=True)
class Preview:
  """The text that a finished run samples to show what it has learned.

  Attributes:
    prompt: what the text continues.
    tokens: how many tokens to add.
    temperature: 1 samples from the model's distribution, 0 takes the likeliest.
    top_p: keeps the smallest set of tokens with this probability.
  """

  prompt: str = 'And '
  tokens: int = 400
  temperature: float = 0.8
  top_p: float | None = 0.95


@dataclasses.dataclass(frozen=True)
class Experiment:
  """All that decides the outcome of a training run.

  Everything here is written beside the results, and nothing else has a say:
  equal experiments on equal devices give equal bits.

  Attributes:
    model: the model.
    data: where batches come from.
    objective: what is minimised.
    tasks: what combines the tasks of the objective; None for the sum of their
      losses.
    optimizer: how.
    gradient: what takes the place of the gradient of the loss, such as that of a
      penalised one, or with `tasks` of each loss; None for the gradient itself.
    start: what gives the first variables, such as `FromRun`; None for those
      that the seed gives.
    steps: number of updates.
    batch_size: rows per update, over all processes and accumulated parts.
    accumulate: parts into which a batch is cut to save memory; the update is
      that of the whole batch.
    seed: decides parameters, order of the data and noise.
    mesh: how devices are arranged.
    evaluate_every: steps between evaluations on held-out rows.
    evaluate_batches: how many held-out batches are evaluated on the way; None
      for all. The last evaluation takes all.
    checkpoint_every: steps between checkpoints.
    keep_latest: newest checkpoints that are kept.
    keep_best: checkpoints with the lowest held-out loss that are kept.
    non_finite: whether to `'stop'` at a loss or gradient that is not finite, or
      to `'skip'` its update and go on.
    preview: text to sample at the end; None for none.
    baseline: what held-out bits per byte are shown beside; None for nothing.
  """

  model: nn.Module
  data: Data = TextData()
  objective: Objective = NextToken()
  tasks: TaskCombiner | None = None
  optimizer: Optimizer = AdamW()
  gradient: GradientFunction | None = None
  start: Start | None = None
  steps: int = 1000
  batch_size: int = 32
  accumulate: int = 1
  seed: int = 0
  mesh: MeshShape = MeshShape()
  evaluate_every: int = 200
  evaluate_batches: int | None = None
  checkpoint_every: int = 100
  keep_latest: int = 2
  keep_best: int = 2
  non_finite: Literal['stop', 'skip'] = 'stop'
  preview: Preview | None = Preview()
  baseline: Baseline | None = None

  def __post_init__(self):
    for name in ('steps', 'batch_size', 'accumulate', 'keep_latest'):
      _at_least(self, name, 1)
    for name in ('evaluate_every', 'checkpoint_every'):
      _at_least(self, name, 1)
    _at_least(self, 'keep_best', 0)
    if self.batch_size % self.accumulate:
      raise ValueError(
        f'batch_size {self.batch_size} does not divide into accumulate='
        f'{self.accumulate} parts; change one of them.'
      )
    _check_gradients(self)
    if self.non_finite not in ('stop', 'skip'):
      raise ValueError(
        f"non_finite must be 'stop' or 'skip', got {self.non_finite!r}."
      )


def _at_least(experiment, name, least):
  value = getattr(experiment, name)
  if value < least:
    raise ValueError(f'{name} must be at least {least}, got {value}.')


def _check_gradients(experiment):
  """Raises if the parts of a run that make gradients do not go together."""
  gradient, tasks = experiment.gradient, experiment.tasks
  in_parts = experiment.accumulate > 1
  both = gradient is not None and tasks is not None
  if both and tasks.mode == 'gram_then_backward':
    raise ValueError(
      f'{type(gradient).__name__} has no backward pass for a weighted sum of '
      "tasks; set tasks.mode='stacked' or 'sequential', which take it of each "
      'task and combine the results.'
    )
  if in_parts and gradient is not None and not gradient.accumulates:
    raise ValueError(
      f'{type(gradient).__name__} of the parts of a batch does not add up to '
      'that of the whole batch; set accumulate=1.'
    )
  if in_parts and tasks is not None and tasks.mode == 'gram_then_backward':
    raise ValueError(
      'weights of tasks need the gradients of the whole batch: with accumulate='
      f"{experiment.accumulate}, set tasks.mode='stacked', which holds them for "
      "all tasks and takes representation='', or accumulate=1."
    )
