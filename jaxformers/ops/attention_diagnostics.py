"""What attention does with its keys, in a dozen numbers per head."""

from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from jaxformers.ops import concentration
from jaxformers.ops.attention import attention_weights
from jaxformers.ops.optimal_scale import softmax_jacobian_l1

ROWS = 64
"""Queries per sequence that are looked at."""

TOP_K = 8
"""How many keys `top_k_mass` adds up."""


class AttentionDiagnostics(NamedTuple):
  """Means over the queries that see at least two keys, for each head.

  Each is at least float32 `[H]`, n the number of keys that a query sees.

  Source: Su Jianlin, "Can attention really concentrate?", 2023,
  kexue.fm/archives/9889.

  Attributes:
    visible_keys: n.
    entropy: of the weights, in nats, from 0 to log n.
    relative_entropy: the same divided by log n.
    concentration: from `1 / sqrt(n)` (one key) to 1 (all alike).
    effective_support: how many keys share the weight, from 1 to n.
    max_weight: the largest weight.
    top_k_mass: the `TOP_K` largest together.
    beta: mean of the scores, as scaled.
    gamma: their standard deviation.
    softmax_concentration: `exp(-gamma^2 / 2)`, the concentration of a softmax
      of many scores that are normally distributed.
    jacobian_l1: `1 - sum p^2`, the size of the derivative of the weights with
      respect to the scores, as scaled.
  """

  visible_keys: Float[Array, ' H']
  entropy: Float[Array, ' H']
  relative_entropy: Float[Array, ' H']
  concentration: Float[Array, ' H']
  effective_support: Float[Array, ' H']
  max_weight: Float[Array, ' H']
  top_k_mass: Float[Array, ' H']
  beta: Float[Array, ' H']
  gamma: Float[Array, ' H']
  softmax_concentration: Float[Array, ' H']
  jacobian_l1: Float[Array, ' H']


def attention_diagnostics(
  query_BLHK: Float[Array, 'B L H K'],
  key_BMGK: Float[Array, 'B M G K'],
  **options: Any,
) -> AttentionDiagnostics:
  """Measures the attention that `attend` computes from the same arguments.

  Looks at `ROWS` queries of each sequence, drawn once and for all, or at every
  one if there are no more: memory `O(B H M)` however many queries there are.
  Runs in at least float32 and passes no gradients.

  Source: Su Jianlin, "Can attention really concentrate?", 2023,
  kexue.fm/archives/9889.

  Args:
    query_BLHK: as for `attend`.
    key_BMGK: as for `attend`.
    **options: as for `attention_weights`, without `rows`.

  Returns:
    A number per head for each measure; 0 where no query sees two keys.
  """
  query, key = (
    jax.lax.stop_gradient(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    for x in (query_BLHK, key_BMGK)
  )
  rows_R = _sample(query.shape[1])
  weighed = attention_weights(query, key, rows=rows_R, **options)
  weights, mask = weighed.weights, weighed.is_visible
  visible_keys = mask.sum(axis=-1)
  fit = concentration.fit_beta_gamma(weighed.logits, mask)
  entropy = concentration.attention_entropy(weights, mask)
  rows = AttentionDiagnostics(
    jnp.broadcast_to(visible_keys, weights.shape[:3]).astype(weights.dtype),
    entropy,
    entropy / jnp.log(jnp.maximum(visible_keys, 2)),
    concentration.concentration(weights, mask),
    concentration.effective_support(weights, mask),
    concentration.max_weight(weights, mask),
    concentration.top_k_mass(weights, TOP_K, mask),
    fit.beta,
    fit.gamma,
    concentration.softmax_concentration(*fit),
    softmax_jacobian_l1(weights),
  )
  means = (concentration.mean_per_head(row, visible_keys) for row in rows)
  return jax.lax.stop_gradient(AttentionDiagnostics(*means))


def _sample(length):
  # Evenly spaced rows would stay in step with masks that are strided.
  rows = np.random.default_rng(0).permutation(length)[:ROWS]
  return np.sort(rows)
