"""The selective scan as kernels for TPUs, forward and backward."""

import functools
import math
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

NUMBERS = 2**19
"""States that the backward kernel holds at once, times channels: 2 MiB."""
STEPS, LANES = 64, 512
"""Tokens of a block at least, and channels at most, where states allow it."""
ROWS = 8
"""Tokens that are read and written together: the rows of a register."""


class Tokens(NamedTuple):
  """What tokens bring; Z is the batch times the groups, E channels of a group.

  Attributes:
    step_ZLE: t, 0 at padding.
    x_ZLE: input, 0 at padding; with Euler's rule it is times t already.
    b_ZLS: how inputs enter states.
    c_ZLS: how states are read.
    keep_ZL1: 0 where a segment begins, otherwise 1; None for 1.
  """

  step_ZLE: Float[Array, 'Z L E']
  x_ZLE: Float[Array, 'Z L E']
  b_ZLS: Float[Array, 'Z L S']
  c_ZLS: Float[Array, 'Z L S']
  keep_ZL1: Float[Array, 'Z L 1'] | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_selective(
  exact: bool,
  tokens: Tokens,
  a_GSE: Float[Array, 'G S E'],
  initial_ZSE: Float[Array, 'Z S E'],
) -> tuple[Float[Array, 'Z L E'], Float[Array, 'Z S E']]:
  """Runs the recurrence with its states in fast memory.

  Backward, the states of a block are made again from the one before it, which
  is all that is kept; then the block is gone through from its end. Where there
  is no TPU the kernels are interpreted, slowly.

  Source: Gu and Dao, "Mamba", 2023, arXiv 2312.00752, section 3.3.2 and
  appendix D (fused scan, states made again).

  Args:
    exact: whether to hold the input for the step, instead of Euler's rule.
    tokens: float32.
    a_GSE: rates; row z of the tokens has those of group `z % G`.
    initial_ZSE: the state before the first token.

  Returns:
    What is read at each token, and the last state.
  """
  out_ZLE, last_ZSE, _ = _forward(exact, tokens, a_GSE, initial_ZSE)
  return out_ZLE, last_ZSE


def _run_forward(exact, tokens, a_GSE, initial_ZSE):
  out_ZLE, last_ZSE, starts_ZTSE = _forward(exact, tokens, a_GSE, initial_ZSE)
  return (out_ZLE, last_ZSE), (tokens, a_GSE, starts_ZTSE)


def _run_backward(exact, kept, bars):
  return _backward(exact, *kept, *bars)


run_selective.defvjp(_run_forward, _run_backward)


class _Grid(NamedTuple):
  """How the work is cut, in blocks of so many steps and channels.

  Attributes:
    steps: of a block.
    lanes: channels of a block.
    shape: how many blocks of rows, channels and steps there are; those of steps
      are gone through in order.
  """

  steps: int
  lanes: int
  shape: tuple[int, int, int]


def _grid(tokens, a_GSE):
  """Returns blocks of which all states fit into fast memory."""
  rows, length, channels = tokens.x_ZLE.shape
  states = a_GSE.shape[1]
  fill = lambda n, size: math.ceil(n / size) * size
  lanes = max(NUMBERS // (STEPS * states) // 128 * 128, 128)
  lanes = min(lanes, LANES, fill(channels, 128))
  steps = max(NUMBERS // (states * lanes) // ROWS * ROWS, ROWS)
  steps = min(steps, 4 * STEPS, fill(length, ROWS))
  shape = rows, math.ceil(channels / lanes), math.ceil(length / steps)
  return _Grid(steps, lanes, shape)


def _forward(exact, tokens, a_GSE, initial_ZSE):
  """Returns what is read, the last state, and the first of each block."""
  grid = _grid(tokens, a_GSE)
  states = a_GSE.shape[1]
  inputs = _inputs(grid, tokens, a_GSE)
  inputs.append(('state', _filled(initial_ZSE, lanes=grid.lanes)))
  out_ZLE, last_ZSE, starts_ZTSE = _on_tpu(
    functools.partial(_forward_kernel, exact=exact),
    grid,
    inputs,
    outputs=(('channels', 0), ('state', states), ('start', states)),
  )
  _, length, channels = tokens.x_ZLE.shape
  out_ZLE = out_ZLE[:, :length, :channels]
  return out_ZLE, last_ZSE[..., :channels], starts_ZTSE


def _forward_kernel(*refs, exact):
  """Goes through one block; the last state is the current one."""
  from jax.experimental import pallas as pl

  *tokens, a, initial, out, last, start = refs

  @pl.when(pl.program_id(2) == 0)
  def _():
    last[...] = initial[...]

  a_SE = a[0]
  start[0] = last[...]

  def rows(i, state_SE):
    at = pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS)
    read = []
    for token in _each([x[0, at] for x in tokens]):
      state_SE, read_1E = _step(state_SE, token, a_SE, exact)
      read.append(read_1E)
    out[0, at] = jnp.concatenate(read)
    return state_SE

  last[0] = jax.lax.fori_loop(0, out.shape[1] // ROWS, rows, last[0])


def _backward(exact, tokens, a_GSE, starts_ZTSE, out_bar_ZLE, last_bar_ZSE):
  """Returns the gradients of what `run_selective` takes."""
  from jax.experimental.pallas import tpu as pltpu

  grid = _grid(tokens, a_GSE)
  states = a_GSE.shape[1]
  inputs = [
    *_inputs(grid, tokens, a_GSE),
    ('start', starts_ZTSE),
    ('channels', _filled(out_bar_ZLE, grid.steps, grid.lanes)),
    ('state', _filled(last_bar_ZSE, lanes=grid.lanes)),
  ]
  of_channels, of_token, of_state = (
    [(kind, states)] * 2 for kind in ('channels', 'token_bar', 'state')
  )
  *bars_ZLE, b_bar, c_bar, a_bar_ZSE, initial_bar_ZSE = _on_tpu(
    functools.partial(_backward_kernel, exact=exact),
    grid,
    inputs,
    outputs=(*of_channels, *of_token, *of_state),
    scratch=[pltpu.VMEM((grid.steps, states, grid.lanes), jnp.float32)],
    down=True,
  )
  _, length, channels = tokens.x_ZLE.shape
  tokens_bar = Tokens(
    *(x_ZLE[:, :length, :channels] for x_ZLE in bars_ZLE),
    *(x_TZLS.sum(axis=0)[:, :length] for x_TZLS in (b_bar, c_bar)),
    jax.tree.map(jnp.zeros_like, tokens.keep_ZL1),
  )
  a_bar_BGSE = a_bar_ZSE.reshape(-1, len(a_GSE), *a_bar_ZSE.shape[1:])
  a_bar_GSE = a_bar_BGSE.sum(axis=0)[..., :channels]
  return tokens_bar, a_bar_GSE, initial_bar_ZSE[..., :channels]


def _backward_kernel(*refs, exact):
  """Goes through one block and back; gradients of states and rates add up."""
  from jax.experimental import pallas as pl

  *tokens, a, start, out_bar, last_bar = refs[:-7]
  *token_bars, a_bar, state_bar, before = refs[-7:]
  turns = before.shape[0] // ROWS

  @pl.when(pl.program_id(2) == 0)
  def _():
    a_bar[...] = jnp.zeros_like(a_bar)
    state_bar[...] = last_bar[...]

  a_SE = a[0]

  def again(i, state_SE):
    at = pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS)
    for row, token in enumerate(_each([x[0, at] for x in tokens])):
      before[i * ROWS + row] = state_SE
      state_SE, _ = _step(state_SE, token, a_SE, exact)
    return state_SE

  jax.lax.fori_loop(0, turns, again, start[0, 0])

  def rows(i, carry):
    index = turns - 1 - i
    at = pl.ds(pl.multiple_of(index * ROWS, ROWS), ROWS)
    each = list(_each([*(x[0, at] for x in tokens), out_bar[0, at]]))
    bars = [None] * ROWS
    for row in reversed(range(ROWS)):
      *token, read_bar = each[row]
      state_bar_SE, a_bar_SE = carry

      def step(state_SE, moving, a_SE, fixed=token[4:]):
        return _step(state_SE, [*moving, *fixed], a_SE, exact)

      state_SE = before[index * ROWS + row]
      _, pull = jax.vjp(step, state_SE, token[:4], a_SE)
      state_bar_SE, bars[row], more_SE = pull((state_bar_SE, read_bar))
      carry = state_bar_SE, a_bar_SE + more_SE
    for ref, bar in zip(token_bars, zip(*bars, strict=True), strict=True):
      ref[(*[0] * (len(ref.shape) - 2), at)] = jnp.concatenate(bar)
    return carry

  carry = jax.lax.fori_loop(0, turns, rows, (state_bar[0], a_bar[0]))
  state_bar[0], a_bar[0] = carry


def _step(state_SE, token, a_SE, exact):
  """Returns the state after a token, and what is read; all are matrices."""
  step_1E, x_1E, b_1S, c_1S, *keep_11 = token
  exponent_SE = step_1E * a_SE
  decay_SE = jnp.exp(exponent_SE)
  write_SE = b_1S.T * x_1E
  if exact:
    is_zero = a_SE == 0
    # expm1, which kernels do not have.
    grown_SE = jnp.tanh(exponent_SE / 2) * (decay_SE + 1)
    integral_SE = grown_SE / jnp.where(is_zero, 1, a_SE)
    write_SE *= jnp.where(is_zero, step_1E, integral_SE)
  for keep in keep_11:
    decay_SE *= keep
  state_SE = decay_SE * state_SE + write_SE
  return state_SE, (c_1S.T * state_SE).sum(axis=0, keepdims=True)


def _each(arrays):
  """Returns the arrays row by row."""
  for row in range(ROWS):
    yield [x[row : row + 1] for x in arrays]


def _inputs(grid, tokens, a_GSE):
  """Returns kinds and arrays, filled up with what leaves states alone."""
  step, x, b, c, keep = tokens
  inputs = [
    ('channels', _filled(step, grid.steps, grid.lanes)),
    ('channels', _filled(x, grid.steps, grid.lanes)),
    ('token', _filled(b, grid.steps)),
    ('token', _filled(c, grid.steps)),
  ]
  if keep is not None:
    inputs.append(('token', _filled(keep, grid.steps, value=1)))
  return [*inputs, ('rates', _filled(a_GSE, lanes=grid.lanes))]


def _filled(x, rows=1, lanes=1, value=0):
  """Fills the last two axes up to multiples."""
  pads = [(0, 0)] * (x.ndim - 2)
  pads += [(0, -x.shape[-2] % rows), (0, -x.shape[-1] % lanes)]
  return jnp.pad(x, pads, constant_values=value)


def _on_tpu(kernel, grid, inputs, *, outputs, scratch=(), down=False):
  """Runs a kernel, or what it would do where there is no TPU."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  rows, parts, count = grid.shape
  steps, lanes = grid.steps, grid.lanes
  kinds, arrays = zip(*inputs, strict=True)
  groups = len(arrays[kinds.index('rates')])
  at = lambda t: count - 1 - t if down else t

  def block(kind, size):
    shape, index = {
      'channels': ((1, steps, lanes), lambda z, e, t: (z, at(t), e)),
      'token': ((1, steps, size), lambda z, e, t: (z, at(t), 0)),
      'token_bar': ((1, 1, steps, size), lambda z, e, t: (e, z, at(t), 0)),
      'state': ((1, size, lanes), lambda z, e, t: (z, 0, e)),
      'rates': ((1, size, lanes), lambda z, e, t: (z % groups, 0, e)),
      'start': ((1, 1, size, lanes), lambda z, e, t: (z, at(t), 0, e)),
    }[kind]
    return pl.BlockSpec(shape, index)

  def whole(kind, size):
    return {
      'channels': (rows, count * steps, parts * lanes),
      'token_bar': (parts, rows, count * steps, size),
      'state': (rows, size, parts * lanes),
      'start': (rows, count, size, parts * lanes),
    }[kind]

  varying = jax.typeof(arrays[0]).manual_axis_type
  sizes = [x.shape[-1 if kind == 'token' else -2] for kind, x in inputs]
  run = functools.partial(
    pl.pallas_call,
    kernel,
    grid=grid.shape,
    in_specs=[block(*x) for x in zip(kinds, sizes, strict=True)],
    out_specs=[block(*x) for x in outputs],
    out_shape=[
      jax.ShapeDtypeStruct(whole(*x), jnp.float32, manual_axis_type=varying)
      for x in outputs
    ],
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
  )
  return jax.lax.platform_dependent(
    *arrays, tpu=run(), default=run(interpret=True)
  )
