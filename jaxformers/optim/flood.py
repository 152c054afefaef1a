"""A floor under the training loss, for the trainer."""

from collections.abc import Callable
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from jaxformers.optim.optimizer import AdamW
from jaxformers.optim.optimizer import Optimizer
from jaxformers.optim.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Flooding:
  """Minimises `|L - level| + level`: below the level, descent turns round.

  L is the mean over the batch. It does not add up over parts of a batch; a run
  that accumulates gradients takes the optimiser `Flooded` instead.

  Source: Ishida et al., "Do We Need Zero Training Loss After Achieving Zero
  Training Error?", 2020, arXiv 2002.08709.

  Attributes:
    level: of the floor.
  """

  level: float
  accumulates: ClassVar[bool] = False

  def value_and_grad(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `(params, *args) -> ((flooded loss, aux), gradients)`.

    Args:
      loss_fn: `(params, *args) -> (loss, aux)`.
    """

    def flooded(*args):
      loss, aux = loss_fn(*args)
      return jnp.abs(loss - self.level) + self.level, aux

    return jax.value_and_grad(flooded, has_aux=True)


@dataclasses.dataclass(frozen=True)
class Flooded:
  """Any optimiser, with gradients that turn round below a level of the loss.

  What `Flooding` does, also for runs that accumulate gradients.

  Source: see `Flooding`.

  Attributes:
    level: of the floor.
    optimizer: what takes the gradients.
  """

  level: float
  optimizer: Optimizer = AdamW()

  @property
  def learning_rate(self) -> Schedule:
    """That of the optimiser."""
    return self.optimizer.learning_rate

  def build(self, steps: int) -> optax.GradientTransformationExtraArgs:
    return optax.chain(flood(self.level), self.optimizer.build(steps))


def flood(level: float) -> optax.GradientTransformationExtraArgs:
  """Turns gradients round where the loss is below a level.

  The same as `Flooding`, as the first link of a chain: gradients of a loss have
  the sign of `loss - level` as their factor. It sees the loss of the whole batch
  however many parts that had.

  Source: Ishida et al., 2020, arXiv 2002.08709.

  Args:
    level: of the floor.

  Returns:
    A transformation whose `update` needs the loss as `value`.
  """

  def update(updates, state, params=None, *, value=None, **extra):
    del params, extra
    if value is None:
      raise ValueError('flood needs update(..., value=loss).')
    sign = jnp.where(value >= level, 1, -1)
    return jax.tree.map(lambda g: g * sign.astype(g.dtype), updates), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )
