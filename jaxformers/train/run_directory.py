"""The directory of one run: what lies where."""

import dataclasses
import pathlib

from jaxformers.train.directory import Directory


@dataclasses.dataclass(frozen=True)
class RunDirectory(Directory):
  """A directory that belongs to one run and one experiment.

  Attributes:
    path: The directory; a string is accepted.
  """

  kind = 'run'
  content = 'experiment'
  adaptable = frozenset({'mesh'})

  @property
  def metrics(self) -> pathlib.Path:
    """One JSON object per line and step."""
    return self.path / 'metrics.jsonl'

  @property
  def checkpoints(self) -> pathlib.Path:
    """Holds one directory per saved step."""
    return self.path / 'checkpoints'

  @property
  def frozen(self) -> pathlib.Path:
    """Holds the variables that the run never changes."""
    return self.path / 'frozen'

  @property
  def events(self) -> pathlib.Path:
    """Holds event files for TensorBoard."""
    return self.path / 'events'

  @property
  def profile(self) -> pathlib.Path:
    """Holds traces for xprof."""
    return self.path / 'profile'

  @property
  def figure(self) -> pathlib.Path:
    """The loss curve."""
    return self.path / 'loss.png'

  @property
  def sample(self) -> pathlib.Path:
    """Text drawn when the run ended."""
    return self.path / 'sample.txt'

  @property
  def baselines(self) -> pathlib.Path:
    """Held-out bits per byte of other models, by name; as JSON."""
    return self.path / 'baselines.json'
