"""Optimisers as configuration: frozen dataclasses that build optax chains."""

import dataclasses
import difflib
import re
from typing import Any, Protocol

import jax
import optax

from jaxformers.optim.schedule import Schedule
from jaxformers.optim.schedule import WarmupCosine


class Optimizer(Protocol):
  """A recordable description of an optax transformation.

  Attributes:
    learning_rate: its schedule, which the trainer also reports.
  """

  learning_rate: Schedule

  def build(self, steps: int) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation for a run of so many steps."""
    ...


@dataclasses.dataclass(frozen=True)
class AdamW:
  """Adam with decoupled weight decay and clipping of the gradient's norm.

  Only matrices decay: parameters whose name has at least two dimension letters,
  so gains, offsets and biases do not.

  Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2017,
  arXiv 1711.05101, algorithm 2; clipping: Pascanu et al., 2012, arXiv
  1211.5063, section 3.2.

  Attributes:
    learning_rate: schedule.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: multiplied by the learning rate.
    max_gradient_norm: longer gradients are scaled down to it; None for never.
  """

  learning_rate: Schedule = WarmupCosine(peak=1e-3)
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  max_gradient_norm: float | None = 1.0

  def build(self, steps: int) -> optax.GradientTransformationExtraArgs:
    adamw = optax.adamw(
      self.learning_rate.schedule(steps),
      b1=self.b1,
      b2=self.b2,
      eps=self.eps,
      weight_decay=self.weight_decay,
      mask=weight_decay_mask,
    )
    return clipped(self.max_gradient_norm, adamw)


@dataclasses.dataclass(frozen=True)
class FromOptax:
  """Any optimiser of optax that takes a learning rate, by name.

  Attributes:
    name: such as `'lion'` or `'adafactor'`.
    learning_rate: schedule.
    options: further arguments as pairs, such as `(('b1', 0.9),)`.
    max_gradient_norm: longer gradients are scaled down to it; None for never.
  """

  name: str
  learning_rate: Schedule = WarmupCosine(peak=1e-3)
  options: tuple[tuple[str, Any], ...] = ()
  max_gradient_norm: float | None = 1.0

  def build(self, steps: int) -> optax.GradientTransformationExtraArgs:
    known = [n for n in dir(optax) if n.islower() and not n.startswith('_')]
    if self.name not in known:
      near = difflib.get_close_matches(self.name, known, 1, 0)
      raise ValueError(
        f'optax has no optimiser {self.name!r}; did you mean {near[0]!r}?'
      )
    rate = self.learning_rate.schedule(steps)
    optimizer = getattr(optax, self.name)(rate, **dict(self.options))
    return clipped(self.max_gradient_norm, optimizer)


def clipped(
  max_norm: float | None, optimizer: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
  """Returns an optimiser whose gradients are clipped first.

  Args:
    max_norm: longer gradients are scaled down to it; None for never.
    optimizer: gets the clipped gradients.
  """
  if max_norm is None:
    return optax.with_extra_args_support(optimizer)
  return optax.chain(optax.clip_by_global_norm(max_norm), optimizer)


def split_clipping(optimizer: Optimizer) -> tuple[float | None, Optimizer]:
  """Takes the clipping out of an optimiser, for those who change what follows.

  Args:
    optimizer: with or without a `max_gradient_norm`.

  Returns:
    The norm that it clips to, None for none; and the optimiser without it.
  """
  max_norm = getattr(optimizer, 'max_gradient_norm', None)
  if max_norm is not None:
    optimizer = dataclasses.replace(optimizer, max_gradient_norm=None)
  return max_norm, optimizer


def dimension_letters(path: tuple[Any, ...]) -> str:
  """Returns the dimension letters that end a parameter's name, '' if none.

  Args:
    path: key path of a leaf, as `jax.tree_util.tree_map_with_path` gives it.
  """
  match = re.search(r"_([A-Z]+)'?\]?$", jax.tree_util.keystr(path[-1:]))
  return match[1] if match else ''


def weight_decay_mask(params: optax.Params) -> Any:
  """Returns True for the parameters that weight decay shall shrink."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: len(dimension_letters(path)) >= 2, params
  )
