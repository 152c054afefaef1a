"""How a recurrence with a matrix for a state goes through its steps.

Everything within a chunk of C steps is `[B, H, C, ...]`. Queries and keys may
have G heads for H heads of values; decays are one number per head, or one per
channel of its keys, and may be the same for all rows or heads.

Each way through the steps takes whether steps read before they write, C, the
state before all steps, and the steps; it returns `[B, L, H, V]` that was read,
and the last state.

Products keep the digits of float32 where queries, keys and values have them: TPUs
round factors to bfloat16 if nothing is said. Where one of the three is bfloat16
itself nothing is said, since its own rounding outweighs theirs. Decays, and sums
over chunks, have at least float32 in any case.
"""

import functools
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from jaxformers.ops.recurrence import decay


class Steps(NamedTuple):
  """What a recurrence is given, and how steps read.

  Attributes:
    query: `[B, L, G, K]`.
    key: `[B, L, G, K]`.
    value: `[B, L, H, V]`.
    log_decay: `[B or 1, L, H or 1, K or 1]`.
  """

  query: Array
  key: Array
  value: Array
  log_decay: Array

  @property
  def precision(self) -> str | None:
    """Of matrix products."""
    return precision_of(self.query, self.key, self.value)


class Chunk(NamedTuple):
  """What a chunk does, whatever the state before it.

  Attributes:
    out: `[B, H, C, V]`, what steps read of what was written within the chunk.
    reader: `[B, H, C, K]`, what they multiply the state before it with.
    kept: `[B or 1, H or 1, K or 1, 1]`, how much of that state the chunk keeps.
    written: `[B, H, K, V]`, what it adds.
  """

  out: Array
  reader: Array
  kept: Array
  written: Array


def precision_of(*arrays: Array) -> str | None:
  """Returns the precision of matrix products of what is made of arrays.

  Source: none; see the head of this file.

  Args:
    *arrays: such as queries, keys and values.
  """
  bits = min(jnp.finfo(x.dtype).bits for x in arrays)
  return 'highest' if bits >= 32 else None


def in_turns(before: bool, chunk: int, state: Array, steps: Steps):
  """Goes from chunk to chunk; keeps for the backward pass only the states."""
  read = functools.partial(jnp.matmul, precision=steps.precision)

  def turn(state, chunk_steps):
    part = _within(before, state.dtype, chunk_steps)
    return part.kept * state + part.written, part.out + read(part.reader, state)

  return _scan(turn, chunk, state, steps)


def at_once(before: bool, chunk: int, state: Array, steps: Steps):
  """Works on all chunks at once, but for the states between them."""
  within = functools.partial(_within, before, state.dtype)
  parts = jax.vmap(jax.checkpoint(within))(_cut(chunk, steps))

  def turn(state, part):
    return part.kept * state + part.written, state

  last, states = jax.lax.scan(turn, state, parts)
  read = jnp.matmul(parts.reader, states, precision=steps.precision)
  return _uncut(parts.out + read, steps), last


def step_by_step(before: bool, chunk: int, state: Array, steps: Steps):
  """Goes from step to step; keeps the states between chunks."""
  dot = functools.partial(jnp.einsum, precision=steps.precision)

  def step(state, inputs):
    query, key, value, log_decay = inputs
    decays = jnp.exp(log_decay)[..., None]
    new_state = decays * state + key[..., :, None] * value[..., None, :]
    is_reset = (log_decay == -jnp.inf)[..., None]
    read = jnp.where(is_reset, 0, state) if before else new_state
    return new_state, dot('BHK,BHKV->BHV', query, read)

  def turn(state, chunk_steps):
    query, key, value, log_decay = _as(state.dtype, chunk_steps)
    repeat = functools.partial(_per_head, value.shape[1])
    chunk_steps = repeat(query), repeat(key), value, log_decay
    steps = [jnp.moveaxis(x, 2, 0) for x in chunk_steps]
    state, out_CBHV = jax.lax.scan(step, state, steps)
    return state, jnp.moveaxis(out_CBHV, 0, 2)

  return _scan(turn, chunk, state, steps)


def summary(chunk: int, state: Array, steps: Steps) -> tuple[Array, Array]:
  """Returns what is left of a state before all steps, and the state after them.

  Args:
    chunk: C.
    state: `[B, H, K, V]` before the steps.
    steps: of which queries do not matter.

  Returns:
    The product of all decays, as `Chunk.kept`; and the state.
  """

  def turn(state, chunk_steps):
    part = _within(False, state.dtype, chunk_steps)
    return part.kept * state + part.written, None

  state, _ = jax.lax.scan(_remat(turn), state, _cut(chunk, steps))
  total = steps.log_decay.astype(state.dtype).sum(axis=1)
  return jnp.exp(total)[..., None], state


def _within(before, dtype, chunk_steps):
  """Returns what a chunk does."""
  dot = functools.partial(jnp.matmul, precision=chunk_steps.precision)
  query, key, value, log_decay = _as(dtype, chunk_steps)
  repeat = functools.partial(_per_head, value.shape[1])
  if log_decay.shape[-1] == 1:
    weights, decays = decay.weigh(log_decay, before=before)
    scores = repeat(dot(query, key.mT)) * weights
    query, key = repeat(query), repeat(key)
  else:
    query, key = repeat(query), repeat(key)
    log_decay = repeat(log_decay)
    scores, decays = decay.score(query, key, log_decay, dot, before=before)
  return Chunk(
    dot(scores, value),
    query * jnp.exp(decays.seen_BHCK),
    jnp.exp(decays.total_BH1K).mT,
    dot((key * jnp.exp(decays.left_BHCK)).mT, value),
  )


def _scan(turn, chunk, state, steps):
  """Takes turns; what a turn holds is computed again for the backward pass."""
  last, out = jax.lax.scan(_remat(turn), state, _cut(chunk, steps))
  return _uncut(out, steps), last


def _remat(turn):
  return jax.checkpoint(turn, prevent_cse=False)


def _cut(chunk, steps):
  """Cuts each `[B, L, H, ...]` into `[n, B, H, C, ...]`, zeros at the end."""

  def cut(x):
    batch, length, heads, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % chunk), (0, 0), (0, 0)))
    x = x.reshape(batch, -1, chunk, heads, width)
    return x.transpose(1, 0, 3, 2, 4)

  return jax.tree.map(cut, steps)


def _uncut(out, steps):
  """Joins `[n, B, H, C, V]` to `[B, L, H, V]`."""
  batch, length, heads, width = steps.value.shape
  out = out.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, width)
  return out[:, :length]


def _as(dtype, steps):
  return jax.tree.map(lambda x: x.astype(dtype), steps)


def _per_head(heads, x):
  """Repeats heads `[B, G, ...]` for the heads of values."""
  return jnp.repeat(x, heads // x.shape[1], axis=1)
