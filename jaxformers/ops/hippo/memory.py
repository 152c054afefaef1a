"""A memory of fixed size goes through sequences."""

import functools
from typing import Literal, NamedTuple, get_args

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Inexact, Real

from jaxformers.ops.hippo.dynamics import ConstantDynamics
from jaxformers.ops.hippo.dynamics import Dynamics
from jaxformers.ops.hippo.times import cut_times
from jaxformers.ops.hippo.times import find_times
from jaxformers.ops.hippo.times import in_chunks
from jaxformers.ops.recurrence.varying import varying_alike
from jaxformers.ops.segments import Places

CHUNK = 16
"""Samples per chunk, where nothing else is said."""

MemoryMethod = Literal['chunked', 'sequential', 'associative']


class MemoryState(NamedTuple):
  """A memory after some samples.

  Attributes:
    x_BSD: coefficients of each channel, in at least float32.
    elapsed_B: how many samples a row has seen, int32; or the time of the last.
  """

  x_BSD: Inexact[Array, 'B S D']
  elapsed_B: Real[Array, ' B']


class Memorized(NamedTuple):
  """What `hippo_memory` returns.

  Attributes:
    out: `[B, L, S, D]`, the coefficients after each sample; with a readout `[B,
      L, D]`, what it reads from them.
    last: the state after the last sample.
  """

  out: Inexact[Array, 'B L ...']
  last: MemoryState


def hippo_memory(
  u_BLD: Float[Array, 'B L D'],
  dynamics: Dynamics,
  initial: MemoryState | None = None,
  *,
  places: Places | None = None,
  times_BL: Float[Array, 'B L'] | None = None,
  readout_SD: Inexact[Array, 'S D'] | None = None,
  method: MemoryMethod = 'chunked',
  chunk: int | None = None,
) -> Memorized:
  """Writes samples into a memory, each channel into its own.

  All methods compute the same. `'chunked'` adds up what the samples of a chunk
  write by one matrix product, and what was there before by another:
  `O(L (S + C) S D)` in L / C turns. `'sequential'` goes step by step, `O(L S^2
  D)`; `'associative'`, for exact LegS, joins neighbours in a tree. The chunked
  form of LegS has no recursion within chunks, so it also rounds least.

  Only states between chunks are kept for the backward pass. What depends on
  times alone is shared by all channels and built in the dtype of the states,
  which `legs_change` makes as good as building it in float64: there are no
  tables, and no largest length. (hippo-code's table ends at 1024 steps, after
  which its LegS turns silently into exponential forgetting.)

  Source: Gu et al., "HiPPO", 2020, arXiv 2008.07669; in chunks: the projection
  of a step function, Su Jianlin, 2024, kexue.fm/archives/10114; the tree:
  Blelloch, "Prefix Sums and Their Applications", 1990, section 1.4, on (m, n,
  b), as a product of LegS transitions from m to n is the one from m to n.

  Args:
    u_BLD: samples, each held from the time of the last one to its own.
    dynamics: `ExactLegS`, `ConstantDynamics`, or step by step alone
      `ApproximateLegS` and `SteppedFouS`.
    initial: state before the first sample; None for nothing seen.
    places: of packed or padded samples: where a segment begins its memory is
      empty; padding leaves it alone. None for one segment.
    times_BL: for LegS, when samples end: rising and above 0, counted from the
      start of their segment; None for 1, 2, 3, ...
    readout_SD: if given, each channel's states are read by it on the way, and
      not kept.
    method: see above.
    chunk: C, samples per chunk; None for `CHUNK`, or for `'associative'` all.

  Returns:
    All states or what was read, and the last state.

  Raises:
    ValueError: if shapes do not fit, or dynamics cannot do what is asked.
  """
  _check(u_BLD, dynamics, initial, places, times_BL)
  _check_method(dynamics, method, chunk, times_BL)
  batch, length, width = u_BLD.shape
  dtype = jnp.result_type(u_BLD, dynamics.dtype)
  chunk = chunk or (length if method == 'associative' else CHUNK)
  chunk = min(chunk, length)
  elapsed_B = None if initial is None else initial.elapsed_B
  if initial is None:
    x_BSD = jnp.zeros((batch, dynamics.size, width), dtype)
  else:
    x_BSD = initial.x_BSD.astype(dtype)
  times = find_times((batch, length), elapsed_B, places, times_BL)
  u_BLD = jnp.where(times.is_token_BC[..., None], u_BLD, 0).astype(dtype)
  x_BSD, times, u_BLD = varying_alike((x_BSD, times, u_BLD))
  go = {'chunked': _products, 'sequential': _steps, 'associative': _tree}[
    method
  ]

  # What a chunk holds is computed again backward: only states are kept.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def body(x_BSD, inputs):
    states_BCSD = go(dynamics, *inputs, x_BSD)
    out = states_BCSD
    if readout_SD is not None:
      read_SD = readout_SD.astype(dtype)
      out = jnp.einsum('BCSD,SD->BCD', out, read_SD, precision='highest')
    return states_BCSD[:, -1], out

  x_BSD, out = jax.lax.scan(
    body, x_BSD, (cut_times(times, chunk), in_chunks(u_BLD, chunk))
  )
  out = jnp.moveaxis(out, 0, 1)
  out = out.reshape(batch, -1, *out.shape[3:])[:, :length]
  elapsed_B = jnp.broadcast_to(times.until_BC[:, -1], (batch,))
  return Memorized(out, MemoryState(x_BSD, elapsed_B))


def _products(dynamics, chunk, u_BCD, x_BSD):
  """Returns the states of a chunk by two matrix products."""
  return dynamics.carried(chunk, x_BSD) + dynamics.within(chunk, u_BCD)


def _steps(dynamics, chunk, u_BCD, x_BSD):
  """Returns the states of a chunk, one after the other."""
  to_steps = lambda tree: jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tree)
  last = lambda x_B: x_B[:, None, None]

  def step(x_BSD, inputs):
    is_token_B, begins_B, step, u_BD = inputs
    x_BSD = jnp.where(last(begins_B), 0, x_BSD)
    next_BSD = dynamics.step(step, x_BSD, u_BD)
    x_BSD = jnp.where(last(is_token_B), next_BSD, x_BSD)
    return x_BSD, x_BSD

  steps = dynamics.steps(chunk, x_BSD.dtype)
  inputs = chunk.is_token_BC, chunk.begins_BC, steps, u_BCD
  _, states = jax.lax.scan(step, x_BSD, to_steps(inputs))
  return jnp.moveaxis(states, 0, 1)


def _tree(dynamics, chunk, u_BCD, x_BSD):
  """Returns the states of a chunk by joining neighbours in a tree."""
  gain_BCS = dynamics.steps(chunk, x_BSD.dtype).gain_S
  elements = (
    chunk.since_BC,
    chunk.until_BC,
    gain_BCS[..., None] * u_BCD[:, :, None],
  )
  *_, states_BCSD = jax.lax.associative_scan(dynamics.joined, elements, axis=1)
  return dynamics.carried(chunk, x_BSD) + states_BCSD


def _check(u_BLD, dynamics, initial, places, times_BL):
  """Raises unless the arrays fit together."""
  if u_BLD.ndim != 3 or u_BLD.shape[1] < 1:
    raise ValueError(
      'a memory needs samples [B, L, D] with at least one step, got shape '
      f'{list(u_BLD.shape)}.'
    )
  batch, length, width = u_BLD.shape
  state = batch, dynamics.size, width
  if initial is not None and initial.x_BSD.shape != state:
    raise ValueError(
      f'the initial state must have shape {list(state)}, got '
      f'{list(initial.x_BSD.shape)}.'
    )
  for name, given in (
    ('times_BL', times_BL),
    ('places', places and places.number_BL),
  ):
    if given is not None and given.shape != (batch, length):
      raise ValueError(
        f'{name} must have shape {[batch, length]}, got {list(given.shape)}.'
      )


def _check_method(dynamics, method, chunk, times_BL):
  """Raises unless the dynamics can do what is asked."""
  if method not in get_args(MemoryMethod):
    raise ValueError(
      f'unknown method {method!r}; choose one of '
      f'{", ".join(get_args(MemoryMethod))}.'
    )
  if chunk is not None and chunk < 1:
    raise ValueError(f'chunks need at least 1 sample, got chunk={chunk}.')
  needed = {'chunked': 'within', 'associative': 'joined'}.get(method)
  name = type(dynamics).__name__
  if needed is not None and not hasattr(dynamics, needed):
    raise ValueError(
      f"{name} cannot go by method={method!r}; take 'sequential', or ExactLegS."
    )
  if times_BL is not None and isinstance(dynamics, ConstantDynamics):
    raise ValueError(
      'the steps of ConstantDynamics are all alike, so it takes no times; '
      'ExactLegS does.'
    )
