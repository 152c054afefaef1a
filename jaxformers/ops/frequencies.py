"""How fast the pairs of a rotary code turn, at and beyond the trained length.

RoPE turns pair m by `base^(-2m/K)` per position, which reads a position as a
number in base `beta = base^(2/K)`: pair m is its m-th digit. A model trained on
short texts is used on texts k times longer by slowing pairs down, each in its
own measure. A spectrum is such a rule; it computes on the host, once, in
float64, and costs nothing at run time.

Here m counts from 0, K is the number of rotated coordinates, P = K/2.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Float
import numpy as np

from jaxformers.ops.scales import Factor


@runtime_checkable
class Spectrum(Protocol):
  """A rule for the angle per position of each coordinate pair.

  Source: Su Jianlin, "RoPE is a beta-base encoding", 2023,
  https://kexue.fm/archives/9675.
  """

  def frequencies(self, dim: int, base: float) -> Float[np.ndarray, ' P']:
    """Returns radians per position of each pair, float64.

    Args:
      dim: number K = 2P of rotated coordinates, even.
      base: see `jaxformers.ops.Rotary`.
    """
    ...


def rope_frequencies(
  head_dim: int, base: float = 10000.0
) -> Float[np.ndarray, ' P']:
  """Returns the angle per position of each coordinate pair.

  `theta_m = base^(-2m/K)`, m = 0 .. K/2 - 1, in float64 on the host.

  Source: Su et al., "RoFormer", 2021, arXiv 2104.09864, section 3.2.2.

  Args:
    head_dim: number K of coordinates that are rotated, even.
    base: see `jaxformers.ops.Rotary`.

  Raises:
    ValueError: if `head_dim` is not even and positive, or `base` not positive.
  """
  if head_dim < 2 or head_dim % 2:
    raise ValueError(
      'rotations need an even, positive number of coordinates, got '
      f'{head_dim}; choose an even head_dim or rotate only part of it.'
    )
  if not base > 0:
    raise ValueError(f'rotations need base > 0, got {base}.')
  return base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


@dataclasses.dataclass(frozen=True)
class Plain:
  """Leaves the frequencies of RoPE as they are: `base^(-2m/K)`.

  Source: Su et al., "RoFormer", 2021, arXiv 2104.09864, section 3.2.2.
  """

  def frequencies(self, dim, base):
    return rope_frequencies(dim, base)


@dataclasses.dataclass(frozen=True)
class RetNetSpectrum:
  """Spaces the frequencies so that the last one is exactly `1 / base`.

  `base^(-m/(P-1))`, where RoPE has `base^(-m/P)`.

  Source: Sun et al., "Retentive Network", 2023, arXiv 2307.08621, and its code,
  https://github.com/microsoft/torchscale.
  """

  def frequencies(self, dim, base):
    rope_frequencies(dim, base)  # For its errors.
    return base ** -np.linspace(0, 1, dim // 2)


@dataclasses.dataclass(frozen=True)
class Interpolation:
  """Divides all frequencies by k, as if positions were k times denser (PI).

  Needs fine-tuning: neighbours are closer than any the model has seen.

  Source: Chen et al., "Extending Context Window of Large Language Models via
  Positional Interpolation", 2023, arXiv 2306.15595, section 2.3.

  Attributes:
    factor: k, by how much longer texts become; 1 is plain RoPE.
  """

  factor: float

  def __post_init__(self):
    _check_factor(self)

  def frequencies(self, dim, base):
    return rope_frequencies(dim, base) / self.factor


@dataclasses.dataclass(frozen=True)
class NTKOld:
  """Multiplies the base by k: every digit but the first counts more.

  The slowest pair is slowed by `k^(1 - 2/K)`, not quite enough for k times the
  length.

  Source: Su Jianlin, "RoPE is a beta-base encoding", 2023,
  https://kexue.fm/archives/9675, with `lambda = k^(2/K)`.

  Attributes:
    factor: k; 1 is plain RoPE.
  """

  factor: float

  def __post_init__(self):
    _check_factor(self)

  def frequencies(self, dim, base):
    return rope_frequencies(dim, base * self.factor)


@dataclasses.dataclass(frozen=True)
class NTKAware:
  """Multiplies the base by `k^(K/(K-2))`: the slowest pair is slowed by k.

  The quickest pair keeps its frequency, the slowest gets that of
  `Interpolation`.

  Source: bloc97, "NTK-Aware Scaled RoPE", 2023, as defined in Peng et al.,
  "YaRN", 2023, arXiv 2309.00071, section 3.1.

  Attributes:
    factor: k; 1 is plain RoPE.
  """

  factor: float

  def __post_init__(self):
    _check_factor(self)

  def frequencies(self, dim, base):
    if dim < 4:
      raise ValueError(
        'NTK-aware frequencies keep the first pair and slow the last, so they '
        f'need at least 4 rotated coordinates, got {dim}; rotate more or use '
        'Interpolation.'
      )
    return rope_frequencies(dim, base * self.factor ** (dim / (dim - 2)))


@dataclasses.dataclass(frozen=True)
class NTKFixed:
  """Divides the frequency of pair m by `k^((m+1)/P)`.

  Compared with `NTKOld`, each digit also gets the longer period that a digit of
  the larger base has, hence m + 1 rather than m.

  Source: Su Jianlin, "The beta-base encoding to the end", 2023,
  https://kexue.fm/archives/9706.

  Attributes:
    factor: k; 1 is plain RoPE.
  """

  factor: float

  def __post_init__(self):
    _check_factor(self)

  def frequencies(self, dim, base):
    return NTKMixed(self.factor, 1.0).frequencies(dim, base)


@dataclasses.dataclass(frozen=True)
class NTKMixed:
  """Divides the frequency of pair m by `exp(a (m+1)^b)`, `a = log(k) / P^b`.

  A number system whose digits have bases of their own, the quick ones larger
  than the slow ones. `b = 0` is `Interpolation`, `b = 1` is `NTKFixed`.

  Source: Su Jianlin, "The beta-base encoding to the end", 2023,
  https://kexue.fm/archives/9706.

  Attributes:
    factor: k; 1 is plain RoPE.
    exponent: b, from 0 to 1; 0.625 as in the article (its code has 0.75 for
      k = 12).
  """

  factor: float
  exponent: float = 0.625

  def __post_init__(self):
    _check_factor(self)
    if not 0 <= self.exponent <= 1:
      raise ValueError(
        'NTKMixed needs an exponent from 0 (Interpolation) to 1 (NTKFixed), '
        f'got {self.exponent}.'
      )

  def frequencies(self, dim, base):
    rope = rope_frequencies(dim, base)
    share = np.arange(1, dim // 2 + 1) / (dim // 2)
    return rope / self.factor ** (share**self.exponent)


@dataclasses.dataclass(frozen=True)
class MixedBase:
  """Divides the frequency of pair m by `lambda_0 ... lambda_m`.

  The general form of the rules above: any
  `lambda_0 >= lambda_1 >= ... >= lambda_(P-1) >= 1` whose product is k lets k
  times more positions be told apart, and no digit grows more than a quicker
  one. All equal is `NTKFixed`, all of k in the first is `Interpolation`.

  Source: Su Jianlin, "The beta-base encoding to the end", 2023,
  https://kexue.fm/archives/9706.

  Attributes:
    ratios: `lambda_0, ..., lambda_(P-1)`, one per pair; all 1 is plain RoPE.
  """

  ratios: tuple[float, ...]

  def __post_init__(self):
    if not isinstance(self.ratios, tuple) or not self.ratios:
      raise ValueError(
        f'MixedBase needs a tuple of ratios, one per pair, got {self.ratios!r}.'
      )
    ratios = np.asarray(self.ratios, np.float64)
    # What a formula gives for equal ratios may rise by rounding.
    rises = np.any(ratios[1:] > ratios[:-1] * (1 + 1e-9))
    if rises or not np.all((ratios >= 1 - 1e-9) & np.isfinite(ratios)):
      raise ValueError(
        'MixedBase needs finite ratios that never rise and are at least 1, got '
        f'{self.ratios}.'
      )

  @property
  def factor(self) -> float:
    """By how much longer texts become: the product of the ratios."""
    return math.prod(self.ratios)

  def frequencies(self, dim, base):
    if dim != 2 * len(self.ratios):
      raise ValueError(
        f'MixedBase has {len(self.ratios)} ratios, but {dim} rotated '
        f'coordinates make {dim // 2} pairs; give one ratio per pair.'
      )
    return rope_frequencies(dim, base) / np.cumprod(self.ratios)


@dataclasses.dataclass(frozen=True)
class DynamicNTK:
  """Is plain RoPE up to a length, and `NTKAware` as far as needed beyond.

  `k = factor length / max_length - (factor - 1)`, or 1 if that is less.

  The frequencies depend on `length`, which must therefore be fixed before the
  first token is read, as prompt and new tokens together. `Rotary` caches
  rotated keys: a scheme with a larger `length` applied to an old state would
  compare queries of one base with keys of another, and nothing would tell. To
  let `length` follow the text, keep raw keys, as `ReRoPE` does.

  Source: emozilla, "Dynamically Scaled RoPE", 2023, as in Peng et al., "YaRN",
  2023, arXiv 2309.00071, section 3.3; fixed length: Su Jianlin, 2024,
  https://kexue.fm/archives/9948.

  Attributes:
    factor: how steeply k grows with the length; with 1 it is
      `length / max_length`.
    max_length: the trained length, up to which this is plain RoPE.
    length: of the texts to be read.
  """

  factor: float
  max_length: int
  length: int

  def __post_init__(self):
    _check_factor(self)
    if self.max_length < 1 or self.length < 1:
      raise ValueError(
        'DynamicNTK needs lengths of at least 1, got max_length='
        f'{self.max_length} and length={self.length}.'
      )

  def frequencies(self, dim, base):
    stretch = self.factor * self.length / self.max_length - (self.factor - 1)
    return NTKAware(max(stretch, 1.0)).frequencies(dim, base)


@dataclasses.dataclass(frozen=True)
class YaRN:
  """Divides slow pairs by k, leaves quick ones, and passes over in between.

  `theta (ramp / k + 1 - ramp)`, where the ramp climbs over the pairs from 0, at
  the one that turns `fast` times within the trained length, to 1, at the one
  that turns `slow` times. Meant to go with `YaRNScale`.

  Source: Peng et al., "YaRN: Efficient Context Window Extension of Large
  Language Models", 2023, arXiv 2309.00071, section 3.2. As in the authors' code
  the ramp is linear in the number of the pair.

  Attributes:
    factor: k; 1 is plain RoPE.
    original_length: the trained length.
    fast: turns from which on a pair is left alone; 32 as in the paper.
    slow: turns up to which a pair is interpolated in full; 1 as in the paper.
    truncate: whether the ends of the ramp are moved outwards to whole pairs.
  """

  factor: float
  original_length: int
  fast: float = 32.0
  slow: float = 1.0
  truncate: bool = True

  def __post_init__(self):
    _check_factor(self)
    if self.original_length < 1:
      raise ValueError(
        f'YaRN needs original_length >= 1, got {self.original_length}.'
      )
    if not self.fast > self.slow > 0:
      raise ValueError(
        'YaRN needs fast > slow > 0, numbers of turns within the trained '
        f'length, got fast={self.fast} and slow={self.slow}.'
      )

  def frequencies(self, dim, base):
    rope = rope_frequencies(dim, base)
    low, high = self.bounds(dim, base)
    if low == high:
      high += 0.001
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    return rope / self.factor * ramp + rope * (1 - ramp)

  def bounds(self, dim: int, base: float) -> tuple[float, float]:
    """Returns the pairs at which the ramp begins and ends.

    Raises:
      ValueError: if base, trained length and turns leave no room for a ramp.
    """
    if not base > 1:
      raise ValueError(f'YaRN needs base > 1, got {base}.')

    def pair(turns):
      cycle = math.log(self.original_length / (2 * math.pi * turns))
      return dim * cycle / (2 * math.log(base))

    low, high = pair(self.fast), pair(self.slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    # There are only dim / 2 pairs, but this is the bound of the authors' code.
    low, high = max(low, 0), min(high, dim - 1)
    if low > high:
      raise ValueError(
        f'YaRN finds no ramp: with base {base} and {dim} rotated coordinates '
        f'it would run from pair {low} to pair {high}. original_length='
        f'{self.original_length} is too short or too long for this base.'
      )
    return low, high


@dataclasses.dataclass(frozen=True)
class Llama3:
  """Divides slow pairs by k, leaves quick ones, by their wavelength.

  A pair that turns t times within the trained length is divided by k if
  `t < low`, left alone if `t > high`, and in between gets the mean of both
  frequencies with weight `(t - low) / (high - low)` on the plain one.

  Source: Grattafiori et al., "The Llama 3 Herd of Models", 2024, arXiv
  2407.21783; the rule is `apply_scaling` of
  https://github.com/meta-llama/llama-models, whose numbers are the defaults.

  Attributes:
    factor: k; 1 is plain RoPE.
    original_length: the trained length.
    low: turns up to which a pair is interpolated in full.
    high: turns from which on a pair is left alone.
  """

  factor: float = 8.0
  original_length: int = 8192
  low: float = 1.0
  high: float = 4.0

  def __post_init__(self):
    _check_factor(self)
    if self.original_length < 1:
      raise ValueError(
        f'Llama3 needs original_length >= 1, got {self.original_length}.'
      )
    if not self.high > self.low > 0:
      raise ValueError(
        'Llama3 needs high > low > 0, numbers of turns within the trained '
        f'length, got high={self.high} and low={self.low}.'
      )

  def frequencies(self, dim, base):
    rope = rope_frequencies(dim, base)
    turns = self.original_length * rope / (2 * math.pi)
    plain = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
    return rope / self.factor * (1 - plain) + rope * plain


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class YaRNScale(Factor):
  """Multiplies scores by `mu^2`, which keeps their entropy in longer texts.

  `mu = 0.1 log(k) + 1`. To be multiplied with the usual scale:
  `InverseSqrt() * YaRNScale(4)`. Other libraries multiply sines and cosines by
  mu; here the scores are multiplied, so that raw keys can be cached and
  coordinates that are not rotated take part. For checkpoints of those libraries
  that rotate only a part, use `Rotary(amplitude=YaRNScale(4).amplitude)` and the
  usual scale alone; without `rotary_dim` both are the same.

  With `mscale` and `mscale_all_dim`, `mu = g(mscale) / g(mscale_all_dim)`,
  `g(c) = 0.1 c log(k) + 1`; equal ones give mu = 1.

  Source: Peng et al., "YaRN", 2023, arXiv 2309.00071, section 3.4, equation 22;
  `mscale`: DeepSeek-AI, "DeepSeek-V2", 2024, arXiv 2405.04434, and its code.

  Attributes:
    factor: k, as in `YaRN`; 1 leaves scores alone.
    mscale: a positive number, given together with `mscale_all_dim`; or None.
    mscale_all_dim: likewise.
    attention_factor: mu itself, which replaces all formulas; or None.
  """

  factor: float
  mscale: float | None = None
  mscale_all_dim: float | None = None
  attention_factor: float | None = None

  def __post_init__(self):
    _check_factor(self)
    given = self.mscale, self.mscale_all_dim
    if (None in given) != (given == (None, None)):
      raise ValueError(
        'YaRNScale needs mscale and mscale_all_dim together or neither, got '
        f'mscale={self.mscale} and mscale_all_dim={self.mscale_all_dim}.'
      )
    for name in ('mscale', 'mscale_all_dim', 'attention_factor'):
      value = getattr(self, name)
      if value is not None and not value > 0:
        raise ValueError(f'YaRNScale needs {name} > 0 or None, got {value}.')

  def multiplier(self, visible_keys, head_dim):
    del visible_keys, head_dim
    return self.amplitude**2

  @property
  def amplitude(self) -> float:
    """The number mu, which Hugging Face calls `attention_factor`."""
    if self.attention_factor is not None:
      return self.attention_factor
    slope = 0.1 * math.log(self.factor)
    if self.mscale is None:
      return slope + 1
    return (slope * self.mscale + 1) / (slope * self.mscale_all_dim + 1)


def _check_factor(rule):
  if not 1 <= rule.factor < math.inf:
    raise ValueError(
      f'{type(rule).__name__} needs a finite factor >= 1, got {rule.factor}; '
      'it says how many times longer texts become.'
    )
