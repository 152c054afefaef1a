"""The elementwise linear recurrence, which most recurrent layers are made of."""

import difflib
import functools
from typing import Literal, NamedTuple, get_args

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Inexact
import numpy as np

from jaxformers.ops.recurrence import tpu

CHUNK = 128
"""Steps per chunk, where nothing else is said."""

LinearMethod = Literal['auto', 'sequential', 'chunked', 'associative', 'pallas']


class Recurrence(NamedTuple):
  """What a linear recurrence returns, in at least float32.

  Attributes:
    states: `[B, L, *S]`, the state after each step.
    last: `[B, *S]`, the state after the step that came last.
  """

  states: Inexact[Array, 'B L ...']
  last: Inexact[Array, 'B ...']


def linear_recurrence(
  decay: Inexact[Array, '...'],
  input: Inexact[Array, 'B L ...'],
  initial: Inexact[Array, 'B ...'] | None = None,
  *,
  reset: Bool[Array, 'B L'] | None = None,
  skip: Bool[Array, 'B L'] | None = None,
  reverse: bool = False,
  method: LinearMethod = 'auto',
  chunk: int | None = None,
) -> Recurrence:
  """Runs `h_t = a_t h_(t-1) + b_t`, number by number.

  All methods compute the same. `'sequential'` goes step by step and reads and
  writes each number once. `'associative'` combines neighbours in a tree of depth
  O(log L), each level a pass over memory (`jax.lax.associative_scan`).
  `'chunked'` builds such trees within chunks, and goes from chunk to chunk.
  `'pallas'` is a kernel for TPUs that reads and writes each number once; it does
  not split over devices by itself, only within `jax.shard_map`, and where there
  is no TPU it is interpreted, slowly.
  `'auto'` is `fastest_method` of the platform that the program is compiled for.

  Derivatives of any order and mode exist. Backward runs `s_t = g_t + a_(t+1)
  s_(t+1)` for the gradient g of the states; then s is the gradient of b, and
  `s_t h_(t-1)` that of a. Decays and states are all that is kept for it. A decay
  that is the same for many steps, rows or numbers is not copied to each of them
  (but `'associative'` has one for each step), and its gradient is added up on
  the way.

  Never compute this as `p cumsum(b / p)` with `p = cumprod(a)`: in float32 that
  is nan at |a| = 0.99 after 65536 steps, and off in the fourth digit after 4096.

  Source: Blelloch, "Prefix Sums and Their Applications", 1990, section 1.4;
  Martin and Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence
  Length", 2018, arXiv 1709.04057, section 2.

  Args:
    decay: a, real or complex, of any shape that broadcasts to the input's:
      `[*S]` if it is the same at all steps. In float32 or wider, since bfloat16
      rounds 0.999 to 1. Nothing keeps |a| below 1: see `check_decay`.
    input: b, real or complex; may be bfloat16.
    initial: h before the first step; None for 0.
    reset: where a step forgets all that came before it, as if its decay were 0:
      where segments begin. With `reverse` mark where they end.
    skip: where a step leaves the state alone, whatever decay and input hold
      there, be it nan: padding. It outweighs `reset`.
    reverse: whether to go from the end, `h_t = a_t h_(t+1) + b_t`.
    method: see above.
    chunk: steps per chunk for `'chunked'`; None for `CHUNK`.

  Returns:
    All states, and the last.

  Raises:
    ValueError: if shapes or dtypes do not fit, there is no step, or method or
      chunk make no sense.
  """
  _check(decay, input, initial, reset, skip)
  plan = _plan(method, chunk, input.shape[1], reverse)
  given = (decay, input) if initial is None else (decay, input, initial)
  dtype = jnp.result_type(*given, jnp.float32)
  if initial is None:
    initial = jnp.zeros_like(input[:, 0])
  reset, skip = (
    x if x is None else x.reshape(x.shape + (1,) * (input.ndim - 2))
    for x in (reset, skip)
  )
  if skip is not None:
    input = jnp.where(skip, 0, input)
  decay = jnp.asarray(decay, jnp.result_type(decay, _real(dtype)))
  decay = decay.reshape((1,) * (input.ndim - decay.ndim) + decay.shape)
  arrays = _varying_alike(decay, initial.astype(dtype), input, reset, skip)
  return Recurrence(*_recurrence(plan, *arrays))


def fastest_method(platform: str) -> LinearMethod:
  """Returns the fastest method on a platform.

  On a CPU a loop over the steps is nearest to the speed of memory, and anything
  parallel makes several passes. On accelerators each turn of a loop has a cost,
  so that turns must be few and each must do much. On TPUs `'pallas'` is faster
  still, but must be asked for: only who calls knows whether arrays are split
  over devices.

  Source: none; our measurements (`experiments/benchmarks/recurrence.py`).

  Args:
    platform: as JAX calls it: `'cpu'`, `'cuda'`, `'tpu'`, ...
  """
  return 'sequential' if platform == 'cpu' else 'chunked'


def check_decay(decay: Inexact[Array, '...'], tolerance: float = 1e-6) -> None:
  """Raises unless no decay is larger than 1, so that states stay bounded.

  For decays at hand, such as those made from parameters; within `jax.jit` there
  are no numbers yet to look at.

  Source: none; sums of geometric series.

  Args:
    decay: any shape, real or complex.
    tolerance: how much larger than 1 rounding may make it.

  Raises:
    ValueError: if one is larger, or not a number; it says which and how much.
    TypeError: if called within `jax.jit`.
  """
  if isinstance(decay, jax.core.Tracer):
    raise TypeError(
      'check_decay looks at numbers, and within jax.jit there are none yet; '
      'call it outside, on the decay that the parameters make.'
    )
  size = np.abs(np.asarray(decay))
  bad = ~(size <= 1 + tolerance)
  if bad.any():
    place = np.unravel_index(np.argmax(bad), size.shape)
    raise ValueError(
      f'{bad.sum()} of {size.size} decays are larger than 1 or not a number, '
      f'the first with |decay| = {size[place]} at {list(map(int, place))}: '
      'states would grow without bound. Make decays as exp(-exp(x)) or '
      'exp(-softplus(x)).'
    )


class _Plan(NamedTuple):
  """How to go through the steps.

  Attributes:
    method: one that `linear_recurrence` offers.
    size: steps at once; 0 for what suits the platform.
    down: whether from the end.
  """

  method: str
  size: int
  down: bool


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _recurrence(plan, *arrays):
  """Returns states and last state; what is given has all axes."""
  return _for_platform(plan, _forwards, *arrays)


@_recurrence.defjvp
def _recurrence_jvp(plan, primals, tangents):
  """Finds tangents as the solution of a linear system.

  Its unknowns are the tangents of all that is given and computed: of decay and
  initial state, for which it says only what they are, and of the states. To
  solve it is a recurrence, to solve its transpose the recurrence backwards. What
  they need is all that is kept. The product with its matrix serves to
  differentiate once more.
  """
  decay, initial, _, reset, skip = primals
  states, last = _recurrence(plan, *primals)
  flags = reset, skip

  def driven(decay_dot):
    return _effective(decay_dot, *flags, 0) * _before(plan, initial, states)

  def product(unknown):
    decay_dot, initial_dot, states_dot, last_dot = unknown
    before_dot = _before(plan, initial_dot, states_dot)
    rest = states_dot - _effective(decay, *flags) * before_dot
    rest -= driven(decay_dot)
    last_dot -= _edge(plan.down, states_dot)
    return decay_dot, initial_dot, rest, last_dot

  def solve(_, given):
    decay_dot, initial_dot, input_dot, last_dot = given
    input_dot += driven(decay_dot)
    arrays = decay, initial_dot, input_dot, *flags
    states_dot, end_dot = _for_platform(plan, _forwards, *arrays)
    return decay_dot, initial_dot, states_dot, last_dot + end_dot

  def solve_transposed(_, given):
    decay_bar, initial_bar, states_bar, last_bar = given
    arrays = decay, initial, states, *flags, states_bar, last_bar
    total, carry, input_bar = _for_platform(plan, _backwards, *arrays)
    return decay_bar + total, initial_bar + carry, input_bar, last_bar

  decay_dot, initial_dot, input_dot = tangents[:3]
  given = decay_dot, initial_dot, input_dot.astype(states.dtype), 0 * last
  given = jax.lax.optimization_barrier(given)
  solution = jax.lax.custom_linear_solve(
    product, given, solve, solve_transposed
  )
  return (states, last), solution[2:]


def _forwards(plan, decay, initial, input, reset, skip):
  """Goes through the steps; returns states and last state."""
  if plan.method == 'pallas':
    decay = _effective(decay, reset, skip)
    return _on_tpu(decay, initial, input, down=plan.down)

  def block(start, size, carry):
    state, states = carry
    decays = _effective(*_cut((decay, reset, skip), start, size))
    inputs = _cut(input, start, size).astype(state.dtype)
    if size == 1:
      block = decays * state[:, None] + inputs
    else:
      block = _prefixes(plan.down, decays, inputs, state)
    return _edge(plan.down, block), _put(states, block, start)

  # Not in place of the inputs, where XLA might copy the whole at each step.
  carry = initial, jnp.zeros_like(input, initial.dtype)
  steps = 0, input.shape[1]
  last, states = _in_blocks(plan.size, plan.down, block, steps, carry)
  return states, last


def _backwards(plan, decay, initial, states, reset, skip, states_bar, last_bar):
  """Goes through the steps in the other direction.

  Returns:
    Gradients of decay, initial state and input.
  """
  up = not plan.down
  if plan.method == 'pallas':
    effective = _effective(decay, reset, skip)
    bars, state_bar = _on_tpu(
      effective, last_bar, states_bar, down=up, decay_after=True
    )
    product = bars * _before(plan, initial, states)
    product = _effective(product, reset, skip, 0)
    return _add(jnp.zeros_like(decay), product, 0), state_bar, bars

  def block(start, size, carry, before):
    state_bar, bars, total = carry
    decays, is_reset, is_skip = _cut((decay, reset, skip), start, size)
    effective = _effective(decays, is_reset, is_skip)
    inputs = _cut(states_bar, start, size)
    if size == 1:
      block = state_bar[:, None] + inputs
    else:
      later = _each_step(effective, size)
      later = _shifted(up, later, jnp.ones_like(later[:, :1]))
      block = _prefixes(up, later, inputs, state_bar)
    product = _effective(block * before, is_reset, is_skip, 0)
    total = _add(total, product, start)
    state_bar = _edge(up, effective * block)
    return state_bar, _put(bars, block, start), total

  def inner(start, size, carry):
    earlier = start - 1 if up else start + 1
    return block(start, size, carry, _cut(states, earlier, size))

  length = states.shape[1]
  carry = last_bar, jnp.zeros_like(states_bar), jnp.zeros_like(decay)
  # The step that came first has the initial state before it, all others have
  # states that are shifted by one.
  first = 0 if up else length - 1
  others = (1, length) if up else (0, length - 1)
  carry = _in_blocks(plan.size, up, inner, others, carry)
  state_bar, bars, total = block(first, 1, carry, initial[:, None])
  return total, state_bar, bars


def _on_tpu(*arrays, **options):
  """Runs the kernel, or what it would do where there is no TPU."""
  run = functools.partial(tpu.run_steps, **options)
  return jax.lax.platform_dependent(
    *arrays, tpu=run, default=functools.partial(run, interpret=True)
  )


def _prefixes(down, decays, inputs, state):
  """Returns the states of a block by a tree."""

  def combine(earlier, later):
    decay, state = earlier
    later_decay, later_state = later
    return later_decay * decay, later_decay * state + later_state

  pairs = _each_step(decays, inputs.shape[1]), inputs
  decays, states = jax.lax.associative_scan(combine, pairs, down, axis=1)
  return decays * state[:, None] + states


def _each_step(decays, size):
  """Copies decays that are the same for all steps to each."""
  shape = decays.shape[0], size, *decays.shape[2:]
  return jnp.broadcast_to(decays, shape)


def _in_blocks(size, down, function, steps, carry):
  """Runs `function(start, size, carry)` over blocks of steps."""
  begin, end = steps
  count, rest = divmod(end - begin, size)
  start = lambda i: end - (i + 1) * size if down else begin + i * size
  if count == 1:
    carry = function(start(0), size, carry)
  elif count:
    carry = jax.lax.fori_loop(
      0, count, lambda i, carry: function(start(i), size, carry), carry
    )
  if rest:
    carry = function(begin if down else end - rest, rest, carry)
  return carry


def _effective(decay, reset, skip, kept=1):
  """Returns decays as resets make them, and `kept` where steps are skipped."""
  if reset is not None:
    decay = jnp.where(reset, 0, decay)
  return decay if skip is None else jnp.where(skip, kept, decay)


def _before(plan, initial, states):
  """Returns the state before each step."""
  return _shifted(plan.down, states, initial[:, None])


def _shifted(down, x, edge):
  """Moves all steps by one, away from where steps begin; puts `edge` there."""
  parts = (x[:, 1:], edge) if down else (edge, x[:, :-1])
  return jnp.concatenate(parts, axis=1)


def _edge(down, states):
  """Returns the state that comes last."""
  return states[:, 0 if down else -1]


def _cut(tree, start, size):
  """Returns steps of arrays; those with the same for all steps stay."""
  return jax.tree.map(
    lambda x: x
    if x.shape[1] == 1
    else jax.lax.dynamic_slice_in_dim(x, start, size, axis=1),
    tree,
  )


def _put(whole, part, start):
  return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=1)


def _add(total, product, start):
  """Adds up the gradient of decays in the shape that they have."""
  if not jnp.iscomplexobj(total):
    product = product.real
  pairs = enumerate(zip(total.shape, product.shape, strict=True))
  axes = [i for i, (n, m) in pairs if n == 1 and m > 1]
  product = product.sum(axes, keepdims=True)
  if total.shape[1] == 1:
    return total + product
  return _put(total, product, start)


def _for_platform(plan, function, *arrays):
  """Applies a function of a plan and arrays by the fastest method."""
  if plan.method != 'auto':
    return function(plan, *arrays)

  def by(platform):
    method = fastest_method(platform)
    size = _size(method, plan.size, arrays[2].shape[1])
    return functools.partial(function, _Plan(method, size, plan.down))

  return jax.lax.platform_dependent(
    *arrays, cpu=by('cpu'), cuda=by('cuda'), tpu=by('tpu'), default=by('cpu')
  )


def _varying_alike(*arrays):
  """Lets arrays vary over the same axes of a mesh, within `jax.shard_map`."""
  varying = lambda x: jax.typeof(x).manual_axis_type.varying
  axes = frozenset().union(*map(varying, jax.tree.leaves(arrays)))
  return jax.tree.map(
    lambda x: jax.lax.pcast(x, tuple(axes - varying(x)), to='varying'), arrays
  )


def _real(dtype):
  """Returns the dtype of real parts."""
  return jnp.finfo(dtype).dtype


def _plan(method, chunk, length, reverse):
  """Returns how to go through so many steps."""
  if method not in get_args(LinearMethod):
    near = difflib.get_close_matches(str(method), get_args(LinearMethod), 1, 0)
    raise ValueError(
      f'unknown method {method!r}; did you mean {near[0]!r}? '
      f'Known: {", ".join(get_args(LinearMethod))}.'
    )
  if chunk is not None and chunk < 1:
    raise ValueError(f'chunks need at least 1 step, got chunk={chunk}.')
  if chunk is not None and method not in ('auto', 'chunked'):
    raise ValueError(
      f'chunk={chunk} given, but {method!r} has no chunks; leave chunk=None or '
      "ask for 'chunked'."
    )
  if length == 1:
    return _Plan('sequential', 1, reverse)
  return _Plan(method, _size(method, chunk, length), reverse)


def _size(method, chunk, length):
  """Returns how many steps a method takes at once."""
  match method:
    case 'sequential' | 'pallas':
      return 1
    case 'associative':
      return length
  return min(chunk or CHUNK, length)


def _check(decay, input, initial, reset, skip):
  """Raises unless the arrays fit together."""
  shape = list(input.shape)
  if input.ndim < 2 or input.shape[1] < 1:
    raise ValueError(
      'a recurrence needs inputs [B, length, ...] with at least one step, got '
      f'{shape}.'
    )
  if not jnp.issubdtype(input.dtype, jnp.inexact):
    raise ValueError(f'inputs must be floating-point, got {input.dtype}.')
  given = jnp.shape(decay)
  pairs = zip(given[::-1], shape[::-1], strict=False)
  if len(given) > len(shape) or any(n not in (1, m) for n, m in pairs):
    raise ValueError(
      f'decays must broadcast to the inputs {shape}, got {list(given)}.'
    )
  dtype = jnp.result_type(decay)
  if not jnp.issubdtype(dtype, jnp.inexact) or jnp.finfo(dtype).bits < 32:
    raise ValueError(
      f'decays must be float32 or wider, got {dtype}: fewer bits round 0.999 to '
      '1. Compute them in float32, and keep inputs as they are.'
    )
  state = [shape[0], *shape[2:]]
  if initial is not None and list(initial.shape) != state:
    raise ValueError(
      f'the initial state must have shape {state}, got {list(initial.shape)}.'
    )
  for name, flags in ('reset', reset), ('skip', skip):
    if flags is None:
      continue
    if list(flags.shape) != shape[:2] or flags.dtype != bool:
      raise ValueError(
        f'{name} must be boolean of shape {shape[:2]}, got {flags.dtype} '
        f'{list(flags.shape)}.'
      )
