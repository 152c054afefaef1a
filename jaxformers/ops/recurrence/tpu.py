"""The elementwise linear recurrence as a kernel for TPUs."""

import functools
import math

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Inexact

STEPS, LANES = 256, 512
"""Steps and channels of the blocks that a kernel holds at once."""
ROWS = 8
"""Steps that are read and written together: the rows of a register."""


def run_steps(
  decay: Inexact[Array, '...'],
  initial: Inexact[Array, 'B ...'],
  input: Inexact[Array, 'B L ...'],
  *,
  down: bool,
  decay_after: bool = False,
  interpret: bool = False,
) -> tuple[Inexact[Array, 'B L ...'], Inexact[Array, 'B ...']]:
  """Runs `h_t = a_t h_(t-1) + b_t` in one pass over memory.

  The state stays in fast memory while blocks of steps stream by. Channels lie as
  they are given: any other layout would cost copies. A complex number is a pair
  of real ones.

  Source: De et al., "Griffin", 2024, arXiv 2402.19427, appendix A (a linear scan
  as a Pallas kernel).

  Args:
    decay: a, as many axes as the input, any of size 1.
    initial: h before the first step, of the dtype of the result.
    input: b.
    down: whether to go from the last step to the first.
    decay_after: whether to run `s_t = c_t + b_t`, `c_(t+1) = a_t s_t` instead,
      from c = `initial`: the recurrence of gradients.
    interpret: whether to run without a TPU, slowly.

  Returns:
    The h of each step and of the last one, or the s and the last c.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  batch, length, *state = input.shape
  width = math.prod(state)
  decay = jnp.broadcast_to(decay, (*decay.shape[:2], *state))
  decays = _planes(decay.reshape(*decay.shape[:2], width))
  initials = _planes(initial.reshape(batch, 1, width))
  inputs = _planes(input.astype(initial.dtype).reshape(batch, length, width))
  steps = min(STEPS, -(-length // ROWS) * ROWS)
  lanes = min(LANES, -(-width // 128) * 128)
  blocks = -(-length // steps)
  at = lambda t: blocks - 1 - t if down else t
  block = pl.BlockSpec((1, steps, lanes), lambda b, d, t: (b, at(t), d))
  edge = pl.BlockSpec((1, 1, lanes), lambda b, d, t: (b, 0, d))
  shared = [n == 1 for n in decay.shape[:2]]
  of_decay = pl.BlockSpec(
    (1, 1 if shared[1] else steps, lanes),
    lambda b, d, t: (0 if shared[0] else b, 0 if shared[1] else at(t), d),
  )
  like = lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type
  )
  counts = len(decays), len(initials), len(inputs)
  outputs = pl.pallas_call(
    functools.partial(
      _kernel,
      counts=counts,
      length=length,
      blocks=blocks,
      down=down,
      decay_after=decay_after,
    ),
    grid=(batch, -(-width // lanes), blocks),
    in_specs=[of_decay] * counts[0] + [edge] * counts[1] + [block] * counts[2],
    out_specs=[block] * counts[2] + [edge] * counts[1],
    out_shape=[like(x) for x in (*inputs, *initials)],
    scratch_shapes=[pltpu.VMEM((1, lanes), x.dtype) for x in initials],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    interpret=interpret,
  )(*decays, *initials, *inputs)
  out = _whole(outputs[: counts[2]]).reshape(input.shape)
  return out, _whole(outputs[counts[2] :]).reshape(initial.shape)


def _kernel(*refs, counts, length, blocks, down, decay_after):
  """Goes through one block of steps; the state is in scratch memory."""
  from jax.experimental import pallas as pl

  groups, start = [], 0
  for count in (*counts, counts[2], counts[1], counts[1]):
    groups.append(refs[start : start + count])
    start += count
  decays, initials, inputs, outputs, lasts, carries = groups
  turn = pl.program_id(2)
  steps = inputs[0].shape[1]
  first = (blocks - 1 - turn if down else turn) * steps

  @pl.when(turn == 0)
  def _():
    for carry, initial in zip(carries, initials, strict=True):
      carry[...] = initial[0]

  def rows(i, carry):
    index = steps // ROWS - 1 - i if down else i
    at = pl.ds(pl.multiple_of(index * ROWS, ROWS), ROWS)
    is_constant = decays[0].shape[1] == 1
    a = [x[0] if is_constant else x[0, at] for x in decays]
    b = [x[0, at] for x in inputs]
    out = [None] * ROWS
    for row in range(ROWS)[:: -1 if down else 1]:
      a_row = a if is_constant else [x[row : row + 1] for x in a]
      b_row = [x[row : row + 1] for x in b]
      if decay_after:
        out[row] = [x + y for x, y in zip(carry, b_row, strict=True)]
        new = _times(a_row, out[row])
      else:
        new = _times(a_row, carry)
        new = [x + y for x, y in zip(new, b_row, strict=True)]
        out[row] = new
      if length % steps:  # What lies beyond the end leaves the state alone.
        is_inside = first + index * ROWS + row < length
        new = [jnp.where(is_inside, *x) for x in zip(new, carry, strict=True)]
      carry = new
    for n, output in enumerate(outputs):
      output[0, at] = jnp.concatenate([x[n] for x in out])
    return carry

  carry = [x[...] for x in carries]
  carry = jax.lax.fori_loop(0, steps // ROWS, rows, carry)
  for ref, x in zip(carries, carry, strict=True):
    ref[...] = x

  @pl.when(turn == blocks - 1)
  def _():
    for last, x in zip(lasts, carry, strict=True):
      last[0] = x


def _times(a, h):
  """Multiplies a number, real or complex, with another of the state's kind."""
  if len(a) == 1:
    return [a[0] * x for x in h]
  return [a[0] * h[0] - a[1] * h[1], a[0] * h[1] + a[1] * h[0]]


def _planes(x):
  """Splits complex numbers."""
  return [x.real, x.imag] if jnp.iscomplexobj(x) else [x]


def _whole(planes):
  """Joins what `_planes` split."""
  return planes[0] if len(planes) == 1 else jax.lax.complex(*planes)
