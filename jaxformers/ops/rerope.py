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
class ReRoPE:
  """Rotates by the distance within a window, and by the window beyond it.

  `P(r) = min(r, w)`: training-free length extrapolation, for a model that was
  trained with `Rotary` and the same options. A window of a quarter to half of
  the trained length works; the trained length itself does not. Goes well with
  a scale that grows with the logarithm of the number of keys.

  Costs one more product of queries and keys than `Rotary`. A cache keeps raw
  keys, because both branches need them differently, and the near branch then
  rotates them at each step.

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

  compares_positions = True

  def __post_init__(self):
    _check(self)

  def store(self, key, position):
    del position
    return key

  def branches(self, query, stored_key, query_position, key_position):
    return _branches(
      self, 0.0, query, stored_key, (query_position, key_position)
    )


@dataclasses.dataclass(frozen=True)
class LeakyReRoPE:
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

  compares_positions = True

  def __post_init__(self):
    _check(self)
    if not 0 < self.slope < math.inf:
      raise ValueError(
        f'LeakyReRoPE needs a finite slope > 0, got {self.slope}; use ReRoPE '
        'for an infinite one.'
      )

  def store(self, key, position):
    del position
    return key

  def branches(self, query, stored_key, query_position, key_position):
    return _branches(
      self, 1 / self.slope, query, stored_key, (query_position, key_position)
    )


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


def _branches(scheme, step, query, key, positions):
  """Returns near, far and perhaps future; `step` is 1/k, what r counts afar."""
  rotary = _rotary(scheme)
  near = rotary.branches(query, rotary.store(key, positions[1]), *positions)[0]
  # Bfloat16 and integers hold no fractions of large positions.
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  query_position, key_position = (p.astype(dtype) * step for p in positions)
  # P(r) = r/k + w - w/k, so that R^P(r) q . k = R^(i/k + w - w/k) q . R^(j/k) k.
  shift = scheme.window * (1 - step)
  far_key = rotary.store(key, key_position) if step else key

  def turned(shift, after):
    far_query = rotary.store(query, query_position + shift)
    return Branch(far_query, far_key, _Beyond(scheme.window, after))

  far = near, turned(shift, False)
  return (*far, turned(-shift, True)) if scheme.bidirectional else far


def _rotary(scheme):
  return Rotary(scheme.base, scheme.pairing, scheme.rotary_dim, scheme.spectrum)


def _check(scheme):
  _rotary(scheme)
  if scheme.window < 0:
    raise ValueError(
      f'{type(scheme).__name__} needs window >= 0, got {scheme.window}.'
    )
