"""A gated recurrent cell that writes into a memory and reads all of it."""

import functools
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from jaxformers.ops.hippo.dynamics import Dynamics
from jaxformers.ops.hippo.memory import CHUNK
from jaxformers.ops.hippo.memory import MemoryState
from jaxformers.ops.hippo.times import cut_times
from jaxformers.ops.hippo.times import find_times
from jaxformers.ops.hippo.times import in_chunks
from jaxformers.ops.segments import Places


class HippoRNNWeights(NamedTuple):
  """The recurrent weights of `hippo_rnn`, M memories of S coefficients.

  Source: see `hippo_rnn`.

  Attributes:
    write_EM: what hidden units write.
    gate_SME: what the gate reads.
    candidate_SME: what the candidate reads.
  """

  write_EM: Float[Array, 'E M']
  gate_SME: Float[Array, 'S M E']
  candidate_SME: Float[Array, 'S M E']


class HippoCell(NamedTuple):
  """The cell after some tokens.

  Source: see `hippo_rnn`.

  Attributes:
    h_BE: hidden units.
    memory: of `x_BSM`.
  """

  h_BE: Float[Array, 'B E']
  memory: MemoryState


class HippoRNNOutput(NamedTuple):
  """What `hippo_rnn` returns.

  Source: see `hippo_rnn`.

  Attributes:
    out: `[B, L, E]`, hidden units after each token.
    last: the state after the last.
  """

  out: Float[Array, 'B L E']
  last: HippoCell


def hippo_rnn(
  write_BLM: Float[Array, 'B L M'],
  gate_BLE: Float[Array, 'B L E'],
  candidate_BLE: Float[Array, 'B L E'],
  weights: HippoRNNWeights,
  dynamics: Dynamics,
  initial: HippoCell | None = None,
  *,
  places: Places | None = None,
) -> HippoRNNOutput:
  """Runs the HiPPO-RNN.

  `u = write + h W_write`; the memories m take up u;
  `h+ = (1 - g) h + g tanh(candidate + W_candidate m)` with
  `g = sigmoid(gate + W_gate m)`. Not linear in h, so it goes step by step. States
  between chunks are all that is kept for the backward pass.

  Source: Gu et al., "HiPPO", 2020, arXiv 2008.07669, section 2.4 and figure 2, as
  in https://github.com/HazyResearch/hippo-code, whose table of LegS steps ends
  at 1024, where this has no end.

  Args:
    write_BLM: what the tokens write, bias included.
    gate_BLE: what they give to the gate.
    candidate_BLE: what they give to the candidate.
    weights: the recurrent ones.
    dynamics: of the memories.
    initial: state before the first token; None for zeros.
    places: of packed or padded tokens: where a segment begins all is zero;
      padding leaves all alone. None for one segment.

  Raises:
    ValueError: if shapes do not fit.
  """
  _check(write_BLM, gate_BLE, candidate_BLE, weights, dynamics)
  batch, length, width = gate_BLE.shape
  dtype = jnp.result_type(gate_BLE, jnp.float32)
  if initial is None:
    shape = batch, dynamics.size, write_BLM.shape[2]
    state, elapsed_B = (
      (jnp.zeros((batch, width), dtype), jnp.zeros(shape, dtype)),
      None,
    )
  else:
    state = initial.h_BE.astype(dtype), initial.memory.x_BSD.astype(dtype)
    elapsed_B = initial.memory.elapsed_B
  times = find_times((batch, length), elapsed_B, places, None)
  weights = HippoRNNWeights(*(w.astype(dtype) for w in weights))
  inputs = tuple(
    jnp.where(times.is_token_BC[..., None], x, 0).astype(dtype)
    for x in (write_BLM, gate_BLE, candidate_BLE)
  )
  cell = functools.partial(_cell, weights, dynamics)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def body(state, chunk):
    times, inputs = chunk
    steps = dynamics.steps(times, dtype)
    tokens = times.is_token_BC, times.begins_BC, steps, inputs
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    return jax.lax.scan(cell, state, tokens)

  chunk = min(CHUNK, length)
  cut = cut_times(times, chunk), in_chunks(inputs, chunk)
  (h_BE, x_BSM), out = jax.lax.scan(body, state, cut)
  # [n, C, B, E] -> [B, n C, E]
  out = jnp.moveaxis(out, 2, 0).reshape(batch, -1, width)[:, :length]
  elapsed_B = jnp.broadcast_to(times.until_BC[:, -1], (batch,))
  return HippoRNNOutput(out, HippoCell(h_BE, MemoryState(x_BSM, elapsed_B)))


def _cell(weights, dynamics, state, token):
  """Takes up one token."""
  is_token_B, begins_B, step, (write_BM, gate_BE, candidate_BE) = token
  h_BE, x_BSM = (
    jnp.where(begins_B.reshape(-1, *[1] * (x.ndim - 1)), 0, x) for x in state
  )
  next_BSM = dynamics.step(step, x_BSM, write_BM + h_BE @ weights.write_EM)
  read = lambda w_SME: jnp.einsum('BSM,SME->BE', next_BSM, w_SME)
  gate_BE = jax.nn.sigmoid(gate_BE + read(weights.gate_SME))
  candidate_BE = jnp.tanh(candidate_BE + read(weights.candidate_SME))
  next_BE = h_BE + gate_BE * (candidate_BE - h_BE)
  h_BE = jnp.where(is_token_B[:, None], next_BE, state[0])
  x_BSM = jnp.where(is_token_B[:, None, None], next_BSM, state[1])
  return (h_BE, x_BSM), h_BE


def _check(write_BLM, gate_BLE, candidate_BLE, weights, dynamics):
  """Raises unless the arrays fit together."""
  batch, length, width = gate_BLE.shape
  memories = write_BLM.shape[2]
  read = dynamics.size, memories, width
  fits = (
    length >= 1
    and write_BLM.shape[:2] == (batch, length)
    and candidate_BLE.shape == gate_BLE.shape
    and weights.write_EM.shape == (width, memories)
    and weights.gate_SME.shape == weights.candidate_SME.shape == read
  )
  if not fits:
    raise ValueError(
      f'for {dynamics.size} states, inputs [B, L, M], [B, L, E], [B, L, E] and '
      'weights [E, M], [S, M, E], [S, M, E] are needed with L >= 1, got '
      f'{write_BLM.shape}, {gate_BLE.shape}, {candidate_BLE.shape}; '
      f'{", ".join(str(w.shape) for w in weights)}.'
    )
