"""Scales and biases of attention scores that are learned."""

import math

import flax.linen as nn
import jax.numpy as jnp

from jaxformers.nn.init import Initializer
from jaxformers.nn.init import Normal
from jaxformers.ops import biases
from jaxformers.ops import scales


class LearnedSSMax(nn.Module):
  """Owns the multipliers of `s log(n)`, one per head, and gives the scale.

  Goes into the `scale` slot of attention, which calls it with its number of
  heads.

  Source: Nakanishi, "Scalable-Softmax Is Superior for Attention", 2025, arXiv
  2501.19399, equation 3. The initial value is ours: the factor starts as 1 for
  queries that see `train_length` keys.

  Attributes:
    train_length: length of the training sequences.
    base: the scale that it multiplies.
  """

  train_length: int = 512
  base: scales.Scale = scales.InverseSqrt()

  @nn.compact
  def __call__(self, num_heads: int) -> scales.Scale:
    if self.train_length < 2:
      raise ValueError(
        'LearnedSSMax starts at 1 / log(train_length), so it needs '
        f'train_length >= 2, got {self.train_length}.'
      )
    start = nn.initializers.constant(1 / math.log(self.train_length))
    s_H = self.param('s_H', start, (num_heads,))
    return scales.Product(self.base, scales.SSMax(s_H))


class LearnedT5Bias(nn.Module):
  """Owns a number for each head and bucket of distances, and gives the bias.

  Goes into the `bias` slot of attention.

  Source: Raffel et al., "Exploring the Limits of Transfer Learning with a
  Unified Text-to-Text Transformer", 2019, arXiv 1910.10683, section 2.1.

  Attributes:
    num_buckets: N.
    bidirectional: see `jaxformers.ops.T5Bias`.
    max_distance: see `jaxformers.ops.T5Bias`.
    initializer: how the numbers begin.
  """

  num_buckets: int = 32
  bidirectional: bool = False
  max_distance: int = 128
  initializer: Initializer = Normal()

  @nn.compact
  def __call__(self, num_heads: int) -> biases.T5Bias:
    shape = self.num_buckets, num_heads
    table_NH = self.param(
      'table_NH', self.initializer(in_axis=0, out_axis=1), shape
    )
    return biases.T5Bias(table_NH, self.bidirectional, self.max_distance)


class LearnedRelativeBias(nn.Module):
  """Owns a number for each head and clipped distance, and gives the bias.

  Goes into the `bias` slot of attention.

  Source: Shaw et al., "Self-Attention with Relative Position Representations",
  2018, arXiv 1803.02155, section 3.2; see `jaxformers.ops.RelativeBias`.

  Attributes:
    max_distance: C; distances beyond it count as C.
    initializer: how the numbers begin.
  """

  max_distance: int
  initializer: Initializer = Normal()

  @nn.compact
  def __call__(self, num_heads: int) -> biases.RelativeBias:
    if self.max_distance < 0:
      raise ValueError(
        f'LearnedRelativeBias needs max_distance >= 0, got {self.max_distance}.'
      )
    shape = 2 * self.max_distance + 1, num_heads
    start = self.initializer(in_axis=0, out_axis=1)
    return biases.RelativeBias(self.param('table_NH', start, shape))


class LearnedCosineScale(nn.Module):
  """Owns the multiplier of cosine scores, one per head, and gives the scale.

  `exp(min(t, log(largest)))` with t learned. Goes into the `scale` slot of
  attention, together with `qk_norm=UnitNorm()`. Nothing else divides the
  scores: cosines do not grow with the width.

  Source: Liu et al., "Swin Transformer V2", 2021, arXiv 2111.09883, section 3.3;
  start and bound as in https://github.com/microsoft/Swin-Transformer
  (`logit_scale`). For a start that fits n keys of width d see
  `jaxformers.ops.cosine_optimal_scale`.

  Attributes:
    start: the multiplier before training.
    largest: it never gets larger; from there on t has no gradient.
  """

  start: float = 10.0
  largest: float = 100.0

  @nn.compact
  def __call__(self, num_heads: int) -> scales.Scale:
    if not 0 < self.start < self.largest:
      raise ValueError(
        'LearnedCosineScale needs 0 < start < largest, got start='
        f'{self.start} and largest={self.largest}.'
      )
    start = nn.initializers.constant(math.log(self.start))
    log_scale_H = self.param('log_scale_H', start, (num_heads,))
    scale_H = jnp.exp(jnp.minimum(log_scale_H, math.log(self.largest)))
    return scales.ConstantScale(scale_H[None, :, None])
