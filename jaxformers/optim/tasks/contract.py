"""What weighs tasks: three contracts, by what they read.

A `Scalarizer` reads the losses, a `GramWeighting` also the inner products of
the tasks' gradients, and a `StackedCombination` the gradients themselves. All
are frozen dataclasses with `init`, whose state is small, replicated and part of
a checkpoint, and a pure call. A mask is False for tasks of which the batch has
nothing; what is read of them is not used, and their weight is 0.
"""

import abc
from typing import Any, ClassVar

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float


class Scalarizer(abc.ABC):
  """Weighs tasks by their losses: one backward pass of the weighted sum."""

  @abc.abstractmethod
  def init(self, tasks: int) -> Any:
    """Returns the state before the first step.

    Args:
      tasks: how many there are.
    """

  @abc.abstractmethod
  def __call__(
    self, losses_T: Float[Array, ' T'], mask_T: Bool[Array, ' T'], state: Any
  ) -> tuple[Float[Array, ' T'], Any]:
    """Returns weights and the next state.

    Args:
      losses_T: of this batch; 1 for absent tasks.
      mask_T: False for absent tasks.
      state: what `init` or the last call returned.
    """


class Retrospective(Scalarizer):
  """Weighs tasks by their losses, and then looks at what the step made of them.

  After each step its state must pass through `look_back`, as the trainer makes
  it do, for one forward pass more.
  """

  @abc.abstractmethod
  def after(
    self, losses_T: Float[Array, ' T'], mask_T: Bool[Array, ' T'], state: Any
  ) -> Any:
    """Returns the next state.

    Args:
      losses_T: of the batch that was weighed last, at the new parameters; 1 for
        absent tasks.
      mask_T: False for absent tasks.
      state: what the call that weighed returned.
    """


class GramWeighting(abc.ABC):
  """Weighs tasks by the inner products of their gradients.

  Attributes:
    reads_losses: whether losses must be given as well.
  """

  reads_losses: ClassVar[bool] = False

  @abc.abstractmethod
  def init(self, tasks: int) -> Any:
    """Returns the state before the first step.

    Args:
      tasks: how many there are.
    """

  @abc.abstractmethod
  def __call__(
    self,
    gram_TT: Float[Array, 'T T'],
    losses_T: Float[Array, ' T'],
    mask_T: Bool[Array, ' T'],
    state: Any,
  ) -> tuple[Float[Array, ' T'], Any]:
    """Returns weights and the next state.

    Args:
      gram_TT: inner products over shared parameters; 0 for absent tasks.
      losses_T: of this batch; 1 for absent tasks.
      mask_T: False for absent tasks.
      state: what `init` or the last call returned.
    """


class StackedCombination(abc.ABC):
  """Combines gradients that are stacked along a leading axis of tasks.

  Attributes:
    reads_losses: whether losses must be given as well.
  """

  reads_losses: ClassVar[bool] = False

  @abc.abstractmethod
  def init(self, tasks: int, params: Any) -> Any:
    """Returns the state before the first step.

    Args:
      tasks: how many there are.
      params: shared parameters, or anything with their shapes and dtypes.
    """

  @abc.abstractmethod
  def __call__(
    self,
    stacked: Any,
    losses_T: Float[Array, ' T'],
    mask_T: Bool[Array, ' T'],
    state: Any,
  ) -> tuple[Any, Float[Array, ' T'], Any]:
    """Returns one gradient, the weights to report, and the next state.

    Args:
      stacked: gradients of shared parameters, leaves `[T, ...]`.
      losses_T: of this batch; 1 for absent tasks.
      mask_T: False for absent tasks.
      state: what `init` or the last call returned.
    """


class Stateless:
  """Remembers nothing from step to step."""

  def init(self, tasks: int) -> tuple[()]:
    """Returns the state, which is empty.

    Args:
      tasks: how many there are.
    """
    del tasks
    return ()


def look_back(
  weighting: Retrospective,
  losses_T: Float[Array, ' T'],
  state: Any,
  mask_T: Bool[Array, ' T'] | None = None,
) -> Any:
  """Lets a weighting see what a step made of the losses that it weighed.

  ```python
  value, gradients = gradient(params, batch, state=state)
  params = step(params, gradients)
  state = look_back(weighting, losses(params, batch), value.state)
  ```

  Source: as the weighting.

  Args:
    weighting: such as `FAMO()`.
    losses_T: of the same batch, at the new parameters.
    state: what the weighting returned when it weighed the batch.
    mask_T: False for absent tasks, whose losses are ignored; None for none.

  Returns:
    The state for the next step; the one given if a loss is not finite.
  """
  mask_T = jnp.ones(losses_T.shape, bool) if mask_T is None else mask_T
  losses_T = jnp.where(mask_T, losses_T, 1)
  new = weighting.after(losses_T, mask_T, state)
  is_finite = jnp.isfinite(losses_T).all()
  return jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, state)


Weighting = Scalarizer | GramWeighting
Combination = Scalarizer | GramWeighting | StackedCombination


def weigh(
  weighting: Weighting,
  gram_TT: Float[Array, 'T T'] | None,
  losses_T: Float[Array, ' T'],
  mask_T: Bool[Array, ' T'],
  state: Any,
) -> tuple[Float[Array, ' T'], Any]:
  """Calls a weighting with clean arguments, and guards its result.

  Args:
    weighting: what weighs.
    gram_TT: inner products of gradients; a scalarizer does without.
    losses_T: of this batch.
    mask_T: False for absent tasks, whose losses and products are ignored.
    state: its state.

  Returns:
    Constant weights, 0 for absent tasks, and the next state. If a loss or a
    product of a task that is present is not finite, the weights of all present
    tasks are nan, so that it cannot go unnoticed, and the state stays.
  """
  losses_T = jnp.where(mask_T, losses_T, 1)
  is_finite_T = jnp.isfinite(losses_T)
  if gram_TT is not None:
    gram_TT = jnp.where(mask_T[:, None] & mask_T, gram_TT, 0)
    is_finite_T &= jnp.isfinite(jnp.diagonal(gram_TT))
  if isinstance(weighting, Scalarizer):
    weights_T, new = weighting(losses_T, mask_T, state)
  else:
    weights_T, new = weighting(gram_TT, losses_T, mask_T, state)
  is_finite = is_finite_T.all()
  weights_T = jnp.where(is_finite, weights_T, jnp.nan)
  new = jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, state)
  return jax.lax.stop_gradient(jnp.where(mask_T, weights_T, 0)), new
