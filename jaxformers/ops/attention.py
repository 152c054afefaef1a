"""Attention: every technique is a choice of position, scale, mask and kind.

`attend` is the one entry point. What differs between techniques are four small
values, and none of them materialises anything by itself:

- `position` turns queries and keys (`jaxformers.ops.positions`);
- `scale` multiplies scores (`jaxformers.ops.scales`);
- `mask` says who sees whom (`jaxformers.ops.masks`);
- `kind` says how scores become weights (`Softmax`).

The order is: positions, scale, scores, bias, mask, weights, output.
"""

import functools
from typing import (
  Any,
  Literal,
  NamedTuple,
  get_args,
)

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Real

from jaxformers.ops.biases import Bias
from jaxformers.ops.biases import as_bias
from jaxformers.ops.blockwise import Attended
from jaxformers.ops.blockwise import Places
from jaxformers.ops.blockwise import attend_blockwise
from jaxformers.ops.blockwise import count_visible
from jaxformers.ops.kinds import Additive
from jaxformers.ops.kinds import Kind
from jaxformers.ops.kinds import Softmax
from jaxformers.ops.masks import Mask
from jaxformers.ops.masks import NoMask
from jaxformers.ops.partial import Partial
from jaxformers.ops.partial import partial_of
from jaxformers.ops.positions import NoPosition
from jaxformers.ops.positions import PositionScheme
from jaxformers.ops.positions import Rotary
from jaxformers.ops.scales import InverseSqrt
from jaxformers.ops.scales import Scale
from jaxformers.ops.tile import Tile
from jaxformers.ops.vendor import KERNELS
from jaxformers.ops.vendor import LANES
from jaxformers.ops.vendor import refuses_mask

BLOCK = 512
"""Queries and keys per block, where nothing else is said and masks reach far."""

LONG = 512 * 512
"""From so many pairs of query and key on, `'auto'` goes block by block."""

MANY = 1024
"""From so many queries on, `'blockwise'` sorts keys to count those visible.

On two CPU cores 1024 queries and keys took 0.4 ms either way, 32768 took 23 ms
instead of 700 ms; a single query against a million keys 260 ms instead of 0.4.
`'xla'` has all pairs at hand.
"""

Implementation = Literal['auto', 'xla', 'blockwise', 'cudnn', 'tpu']


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


def attend(
  query_BLHK: Float[Array, 'B L H K'],
  key_BMGK: Float[Array, 'B M G K'],
  value_BMGV: Float[Array, 'B M G V'],
  *,
  position: PositionScheme = NoPosition(),
  scale: Scale = InverseSqrt(),
  mask: Mask = NoMask(),
  kind: Kind = Softmax(),
  bias: Bias | Float[Array, '#B #H #L #M'] | None = None,
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
    bias: added to the scaled scores; an array is broadcast to `[B, H, L, M]`.
    query_position: positions `[L]` or `[B, L]`; default 0 .. L-1. Must be given
      where positions matter and L differs from M, because nothing says then
      whether the queries are the first or the last tokens.
    key_position: positions `[M]` or `[B, M]`; default 0 .. M-1.
    keys_stored: True if the keys come from a cache, in the form that
      `position.store` gives, False if they are raw projections.
    implementation: `'xla'` materialises all scores; `'blockwise'` does not,
      and skips blocks that nobody sees; `'cudnn'` and `'tpu'` hand plain cases
      to kernels for GPUs and TPUs; `'auto'` chooses one of the first two, by
      `supports` and `LONG`.
    block: queries and keys per block for `'blockwise'`; None for `BLOCK`, or
      less where the mask reaches less far.
    statistics: also return normaliser, entropy, effective support and variance.

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
    **options: `position`, `scale`, `mask`, `bias`, `query_position`,
      `key_position`, `keys_stored` and `block`, as for `attend`. A scale that counts visible
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
    is_partial=True,
    **options,
  )
  return partial_of(result.out.astype(accumulator), result.log_normalizer)


def attention_weights(
  query_BLHK: Float[Array, 'B L H K'],
  key_BMGK: Float[Array, 'B M G K'],
  *,
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
    rows: indices of the queries whose weights are wanted; None for all.
    **options: `position`, `scale`, `mask`, `kind`, `bias`, `query_position`,
      `key_position` and `keys_stored`, as for `attend`.

  Returns:
    Weights, scores and visibility, in at least float32, with R in place of L.

  Raises:
    ValueError: as `attend`.
  """
  problem = problem_of(query_BLHK, key_BMGK, key_BMGK, **options)
  if rows is None:
    return _weigh(problem)

  # [B, H, R, 1, ...] -> [B, H, R, ...]
  weighed = jax.vmap(lambda i: _weigh(problem.row(i)), out_axes=2)(
    jnp.asarray(rows)
  )
  return jax.tree.map(lambda x: x[:, :, :, 0], weighed)


class Problem(NamedTuple):
  """Checked and completed arguments, as an implementation takes them."""

  query: Array
  key: Array  # in stored form
  value: Array
  places: Places
  position: PositionScheme
  scale: Scale
  kind: Kind
  bias: Bias | None
  statistics: bool

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
    tile = Tile(None, (i, 1), (0, self.key.shape[1]))
    return self._replace(
      query=jax.lax.dynamic_slice_in_dim(self.query, i, 1, axis=1),
      places=self.places.block(tile),
      bias=None if self.bias is None else self.bias.block(tile),
    )


def _attend(
  query, key, value, *, implementation, block=None, is_partial=False, **options
) -> Attended:
  """Attends; the output is not yet in the dtype of the values."""
  problem = problem_of(query, key, value, **options)
  given = options.get('query_position'), options.get('key_position')
  default_positions = all(position is None for position in given)
  implementation = _choose(
    implementation, problem, is_partial, default_positions=default_positions
  )
  if implementation != 'blockwise' and block is not None:
    raise ValueError(
      f'block={block} given, but {implementation!r} takes none; leave '
      "block=None or ask for 'blockwise'."
    )
  match implementation:
    case 'blockwise':
      block = block or _block_size(problem.places.mask)
      return _attend_blocks(problem, block)
    case 'xla':
      return _attend_whole(problem)
  return _attend_kernel(problem, implementation)


def problem_of(
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
  statistics=False,
) -> Problem:
  """Checks and completes the arguments of `attend`.

  Source: see `attend`.

  Args:
    query: queries.
    key: keys.
    value: values.
    position: see `attend`, like all others.
    scale: multiplier of the scores.
    mask: which keys a query sees.
    kind: how scores become weights.
    bias: added to the scaled scores.
    query_position: positions of the queries.
    key_position: positions of the keys.
    keys_stored: whether keys are in the form that a cache holds.
    statistics: whether statistics are wanted.
  """
  _check_shapes(query, key, value)
  bias = as_bias(bias)
  parts = [part for part in (mask, position, bias) if part is not None]
  compares = any(part.compares_positions for part in parts)
  places = Places(
    mask, *_positions(query, key, query_position, key_position, compares)
  )
  _check_mask(places, query, key)
  exists = mask.exists(places.key_position)[..., None, None]
  key = jnp.where(exists, key, 0)
  value = jnp.where(exists, value, 0)
  if not keys_stored:
    key = position.store(key, places.key_position)
  return Problem(
    query, key, value, places, position, scale, kind, bias, statistics
  )


def _block_size(mask):
  """Returns the block for a mask: smaller where most of a large one is hidden."""
  reach = mask.reach
  return BLOCK if reach is None or reach >= BLOCK else max(BLOCK // 2, 1)


def _attend_blocks(problem, block):
  """Runs the blockwise implementation."""
  visible_keys = functools.cache(lambda: _count_visible(problem, block))
  summary = attend_blockwise(
    problem.branches(visible_keys),
    problem.value,
    problem.places,
    block,
    weight=getattr(problem.kind, 'weight', None),
    bias=problem.bias,
    statistics=problem.statistics,
  )
  if not isinstance(problem.kind, Additive):
    return summary
  divisor_BHL = problem.kind.divisor(visible_keys())
  divisor_BLH1 = jnp.swapaxes(divisor_BHL, 1, 2)[..., None]
  return summary._replace(out=summary.out / divisor_BLH1)


def _count_visible(problem, block):
  places = problem.places
  lengths = problem.query.shape[1], problem.key.shape[1]
  if lengths[0] >= MANY:
    count = places.mask.count(places.query_position, places.key_position)
    if count is not None:
      return count
  return count_visible(places, *lengths, block)


def _attend_kernel(problem, implementation):
  """Hands the problem to a vendor's kernel."""
  branch, *_ = problem.branches(lambda: _count_visible(problem, BLOCK))
  out_BLHV = KERNELS[implementation](
    branch.query, branch.key, problem.value, problem.places.mask
  )
  return Attended(out_BLHV, None)


def _attend_whole(problem):
  """Materialises all scores."""
  weighed = _weigh(problem)
  summary = Attended(
    _weighted_values(weighed.weights, problem.value),
    weighed.log_normalizer.swapaxes(1, 2),
  )
  if not problem.statistics:
    return summary
  statistics = _statistics(weighed.weights, weighed.logits)
  return summary._replace(
    **{name: x.swapaxes(1, 2) for name, x in statistics.items()}
  )


def _weigh(problem):
  """Returns all scores and the weights that they become."""
  places = problem.places
  is_visible = places.mask.visible(places.query_position, places.key_position)
  lengths = problem.query.shape[1], problem.key.shape[1]
  is_visible = jnp.broadcast_to(is_visible, (*is_visible.shape[:2], *lengths))

  def visible_keys():
    return is_visible.sum(axis=-1, dtype=jnp.int32)

  branches = problem.branches(visible_keys)
  positions = places.query_position, places.key_position
  logits_BHLM = _logits(branches, *positions)
  if problem.bias is not None:
    bias = problem.bias.logits(branches[0].query, branches[0].key, *positions)
    logits_BHLM += bias.astype(logits_BHLM.dtype)
  weights_BHLM, log_normalizer_BHL = problem.kind.weights(
    logits_BHLM, is_visible
  )
  return AttentionWeights(
    weights_BHLM, log_normalizer_BHL, logits_BHLM, is_visible
  )


def _statistics(weights_BHLM, logits_BHLM):
  """Returns statistics of weights and logits, each `[B, H, L]`."""
  # The slope of p log p is infinite at 0, so those take part as p = 1.
  positive_BHLM = jnp.where(weights_BHLM > 0, weights_BHLM, 1)
  squares_BHL = (weights_BHLM**2).sum(axis=-1)
  safe_BHL = jnp.where(squares_BHL > 0, squares_BHL, 1)
  mean_BHL1 = (weights_BHLM * logits_BHLM).sum(axis=-1, keepdims=True)
  return {
    'entropy': -(positive_BHLM * jnp.log(positive_BHLM)).sum(axis=-1),
    'effective_support': jnp.where(squares_BHL > 0, 1 / safe_BHL, 0),
    'variance': (weights_BHLM * (logits_BHLM - mean_BHL1) ** 2).sum(axis=-1),
  }


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


def _check_mask(places, query, key):
  """Raises unless the mask speaks of these queries and keys."""
  shape = jax.eval_shape(
    places.mask.visible, places.query_position, places.key_position
  ).shape
  wanted = query.shape[0], query.shape[2], query.shape[1], key.shape[1]
  if len(shape) != 4 or any(
    n not in (1, m) for n, m in zip(shape, wanted, strict=True)
  ):
    raise ValueError(
      f'the mask says who sees whom for [B, H, L, M] = {list(shape)}, but the '
      f'arrays are for {list(wanted)}; each axis must agree or have size 1.'
    )


def supports(
  implementation: str,
  *,
  position: PositionScheme = NoPosition(),
  mask: Mask = NoMask(),
  kind: Kind = Softmax(),
  bias: Bias | None = None,
  statistics: bool = False,
  dtype: Any = jnp.float32,
  lengths: tuple[int, int] | None = None,
  default_positions: bool = True,
) -> str | None:
  """Says why an implementation cannot do what is asked; None if it can.

  A scale never matters: it is folded into the queries.

  Source: none; a property of this library.

  Args:
    implementation: its name.
    position: how positions enter.
    mask: who sees whom.
    kind: how scores become weights.
    bias: what is added to scores.
    statistics: whether statistics are wanted, or a result to be merged.
    dtype: of the queries.
    lengths: numbers of queries and keys; None if not known.
    default_positions: whether both count from 0.
  """
  if implementation == 'xla':
    return None
  if implementation == 'blockwise':
    if isinstance(kind, Additive) and statistics:
      return 'it gives statistics and partial results of softmax only'
    if not isinstance(kind, Softmax | Additive):
      return f'it knows softmax and additive kinds only, not {kind}'
    return None
  if not isinstance(kind, Softmax):
    return f'it knows softmax only, not {kind}'
  if bias is not None:
    return 'it takes no bias'
  if statistics:
    return 'it gives neither statistics nor partial results'
  if not isinstance(position, NoPosition | Rotary):
    return (
      f'it computes one product per pair, {type(position).__name__} may not'
    )
  length, keys = lengths or (1, 1)
  if mask.compares_positions and not (default_positions and length == keys):
    return 'it knows as many queries as keys, at positions 0, 1, 2, ... only'
  if implementation == 'cudnn' and dtype not in (jnp.float16, jnp.bfloat16):
    return f'it knows float16 and bfloat16 only, not {jnp.dtype(dtype)}'
  if implementation == 'tpu' and lengths and (length % LANES or keys % LANES):
    return f'it needs multiples of {LANES} queries and keys, not {lengths}'
  return refuses_mask(implementation, mask)


def _choose(implementation, problem, is_partial, default_positions):
  """Returns the implementation to run."""
  known = get_args(Implementation)
  if implementation not in known:
    raise ValueError(
      f'unknown implementation {implementation!r}; known: {", ".join(known)}.'
    )
  lengths = problem.query.shape[1], problem.key.shape[1]
  refusal = functools.partial(
    supports,
    position=problem.position,
    mask=problem.places.mask,
    kind=problem.kind,
    bias=problem.bias,
    statistics=problem.statistics or is_partial,
    dtype=problem.query.dtype,
    lengths=lengths,
    default_positions=default_positions,
  )
  if implementation == 'auto':
    is_long = lengths[0] * lengths[1] >= LONG
    return 'blockwise' if is_long and refusal('blockwise') is None else 'xla'
  if (reason := refusal(implementation)) is not None:
    others = [repr(name) for name in known[1:] if refusal(name) is None]
    raise ValueError(
      f'implementation {implementation!r} cannot do this: {reason}; '
      f"{' and '.join(others)} can, and 'auto' chooses."
    )
  return implementation
