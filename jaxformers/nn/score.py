"""Scales of attention scores that are learned."""

import math

import flax.linen as nn

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
