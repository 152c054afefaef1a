"""Attention over a sequence that devices share out: keys go round a ring.

Each device keeps its queries. Keys and values visit all devices in turn, each
part is attended to block by block as if it were all there is, and the parts are
merged. The backward pass sends them round again, and with them the sums of their
gradients, which are home after a full round. Memory is that of a device's own
part, whatever the length.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Int, Real

from jaxformers.ops import blockwise
from jaxformers.ops.attention import BLOCK
from jaxformers.ops.attention import problem_of
from jaxformers.ops.blockwise import Attended
from jaxformers.ops.blockwise import Places
from jaxformers.ops.blockwise import Plan
from jaxformers.ops.masks import Mask
from jaxformers.ops.masks import NoMask
from jaxformers.ops.masks import Segments
from jaxformers.ops.partial import merge
from jaxformers.ops.partial import partial_of
from jaxformers.ops.positions import NoPosition
from jaxformers.ops.positions import PositionScheme
from jaxformers.ops.scales import InverseSqrt
from jaxformers.ops.scales import Scale


class _Part(NamedTuple):
  """What goes round: keys of each branch, values, and where they stand."""

  keys: tuple[Array, ...]
  value: Array
  position: Array
  segment: Array | None


class _Own(NamedTuple):
  """What stays."""

  queries: tuple[Array, ...]
  position: Array
  segment: Array | None


class _Ring(NamedTuple):
  """What is known while tracing; hashable."""

  plan: Plan
  mask: Mask
  axis_name: str


def ring_attend(
  query_BLHK: Float[Array, 'B L H K'],
  key_BMGK: Float[Array, 'B M G K'],
  value_BMGV: Float[Array, 'B M G V'],
  *,
  axis_name: str,
  query_position: Real[Array, '... L'],
  key_position: Real[Array, '... M'],
  query_segment: Int[Array, 'B L'] | None = None,
  key_segment: Int[Array, 'B M'] | None = None,
  position: PositionScheme = NoPosition(),
  scale: Scale = InverseSqrt(),
  mask: Mask = NoMask(),
  block: int | None = None,
) -> Float[Array, 'B L H V']:
  """Attends to the keys of all devices along an axis of the mesh.

  To be called inside `jax.shard_map`, each device giving its part of the
  sequence. What it returns, and its gradients, are those of
  `jaxformers.ops.attend` on the whole. Blocks that nobody sees are skipped; with
  a causal mask the last device therefore has the most to do.

  Source: Liu et al., "Ring Attention with Blockwise Transformers", 2023, arXiv
  2310.01889, algorithm 1.

  Args:
    query_BLHK: queries of this device.
    key_BMGK: keys of this device; G must divide H.
    value_BMGV: their values.
    axis_name: axis of the mesh along which the sequence is cut.
    query_position: positions in the whole sequence, `[L]` or `[B, L]`.
    key_position: the same of keys.
    query_segment: segments of the queries; None for a single one.
    key_segment: segments of the keys; None if `query_segment` is.
    position: how positions enter the scores.
    scale: multiplier of the scores; where it counts visible keys it counts
      those of all devices.
    mask: which keys a query sees, by positions alone.
    block: queries and keys per block; None for `jaxformers.ops.BLOCK`.

  Raises:
    ValueError: as `attend`; or if the mask holds arrays, whose keys could not
      go round, or only one of the segments is given.
  """
  if jax.tree.leaves(mask):
    raise ValueError(
      f'{mask} holds arrays for certain keys, which cannot go round a ring; '
      'use a mask that compares positions, and query_segment and key_segment.'
    )
  if (query_segment is None) != (key_segment is None):
    raise ValueError(
      'query_segment and key_segment must be given together, or neither.'
    )
  problem = problem_of(
    query_BLHK,
    key_BMGK,
    value_BMGV,
    position=position,
    scale=scale,
    mask=_masked(mask, query_segment, key_segment),
    query_position=query_position,
    key_position=key_position,
  )
  places = problem.places
  length, heads = query_BLHK.shape[1:3]
  block = min(block or BLOCK, length, key_BMGK.shape[1])

  @functools.cache
  def visible_keys():
    everywhere = functools.partial(
      jax.lax.all_gather, axis_name=axis_name, axis=1, tiled=True
    )
    keys = jax.tree.map(everywhere, (places.key_position, key_segment))
    whole = Places(
      _masked(mask, query_segment, keys[1]), places.query_position, keys[0]
    )
    return blockwise.count_visible(whole, length, keys[0].shape[1], block)

  plan, operands = blockwise.plan_of(
    problem.branches(visible_keys), problem.value, block
  )
  pad = functools.partial(blockwise.pad_axis, axis=1)
  own = _Own(
    operands.queries,
    pad(places.query_position, multiple=plan.queries),
    query_segment,
  )
  part = _Part(
    operands.keys,
    operands.value,
    pad(places.key_position, multiple=plan.keys),
    key_segment,
  )
  summary = _attend(_Ring(plan, mask, axis_name), own, part)
  out = blockwise.rows_of(summary.out, length, heads)
  return out.astype(value_BMGV.dtype)


def _masked(mask, query_segment, key_segment):
  if query_segment is None:
    return mask
  return mask & Segments(query_segment, key_segment)


def _problem(ring, own, part):
  """Returns operands and places of own queries and a part of the keys."""
  mask = _masked(ring.mask, own.segment, part.segment)
  places = Places(
    mask.padded(ring.plan.queries, ring.plan.keys), own.position, part.position
  )
  operands = blockwise.Operands(own.queries, part.keys, part.value, None)
  return operands, places


def _next(ring, tree):
  """Sends a tree to the next device of the ring."""
  size = jax.lax.axis_size(ring.axis_name)
  pairs = [(i, (i + 1) % size) for i in range(size)]
  return jax.tree.map(
    lambda x: jax.lax.ppermute(x, ring.axis_name, pairs), tree
  )


def _forward(ring, own, part):
  """Returns `Attended` in blocks."""

  def attended(part):
    operands, places = _problem(ring, own, part)
    summary = blockwise.summary_of(ring.plan, operands, places)
    return partial_of(summary.out, summary.log_normalizer)

  def turn(_, carry):
    part, total = carry
    part = _next(ring, part)
    return part, merge([total, attended(part)])

  rounds = jax.lax.axis_size(ring.axis_name)
  _, total = jax.lax.fori_loop(1, rounds, turn, (part, attended(part)))
  return Attended(total.out, total.log_normalizer)


def _forward_rule(ring, own, part):
  summary = _forward(ring, own, part)
  return summary, (own, part, summary)


def _backward_rule(ring, residuals, cotangent):
  own, part, summary = residuals

  def gradients(part):
    operands, places = _problem(ring, own, part)
    d_operands, _ = blockwise.gradients_of(
      ring.plan, operands, places, summary, cotangent
    )
    return d_operands[0], d_operands[1:]

  def turn(_, carry):
    part, d_own, d_part = carry
    part, d_part = _next(ring, (part, d_part))
    more_own, more_part = gradients(part)
    add = lambda a, b: jax.tree.map(jnp.add, a, b)
    return part, add(d_own, more_own), add(d_part, more_part)

  rounds = jax.lax.axis_size(ring.axis_name)
  start = part, *gradients(part)
  _, d_own, d_part = jax.lax.fori_loop(1, rounds, turn, start)
  d_keys, d_value = _next(ring, d_part)  # Home after a full round.
  given = lambda new, old: jax.tree.map(
    lambda a, b: a.astype(b.dtype), new, old
  )
  return (
    _Own(given(d_own, own.queries), *_no_gradient(own.position, own.segment)),
    _Part(
      given(d_keys, part.keys),
      given(d_value, part.value),
      *_no_gradient(part.position, part.segment),
    ),
  )


def _no_gradient(*arrays: Any) -> tuple[Any, ...]:
  return (None,) * len(arrays)


_attend = jax.custom_vjp(_forward, nondiff_argnums=(0,))
_attend.defvjp(_forward_rule, _backward_rule)
