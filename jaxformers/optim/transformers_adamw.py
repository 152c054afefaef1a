"""AdamW as the library `transformers` had it, for equality with results of it."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Int
import optax

from jaxformers.optim.optimizer import clipped
from jaxformers.optim.optimizer import weight_decay_mask
from jaxformers.optim.schedule import Schedule
from jaxformers.optim.schedule import WarmupLinear


class TransformersAdamWState(NamedTuple):
  """State of `transformers_adamw`.

  Attributes:
    count: int32 `[]`, number of updates so far.
    mu: first moments, like the parameters.
    nu: second moments, like the parameters.
  """

  count: Int[Array, '']
  mu: Any
  nu: Any


def transformers_adamw(
  learning_rate: float | Array | Callable[[Int[Array, '']], Float[Array, '']],
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.0,
  *,
  correct_bias: bool = True,
  weight_decay_mask: Any | Callable[[optax.Params], Any] = True,
) -> optax.GradientTransformationExtraArgs:
  """Adam whose eps is not bias-corrected and whose decay comes last.

  `theta' = theta - a m / (sqrt(v) + eps)` with `a = lr sqrt(1 - b2^t) /
  (1 - b1^t)`, then `theta <- theta' (1 - lr wd)`. `optax.adamw` adds eps to the
  corrected root and takes the decay from the old theta.

  Source: github.com/huggingface/transformers, `optimization.AdamW` up to version
  4; what ChildTuning's official code builds on.

  Args:
    learning_rate: a number or an optax schedule.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: multiplied by the learning rate.
    correct_bias: whether the step is corrected for moments that begin at 0.
    weight_decay_mask: which leaves decay, as for `optax.adamw`.
  """

  def init(params):
    mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
    return TransformersAdamWState(jnp.zeros([], jnp.int32), mu, nu)

  def update(updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError('transformers_adamw needs params for its weight decay.')
    rate = learning_rate
    if callable(learning_rate):
      rate = learning_rate(state.count)
    count = optax.safe_increment(state.count)
    step = rate
    if correct_bias:
      step = rate * jnp.sqrt(1 - b2**count) / (1 - b1**count)
    mu = _moment(updates, state.mu, b1, 1)
    nu = _moment(updates, state.nu, b2, 2)
    decays = weight_decay_mask
    if callable(decays):
      decays = decays(params)

    def move(m, v, p, decay):
      change = -step * m / (jnp.sqrt(v) + eps)
      shrink = jnp.where(decay, rate * weight_decay, 0)
      return (change - shrink * (p + change)).astype(m.dtype)

    updates = jax.tree.map(move, mu, nu, params, jax.tree.broadcast(decays, mu))
    return updates, TransformersAdamWState(count, mu, nu)

  return optax.GradientTransformationExtraArgs(init, update)


def _moment(updates, moment, decay, order):
  return jax.tree.map(
    lambda g, m: (decay * m + (1 - decay) * g**order).astype(m.dtype),
    updates,
    moment,
  )


@dataclasses.dataclass(frozen=True)
class TransformersAdamW:
  """`transformers_adamw` for an experiment; only matrices decay.

  Source: github.com/huggingface/transformers, `optimization.AdamW` up to version
  4, with its defaults.

  Attributes:
    learning_rate: schedule.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: multiplied by the learning rate.
    correct_bias: whether the step is corrected for moments that begin at 0.
    max_gradient_norm: longer gradients are scaled down to it; None for never.
  """

  learning_rate: Schedule = WarmupLinear(peak=1e-3)
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-6
  weight_decay: float = 0.0
  correct_bias: bool = True
  max_gradient_norm: float | None = 1.0

  def build(self, steps: int) -> optax.GradientTransformationExtraArgs:
    adamw = transformers_adamw(
      self.learning_rate.schedule(steps),
      self.b1,
      self.b2,
      self.eps,
      self.weight_decay,
      correct_bias=self.correct_bias,
      weight_decay_mask=weight_decay_mask,
    )
    return clipped(self.max_gradient_norm, adamw)
