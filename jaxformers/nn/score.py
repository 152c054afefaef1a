"""Scales of attention scores that are learned."""

import math

import flax.linen as nn
import jax.numpy as jnp

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
