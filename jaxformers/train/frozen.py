"""Variables that no step changes: saved once per run, not with every checkpoint."""

from jaxformers.train.checkpoint import Checkpoints
from jaxformers.train.errors import RunFailed
from jaxformers.train.run_directory import RunDirectory
from jaxformers.train.state import TrainState


def without_frozen(state: TrainState) -> TrainState:
  """Returns what a checkpoint holds of a state.

  Args:
    state: of arrays or of their shapes.
  """
  return state._replace(frozen=None)


def with_frozen(
  state: TrainState,
  abstract_state: TrainState,
  directory: RunDirectory,
  *,
  read_only: bool = False,
) -> TrainState:
  """Gives a state the frozen variables of its run.

  Those that the run has saved, so that it is complete in itself whatever becomes
  of the run that they came from; else the state's own, which are saved.

  Args:
    state: from a checkpoint, or the first one.
    abstract_state: shapes, dtypes and shardings.
    directory: of the run.
    read_only: whether nothing is written.

  Raises:
    RunFailed: if neither the directory nor the state has them.
  """
  if abstract_state.frozen is None:
    return state
  with Checkpoints(directory.frozen, read_only=read_only) as saved:
    if restored := saved.restore('latest', abstract_state.frozen):
      return state._replace(frozen=restored.state)
    if state.frozen is None:
      raise RunFailed(
        f'{directory.frozen}, which held the variables that this run does not '
        'change, is gone; restore it from a copy, or start anew in another '
        'working directory.'
      )
    saved.save(0, state.frozen, progress={}, record={})
  return state
