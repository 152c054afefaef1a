"""An experiment made ready to run: its mesh and its compiled functions."""

import bisect
from collections.abc import Callable, Iterable, Iterator
import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from jaxformers.data import Prepared
from jaxformers.data import heldout_batches
from jaxformers.nn.placement import ROWS
from jaxformers.train.experiment import Experiment
from jaxformers.train.objective import Batch
from jaxformers.train.objective import Losses
from jaxformers.train.sharding import axis_size
from jaxformers.train.sharding import batch_sharding
from jaxformers.train.sharding import on_mesh
from jaxformers.train.sharding import shardings
from jaxformers.train.state import TrainState
from jaxformers.train.step import Metrics
from jaxformers.train.step import evaluate_step_of
from jaxformers.train.step import init_state
from jaxformers.train.step import train_step_of


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
  """Compiled functions of an experiment, and where everything lies.

  Attributes:
    experiment: the run.
    prepared: its data.
    mesh: its devices.
    abstract_state: shapes, dtypes and shardings of its state.
    init: makes the first state.
    train_step: updates a state, which it consumes, by a batch.
    evaluate_step: measures a batch.
  """

  experiment: Experiment
  prepared: Prepared
  mesh: Mesh
  abstract_state: TrainState
  init: Callable[[], TrainState]
  train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
  evaluate_step: Callable[[TrainState, Batch], Losses]

  @functools.cached_property
  def rows(self) -> list[int]:
    """Which rows of each batch lie on devices of this process."""
    size = self.experiment.batch_size
    sharding = batch_sharding(self.mesh, 1)
    places = sharding.addressable_devices_indices_map((size,)).values()
    return sorted({row for (at,) in places for row in range(size)[at]})

  def place(self, batches: Iterable[dict[str, np.ndarray]]) -> Iterator[Batch]:
    """Puts batches onto the devices; each has the `rows` of this process."""
    for batch in batches:
      yield {name: self._placed(array) for name, array in batch.items()}

  def _placed(self, array):
    """Returns the global array of which this process has some rows."""
    size = self.experiment.batch_size

    def part(index):
      wanted = range(size)[index[0]]
      first = bisect.bisect_left(self.rows, wanted.start)
      return array[first : first + len(wanted), *index[1:]]

    return jax.make_array_from_callback(
      (size, *array.shape[1:]), batch_sharding(self.mesh, array.ndim), part
    )

  def heldout(self, limit: int | None = None) -> Iterator[Batch]:
    """Returns held-out batches on the devices; at most `limit` if given."""
    return self.place(
      heldout_batches(
        self.prepared.heldout,
        self.experiment.batch_size,
        limit,
        part=self.rows,
      )
    )


def build(experiment: Experiment, prepared: Prepared) -> Program:
  """Makes an experiment ready to run; nothing is computed yet.

  Args:
    experiment: the run.
    prepared: its data, prepared.

  Raises:
    ValueError: if model, data and mesh do not fit each other.
  """
  check_vocabulary(experiment, prepared)
  mesh = experiment.mesh.build()
  batch = abstract_batch(experiment, mesh)
  state = abstract_state(experiment, mesh)
  places = jax.tree.map(lambda leaf: leaf.sharding, state)
  return Program(
    experiment=experiment,
    prepared=prepared,
    mesh=mesh,
    abstract_state=state,
    init=jax.jit(
      on_mesh(lambda: init_state(experiment, batch), mesh),
      out_shardings=places,
    ),
    train_step=jax.jit(
      on_mesh(train_step_of(experiment), mesh),
      donate_argnums=0,
      out_shardings=(places, None),
    ),
    evaluate_step=jax.jit(on_mesh(evaluate_step_of(experiment), mesh)),
  )


def abstract_state(experiment: Experiment, mesh: Mesh) -> TrainState:
  """Returns shapes, dtypes and shardings of the state; reads no data.

  Args:
    experiment: the run.
    mesh: its devices.
  """
  batch = _batch_shapes(experiment)
  shapes = jax.eval_shape(lambda: init_state(experiment, batch))
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    shapes,
    shardings(shapes, mesh),
  )


def abstract_batch(experiment: Experiment, mesh: Mesh) -> dict[str, Any]:
  """Returns shapes, dtypes and shardings of a batch; reads no data.

  Args:
    experiment: the run.
    mesh: its devices.

  Raises:
    ValueError: if the batch does not divide among the devices.
  """
  parts = axis_size(mesh, ROWS) * experiment.accumulate
  if experiment.batch_size % parts:
    raise ValueError(
      f'batch_size {experiment.batch_size} does not divide into {parts} '
      'parts (mesh axes dcn x data x fsdp, times accumulate); change one of '
      'them.'
    )
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(
      a.shape, a.dtype, sharding=batch_sharding(mesh, a.ndim)
    ),
    _batch_shapes(experiment),
  )


def _batch_shapes(experiment):
  return {
    name: jax.ShapeDtypeStruct((experiment.batch_size, *a.shape), a.dtype)
    for name, a in experiment.data.example().items()
  }


def check_vocabulary(experiment: Experiment, prepared: Prepared) -> None:
  """Raises if the data holds tokens that the model does not know."""
  known = getattr(experiment.model, 'vocab_size', None)
  if known is not None and known < prepared.vocab_size:
    raise ValueError(
      f'the data has {prepared.vocab_size} different tokens, the model '
      f'knows {known}; set model.vocab_size={prepared.vocab_size} or more.'
    )
