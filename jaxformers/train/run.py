"""A trained run, opened to be used."""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import os
import pathlib
from typing import Any

import jax
import numpy as np

from jaxformers.decode import Sampler
from jaxformers.decode import stream
from jaxformers.nn import LoRA
from jaxformers.optim.descent import AverageState
from jaxformers.optim.descent import averaged_params
from jaxformers.optim.descent import keeps_average
from jaxformers.train import record as records
from jaxformers.train.checkpoint import NOT_READ
from jaxformers.train.checkpoint import Checkpoints
from jaxformers.train.errors import RunFailed
from jaxformers.train.evaluation import evaluate
from jaxformers.train.experiment import Experiment
from jaxformers.train.frozen import with_frozen
from jaxformers.train.frozen import without_frozen
from jaxformers.train.program import abstract_state
from jaxformers.train.program import build
from jaxformers.train.run_directory import RunDirectory
from jaxformers.train.sharding import MeshShape
from jaxformers.train.state import TrainState


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """A model with the variables it learned.

  Attributes:
    experiment: what made it.
    variables: the variables of the model.
    step: after how many steps.
  """

  experiment: Experiment
  variables: dict[str, Any]
  step: int

  def sample(
    self,
    prompts: Sequence[str],
    *,
    tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: str | None = None,
    seed: int = 0,
  ) -> Iterator[tuple[int, bytes]]:
    """Continues prompts, giving text while it is produced.

    Args:
      prompts: texts to continue.
      tokens: how many tokens to add to each, at most.
      temperature: see `jaxformers.decode.Sampler`, like the next two.
      top_k: how many of the likeliest tokens to draw from.
      top_p: probability of the set of tokens to draw from.
      stop: ends a text after this; must be one token, such as a newline.
      seed: decides the draws.

    Returns:
      Iterator of the number of a prompt and a piece of its continuation.
    """
    tokenizer = self.experiment.data.tokenizer
    stop_tokens = () if stop is None else (_single(tokenizer, stop),)
    pieces = stream(
      self.experiment.model,
      self.variables,
      [tokenizer.encode(prompt.encode()) for prompt in prompts],
      max_new_tokens=tokens,
      key=jax.random.key(seed),
      sampler=Sampler(temperature, top_k, top_p),
      stop_tokens=stop_tokens,
    )
    return _decoded(pieces, tokenizer)

  def preview(self) -> bytes:
    """Returns the text of the experiment's preview, prompt included."""
    preview = self.experiment.preview
    pieces = self.sample(
      [preview.prompt],
      tokens=preview.tokens,
      temperature=preview.temperature,
      top_p=preview.top_p,
      seed=self.experiment.seed,
    )
    return preview.prompt.encode() + b''.join(piece for _, piece in pieces)

  def evaluate(self, experiment: Experiment | None = None) -> dict[str, float]:
    """Measures the model on all held-out rows.

    Args:
      experiment: gives other data, batch size or mesh than those of training;
        the model must be the same. None for those of training.
    """
    experiment = experiment or self.experiment
    if experiment.model != self.experiment.model:
      raise ValueError(
        'the model of a trained run is fixed; change the data, the batch size '
        'or the mesh only.'
      )
    program = build(experiment, experiment.data.prepare())
    statistics = dict(self.variables)
    state = TrainState(
      step=np.int32(self.step),
      params=statistics.pop('params'),
      frozen=statistics.pop('frozen', None),
      statistics=statistics,
      optimizer_state=(),
      skipped=np.int32(0),
    )
    return evaluate(
      program.evaluate_step,
      state,
      program.heldout(),
      program.prepared.facts.get('heldout_bytes_per_token'),
    )

  def merged(self) -> 'Run':
    """Returns the run of the model alone, with its adapters merged.

    It samples as fast as the model did before it had any.

    Raises:
      ValueError: if the model has no adapters.
    """
    model = self.experiment.model
    if not isinstance(model, LoRA):
      raise ValueError(
        f'{type(model).__name__} has no adapters to merge; expected a '
        'jaxformers.nn.LoRA.'
      )
    experiment = dataclasses.replace(
      self.experiment, model=model.model, start=None
    )
    merged = jax.jit(model.merge)(self.variables)
    return dataclasses.replace(self, experiment=experiment, variables=merged)


@dataclasses.dataclass(frozen=True)
class FromRun:
  """Begins where another run has arrived.

  Attributes:
    directory: of that run. It is read once, when training begins.
    checkpoint: `'latest'`, `'best'` (lowest held-out loss) or a step.
  """

  directory: str
  checkpoint: int | str = 'latest'

  def variables(self) -> dict[str, Any]:
    return open_run(self.directory, checkpoint=self.checkpoint).variables


def open_run(
  workdir: str | os.PathLike[str],
  *,
  checkpoint: int | str = 'latest',
  classes: dict[str, type] | None = None,
  averaged: bool = True,
  mesh: MeshShape | None = None,
) -> Run:
  """Opens a run from its record and a checkpoint.

  Only what the model needs is read, not the moments of the optimiser.

  No code in the directory is executed: the record names classes, and only those
  in `classes` are made.

  Args:
    workdir: the directory of the run.
    checkpoint: `'latest'`, `'best'` (lowest held-out loss) or a step.
    classes: the classes that the record may name; None for the library's.
    averaged: whether to take the mean of the parameters where the optimiser
      kept it, and not the last ones.
    mesh: how the devices that are here share it out. None for the mesh of the
      run or, if that does not fit them, `fsdp` over as many as parameters
      divide among.

  Raises:
    FileNotFoundError: if there is no run.
    ValueError: if it has no such checkpoint, or does not fit the mesh.
    RunFailed: if none can be read.
  """
  directory = RunDirectory(pathlib.Path(workdir))
  classes = records.known_classes() if classes is None else classes
  experiment = records.from_record(directory.load(), classes)
  mesh, state = _here(experiment, mesh)
  experiment = dataclasses.replace(experiment, mesh=mesh)
  averaged = averaged and keeps_average(state.optimizer_state)
  with Checkpoints(directory.checkpoints, read_only=True) as checkpoints:
    restored = checkpoints.restore(
      checkpoint, without_frozen(_needed(state, averaged))
    )
  if restored is None:
    raise RunFailed(
      f'{directory.path} has no {checkpoint} checkpoint yet; train it first, '
      'or ask for another.'
    )
  final = with_frozen(restored.state, state, directory, read_only=True)
  variables = final.variables
  if averaged:
    variables['params'] = averaged_params(final.optimizer_state, state.params)
  return Run(experiment, variables, restored.step)


def _here(experiment, mesh):
  """Returns a mesh of the devices that are here, and the shapes of the state."""
  count = jax.device_count()
  if mesh is None and experiment.mesh.sizes(count) is not None:
    mesh = experiment.mesh
  if mesh is not None:
    return mesh, abstract_state(experiment, mesh.build())
  *shared, whole = [
    MeshShape(fsdp=n) for n in range(count, 0, -1) if count % n == 0
  ]
  for mesh in shared:
    with contextlib.suppress(ValueError):  # A width does not divide.
      return mesh, abstract_state(experiment, mesh.build())
  return whole, abstract_state(experiment, whole.build())


def _needed(state, averaged):
  """Returns a state in which what the model does not need is not read."""
  is_average = lambda node: averaged and isinstance(node, AverageState)

  def needed(node):
    if is_average(node):
      return AverageState(NOT_READ, NOT_READ, node.average)
    return NOT_READ

  not_read = lambda tree: jax.tree.map(needed, tree, is_leaf=is_average)
  return state._replace(
    params=not_read(state.params) if averaged else state.params,
    optimizer_state=not_read(state.optimizer_state),
    tasks=not_read(state.tasks),
  )


def _single(tokenizer, text):
  ids = tokenizer.encode(text.encode())
  if len(ids) != 1:
    raise ValueError(
      f'stop must be one token, but {text!r} is {len(ids)}; choose a shorter '
      'one, such as a newline.'
    )
  return int(ids[0])


def _decoded(pieces, tokenizer):
  for piece in pieces:
    for row, ids in enumerate(piece):
      if len(ids):
        yield row, tokenizer.decode(ids)
