"""Softmax attention as a recurrent network that reads its history again.

Attention with softmax has no state of constant size that a token could be added
to. But it is a recurrent network of quadratic complexity: what it lacks in
memory it can make up for in time. Here are its forms, for study and as
references; `jaxformers.ops.attend` is the one to use.
"""

from collections.abc import Callable, Sequence
import math
from typing import Literal, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxformers.ops.attention import attend_partial
from jaxformers.ops.blockwise import Places
from jaxformers.ops.blockwise import count_visible
from jaxformers.ops.masks import Mask
from jaxformers.ops.masks import NoMask
from jaxformers.ops.partial import Partial
from jaxformers.ops.partial import merge
from jaxformers.ops.positions import NoPosition
from jaxformers.ops.positions import PositionScheme
from jaxformers.ops.scales import ConstantScale
from jaxformers.ops.scales import InverseSqrt
from jaxformers.ops.scales import Scale
from jaxformers.ops.tile import Tile


def attend_newest_first(
  query_BLHK: Float[Array, 'B L H K'],
  key_BLHK: Float[Array, 'B L H K'],
  value_BLHV: Float[Array, 'B L H V'],
  *,
  scale: Scale = InverseSqrt(),
) -> Partial:
  """Attends causally by two running sums per query, from the newest key back.

  `(y, z) <- (y, z) + exp(scale q_i . k_j) (v_j, 1)` for j = i, i-1, ..., 0, and
  y / z in the end. In step t all queries read the key t places back. Written as
  in the article, so large scores overflow; `attend_streaming` does not.

  Source: Su Jianlin, "Attention as an RNN of quadratic complexity", 2024,
  https://kexue.fm/archives/10017.

  Args:
    query_BLHK: queries.
    key_BLHK: keys.
    value_BLHV: values.
    scale: multiplier of the scores.

  Returns:
    y and z, as numerator and denominator of a partial result of maximum 0.
  """
  length, _, width = query_BLHK.shape[1:]
  dtype = jnp.result_type(query_BLHK, key_BLHK, value_BLHV, jnp.float32)
  index_L = jnp.arange(length)
  factor = scale.multiplier(lambda: index_L[None, None] + 1, width)
  factor = jnp.swapaxes(factor * jnp.ones((1, 1, 1), dtype), 1, 2)

  def step(t, sums):
    key, value = (jnp.roll(x, t, axis=1) for x in (key_BLHK, value_BLHV))
    score_BLH = jnp.sum(query_BLHK * key.astype(dtype), axis=-1) * factor
    exists_L1 = (index_L >= t)[:, None]
    weight_BLH = jnp.exp(jnp.where(exists_L1, score_BLH, -jnp.inf))
    return (
      sums[0] + weight_BLH[..., None] * value.astype(dtype),
      sums[1] + weight_BLH,
    )

  zeros = jnp.zeros(value_BLHV.shape, dtype)
  y, z = jax.lax.fori_loop(0, length, step, (zeros, zeros[..., 0]))
  return Partial(y, z, jnp.zeros_like(z))


def attend_streaming(
  query_BLHK: Float[Array, 'B L H K'],
  key_BMGK: Float[Array, 'B M G K'],
  value_BMGV: Float[Array, 'B M G V'],
  *,
  position: PositionScheme = NoPosition(),
  scale: Scale = InverseSqrt(),
  mask: Mask = NoMask(),
) -> Partial:
  """Attends key by key, with a running maximum, sum and weighted sum per query.

  Nothing overflows, and memory is that of the output: `O(L H V)`.

  Source: Milakov and Gimelshein, "Online normalizer calculation for softmax",
  2018, arXiv 1805.02867, algorithm 3; Rabe and Staats, "Self-attention Does Not
  Need O(n^2) Memory", 2021, arXiv 2112.05682, section 2.

  Args:
    query_BLHK: queries.
    key_BMGK: keys; G must divide H.
    value_BMGV: values.
    position: how positions enter the scores.
    scale: multiplier of the scores.
    mask: which keys a query sees.

  Returns:
    The result after all keys, in at least float32.

  Raises:
    ValueError: if positions matter and there are not as many keys as queries.
  """
  batch, length, heads, width = query_BLHK.shape
  keys = key_BMGK.shape[1]
  if length != keys and (
    mask.compares_positions or position.compares_positions
  ):
    raise ValueError(
      f'{length} queries against {keys} keys: their positions are compared, so '
      'there must be as many; use attend to give positions of their own.'
    )
  query_position, key_position = (
    jnp.arange(length)[None],
    jnp.arange(keys)[None],
  )
  places = Places(mask, query_position, key_position)
  # A scale may count all the keys that a query sees, not only the one at hand.
  factor = scale.multiplier(
    lambda: count_visible(places, length, keys, 1), width
  )

  def add(seen, j):
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, j, 1, axis=1)
    new = attend_partial(
      query_BLHK,
      cut(key_BMGK),
      cut(value_BMGV),
      position=position,
      scale=ConstantScale(factor),
      mask=mask.block(Tile(None, (0, length), (j, 1))),
      query_position=query_position,
      key_position=cut(key_position),
      implementation='xla',
    )
    return merge([seen, new]), None

  dtype = jnp.promote_types(value_BMGV.dtype, jnp.float32)
  nothing = _nothing((batch, length, heads), value_BMGV.shape[-1], dtype)
  return jax.lax.scan(add, nothing, jnp.arange(keys))[0]


class TokenLayer(NamedTuple):
  """A layer of a causal model as functions of one token, for `reread`.

  Attributes:
    query: maps `x_D` and its position to `[H, K]`, scaled already.
    key_value: maps `x_D` and its position to `[G, K]` and `[G, V]`; G divides
      H.
    finish: maps `x_D` and what it attended to, `[H, V]`, to the `x_D` of the
      next layer: output projection, residual, feed-forward layer.
  """

  query: Callable[[Array, Array], Array]
  key_value: Callable[[Array, Array], tuple[Array, Array]]
  finish: Callable[[Array, Array], Array]


class Reread(NamedTuple):
  """What `reread` returns.

  Attributes:
    out_D: what the last layer gives.
    reads: int32, how many embeddings have been read.
  """

  out_D: Float[Array, ' D']
  reads: Int[Array, '']


def reread(
  embed: Callable[[Array], Array],
  layers: Sequence[TokenLayer],
  token_L: Int[Array, ' L'],
  position: int | Int[Array, ''],
) -> Reread:
  """Computes what a causal model gives at a position, in constant space.

  Nothing is kept of earlier positions but their tokens. A layer at position i
  computes its inputs at j = i, i-1, ..., 0 one after the other, again and
  again, each time from the tokens. It holds its input and query at i, and the
  running sums of `attend_streaming`: `O(N D)` numbers for N layers, whatever
  the length. The price is `C(i + N, N)` embeddings read
  (`embedding_reads`), so it is for short texts and few layers.

  Source: Su Jianlin, "Attention as an RNN of quadratic complexity", 2024,
  https://kexue.fm/archives/10017.

  Args:
    embed: maps a token to `x_D`.
    layers: from the bottom up. Programs grow linearly with their number.
    token_L: tokens.
    position: i, from 0.

  Returns:
    The output and the number of embeddings read.
  """

  visit = lambda i: Reread(embed(token_L[i]), jnp.int32(1))
  x_D = jax.eval_shape(embed, token_L[0])
  for layer in layers:
    visit, x_D = _stack(layer, visit, x_D)
  return visit(jnp.asarray(position))


def embedding_reads(
  length: int, depth: int, positions: Literal['last', 'all'] = 'last'
) -> int:
  """Counts the embeddings that `reread` reads.

  With L tokens and N layers `C(L + N - 1, N)` for the last position, and
  `C(L + N, N + 1)` for one position after the other.

  Source: none; there are as many falling sequences of N positions up to the
  last.

  Args:
    length: L.
    depth: N.
    positions: whether only the last or all outputs are computed.

  Raises:
    ValueError: if `positions` is neither.
  """
  if positions == 'last':
    return math.comb(length + depth - 1, depth)
  if positions == 'all':
    return math.comb(length + depth, depth + 1)
  raise ValueError(f"positions must be 'last' or 'all', got {positions!r}.")


class _Visit(NamedTuple):
  """What a layer holds while it goes back over the positions."""

  seen: Partial
  query: Array  # at the position of the output
  x: Array  # likewise
  reads: Array


def _stack(layer, below, x_D):
  """Puts a layer on the function that computes its inputs.

  Args:
    layer: the layer.
    below: maps a position to the input there.
    x_D: shape and dtype of an input.

  Returns:
    The function that computes its outputs; their shape and dtype.
  """
  place = jax.eval_shape(lambda: jnp.arange(1)[0])
  query_HK = jax.eval_shape(layer.query, x_D, place)
  _, value_GV = jax.eval_shape(layer.key_value, x_D, place)
  heads, width = query_HK.shape[0], value_GV.shape[-1]
  dtype = jnp.promote_types(value_GV.dtype, jnp.float32)

  def visit(i):
    def step(t, state: _Visit):
      j = i - t
      x, reads = below(j)
      # The newest comes first; it is the one that asks.
      query = jnp.where(t == 0, layer.query(x, j), state.query)
      key, value = layer.key_value(x, j)
      new = attend_partial(
        query[None, None],
        key[None, None],
        value[None, None],
        scale=ConstantScale(1.0),
        implementation='xla',
      )
      return _Visit(
        merge([state.seen, new]),
        query,
        jnp.where(t == 0, x, state.x),
        state.reads + reads,
      )

    begin = _Visit(
      _nothing((1, 1, heads), width, dtype),
      jnp.zeros(query_HK.shape, query_HK.dtype),
      jnp.zeros(x_D.shape, x_D.dtype),
      jnp.int32(0),
    )
    end = jax.lax.fori_loop(0, i + 1, step, begin)
    attended_HV = end.seen.out[0, 0].astype(value_GV.dtype)
    return Reread(layer.finish(end.x, attended_HV), end.reads)

  attended_HV = jax.ShapeDtypeStruct((heads, width), value_GV.dtype)
  return visit, jax.eval_shape(layer.finish, x_D, attended_HV)


def _nothing(shape, width, dtype):
  """Returns the result of queries that have seen no key yet."""
  return Partial(
    jnp.zeros((*shape, width), dtype),
    jnp.zeros(shape, dtype),
    jnp.full(shape, jnp.finfo(dtype).min, dtype),
  )
