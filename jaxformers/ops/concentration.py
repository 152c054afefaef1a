"""How concentrated weights are, and how concentrated they can get.

Diagnostics read weights `[..., M]` (of attention: `[B, H, L, M]`) of any
family, unnormalised or signed too, and count visible keys only. They run in at
least float32 and pass no gradients. A row of zeros counts as uniform.

The theory says what a family can reach: weights `f(q . k)` over many keys with
scores of mean `beta` and standard deviation `gamma` (`fit_beta_gamma`). The
exponential and, with negative `beta / gamma`, the squared relu concentrate as
much as they like; linear attention does not get below 0.798, and with
non-negative features stays near 1; a fixed decay concentrates, but on
positions, whatever they hold.
"""

from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jax.scipy.special import erf
from jax.scipy.special import log_ndtr
from jaxtyping import Bool, Float, Int

from jaxformers.ops.entropy import entropy


class ScoreFit(NamedTuple):
  """Normal distribution of scores.

  Source: Su Jianlin, "Can attention really concentrate?", 2023,
  kexue.fm/archives/9889.

  Attributes:
    beta: mean, at least float32.
    gamma: standard deviation, like beta.
  """

  beta: Float[Array, '...']
  gamma: Float[Array, '...']


def concentration(
  weights: Float[Array, '*B M'], mask: Bool[Array, '...'] | None = None
) -> Float[Array, '*B']:
  """Computes `mean |w| / sqrt(mean w^2)`: the smaller, the more concentrated.

  Source: Su Jianlin, "Can attention really concentrate?", 2023,
  kexue.fm/archives/9889; the measure is Hoyer's, "Non-negative Matrix
  Factorization with Sparseness Constraints", 2004, section 3.1.

  Args:
    weights: of M keys along the last axis.
    mask: True where a key is visible, broadcast to the weights; None for all.

  Returns:
    At least float32, from `1 / sqrt(n)` for a single non-zero weight among n
    visible keys to 1 for equal magnitudes.
  """
  magnitude, n = _magnitudes(weights, mask)
  return jnp.sqrt(_support(magnitude) / jnp.maximum(n, 1)) + (n == 0)


def effective_support(
  weights: Float[Array, '*B M'], mask: Bool[Array, '...'] | None = None
) -> Float[Array, '*B']:
  """Computes `(sum |w|)^2 / sum w^2`: how many keys share the weight.

  For probabilities `1 / sum p^2`.

  Source: Su Jianlin, "Can attention really concentrate?", 2023,
  kexue.fm/archives/9889: n times `concentration` squared.

  Args:
    weights: see `concentration`.
    mask: see `concentration`.

  Returns:
    At least float32, from 1 to the number of visible keys; 0 without any.
  """
  return _support(_magnitudes(weights, mask)[0])


def top_k_mass(
  weights: Float[Array, '*B M'],
  k: int,
  mask: Bool[Array, '...'] | None = None,
) -> Float[Array, '*B']:
  """Computes the share of the magnitude that the k largest weights have.

  Source: Su Jianlin, "Can attention really concentrate?", 2023,
  kexue.fm/archives/9889: a companion of its measure.

  Args:
    weights: see `concentration`.
    k: how many, at least 1; more than M counts as M.
    mask: see `concentration`.

  Returns:
    At least float32, from 0 to 1; 0 without visible keys.

  Raises:
    ValueError: if k is below 1.
  """
  if k < 1:
    raise ValueError(f'top_k_mass needs k >= 1, got {k}.')
  shares = _shares(weights, mask)
  return jax.lax.top_k(shares, min(k, shares.shape[-1]))[0].sum(axis=-1)


def max_weight(
  weights: Float[Array, '*B M'], mask: Bool[Array, '...'] | None = None
) -> Float[Array, '*B']:
  """Computes the share of the magnitude that the largest weight has.

  Source: Su Jianlin, "Can attention really concentrate?", 2023,
  kexue.fm/archives/9889: a companion of its measure.

  Args:
    weights: see `concentration`.
    mask: see `concentration`.

  Returns:
    Like `top_k_mass` with k = 1.
  """
  return _shares(weights, mask).max(axis=-1)


def attention_entropy(
  weights: Float[Array, '*B M'],
  mask: Bool[Array, '...'] | None = None,
  *,
  normalized: bool = False,
) -> Float[Array, '*B']:
  """Computes the entropy of the shares that keys have of the magnitude.

  Source: Shannon, "A Mathematical Theory of Communication", 1948, theorem 2;
  of attention: Su Jianlin, 2021, kexue.fm/archives/8823.

  Args:
    weights: see `concentration`.
    mask: see `concentration`.
    normalized: divide by the logarithm of the number n of visible keys.

  Returns:
    At least float32, nats from 0 to log n, or from 0 to 1 if normalised; 0
    where fewer than two keys are visible.
  """
  shares = _shares(weights, mask)
  nats = entropy(jnp.log(shares))
  if not normalized:
    return nats
  n = _magnitudes(weights, mask)[1]
  return nats / jnp.log(jnp.maximum(n, 2))


def mean_per_head(
  diagnostic_BHL: Float[Array, 'B H L'], visible_keys_BHL: Int[Array, '...']
) -> Float[Array, ' H']:
  """Averages a diagnostic over the rows that see at least two keys.

  The first row of causal attention has no choice, and would only dilute.

  Source: Su Jianlin, "Can attention really concentrate?", 2023,
  kexue.fm/archives/9889, per head.

  Args:
    diagnostic_BHL: a number per row.
    visible_keys_BHL: how many keys each row sees; axes may have size 1.

  Returns:
    A number per head, for logs; 0 where no row counts.
  """
  counts = jnp.broadcast_to(visible_keys_BHL >= 2, diagnostic_BHL.shape)
  total_H = jnp.where(counts, diagnostic_BHL, 0).sum(axis=(0, 2))
  return total_H / jnp.maximum(counts.sum(axis=(0, 2)), 1)


def fit_beta_gamma(
  scores: Float[Array, '*B M'], mask: Bool[Array, '...'] | None = None
) -> ScoreFit:
  """Computes mean and standard deviation of scores over visible keys.

  Source: Su Jianlin, "Can attention really concentrate?", 2023,
  kexue.fm/archives/9889: `beta = q . mu`, `gamma = sigma |q|`.

  Args:
    scores: products of a query and M keys, scaled as the weights read them.
    mask: see `concentration`.

  Returns:
    See `ScoreFit`; zeros without visible keys.
  """
  scores, is_visible = _visible(scores, mask)
  n = jnp.maximum(is_visible.sum(axis=-1, keepdims=True), 1)
  beta = scores.sum(axis=-1, keepdims=True) / n
  squares = jnp.where(is_visible, (scores - beta) ** 2, 0)
  variance = squares.sum(axis=-1, keepdims=True) / n
  return ScoreFit(beta[..., 0], jnp.sqrt(variance)[..., 0])


def softmax_concentration(
  beta: Float[Array, '...'] | float, gamma: Float[Array, '...'] | float
) -> Float[Array, '...']:
  """Computes the concentration of exponentials of normal scores.

  `exp(-gamma^2 / 2)`: as small as one likes, by longer queries or keys that
  differ more. Holds for many keys; with n of them it is at least `1 / sqrt(n)`.

  Source: Su Jianlin, "Can attention really concentrate?", 2023,
  kexue.fm/archives/9889.

  Args:
    beta: mean of the scores; has no influence.
    gamma: their standard deviation.

  Returns:
    Numbers from 0 to 1, in at least float32, like those of all functions of
    this kind.
  """
  beta, gamma = _floats(beta, gamma)
  return jnp.exp(-(gamma**2) / 2) + 0 * beta


def relu_squared_concentration(
  beta: Float[Array, '...'] | float, gamma: Float[Array, '...'] | float
) -> Float[Array, '...']:
  """Computes the concentration of squared positive parts of normal scores.

  With `x = beta / gamma`, density phi and distribution Phi,
  `[x phi + (x^2 + 1) Phi] / sqrt(x (x^2 + 5) phi + (x^4 + 6 x^2 + 3) Phi)`:
  small only for very negative x, which a negative bias gives.

  Source: Su Jianlin, "Can attention really concentrate?", 2023,
  kexue.fm/archives/9889; for Hua et al., 2022, arXiv 2202.10447.

  Args:
    beta: mean of the scores.
    gamma: their standard deviation, positive.

  Returns:
    Numbers from 0 to 1.
  """
  log_positive, (r1, r2, r3, r4) = _positive_moments(beta, gamma)
  return jnp.exp(log_positive / 2) * jnp.sqrt(r1 / r3 * (r2 / r4))


def relu_concentration(
  beta: Float[Array, '...'] | float, gamma: Float[Array, '...'] | float
) -> Float[Array, '...']:
  """Computes the concentration of positive parts of normal scores.

  With `x = beta / gamma`, `[x Phi + phi] / sqrt((x^2 + 1) Phi + x phi)`.

  Source: Su Jianlin, "Can attention really concentrate?", 2023,
  kexue.fm/archives/9889, extended to relu.

  Args:
    beta: see `relu_squared_concentration`.
    gamma: see `relu_squared_concentration`.

  Returns:
    Numbers from 0 to 1.
  """
  log_positive, (r1, r2, _, _) = _positive_moments(beta, gamma)
  return jnp.exp(log_positive / 2) * jnp.sqrt(r1 / r2)


def identity_concentration(
  beta: Float[Array, '...'] | float, gamma: Float[Array, '...'] | float
) -> Float[Array, '...']:
  """Computes the concentration of normal scores themselves.

  `[sqrt(2/pi) gamma exp(-x^2/2) + beta erf(x/sqrt(2))] / sqrt(beta^2 + gamma^2)`
  with `x = beta / gamma`: at least `sqrt(2 / pi) = 0.798`, at beta = 0. So
  linear attention cannot concentrate.

  Source: Su Jianlin, "Can attention really concentrate?", 2023,
  kexue.fm/archives/9889.

  Args:
    beta: see `relu_squared_concentration`.
    gamma: see `relu_squared_concentration`.

  Returns:
    Numbers from 0.798 to 1.
  """
  beta, gamma = _floats(beta, gamma)
  x = beta / gamma
  mean = jnp.sqrt(2 / jnp.pi) * jnp.exp(-(x**2) / 2) + x * erf(
    x / jnp.sqrt(2.0)
  )
  return mean / jnp.sqrt(x**2 + 1)


def decay_concentration(
  decay: Float[Array, '...'] | float, length: int
) -> Float[Array, '...']:
  """Computes the concentration of the weights `1, decay, decay^2, ...`.

  `sqrt((1 - decay^n)(1 + decay) / (n (1 - decay)(1 + decay^n)))`, 1 for
  `decay = 1`. It falls with n, but the weight sits on recent positions,
  whatever they hold.

  Source: Su Jianlin, "Can attention really concentrate?", 2023,
  kexue.fm/archives/9889.

  Args:
    decay: from 0 to 1.
    length: number n of keys.

  Returns:
    Numbers from `1 / sqrt(n)` to 1.
  """
  # The same by hyperbolic tangents, which keep their digits near decay = 1.
  half = -jnp.log(*_floats(decay)) / 2
  safe = jnp.where(half > 0, half, 1)
  ratio = jnp.tanh(length * safe) / (length * jnp.tanh(safe))
  return jnp.where(half > 0, jnp.sqrt(ratio), 1)


def linear_concentration(
  query_LK: Float[Array, '*B L K'],
  key_MK: Float[Array, '*B M K'],
  is_visible_M: Bool[Array, '*B M'] | None = None,
) -> Float[Array, '*B L']:
  """Computes the concentration of linear attention without its weights.

  `1 / sqrt(1 + q' Sigma q / (q . mu)^2)` with mean mu and covariance Sigma of
  the key features: exact for any finite number of keys, as long as no weight
  `q . k` is negative. Time and memory `O((L + M) K^2)`.

  Source: Su Jianlin, "Can attention really concentrate?", 2023,
  kexue.fm/archives/9889.

  Args:
    query_LK: non-negative features of queries.
    key_MK: non-negative features of keys.
    is_visible_M: True for the keys that all queries see; None for all.

  Returns:
    Numbers from 0 to 1, as `concentration` gives for the weights; 1 for a query
    whose weights are all 0.
  """
  query_LK, key_MK = (
    jax.lax.stop_gradient(x) for x in _floats(query_LK, key_MK)
  )
  if is_visible_M is None:
    is_visible_M = jnp.ones(key_MK.shape[:-1], bool)
  weight_M1 = is_visible_M[..., None] / jnp.maximum(
    is_visible_M.sum(axis=-1)[..., None, None], 1
  )
  weight_M1 = weight_M1.astype(key_MK.dtype)
  mean_1K = (weight_M1 * key_MK).sum(axis=-2, keepdims=True)
  centred_MK = key_MK - mean_1K
  covariance = jnp.einsum(
    '...MK,...MJ->...KJ', weight_M1 * centred_MK, centred_MK
  )
  spread_L = jnp.einsum(
    '...LK,...KJ,...LJ->...L', query_LK, covariance, query_LK
  )
  signal_L = (query_LK * mean_1K).sum(axis=-1) ** 2
  ratio_L = jnp.maximum(spread_L, 0) / jnp.where(signal_L > 0, signal_L, 1)
  return jax.lax.rsqrt(1 + jnp.where(signal_L > 0, ratio_L, 0))


def _floats(*numbers):
  """Arrays of one floating type, at least float32."""
  dtype = jnp.promote_types(jnp.result_type(*numbers, 0.0), jnp.float32)
  return [jnp.asarray(x, dtype) for x in numbers]


def _visible(values, mask):
  """Returns values without gradient, 0 where invisible, and what is visible."""
  (values,) = _floats(jax.lax.stop_gradient(values))
  is_visible = jnp.ones((), bool) if mask is None else mask
  is_visible = jnp.broadcast_to(is_visible, values.shape)
  return jnp.where(is_visible, values, 0), is_visible


def _magnitudes(weights, mask):
  """Returns magnitudes of largest 1, `[..., M]`, and the visible keys, `[...]`.

  Without the common factor, squares neither overflow nor vanish.
  """
  weights, is_visible = _visible(weights, mask)
  magnitude = jnp.abs(weights)
  top = magnitude.max(axis=-1, keepdims=True)
  magnitude = jnp.where(
    top > 0, magnitude / jnp.where(top > 0, top, 1), is_visible
  )
  return magnitude, is_visible.sum(axis=-1)


def _support(magnitude):
  squares = (magnitude * magnitude).sum(axis=-1)
  return magnitude.sum(axis=-1) ** 2 / jnp.where(squares > 0, squares, 1)


def _shares(weights, mask):
  magnitude, n = _magnitudes(weights, mask)
  total = magnitude.sum(axis=-1, keepdims=True)
  return magnitude / jnp.where(n[..., None] > 0, total, 1)


def _positive_moments(beta, gamma):
  """Returns log P(t > -x) and four ratios of moments of the positive part.

  With `m_p = E[max(x + t, 0)^p]` for normal t and `x = beta / gamma`, these are
  `r_p = m_p / m_(p-1)`, where `r_p = x + (p - 1) / r_(p-1)`. The closed forms
  follow from that, but lose all digits for negative x: there it is read
  backwards, a continued fraction of positive terms.
  """
  beta, gamma = _floats(beta, gamma)
  x = beta / gamma
  log_positive = log_ndtr(x)
  rising = [x + jnp.exp(-(x**2) / 2 - log_positive) / jnp.sqrt(2 * jnp.pi)]
  for p in (2, 3, 4):
    rising.append(x + (p - 1) / rising[-1])
  below = jnp.minimum(x, -1)
  last = 128
  ratio = jax.lax.fori_loop(
    0,
    last - 5,
    lambda i, ratio: (last - 1 - i) / (ratio - below),
    (below + jnp.sqrt(below**2 + 4 * last)) / 2,
  )
  falling = []
  for p in (4, 3, 2, 1):
    falling.append(ratio := p / (ratio - below))
  return log_positive, [
    jnp.where(x > -1, up, down)
    for up, down in zip(rising, reversed(falling), strict=True)
  ]
