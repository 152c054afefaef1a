"""Weight decay without a coefficient."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxformers.ops.tree import tree_dot
from jaxformers.optim.optimizer import AdamW
from jaxformers.optim.optimizer import Optimizer
from jaxformers.optim.schedule import Schedule


def tuning_free_l2(
  scope: Literal['global', 'tensor'] = 'global', decoupled: bool = False
) -> optax.GradientTransformationExtraArgs:
  r"""Takes from the gradient what would lengthen the parameters.

  The loss is the primary task and $\|\theta\|^2 / 2$ the auxiliary one, whose
  gradient is $\theta$: $u = g + \max(0, -\langle g, \theta\rangle) \theta /
  \|\theta\|^2$, so that $\langle u, \theta\rangle \ge 0$ and a step $-\eta u$
  lengthens $\theta$ only by $O(\eta^2)$. Stands before the optimiser, or with
  `decoupled` after it, where it treats the final update $d = -u$ likewise.
  Parameters of norm zero are left alone. Needs `params`.

  Source: Su Jianlin, "Multi-task learning (3): in the name of primary and
  secondary", 2022, kexue.fm/archives/8907 (whose formula lacks the last factor
  theta).

  Args:
    scope: whether norms are those of all parameters together or of each tensor.
    decoupled: whether updates, which are added to the parameters, come in
      rather than gradients.
  """
  if scope not in ('global', 'tensor'):
    raise ValueError(f"scope must be 'global' or 'tensor', got {scope!r}.")
  sign = -1 if decoupled else 1

  def factor(updates, params):
    square = tree_dot(params, params)
    along = sign * tree_dot(updates, params)
    return jnp.maximum(0, -along) / jnp.where(square > 0, square, 1)

  def project(update, param, scale):
    return update + (sign * scale * param).astype(update.dtype)

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError('tuning_free_l2 needs params: update(g, state, params).')
    if scope == 'global':
      scales = jax.tree.map(lambda _: factor(updates, params), updates)
    else:
      scales = jax.tree.map(factor, updates, params)
    return jax.tree.map(project, updates, params, scales), state

  return optax.GradientTransformationExtraArgs(
    optax.init_empty_state, update_fn
  )


@dataclasses.dataclass(frozen=True)
class TuningFreeL2:
  """An optimiser whose steps do not lengthen the parameters.

  Source: as `tuning_free_l2`.

  Attributes:
    optimizer: takes the steps; give it no weight decay of its own.
    scope: whether norms are those of all parameters or of each tensor.
    decoupled: whether its updates are treated rather than its gradients.
  """

  optimizer: Optimizer = AdamW(weight_decay=0.0)
  scope: Literal['global', 'tensor'] = 'global'
  decoupled: bool = False

  @property
  def learning_rate(self) -> Schedule:
    """Of the optimiser."""
    return self.optimizer.learning_rate

  def build(self, steps: int) -> optax.GradientTransformationExtraArgs:
    link = tuning_free_l2(self.scope, self.decoupled)
    optimizer = self.optimizer.build(steps)
    if self.decoupled:
      return optax.chain(optimizer, link)
    return optax.chain(link, optimizer)
