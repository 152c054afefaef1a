"""What attention scores are multiplied with before the softmax.

Scales multiply: `InverseSqrt() * LogLength(512)` divides by the square root of
the head width and multiplies by a factor per query. All of them are folded into
the queries, so none costs more than one number per query, and all work with any
implementation of attention.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Protocol, runtime_checkable

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float


@runtime_checkable
class Scale(Protocol):
  """A multiplier of the attention scores, one number or one per query."""

  def multiplier(
    self, visible_keys: Callable[[], Array], head_dim: int
  ) -> float | Float[Array, 'B H L']:
    """Returns the multiplier.

    Args:
      visible_keys: gives, when called, int `[B, H, L]` (axes may have size 1),
        the number of keys that each query sees.
      head_dim: width K of queries and keys.
    """
    ...


class Factor:
  """A scale that multiplies with others: what `*` needs, and nothing else."""

  def __mul__(self, other: Scale) -> 'Product':
    return Product(self, other)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['left', 'right'],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Product(Factor):
  """Multiplies with what both scales say; written `left * right`.

  Source: Su Jianlin, "Attention scale from entropy invariance", 2021,
  kexue.fm/archives/8823: `log_512(n) / sqrt(d)` is such a product.

  Attributes:
    left: a scale.
    right: another.
  """

  left: Scale
  right: Scale

  def multiplier(self, visible_keys, head_dim):
    left = self.left.multiplier(visible_keys, head_dim)
    return left * self.right.multiplier(visible_keys, head_dim)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class InverseSqrt(Factor):
  """Divides scores by the square root of the head width.

  Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762,
  equation 1.
  """

  def multiplier(self, visible_keys, head_dim):
    del visible_keys
    return 1 / math.sqrt(head_dim)


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=['value'], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class ConstantScale(Factor):
  """Multiplies scores by a number, whatever the head width.

  Source: Henry et al., "Query-Key Normalization for Transformers", 2020, arXiv
  2010.04245, equation 5: the multiplier of cosine scores.

  Attributes:
    value: the number, or float `[B, H, L]` whose axes may have size 1.
  """

  value: float | Float[Array, '...']

  def multiplier(self, visible_keys, head_dim):
    del visible_keys, head_dim
    return self.value


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LogLength(Factor):
  """Grows scores with the logarithm of the number n of visible keys.

  `log(n) / log(base_length)`, in training and use alike. Softmax over n keys
  has an entropy near `log n - lambda (s_max - s_mean)`, so `lambda` must grow
  like `log n` for the entropy to stay. With scores of unit variance the factor
  only flattens the entropy; where heads are peaked, with a standard deviation
  of 3 or more at `base_length`, it is nearly constant.

  n is counted per query and after all masks, so packing and padding change
  nothing, and no query learns how long the sequence is. A single factor for
  whole sequences would not be causal.

  Source: Su Jianlin, "Attention scale from entropy invariance", 2021,
  kexue.fm/archives/8823 and 9034; also Chiang and Cholak, "Overcoming a
  Theoretical Limitation of Self-Attention", 2022, arXiv 2202.12172, section 5.3
  (natural logarithm, no base).

  Attributes:
    base_length: n at which the factor is 1; 512 as in the article.
    least: n counts as at least this, because still smaller factors hurt; 16
      as in bert4keras (`softmax_plus`).
  """

  base_length: int = 512
  least: int = 16

  def __post_init__(self):
    _check_length('LogLength', 'base_length', self.base_length)
    if self.least < 1:
      raise ValueError(f'LogLength needs least >= 1, got {self.least}.')

  def multiplier(self, visible_keys, head_dim):
    del head_dim
    n = jnp.maximum(visible_keys(), self.least)
    return _log(n) / math.log(self.base_length)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LogLengthRetrofit(Factor):
  """`LogLength` for a model that was trained without it.

  `max(1, log(n) / log(train_length))`: exactly 1, so the model is left as it
  is, wherever n is no more than what training has seen.

  Source: Su Jianlin, "Taking base-beta positions to the end", 2023,
  kexue.fm/archives/9706; the patches of github.com/bojone/rerope.

  Attributes:
    train_length: number of visible keys up to which the factor is 1.
  """

  train_length: int

  def __post_init__(self):
    _check_length('LogLengthRetrofit', 'train_length', self.train_length)

  def multiplier(self, visible_keys, head_dim):
    del head_dim
    n = visible_keys()
    # Not left to the quotient: at n = train_length rounding may give 1 + 1e-7.
    longer = _log(jnp.maximum(n, 1)) / math.log(self.train_length)
    return jnp.where(n > self.train_length, longer, 1)


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=['s_H'], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class SSMax(Factor):
  """Grows scores with `s log(n)`, with a number s per head that is learned.

  The weights are then proportional to `n^(s z)` in place of `exp(z)`. The
  parameter lives in a module: `jaxformers.nn.LearnedSSMax` owns s, gives this.
  (Subtracting `s log(n)` from all scores, as is seen in the wild, does nothing.)

  Source: Nakanishi, "Scalable-Softmax Is Superior for Attention", 2025, arXiv
  2501.19399, equation 3.

  Attributes:
    s_H: s of each head.
  """

  s_H: Float[Array, ' H']

  def multiplier(self, visible_keys, head_dim):
    del head_dim
    dtype = jnp.promote_types(self.s_H.dtype, jnp.float32)
    s_H1 = self.s_H.astype(dtype)[:, None]
    return s_H1 * _log(jnp.maximum(visible_keys(), 1)).astype(dtype)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Llama4Temperature(Factor):
  """Grows scores by a step with every `floor` tokens.

  `1 + slope log(floor(n / floor) + 1)`, in layers without rotary positions. n
  counts visible keys, which under a causal mask is the position plus one.

  Source: Meta, "Llama 4", 2025; `attn_scale` and `floor_scale` in
  github.com/huggingface/transformers, `models/llama4/modeling_llama4.py`.

  Attributes:
    slope: weight of the logarithm.
    floor: number of keys per step.
  """

  slope: float = 0.1
  floor: int = 8192

  def __post_init__(self):
    if self.floor < 1:
      raise ValueError(f'Llama4Temperature needs floor >= 1, got {self.floor}.')

  def multiplier(self, visible_keys, head_dim):
    del head_dim
    return 1 + self.slope * _log(visible_keys() // self.floor + 1)


def _log(n):
  """Logarithm of integers in JAX's default precision, never in bfloat16.

  bfloat16 would merge counts above 256 before their logarithm is taken.
  """
  return jnp.log(n.astype(float))


def _check_length(name, field, length):
  if length < 2:
    raise ValueError(
      f'{name} divides by log({field}), so it needs {field} >= 2, got {length}.'
    )
