"""A claim put to the test: variants, seeds, a measurement, a criterion.

A study says what would confirm a claim before anything is measured: `judge`
turns numbers into judgements, each with its bound. A claim that does not hold
is a result like any other.
"""

import abc
from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from jaxformers.train.record import nearest

if TYPE_CHECKING:  # importing a study loads neither of them
  from matplotlib.figure import FigureBase

  from jaxformers.train.workspace import Workspace

Value = float | list[float | None] | None
"""A number, a list of numbers, or None where there is none."""

Verdict = Literal['reproduced', 'partly reproduced', 'not reproduced']


@dataclasses.dataclass(frozen=True)
class Study(abc.ABC):
  """What an experiment file returns from `study()`.

  A subclass is a frozen dataclass whose fields are the options of the study;
  together with the seeds they decide its outcome. Every field needs a default.

  Attributes:
    claim: one sentence that can be false.
    source: who claims it and where.
    seeds: each variant is measured once with each.
  """

  claim: ClassVar[str]
  source: ClassVar[str]
  seeds: tuple[int, ...] = (0, 1, 2)

  @abc.abstractmethod
  def variants(self) -> tuple[str, ...]:
    """Returns the names of what is compared."""

  @abc.abstractmethod
  def measure(
    self, variant: str, seed: int, workspace: 'Workspace'
  ) -> Mapping[str, Any]:
    """Measures one variant with one seed.

    Args:
      variant: one of `variants()`.
      seed: one of `seeds`.
      workspace: trains experiments, and has a directory for files.

    Returns:
      Numbers and lists of numbers by name; None for what has no number. The
      names are the same for all variants, lengths for all seeds.
    """

  @abc.abstractmethod
  def judge(self, results: 'Results') -> Sequence['Judgement']:
    """Holds the measurements against the criteria.

    Args:
      results: all measurements.
    """

  @abc.abstractmethod
  def draw(self, results: 'Results', figure: 'FigureBase') -> None:
    """Draws the measurements, from them alone.

    Args:
      results: all measurements.
      figure: empty, in the style of the project, below claim and verdict. It
        lays itself out: `figure.subplots()` gives axes, and
        `figure.legend(loc='outside right upper')` a legend beside them.
    """


@dataclasses.dataclass(frozen=True)
class Judgement:
  """One criterion, and what was seen.

  Attributes:
    statement: the criterion in words, with units but without the bound.
    seen: the number that was found, None if there is none.
    relation: how it must compare with the bound.
    bound: the number it is compared with.
  """

  statement: str
  seen: float | None
  relation: Literal['<', '<=', '>', '>=']
  bound: float

  def __post_init__(self):
    if self.relation not in ('<', '<=', '>', '>='):
      raise ValueError(
        f"relation must be '<', '<=', '>' or '>=', got {self.relation!r}."
      )
    if not math.isfinite(self.bound):
      raise ValueError(f'{self.statement}: the bound is {self.bound}.')
    finite = self.seen is not None and math.isfinite(self.seen)
    object.__setattr__(self, 'seen', float(self.seen) if finite else None)
    object.__setattr__(self, 'bound', float(self.bound))

  @property
  def holds(self) -> bool:
    """Whether the criterion is met; without a number it is not."""
    if self.seen is None:
      return False
    return {
      '<': self.seen < self.bound,
      '<=': self.seen <= self.bound,
      '>': self.seen > self.bound,
      '>=': self.seen >= self.bound,
    }[self.relation]

  def __str__(self) -> str:
    seen = 'nothing' if self.seen is None else f'{self.seen:.4g}'
    word = 'holds' if self.holds else 'does not hold'
    return f'{word}: {self.statement}: {seen} {self.relation} {self.bound:g}'


def below(statement: str, seen: float | None, bound: float) -> Judgement:
  """Judges whether a number is below a bound.

  Args:
    statement: what the number is.
    seen: the number; nan or None never holds.
    bound: what it must be below.
  """
  return Judgement(statement, seen, '<', bound)


def above(statement: str, seen: float | None, bound: float) -> Judgement:
  """Judges whether a number is above a bound.

  Args:
    statement: what the number is.
    seen: the number; nan or None never holds.
    bound: what it must be above.
  """
  return Judgement(statement, seen, '>', bound)


def verdict_of(judgements: Sequence[Judgement]) -> Verdict:
  """Sums up judgements: all hold, some do, or none does.

  Args:
    judgements: at least one.
  """
  held = [judgement.holds for judgement in judgements]
  if all(held):
    return 'reproduced'
  return 'partly reproduced' if any(held) else 'not reproduced'


@dataclasses.dataclass(frozen=True)
class Results:
  """All measurements of a study.

  Attributes:
    seeds: in the order of the values.
    measurements: by variant and name, one value per seed.
  """

  seeds: tuple[int, ...]
  measurements: Mapping[str, Mapping[str, Sequence[Value]]]

  @property
  def variants(self) -> tuple[str, ...]:
    """The names of what was compared."""
    return tuple(self.measurements)

  @property
  def names(self) -> tuple[str, ...]:
    """The names of what was measured."""
    return tuple(next(iter(self.measurements.values())))

  def values(self, variant: str, name: str) -> np.ndarray:
    """Returns what was measured, nan where there was no number.

    Args:
      variant: one of `variants`.
      name: one of `names`.

    Returns:
      float64 `[seeds]`, or `[seeds, N]` if lists were measured.

    Raises:
      KeyError: if there is no such measurement; names the nearest.
    """
    measured = _get(self.measurements, variant, 'variant')
    return np.array(_get(measured, name, 'measurement'), np.float64)

  def mean(self, variant: str, name: str) -> Any:
    """Returns the mean over seeds: a float, or `[N]`.

    Args:
      variant: one of `variants`.
      name: one of `names`.
    """
    mean = self.values(variant, name).mean(axis=0)
    return float(mean) if mean.ndim == 0 else mean

  def spread(self, variant: str, name: str) -> Any:
    """Returns the standard deviation over seeds: a float, or `[N]`.

    The square root of the unbiased estimate of the variance; 0 for one seed.

    Args:
      variant: one of `variants`.
      name: one of `names`.
    """
    values = self.values(variant, name)
    spread = values.std(axis=0, ddof=min(len(values) - 1, 1))
    return float(spread) if spread.ndim == 0 else spread


def _get(mapping: Mapping[str, Any], key: str, kind: str) -> Any:
  if key not in mapping:
    known = ', '.join(mapping)
    raise KeyError(
      f'no {kind} {key!r}{nearest(key, mapping)} There are: {known}.'
    )
  return mapping[key]


def check_study(study: Study) -> None:
  """Raises unless a study can be measured.

  Args:
    study: what `study()` returned, with its options set.

  Raises:
    ValueError: if it has no claim or source, or its seeds or variants are
      missing or occur twice.
  """
  name = type(study).__name__
  for word in ('claim', 'source'):
    text = getattr(study, word, None)
    if not isinstance(text, str) or not text:
      raise ValueError(f'{name} needs a class attribute {word}, a sentence.')
  for what, given in (('seeds', study.seeds), ('variants', study.variants())):
    if not given:
      raise ValueError(f'{name} has no {what}; give at least one.')
    if len(set(given)) < len(given):
      raise ValueError(f'{name} has {what} twice: {given}; name each once.')
  for variant in study.variants():
    if not isinstance(variant, str):
      raise ValueError(f'{name} has a variant {variant!r}; use strings.')


def clean_measurement(measured: Any) -> dict[str, Value]:
  """Makes plain numbers of what a study measured.

  Args:
    measured: what `measure` returned.

  Returns:
    Floats, lists of floats, and None, by name.

  Raises:
    ValueError: if something is not a finite number, not a list of such, and
      not None.
  """
  if not isinstance(measured, Mapping) or not measured:
    raise ValueError(
      f'measure() must return numbers by name, got {measured!r:.60}.'
    )
  return {str(name): _clean(name, value) for name, value in measured.items()}


def _clean(name: str, value: Any) -> Value:
  if value is None:
    return None
  if np.ndim(value) == 1:
    return [_clean(f'{name}[{i}]', x) for i, x in enumerate(value)]
  try:
    number = float(value)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f'{name} is {value!r:.60}; expected a number, a list of numbers or None.'
    ) from error
  if not math.isfinite(number):
    raise ValueError(f'{name} is {number}; return None for what has no number.')
  return number


def check_alike(first: Mapping[str, Value], other: Mapping[str, Value]) -> None:
  """Raises unless two measurements have the same names.

  Args:
    first: a measurement.
    other: another.

  Raises:
    ValueError: if they differ; names the difference.
  """
  differing = sorted(first.keys() ^ other.keys())
  if differing:
    raise ValueError(
      f'measure() must give the same names for all variants and seeds, but '
      f'{", ".join(map(repr, differing))} is missing from some.'
    )


def check_shapes(
  first: Mapping[str, Value], other: Mapping[str, Value]
) -> None:
  """Raises unless the lists of two seeds have the same lengths.

  Args:
    first: a measurement.
    other: one of the same variant with another seed.

  Raises:
    ValueError: if they differ; names the difference.
  """
  for name in first:
    a, b = np.shape(first[name]), np.shape(other[name])
    if a != b:
      raise ValueError(
        f'{name} has shape {a} with one seed and {b} with another; seeds must '
        'agree, with None for what has no number.'
      )
