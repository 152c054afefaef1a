"""Decay that is no part of the gradient."""

from collections.abc import Callable

import jax
from jax import Array
import jax.numpy as jnp
import optax


def decoupled_decay(
  learning_rate: optax.ScalarOrSchedule,
  strength: float,
  direction: Callable[[Array], Array],
) -> optax.GradientTransformation:
  """Adds `-learning_rate * strength * direction(parameter)` to the updates.

  Unlike `optax.add_decayed_weights` it stands after the learning rate, which it
  multiplies itself, so that links in between leave the decay alone.

  Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2017,
  arXiv 1711.05101, algorithm 2.

  Args:
    learning_rate: number or schedule.
    strength: 0 for no decay.
    direction: of a parameter: itself, or its sign.
  """
  if isinstance(strength, (int, float)) and strength == 0:
    return optax.identity()
  rate = learning_rate if callable(learning_rate) else lambda _: learning_rate

  def init(params):
    del params
    return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

  def update(updates, state, params=None):
    if params is None:
      raise ValueError('decay needs update(updates, state, params).')
    scale = rate(state.count) * strength
    updates = jax.tree.map(
      lambda u, p: (u - scale * direction(p)).astype(u.dtype), updates, params
    )
    count = optax.safe_increment(state.count)
    return updates, optax.ScaleByScheduleState(count)

  return optax.GradientTransformation(init, update)
