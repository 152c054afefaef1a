"""Softmax attention block by block: linear memory, forward and backward.

Queries and keys are cut into blocks. Each block of queries meets the blocks of
keys that its mask may let it see, one after the other, and keeps a running
maximum, sum and weighted mean (online softmax). The backward pass computes the
weights again from the stored logarithm of the normaliser. Nothing of size
`L x M` exists at any time, and blocks that nobody can see cost nothing.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax",
2018, arXiv 1805.02867, algorithm 3; Rabe and Staats, "Self-attention Does Not
Need O(n^2) Memory", 2021, arXiv 2112.05682; backward pass: Dao et al.,
"FlashAttention", 2022, arXiv 2205.14135, appendix B.2.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxformers.ops.biases import Bias
from jaxformers.ops.masks import Mask
from jaxformers.ops.masks import Span
from jaxformers.ops.positions import Branch
from jaxformers.ops.tile import Tile
from jaxformers.ops.tile import cut

SCORES = 1024 * 1024
"""On CPUs so many scores at a time, which fit the cache; rows of the batch that
exceed it wait for their turn."""


class Plan(NamedTuple):
  """What is known while tracing; hashable.

  Attributes:
    queries: queries per block.
    keys: keys per block.
    key_count: number of keys before padding.
    regions: the region of each branch.
    statistics: whether statistics of the weights are wanted.
    weight: None for softmax, or the function of one score that its weight is.
  """

  queries: int
  keys: int
  key_count: int
  regions: tuple[Any, ...] = ()
  statistics: bool = False
  weight: Callable[[Array], Array] | None = None


class Places(NamedTuple):
  """Who stands where; no part of it is differentiated.

  Attributes:
    mask: who sees whom.
    query_position: `[B or 1, L]`.
    key_position: `[B or 1, M]`.
  """

  mask: Mask
  query_position: Array
  key_position: Array

  def block(self, tile: Tile) -> 'Places':
    """Returns the places of some rows, queries and keys."""
    return Places(
      self.mask.block(tile),
      cut(cut(self.query_position, 0, tile.rows), 1, tile.queries),
      cut(cut(self.key_position, 0, tile.rows), 1, tile.keys),
    )


class Attended(NamedTuple):
  """What attention gives: output, normaliser and statistics of its weights.

  Numbers are float32, or float64 for float64 inputs.

  Attributes:
    out: `[B, L, H, V]`, the weighted values; 0 for a query that sees nothing.
    log_normalizer: `[B, L, H]`, logarithm of the sum of exponentials; -inf for a
      query that sees nothing.
    entropy: `[B, L, H]`, of the weights in nats, from 0 to the logarithm of the
      number of visible keys; None if statistics are not wanted, and so the
      others.
    effective_support: `[B, L, H]`, how many keys share the weight,
      `1 / sum p^2`; 0 where a query sees nothing.
    variance: `[B, L, H]`, of the logits under the weights.
  """

  out: Float[Array, 'B L H V']
  log_normalizer: Float[Array, 'B L H']
  entropy: Float[Array, 'B L H'] | None = None
  effective_support: Float[Array, 'B L H'] | None = None
  variance: Float[Array, 'B L H'] | None = None


class Operands(NamedTuple):
  """What is differentiated, in blocks."""

  queries: tuple[Array, ...]  # [B, n, G, R, L, K], one for each branch
  keys: tuple[Array, ...]  # [B, m, G, M, K]
  value: Array  # [B, m, G, M, V]
  bias: Bias | None


def attend_blockwise(
  branches: tuple[Branch, ...],
  value_BMGV: Float[Array, 'B M G V'],
  places: Places,
  block: int,
  *,
  weight: Callable[[Array], Array] | None = None,
  bias: Bias | None = None,
  statistics: bool = False,
) -> Attended:
  """Attends block by block.

  Time `O(L M H K)` over the blocks that are seen; memory
  `O((L + M) H K + block^2 B H)`.

  Source: see the module.

  Args:
    branches: queries, scaled, and keys; a later branch overrides where its
      region holds.
    value_BMGV: values.
    places: mask and positions.
    block: queries and keys per block.
    weight: None for softmax, or the function of one score that its weight is;
      weights are then not divided by anything, and the logarithm of the
      normaliser is 0 or, where nothing was seen, -inf.
    bias: what is added to scores.
    statistics: whether to compute statistics of the weights.
  """
  length, heads = branches[0].query.shape[1:3]
  plan, operands = plan_of(
    branches,
    value_BMGV,
    block,
    weight=weight,
    bias=bias,
    statistics=statistics,
  )
  summary = _attend(plan, operands, _padded(places, plan))
  return jax.tree.map(lambda x: rows_of(x, length, heads), summary)


def plan_of(
  branches: tuple[Branch, ...],
  value_BMGV: Float[Array, 'B M G V'],
  block: int,
  *,
  weight: Callable[[Array], Array] | None = None,
  bias: Bias | None = None,
  statistics: bool = False,
) -> tuple[Plan, Operands]:
  """Returns the plan of a problem, and its operands in blocks.

  Source: see the module.

  Args:
    branches: see `attend_blockwise`, like all others.
    value_BMGV: values.
    block: queries and keys per block.
    weight: None for softmax.
    bias: what is added to scores.
    statistics: whether to compute statistics of the weights.
  """
  length = branches[0].query.shape[1]
  keys, groups = value_BMGV.shape[1:3]
  plan = Plan(
    min(block, length),
    min(block, keys),
    keys,
    tuple(branch.region for branch in branches),
    statistics,
    weight,
  )
  operands = Operands(
    tuple(_query_blocks(b.query, groups, plan) for b in branches),
    tuple(_key_blocks(b.key, plan) for b in branches),
    _key_blocks(value_BMGV, plan),
    None if bias is None else bias.padded(plan.queries, plan.keys),
  )
  return plan, operands


def rows_of(x: Array, length: int, heads: int) -> Array:
  """Joins blocks: `[B, n, G, R, L, ...]` becomes `[B, n L, G R, ...]`.

  Source: see the module.

  Args:
    x: in blocks of queries.
    length: how many queries there are, without those that fill up.
    heads: how many heads.
  """
  x = jnp.moveaxis(x, 4, 2)
  return x.reshape(x.shape[0], -1, heads, *x.shape[5:])[:, :length]


def count_visible(
  places: Places, length: int, keys: int, block: int
) -> Int[Array, 'B H L']:
  """Counts the keys that each query sees, block by block.

  Source: see the module.

  Args:
    places: mask and positions.
    length: number of queries.
    keys: number of keys.
    block: keys per block.

  Returns:
    int32 `[B, H, L]`; axes B and H may have size 1.
  """
  plan = Plan(length, min(block, keys), keys)
  places = _padded(places, plan)
  blocks = places.key_position.shape[1] // plan.keys

  def count(j):
    is_visible = _visible(plan, places, 0, j)
    # Axes of size 1 stand for all queries or keys.
    shape = *is_visible.shape[:2], length, plan.keys
    return jnp.broadcast_to(is_visible, shape).sum(axis=-1, dtype=jnp.int32)

  return jax.lax.fori_loop(
    1, blocks, lambda j, total: total + count(j), count(0)
  )


def _query_blocks(query_BLHK, groups, plan):
  """Returns `[B, n, G, R, L, K]`."""
  batch, _, heads, width = query_BLHK.shape
  query = pad_axis(query_BLHK, 1, plan.queries)
  shape = batch, -1, plan.queries, groups, heads // groups, width
  return jnp.moveaxis(query.reshape(shape), 2, 4)


def _key_blocks(key_BMGK, plan):
  """Returns `[B, m, G, M, K]`."""
  batch, _, groups, width = key_BMGK.shape
  key = pad_axis(key_BMGK, 1, plan.keys)
  return key.reshape(batch, -1, plan.keys, groups, width).swapaxes(2, 3)


def _padded(places, plan):
  return Places(
    places.mask.padded(plan.queries, plan.keys),
    pad_axis(places.query_position, 1, plan.queries),
    pad_axis(places.key_position, 1, plan.keys),
  )


def pad_axis(x: Array, axis: int, multiple: int) -> Array:
  """Fills an axis up to a multiple of a size with its last entry.

  Source: none; a step of `attend_blockwise`.

  Args:
    x: any array.
    axis: which axis.
    multiple: of the size.
  """
  padding = [(0, 0)] * x.ndim
  padding[axis] = 0, -x.shape[axis] % multiple
  return jnp.pad(x, padding, mode='edge') if padding[axis][1] else x


def _tile(plan, i, j):
  """Where query block i and key block j are, in all rows."""
  return Tile(
    None, (i * plan.queries, plan.queries), (j * plan.keys, plan.keys)
  )


class _Scores(NamedTuple):
  """Scores of one block of queries against one block of keys."""

  logits: Array  # [B, G, R, L, M]
  is_visible: Array  # broadcast to it
  holds: tuple[Array, ...]  # where each later branch holds


def _scores(plan, queries, keys, bias, places, tile):
  """Computes scores of query blocks and key blocks, without their bias."""
  here = places.block(tile)
  groups = keys[0].shape[1]
  logits = _products(queries[0], keys[0])
  holds = []
  for query, key, region in zip(
    queries[1:], keys[1:], plan.regions[1:], strict=True
  ):
    hold = _grouped(region(here.query_position, here.key_position), groups)
    logits = jnp.where(hold, _products(query, key), logits)
    holds.append(hold)
  if bias is not None:
    logits += _bias(bias.block(tile), queries[0], keys[0], here)
  is_visible = _grouped(_visible_here(plan, here, tile), groups)
  return _Scores(logits, is_visible, tuple(holds))


def _bias(bias, query, key, here):
  """Returns the bias of a block, broadcast to `[B, G, R, L, M]`."""
  batch, groups, repeats, length, width = query.shape
  query_BLHK = jnp.moveaxis(query, 3, 1).reshape(batch, length, -1, width)
  logits_BHLM = bias.logits(
    query_BLHK, key.swapaxes(1, 2), here.query_position, here.key_position
  )
  shape = batch, groups, repeats, length, key.shape[2]
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  return jnp.broadcast_to(_grouped(logits_BHLM, groups), shape).astype(dtype)


def _visible(plan, places, i, j):
  """Returns which keys of block j the queries of block i see."""
  tile = _tile(plan, i, j)
  return _visible_here(plan, places.block(tile), tile)


def _visible_here(plan, here, tile):
  is_visible = here.mask.visible(here.query_position, here.key_position)
  if plan.key_count % plan.keys:  # The last block is filled up.
    is_visible &= tile.keys[0] + jnp.arange(plan.keys) < plan.key_count
  return is_visible


def _products(query, key):
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  return jnp.einsum(
    'BGRLK,BGMK->BGRLM', query, key, preferred_element_type=dtype
  )


def _grouped(x_BHLM, groups):
  """Splits the axis of heads into groups, `[B, G, R, L, M]`."""
  batch, heads, *rest = x_BHLM.shape
  if heads == 1:
    return x_BHLM[:, :, None]
  return x_BHLM.reshape(batch, groups, heads // groups, *rest)


def _seen(places, queries, keys):
  """Returns which key blocks each query block may see, first, and how many."""
  query_span = _span(places.query_position, queries)
  key_span = _span(places.key_position, keys)
  may_see = places.mask.may_see(query_span, key_span)
  shape = query_span.low.shape[0], key_span.low.shape[0]
  may_see = jnp.broadcast_to(may_see, shape)
  order = jnp.argsort(~may_see, axis=1, stable=True).astype(jnp.int32)
  return order, may_see.sum(axis=1, dtype=jnp.int32)


def _span(position, size):
  blocks = position.reshape(position.shape[0], -1, size)
  return Span(blocks.min(axis=(0, 2)), blocks.max(axis=(0, 2)))


def _row_by_row(function, plan, total, operands, *more):
  """Applies a function of operands and more to all rows of the batch.

  On CPUs it gets a few rows at a time, so that scores stay in the cache.
  Elsewhere it gets all at once, and rows may be spread over devices. It returns
  arrays `[B, ...]` and what is to be added to `total`.
  """
  at_once = functools.partial(function, plan)
  rows = _rows_at_once(plan, operands)
  if rows == operands.value.shape[0]:
    return at_once(operands, *more)
  return jax.lax.platform_dependent(
    operands,
    *more,
    cpu=functools.partial(_in_turns, plan, total, rows, at_once),
    default=at_once,
  )


def _rows_at_once(plan, operands):
  """Returns how many rows of the batch have at most `SCORES` scores."""
  batch, _, groups, repeats = operands.queries[0].shape[:4]
  scores = groups * repeats * plan.queries * plan.keys
  fitting = max(SCORES // scores, 1)
  return max(n for n in range(1, batch + 1) if batch % n == 0 and n <= fitting)


def _in_turns(plan, total, rows, function, operands, *more):
  """Applies a function to a few rows after the other."""
  batch, blocks = operands.value.shape[:2]
  queries = 0, plan.queries * operands.queries[0].shape[1]
  keys = 0, plan.keys * blocks

  def turn(total, start):
    tile = Tile((start, rows), queries, keys)
    part, new = function(*(_rows(a, tile) for a in (operands, *more)))
    if total is not None:
      total = operands.bias.add(total, new, tile)
    return total, part

  starts = jnp.arange(0, batch, rows, dtype=jnp.int32)
  total, parts = jax.lax.scan(turn, total, starts)
  whole = jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), parts)
  return whole, total


def _rows(argument, tile):
  """Returns some rows of operands, places or arrays `[B, ...]`."""
  first = lambda x: cut(x, 0, tile.rows)
  match argument:
    case Places():
      return argument.block(tile)
    case Operands(queries, keys, value, bias):
      bias = None if bias is None else bias.block(tile)
      return Operands(*jax.tree.map(first, (queries, keys, value)), bias)
  return jax.tree.map(first, argument)


def _zeros(tree):
  """Returns what gradients of a tree are added to."""
  zero = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
  return jax.tree.map(zero, tree)


class _Running(NamedTuple):
  """Sums over the keys seen so far, with weights `exp(logit - maximum)`."""

  maximum: Array
  total: Array
  mean: Array  # of values, not yet divided
  first: Array | None  # sums of (logit - maximum) and its square
  second: Array | None
  squares: Array | None  # of the weights


def _start(shape, width, dtype, statistics):
  zeros = jnp.zeros(shape, dtype)
  sums = (zeros,) * 3 if statistics else (None,) * 3
  lowest = jnp.full(shape, jnp.finfo(dtype).min, dtype)
  return _Running(lowest, zeros, jnp.zeros((*shape, width), dtype), *sums)


def _add_keys(running, logits, is_visible, value):
  """Adds one block of keys."""
  lowest = jnp.finfo(logits.dtype).min
  logits = jnp.where(is_visible, logits, lowest)
  maximum = jnp.maximum(running.maximum, logits.max(axis=-1))
  # Where nothing was seen yet, 0 instead of the lowest number makes the
  # exponentials of what is masked 0 rather than 1.
  base = jnp.where(maximum == lowest, 0, maximum)
  relative = logits - base[..., None]
  weights = jnp.exp(relative)
  shrink = jnp.exp(running.maximum - base)
  weighted = jnp.einsum(
    'BGRLM,BGMV->BGRLV',
    weights.astype(value.dtype),
    value,
    preferred_element_type=logits.dtype,
  )
  moments = None, None, None
  if running.first is not None:
    relative = jnp.where(is_visible, relative, 0)
    shift = jnp.where(running.total > 0, running.maximum - base, 0)
    first = running.first + shift * running.total
    second = running.second + shift * (running.first + first)
    moments = (
      shrink * first + (weights * relative).sum(axis=-1),
      shrink * second + (weights * relative**2).sum(axis=-1),
      shrink**2 * running.squares + (weights**2).sum(axis=-1),
    )
  return _Running(
    maximum,
    running.total * shrink + weights.sum(axis=-1),
    running.mean * shrink[..., None] + weighted,
    *moments,
  )


def _add_weighted_keys(running, scores, value, weight):
  """Adds one block of keys, each weight a function of its score."""
  weights = jnp.where(scores.is_visible, weight(scores.logits), 0)
  weighted = jnp.einsum(
    'BGRLM,BGMV->BGRLV',
    weights.astype(value.dtype),
    value,
    preferred_element_type=running.mean.dtype,
  )
  seen = scores.is_visible.any(axis=-1)
  return running._replace(
    total=jnp.where(seen, 1, running.total),
    maximum=jnp.where(seen, 0, running.maximum),
    mean=running.mean + weighted,
  )


def _finish(running):
  """Divides sums by the sum of weights."""
  sees_any = running.total > 0
  total = jnp.where(sees_any, running.total, 1)
  summary = Attended(
    running.mean / total[..., None],
    jnp.where(sees_any, running.maximum + jnp.log(total), -jnp.inf),
  )
  if running.first is None:
    return summary
  mean = running.first / total
  squares = jnp.where(sees_any, running.squares, 1)
  return summary._replace(
    entropy=jnp.log(total) - mean,
    effective_support=jnp.where(sees_any, total**2 / squares, 0),
    variance=jnp.maximum(running.second / total - mean**2, 0),
  )


def _forward(plan, operands, places):
  """Returns a summary, arrays `[B, n, G, R, L, ...]`, and no gradient."""
  queries, keys, value, bias = operands
  order, count = _seen(places, plan.queries, plan.keys)
  dtype = jnp.promote_types(value.dtype, jnp.float32)
  batch, blocks, *shape, _ = queries[0].shape

  def query_block(i):
    own = tuple(query[:, i] for query in queries)

    def add(n, running):
      j = order[i, n]
      others = tuple(key[:, j] for key in keys)
      tile = _tile(plan, i, j)
      scores = _scores(plan, own, others, bias, places, tile)
      if plan.weight is not None:
        return _add_weighted_keys(running, scores, value[:, j], plan.weight)
      return _add_keys(running, scores.logits, scores.is_visible, value[:, j])

    start = _start((batch, *shape), value.shape[-1], dtype, plan.statistics)
    return _finish(jax.lax.fori_loop(0, count[i], add, start))

  summary = jax.lax.map(query_block, jnp.arange(blocks))
  return jax.tree.map(lambda x: x.swapaxes(0, 1), summary), None


def summary_of(plan: Plan, operands: Operands, places: Places) -> Attended:
  """Attends in blocks, `[B, n, G, R, L, ...]`; has no rules for gradients.

  Source: see the module.

  Args:
    plan: from `plan_of`, like the operands.
    operands: queries, keys, values and bias.
    places: mask and positions, padded to whole blocks.
  """
  return _row_by_row(_forward, plan, None, operands, places)[0]


def gradients_of(
  plan: Plan,
  operands: Operands,
  places: Places,
  summary: Attended,
  cotangent: Attended,
) -> tuple[tuple[Any, Any, Array], Any]:
  """Returns gradients of queries, keys and values, and that of the bias.

  The summary may be that of more keys than these: gradients are then those of
  these keys within the whole.

  Source: see the module.

  Args:
    plan: from `plan_of`, like the operands.
    operands: queries, keys, values and bias.
    places: mask and positions, padded to whole blocks.
    summary: what attending gave.
    cotangent: of the summary.
  """
  total = _zeros(operands.bias)
  return _row_by_row(
    _backward, plan, total, operands, places, summary, cotangent
  )


def _attend_fwd(plan, operands, places):
  # Not `_attend`: the rules themselves can then be differentiated forward.
  summary = summary_of(plan, operands, places)
  return summary, (operands, places, summary)


def _attend_bwd(plan, residuals, cotangent):
  operands, places, summary = residuals
  (queries, keys, value), bias = gradients_of(
    plan, operands, places, summary, cotangent
  )
  as_given = lambda new, old: new.astype(old.dtype)
  gradient = Operands(queries, keys, value, bias)
  return jax.tree.map(as_given, gradient, operands), None


class _RowTerms(NamedTuple):
  """Coefficients per query: `d_logit = p (d_p + polynomial of logit and p)`."""

  base: Array  # logarithm of the normaliser, or 0
  offset: Array
  mean: Array | None = None  # of the logits
  linear: Array | None = None  # of logit - mean
  quadratic: Array | None = None
  of_weight: Array | None = None


def _row_terms(plan, summary, cotangent):
  """Gathers what the gradient of a score needs of its row."""
  sees_any = summary.log_normalizer > -jnp.inf
  base = jnp.where(sees_any, summary.log_normalizer, 0)
  offset = cotangent.log_normalizer - jnp.sum(
    cotangent.out * summary.out, axis=-1
  )
  if not plan.statistics:
    return _RowTerms(base, jnp.where(sees_any, offset, 0))
  support, d_support = summary.effective_support, cotangent.effective_support
  offset += 2 * d_support * support - cotangent.variance * summary.variance
  return _RowTerms(
    base,
    jnp.where(sees_any, offset, 0),
    mean=base - summary.entropy,
    linear=2 * cotangent.variance - cotangent.entropy,
    quadratic=cotangent.variance,
    of_weight=-2 * d_support * support**2,
  )


def _score_gradients(scores, terms, d_weights, weight):
  """Returns the weights, computed again, and the gradients of the scores."""
  if weight is not None:
    weights, pull = jax.vjp(weight, scores.logits)
    visible = lambda x: jnp.where(scores.is_visible, x, 0)
    return visible(weights), visible(*pull(d_weights))
  lowest = jnp.finfo(scores.logits.dtype).min
  logits = jnp.where(scores.is_visible, scores.logits, lowest)
  terms = jax.tree.map(lambda x: x[..., None], terms)
  weights = jnp.exp(logits - terms.base)
  slope = d_weights + terms.offset
  if terms.mean is not None:
    centred = jnp.where(scores.is_visible, logits - terms.mean, 0)
    slope += (terms.linear + terms.quadratic * centred) * centred
    slope += terms.of_weight * weights
  return weights, weights * slope


def _backward(plan, operands, places, summary, cotangent):
  """Computes the weights again, block by block, and sums their gradients."""
  queries, keys, value, bias = operands
  order, count = _seen(places, plan.queries, plan.keys)
  dtype = summary.out.dtype
  terms = _row_terms(plan, summary, cotangent)

  def query_block(carry, i):
    own, row = jax.tree.map(lambda x: x[:, i], (queries, terms))
    d_row = cotangent.out[:, i].astype(value.dtype)

    def add(n, carry):
      j = order[i, n]
      d_own, d_keys, d_value, d_bias = carry
      others = tuple(key[:, j] for key in keys)
      tile = _tile(plan, i, j)
      scores = _scores(plan, own, others, bias, places, tile)
      weights, d_logits = _score_gradients(
        scores, row, _products(d_row, value[:, j]), plan.weight
      )
      d_value = d_value.at[:, j].add(
        _sum_rows(weights.astype(value.dtype), d_row, dtype)
      )
      new_own, new_keys = _branch_gradients(d_logits, scores, own, others)
      if bias is not None:
        _, pull = jax.vjp(
          lambda *x: _bias(*x, places.block(tile)),
          bias.block(tile),
          own[0],
          others[0],
        )
        d_block, of_query, of_key = pull(d_logits)
        d_bias = bias.add(d_bias, d_block, tile)
        new_own[0] += of_query
        new_keys[0] += of_key
      d_own = tuple(a + b for a, b in zip(d_own, new_own, strict=True))
      d_keys = tuple(
        total.at[:, j].add(new)
        for total, new in zip(d_keys, new_keys, strict=True)
      )
      return d_own, d_keys, d_value, d_bias

    start = _zeros(own), *carry
    d_own, *carry = jax.lax.fori_loop(0, count[i], add, start)
    return tuple(carry), d_own

  (d_keys, d_value, d_bias), d_queries = jax.lax.scan(
    query_block,
    (_zeros(keys), _zeros(value), _zeros(bias)),
    jnp.arange(queries[0].shape[1]),
  )
  d_queries = jax.tree.map(lambda x: x.swapaxes(0, 1), d_queries)
  return (d_queries, d_keys, d_value), d_bias


def _branch_gradients(d_logits, scores, queries, keys):
  """Gives each branch the gradient of the scores that it made."""
  dtype = d_logits.dtype
  d_queries, d_keys = [], []
  for part, query, key in zip(
    _shares(d_logits, scores.holds), queries, keys, strict=True
  ):
    part = part.astype(query.dtype)
    d_queries.append(
      jnp.einsum('BGRLM,BGMK->BGRLK', part, key, preferred_element_type=dtype)
    )
    d_keys.append(_sum_rows(part, query, dtype))
  return d_queries, d_keys


def _shares(d_logits, holds):
  """Splits gradients of scores by the branch that made them."""
  shares = []
  for hold in reversed(holds):
    shares.append(jnp.where(hold, d_logits, 0))
    d_logits = jnp.where(hold, 0, d_logits)
  return d_logits, *reversed(shares)


def _sum_rows(weights, rows, dtype):
  """Sums rows by weight over queries and the heads that share a key head."""
  return jnp.einsum(
    'BGRLM,BGRLV->BGMV', weights, rows, preferred_element_type=dtype
  )


_attend = jax.custom_vjp(summary_of, nondiff_argnums=(0,))
_attend.defvjp(_attend_fwd, _attend_bwd)
