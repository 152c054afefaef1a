"""Attention: every technique is a choice of position, scale, mask and kind.

`attend` is the one entry point. What differs between techniques are four small
values, and none of them materialises anything by itself:

- `position` turns queries and keys (`jaxformers.ops.positions`);
- `scale` multiplies scores (`jaxformers.ops.scales`);
- `mask` says who sees whom (`jaxformers.ops.masks`);
- `kind` says how scores become weights (`Softmax`).

The order is: positions, scale, scores, bias, mask, weights, output.
"""

import dataclasses
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float, Real

from jaxformers.ops.masks import Mask
from jaxformers.ops.masks import NoMask
from jaxformers.ops.positions import NoPosition
from jaxformers.ops.positions import PositionScheme
from jaxformers.ops.scales import InverseSqrt
from jaxformers.ops.scales import Scale

Implementation = Literal['auto', 'xla']


class Attended(NamedTuple):
  """What attention returns when asked for statistics.

  Attributes:
    out: `[B, L, H, V]`, the weighted values, in the dtype of the values.
    log_normalizer: float32 `[B, L, H]`, logarithm of the sum of exponentials;
      -inf where a query sees nothing.
    entropy: float32 `[B, L, H]`, entropy of the weights in nats, from 0 to the
      logarithm of the number of visible keys.
  """

  out: Float[Array, 'B L H V']
  log_normalizer: Float[Array, 'B L H']
  entropy: Float[Array, 'B L H']


class Weights(NamedTuple):
  """Weights of the keys of each query, and what normalised them.

  Attributes:
    weights: `[..., L, M]`.
    log_normalizer: `[..., L]`.
  """

  weights: Float[Array, '*B L M']
  log_normalizer: Float[Array, '*B L']


@runtime_checkable
class Kind(Protocol):
  """How scores become the weights of values."""

  def weights(
    self, logits: Float[Array, '*B L M'], is_visible: Bool[Array, '*B L M']
  ) -> Weights:
    """Returns weights, zero wherever `is_visible` is False."""
    ...


@dataclasses.dataclass(frozen=True)
class Softmax:
  """Weights proportional to the exponentials of the visible scores.

  A query that sees nothing has weights 0 and gradients 0, not the mean of all
  values that a softmax over equal large negative numbers gives.

  Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762,
  equation 1.
  """

  def weights(self, logits, is_visible):
    # Finite, so that no branch ever holds inf - inf, whose gradient would be nan
    # even where it is discarded.
    logits = jnp.where(is_visible, logits, jnp.finfo(logits.dtype).min)
    weights = jnp.where(is_visible, jax.nn.softmax(logits, axis=-1), 0)
    log_normalizer = jnp.where(
      is_visible.any(axis=-1), jax.nn.logsumexp(logits, axis=-1), -jnp.inf
    )
    return Weights(weights, log_normalizer)


def attend(
  query_BLHK: Float[Array, 'B L H K'],
  key_BMGK: Float[Array, 'B M G K'],
  value_BMGV: Float[Array, 'B M G V'],
  *,
  position: PositionScheme = NoPosition(),
  scale: Scale = InverseSqrt(),
  mask: Mask = NoMask(),
  kind: Kind = Softmax(),
  bias: Float[Array, '#B #H #L #M'] | None = None,
  query_position: Real[Array, '... L'] | None = None,
  key_position: Real[Array, '... M'] | None = None,
  keys_stored: bool = False,
  implementation: Implementation = 'auto',
  block: int | None = None,
  statistics: bool = False,
) -> Float[Array, 'B L H V'] | Attended:
  """Attends: each query returns a weighted mean of the values it sees.

  `softmax(scale (q . k) + bias) v` over the visible keys. Query head h reads
  key head `h // (H / G)`: G = H is multi-head, G = 1 multi-query attention.
  Products, softmax and accumulation run in float32, or float64 for float64
  inputs. A query that sees nothing returns 0, with gradient 0.

  Time `O(L M H K)`. Memory `O(L M H)` for `'xla'`.

  Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762,
  section 3.2; grouped heads: Ainslie et al., "GQA", 2023, arXiv 2305.13245.

  Args:
    query_BLHK: queries.
    key_BMGK: keys; G must divide H.
    value_BMGV: values.
    position: how positions enter the scores.
    scale: multiplier of the scores, folded into the queries.
    mask: which keys a query sees.
    kind: how scores become weights.
    bias: added to the scaled scores, broadcast to `[B, H, L, M]`.
    query_position: positions `[L]` or `[B, L]`; default 0 .. L-1. Must be given
      where positions matter and L differs from M, because nothing says then
      whether the queries are the first or the last tokens.
    key_position: positions `[M]` or `[B, M]`; default 0 .. M-1.
    keys_stored: True if the keys come from a cache, in the form that
      `position.store` gives, False if they are raw projections.
    implementation: `'xla'` materialises all scores; `'auto'` chooses.
    block: keys per block for blockwise implementations; `'xla'` has none.
    statistics: also return normaliser and entropy of the weights.

  Returns:
    The output `[B, L, H, V]` in the dtype of the values, or with `statistics`
    an `Attended`.

  Raises:
    ValueError: if shapes do not fit, positions are needed and missing, or the
      implementation is unknown or cannot do what is asked.
  """
  _check_shapes(query_BLHK, key_BMGK, value_BMGV)
  _check_implementation(implementation, block)
  compares = mask.compares_positions or position.compares_positions
  query_position, key_position = _positions(
    query_BLHK, key_BMGK, query_position, key_position, compares
  )
  is_visible = mask.visible(query_position, key_position)
  # What nobody sees must not leak, not even as 0 * nan: unused slots of a cache
  # and padding may hold anything.
  is_seen = is_visible.any(axis=(1, 2))[..., None, None]
  key_BMGK = jnp.where(is_seen, key_BMGK, 0)
  value_BMGV = jnp.where(is_seen, value_BMGV, 0)
  if not keys_stored:
    key_BMGK = position.store(key_BMGK, key_position)

  def visible_keys():
    shape = (*is_visible.shape[:2], query_BLHK.shape[1], key_BMGK.shape[1])
    return jnp.broadcast_to(is_visible, shape).sum(axis=-1)

  multiplier = scale.multiplier(visible_keys, query_BLHK.shape[-1])
  query_BLHK = _scaled(query_BLHK, multiplier)
  logits_BHLM = _logits(
    position.branches(query_BLHK, key_BMGK, query_position, key_position),
    query_position,
    key_position,
  )
  if bias is not None:
    logits_BHLM += bias.astype(logits_BHLM.dtype)
  weights_BHLM, log_normalizer_BHL = kind.weights(logits_BHLM, is_visible)
  out_BLHV = _weighted_values(weights_BHLM, value_BMGV)
  if not statistics:
    return out_BLHV
  # `entr` has an infinite slope at weight 0, so those take part as p = 1.
  positive_BHLM = jnp.where(weights_BHLM > 0, weights_BHLM, 1)
  entropy_BHL = -(positive_BHLM * jnp.log(positive_BHLM)).sum(axis=-1)
  return Attended(
    out_BLHV, log_normalizer_BHL.swapaxes(1, 2), entropy_BHL.swapaxes(1, 2)
  )


def _scaled(query_BLHK, multiplier):
  """Multiplies queries by a number, or by one per batch, head and row."""
  dtype = _accumulator(query_BLHK)
  if jnp.ndim(multiplier):
    multiplier = jnp.swapaxes(multiplier, 1, 2)[..., None]
  scaled = query_BLHK.astype(dtype) * jnp.asarray(multiplier, dtype)
  return scaled.astype(query_BLHK.dtype)


def _logits(branches, query_position, key_position):
  """Returns `[B, H, L, M]`, each branch where its region holds."""
  logits = _products(branches[0].query, branches[0].key)
  for query, key, region in branches[1:]:
    holds = region(query_position, key_position)
    logits = jnp.where(holds, _products(query, key), logits)
  return logits


def _products(query_BLHK, key_BMGK):
  batch, length, heads, width = query_BLHK.shape
  groups = key_BMGK.shape[2]
  query = query_BLHK.reshape(batch, length, groups, heads // groups, width)
  logits = jnp.einsum(
    'BLGRK,BMGK->BGRLM',
    query,
    key_BMGK,
    preferred_element_type=_accumulator(query),
  )
  return logits.reshape(batch, heads, length, key_BMGK.shape[1])


def _weighted_values(weights_BHLM, value_BMGV):
  batch, heads, length, keys = weights_BHLM.shape
  groups, width = value_BMGV.shape[2:]
  shape = batch, groups, heads // groups, length, keys
  out = jnp.einsum(
    'BGRLM,BMGV->BLGRV',
    weights_BHLM.reshape(shape).astype(value_BMGV.dtype),
    value_BMGV,
    preferred_element_type=_accumulator(value_BMGV),
  )
  return out.reshape(batch, length, heads, width).astype(value_BMGV.dtype)


def _accumulator(x):
  return jnp.promote_types(x.dtype, jnp.float32)


def _positions(query, key, query_position, key_position, compares):
  """Returns both positions as `[B or 1, length]`."""
  lengths = query.shape[1], key.shape[1]
  if compares and query_position is None and lengths[0] != lengths[1]:
    raise ValueError(
      f'{lengths[0]} queries against {lengths[1]} keys: pass query_position, '
      'because mask or position compare them and only you know whether the '
      'queries are the first or the last tokens.'
    )
  given = query_position, key_position
  defaulted = [
    jnp.arange(length) if position is None else position
    for position, length in zip(given, lengths, strict=True)
  ]
  for name, position, length in zip(
    ('query', 'key'), defaulted, lengths, strict=True
  ):
    if position.shape[-1] != length or position.ndim > 2:
      raise ValueError(
        f'{name}_position must have shape [{length}] or [B, {length}], got '
        f'{list(position.shape)}.'
      )
  return [p[None] if p.ndim == 1 else p for p in defaulted]


def _check_shapes(query, key, value):
  """Raises unless queries, keys and values fit together."""
  shapes = f'query {query.shape}, key {key.shape}, value {value.shape}'
  if not query.ndim == key.ndim == value.ndim == 4:
    raise ValueError(
      f'attend needs arrays [B, length, heads, width]: {shapes}.'
    )
  if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0]:
    raise ValueError(
      'keys and values must agree in batch, length and heads, and with the '
      f'queries in batch: {shapes}.'
    )
  if query.shape[3] != key.shape[3]:
    raise ValueError(f'queries and keys must be equally wide: {shapes}.')
  if query.shape[2] % key.shape[2]:
    raise ValueError(
      f'{query.shape[2]} query heads cannot share {key.shape[2]} key heads '
      'equally; choose a number of key heads that divides them.'
    )


def _check_implementation(implementation, block):
  if implementation not in ('auto', 'xla'):
    raise ValueError(
      f"unknown implementation {implementation!r}; known: 'auto', 'xla'."
    )
  if block is not None:
    raise ValueError(
      f"block={block} given, but 'xla' materialises all scores at once and "
      'has no blocks; leave block=None.'
    )
