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

import functools
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxformers.ops.masks import Mask
from jaxformers.ops.masks import Span
from jaxformers.ops.positions import Branch


class Plan(NamedTuple):
  """What is known while tracing; hashable.

  Attributes:
    queries: queries per block.
    keys: keys per block.
    key_count: number of keys before padding.
    regions: the region of each branch.
  """

  queries: int
  keys: int
  key_count: int
  regions: tuple[Any, ...]


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


class Summary(NamedTuple):
  """Attention over some keys, with what is needed to add others.

  Attributes:
    out: `[B, L, H, V]` in at least float32; 0 for a query that saw nothing.
    log_normalizer: `[B, L, H]`; -inf for a query that saw nothing.
  """

  out: Float[Array, 'B L H V']
  log_normalizer: Float[Array, 'B L H']


def attend_blockwise(
  branches: tuple[Branch, ...],
  value_BMGV: Float[Array, 'B M G V'],
  places: Places,
  block: int,
) -> Summary:
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
  """
  length, heads = branches[0].query.shape[1:3]
  keys, groups = value_BMGV.shape[1:3]
  plan = Plan(
    min(block, length),
    min(block, keys),
    keys,
    tuple(branch.region for branch in branches),
  )
  queries = tuple(_query_blocks(b.query, groups, plan) for b in branches)
  key_blocks = tuple(_key_blocks(b.key, plan) for b in branches)
  places = _padded(places, plan)
  out, log_normalizer = _attend(
    plan, queries, key_blocks, _key_blocks(value_BMGV, plan), places
  )
  shape = value_BMGV.shape[0], -1, heads, value_BMGV.shape[3]
  # [n, B, G, R, L, V] -> [B, n L, G R, V]
  out = out.transpose(1, 0, 4, 2, 3, 5).reshape(shape)[:, :length]
  log_normalizer = log_normalizer.transpose(1, 0, 4, 2, 3).reshape(shape[:3])
  return Summary(out, log_normalizer[:, :length])


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
  plan = Plan(length, min(block, keys), keys, ())
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
  """Returns `[n, B, G, R, L, K]`."""
  batch, length, heads, width = query_BLHK.shape
  query = _pad_axis(query_BLHK, 1, plan.queries)
  blocks = query.reshape(
    batch, -1, plan.queries, groups, heads // groups, width
  )
  return blocks.transpose(1, 0, 3, 4, 2, 5)


def _key_blocks(key_BMGK, plan):
  """Returns `[n, B, G, M, K]`."""
  batch, _, groups, width = key_BMGK.shape
  key = _pad_axis(key_BMGK, 1, plan.keys)
  blocks = key.reshape(batch, -1, plan.keys, groups, width)
  return blocks.transpose(1, 0, 3, 2, 4)


def _padded(places, plan):
  return Places(
    places.mask.padded(plan.queries, plan.keys),
    _pad_axis(places.query_position, 1, plan.queries),
    _pad_axis(places.key_position, 1, plan.keys),
  )


def _pad_axis(x, axis, multiple):
  padding = [(0, 0)] * x.ndim
  padding[axis] = 0, -x.shape[axis] % multiple
  return jnp.pad(x, padding, mode='edge') if padding[axis][1] else x


class _Tile(NamedTuple):
  """Scores of one block of queries against one block of keys."""

  logits: Array  # [B, G, R, L, M]
  is_visible: Array  # broadcast to it
  holds: tuple[Array, ...]  # where each later branch holds


def _tile(plan, queries, keys, places, i, j):
  """Computes scores of query blocks `queries` and key blocks `keys`."""
  query_position, key_position = _positions(plan, places, i, j)
  is_visible = _visible(plan, places, i, j)
  groups = keys[0].shape[1]
  logits = _products(queries[0], keys[0])
  holds = []
  for query, key, region in zip(
    queries[1:], keys[1:], plan.regions[1:], strict=True
  ):
    hold = _grouped(region(query_position, key_position), groups)
    logits = jnp.where(hold, _products(query, key), logits)
    holds.append(hold)
  return _Tile(logits, _grouped(is_visible, groups), tuple(holds))


def _positions(plan, places, i, j):
  cut = functools.partial(jax.lax.dynamic_slice_in_dim, axis=1)
  return (
    cut(places.query_position, i * plan.queries, plan.queries),
    cut(places.key_position, j * plan.keys, plan.keys),
  )


def _visible(plan, places, i, j):
  """Returns which keys of block j the queries of block i see."""
  mask = places.mask.block(
    i * plan.queries, plan.queries, j * plan.keys, plan.keys
  )
  is_visible = mask.visible(*_positions(plan, places, i, j))
  if plan.key_count % plan.keys:  # The last block is filled up.
    index = j * plan.keys + jnp.arange(plan.keys)
    is_visible &= index < plan.key_count
  return is_visible


def _products(query, key):
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  return jnp.einsum(
    'BGRLK,BGMK->BGRLM', query, key, preferred_element_type=dtype
  )


def _grouped(is_visible_BHLM, groups):
  """Splits the axis of heads into groups, `[B, G, R, L, M]`."""
  batch, heads, *rest = is_visible_BHLM.shape
  if heads == 1:
    return is_visible_BHLM[:, :, None]
  return is_visible_BHLM.reshape(batch, groups, heads // groups, *rest)


def _seen(places, queries, keys):
  """Returns first and one past the last key block that each block may see."""
  query_span = _span(places.query_position, queries)
  key_span = _span(places.key_position, keys)
  may_see = places.mask.may_see(query_span, key_span)
  count = key_span.low.shape[0]
  may_see = jnp.broadcast_to(may_see, (query_span.low.shape[0], count))
  first = jnp.argmax(may_see, axis=1)
  last = count - jnp.argmax(may_see[:, ::-1], axis=1)
  seen = may_see.any(axis=1)
  bounds = jnp.where(seen, first, 0), jnp.where(seen, last, 0)
  return tuple(bound.astype(jnp.int32) for bound in bounds)


def _span(position, size):
  blocks = position.reshape(position.shape[0], -1, size)
  return Span(blocks.min(axis=(0, 2)), blocks.max(axis=(0, 2)))


def _forward(plan, queries, keys, value, places):
  """Returns out `[n, B, G, R, L, V]` and log-normaliser `[n, B, G, R, L]`."""
  first, last = _seen(places, plan.queries, plan.keys)
  dtype = jnp.promote_types(value.dtype, jnp.float32)
  shape = queries[0].shape[1:-1]
  lowest = jnp.finfo(dtype).min

  def query_block(i):
    own = tuple(query[i] for query in queries)

    def add(j, carry):
      maximum, total, mean = carry
      tile = _tile(plan, own, tuple(k[j] for k in keys), places, i, j)
      logits = jnp.where(tile.is_visible, tile.logits, lowest)
      new = jnp.maximum(maximum, logits.max(axis=-1))
      # Where nothing was seen yet, 0 instead of the lowest number makes the
      # exponentials of what is masked 0 rather than 1.
      base = jnp.where(new == lowest, 0, new)
      powers = jnp.exp(logits - base[..., None])
      shrink = jnp.exp(maximum - base)
      weighted = jnp.einsum(
        'BGRLM,BGMV->BGRLV',
        powers.astype(value.dtype),
        value[j],
        preferred_element_type=dtype,
      )
      total = total * shrink + powers.sum(axis=-1)
      return new, total, mean * shrink[..., None] + weighted

    carry = (
      jnp.full(shape, lowest, dtype),
      jnp.zeros(shape, dtype),
      jnp.zeros((*shape, value.shape[-1]), dtype),
    )
    maximum, total, mean = jax.lax.fori_loop(first[i], last[i], add, carry)
    sees_any = total > 0
    safe = jnp.where(sees_any, total, 1)
    log_normalizer = jnp.where(sees_any, maximum + jnp.log(safe), -jnp.inf)
    return mean / safe[..., None], log_normalizer

  return jax.lax.map(query_block, jnp.arange(queries[0].shape[0]))


def _attend_fwd(plan, queries, keys, value, places):
  # Not `_attend`: the rules themselves can then be differentiated forward.
  out, log_normalizer = _forward(plan, queries, keys, value, places)
  return (out, log_normalizer), (
    queries,
    keys,
    value,
    places,
    out,
    log_normalizer,
  )


def _attend_bwd(plan, residuals, cotangents):
  """Computes the weights again, block by block, and sums their gradients."""
  queries, keys, value, places, out, log_normalizer = residuals
  d_out, d_log = cotangents
  first, last = _seen(places, plan.queries, plan.keys)
  dtype = out.dtype
  lowest = jnp.finfo(dtype).min
  # d logits = p (d_out . v - d_out . out + d_log): the last two are per row.
  offset = d_log - jnp.sum(d_out * out, axis=-1)
  sees_any = log_normalizer > -jnp.inf
  base = jnp.where(sees_any, log_normalizer, 0)
  offset = jnp.where(sees_any, offset, 0)

  def query_block(carry, i):
    own = tuple(query[i] for query in queries)

    def add(j, carry):
      d_own, d_keys, d_value = carry
      others = tuple(key[j] for key in keys)
      tile = _tile(plan, own, others, places, i, j)
      logits = jnp.where(tile.is_visible, tile.logits, lowest)
      weights = jnp.exp(logits - base[i][..., None])
      d_row = d_out[i].astype(value.dtype)
      d_value = d_value.at[j].add(
        _sum_rows(weights.astype(value.dtype), d_row, dtype)
      )
      d_weights = jnp.einsum(
        'BGRLV,BGMV->BGRLM', d_row, value[j], preferred_element_type=dtype
      )
      d_logits = weights * (d_weights + offset[i][..., None])
      new_own, new_keys = [], []
      for part, d_query, d_key, query, key in zip(
        _shares(d_logits, tile.holds), d_own, d_keys, own, others, strict=True
      ):
        part = part.astype(query.dtype)
        new_own.append(
          d_query
          + jnp.einsum(
            'BGRLM,BGMK->BGRLK', part, key, preferred_element_type=dtype
          )
        )
        new_keys.append(d_key.at[j].add(_sum_rows(part, query, dtype)))
      return tuple(new_own), tuple(new_keys), d_value

    d_keys, d_value = carry
    d_own = tuple(jnp.zeros(query.shape, dtype) for query in own)
    d_own, d_keys, d_value = jax.lax.fori_loop(
      first[i], last[i], add, (d_own, d_keys, d_value)
    )
    return (d_keys, d_value), d_own

  zeros = tuple(jnp.zeros(key.shape, dtype) for key in keys)
  carry = zeros, jnp.zeros(value.shape, dtype)
  (d_keys, d_value), d_queries = jax.lax.scan(
    query_block, carry, jnp.arange(queries[0].shape[0])
  )
  as_given = lambda new, old: new.astype(old.dtype)
  return (
    jax.tree.map(as_given, d_queries, queries),
    jax.tree.map(as_given, d_keys, keys),
    as_given(d_value, value),
    None,
  )


def _sum_rows(weights, rows, dtype):
  """Sums rows by weight over queries and the heads that share a key head."""
  return jnp.einsum(
    'BGRLM,BGRLV->BGMV', weights, rows, preferred_element_type=dtype
  )


def _shares(d_logits, holds):
  """Gives each branch the gradient of the scores that it made."""
  shares = []
  for hold in reversed(holds):
    shares.append(jnp.where(hold, d_logits, 0))
    d_logits = jnp.where(hold, 0, d_logits)
  return d_logits, *reversed(shares)


_attend = jax.custom_vjp(_forward, nondiff_argnums=(0,))
_attend.defvjp(_attend_fwd, _attend_bwd)
