"""Selective state spaces with one decay per head."""

from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from jaxformers.ops.recurrence.decay import decays_in_segments
from jaxformers.ops.recurrence.outer import Method
from jaxformers.ops.recurrence.outer import Recurred
from jaxformers.ops.recurrence.outer import outer_recurrence
from jaxformers.ops.segments import Places


def ssd(
  x_BLHV: Float[Array, 'B L H V'],
  step_BLH: Float[Array, 'B L H'],
  a_H: Float[Array, ' H'],
  b_BLGS: Float[Array, 'B L G S'],
  c_BLGS: Float[Array, 'B L G S'],
  skip: Float[Array, 'H ...'] | None = None,
  initial_BHSV: Float[Array, 'B H S V'] | None = None,
  *,
  places: Places | None = None,
  method: Method = 'auto',
  chunk: int | None = None,
  axis_name: str | None = None,
) -> Recurred:
  """Runs `S_i = exp(d_i a) S_(i-1) + b_i (d_i x_i)^T`, `y_i = S_i^T c_i + skip x_i`.

  Per head, with steps d. It is linear attention with c, b and `d x` for queries,
  keys and values, and a decay that depends on the token. What is skipped past
  the state is x itself, without its step.

  Source: Dao and Gu, "Transformers are SSMs", 2024, arXiv 2405.21060, equation
  1 and section 6.

  Args:
    x_BLHV: inputs of H heads.
    step_BLH: d, not negative.
    a_H: rates, not positive.
    b_BLGS: where inputs are written; G groups are shared by H / G heads each.
    c_BLGS: what is read.
    skip: one number per head, or per head and channel; None for 0.
    initial_BHSV: state that earlier tokens left; None for 0.
    places: where the tokens stand, see `jaxformers.ops.segments`; None for one
      segment, which after `initial_BHSV` goes on if there is one. Padding must
      hold finite numbers.
    method: see `outer_recurrence`, like what follows.
    chunk: tokens per chunk.
    axis_name: of the mesh axis along which tokens are split.

  Returns:
    Output in the dtype of x, and last state in at least float32.

  Raises:
    ValueError: if shapes do not fit, or method or chunk make no sense.
  """
  heads = x_BLHV.shape[2:3]
  if step_BLH.shape != x_BLHV.shape[:3] or a_H.shape != heads:
    raise ValueError(
      'steps must have the shape of x without its last axis, and rates one '
      f'number per head: got x {x_BLHV.shape}, steps {step_BLH.shape}, rates '
      f'{a_H.shape}.'
    )
  if skip is not None and skip.shape not in (heads, x_BLHV.shape[2:]):
    raise ValueError(
      f'skip must have shape {list(heads)} or {list(x_BLHV.shape[2:])}, got '
      f'{list(skip.shape)}.'
    )
  step_BLH = step_BLH.astype(jnp.result_type(step_BLH, jnp.float32))
  log_decay_BLH = decays_in_segments(step_BLH * a_H, places)
  if places is not None:
    step_BLH = jnp.where(places.number_BL[..., None] == 0, 0, step_BLH)
  out_BLHV, last_BHSV = outer_recurrence(
    c_BLGS,
    b_BLGS,
    step_BLH[..., None] * x_BLHV,
    log_decay_BLH,
    initial_BHSV,
    method=method,
    chunk=chunk,
    axis_name=axis_name,
  )
  if skip is not None:
    out_BLHV += (skip[..., None] if skip.ndim == 1 else skip) * x_BLHV
  return Recurred(out_BLHV.astype(x_BLHV.dtype), last_BHSV)
