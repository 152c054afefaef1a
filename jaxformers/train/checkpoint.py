"""Saves a run so that it can be killed at any moment, and finds it again.

One file around `orbax.checkpoint.CheckpointManager`. What it adds: the
checkpoints that are kept are the newest *and* the best; every file is sealed
with checksums; a damaged checkpoint is noticed, named and stepped over; a
failed save says what is still good; a model that does not fit its checkpoint is
told which parameter differs.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import logging
import math
import os
import re
import shutil
from typing import Any, Literal, NamedTuple

import jax
import orbax.checkpoint as ocp

from jaxformers.train.distributed import call_first
from jaxformers.train.distributed import tell_all
from jaxformers.train.distributed import wait_for_all
from jaxformers.train.errors import RunFailed
from jaxformers.train.seal import find_damage
from jaxformers.train.seal import write_seal

_SELECTOR = 'heldout_loss'
_TEMPORARY = '.orbax-checkpoint-tmp'
# Gets the time of the commit after the seal; orbax restores without it.
_ORBAX_OWN = '_CHECKPOINT_METADATA'
_ANY = 'any'

Which = int | Literal['latest', 'best']

NOT_READ = ocp.PLACEHOLDER
"""Stands in a state for a leaf that is not read from a checkpoint."""


class Restored(NamedTuple):
  """What a checkpoint held.

  Attributes:
    step: number of the step after which it was saved.
    state: the state, in the structure and sharding that was asked for.
    progress: the plain values saved beside it, such as the data position.
    record: the record of the experiment that wrote it.
  """

  step: int
  state: Any
  progress: dict[str, Any]
  record: dict[str, Any]


@dataclasses.dataclass
class _Keep(ocp.checkpoint_managers.PreservationPolicy):
  """Keeps the newest and the best checkpoints.

  Orbax's own `BestN` keeps every checkpoint that was not evaluated, and counts
  a loss that is not a number like any other.

  Attributes:
    latest: how many of the newest to keep.
    best: how many of those with the lowest loss to keep.
    losses: held-out loss by step; steps without a finite one are absent.
  """

  latest: int
  best: int
  losses: Mapping[int, float]

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    """Returns for each checkpoint whether to keep it."""
    del context
    steps = sorted(checkpoint.step for checkpoint in checkpoints)
    evaluated = sorted(set(steps) & set(self.losses), key=self.losses.get)
    kept = {*steps[len(steps) - self.latest :], *evaluated[: self.best]}
    return [checkpoint.step in kept for checkpoint in checkpoints]


class _Quiet(logging.Filter):
  """Drops what orbax logs for its developers.

  Warnings about its own options, and tracebacks of errors that it also raises
  and that reach the user as one sentence.
  """

  def filter(self, record: logging.LogRecord) -> bool:
    if 'orbax' not in record.pathname:
      return True
    return record.levelno >= logging.ERROR and not record.exc_info


class Checkpoints:
  """The checkpoints of one run; a context manager.

  Every process of a run makes one and calls the same methods in the same order;
  process 0 moves and seals the files.

  Args:
    directory: where they are, `<directory>/<step>`; made if missing.
    keep_latest: how many of the newest to keep, at least 1. Two by default, so
      that a damaged one has a predecessor.
    keep_best: how many with the lowest held-out loss to keep.
    read_only: for looking at a run that may still be training: nothing is
      created, cleaned up or moved.
    report: told about every checkpoint that had to be stepped over; on process
      0 only.

  Raises:
    RunFailed: the directory cannot be made.
    ValueError: `keep_latest` is not positive or `keep_best` is negative.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    keep_latest: int = 2,
    keep_best: int = 2,
    read_only: bool = False,
    report: Callable[[str], None] = print,
  ):
    if keep_latest < 1 or keep_best < 0:
      raise ValueError(
        'Checkpoints needs keep_latest >= 1 and keep_best >= 0, got'
        f' {keep_latest} and {keep_best}.'
      )
    self._quiet = _Quiet()
    self._report = report if jax.process_index() == 0 else _silent
    self._read_only = read_only
    self._losses: dict[int, float] = {}
    self._saving: int | None = None
    logging.getLogger('absl').addFilter(self._quiet)
    policy = _Keep(keep_latest, keep_best, self._losses)
    self._manager = self._open(os.path.abspath(directory), policy)
    self._directory = self._manager.directory
    for step in self.steps():
      self._losses |= self._read_loss(step)

  def _open(self, directory: str, policy: _Keep) -> ocp.CheckpointManager:
    """Returns the manager of `directory`."""
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policy,
      read_only=self._read_only,
      create=not self._read_only,
      # A save that was killed leaves a folder of its own.
      cleanup_tmp_directories=not self._read_only,
      async_options=ocp.options.AsyncOptions(
        post_finalization_callback=self._seal,
        # In the background, a failure leaves threads of orbax that wait ten
        # minutes for the folder and keep the process from ending.
        create_directories_asynchronously=False,
      ),
    )
    try:
      return ocp.CheckpointManager(directory, options=options)
    except OSError as error:
      raise RunFailed(
        f'Cannot make the checkpoint directory {directory}:'
        f' {error.strerror}. Choose a working directory that can be written.'
      ) from error

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind, error, trace) -> None:
    try:
      self.wait()
    except RunFailed as failure:
      if error is None:
        raise
      self._report(str(failure))  # `error` is what stops the run
    finally:
      self._manager.close()
      logging.getLogger('absl').removeFilter(self._quiet)

  def steps(self) -> list[int]:
    """Returns the steps that have a checkpoint, oldest first."""
    return sorted(self._manager.all_steps())

  @property
  def latest(self) -> int | None:
    """The newest step, or None if there is none."""
    return max(self.steps(), default=None)

  @property
  def best(self) -> int | None:
    """The step with the lowest held-out loss; None if no loss is finite."""
    evaluated = [step for step in self.steps() if step in self._losses]
    return min(evaluated, key=self._losses.get, default=None)

  def save(
    self,
    step: int,
    state: Any,
    *,
    progress: dict[str, Any],
    record: dict[str, Any],
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts saving in the background; a step that is there already is kept.

    The state may be donated as soon as this returns. A failure of the disk may
    surface later: in the next `save`, in `wait`, or on leaving the context.

    Args:
      step: number of the step; names the checkpoint.
      state: pytree of `jax.Array`.
      progress: plain values (JSON), such as the position in the data.
      record: the record of the experiment (JSON).
      metrics: measurements of this state. `heldout_loss` decides which
        checkpoints are best; one that is missing or not finite never is.

    Raises:
      RunFailed: this or the previous save failed; the earlier checkpoints are
        still there.
      TypeError: `progress` or `record` is not plain.
    """
    self.wait()
    if step in self.steps():
      return
    json.dumps([progress, record])
    finite = {
      name: float(value)
      for name, value in (metrics or {}).items()
      if math.isfinite(value)
    }
    items = ocp.args.Composite(
      state=ocp.args.PyTreeSave(state),
      progress=ocp.args.JsonSave(progress),
      experiment=ocp.args.JsonSave(record),
      contents=ocp.args.JsonSave(
        {'metrics': finite, 'leaves': kinds_of(state)}
      ),
    )
    self._saving = step
    if _SELECTOR in finite:
      self._losses[step] = finite[_SELECTOR]
    try:
      self._manager.save(step, args=items, force=True)
    except Exception as error:
      raise self._failure(error) from error

  def wait(self) -> None:
    """Returns when nothing is being saved any more.

    Raises:
      RunFailed: the save in the background failed.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._failure(error) from error

  def _failure(self, error: Exception) -> RunFailed:
    """Tidies up after a failed save and describes it."""
    step = self._saving
    self._losses.pop(step, None)
    if jax.process_index() == 0:  # what was written may be what fills the disk
      shutil.rmtree(self._directory / f'{step}{_TEMPORARY}', ignore_errors=True)
    try:
      self._manager.reload()
      newest = self.latest
    except OSError:
      newest = None
    remains = (
      'There is no earlier checkpoint: the same command starts again'
      if newest is None
      else f'The newest good checkpoint is that of step {newest}: the same'
      ' command resumes from it'
    )
    return RunFailed(
      f'The checkpoint of step {step} could not be saved in'
      f' {self._directory}: {_cause(error)}. {remains} once this is mended.'
    )

  def _seal(self) -> None:
    """Seals the checkpoint that is about to get its final name."""
    unfinished = self._directory / f'{self._saving}{_TEMPORARY}'
    final = self._directory / str(self._saving)  # on object stores
    write_seal(
      unfinished if unfinished.exists() else final, without={_ORBAX_OWN}
    )

  def restore(self, which: Which, abstract_state: Any) -> Restored | None:
    """Reads a checkpoint back, bit for bit.

    With `'latest'`, a damaged checkpoint is reported and the one before it is
    taken; once one was read, the damaged ones are moved to
    `<directory>/../broken/<step>`. If none can be read none is moved, so that
    the next start does not take the run for a new one.

    Args:
      which: a step, `'latest'` or `'best'`.
      abstract_state: pytree of `jax.ShapeDtypeStruct` with the shardings that
        are wanted; they need not be those it was saved with. Leaves that are
        `NOT_READ` stay so.

    Returns:
      The checkpoint, or None if there is none (for `'best'`: none with a
      held-out loss).

    Raises:
      RunFailed: there are checkpoints, but none that was asked for can be read;
        or a save in the background failed.
      ValueError: there is no checkpoint of that step, or the state saved in it
        is not of this structure, these shapes and dtypes.
    """
    self.wait()
    self._manager.reload()
    broken = {}
    # Processes may see the directory at different times, and must agree.
    for step in tell_all(self._candidates(which)):
      if damage := self._damage(step):
        broken[step] = damage
        self._report(f'The checkpoint of step {step} is damaged: {damage}.')
        continue
      restored = self._read(step, abstract_state)
      self._set_aside(list(broken))
      return restored
    if broken:
      listed = '\n'.join(f'  {step}: {why}' for step, why in broken.items())
      raise RunFailed(
        f'No checkpoint in {self._directory} can be read:\n{listed}\n'
        'Restore the files from a copy, or start anew in another working'
        ' directory.'
      )
    return None

  def _candidates(self, which: Which) -> list[int]:
    """Returns the steps to try, in this order."""
    steps = self.steps()
    if which == 'latest':
      return steps[::-1]
    if which == 'best':
      return [] if self.best is None else [self.best]
    if which not in steps:
      raise ValueError(
        f'There is no checkpoint of step {which} in {self._directory}; there'
        f' are {", ".join(map(str, steps)) or "none"}.'
      )
    return [which]

  def _damage(self, step: int) -> str | None:
    """Says what is wrong with a checkpoint; process 0 looks, for all."""
    folder = self._directory / str(step)
    return call_first(lambda: find_damage(folder))

  def _read(self, step: int, abstract_state: Any) -> Restored:
    """Reads an undamaged checkpoint."""
    places = ocp.checkpoint_utils.construct_restore_args(abstract_state)
    arguments = ocp.args.Composite(
      state=ocp.args.PyTreeRestore(abstract_state, restore_args=places),
      progress=ocp.args.JsonRestore(),
      experiment=ocp.args.JsonRestore(),
    )
    if difference := self._difference(step, abstract_state):
      raise ValueError(
        f'The checkpoint of step {step} in {self._directory} does not fit:'
        f' {difference}. Use the configuration that wrote it, or another'
        ' working directory.'
      )
    try:
      items = self._manager.restore(step, args=arguments)
    except Exception as error:
      raise RunFailed(
        f'The checkpoint of step {step} in {self._directory} is undamaged, but'
        f' could not be restored: {_cause(error)}.'
      ) from error
    return Restored(step, items.state, items.progress, items.experiment)

  def _difference(self, step: int, abstract_state: Any) -> str | None:
    """Names the leaves in which a checkpoint differs from `abstract_state`."""
    saved = self._read_contents(step)['leaves']
    wanted = kinds_of(abstract_state)
    names = [
      name
      for name in saved | wanted
      if wanted.get(name) not in (saved.get(name), _ANY)
    ]
    if not names:
      return None
    more = f' (and {len(names) - 3} more)' if len(names) > 3 else ''
    return (
      '; '.join(
        f'{name} is {saved.get(name, "absent")} in the checkpoint and'
        f' {wanted.get(name, "absent")} here'
        for name in names[:3]
      )
      + more
    )

  def _read_contents(self, step: int) -> dict[str, Any]:
    """Returns the metrics and the kinds of the leaves of a checkpoint."""
    items = ocp.args.Composite(contents=ocp.args.JsonRestore())
    return self._manager.restore(step, args=items).contents

  def _read_loss(self, step: int) -> dict[int, float]:
    """Returns the held-out loss of a checkpoint by its step, if it has one."""
    try:
      return {step: self._read_contents(step)['metrics'][_SELECTOR]}
    except Exception:  # not evaluated, or damaged: then it is not the best
      return {}

  def _set_aside(self, steps: Sequence[int]) -> None:
    """Moves checkpoints out of the way, each under a name of its own."""
    if self._read_only or not steps:
      return
    if jax.process_index() == 0:
      for step in steps:
        target = _unused(self._directory.parent / 'broken' / str(step))
        target.parent.mkdir(exist_ok=True)
        (self._directory / str(step)).rename(target)
        self._report(
          f'Moved the damaged checkpoint of step {step} to {target}.'
        )
    wait_for_all()
    for step in steps:
      self._losses.pop(step, None)
    self._manager.reload()


def kinds_of(tree: Any) -> dict[str, str]:
  """Returns dtype and shape of every leaf by its path.

  Args:
    tree: of arrays or of their shapes; those of `NOT_READ` are any.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): (
      _ANY if leaf is NOT_READ else f'{leaf.dtype}{list(leaf.shape)}'
    )
    for path, leaf in leaves
  }


def _unused(path: Any) -> Any:
  """Returns `path`, or the first of `path-2`, `path-3`, ... that is free."""
  candidate, count = path, 1
  while candidate.exists():
    count += 1
    candidate = path.with_name(f'{path.name}-{count}')
  return candidate


def _silent(text: str) -> None:
  del text


def _cause(error: BaseException) -> str:
  """Returns in one line what the operating system or orbax complained about."""
  text = str(error)
  if system := re.search(r"([^:\n]*) \[os_error_code='\d+'\]", text):
    return system[1].strip()
  if isinstance(error, OSError) and error.strerror:
    return f'{error.strerror} ({error.filename})'
  return f'{type(error).__name__}: {text.splitlines()[0] if text else ""}'[:300]
