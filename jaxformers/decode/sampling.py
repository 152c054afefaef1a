"""From logits to tokens: temperature, top-k, nucleus (top-p), greedy.

Three pure functions and the `Sampler` that applies them in the order of Hugging
Face's `generate`: temperature, then top-k, then top-p on what top-k left. All
work on logits `[..., V]` with any leading axes, in float32 (float64 stays
float64), and exclude a token by setting its logit to `-inf`.

Ties go to the lower token id, in `keep_top_k`, in `keep_top_p` and in greedy
choice. So exactly `k` tokens remain, the nucleus is exactly the smallest one,
and `top_k=1` equals greedy; keeping every tied token instead would make all
three depend on how coarse the logits are, and bfloat16 logits tie often.

Complexity per row: O(V) without truncation, O(V log k) with `top_k`, one sort,
O(V log V), with `top_p` alone. Where speed matters and V is large, give both:
on a CPU with V = 50 257, selecting 40 tokens is a hundred times cheaper than
sorting all.
"""

import dataclasses
import math
import operator

import jax
from jax import Array
from jax import lax
import jax.numpy as jnp
from jaxtyping import Float, Int, Key


def apply_temperature(
  logits: Float[Array, '... V'], temperature: float
) -> Float[Array, '... V']:
  """Divides logits by a temperature, after moving their maximum to 0.

  The shift changes no probability, and lets a temperature close to 0 approach
  greedy choice instead of overflowing.

  Args:
    logits: Unnormalised log-probabilities.
    temperature: Above 0; below 1 sharpens, above 1 flattens.

  Returns:
    `(logits - max(logits)) / temperature`, at most 0, float32 or float64.

  Raises:
    ValueError: If the temperature is not positive and finite.
  """
  if not 0 < temperature < math.inf:
    raise ValueError(
      f'temperature must be positive and finite, got {temperature}; for greedy '
      'decoding use Sampler(temperature=0).'
    )
  logits = _canonical(logits)
  maximum = jnp.max(logits, axis=-1, keepdims=True)
  # A subnormal divisor is flushed to 0, and 0 / 0 would be nan.
  divisor = max(temperature, float(jnp.finfo(logits.dtype).tiny))
  return (logits - maximum) / divisor


def keep_top_k(logits: Float[Array, '... V'], k: int) -> Float[Array, '... V']:
  """Keeps the `k` most probable tokens; among equals, the lower ids.

  Source: Fan et al., "Hierarchical Neural Story Generation", 2018, arXiv
  1805.04833, section 5.2.

  Args:
    logits: Unnormalised log-probabilities.
    k: How many to keep, at least 1; with `k >= V` all are kept.

  Returns:
    The logits, `-inf` outside the `k` largest, float32 or float64.

  Raises:
    ValueError: If `k` is not an integer of at least 1.
  """
  return _truncate(logits, _checked_top_k(k), None)


def keep_top_p(
  logits: Float[Array, '... V'], p: float
) -> Float[Array, '... V']:
  """Keeps the nucleus: the fewest most probable tokens that together reach `p`.

  A token is kept if those ranked before it have a joint probability below `p`
  (up to rounding), so at least one always is. Among equals the lower ids rank
  first.

  Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020,
  arXiv 1904.09751, section 3.1.

  Args:
    logits: Unnormalised log-probabilities.
    p: The probability to reach, in (0, 1]; 1 keeps all.

  Returns:
    The logits, `-inf` outside the nucleus, float32 or float64.

  Raises:
    ValueError: If `p` lies outside (0, 1].
  """
  return _truncate(logits, None, _checked_top_p(p))


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Draws tokens from logits; hashable, so that a compiled loop can hold it.

  Attributes:
    temperature: At least 0. 1 is the model's own distribution, 0 is greedy: the
      most probable token, the lowest id among equals; the key, `top_k` and
      `top_p` then have no effect.
    top_k: Keep only the `top_k` most probable tokens; None keeps all.
    top_p: Of these, keep only the nucleus of mass `top_p`; None keeps all.

  Raises:
    ValueError: If an attribute lies outside its range.

  Example:
    >>> Sampler(temperature=0)(jax.random.key(0), jnp.array([1.0, 3.0, 2.0]))
    Array(1, dtype=int32)
  """

  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None

  def __post_init__(self):
    if not 0 <= self.temperature < math.inf:
      raise ValueError(
        'temperature must be 0 (greedy) or positive and finite, got '
        f'{self.temperature}.'
      )
    if self.top_k is not None:
      _checked_top_k(self.top_k)
    if self.top_p is not None:
      _checked_top_p(self.top_p)

  def __call__(
    self, key: Key[Array, ''], logits: Float[Array, '... V']
  ) -> Int[Array, '...']:
    """Draws one token for each row.

    Args:
      key: A key from `jax.random.key`, used once for all rows; for a key per
        row, `jax.vmap` this call.
      logits: Unnormalised log-probabilities.

    Returns:
      Token ids, int32.
    """
    if self.temperature == 0:
      return jnp.argmax(_canonical(logits), axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, self.truncate(logits)).astype(jnp.int32)

  def truncate(self, logits: Float[Array, '... V']) -> Float[Array, '... V']:
    """Gives the logits of the distribution that is drawn from.

    Args:
      logits: Unnormalised log-probabilities.

    Returns:
      Unnormalised log-probabilities, `-inf` where a token is excluded.
    """
    if self.temperature == 0:
      return keep_top_k(logits, 1)
    logits = apply_temperature(logits, self.temperature)
    return _truncate(logits, self.top_k, self.top_p)


def _truncate(logits, top_k, top_p):
  """Applies top-k, then top-p; both read one partial sort."""
  logits = _canonical(logits)
  vocabulary = logits.shape[-1]
  count = min(top_k or vocabulary, vocabulary)
  if count == vocabulary and top_p in (None, 1):
    return logits
  # Descending, and among equals the lower id first.
  value_K, token_K = lax.top_k(logits, count)
  last = jnp.full(logits.shape[:-1], count - 1)
  if top_p not in (None, 1):
    last = _last_of_nucleus(value_K, top_p)
  return _keep_up_to(logits, _entry(value_K, last), _entry(token_K, last))


def _last_of_nucleus(value_K, p):
  """Rank of the last kept entry, given logits in descending order."""
  reached_K = jnp.cumsum(jax.nn.softmax(value_K, axis=-1), axis=-1)
  # Entry i + 1 is kept if entries 0..i have not reached p.
  return jnp.sum(reached_K[..., :-1] < p, axis=-1)


def _keep_up_to(logits, value, token):
  """Keeps what ranks no later than a given (value, token id)."""
  token_V = lax.broadcasted_iota(token.dtype, logits.shape, logits.ndim - 1)
  is_kept = (logits > value) | ((logits == value) & (token_V <= token))
  return jnp.where(is_kept, logits, -jnp.inf)


def _entry(ranked_K, rank):
  """Looks up one entry of each row and keeps the last axis at size 1."""
  return jnp.take_along_axis(ranked_K, rank[..., None], axis=-1)


def _canonical(logits):
  """Gives at least float32, and 0 for -0, which `lax.top_k` ranks below 0."""
  is_double = logits.dtype == jnp.float64
  logits = logits.astype(jnp.float64 if is_double else jnp.float32)
  return jnp.where(logits == 0, 0, logits)


def _checked_top_k(k):
  try:
    is_valid = operator.index(k) >= 1 and not isinstance(k, bool)
  except TypeError:
    is_valid = False
  if not is_valid:
    raise ValueError(
      f'top_k must be an integer of at least 1, got {k!r}; None keeps all '
      'tokens.'
    )
  return k


def _checked_top_p(p):
  if not 0 < p <= 1:
    raise ValueError(f'top_p must lie in (0, 1], got {p}; 1 keeps all tokens.')
  return p
