"""How the elementwise linear recurrence goes through its steps.

Arrays are `[B, L, ...]`; axes of decays and flags may have size 1.
"""

import functools
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from jaxformers.ops.recurrence import devices
from jaxformers.ops.recurrence import tpu


class Plan(NamedTuple):
  """How to go through the steps.

  Attributes:
    method: one that `linear_recurrence` offers.
    size: steps at once.
    down: whether from the end.
    axis: of the mesh along which steps are split, if they are.
  """

  method: str
  size: int
  down: bool
  axis: str | None = None


class Decay(NamedTuple):
  """What the state is multiplied by at each step.

  Attributes:
    value: a.
    reset: where 0 stands for it; None for nowhere.
    skip: where 1 stands for it, whatever the others say; None for nowhere.
  """

  value: Array
  reset: Array | None
  skip: Array | None

  def effective(self) -> Array:
    """Returns what is multiplied by."""
    return self.select(self.value, 1)

  def select(self, x: Array, skipped: float = 0) -> Array:
    """Returns x, but 0 at resets, and `skipped` where steps are skipped."""
    if self.reset is not None:
      x = jnp.where(self.reset, 0, x)
    return x if self.skip is None else jnp.where(self.skip, skipped, x)

  def cut(self, start: Array | int, size: int) -> 'Decay':
    """Returns it for some steps; what is the same for all steps stays."""
    part = lambda x: x if x.shape[1] == 1 else _cut(x, start, size)
    return jax.tree.map(part, self)


def forwards(
  plan: Plan, decay: Decay, initial: Array, input: Array
) -> tuple[Array, Array]:
  """Goes through the steps; returns states and last state."""
  run = functools.partial(_forwards, plan, decay, input)
  if plan.axis is None:
    return run(initial)
  start = for_first(plan, initial)
  return _over_devices(plan, decay, input.shape[1], run, start)


def backwards(plan: Plan, decay: Decay, states_bar: Array) -> Array:
  """Goes through the steps in the other direction.

  Returns:
    The gradient of the input for that of the states.
  """
  run = functools.partial(_backwards, plan, decay, states_bar)
  start = jnp.zeros_like(states_bar[:, 0])
  if plan.axis is None:
    return run(start)[0]
  opposite = plan._replace(down=not plan.down)
  return _over_devices(opposite, decay, states_bar.shape[1], run, start)[0]


def before(plan: Plan, initial: Array, states: Array) -> Array:
  """Returns the state before each step."""
  return _shifted(plan.down, states, _entry(plan, initial, states)[:, None])


def first(plan: Plan, decay: Decay) -> Decay:
  """Returns the decay of the step that comes first."""
  length = max(x.shape[1] for x in jax.tree.leaves(decay))
  return decay.cut(length - 1 if plan.down else 0, 1)


def for_first(plan: Plan, initial: Array) -> Array:
  """Returns the initial state for the device that begins, 0 for others."""
  if plan.axis is None:
    return initial
  first = jax.lax.axis_size(plan.axis) - 1 if plan.down else 0
  return jnp.where(jax.lax.axis_index(plan.axis) == first, initial, 0)


def edge(down: bool, states: Array) -> Array:
  """Returns the state that comes last."""
  return states[:, 0 if down else -1]


def multiply(decay: Array, x: Array) -> Array:
  """Returns the product, whose gradient for decays is quickly added up.

  Over rows and steps together, where decays are the same for all: XLA takes ten
  times as long on CPUs to add up the steps of a batch of 1.
  """
  if decay.shape[:2] != (1, 1):
    return decay * x
  decay = jnp.broadcast_to(decay, (1, 1, *x.shape[2:])).reshape(-1)
  return (x.reshape(-1, decay.size) * decay).reshape(x.shape)


def _forwards(plan, decay, input, initial):
  if plan.method == 'pallas':
    return _on_tpu(decay.effective(), initial, input, down=plan.down)

  def block(start, size, carry):
    state, states = carry
    decays = decay.cut(start, size).effective()
    inputs = _cut(input, start, size).astype(state.dtype)
    if size == 1:
      block = decays * state[:, None] + inputs
    else:
      block = _prefixes(plan.down, decays, inputs, state)
    return edge(plan.down, block), _put(states, block, start)

  # Not in place of the inputs, where XLA might copy the whole at each step.
  carry = initial, jnp.zeros_like(input, initial.dtype)
  steps = 0, input.shape[1]
  last, states = _in_blocks(plan.size, plan.down, block, steps, carry)
  return states, last


def _backwards(plan, decay, states_bar, carry):
  up = not plan.down
  if plan.method == 'pallas':
    arrays = decay.effective(), carry, states_bar
    return _on_tpu(*arrays, down=up, decay_after=True)

  def block(start, size, carry):
    carry, bars = carry
    decays = decay.cut(start, size).effective()
    inputs = _cut(states_bar, start, size)
    if size == 1:
      block = carry[:, None] + inputs
    else:
      later = _each_step(decays, size)
      later = _shifted(up, later, jnp.ones_like(later[:, :1]))
      block = _prefixes(up, later, inputs, carry)
    return edge(up, decays * block), _put(bars, block, start)

  carry = carry, jnp.zeros_like(states_bar)
  steps = 0, states_bar.shape[1]
  carry, bars = _in_blocks(plan.size, up, block, steps, carry)
  return bars, carry


def _over_devices(plan, decay, length, run, start):
  """Runs steps that are split over devices.

  Each device runs its own steps twice: first to learn what they make of what
  enters, then with that.

  Args:
    plan: with the direction to go.
    decay: of this device.
    length: number of steps of each device.
    run: runs the steps of this device from a state; the last of its results is
      what enters the next device.
    start: what enters this device, besides what others send.

  Returns:
    What `run` does.
  """
  factor = decay.effective()
  if factor.shape[1] == 1:
    factor = factor[:, 0] ** length
  else:
    factor = jnp.prod(factor, axis=1)
  nothing = jnp.zeros_like(start)
  end = run(start)[-1]
  sent = devices.entering(plan.axis, factor, end, nothing, down=plan.down)
  return run(start + sent)


def _entry(plan, initial, states):
  """Returns the state before the first step of this device."""
  if plan.axis is None:
    return initial
  order = range(jax.lax.axis_size(plan.axis))
  pairs = list(zip(order[:-1], order[1:], strict=True))
  if plan.down:
    pairs = [pair[::-1] for pair in pairs]
  sent = jax.lax.ppermute(edge(plan.down, states), plan.axis, pairs)
  return for_first(plan, initial) + sent


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

  # The first step takes the state in, so that products of all decays so far
  # need not be known at each step.
  decays = _each_step(decays, inputs.shape[1])
  first = inputs.shape[1] - 1 if down else 0
  entered = decays[:, first] * state + inputs[:, first]
  inputs = _put(inputs, entered[:, None], first)
  return jax.lax.associative_scan(combine, (decays, inputs), down, axis=1)[1]


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


def _shifted(down, x, edge):
  """Moves all steps by one, away from where steps begin; puts `edge` there."""
  parts = (x[:, 1:], edge) if down else (edge, x[:, :-1])
  return jnp.concatenate(parts, axis=1)


def _cut(x, start, size):
  return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _put(whole, part, start):
  return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=1)
