"""The recurrence of a matrix that outer products are written into."""

import functools
from typing import Literal, NamedTuple, get_args

from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from jaxformers.ops.recurrence import decay
from jaxformers.ops.recurrence import outer_chunks
from jaxformers.ops.recurrence.devices import entering
from jaxformers.ops.recurrence.devices import last_of_all
from jaxformers.ops.recurrence.outer_chunks import Steps
from jaxformers.ops.recurrence.platform import by_platform
from jaxformers.ops.recurrence.varying import varying_alike

Method = Literal['auto', 'chunked', 'parallel_chunks', 'recurrent', 'parallel']


class Recurred(NamedTuple):
  """What a recurrence with a matrix for a state returns.

  Attributes:
    out: `[B, L, H, V]`, what was read at each step.
    last: `[B, H, K, V]` in at least float32, the state after the last step.
  """

  out: Float[Array, 'B L H V']
  last: Float[Array, 'B H K V']


def outer_recurrence(
  query_BLGK: Float[Array, 'B L G K'],
  key_BLGK: Float[Array, 'B L G K'],
  value_BLHV: Float[Array, 'B L H V'],
  log_decay: Float[Array, '...'] | None = None,
  initial_BHKV: Float[Array, 'B H K V'] | None = None,
  *,
  bonus_HK: Float[Array, 'H K'] | None = None,
  method: Method = 'auto',
  chunk: int | None = None,
  axis_name: str | None = None,
) -> Recurred:
  """Writes outer products into a decaying matrix, and reads from it.

  `S_i = diag(a_i) S_(i-1) + k_i v_i^T`, per head, where a is one number per head
  or one per channel of its keys. Without a bonus steps read after they write,
  `o_i = S_i^T q_i`; with a bonus u before, except for their own,
  `o_i = (S_(i-1) + diag(u) k_i v_i^T)^T q_i`.

  All methods compute the same. `'chunked'` reads what was written within a chunk
  by a masked matrix product, and what came before from the state between chunks:
  time `O(L (C + K) V)` in matrix products. It goes from chunk to chunk and keeps
  for the backward pass only states between them, `O(L / C K V)` numbers per
  head, besides inputs and output. `'parallel_chunks'` works on all chunks at
  once but for the states between them, with as many numbers in flight as all
  chunks have scores. `'parallel'` is a single chunk, time `O(L^2 (K + V))`;
  `'recurrent'` goes step by step, time `O(L K V)`. `'auto'` is `'chunked'` on
  CPUs and `'parallel_chunks'` elsewhere: of the platform that the program is
  compiled for.

  With `axis_name` each device finds what its share of the steps writes and how
  much it leaves of the state before it. All get these of all, in two gathers as
  small as states, and find the state before their own share.

  Sums run in float32, or float64 for float64 inputs, and so do products, unless
  queries, keys or values have fewer bits themselves. Exponents are sums that are
  never positive, so nothing overflows or cancels, however long the sequence and
  however small the decays.

  Source: Katharopoulos et al., "Transformers are RNNs", 2020, arXiv 2006.16236,
  section 3.4 (no decay); Sun et al., "Retentive Network", 2023, arXiv
  2307.08621, equations 5 to 7 (constant decay); Dao and Gu, "Transformers are
  SSMs", 2024, arXiv 2405.21060, section 6 (any decay, in chunks); Yang et al.,
  "Gated Linear Attention Transformers", 2023, arXiv 2312.06635, section 4
  (decay per channel); Peng et al., "Eagle and Finch", 2024, arXiv 2404.05892,
  equations 7 and 19 (bonus).

  Args:
    query_BLGK: what is looked for. G divides H: each head h reads with query,
      and writes with key, number `h // (H / G)`.
    key_BLGK: where values are written.
    value_BLHV: what is written.
    log_decay: natural logarithm of a, at most 0: one per head `[H]` or per
      channel `[H, K]` if it is constant, or one per step and head `[B, L, H]` or
      channel `[B, L, H, K]`, whose axes may have size 1. None for 0.
      With -inf a step forgets all before it, and reads nothing of it even if it
      reads before it writes: as the first token of a packed document must. A
      step with key 0 and a logarithm of 0 leaves the state alone, as padding
      must.
    initial_BHKV: state before the first step; None for 0.
    bonus_HK: u; None to read after writing.
    method: see above.
    chunk: C, tokens per chunk, rounded up to a power of 2 (for `'recurrent'`,
      between states that are kept); None for `chunk_length` of the method.
    axis_name: of the mesh axis along which steps are split, in equal,
      consecutive shares, within `jax.shard_map`; what has no steps is the same
      on all devices, and so is the last state. None if they are not split.

  Returns:
    Output and last state, in at least float32.

  Raises:
    ValueError: if shapes do not fit, or method or chunk make no sense.
  """
  _check(query_BLGK, key_BLGK, value_BLHV, log_decay, initial_BHKV, bonus_HK)
  _check_method(method, chunk)
  arrays = query_BLGK, key_BLGK, value_BLHV
  dtype = jnp.result_type(*arrays, jnp.float32)
  log_decay = _per_step(log_decay, key_BLGK.shape[1], dtype)
  if initial_BHKV is None:
    initial_BHKV = _zero_state(key_BLGK, value_BLHV, dtype)
  initial_BHKV = initial_BHKV.astype(dtype)
  steps = Steps(*arrays, log_decay)
  if axis_name is not None:
    initial_BHKV = _entering(axis_name, initial_BHKV, steps)
  out, last_BHKV = _run(
    method, chunk, bonus_HK is not None, initial_BHKV, steps
  )
  if bonus_HK is not None:
    out += _own(*(x.astype(dtype) for x in arrays), bonus_HK)
  return Recurred(out, last_of_all(axis_name, last_BHKV))


def chunk_length(method: Method, *, per_channel: bool, length: int) -> int:
  """Returns the tokens per chunk that are taken where nothing is said.

  Source: none; our measurements (`experiments/benchmarks/matrix_states.py`),
  and what fills the matrix units of accelerators.

  Args:
    method: see `outer_recurrence`.
    per_channel: whether decays are.
    length: of the sequence.
  """
  match method:
    case 'parallel':
      return length
    case 'parallel_chunks':
      return 64 if per_channel else 128
  return 32 if per_channel else 64


def _run(method, chunk, before, state, steps):
  """Runs by a method."""

  def by(method):
    size = _chunk_length(method, chunk, steps)
    return functools.partial(RUNS[method], before, size)

  arrays = varying_alike((state, steps))
  methods = {'cpu': 'chunked', 'elsewhere': 'parallel_chunks'}
  return by_platform(method, by, *arrays, **methods)


def _entering(axis_name, initial_BHKV, steps):
  """Returns the state before the share of this device."""
  zero_BHKV, steps = varying_alike((jnp.zeros_like(initial_BHKV), steps))
  size = _chunk_length('chunked', None, steps)
  kept, written_BHKV = outer_chunks.summary(size, zero_BHKV, steps)
  return entering(axis_name, kept, written_BHKV, initial_BHKV)


def _own(query, key, value, bonus_HK):
  """Returns what steps read of themselves by the bonus."""
  repeats = value.shape[2] // query.shape[2]
  product_BLHK = jnp.repeat(query * key, repeats, axis=2)
  own_BLH = jnp.sum(product_BLHK * bonus_HK, axis=-1)
  return own_BLH[..., None] * value


def _zero_state(key, value, dtype):
  batch, _, _, width = key.shape
  return jnp.zeros((batch, value.shape[2], width, value.shape[3]), dtype)


def _per_step(log_decay, length, dtype):
  """Returns `[B, L, H, K]`; all axes but L may have size 1."""
  log_decay = jnp.zeros(1) if log_decay is None else jnp.asarray(log_decay)
  if log_decay.ndim in (1, 3):
    log_decay = log_decay[..., None]
  if log_decay.ndim == 2:
    log_decay = log_decay[None, None]
  batch, _, *rest = log_decay.shape
  return jnp.broadcast_to(log_decay, (batch, length, *rest)).astype(dtype)


def _chunk_length(method, chunk, steps):
  """Returns C: a power of 2 where steps within chunks are multiplied."""
  length = steps.value.shape[1]
  if chunk is None:
    per_channel = steps.log_decay.shape[-1] > 1
    chunk = chunk_length(method, per_channel=per_channel, length=length)
  chunk = min(chunk, length)
  return chunk if method == 'recurrent' else decay.power_of_two(chunk)


def _check_method(method, chunk):
  if method not in get_args(Method):
    raise ValueError(
      f'unknown method {method!r}; choose one of {", ".join(get_args(Method))}.'
    )
  if chunk is not None and chunk < 1:
    raise ValueError(f'chunks need at least 1 token, got chunk={chunk}.')
  if chunk is not None and method == 'parallel':
    raise ValueError(
      f"chunk={chunk} given, but 'parallel' has a single chunk; leave "
      "chunk=None or ask for 'chunked'."
    )


def _check(query, key, value, log_decay, initial, bonus):
  """Raises unless the arrays fit together."""
  shapes = f'query {query.shape}, key {key.shape}, value {value.shape}'
  if not query.ndim == key.ndim == value.ndim == 4:
    raise ValueError(
      f'a recurrence needs arrays [B, length, heads, width]: {shapes}.'
    )
  batch, length, groups, width = key.shape
  heads = value.shape[2]
  if query.shape != key.shape or key.shape[:2] != value.shape[:2]:
    raise ValueError(
      'queries and keys must have equal shapes, and values must agree with '
      f'them in batch and length: {shapes}.'
    )
  if groups < 1 or heads % groups:
    raise ValueError(
      'values must have as many heads as queries and keys, or a multiple: '
      f'{shapes}.'
    )
  if length < 1:
    raise ValueError(f'a recurrence needs at least one token: {shapes}.')
  _check_decay((batch, length, heads, width), log_decay)
  state = batch, heads, width, value.shape[-1]
  for name, array, shape in (
    ('initial state', initial, state),
    ('bonus', bonus, (heads, width)),
  ):
    if array is not None and array.shape != shape:
      raise ValueError(
        f'the {name} must have shape {list(shape)}, got {list(array.shape)}.'
      )


def _check_decay(full, log_decay):
  """Raises unless there is one decay for each head, channel, step or both."""
  batch, length, heads, width = full
  given = (1,) if log_decay is None else jnp.shape(log_decay)
  allowed = [(heads,), (heads, width), (batch, length, heads), full]
  fits = any(
    len(given) == len(shape)
    and all(n in (1, m) for n, m in zip(given, shape, strict=True))
    for shape in allowed
  )
  if not fits:
    raise ValueError(
      'log_decay must have one of the shapes '
      f'{", ".join(str(list(shape)) for shape in allowed)} (per head, per '
      'channel of the keys, and either of them per step), got '
      f'{list(given)}.'
    )


RUNS = {
  'chunked': outer_chunks.in_turns,
  'parallel_chunks': outer_chunks.at_once,
  'parallel': outer_chunks.in_turns,
  'recurrent': outer_chunks.step_by_step,
}
