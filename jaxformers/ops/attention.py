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
import functools
from typing import (
  Any,
  Literal,
  NamedTuple,
  Protocol,
  get_args,
  runtime_checkable,
)

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Real

from jaxformers.ops.blockwise import Places
from jaxformers.ops.blockwise import attend_blockwise
from jaxformers.ops.blockwise import count_visible
from jaxformers.ops.masks import Mask
from jaxformers.ops.masks import NoMask
from jaxformers.ops.partial import Partial
from jaxformers.ops.partial import partial_of
from jaxformers.ops.positions import NoPosition
from jaxformers.ops.positions import PositionScheme
from jaxformers.ops.scales import InverseSqrt
from jaxformers.ops.scales import Scale

BLOCK = 256
"""Queries and keys per block, where nothing else is said."""

LONG = 1024 * 1024
"""From so many pairs of query and key on, `'auto'` goes block by block."""

Implementation = Literal['auto', 'xla', 'blockwise']


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


class AttentionWeights(NamedTuple):
  """Everything between scores and output, for those who measure it.

  Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762,
  equation 1.

  Attributes:
    weights: `[B, H, L, M]`, 0 wherever nothing is seen.
    log_normalizer: `[B, H, L]`.
    logits: `[B, H, L, M]`, scores as the weights read them: with positions,
      scale and bias; of any value wherever nothing is seen.
    is_visible: `[B, H, L, M]`, whether the query sees the key; axes B and H may
      have size 1.
  """

  weights: Float[Array, 'B H L M']
  log_normalizer: Float[Array, 'B H L']
  logits: Float[Array, 'B H L M']
  is_visible: Bool[Array, '#B #H L M']


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

  Time `O(L M H K)`. Memory `O(L M H)` for `'xla'`,
  `O((L + M) H K)` for `'blockwise'`, forward and backward.

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
    implementation: `'xla'` materialises all scores; `'blockwise'` does not,
      and skips blocks that nobody sees; `'auto'` chooses by `supports` and
      `LONG`.
    block: queries and keys per block for `'blockwise'`; None for `BLOCK`.
    statistics: also return normaliser and entropy of the weights.

  Returns:
    The output `[B, L, H, V]` in the dtype of the values, or with `statistics`
    an `Attended`.

  Raises:
    ValueError: if shapes do not fit, positions are needed and missing, or the
      implementation is unknown or cannot do what is asked.
  """
  result = _attend(
    query_BLHK,
    key_BMGK,
    value_BMGV,
    position=position,
    scale=scale,
    mask=mask,
    kind=kind,
    bias=bias,
    query_position=query_position,
    key_position=key_position,
    keys_stored=keys_stored,
    implementation=implementation,
    block=block,
    statistics=statistics,
  )
  out_BLHV = result.out.astype(value_BMGV.dtype)
  return result._replace(out=out_BLHV) if statistics else out_BLHV


def attend_partial(
  query_BLHK: Float[Array, 'B L H K'],
  key_BMGK: Float[Array, 'B M G K'],
  value_BMGV: Float[Array, 'B M G V'],
  *,
  implementation: Implementation = 'auto',
  **options: Any,
) -> Partial:
  """Attends to some of the keys, leaving the result open for `merge`.

  Source: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory", 2021,
  arXiv 2112.05682, section 2.

  Args:
    query_BLHK: as for `attend`.
    key_BMGK: the keys of this part.
    value_BMGV: their values.
    implementation: as for `attend`.
    **options: `position`, `scale`, `mask`, `query_position`, `key_position`,
      `keys_stored` and `block`, as for `attend`. A scale that counts visible
      keys counts those of this part.

  Returns:
    The partial result, in at least float32.

  Raises:
    ValueError: as `attend`.
  """
  accumulator = _accumulator(value_BMGV)
  result = _attend(
    query_BLHK,
    key_BMGK,
    value_BMGV,
    implementation=implementation,
    **options,
  )
  return partial_of(result.out.astype(accumulator), result.log_normalizer)


def attention_weights(
  query_BLHK: Float[Array, 'B L H K'],
  key_BMGK: Float[Array, 'B M G K'],
  *,
  kind: Kind = Softmax(),
  bias: Float[Array, '#B #H #L #M'] | None = None,
  rows: Int[Array, ' R'] | None = None,
  **options: Any,
) -> AttentionWeights:
  """Computes the weights that `attend` gives to values.

  Time and memory `O(R M H)` for R of the L queries.

  Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762,
  equation 1.

  Args:
    query_BLHK: as for `attend`.
    key_BMGK: as for `attend`.
    kind: as for `attend`.
    bias: as for `attend`.
    rows: indices of the queries whose weights are wanted; None for all.
    **options: `position`, `scale`, `mask`, `query_position`, `key_position` and
      `keys_stored`, as for `attend`.

  Returns:
    Weights, scores and visibility, in at least float32, with R in place of L.

  Raises:
    ValueError: as `attend`.
  """
  problem = _problem(query_BLHK, key_BMGK, key_BMGK, **options)
  if rows is None:
    return _weigh(problem, kind, bias)

  def weigh_row(i):
    one_bias = bias
    if bias is not None and bias.shape[2] > 1:
      one_bias = jax.lax.dynamic_slice_in_dim(bias, i, 1, axis=2)
    return _weigh(problem.row(i), kind, one_bias)

  # [B, H, R, 1, ...] -> [B, H, R, ...]
  weighed = jax.vmap(weigh_row, out_axes=2)(jnp.asarray(rows))
  return jax.tree.map(lambda x: x[:, :, :, 0], weighed)


class _Problem(NamedTuple):
  """Checked and completed arguments, as an implementation takes them."""

  query: Array
  key: Array  # in stored form
  value: Array
  places: Places
  position: PositionScheme
  scale: Scale

  def branches(self, visible_keys):
    """Returns the branches, with scaled queries."""
    multiplier = self.scale.multiplier(visible_keys, self.query.shape[-1])
    return self.position.branches(
      _scaled(self.query, multiplier),
      self.key,
      self.places.query_position,
      self.places.key_position,
    )

  def row(self, i):
    """Returns the problem of query i alone."""
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, axis=1)
    mask, query_position, key_position = self.places
    places = Places(
      mask.block(i, 1, 0, self.key.shape[1]),
      cut(query_position, i, 1),
      key_position,
    )
    return self._replace(query=cut(self.query, i, 1), places=places)


def _attend(
  query,
  key,
  value,
  *,
  position=NoPosition(),
  scale=InverseSqrt(),
  mask=NoMask(),
  kind=Softmax(),
  bias=None,
  query_position=None,
  key_position=None,
  keys_stored=False,
  implementation='auto',
  block=None,
  statistics=False,
) -> Attended:
  """Attends; the output is not yet in the dtype of the values."""
  problem = _problem(
    query,
    key,
    value,
    position=position,
    scale=scale,
    mask=mask,
    query_position=query_position,
    key_position=key_position,
    keys_stored=keys_stored,
  )
  implementation = _choose(
    implementation, supports('blockwise', kind, bias, statistics), query, key
  )
  if implementation == 'xla' and block is not None:
    raise ValueError(
      f"block={block} given, but 'xla' materialises all scores at once and "
      "has no blocks; leave block=None or ask for 'blockwise'."
    )
  if implementation == 'blockwise':
    return _attend_blocks(problem, BLOCK if block is None else block)
  return _attend_whole(problem, kind, bias, statistics)


def _problem(
  query,
  key,
  value,
  *,
  position=NoPosition(),
  scale=InverseSqrt(),
  mask=NoMask(),
  query_position=None,
  key_position=None,
  keys_stored=False,
):
  """Checks and completes the arguments."""
  _check_shapes(query, key, value)
  compares = mask.compares_positions or position.compares_positions
  places = Places(
    mask, *_positions(query, key, query_position, key_position, compares)
  )
  exists = mask.exists(places.key_position)[..., None, None]
  key = jnp.where(exists, key, 0)
  value = jnp.where(exists, value, 0)
  if not keys_stored:
    key = position.store(key, places.key_position)
  return _Problem(query, key, value, places, position, scale)


def _attend_blocks(problem, block):
  """Runs the blockwise implementation."""
  lengths = problem.query.shape[1], problem.key.shape[1]
  branches = problem.branches(
    lambda: count_visible(problem.places, *lengths, block)
  )
  summary = attend_blockwise(branches, problem.value, problem.places, block)
  return Attended(summary.out, summary.log_normalizer, None)


def _attend_whole(problem, kind, bias, statistics):
  """Materialises all scores."""
  weighed = _weigh(problem, kind, bias)
  out_BLHV = _weighted_values(weighed.weights, problem.value)
  entropy_BLH = None
  if statistics:
    entropy_BLH = _entropy(weighed.weights).swapaxes(1, 2)
  return Attended(out_BLHV, weighed.log_normalizer.swapaxes(1, 2), entropy_BLH)


def _weigh(problem, kind, bias):
  """Returns all scores and the weights that they become."""
  places = problem.places
  is_visible = places.mask.visible(places.query_position, places.key_position)
  lengths = problem.query.shape[1], problem.key.shape[1]
  is_visible = jnp.broadcast_to(is_visible, (*is_visible.shape[:2], *lengths))

  def visible_keys():
    return is_visible.sum(axis=-1, dtype=jnp.int32)

  logits_BHLM = _logits(
    problem.branches(visible_keys), places.query_position, places.key_position
  )
  if bias is not None:
    logits_BHLM += bias.astype(logits_BHLM.dtype)
  weights_BHLM, log_normalizer_BHL = kind.weights(logits_BHLM, is_visible)
  return AttentionWeights(
    weights_BHLM, log_normalizer_BHL, logits_BHLM, is_visible
  )


def _entropy(weights_BHLM):
  # `entr` has an infinite slope at weight 0, so those take part as p = 1.
  positive_BHLM = jnp.where(weights_BHLM > 0, weights_BHLM, 1)
  return -(positive_BHLM * jnp.log(positive_BHLM)).sum(axis=-1)


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
  return out.reshape(batch, length, heads, width)


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


def supports(
  implementation: str, kind: Kind, bias: Array | None, statistics: bool
) -> str | None:
  """Says why an implementation cannot do what is asked; None if it can.

  Source: none; a property of this library.

  Args:
    implementation: its name.
    kind: how scores become weights.
    bias: what is added to scores.
    statistics: whether statistics are wanted.
  """
  if implementation == 'xla':
    return None
  if not isinstance(kind, Softmax):
    return f'it knows the kind Softmax() only, not {kind}'
  if bias is not None:
    return 'it takes no bias array, which is as large as all scores'
  if statistics:
    return 'it gives no statistics'
  return None


def _choose(implementation, reason, query, key):
  """Returns the implementation to run, given what keeps 'blockwise' from it."""
  known = get_args(Implementation)
  if implementation not in known:
    raise ValueError(
      f'unknown implementation {implementation!r}; known: {", ".join(known)}.'
    )
  if implementation == 'blockwise' and reason is not None:
    raise ValueError(
      f"implementation 'blockwise' cannot do this: {reason}; 'xla' can, and "
      "'auto' chooses."
    )
  if implementation != 'auto':
    return implementation
  is_long = query.shape[1] * key.shape[1] >= LONG
  return 'blockwise' if is_long and reason is None else 'xla'
