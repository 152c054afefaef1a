"""Rotations that are exact near the query and bounded or slow far from it.

RoPE scores depend on the distance r = i - j of query and key. A model has seen
no distance longer than its training texts; ReRoPE shows it none, because beyond
a window w it stops counting or counts in smaller steps:

    P(r) = r             for r < w
    P(r) = w + (r-w)/k   for r >= w     (k = infinity for ReRoPE, 1 for RoPE)

With R^p the rotation for position p, the score of both is `R^P(r) q . k`. It is
the product of two rotated vectors on either side of `r = w`, though not of the
same two, so these schemes have two branches where RoPE has one.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp

from jaxformers.ops.frequencies import Plain
from jaxformers.ops.frequencies import Spectrum
from jaxformers.ops.positions import Branch
from jaxformers.ops.positions import Rotary


@dataclasses.dataclass(frozen=True)
class FarRotary:
  """Rotates as `ReRoPE` and `LeakyReRoPE` do beyond their window.

  `R^(i step + shift) q . R^(j step) k`. A cache keeps keys that are rotated by
  `j step`: raw ones for `ReRoPE`, whose step is 0.

  Source: Su Jianlin, "ReRoPE: infinite extrapolation?", 2023,
  https://kexue.fm/archives/9708.

  Attributes:
    rotary: the rotation within the window.
    step: what a position counts, 1/k.
    shift: w - w/k, so that both agree at the edge of the window.
  """

  rotary: Rotary
  step: float
  shift: float

  compares_positions = True

  def store(self, key, position):
    if not self.step:
      return key
    return self.rotary.store(key, _fractional(key, position) * self.step)

  def branches(self, query, stored_key, query_position, key_position):
    del key_position
    place = _fractional(query, query_position) * self.step + self.shift
    return (Branch(self.rotary.store(query, place), stored_key),)


class _Bounded:
  """What both schemes share: all but `step`, what r counts beyond the window."""

  compares_positions = True

  def __post_init__(self):
    if self.window < 0:
      raise ValueError(
        f'{type(self).__name__} needs window >= 0, got {self.window}.'
      )
    self.near()  # Checks the other fields.

  def near(self) -> Rotary:
    """Returns the scheme within the window."""
    return Rotary(self.base, self.pairing, self.rotary_dim, self.spectrum)

  def far(self, *, after: bool = False) -> FarRotary:
    """Returns the scheme of keys beyond the window, before or after a query."""
    shift = self.window * (1 - self.step)
    return FarRotary(self.near(), self.step, -shift if after else shift)

  def store(self, key, position):
    del position
    return key

  def branches(self, query, stored_key, query_position, key_position):
    positions = query_position, key_position

    def branch(scheme):
      key = scheme.store(stored_key, key_position)
      return scheme.branches(query, key, *positions)[0]

    sides = (False, True) if self.bidirectional else (False,)
    return branch(self.near()), *(
      branch(self.far(after=after))._replace(region=_Beyond(self.window, after))
      for after in sides
    )


@dataclasses.dataclass(frozen=True)
class ReRoPE(_Bounded):
  """Rotates by the distance within a window, and by the window beyond it.

  `P(r) = min(r, w)`: training-free length extrapolation, for a model that was
  trained with `Rotary` and the same options. A window of a quarter to half of
  the trained length works; the trained length itself does not. Goes well with
  a scale that grows with the logarithm of the number of keys.

  Costs one more product of queries and keys than `Rotary`. A cache keeps raw
  keys, because both branches need them differently, and the near branch then
  rotates them at each step. `jaxformers.ops.attend_near_and_far` and
  `decode_near_and_far` compute the same without either.

  Source: Su Jianlin, "ReRoPE: infinite extrapolation?", 2023,
  https://kexue.fm/archives/9708; code: https://github.com/bojone/rerope.

  Attributes:
    window: w, in positions; 0 leaves no positions at all.
    base: see `Rotary`, like the three that follow.
    pairing: which coordinates form a pair.
    rotary_dim: rotates only this many leading coordinates; None for all.
    spectrum: the frequencies.
    bidirectional: whether keys after the query are bounded as well, `P(r) =
      clip(r, -w, w)`, for encoders. This takes a third product, which a causal
      mask would only hide. A scheme does not know the mask, so it must be told;
      if not, keys after the query are rotated as in `Rotary`, however far.
  """

  window: int
  base: float = 10000.0
  pairing: Literal['half', 'interleaved'] = 'half'
  rotary_dim: int | None = None
  spectrum: Spectrum = Plain()
  bidirectional: bool = False

  @property
  def step(self) -> float:
    """What a position counts beyond the window."""
    return 0.0


@dataclasses.dataclass(frozen=True)
class LeakyReRoPE(_Bounded):
  """Rotates by the distance within a window, and in other steps beyond it.

  `P(r) = w + (r - w) / k` from r = w on. With k > 1 a model that was trained
  with `Rotary` reads texts longer than it has seen; the largest P should stay
  below half of the trained length. k = 1 is `Rotary`.

  With k < 1 it is the inverse form: train with steps longer than one beyond the
  window, and use plain `Rotary` afterwards, at full speed. The article takes a
  quarter of the trained length for w and `1 / (2 x)` for k to read texts x
  times longer; x times the base may help.

  Costs and cache are those of `ReRoPE`.

  Source: Su Jianlin, "ReRoPE: infinite extrapolation?", 2023,
  https://kexue.fm/archives/9708; inverse form: "Inverse Leaky ReRoPE", 2023,
  https://kexue.fm/archives/9728.

  Attributes:
    window: w, in positions; 0 gives `Interpolation(k)`.
    slope: k; a position beyond the window counts as 1/k.
    base: see `Rotary`, like the three that follow.
    pairing: which coordinates form a pair.
    rotary_dim: rotates only this many leading coordinates; None for all.
    spectrum: the frequencies.
    bidirectional: see `ReRoPE`; then `P(-r) = -P(r)`.
  """

  window: int
  slope: float
  base: float = 10000.0
  pairing: Literal['half', 'interleaved'] = 'half'
  rotary_dim: int | None = None
  spectrum: Spectrum = Plain()
  bidirectional: bool = False

  def __post_init__(self):
    super().__post_init__()
    if not 0 < self.slope < math.inf:
      raise ValueError(
        f'LeakyReRoPE needs a finite slope > 0, got {self.slope}; use ReRoPE '
        'for an infinite one.'
      )

  @property
  def step(self) -> float:
    """What a position counts beyond the window."""
    return 1 / self.slope


@dataclasses.dataclass(frozen=True)
class _Beyond:
  """The region of keys at least `window` before, or after, the query.

  A value rather than a closure: callers may keep it as a static argument.
  """

  window: int
  after: bool = False

  def __call__(self, query_position, key_position):
    distance = query_position[:, None, :, None] - key_position[:, None, None, :]
    return (-distance if self.after else distance) >= self.window


def _fractional(x, position):
  """Converts positions to a type that holds fractions, as bfloat16 does not."""
  return position.astype(jnp.promote_types(x.dtype, jnp.float32))
