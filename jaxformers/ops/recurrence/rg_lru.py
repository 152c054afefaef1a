"""A recurrence per channel whose gates decide what it keeps."""

import functools
from typing import Literal, NamedTuple, get_args

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from jaxformers.ops.recurrence.chunks import scan_chunks
from jaxformers.ops.recurrence.devices import entering
from jaxformers.ops.recurrence.devices import last_of_all
from jaxformers.ops.recurrence.devices import positions
from jaxformers.ops.recurrence.linear import linear_recurrence
from jaxformers.ops.recurrence.platform import by_platform
from jaxformers.ops.recurrence.varying import varying_alike
from jaxformers.ops.segments import Places

STEEPEST = 1000.0
"""Largest derivative of a square root in the backward pass."""

RGLRUMethod = Literal['auto', 'fused', 'chunked', 'associative']


class GatedRecurred(NamedTuple):
  """What a recurrence of one number per channel returns.

  Attributes:
    out_BLD: the states at all tokens, in the dtype of the input.
    last_BD: the last, in at least float32.
  """

  out_BLD: Float[Array, 'B L D']
  last_BD: Float[Array, 'B D']


def rg_lru(
  x_BLD: Float[Array, 'B L D'],
  input_gate_BLD: Float[Array, 'B L D'],
  recurrence_gate_BLD: Float[Array, 'B L D'],
  decay_D: Float[Array, ' D'],
  initial_BD: Float[Array, 'B D'] | None = None,
  *,
  places: Places | None = None,
  sharpness: float = 8.0,
  method: RGLRUMethod = 'auto',
  chunk: int | None = None,
  axis_name: str | None = None,
) -> GatedRecurred:
  """Runs the real-gated linear recurrent unit.

  `log a_i = -sharpness sigmoid(r_i) softplus(decay)`,
  `h_i = a_i h_(i-1) + sqrt(1 - a_i^2) sigmoid(g_i) x_i`, where r and g are the
  recurrence and the input gate. If `|x| <= 1`, then `|h| <= sqrt((1 + a) / (1 -
  a))` for the largest a; for white noise the square root keeps the variance. At
  the first token of a segment a is 0. `1 - a^2` is computed as `-expm1(2 log
  a)`, and the derivative of its root, infinite at a = 1, is cut at `STEEPEST`.

  All methods compute the same. `'fused'` goes token by token, applies the gates
  chunk by chunk, and again in the backward pass, which keeps only inputs and
  states between chunks. `'chunked'` and `'associative'` apply the gates to all
  tokens at once and are those methods of `linear_recurrence`, which keeps decays
  and states. `'auto'` is `'fused'` on CPUs and `'chunked'` elsewhere: of the
  platform that the program is compiled for. Sums run in at least float32.

  Source: De et al., "Griffin", 2024, arXiv 2402.19427, equations 1 to 4, and
  appendix A; the cut of the derivative as in the authors' code,
  https://github.com/google-deepmind/recurrentgemma.

  Args:
    x_BLD: input.
    input_gate_BLD: g, before the sigmoid.
    recurrence_gate_BLD: r, before the sigmoid.
    decay_D: parameter of the decay; see `rg_lru_decay`.
    initial_BD: state before the first token; None if nothing came before.
    places: where the tokens stand; padding leaves the state alone, whatever it
      holds. None for one segment, which begins here if there is no state.
    sharpness: c of the paper.
    method: see above.
    chunk: tokens per chunk; None for 64 if fused, else as `linear_recurrence`.
    axis_name: see `outer_recurrence`.

  Raises:
    ValueError: if shapes do not fit, or method or chunk make no sense.
  """
  _check(x_BLD, (input_gate_BLD, recurrence_gate_BLD), decay_D, initial_BD)
  _check_method(method, chunk)
  batch, length, width = x_BLD.shape
  dtype = jnp.result_type(x_BLD, decay_D, jnp.float32)
  is_token_BL = jnp.ones((batch, length), bool)
  begins_BL = is_token_BL & (positions(axis_name, length) == 0)
  begins_BL &= initial_BD is None
  if places is not None:
    is_token_BL = places.number_BL != 0
    begins_BL = is_token_BL & (places.position_BL == 0)
  if initial_BD is None:
    initial_BD = jnp.zeros((batch, width), dtype)
  rate_D = -sharpness * jax.nn.softplus(decay_D.astype(dtype))
  inputs = x_BLD, input_gate_BLD, recurrence_gate_BLD, is_token_BL, begins_BL
  state_BD, inputs, rate_D = varying_alike(
    (initial_BD.astype(dtype), inputs, rate_D)
  )

  def by(method):
    if method == 'fused':
      return functools.partial(_in_turns, chunk, axis_name)
    return functools.partial(_at_once, method, chunk, axis_name)

  arrays = state_BD, rate_D, inputs
  methods = {'cpu': 'fused', 'elsewhere': 'chunked'}
  out_BLD, last_BD = by_platform(method, by, *arrays, **methods)
  return GatedRecurred(out_BLD.astype(x_BLD.dtype), last_BD)


def _gated(rate_D, inputs):
  """Returns what tokens keep of the state, 1 at padding, and what they write."""
  x, gate, recurrence, is_token, begins = inputs
  is_token, begins = is_token[..., None], begins[..., None]
  # Numbers at padding must not meet even a factor of 0.
  x, gate, recurrence = (
    jnp.where(is_token, z.astype(rate_D.dtype), 0)
    for z in (x, gate, recurrence)
  )
  log_decay = rate_D * jax.nn.sigmoid(recurrence)
  scale = jnp.where(begins, 1, _root(-jnp.expm1(2 * log_decay)))
  decay = jnp.where(begins, 0, jnp.exp(log_decay))
  write = scale * jax.nn.sigmoid(gate) * x
  return jnp.where(is_token, decay, 1), write


def _in_turns(chunk, axis_name, state_BD, rate_D, inputs):
  """Goes from token to token, with the gates of a chunk at a time."""

  def go(state_BD, inputs):
    def step(state_BD, inputs):
      decay_BD, write_BD = inputs
      state_BD = decay_BD * state_BD + write_BD
      return state_BD, state_BD

    return jax.lax.scan(step, state_BD, _gated(rate_D, inputs))

  if axis_name is not None:
    nothing_BD = jnp.zeros_like(state_BD)
    written_BD, _ = scan_chunks(go, nothing_BD, inputs, chunk)
    kept_BD = _kept(rate_D, *inputs[2:])
    state_BD = entering(axis_name, kept_BD, written_BD, state_BD)
  last_BD, out_BLD = scan_chunks(go, state_BD, inputs, chunk)
  return out_BLD, last_of_all(axis_name, last_BD)


def _at_once(method, chunk, axis_name, state_BD, rate_D, inputs):
  """Makes all decays and writes."""
  decay_BLD, write_BLD = jax.checkpoint(_gated)(rate_D, inputs)
  options = {'method': method, 'chunk': chunk, 'axis_name': axis_name}
  return tuple(linear_recurrence(decay_BLD, write_BLD, state_BD, **options))


def rg_lru_decay(decay_D: Float[Array, ' D']) -> Float[Array, ' D']:
  """Returns the parameter of `rg_lru` whose softplus is `-log decay`.

  A gate of `1 / sharpness` then decays so.

  Source: De et al., "Griffin", 2024, arXiv 2402.19427, section 2.4, inverted.

  Args:
    decay_D: strictly between 0 and 1.
  """
  return jnp.log(jnp.expm1(-jnp.log(decay_D)))


@jax.checkpoint
def _kept(rate_D, recurrence_gate_BLD, is_token_BL, begins_BL):
  """Returns the product of all decays."""
  is_token, begins_B1 = is_token_BL[..., None], begins_BL.any(1)[:, None]
  gate_BLD = jnp.where(is_token, recurrence_gate_BLD.astype(rate_D.dtype), 0)
  open_BLD = jnp.where(is_token, jax.nn.sigmoid(gate_BLD), 0)
  return jnp.where(begins_B1, 0, jnp.exp(rate_D * open_BLD.sum(axis=1)))


@jax.custom_jvp
def _root(x):
  """A square root whose derivative is at most `STEEPEST`."""
  return jnp.sqrt(x)


@_root.defjvp
def _root_jvp(primals, tangents):
  (x,), (x_dot,) = primals, tangents
  least = 1 / (4 * STEEPEST**2)
  return jnp.sqrt(x), x_dot / (2 * jnp.sqrt(jnp.maximum(x, least)))


def _check(x, gates, decay, initial):
  """Raises unless the arrays fit together."""
  shapes = [list(gate.shape) for gate in gates]
  if x.ndim != 3 or x.shape[1] < 1 or any(s != list(x.shape) for s in shapes):
    raise ValueError(
      'input and gates must all be [B, length, channels], with at least one '
      f'token: got {list(x.shape)} and {shapes}.'
    )
  batch, _, width = x.shape
  if decay.shape != (width,):
    raise ValueError(f'decay must be [{width}], got {list(decay.shape)}.')
  if initial is not None and initial.shape != (batch, width):
    raise ValueError(
      f'the initial state must be {[batch, width]}, got {list(initial.shape)}.'
    )


def _check_method(method, chunk):
  if method not in get_args(RGLRUMethod):
    raise ValueError(
      f'unknown method {method!r}; choose one of '
      f'{", ".join(get_args(RGLRUMethod))}.'
    )
  if chunk is not None and (chunk < 1 or method == 'associative'):
    raise ValueError(
      f'chunk={chunk} needs at least 1 token, and another method than '
      f"'associative', got {method!r}."
    )
