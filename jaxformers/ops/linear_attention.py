"""Attention without a softmax: a memory of constant size, read by queries."""

from collections.abc import Callable
import functools
import math
from typing import Literal, NamedTuple, get_args

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from jaxformers.ops import segments
from jaxformers.ops.activations import elu_plus_one
from jaxformers.ops.positions import NoPosition
from jaxformers.ops.positions import PositionScheme
from jaxformers.ops.recurrence import Method
from jaxformers.ops.recurrence import Recurred
from jaxformers.ops.recurrence import decay_weights
from jaxformers.ops.recurrence import decays_in_segments
from jaxformers.ops.recurrence import outer_recurrence
from jaxformers.ops.recurrence.devices import mirrored
from jaxformers.ops.recurrence.devices import positions
from jaxformers.ops.recurrence.outer_chunks import precision_of

Stabilise = Literal['none', 'decay', 'scores']


class LinearMemory(NamedTuple):
  """What linear attention remembers of the tokens it has read.

  Attributes:
    outer_BHKV: sum of `phi(k) v^T`, keys turned to their positions.
    total_BHK: sum of `phi(k)`, never turned; None without normaliser.
  """

  outer_BHKV: Float[Array, 'B H K V']
  total_BHK: Float[Array, 'B H K'] | None


class LinearAttended(NamedTuple):
  """What linear attention returns.

  Attributes:
    out: `[B, L, H, V]`, in the dtype of the values.
    last: the memory after the last token, in at least float32; None if not
      causal.
  """

  out: Float[Array, 'B L H V']
  last: LinearMemory | None


def linear_attention(
  query_BLHK: Float[Array, 'B L H K'],
  key_BLHK: Float[Array, 'B L H K'],
  value_BLHV: Float[Array, 'B L H V'],
  initial: LinearMemory | None = None,
  *,
  feature: Callable[[Array], Array] = elu_plus_one,
  normalize: bool = True,
  eps: float = 1e-10,
  position: PositionScheme = NoPosition(),
  places: segments.Places | None = None,
  causal: bool = True,
  method: Method = 'auto',
  chunk: int | None = None,
  axis_name: str | None = None,
) -> LinearAttended:
  """Weighs values by products of features, not by their exponentials.

  `o_i = sum_j (phi(q_i) . phi(k_j)) v_j / (sum_j phi(q_i) . phi(k_j) + eps)`,
  in time linear in the length. Positions turn the features in the numerator
  only: turned ones may have negative products, whose sum could vanish.

  Source: Katharopoulos et al., "Transformers are RNNs", 2020, arXiv 2006.16236,
  equations 5 to 12; positions: Su et al., "RoFormer", 2021, arXiv 2104.09864,
  equation 19.

  Args:
    query_BLHK: queries.
    key_BLHK: keys.
    value_BLHV: values.
    initial: memory of earlier tokens; None for none. Causal attention only.
    feature: phi, elementwise. With a normaliser it must not be negative.
    normalize: whether to divide by the sum of weights.
    eps: added to that sum.
    position: a scheme that turns queries and keys each by itself.
    places: where the tokens stand, from `jaxformers.ops.segments`; None for one
      segment, which after `initial` goes on if there is one.
    causal: whether tokens see no later ones.
    method: see `outer_recurrence`, like what follows.
    chunk: tokens per chunk.
    axis_name: of the mesh axis along which tokens are split.

  Returns:
    Output and memory. What comes out at padding is finite, but has no meaning.

  Raises:
    ValueError: if shapes do not fit, the scheme of positions needs pairs of
      queries and keys, or positions are needed and `places` is missing.
  """
  _check_memory(initial, causal, normalize)
  needed = position.compares_positions
  position_BL = _positions(key_BLHK, places, initial, needed, axis_name)
  query, key = feature(query_BLHK), _tokens_only(feature(key_BLHK), places)
  value = _tokens_only(value_BLHV, places)
  turned_query, turned_key = _turned(query, key, position, position_BL)
  initial = LinearMemory(None, None) if initial is None else initial
  recur = functools.partial(
    _recur_forth if causal else _recur_both_ways,
    places=places,
    method=method,
    chunk=chunk,
    axis_name=axis_name,
  )
  out, outer_BHKV = recur(turned_query, turned_key, value, initial.outer_BHKV)
  total_BHK = None
  if normalize:
    ones_BLH1 = jnp.ones((*value.shape[:3], 1), value.dtype)
    begin = initial.total_BHK
    begin = None if begin is None else begin[..., None]
    weight_BLH1, total_BHK1 = recur(query, key, ones_BLH1, begin)
    out = out / (weight_BLH1 + eps)
    total_BHK = total_BHK1[..., 0]
  return LinearAttended(
    out.astype(value_BLHV.dtype),
    LinearMemory(outer_BHKV, total_BHK) if causal else None,
  )


def retention_log_decay(heads: int) -> Float[np.ndarray, ' H']:
  """Returns the logarithms of RetNet's decays, `1 - 2^(-5-h)` for head h.

  Source: Sun et al., "Retentive Network", 2023, arXiv 2307.08621, equation 8.

  Args:
    heads: number H of heads, which remember longer and longer.

  Returns:
    float64 `[H]`, on the host.
  """
  return np.log1p(-(2.0 ** (-5 - np.arange(heads))))


def retention(
  query_BLHK: Float[Array, 'B L H K'],
  key_BLHK: Float[Array, 'B L H K'],
  value_BLHV: Float[Array, 'B L H V'],
  initial_BHKV: Float[Array, 'B H K V'] | None = None,
  *,
  log_decay_H: Float[Array, ' H'] | None = None,
  scale: float | None = None,
  position: PositionScheme = NoPosition(),
  places: segments.Places | None = None,
  stabilise: Stabilise = 'none',
  method: Method = 'auto',
  chunk: int | None = None,
  axis_name: str | None = None,
) -> Recurred:
  """Weighs values by scores that decay with the distance.

  `o_i = sum_(j <= i) g^(i-j) scale (q_i . k_j) v_j`, with one decay g per head.

  Retention is meant to be followed by a norm of each head's output, in which
  any factor per row cancels but for the norm's eps. RetNet has two such factors
  in its parallel form, against large numbers: it divides the decays of a row by
  the root of their sum, and then the scores by the sum of their absolute values
  (between 1 and 5e4, without gradient). A state can know the first sum but not
  the second.

  Source: Sun et al., "Retentive Network", 2023, arXiv 2307.08621, equations 5
  to 8 and section 2.2 ("Retention Score Normalization").

  Args:
    query_BLHK: queries.
    key_BLHK: keys.
    value_BLHV: values.
    initial_BHKV: state that earlier tokens left; None for none.
    log_decay_H: logarithm of g, at most 0; None for `retention_log_decay`.
    scale: multiplier of the scores; None for `K^(-1/2)`.
    position: a scheme that turns queries and keys each by itself.
    places: where the tokens stand, from `jaxformers.ops.segments`; None for one
      segment, which after `initial_BHKV` goes on if there is one.
    stabilise: `'decay'` divides by the first factor, `'scores'` by both, which
      needs all keys at once: `method='parallel'` and no initial state.
    method: see `outer_recurrence`, like what follows.
    chunk: tokens per chunk.
    axis_name: of the mesh axis along which tokens are split.

  Returns:
    Output in the dtype of the values, and last state in at least float32.

  Raises:
    ValueError: if shapes do not fit, options exclude each other, or positions
      are needed and `places` is missing.
  """
  _check_stabilise(stabilise, method, initial_BHKV, axis_name)
  heads, width = key_BLHK.shape[2:]
  needed = position.compares_positions or stabilise != 'none'
  position_BL = _positions(key_BLHK, places, initial_BHKV, needed, axis_name)
  if log_decay_H is None:
    log_decay_H = retention_log_decay(heads)
  log_decay_BLH = decays_in_segments(log_decay_H, places)
  query, key = _turned(query_BLHK, key_BLHK, position, position_BL)
  key = key * (1 / math.sqrt(width) if scale is None else scale)
  key, value = _tokens_only(key, places), _tokens_only(value_BLHV, places)
  out, last_BHKV = outer_recurrence(
    query,
    key,
    value,
    log_decay_BLH,
    initial_BHKV,
    method=method,
    chunk=chunk,
    axis_name=axis_name,
  )
  if stabilise != 'none':
    root_BLH = jnp.sqrt(_sum_of_decays(position_BL, log_decay_H))
    if stabilise == 'scores':
      sum_BLH = _sum_of_scores(query, key, log_decay_BLH) / root_BLH
      root_BLH *= jax.lax.stop_gradient(jnp.clip(sum_BLH, 1, 5e4))
    out = out / root_BLH[..., None]
  return Recurred(out.astype(value_BLHV.dtype), last_BHKV)


def _recur_forth(query, key, value, initial, *, places, **options):
  """Lets each token see those before it, in its segment."""
  log_decay = decays_in_segments(jnp.zeros(1), places)
  return outer_recurrence(query, key, value, log_decay, initial, **options)


def _recur_both_ways(query, key, value, initial, *, places, **options):
  """Lets each token see all of its segment."""
  axis_name = options['axis_name']
  if places is None:
    arrays = query, key, value
    dtype = jnp.result_type(*arrays, jnp.float32)
    dot = functools.partial(jnp.einsum, precision=precision_of(*arrays))
    query, key, value = (x.astype(dtype) for x in arrays)
    all_BHKV = dot('BLHK,BLHV->BHKV', key, value)
    if axis_name is not None:
      all_BHKV = jax.lax.psum(all_BHKV, axis_name)
    return Recurred(dot('BLHK,BHKV->BLHV', query, all_BHKV), all_BHKV)
  forth, last = _recur_forth(
    query, key, value, initial, places=places, **options
  )
  back, _ = _recur_forth(
    *(mirrored(axis_name, x) for x in (query, key, value)),
    None,
    places=_back_places(places, axis_name),
    **options,
  )
  # Both ways a token has seen itself.
  own = jnp.sum(query.astype(back.dtype) * key, axis=-1, keepdims=True) * value
  return Recurred(forth + mirrored(axis_name, back) - own, last)


def _back_places(places, axis_name):
  """Returns the places of rows that are read from their ends."""
  number_BL = mirrored(axis_name, places.number_BL)
  begin, length = segments.start(number_BL.shape[0]), number_BL.shape[1]
  if axis_name is None:
    return segments.advance(begin, number_BL)[0]
  number_BM = jax.lax.all_gather(number_BL, axis_name, axis=1, tiled=True)
  whole, _ = segments.advance(begin, number_BM)
  start = length * jax.lax.axis_index(axis_name)
  return jax.tree.map(
    lambda x_BM: jax.lax.dynamic_slice_in_dim(x_BM, start, length, axis=1),
    whole,
  )


def _tokens_only(x_BLHK, places):
  """Sets padding, which may hold anything, to zero."""
  if places is None:
    return x_BLHK
  return jnp.where(places.number_BL[..., None, None] == 0, 0, x_BLHK)


def _positions(key_BLHK, places, initial, needed, axis_name):
  """Returns positions `[B or 1, L]`."""
  if places is not None:
    return places.position_BL
  if needed and initial is not None:
    raise ValueError(
      'positions are needed and do not begin at 0 after an initial state; pass '
      'places, as jaxformers.ops.segments.advance gives them.'
    )
  return positions(axis_name, key_BLHK.shape[1])[None]


def _turned(query, key, position, position_BL):
  """Returns queries and keys, each turned to its own position."""
  stored = position.store(key, position_BL)
  branches = position.branches(query, stored, position_BL, position_BL)
  if len(branches) != 1:
    raise ValueError(
      f'{position} needs each pair of a query and a key, which linear attention '
      'never forms; choose a scheme that turns both by themselves, as Rotary.'
    )
  return branches[0].query, branches[0].key


def _sum_of_decays(position_BL, log_decay_H):
  """Returns `1 + g + ... + g^position`, `[B, L, H]`."""
  # Padding may have position -1.
  count_BL1 = jnp.maximum(position_BL, 0)[..., None] + 1
  log_decay_H = jnp.asarray(log_decay_H)
  decays = log_decay_H < 0
  safe_H = jnp.where(decays, log_decay_H, -1)
  sum_BLH = jnp.expm1(count_BL1 * safe_H) / jnp.expm1(safe_H)
  return jnp.where(decays, sum_BLH, count_BL1)


def _sum_of_scores(query_BLHK, key_BLHK, log_decay):
  """Returns the sum of the absolute values of decayed scores, `[B, L, H]`."""
  length = key_BLHK.shape[1]
  if jnp.ndim(log_decay) == 1:
    log_decay = jnp.broadcast_to(log_decay, (1, length, len(log_decay)))
  weights_BHLM, _ = decay_weights(log_decay.swapaxes(1, 2))
  scores_BHLM = jnp.einsum(
    'BLHK,BMHK->BHLM',
    query_BLHK,
    key_BLHK,
    precision=precision_of(query_BLHK, key_BLHK),
    preferred_element_type=jnp.result_type(query_BLHK, jnp.float32),
  )
  return jnp.sum(jnp.abs(scores_BHLM) * weights_BHLM, axis=-1).swapaxes(1, 2)


def _check_memory(initial, causal, normalize):
  if initial is None:
    return
  if not causal:
    raise ValueError(
      'attention that is not causal sees tokens that come later, so there is '
      'no memory of earlier ones to start from; leave initial=None.'
    )
  if normalize and initial.total_BHK is None:
    raise ValueError(
      'the initial memory was made with normalize=False and knows no sum of '
      'keys; use normalize=False again, or start without memory.'
    )


def _check_stabilise(stabilise, method, initial_BHKV, axis_name):
  if stabilise not in get_args(Stabilise):
    raise ValueError(
      f'unknown stabilise={stabilise!r}; choose one of '
      f'{", ".join(get_args(Stabilise))}.'
    )
  parallel = method == 'parallel' and initial_BHKV is None
  parallel = parallel and axis_name is None
  if stabilise == 'scores' and not parallel:
    raise ValueError(
      "stabilise='scores' needs all keys at once; use method='parallel' on whole "
      "sequences without an initial state, or stabilise='decay', which a state "
      'can carry.'
    )
