"""Where perturbations may lie: balls around zero, in trees of arrays."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

# Added to norms, as in the source: a gradient of zero perturbs nothing.
_EPS = 1e-8


class Ball(Protocol):
  """A ball around zero."""

  def extreme(self, gradient: Any) -> Any:
    """Returns the point of the ball that is farthest along a gradient."""
    ...

  def project(self, perturbation: Any) -> Any:
    """Returns the point of the ball that is nearest to a perturbation."""
    ...


@dataclasses.dataclass(frozen=True)
class L2Ball:
  """All perturbations up to a Euclidean length.

  Source: Miyato et al., "Adversarial Training Methods for Semi-Supervised Text
  Classification", 2017, arXiv 1605.07725; `1e-8` in the norm: Su
  Jianlin, 2020, kexue.fm/archives/7234.

  Attributes:
    radius: the length.
    per_example: whether each index of the leading axis, which all leaves share,
      has a perturbation of that length of its own; otherwise all entries of all
      leaves share one.
  """

  radius: float = 1.0
  per_example: bool = True

  def __post_init__(self):
    _check(self.radius)

  def extreme(self, gradient: Any) -> Any:
    return self._scaled(gradient, lambda norm: self.radius / (norm + _EPS))

  def project(self, perturbation: Any) -> Any:
    return self._scaled(
      perturbation,
      lambda norm: jnp.minimum(1, self.radius / jnp.maximum(norm, _EPS)),
    )

  def _scaled(self, tree, factor):
    """Multiplies by a function of norms; keeps the dtype of each leaf."""

    def sum_of_squares(x):
      x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
      return jnp.sum(x * x, axis=tuple(range(int(self.per_example), x.ndim)))

    squares = [sum_of_squares(x) for x in jax.tree.leaves(tree)]
    factors = factor(jnp.sqrt(sum(squares)))

    def scale(x):
      ones = (1,) * (x.ndim - factors.ndim)
      return (x * factors.reshape(factors.shape + ones)).astype(x.dtype)

    return jax.tree.map(scale, tree)


@dataclasses.dataclass(frozen=True)
class MaxBall:
  """All perturbations whose entries have at most a magnitude.

  Source: Goodfellow et al., "Explaining and Harnessing Adversarial Examples",
  2014, arXiv 1412.6572, section 4.

  Attributes:
    radius: the magnitude.
  """

  radius: float = 1.0

  def __post_init__(self):
    _check(self.radius)

  def extreme(self, gradient: Any) -> Any:
    return jax.tree.map(
      lambda g: (self.radius * jnp.sign(g)).astype(g.dtype), gradient
    )

  def project(self, perturbation: Any) -> Any:
    return jax.tree.map(
      lambda d: jnp.clip(d, -self.radius, self.radius), perturbation
    )


def _check(radius):
  if not radius >= 0:
    raise ValueError(f'radius must be at least 0, got {radius}.')
