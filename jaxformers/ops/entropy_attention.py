"""Attention whose every row has a prescribed entropy."""

import dataclasses
from typing import Any

from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float

from jaxformers.ops.attention import attention_weights
from jaxformers.ops.entropy import NormalizedEntropy
from jaxformers.ops.entropy import normalize_entropy
from jaxformers.ops.kinds import Softmax
from jaxformers.ops.kinds import Weights


@dataclasses.dataclass(frozen=True)
class EntropyNormalizedSoftmax:
  """Weights `softmax(gamma z)` with the gamma of each row that fits its entropy.

  A row keeps the order of its scores and loses their scale: multiplying them
  changes nothing. A row that sees n keys cannot have more entropy than log n;
  asked for that much or more it becomes uniform and passes no gradient to
  scores, as early rows under a causal mask do. See `normalize_entropy`, whose
  implicit gradients these are. Costs 40 passes over the scores, and needs them
  all at once: implementation `'xla'` only.

  Source: Su Jianlin, "Entropy normalisation of probability distributions",
  2021, kexue.fm/archives/8829; its use for the rows of attention is ours.

  Attributes:
    target: the entropy, in nats, above 0; or with `relative` its share of
      log n, between 0 and 1.
    relative: whether the target is such a share.
  """

  target: float
  relative: bool = False

  def __post_init__(self):
    if not self.target > 0 or self.relative and not self.target < 1:
      raise ValueError(
        'EntropyNormalizedSoftmax needs a target > 0 in nats, or with relative '
        f'a share of log n between 0 and 1, got target={self.target} and '
        f'relative={self.relative}.'
      )

  def normalized(
    self, logits: Float[Array, '*B L M'], is_visible: Bool[Array, '...']
  ) -> NormalizedEntropy:
    """Returns the weights of each row, its gamma, and whether there is one."""
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    n = jnp.broadcast_to(is_visible, logits.shape).sum(axis=-1)
    most = jnp.log(jnp.maximum(n, 1).astype(dtype))
    target = self.target * most if self.relative else self.target
    return normalize_entropy(logits, jnp.minimum(target, most), is_visible)

  def weights(self, logits, is_visible):
    weights, gamma, _ = self.normalized(logits, is_visible)
    is_finite = jnp.isfinite(gamma)
    scaled = jnp.where(is_finite, gamma, 0)[..., None] * logits
    log_normalizer = Softmax().weights(scaled, is_visible).log_normalizer
    return Weights(weights, jnp.where(is_finite, log_normalizer, jnp.inf))


def entropy_multiplier(
  query_BLHK: Float[Array, 'B L H K'],
  key_BMGK: Float[Array, 'B M G K'],
  kind: EntropyNormalizedSoftmax,
  **options: Any,
) -> Float[Array, 'B H L']:
  """Finds by what scores must be multiplied for each row to have its entropy.

  What any implementation of attention can be given as a scale:
  `InverseSqrt() * ConstantScale(entropy_multiplier(...))`. Materialises all
  scores itself. Differentiable by the implicit function.

  Source: Su Jianlin, "Entropy normalisation of probability distributions",
  2021, kexue.fm/archives/8829.

  Args:
    query_BLHK: as for `attend`.
    key_BMGK: as for `attend`.
    kind: says which entropy.
    **options: as for `attention_weights`, without `kind` and `rows`.

  Returns:
    gamma, at least float32: 0 for rows that become uniform, infinite where
    more keys tie for the maximum than the entropy allows.

  Raises:
    ValueError: as `attend`.
  """
  weighed = attention_weights(query_BLHK, key_BMGK, **options)
  return kind.normalized(weighed.logits, weighed.is_visible).gamma
