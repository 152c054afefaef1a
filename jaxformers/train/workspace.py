"""Where a study measures: its directory, and the runs that it trains."""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from jaxformers.train import record as records
from jaxformers.train.directory import Directory
from jaxformers.train.directory import write_whole
from jaxformers.train.experiment import Experiment
from jaxformers.train.loop import train
from jaxformers.train.metrics import read_metrics
from jaxformers.train.run import Run
from jaxformers.train.run_directory import RunDirectory
from jaxformers.train.study import Value


class Left(Exception):
  """A signal asked to leave before a training run was finished."""


@dataclasses.dataclass(frozen=True)
class StudyDirectory(Directory):
  """A directory that belongs to one study and its options.

  Attributes:
    path: The directory; a string is accepted.
  """

  kind = 'study'
  content = 'study'

  @property
  def measurements(self) -> pathlib.Path:
    """What has been measured so far."""
    return self.path / 'measurements.json'

  @property
  def trainings(self) -> pathlib.Path:
    """Holds one run directory per distinct experiment."""
    return self.path / 'trainings'

  def load_measurements(self) -> list['Measurement']:
    """Reads what has been measured so far.

    Raises:
      ValueError: if the file is damaged.
    """
    if not self.measurements.is_file():
      return []
    try:
      lines = json.loads(self.measurements.read_text('utf-8'))
      return [Measurement(**line) for line in lines]
    except (ValueError, TypeError) as error:
      raise ValueError(
        f'{self.measurements} is damaged ({error}); delete it to measure again.'
      ) from error

  def save_measurements(self, measurements: list['Measurement']) -> None:
    """Writes all measurements; a kill leaves the old file or the new one.

    Args:
      measurements: the old ones as well.
    """
    lines = (json.dumps(dataclasses.asdict(m)) for m in measurements)
    write_whole(self.measurements, '[\n' + ',\n'.join(lines) + '\n]\n')


@dataclasses.dataclass(frozen=True)
class Measurement:
  """What was measured of one variant with one seed.

  Attributes:
    variant: which.
    seed: which.
    values: by name.
    minutes: how long it took, training included.
    code: checksum of the file that defines the study.
  """

  variant: str
  seed: int
  values: Mapping[str, Value]
  minutes: float
  code: str


class Workspace:
  """Trains what a measurement needs, each experiment once.

  Runs are found again by their experiments: variants that differ only in how
  they measure share them, and a study that was killed goes on from the last
  checkpoint.

  Args:
    directory: of the study.
  """

  def __init__(self, directory: StudyDirectory):
    self._directory = directory
    self._runs: dict[str, Run] = {}  # opened, for the variants that follow

  @property
  def path(self) -> pathlib.Path:
    """A directory for files of the study's own."""
    path = self._directory.path / 'files'
    path.mkdir(exist_ok=True)
    return path

  def train(self, experiment: Experiment) -> Run:
    """Trains an experiment, or gives the run that was trained before.

    Args:
      experiment: what to train, with the seed of the measurement; with
        `preview=None` nothing is sampled.

    Raises:
      RunFailed: if a loss is not finite, or a checkpoint cannot be written.
    """
    key = _key(experiment)
    if key not in self._runs:
      state = train(experiment, self._directory.trainings / key)
      if state is None:
        raise Left
      self._runs[key] = Run(experiment, state.result, int(state.step))
    return self._runs[key]

  def metrics(
    self, experiment: Experiment, split: str = 'train'
  ) -> list[dict[str, Any]]:
    """Reads what was measured while an experiment was trained.

    Args:
      experiment: trained first if it was not yet.
      split: `'train'` for every step, `'heldout'` for the evaluations.

    Returns:
      One dictionary per step, in order: `step`, `split` and values by name.
    """
    self.train(experiment)
    directory = RunDirectory(self._directory.trainings / _key(experiment))
    lines = read_metrics(directory.metrics)
    return [line for line in lines if line['split'] == split]

  def forget(self) -> None:
    """Releases the memory of opened runs; on disk they stay."""
    self._runs.clear()


def _key(experiment: Experiment) -> str:
  """Names an experiment by its record."""
  text = json.dumps(records.to_record(experiment), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]
