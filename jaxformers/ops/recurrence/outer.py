"""The recurrence of a matrix that outer products are written into."""

from typing import Literal, NamedTuple, get_args

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

CHUNK = 64
"""Tokens per chunk, where nothing else is said."""

Method = Literal['chunked', 'recurrent', 'parallel']


class Recurred(NamedTuple):
  """What a recurrence with a matrix for a state returns.

  Attributes:
    out: `[B, L, H, V]`, what was read at each step.
    last: `[B, H, K, V]` in at least float32, the state after the last step.
  """

  out: Float[Array, 'B L H V']
  last: Float[Array, 'B H K V']


def outer_recurrence(
  query_BLHK: Float[Array, 'B L H K'],
  key_BLHK: Float[Array, 'B L H K'],
  value_BLHV: Float[Array, 'B L H V'],
  log_decay: Float[Array, '... H'] | None = None,
  initial_BHKV: Float[Array, 'B H K V'] | None = None,
  *,
  method: Method = 'chunked',
  chunk: int | None = None,
) -> Recurred:
  """Writes outer products into a decaying matrix, and reads from it.

  `S_i = a_i S_(i-1) + k_i v_i^T`, `o_i = S_i^T q_i`, per head. All methods
  compute the same. `'chunked'` reads what was written within a chunk by a masked
  matrix product, and what came before from the state between chunks: time
  `O(L (C + K) V)` in matrix products. `'parallel'` is a single chunk, time
  `O(L^2 (K + V))`; `'recurrent'` goes step by step, time `O(L K V)`.

  States between chunks are all that is kept for the backward pass:
  `O(L / C K V)` numbers per head besides inputs and output. Sums run in
  float32, or float64 for float64 inputs. Exponents are never positive, so
  nothing overflows, however long the sequence.

  Source: Katharopoulos et al., "Transformers are RNNs", 2020, arXiv 2006.16236,
  section 3.4 (no decay); Sun et al., "Retentive Network", 2023, arXiv
  2307.08621, equations 5 to 7 (constant decay); Dao and Gu, "Transformers are
  SSMs", 2024, arXiv 2405.21060, section 6 (any decay, in chunks).

  Args:
    query_BLHK: what is looked for.
    key_BLHK: where values are written.
    value_BLHV: what is written.
    log_decay: natural logarithm of a, at most 0; `[H]` for constant decays,
      `[B, L, H]` for one per step, whose axes may have size 1. None for 0. With
      -inf a step forgets all before it, as the first token of a packed
      document must. A step with key 0 and a logarithm of 0 leaves the state
      alone, as padding must.
    initial_BHKV: state before the first step; None for 0.
    method: see above.
    chunk: C, tokens per chunk (for `'recurrent'`, between states that are
      kept); None for `CHUNK`.

  Returns:
    Output and last state, in at least float32.

  Raises:
    ValueError: if shapes do not fit, or method or chunk make no sense.
  """
  _check(query_BLHK, key_BLHK, value_BLHV, log_decay, initial_BHKV)
  batch, length, heads, width = key_BLHK.shape
  chunk = _chunk_length(method, chunk, length)
  dtype = jnp.result_type(query_BLHK, key_BLHK, value_BLHV, jnp.float32)
  if initial_BHKV is None:
    initial_BHKV = jnp.zeros((batch, heads, width, value_BLHV.shape[-1]), dtype)
  log_decay_BLH = _per_step(log_decay, length, dtype)
  arrays = query_BLHK, key_BLHK, value_BLHV, log_decay_BLH
  # What a chunk holds is computed again backward: only states are kept.
  body = jax.checkpoint(
    _by_steps if method == 'recurrent' else _by_products, prevent_cse=False
  )
  last_BHKV, out = jax.lax.scan(
    body, initial_BHKV.astype(dtype), [_chunks(x, chunk) for x in arrays]
  )
  # [n, B, H, C, V] -> [B, n C, H, V]
  out = out.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, out.shape[-1])
  return Recurred(out[:, :length], last_BHKV)


def decay_weights(
  log_decay_BHC: Float[Array, '*B C'],
) -> tuple[Float[Array, '*B C C'], Float[Array, '*B C']]:
  """Returns how much of each step, and of the state before, a step still sees.

  Entry (i, j) is `a_(j+1) ... a_i` for j <= i and 0 otherwise; the second
  result is `a_0 ... a_i`.

  Source: Dao and Gu, "Transformers are SSMs", 2024, arXiv 2405.21060, section
  3 (1-semiseparable matrices).

  Args:
    log_decay_BHC: logarithms of a, at most 0; -inf forgets all before.
  """
  is_reset = log_decay_BHC == -jnp.inf
  # Steps see each other if no reset lies between: -inf - (-inf) would be nan.
  number = jnp.cumsum(is_reset, axis=-1)
  fall = jnp.cumsum(jnp.where(is_reset, 0, log_decay_BHC), axis=-1)
  length = log_decay_BHC.shape[-1]
  sees = number[..., :, None] == number[..., None, :]
  sees &= jnp.tril(jnp.ones((length, length), bool))
  between = fall[..., :, None] - fall[..., None, :]
  weights = jnp.exp(jnp.where(sees, between, -jnp.inf))
  return weights, jnp.exp(jnp.where(number == 0, fall, -jnp.inf))


def _by_products(state_BHKV, inputs):
  """Goes through a chunk by matrix products."""
  query, key, value, log_decay = (x.astype(state_BHKV.dtype) for x in inputs)
  weights_BHCM, kept_BHC = decay_weights(log_decay)
  scores_BHCM = jnp.einsum('BHCK,BHMK->BHCM', query, key) * weights_BHCM
  out_BHCV = jnp.einsum('BHCM,BHMV->BHCV', scores_BHCM, value)
  out_BHCV += kept_BHC[..., None] * jnp.einsum(
    'BHCK,BHKV->BHCV', query, state_BHKV
  )
  # What the last step sees of the others is what the state keeps of them.
  kept_key = key * weights_BHCM[..., -1, :, None]
  written_BHKV = jnp.einsum('BHCK,BHCV->BHKV', kept_key, value)
  return kept_BHC[..., -1, None, None] * state_BHKV + written_BHKV, out_BHCV


def _by_steps(state_BHKV, inputs):
  """Goes through a chunk step by step."""

  def step(state_BHKV, inputs):
    query_BHK, key_BHK, value_BHV, log_decay_BH = inputs
    written_BHKV = key_BHK[..., :, None] * value_BHV[..., None, :]
    state_BHKV = jnp.exp(log_decay_BH)[..., None, None] * state_BHKV
    state_BHKV += written_BHKV
    return state_BHKV, jnp.einsum('BHK,BHKV->BHV', query_BHK, state_BHKV)

  steps = [jnp.moveaxis(x, 2, 0).astype(state_BHKV.dtype) for x in inputs]
  state_BHKV, out_CBHV = jax.lax.scan(step, state_BHKV, steps)
  return state_BHKV, jnp.moveaxis(out_CBHV, 0, 2)


def _per_step(log_decay, length, dtype):
  """Returns `[B, L, H]`; axes B and H may have size 1."""
  log_decay = jnp.zeros(1) if log_decay is None else jnp.asarray(log_decay)
  if log_decay.ndim == 1:
    log_decay = log_decay[None, None]
  batch, _, heads = log_decay.shape
  return jnp.broadcast_to(log_decay, (batch, length, heads)).astype(dtype)


def _chunks(x_BLH, chunk):
  """Cuts `[B, L, H, ...]` into `[n, B, H, C, ...]`, zeros at the end."""
  batch, length, heads, *rest = x_BLH.shape
  padding = [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x_BLH.ndim - 2)
  x = jnp.pad(x_BLH, padding).reshape(batch, -1, chunk, heads, *rest)
  return x.transpose(1, 0, 3, 2, *range(4, x.ndim))


def _chunk_length(method, chunk, length):
  if method not in get_args(Method):
    raise ValueError(
      f'unknown method {method!r}; choose one of {", ".join(get_args(Method))}.'
    )
  if chunk is not None and chunk < 1:
    raise ValueError(f'chunks need at least 1 token, got chunk={chunk}.')
  if method != 'parallel':
    return min(CHUNK if chunk is None else chunk, length)
  if chunk is not None:
    raise ValueError(
      f"chunk={chunk} given, but 'parallel' has a single chunk; leave "
      "chunk=None or ask for 'chunked'."
    )
  return length


def _check(query, key, value, log_decay, initial):
  """Raises unless the arrays fit together."""
  shapes = f'query {query.shape}, key {key.shape}, value {value.shape}'
  if not query.ndim == key.ndim == value.ndim == 4:
    raise ValueError(
      f'a recurrence needs arrays [B, length, heads, width]: {shapes}.'
    )
  if query.shape != key.shape or key.shape[:3] != value.shape[:3]:
    raise ValueError(
      'queries and keys must have equal shapes, and values must agree with '
      f'them in batch, length and heads: {shapes}.'
    )
  batch, length, heads, width = key.shape
  if length < 1:
    raise ValueError(f'a recurrence needs at least one token: {shapes}.')
  full = batch, length, heads
  given = (heads,) if log_decay is None else jnp.shape(log_decay)
  fits = len(given) in (1, 3) and all(
    n in (1, m) for n, m in zip(given[::-1], full[::-1], strict=False)
  )
  if not fits:
    raise ValueError(
      f'log_decay must have shape [{heads}], one number per head, or '
      f'{list(full)}, one per step, got {list(given)}.'
    )
  state = batch, heads, width, value.shape[-1]
  if initial is not None and initial.shape != state:
    raise ValueError(
      f'the initial state must have shape {list(state)}, got '
      f'{list(initial.shape)}.'
    )
