"""Any recurrence, step by step, through packed and padded rows."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from jaxformers.ops.recurrence.varying import varying_alike
from jaxformers.ops.segments import Places

CHUNK = 64
"""Steps between states that are kept for the backward pass."""


def step_through(
  step: Callable[[Any, Array], tuple[Any, Array]],
  state: Any,
  input_BLD: Float[Array, 'B L D'],
  *,
  places: Places | None = None,
  chunk: int = CHUNK,
) -> tuple[Float[Array, 'B L D'], Any]:
  """Runs a recurrence over a sequence, one step per token.

  Of the states within a chunk nothing is kept; they are computed again for the
  backward pass.

  Source: none; a scan with the conventions of this library.

  Args:
    step: from a state and inputs `[B, D]` to a state and outputs `[B, D]`. The
      state is a pytree of arrays `[..., B, D]`: with the channels last, CPUs
      work on many at a time.
    state: before the first step.
    input_BLD: one vector per step.
    places: where tokens stand; None if each row continues its segment
      throughout. The state begins at 0 where a position is 0, and padding,
      number 0, leaves it alone.
    chunk: steps per chunk.

  Returns:
    Outputs, of no meaning at padding; and the last state.
  """

  def masked_step(state, inputs):
    x_BD, begins_B1, is_token_B1 = inputs
    x_BD = jnp.where(is_token_B1, x_BD, 0)
    old = jax.tree.map(lambda s: jnp.where(begins_B1, 0, s), state)
    new, out_BD = step(old, x_BD)
    new = jax.tree.map(lambda n, s: jnp.where(is_token_B1, n, s), new, state)
    return new, out_BD

  body, inputs = step, input_BLD
  if places is not None:
    is_token_BL1 = (places.number_BL != 0)[..., None]
    begins_BL1 = (places.position_BL == 0)[..., None]
    body, inputs = masked_step, (input_BLD, begins_BL1, is_token_BL1)
  inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs)
  state, inputs = varying_alike((state, inputs))
  run = lambda state, inputs: jax.lax.scan(body, state, inputs)
  whole = input_BLD.shape[1] // chunk * chunk
  cut = lambda x: x[:whole].reshape(-1, chunk, *x.shape[1:])
  state, out_NCBD = jax.lax.scan(
    jax.checkpoint(run, prevent_cse=False), state, jax.tree.map(cut, inputs)
  )
  state, rest_CBD = run(state, jax.tree.map(lambda x: x[whole:], inputs))
  out_LBD = out_NCBD.reshape(whole, *rest_CBD.shape[1:])
  out_LBD = jnp.concatenate([out_LBD, rest_CBD])
  return jnp.moveaxis(out_LBD, 0, 1), state
