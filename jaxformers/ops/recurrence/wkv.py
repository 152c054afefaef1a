"""Attention whose weights are exponentials of keys that fade with distance."""

import functools
from typing import Literal, NamedTuple, get_args

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from jaxformers.ops.recurrence.chunks import scan_chunks
from jaxformers.ops.recurrence.devices import entering
from jaxformers.ops.recurrence.devices import last_of_all
from jaxformers.ops.recurrence.platform import by_platform
from jaxformers.ops.recurrence.varying import varying_alike
from jaxformers.ops.segments import Places

NOTHING = -1e30
"""Logarithm of a weight of 0: finite, so that differences are numbers."""

WKVMethod = Literal['auto', 'fused', 'chunked', 'associative']


class WKVState(NamedTuple):
  """Weighted sums over the tokens so far, all in at least float32.

  The sums are `exp(peak) total` and `exp(peak) weight`.

  Attributes:
    total_BD: of values.
    weight_BD: of ones.
    peak_BD: the largest exponent so far.
  """

  total_BD: Float[Array, 'B D']
  weight_BD: Float[Array, 'B D']
  peak_BD: Float[Array, 'B D']


class WKV(NamedTuple):
  """What `wkv` returns.

  Attributes:
    out_BLD: weighted means, in the dtype of the values.
    last: sums after the last token.
  """

  out_BLD: Float[Array, 'B L D']
  last: WKVState


def wkv_state(batch_size: int, width: int, dtype=jnp.float32) -> WKVState:
  """Returns the sums over no tokens.

  Source: none; the neutral element.

  Args:
    batch_size: B.
    width: D.
    dtype: of the sums.
  """
  zeros_BD = jnp.zeros((batch_size, width), dtype)
  # Arrays of their own: a donated state must not hold one buffer twice.
  return WKVState(zeros_BD, zeros_BD + 0, zeros_BD + NOTHING)


def wkv(
  key_BLD: Float[Array, 'B L D'],
  value_BLD: Float[Array, 'B L D'],
  log_decay_D: Float[Array, ' D'],
  bonus_D: Float[Array, ' D'],
  initial: WKVState | None = None,
  *,
  places: Places | None = None,
  method: WKVMethod = 'auto',
  chunk: int | None = None,
  axis_name: str | None = None,
) -> WKV:
  """Takes means of values, weighted by keys and by distance.

  Per channel, `out_i = (sum_(j<i) exp((i-1-j) w + k_j) v_j + exp(u + k_i) v_i) /
  (the same with v = 1)`, where w < 0 is `log_decay` and u the bonus. Means are
  between the least and the largest value, and adding a number to all keys
  changes nothing. Sums are kept relative to their largest exponent, so that no
  key overflows.

  All methods compute the same. `'fused'` goes token by token; `'chunked'` goes
  from chunk to chunk and joins the tokens of one in a tree, which suits devices
  on which a loop is slow. Both keep nothing but sums between chunks for the
  backward pass. `'associative'` is a single tree, and holds several arrays of
  the size of its input for each of its O(log L) levels. `'auto'` is `'fused'` on
  CPUs and `'chunked'` elsewhere: of the platform that the program is compiled
  for.

  Trap: numerator and denominator are plain linear recurrences, plus `(exp(w + u)
  - 1)` times the token's own term; code in the wild that adds another pair of
  parameters there has a different model.

  Source: Peng et al., "RWKV", 2023, arXiv 2305.13048, section 3.1.2; the sums
  as in the authors' code, https://github.com/BlinkDL/ChatRWKV,
  RWKV_in_150_lines.py. The parallel form: none, to join such sums is
  associative.

  Args:
    key_BLD: k.
    value_BLD: v.
    log_decay_D: w.
    bonus_D: u.
    initial: sums before the first token; None for none.
    places: where the tokens stand; sums begin anew with each segment, and
      padding, whatever it holds, leaves them alone. None for one segment.
    method: see above.
    chunk: tokens per chunk; None for 64.
    axis_name: see `outer_recurrence`.

  Raises:
    ValueError: if shapes do not fit, or method or chunk make no sense.
  """
  _check(key_BLD, value_BLD, (log_decay_D, bonus_D), initial, method, chunk)
  batch, length, width = key_BLD.shape
  dtype = jnp.result_type(key_BLD, value_BLD, log_decay_D, jnp.float32)
  is_token_BL = jnp.ones((batch, length), bool)
  begins_BL = jnp.zeros_like(is_token_BL)
  if places is not None:
    is_token_BL = places.number_BL != 0
    begins_BL = is_token_BL & (places.position_BL == 0)
    key_BLD = jnp.where(is_token_BL[..., None], key_BLD, 0)
    value_BLD = jnp.where(is_token_BL[..., None], value_BLD, 0)
  if initial is None:
    initial = wkv_state(batch, width, dtype)
  state = WKVState(*(z.astype(dtype) for z in initial))
  inputs = key_BLD, value_BLD, is_token_BL, begins_BL
  gains = log_decay_D.astype(dtype), bonus_D.astype(dtype)
  state, inputs, gains = varying_alike((state, inputs, gains))
  run = functools.partial(_run, method, chunk, inputs, gains)
  if axis_name is not None:
    nothing = varying_alike((wkv_state(batch, width, dtype), inputs))[0]
    written, _ = run(nothing)
    count_B1 = is_token_BL.sum(axis=1)[:, None]
    fade_BD = jnp.where(count_B1 > 0, count_B1 * gains[0], 0)
    fade_BD = jnp.where(begins_BL.any(axis=1)[:, None], NOTHING, fade_BD)
    state = entering(axis_name, fade_BD, written, state, after=_after)
  last, out_BLD = run(state)
  return WKV(out_BLD.astype(value_BLD.dtype), last_of_all(axis_name, last))


def _after(fade, written, state):
  """Returns the sums after a share of the tokens."""
  return _sum(_faded(state, fade), written)


def _run(method, chunk, inputs, gains, state):
  """Goes from chunk to chunk; keeps the sums between them."""

  def by(method):
    turn = _tree if method in ('chunked', 'associative') else _steps
    size = inputs[0].shape[1] if method == 'associative' else chunk

    def run(state, inputs, gains):
      body = lambda state, chunk: turn(state, chunk, gains)
      return scan_chunks(body, state, inputs, size)

    return run

  methods = {'cpu': 'fused', 'elsewhere': 'chunked'}
  return by_platform(method, by, state, inputs, gains, **methods)


def _steps(state, chunk, gains):
  """Goes past one token after the other."""
  return jax.lax.scan(lambda s, token: _step(s, token, *gains), state, chunk)


def _step(state, token, log_decay_D, bonus_D):
  """Goes past one token."""
  key_BD, value_BD, is_token_B, begins_B = token
  key_BD = key_BD.astype(log_decay_D.dtype)
  peak_BD = jnp.where(begins_B[:, None], NOTHING, state.peak_BD)
  before = state._replace(peak_BD=peak_BD)
  own = WKVState(value_BD.astype(key_BD.dtype), jnp.ones_like(key_BD), key_BD)
  after = _sum(_faded(before, log_decay_D), own)
  after = jax.tree.map(
    lambda new, old: jnp.where(is_token_B[:, None], new, old), after, state
  )
  return after, _mean(before, own, bonus_D)


def _tree(start, chunk, gains):
  """Computes the sums after all tokens `[C, B, D]` by a parallel scan."""
  log_decay_D, bonus_D = gains
  key, value, is_token, begins = chunk
  is_token, begins = is_token[..., None], begins[..., None]
  key = key.astype(log_decay_D.dtype)
  # Padding adds nothing and lets nothing fade; beginnings let all fade.
  own = WKVState(
    value.astype(key.dtype),
    jnp.broadcast_to(is_token.astype(key.dtype), key.shape),
    jnp.where(is_token, key, NOTHING),
  )
  fade = jnp.where(is_token, log_decay_D, 0)
  fade = jnp.where(begins, NOTHING, fade)

  def combine(first, second):
    sums = _sum(_faded(first[1], second[0]), second[1])
    return first[0] + second[0], sums

  fade, sums = jax.lax.associative_scan(combine, (fade, own))
  after = _sum(_faded(start, fade), sums)
  before = jax.tree.map(
    lambda z, s: jnp.concatenate([s[None], z[:-1]]), after, start
  )
  # The sums before a token are those after its predecessor, unless it begins.
  before = before._replace(peak_BD=jnp.where(begins, NOTHING, before.peak_BD))
  return jax.tree.map(lambda z: z[-1], after), _mean(before, own, bonus_D)


def _faded(state, log_decay):
  return state._replace(peak_BD=state.peak_BD + log_decay)


def _sum(first, second):
  """Adds sums with different peaks."""
  # Sums do not depend on their peak, so no gradient has to pass through it.
  peak = jax.lax.stop_gradient(jnp.maximum(first.peak_BD, second.peak_BD))
  one, other = jnp.exp(first.peak_BD - peak), jnp.exp(second.peak_BD - peak)
  return WKVState(
    one * first.total_BD + other * second.total_BD,
    one * first.weight_BD + other * second.weight_BD,
    peak,
  )


def _mean(before, own, bonus_D):
  """Returns the mean over the tokens before and the token itself."""
  sums = _sum(before, _faded(own, bonus_D))
  return sums.total_BD / jnp.where(sums.weight_BD == 0, 1, sums.weight_BD)


def _check(key, value, gains, initial, method, chunk):
  """Raises unless the arguments fit together."""
  if key.ndim != 3 or key.shape != value.shape or key.shape[1] < 1:
    raise ValueError(
      'keys and values must both be [B, length, channels], with at least one '
      f'token: got {list(key.shape)} and {list(value.shape)}.'
    )
  batch, _, width = key.shape
  for name, z in zip(('log_decay', 'bonus'), gains, strict=True):
    if z.shape != (width,):
      raise ValueError(f'{name} must be [{width}], got {list(z.shape)}.')
  if initial is not None and any(z.shape != (batch, width) for z in initial):
    raise ValueError(
      f'initial sums must be {[batch, width]}, got '
      f'{[list(z.shape) for z in initial]}.'
    )
  if method not in get_args(WKVMethod):
    raise ValueError(
      f'unknown method {method!r}; choose one of '
      f'{", ".join(get_args(WKVMethod))}.'
    )
  if chunk is not None and method == 'associative':
    raise ValueError(
      f"chunk={chunk} given, but 'associative' has no chunks; leave chunk=None "
      "or ask for 'chunked'."
    )
