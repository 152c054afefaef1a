"""The loss of predicting tokens."""

from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int


class TokenLosses(NamedTuple):
  """Losses of single tokens, in nats.

  Attributes:
    cross_entropy_BL: float32, 0 where nothing was to be predicted.
    log_normalizer_BL: float32, logarithm of the sum of exponentiated logits.
    is_target_BL: where something was to be predicted.
  """

  cross_entropy_BL: Float[Array, 'B L']
  log_normalizer_BL: Float[Array, 'B L']
  is_target_BL: Bool[Array, 'B L']


def cross_entropy(
  logits_BLV: Float[Array, 'B L V'],
  targets_BL: Int[Array, 'B L'],
  *,
  label_smoothing: float = 0.0,
) -> TokenLosses:
  """Computes the negative log-likelihood of each target.

  With smoothing e the target distribution is `(1 - e) one_hot + e / V`.

  Source: Shannon, "A Mathematical Theory of Communication", 1948; smoothing:
  Szegedy et al., "Rethinking the Inception Architecture", 2015, arXiv
  1512.00567, section 7.

  Args:
    logits_BLV: unnormalised log-probabilities.
    targets_BL: token ids; negative where nothing is to be predicted.
    label_smoothing: e, in [0, 1).

  Returns:
    Losses in nats, computed in at least float32.
  """
  dtype = jnp.promote_types(logits_BLV.dtype, jnp.float32)
  logits_BLV = logits_BLV.astype(dtype)
  is_target_BL = targets_BL >= 0
  index_BL1 = jnp.where(is_target_BL, targets_BL, 0)[..., None]
  log_normalizer_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
  chosen_BL = jnp.take_along_axis(logits_BLV, index_BL1, axis=-1)[..., 0]
  if label_smoothing:
    mean_BL = logits_BLV.mean(axis=-1)
    chosen_BL += label_smoothing * (mean_BL - chosen_BL)
  nats_BL = jnp.where(is_target_BL, log_normalizer_BL - chosen_BL, 0)
  return TokenLosses(nats_BL, log_normalizer_BL, is_target_BL)
