"""What lies in a run directory, without the model: what a page tells."""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from jaxformers.train.metrics import read_metrics
from jaxformers.train.run_directory import RunDirectory


@dataclasses.dataclass(frozen=True)
class RecordedRun:
  """A run as its directory tells of it; nothing that lies there is executed.

  Attributes:
    name: what the page calls it.
    directory: where it lies.
    record: the configuration.
    metrics: lines of measurements by split; those of `timing` are what the
      clock says.
  """

  name: str
  directory: RunDirectory
  record: dict[str, Any]
  metrics: dict[str, list[dict[str, Any]]]

  @property
  def step(self) -> int:
    """The last step that was measured, 0 if none was."""
    return max(
      (int(x['step']) for x in self.metrics.get('train', ())), default=0
    )

  @property
  def sample(self) -> str | None:
    """The text that was drawn when the run ended."""
    if not self.directory.sample.is_file():
      return None
    return self.directory.sample.read_bytes().decode('utf-8', 'replace')

  @property
  def baselines(self) -> dict[str, float]:
    """Held-out bits per byte of other models, by name."""
    path = self.directory.baselines
    return json.loads(path.read_text('utf-8')) if path.is_file() else {}

  @property
  def checkpoints(self) -> list[int]:
    """The steps that were saved."""
    folders = self.directory.checkpoints.glob('*')
    return sorted(int(path.name) for path in folders if path.name.isdigit())

  def names(self, split: str) -> tuple[str, ...]:
    """Names what was measured on a split.

    Args:
      split: such as `'train'`.
    """
    lines = self.metrics.get(split, ())
    names = dict.fromkeys(name for line in lines for name in line)
    return tuple(name for name in names if name not in ('step', 'split'))

  def curve(self, split: str, name: str) -> np.ndarray:
    """Returns what was measured.

    Args:
      split: such as `'train'`.
      name: one of `names(split)`.

    Returns:
      float64 `[N, 2]`: step and value, which may be nan or infinite.
    """
    lines = (x for x in self.metrics.get(split, ()) if name in x)
    rows = [(line['step'], line[name]) for line in lines]
    return np.array(rows, np.float64).reshape(-1, 2)


def recorded_runs(paths: Sequence[pathlib.Path]) -> list[RecordedRun]:
  """Opens runs under names that tell them apart.

  Args:
    paths: Of their directories.

  Raises:
    FileNotFoundError: If there is no run at one of them.
    ValueError: If a path occurs twice, or a directory is damaged.
  """
  resolved = [path.resolve() for path in paths]
  for path, real in zip(paths, resolved, strict=True):
    if resolved.count(real) > 1:
      raise ValueError(f'{path} is given twice; give each run once.')
  names = [path.name for path in resolved]
  if len(set(names)) < len(names):
    names = [str(path) for path in paths]
  directories = [RunDirectory(path) for path in paths]
  return [
    RecordedRun(name, directory, directory.load(), _metrics(directory))
    for name, directory in zip(names, directories, strict=True)
  ]


def _metrics(directory: RunDirectory) -> dict[str, list[dict[str, Any]]]:
  """Reads all lines of measurements, by split."""
  found: dict[str, list[dict[str, Any]]] = {}
  timing = directory.metrics.with_name('timing.jsonl')
  for path in (directory.metrics, timing):
    for line in read_metrics(path) if path.is_file() else ():
      found.setdefault(line.get('split', 'timing'), []).append(line)
  return found
