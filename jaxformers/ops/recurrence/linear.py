"""The elementwise linear recurrence, which most recurrent layers are made of."""

import difflib
import functools
from typing import Literal, NamedTuple, get_args

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Inexact
import numpy as np

from jaxformers.ops.recurrence import steps
from jaxformers.ops.recurrence.devices import last_of_all
from jaxformers.ops.recurrence.platform import by_platform
from jaxformers.ops.recurrence.varying import varying_alike

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
  axis_name: str | None = None,
) -> Recurrence:
  """Runs `h_t = a_t h_(t-1) + b_t`, number by number.

  All methods compute the same. `'sequential'` goes step by step and reads and
  writes each number once. `'associative'` combines neighbours in a tree of depth
  O(log L), each level a pass over memory (`jax.lax.associative_scan`).
  `'chunked'` builds such trees within chunks, and goes from chunk to chunk.
  `'pallas'` is a kernel for TPUs that reads and writes each number once; it does
  not split over devices by itself, only within `jax.shard_map`, and where there
  is no TPU it is interpreted, slowly (in `jax.shard_map` then with
  `check_vma=False`). `'auto'` is `fastest_method` of the platform that the
  program is compiled for.

  Derivatives of any order and mode exist. Backward runs `s_t = g_t + a_(t+1)
  s_(t+1)` for the gradient g of the states; then s is the gradient of b, and
  `s_t h_(t-1)` that of a. Decays and states are all that is kept for it. Neither
  a decay that is the same for many steps, rows or numbers nor its gradient is
  copied to each of them (but `'associative'` has one decay for each step).

  With `axis_name` each device runs its steps twice: first to learn what it makes
  of the state that enters it, then with that state. In between two small arrays
  per device are gathered by all; states never travel.

  Never compute this as `p cumsum(b / p)` with `p = cumprod(a)`: in float32 that
  is nan at `|a| = 0.99` after 65536 steps, and off in the fourth digit after 4096.

  Source: Blelloch, "Prefix Sums and Their Applications", 1990, section 1.4;
  Martin and Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence
  Length", 2018, arXiv 1709.04057, section 2, and algorithm 1 (many devices).

  Args:
    decay: a, real or complex, of any shape that broadcasts to the input's:
      `[*S]` if it is the same at all steps. In float32 or wider, since bfloat16
      rounds 0.999 to 1. Nothing keeps `|a|` below 1: see `check_decay`.
    input: b, real or complex; may be bfloat16.
    initial: h before the first step; None for 0.
    reset: where a step forgets all that came before it, as if its decay were 0:
      where segments begin. With `reverse` mark where they end.
    skip: where a step leaves the state alone, whatever decay and input hold
      there, be it nan: padding. It outweighs `reset`.
    reverse: whether to go from the end, `h_t = a_t h_(t+1) + b_t`.
    method: see above.
    chunk: steps per chunk for `'chunked'`; None for `CHUNK`.
    axis_name: of the mesh axis along which steps are split, in order, within
      `jax.shard_map`; the initial state is the same on all devices, and so is
      the last. None if they are not split.

  Returns:
    All states, and the last.

  Raises:
    ValueError: if shapes or dtypes do not fit, there is no step, or method or
      chunk make no sense.
  """
  options = reset, skip, reverse, method, chunk
  states, last = _prepared(axis_name, decay, input, initial, *options)
  return Recurrence(states, last_of_all(axis_name, last, down=reverse))


def fastest_method(platform: str) -> LinearMethod:
  """Returns the fastest method on a platform.

  On a CPU a loop over the steps is nearest to the speed of memory, and anything
  parallel makes several passes. On accelerators each turn of a loop has a cost,
  so that turns must be few and each must do much; that is a judgement from
  compiled programs, not measured on one. On TPUs `'pallas'` passes over memory
  once, but must be asked for: only who calls knows whether arrays are split over
  devices.

  Source: none; on CPUs our measurements (`experiments/benchmarks/recurrence.py`).

  Args:
    platform: as JAX calls it: `'cpu'`, `'cuda'`, `'tpu'`, ...
  """
  return 'sequential' if platform == 'cpu' else 'chunked'


def check_decay(decay: Inexact[Array, '...'], tolerance: float = 1e-6) -> None:
  """Raises unless no decay is larger than 1, so that states stay bounded.

  For decays at hand, such as those made from parameters, exponentials of
  logarithms, or `rtf_poles`; within `jax.jit` there are no numbers yet to look
  at. What layers of a model make of their parameters is in
  `jaxformers.diagnostics.decay_report`.

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


def _prepared(axis, decay, input, initial, reset, skip, reverse, method, chunk):
  """Checks what is given, gives it all axes and dtypes, and runs."""
  _check(decay, input, initial, reset, skip)
  plan = _plan(method, chunk, input.shape[1], reverse, axis)
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
  real = jnp.finfo(dtype).dtype
  decay = jnp.asarray(decay, jnp.result_type(decay, real))
  decay = decay.reshape((1,) * (input.ndim - decay.ndim) + decay.shape)
  decay = steps.Decay(decay, reset, skip)
  arrays = decay, initial.astype(dtype), input
  return _recurrence(plan, *varying_alike(arrays))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _recurrence(plan, decay, initial, input):
  """Returns states and last state; what is given has all axes."""
  return _for_platform(plan, steps.forwards, decay, initial, input)


@_recurrence.defjvp
def _recurrence_jvp(plan, primals, tangents):
  """Finds tangents as the solution of a linear system.

  The tangents of the states obey a recurrence with the same decays. To solve it
  backwards gives gradients of any order, and decays and states are all that is
  kept for it: what is checkpointed is made again where it is needed.
  """
  decay, initial, _ = primals
  decay_dot, initial_dot, input_dot = tangents
  states, last = _recurrence(plan, *primals)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def driven(initial, states, decay_dot):
    before = decay.select(steps.before(plan, initial, states))
    return steps.multiply(decay_dot, before)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def product(states_dot):
    nothing = jnp.zeros_like(initial)
    before_dot = steps.before(plan, nothing, states_dot)
    return states_dot - decay.effective() * before_dot

  def solve(_, input_dot):
    nothing = jnp.zeros_like(initial)
    return _for_platform(plan, steps.forwards, decay, nothing, input_dot)[0]

  def solve_transposed(_, states_bar):
    return _for_platform(plan, steps.backwards, decay, states_bar)

  input_dot = input_dot.astype(states.dtype)
  input_dot += driven(initial, states, decay_dot.value)
  first = steps.first(plan, decay).effective()[:, 0]
  first *= steps.for_first(plan, initial_dot)
  place = -1 if plan.down else 0
  input_dot = input_dot.at[:, place].add(first)
  states_dot = jax.lax.custom_linear_solve(
    product, input_dot, solve, solve_transposed
  )
  return (states, last), (states_dot, steps.edge(plan.down, states_dot))


def _for_platform(plan, function, *arrays):
  """Applies a function of a plan and arrays by the fastest method."""

  def by(method):
    size = 1 if method == 'sequential' else plan.size
    return functools.partial(function, plan._replace(method=method, size=size))

  methods = {'cpu': fastest_method('cpu'), 'elsewhere': fastest_method('tpu')}
  return by_platform(plan.method, by, *arrays, **methods)


def _plan(method, chunk, length, reverse, axis):
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
    return steps.Plan('sequential', 1, reverse, axis)
  size = {
    'sequential': 1,
    'pallas': 1,
    'associative': length,
  }.get(method, min(chunk or CHUNK, length))
  return steps.Plan(method, size, reverse, axis)


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
