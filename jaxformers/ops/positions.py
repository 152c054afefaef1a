"""How the place of a token enters attention: absolute codes and rotations.

A position scheme maps queries and keys to *branches*: pairs whose products are
the scores in a region of (query, key) pairs. Most schemes have one branch that
holds everywhere. A scheme also says what a cache should keep of a key
(`store`), because some can rotate it once and for all and others cannot.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float, Real
import numpy as np

from jaxformers.ops.frequencies import Plain
from jaxformers.ops.frequencies import Spectrum

Region = Callable[[Array, Array], Bool[Array, 'B H L M']]


class Branch(NamedTuple):
  """Queries and keys whose products are the scores of one region.

  Attributes:
    query: `[B, L, H, K]`.
    key: `[B, M, G, K]`.
    region: maps query positions `[B, L]` and key positions `[B, M]` to where
      this branch holds, `[B, H, L, M]` (axes may have size 1); None for
      everywhere that no later branch claims.
  """

  query: Float[Array, 'B L H K']
  key: Float[Array, 'B M G K']
  region: Region | None = None


@runtime_checkable
class PositionScheme(Protocol):
  """How positions enter the scores of attention.

  Attributes:
    compares_positions: whether positions matter at all; then those of queries
      and keys must count from the same origin.
  """

  compares_positions: bool

  def store(
    self, key: Float[Array, 'B M G K'], position: Real[Array, 'B M']
  ) -> Float[Array, 'B M G K']:
    """Returns the form of a key that a cache keeps."""
    ...

  def branches(
    self,
    query: Float[Array, 'B L H K'],
    stored_key: Float[Array, 'B M G K'],
    query_position: Real[Array, 'B L'],
    key_position: Real[Array, 'B M'],
  ) -> tuple[Branch, ...]:
    """Returns the branches; a later one overrides where its region holds."""
    ...


@dataclasses.dataclass(frozen=True)
class NoPosition:
  """Leaves queries and keys as they are."""

  compares_positions = False

  def store(self, key, position):
    del position
    return key

  def branches(self, query, stored_key, query_position, key_position):
    del query_position, key_position
    return (Branch(query, stored_key),)


@dataclasses.dataclass(frozen=True)
class Rotary:
  """Rotates pairs of coordinates by angles proportional to the position (RoPE).

  With R^p the rotation for position p, `(R^i q) . (R^j k) = q . R^(j-i) k`:
  scores depend on the distance alone. A cache keeps rotated keys.

  Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position
  Embedding", 2021, arXiv 2104.09864, equation 34.

  Attributes:
    base: the slowest pair turns with a period of almost `2 pi base` positions;
      10000 as in the paper.
    pairing: which coordinates form a pair: `'half'` takes m and m + K/2
      (GPT-NeoX, Llama), `'interleaved'` takes 2m and 2m + 1 (the paper).
    rotary_dim: rotates only this many leading coordinates; None for all.
    spectrum: how the base gives the angle per position of each pair
      (`jaxformers.ops.frequencies`), such as `YaRN(factor=4,
      original_length=2048)` for texts longer than trained on. It must be the
      same for all tokens of a cache.
    amplitude: multiplies sines and cosines, and so, squared, the part of the
      scores that rotated coordinates make. Hugging Face applies the factor of
      YaRN in this way, so its checkpoints with `rotary_dim` need
      `amplitude=YaRNScale(4).amplitude` in place of the scale `YaRNScale(4)`,
      which is right for all coordinates. A cache keeps keys that are multiplied.
  """

  base: float = 10000.0
  pairing: Literal['half', 'interleaved'] = 'half'
  rotary_dim: int | None = None
  spectrum: Spectrum = Plain()
  amplitude: float = 1.0

  compares_positions = True

  def __post_init__(self):
    if self.pairing not in ('half', 'interleaved'):
      raise ValueError(
        f"Rotary needs pairing 'half' or 'interleaved', got {self.pairing!r}."
      )
    if self.base <= 0:
      raise ValueError(f'Rotary needs base > 0, got {self.base}.')
    if not 0 < self.amplitude < math.inf:
      raise ValueError(
        f'Rotary needs a finite amplitude > 0, got {self.amplitude}.'
      )

  def store(self, key, position):
    return self._rotate(key, position)

  def branches(self, query, stored_key, query_position, key_position):
    del key_position
    return (Branch(self._rotate(query, query_position), stored_key),)

  def _rotate(self, x, position):
    dim = x.shape[-1] if self.rotary_dim is None else self.rotary_dim
    if dim % 2 or not 0 < dim <= x.shape[-1]:
      raise ValueError(
        'Rotary turns pairs of coordinates: it needs an even number of them, '
        f'at most the head width {x.shape[-1]}, got {dim}; choose an even '
        'head_dim or set rotary_dim.'
      )
    frequencies_P = self.spectrum.frequencies(dim, self.base)
    turned = rotate(
      x[..., :dim],
      position,
      frequencies_P,
      self.pairing,
      amplitude=self.amplitude,
    )
    return jnp.concatenate([turned, x[..., dim:]], axis=-1)


def rotate(
  x_BLHK: Float[Array, 'B L H K'],
  position_BL: Real[Array, '#B L'],
  frequencies_P: Float[np.ndarray, ' P'],
  pairing: Literal['half', 'interleaved'] = 'half',
  *,
  amplitude: float = 1.0,
) -> Float[Array, 'B L H K']:
  """Rotates each coordinate pair by its frequency times the position.

  Angles need at least float32: bfloat16 rounds position 257 to 256, and a
  quick pair then points elsewhere entirely. Beyond some 1e5 positions float32
  angles lose three digits themselves; float64 inputs get float64 angles.

  Source: Su et al., "RoFormer", 2021, arXiv 2104.09864, equation 34.

  Args:
    x_BLHK: queries or keys, K = 2P.
    position_BL: any real numbers; one row serves all sequences.
    frequencies_P: radians per position of each pair.
    pairing: see `Rotary`.
    amplitude: multiplies sines and cosines.

  Returns:
    An array like `x_BLHK`, of its dtype, with every pair's norm multiplied by
    the amplitude.
  """
  dtype = jnp.promote_types(x_BLHK.dtype, jnp.float32)
  angle_BLP = position_BL[..., None].astype(dtype) * frequencies_P.astype(dtype)
  cos, sin = (amplitude * f(angle_BLP)[:, :, None] for f in (jnp.cos, jnp.sin))
  x = x_BLHK.astype(dtype)
  if pairing == 'half':
    a, b = jnp.split(x, 2, axis=-1)
  else:
    a, b = x[..., 0::2], x[..., 1::2]
  turned = a * cos - b * sin, b * cos + a * sin
  if pairing == 'half':
    y = jnp.concatenate(turned, axis=-1)
  else:
    y = jnp.stack(turned, axis=-1).reshape(x.shape)
  return y.astype(x_BLHK.dtype)


def sinusoidal(
  position_BL: Real[Array, 'B L'],
  width: int,
  *,
  base: float = 10000.0,
  layout: Literal['interleaved', 'concat'] = 'interleaved',
  spacing: Literal['paper', 't2t'] = 'paper',
) -> Float[Array, 'B L D']:
  """Computes sines and cosines of positions at geometrically spaced periods.

  `PE[p, 2i] = sin(p base^(-2i/D))`, `PE[p, 2i+1] = cos(p base^(-2i/D))`.

  Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762,
  section 3.5. The variants `'concat'` and `'t2t'` are those of tensor2tensor.

  Args:
    position_BL: any real numbers.
    width: D, number of columns; an odd one gets one sine more than cosines.
    base: ratio of the longest to the shortest period, about.
    layout: sines and cosines alternate (`'interleaved'`), or all sines come
      before all cosines (`'concat'`).
    spacing: `'paper'` divides exponents by D/2, `'t2t'` by D/2 - 1, so that the
      longest period is exactly `2 pi base`.

  Returns:
    float32 `[B, L, D]`.
  """
  sines, cosines = (width + 1) // 2, width // 2
  steps = {'paper': width / 2, 't2t': max(width / 2 - 1, 1)}[spacing]
  frequency = base ** (-np.arange(sines, dtype=np.float64) / steps)
  angle = position_BL[..., None].astype(jnp.float32) * frequency.astype('f4')
  sin, cos = jnp.sin(angle), jnp.cos(angle[..., :cosines])
  if layout == 'concat':
    return jnp.concatenate([sin, cos], axis=-1)
  code = jnp.zeros((*position_BL.shape, width), jnp.float32)
  return code.at[..., 0::2].set(sin).at[..., 1::2].set(cos)
