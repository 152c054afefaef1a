"""The selective scan: a diagonal recurrence whose input decides what it keeps.

States hold S numbers per channel, so arrays of all states, or of all decays,
are S times as large as input and output. The fused form never makes them.
"""

import functools
from typing import Literal, NamedTuple, get_args

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Inexact

from jaxformers.ops.recurrence.chunks import scan_chunks
from jaxformers.ops.recurrence.devices import entering
from jaxformers.ops.recurrence.devices import last_of_all
from jaxformers.ops.recurrence.platform import by_platform
from jaxformers.ops.recurrence.selective_tpu import Tokens
from jaxformers.ops.recurrence.selective_tpu import run_selective
from jaxformers.ops.recurrence.varying import varying_alike
from jaxformers.ops.segments import Places

SelectiveMethod = Literal[
  'auto', 'fused', 'chunked', 'associative', 'sequential', 'pallas'
]
Discretization = Literal['euler', 'zoh']


class Selected(NamedTuple):
  """What a selective recurrence returns.

  Attributes:
    out_BLE: what was read at each token, in the dtype of the input.
    last_BSE: the state after the last token, in at least float32, complex if
      the system is.
  """

  out_BLE: Float[Array, 'B L E']
  last_BSE: Inexact[Array, 'B S E']


def selective_recurrence(
  x_BLE: Float[Array, 'B L E'],
  step_BLE: Float[Array, 'B L E'],
  a_ES: Inexact[Array, 'E S'],
  b: Inexact[Array, '...'],
  c: Inexact[Array, '...'],
  skip_E: Float[Array, ' E'] | None = None,
  initial_BSE: Inexact[Array, 'B S E'] | None = None,
  *,
  step_bias_E: Float[Array, ' E'] | None = None,
  softplus: bool = False,
  places: Places | None = None,
  discretization: Discretization = 'euler',
  method: SelectiveMethod = 'auto',
  chunk: int | None = None,
  axis_name: str | None = None,
) -> Selected:
  """Runs a diagonal state-space model whose step, input and readout may vary.

  Each channel e has S states, `h_i = exp(t_i a) h_(i-1) + w_i b_i x_i`, and
  returns `c_i . h_i + skip x_i`, where t is the step: short steps ignore the
  token, long ones forget what came before. `w = t` (`'euler'`), or the integral
  `(exp(t a) - 1) / a` (`'zoh'`). Complex systems stand for pairs of conjugate
  states, and return `2 Re(c_i . h_i)`.

  All methods compute the same. `'fused'` goes token by token, makes decays when
  they are needed and reads at once: time `O(L E S)`, and in the backward pass
  nothing but states between chunks and those within one, `O((L / C + C) E S)`
  numbers. `'chunked'` makes all decays and states of a chunk and scans them in
  parallel, which suits devices on which a loop is slow. `'associative'` does so
  with the whole sequence and `'sequential'` loops over arrays of all decays and
  inputs: both hold several arrays of `L E S` numbers, and are for comparison.
  `'pallas'` is `'fused'` as kernels for TPUs, whose states never leave fast
  memory: for real systems in float32 whose b and c vary from token to token, and
  for first derivatives in reverse mode. Like that of `linear_recurrence` it does
  not split over devices by itself, and where there is no TPU it is interpreted.
  `'auto'` is `'fused'` on CPUs and `'chunked'` elsewhere.

  Trap: on CPUs a sum inside the loop costs ten times as much as the rest of it,
  unless it is written as a product with ones.

  Source: Gu and Dao, "Mamba", 2023, arXiv 2312.00752, algorithm 2 and section
  3.3. The input takes Euler's rule by default, as `selective_scan_ref` of the
  authors' code, https://github.com/state-spaces/mamba, though equation 4 of the
  paper is `'zoh'`.

  Args:
    x_BLE: input.
    step_BLE: t > 0, or what softplus makes it of.
    a_ES: rates, with negative real parts for a memory that fades.
    b: `[B, L, S]`, `[B, L, G, S]` for G groups of E / G neighbouring channels,
      or constant `[E, S]`.
    c: likewise.
    skip_E: gain from input to output; None for 0.
    initial_BSE: state before the first token; None for 0.
    step_bias_E: added to `step_BLE`, before softplus.
    softplus: whether steps are softplus of what is given.
    places: where the tokens stand; states begin at 0 with each segment, and
      padding, whatever it holds, leaves them alone. None for one segment.
    discretization: see above.
    method: see above.
    chunk: C, tokens per chunk, for `'auto'`, `'fused'` and `'chunked'`; None for
      64.
    axis_name: see `outer_recurrence`.

  Raises:
    ValueError: if shapes do not fit, or an option is unknown.
  """
  _check(x_BLE, step_BLE, a_ES, (b, c), (skip_E, step_bias_E), initial_BSE)
  _check_options(discretization, method, chunk)
  if method == 'pallas':
    _check_kernel(x_BLE, a_ES, b, c)
  dtype = jnp.result_type(a_ES, x_BLE, jnp.float32)
  tokens, constants = _inputs(x_BLE, step_BLE, a_ES, b, c, step_bias_E, places)
  if initial_BSE is None:
    initial_BSE = jnp.zeros(
      (x_BLE.shape[0], a_ES.shape[1], x_BLE.shape[2]), dtype
    )
  rule = _Rule(softplus, discretization)
  state_BGSE = _grouped(initial_BSE, tokens['x'].shape[2]).swapaxes(1, 2)
  state_BGSE, tokens, constants = varying_alike(
    (state_BGSE.astype(dtype), tokens, constants)
  )
  run = functools.partial(_run, rule, method, chunk, tokens, constants)
  if axis_name is not None:
    _, written_BGSE = run(jnp.zeros_like(state_BGSE))
    kept_BGSE = _kept(rule, tokens, constants)
    state_BGSE = entering(axis_name, kept_BGSE, written_BGSE, state_BGSE)
  out_BLGE, last_BGSE = run(state_BGSE)
  last_BGSE = last_of_all(axis_name, last_BGSE)
  if jnp.iscomplexobj(out_BLGE):
    out_BLGE = 2 * out_BLGE.real
  out_BLE = out_BLGE.reshape(x_BLE.shape)
  if skip_E is not None:
    out_BLE += skip_E * tokens['x'].reshape(x_BLE.shape)
  last_BSE = last_BGSE.swapaxes(1, 2).reshape(initial_BSE.shape)
  return Selected(out_BLE.astype(x_BLE.dtype), last_BSE)


class _Rule(NamedTuple):
  """How what is given becomes steps, and inputs writes."""

  softplus: bool
  discretization: Discretization


def _run(rule, method, chunk, tokens, constants, state_BGSE):
  """Returns what is read, and the last state, by a method."""
  run_by = {
    'fused': functools.partial(_in_chunks, chunk, _by_steps),
    'chunked': functools.partial(_in_chunks, chunk, _in_parallel),
    'associative': functools.partial(_whole, _associative),
    'sequential': functools.partial(_whole, _sequential),
    'pallas': _on_tpu,
  }
  by = lambda method: functools.partial(run_by[method], rule)
  methods = {'cpu': 'fused', 'elsewhere': 'chunked'}
  return by_platform(method, by, tokens, constants, state_BGSE, **methods)


def _inputs(x_BLE, step_BLE, a_ES, b, c, step_bias_E, places):
  """Sorts what is given into what tokens have and what is the same for all."""
  shape = x_BLE.shape[:2]
  groups = max(z.shape[2] if z.ndim == 4 else 1 for z in (b, c))
  tokens = {
    'x': _grouped(x_BLE, groups),
    'step': _grouped(step_BLE, groups),
    'is_token': jnp.ones(shape, bool),
  }
  constants = {'a': _per_group(a_ES, groups)}
  for name, z in (('b', b), ('c', c)):
    if z.ndim == 2:
      constants[name] = _per_group(z, groups)
    else:
      z = z if z.ndim == 4 else z[:, :, None]
      tokens[name] = jnp.broadcast_to(z, (*shape, groups, z.shape[-1]))
  if step_bias_E is not None:
    constants['step_bias'] = _grouped(step_bias_E, groups)
  if places is None:
    return tokens, constants
  is_token_BL = places.number_BL != 0
  # What padding holds, be it nan, must not meet even a factor of 0.
  tokens = {
    name: jnp.where(jnp.expand_dims(is_token_BL, range(2, z.ndim)), z, 0)
    for name, z in tokens.items()
  }
  begins_BL = is_token_BL & (places.position_BL == 0)
  return tokens | {'is_token': is_token_BL, 'begins': begins_BL}, constants


def _steps(rule, tokens, constants):
  """Returns steps, 0 at padding, which then neither writes nor forgets."""
  step = tokens['step'].astype(jnp.result_type(tokens['step'], jnp.float32))
  if 'step_bias' in constants:
    step += constants['step_bias']
  if rule.softplus:
    step = jax.nn.softplus(step)
  return jnp.where(tokens['is_token'][..., None, None], step, 0)


@functools.partial(jax.checkpoint, static_argnums=0)
def _kept(rule, tokens, constants):
  """Returns the product of all decays, `[B, G, S, E]`."""
  a = constants['a']
  total_BGE = _steps(rule, tokens, constants).sum(axis=1)
  kept_BGSE = jnp.exp(_spread(total_BGE, a.shape[-2]) * a)
  if 'begins' not in tokens:
    return kept_BGSE
  begins_B = tokens['begins'].any(axis=1)
  return jnp.where(begins_B[:, None, None, None], 0, kept_BGSE)


def _transition(rule, tokens, constants):
  """Returns the function that maps tokens to decay and write, `[..., G, S, E]`.

  What works on tokens alone is done here, on many of them at once.
  """
  tokens = dict(tokens)
  x = tokens['x'].astype(jnp.result_type(tokens['x'], jnp.float32))
  is_exact = rule.discretization == 'zoh'
  tokens['step'] = _steps(rule, tokens, constants)
  tokens['x'] = x if is_exact else x * tokens['step']

  def transit(tokens, constants):
    a = constants['a']
    exponent = _spread(tokens['step'], a.shape[-2]) * a
    decay = jnp.exp(exponent)
    if 'b' in tokens:
      write = _dot('...GE,...GS->...GSE', tokens['x'], tokens['b'])
    else:
      write = _spread(tokens['x'], a.shape[-2]) * constants['b']
    if is_exact:
      # expm1 / a, and its limit where a = 0.
      is_zero = a == 0
      integral = jnp.expm1(exponent) / jnp.where(is_zero, 1, a)
      still = _spread(tokens['step'], a.shape[-2])
      write = write * jnp.where(is_zero, still, integral)
    if 'begins' in tokens:
      begins = tokens['begins'][..., None, None, None]
      decay = jnp.where(begins, 0, decay)
    return decay, write

  return tokens, transit


def _read(tokens, constants, state):
  """Returns what is read, `[..., G, E]`, of states `[..., G, S, E]`."""
  if 'c' in tokens:
    return _dot('...GS,...GSE->...GE', tokens['c'], state)
  ones_GS = jnp.ones(state.shape[:-1], state.dtype)
  return _dot('...GS,...GSE->...GE', ones_GS, constants['c'] * state)


def _in_chunks(chunk, body, rule, tokens, constants, state_BGSE):
  """Goes from chunk to chunk; keeps nothing but the states between them."""
  batch = state_BGSE.shape[0]
  # Each row of the batch adds up its own share of the gradients of constants,
  # in the shape of the state: no sum has to be taken in the loop.
  constants = jax.tree.map(
    lambda z: jnp.broadcast_to(z, (batch, *z.shape)), constants
  )
  body = functools.partial(body, rule, constants)
  last_BGSE, out_BLGE = scan_chunks(body, state_BGSE, tokens, chunk)
  return out_BLGE, last_BGSE


def _by_steps(rule, constants, state_BGSE, tokens):
  """Goes through a chunk token by token."""
  tokens, transit = _transition(rule, tokens, constants)

  # States of the chunk's tokens are all that its backward pass keeps.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def step(state_BGSE, tokens, constants):
    decay_BGSE, write_BGSE = transit(tokens, constants)
    state_BGSE = decay_BGSE * state_BGSE + write_BGSE
    return state_BGSE, _read(tokens, constants, state_BGSE)

  return jax.lax.scan(
    lambda state, tokens: step(state, tokens, constants), state_BGSE, tokens
  )


def _in_parallel(rule, constants, state_BGSE, tokens):
  """Makes all states of a chunk at once."""
  tokens, transit = _transition(rule, tokens, constants)
  states = _associative(*transit(tokens, constants), state_BGSE)
  return states[-1], _read(tokens, constants, states)


def _whole(states_of, rule, tokens, constants, state_BGSE):
  """Makes the arrays of all decays, writes and states."""
  tokens = jax.tree.map(lambda z: z.swapaxes(0, 1), tokens)
  tokens, transit = _transition(rule, tokens, constants)
  states_LBGSE = states_of(*transit(tokens, constants), state_BGSE)
  out_LBGE = _read(tokens, constants, states_LBGSE)
  return out_LBGE.swapaxes(0, 1), states_LBGSE[-1]


def _on_tpu(rule, tokens, constants, state_BGSE):
  """Runs the kernels, whose rows are those of the batch and its groups."""
  tokens, _ = _transition(rule, tokens, constants)
  batch, length, groups, _ = tokens['x'].shape
  by_row = lambda z: z.swapaxes(1, 2).reshape(-1, length, z.shape[-1])
  keep = None
  if 'begins' in tokens:
    begins_BLG1 = tokens['begins'][:, :, None, None]
    begins_BLG1 = jnp.broadcast_to(begins_BLG1, (batch, length, groups, 1))
    keep = by_row(1 - begins_BLG1.astype(jnp.float32))
  arrays = (
    by_row(tokens[name].astype(jnp.float32)) for name in ('step', 'x', 'b', 'c')
  )
  out_ZLE, last_ZSE = run_selective(
    rule.discretization == 'zoh',
    Tokens(*arrays, keep),
    constants['a'],
    state_BGSE.reshape(-1, *state_BGSE.shape[2:]),
  )
  out_BGLE = out_ZLE.reshape(batch, groups, length, -1)
  return out_BGLE.swapaxes(1, 2), last_ZSE.reshape(state_BGSE.shape)


def _sequential(decay_LBGSE, write_LBGSE, state_BGSE):
  """Returns all states, by a loop."""

  def step(state, inputs):
    state = inputs[0] * state + inputs[1]
    return state, state

  return jax.lax.scan(step, state_BGSE, (decay_LBGSE, write_LBGSE))[1]


def _associative(decay_LBGSE, write_LBGSE, state_BGSE):
  """Returns all states, by a parallel scan."""
  write_LBGSE = write_LBGSE.at[0].add(decay_LBGSE[0] * state_BGSE)

  def combine(first, second):
    return first[0] * second[0], second[0] * first[1] + second[1]

  scan = jax.lax.associative_scan(combine, (decay_LBGSE, write_LBGSE))
  return scan[1]


def _dot(spec, *arrays):
  # Not less precise than a product: some devices round factors of dots.
  return jnp.einsum(spec, *arrays, precision='highest')


def _spread(x, size):
  """Returns S copies, as a dot, whose gradient is one too instead of a sum.

  G is on both sides, so that E alone is free: nothing need be transposed.
  """
  return _dot(
    '...GE,...GS->...GSE', x, jnp.ones((*x.shape[:-1], size), x.dtype)
  )


def _grouped(x_BLE, groups):
  """Cuts the channels of `[B, L, E]` into `[B, L, G, E / G]`."""
  return x_BLE.reshape(*x_BLE.shape[:-1], groups, -1)


def _per_group(x_ES, groups):
  """Returns `[G, S, E / G]`."""
  return x_ES.reshape(groups, -1, x_ES.shape[1]).swapaxes(1, 2)


def _check(x, step, a, systems, gains, initial):
  """Raises unless the arrays fit together."""
  if x.ndim != 3 or x.shape != step.shape or x.shape[1] < 1:
    raise ValueError(
      'input and steps must both be [B, length, channels], with at least one '
      f'token: got {list(x.shape)} and {list(step.shape)}.'
    )
  batch, length, channels = x.shape
  if a.ndim != 2 or a.shape[0] != channels:
    raise ValueError(
      f'a must be [channels, states] with {channels} channels, got '
      f'{list(a.shape)}.'
    )
  states = a.shape[1]
  groups = [z.shape[2] for z in systems if z.ndim == 4]
  for name, z in zip('bc', systems, strict=True):
    shapes = [
      (channels, states),
      (batch, length, states),
      (batch, length, *groups[:1], states),
    ]
    if z.shape not in shapes or channels % max([1, *groups]):
      raise ValueError(
        f'{name} must be {list(shapes[0])} (constant), {list(shapes[1])} or '
        f'[{batch}, {length}, groups, {states}], with the same groups, which '
        f'must divide {channels} channels, for b and c: got {list(z.shape)}.'
      )
    if jnp.iscomplexobj(z) and not jnp.iscomplexobj(a):
      raise ValueError(f'{name} is complex, so a must be complex too.')
  for name, z in zip(('skip', 'step_bias'), gains, strict=True):
    if z is not None and z.shape != (channels,):
      raise ValueError(f'{name} must be [{channels}], got {list(z.shape)}.')
  if initial is not None and initial.shape != (batch, states, channels):
    raise ValueError(
      f'the initial state must be {[batch, states, channels]}, got '
      f'{list(initial.shape)}.'
    )


def _check_options(discretization, method, chunk):
  for value, choices in (
    (discretization, get_args(Discretization)),
    (method, get_args(SelectiveMethod)),
  ):
    if value not in choices:
      raise ValueError(
        f'unknown option {value!r}; choose one of {", ".join(choices)}.'
      )
  chunked = 'auto', 'fused', 'chunked'
  if chunk is not None and (chunk < 1 or method not in chunked):
    raise ValueError(
      f'chunk={chunk} needs at least 1 token, and a method among '
      f'{", ".join(chunked)}, got {method!r}.'
    )


def _check_kernel(x, a, b, c):
  """Raises unless the kernels for TPUs can run this."""
  dtype = jnp.result_type(x, a, b, c, jnp.float32)
  if dtype != jnp.float32 or b.ndim == 2 or c.ndim == 2:
    raise ValueError(
      "method='pallas' needs real float32 (or shorter) arrays, and b and c that "
      f'vary from token to token: got {dtype}, b {list(b.shape)} and c '
      f"{list(c.shape)}. Take method='chunked'."
    )
