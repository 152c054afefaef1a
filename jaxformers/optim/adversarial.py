"""Gradients at parameters that were moved to where the loss is larger."""

from collections.abc import Callable
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxformers.ops.balls import L2Ball
from jaxformers.optim.selection import matching


@dataclasses.dataclass(frozen=True)
class FGM:
  """Minimises the loss where some parameters were moved along its gradient.

  `L(theta + epsilon G / (|G| + 1e-8))`, with one norm over all parameters whose
  path matches: the fast gradient method, as it is applied to the embedding
  table. It costs one gradient more. For perturbations of each example see
  `jaxformers.losses.fgm_loss`.

  Source: Miyato et al., "Adversarial Training Methods for Semi-Supervised Text
  Classification", 2017, arXiv 1605.07725; of the table: Su Jianlin, 2020,
  kexue.fm/archives/7234, whose epsilon is 0.5.

  Attributes:
    epsilon: length of the move.
    parameters: regular expression, searched for in paths such as
      `embed/table_VD`.
    clean: share of the loss itself in what is minimised, from 0 to 1.
  """

  epsilon: float = 0.5
  parameters: str = r'table_VD$'
  clean: float = 0.0
  accumulates: ClassVar[bool] = False

  def value_and_grad(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `(params, *args) -> ((minimised, aux), gradients)`.

    Args:
      loss_fn: `(params, *args) -> (loss, aux)`.
    """
    attack = PGD(self.epsilon, 1, 1.0, self.parameters, self.clean)
    return attack.value_and_grad(loss_fn)


@dataclasses.dataclass(frozen=True)
class PGD:
  """Minimises the loss where some parameters climbed it in several steps.

  Each step is projected back to the distance epsilon, over all parameters whose
  path matches. It costs one gradient more per step.

  Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial
  Attacks", 2017, arXiv 1706.06083, section 2.1, applied to parameters.

  Attributes:
    epsilon: longest distance.
    steps: gradients that are taken.
    stride: length of a step over epsilon.
    parameters: see `FGM`.
    clean: see `FGM`.
  """

  epsilon: float = 0.5
  steps: int = 3
  stride: float = 0.5
  parameters: str = r'table_VD$'
  clean: float = 0.0
  accumulates: ClassVar[bool] = False

  def __post_init__(self):
    if self.steps < 1:
      raise ValueError(f'steps must be at least 1, got {self.steps}.')
    if not 0 <= self.clean < 1:
      raise ValueError(f'clean must lie in [0, 1), got {self.clean}.')

  def value_and_grad(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `(params, *args) -> ((minimised, aux), gradients)`.

    Args:
      loss_fn: `(params, *args) -> (loss, aux)`.
    """
    backward = jax.value_and_grad(loss_fn, has_aux=True)

    def value_and_grad(params, *args):
      is_moved = jax.tree.leaves(matching(self.parameters, params))
      (loss, aux), gradient = backward(params, *args)
      delta = self._climb(
        _selected(jax.tree.map(jnp.zeros_like, params), is_moved),
        _selected(gradient, is_moved),
      )
      for _ in range(self.steps - 1):
        _, there = backward(_moved(params, delta, is_moved), *args)
        delta = self._climb(delta, _selected(there, is_moved))
      (worse, _), there = backward(_moved(params, delta, is_moved), *args)
      mixed = lambda a, b: (self.clean * a + (1 - self.clean) * b).astype(
        b.dtype
      )
      return (mixed(loss, worse), aux), jax.tree.map(mixed, gradient, there)

    return value_and_grad

  def _climb(self, delta, gradient):
    """One step and the way back; both are lists of leaves."""
    ball = L2Ball(self.epsilon, per_example=False)
    step = ball.extreme(gradient)
    stride = self.stride
    return ball.project(
      jax.tree.map(lambda d, s: d + (stride * s).astype(d.dtype), delta, step)
    )


def _selected(tree, is_selected):
  leaves = jax.tree.leaves(tree)
  return [a for a, s in zip(leaves, is_selected, strict=True) if s]


def _moved(params, delta, is_moved):
  leaves, structure = jax.tree.flatten(params)
  rest = iter(delta)
  return structure.unflatten(
    [a + next(rest) if m else a for a, m in zip(leaves, is_moved, strict=True)]
  )
