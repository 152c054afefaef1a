"""The slot for gradients that need more than one backward pass."""

from collections.abc import Callable
from typing import Any, Protocol

LossFunction = Callable[..., tuple[Any, Any]]
"""From parameters and further arguments to a scalar and anything else."""


class GradientFunction(Protocol):
  """Puts something else in the place of the gradient of a loss.

  Penalties and adversarial losses need the loss itself, which a chain of optax
  transformations never sees. A frozen dataclass with this method is one, and an
  `Experiment` takes it as `gradient`.

  Attributes:
    accumulates: whether the mean of its results over parts of a batch is its
      result for the whole batch, as it is for a sum over examples. If not, an
      experiment with `accumulate > 1` is refused.
  """

  accumulates: bool

  def value_and_grad(
    self, loss_fn: LossFunction
  ) -> Callable[..., tuple[tuple[Any, Any], Any]]:
    """Wraps a loss as `jax.value_and_grad(loss_fn, has_aux=True)` does.

    Args:
      loss_fn: `(params, *arguments) -> (loss, aux)`, differentiable in the
        first argument; equal arguments give equal noise.

    Returns:
      `(params, *arguments) -> ((value, aux), gradients)`: what is minimised,
      the `aux` of the loss at `params` itself, and gradients in the structure
      and dtypes of `params`.
    """
    ...
