"""Descending along the shortest mixture of gradients raises no loss.

Two quadratic losses of two parameters with different minima. Descent of their
sum first raises one of them; MGDA, which takes the minimum-norm point of the
gradients' convex hull, raises neither, and stops where no direction serves
both. Other rules for conflicting gradients run beside them.

Source: Su Jianlin, "Multi-task learning (2): in the name of gradient", 2022,
kexue.fm/archives/8896; Sener and Koltun, 2018, arXiv 1810.04650.
Run: `jaxformers reproduce experiments/multiple_gradient_descent.py`
Expected: reproduced. Of 3000 steps, the mean of the gradients raises a loss in
286, MGDA in none; the shortest mixture at the end is below 1e-8 for both. MGDA
stops at an end of the front, at losses of 0 and 14.75. Nash-MTL, whose direction
is as long as ever near the front, goes to and fro there: 2066 steps.
Time: half a minute on 2 CPU cores.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.ops import min_norm_weights
from jaxformers.optim.tasks import MGDA
from jaxformers.optim.tasks import CAGrad
from jaxformers.optim.tasks import Equal
from jaxformers.optim.tasks import NashMTL
from jaxformers.optim.tasks import PCGrad
from jaxformers.optim.tasks import UPGrad
from jaxformers.optim.tasks import multitask_value_and_grad
from jaxformers.train import Judgement
from jaxformers.train import Results
from jaxformers.train import Study
from jaxformers.train import Workspace
from jaxformers.train import above
from jaxformers.train import below
from jaxformers.train.figure import PALETTE

WEIGHTINGS = {
  'mean': Equal(),
  'MGDA': MGDA(),
  'PCGrad': PCGrad(),
  'CAGrad': CAGrad(0.5),
  'UPGrad': UPGrad(),
  'Nash-MTL': NashMTL(),
}
CURVATURE = (((1.0, 0.0), (0.0, 10.0)), ((10.0, 3.0), (3.0, 1.5)))
CENTRE = ((1.0, 0.0), (-1.0, 1.0))


@dataclasses.dataclass(frozen=True)
class MultipleGradientDescent(Study):
  """Counts the steps that raise a loss.

  Attributes:
    steps: of descent.
    learning_rate: of plain gradient descent.
    start: the first parameters.
  """

  claim = (
    'Gradient descent along the minimum-norm mixture of the gradients raises '
    'no loss and arrives at a Pareto-stationary point.'
  )
  source = (
    'Su Jianlin, "Multi-task learning (2): in the name of gradient", 2022, '
    'kexue.fm/archives/8896'
  )
  seeds: tuple[int, ...] = (0,)
  steps: int = 3000
  learning_rate: float = 0.02
  start: tuple[float, float] = (3.0, 2.0)

  def variants(self) -> tuple[str, ...]:
    return tuple(WEIGHTINGS)

  def measure(
    self, variant: str, seed: int, workspace: Workspace
  ) -> dict[str, Any]:
    del seed, workspace
    with jax.enable_x64(True):
      run = functools.partial(_descend, variant, self.steps)
      path, losses, norm = jax.device_get(
        jax.jit(run)(jnp.array(self.start), self.learning_rate)
      )
    rises = (np.diff(losses, axis=0) > 1e-12).any(axis=1)
    shown = np.unique(np.geomspace(1, len(losses), 100).astype(int)) - 1
    return {
      'steps that raise a loss': rises.sum(),
      'norm of the shortest mixture': norm,
      'step': shown,
      'loss 1': losses[shown, 0],
      'loss 2': losses[shown, 1],
      'x': path[shown, 0],
      'y': path[shown, 1],
    }

  def judge(self, results: Results) -> list[Judgement]:
    rises = 'steps that raise a loss'
    norm = 'norm of the shortest mixture'
    return [
      below(f'{rises}, MGDA', results.mean('MGDA', rises), 0.5),
      above(f'{rises}, mean', results.mean('mean', rises), 50),
      below(f'{norm} at the end, MGDA', results.mean('MGDA', norm), 1e-8),
      below(f'{norm} at the end, mean', results.mean('mean', norm), 1e-8),
    ]

  def draw(self, results: Results, figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    # The first are the widest, so that those on top of them hide none.
    widths = np.linspace(5, 1, len(results.variants))
    for colour, width, variant in zip(
      PALETTE, widths, results.variants, strict=False
    ):
      values = lambda name, v=variant: results.values(v, name)[0]
      rises = int(results.mean(variant, 'steps that raise a loss'))
      style = {'color': colour, 'lw': width, 'label': f'{variant} ({rises})'}
      left.plot(values('x'), values('y'), **style)
      right.plot(values('loss 1'), values('loss 2'), **style)
      for axes, names in ((left, 'xy'), (right, ('loss 1', 'loss 2'))):
        end = [values(name)[-1] for name in names]
        axes.plot(*end, 'o', color=colour, markersize=4 + 2 * width)
    left.set_xlabel('first parameter')
    left.set_ylabel('second parameter')
    right.set_xlabel('loss of task 1')
    right.set_ylabel('loss of task 2')
    right.set_xscale('symlog', linthresh=0.1)
    right.set_yscale('symlog', linthresh=0.1)
    figure.legend(
      handles=left.get_legend_handles_labels()[0],
      title='(steps that\nraise a loss)',
      loc='outside right upper',
    )


def _losses(x):
  offset_TD = x - jnp.array(CENTRE)
  curvature_TDE = jnp.array(CURVATURE)
  return jnp.einsum('TD,TDE,TE->T', offset_TD, curvature_TDE, offset_TD) / 2


def _descend(variant, steps, start, learning_rate):
  """Returns points, losses, and the norm of the last shortest mixture."""
  gradient = multitask_value_and_grad(_losses, WEIGHTINGS[variant])

  def step(carry, _):
    x, state = carry
    value, direction = gradient(x, state=state)
    return (x - learning_rate * direction, value.state), (x, value.losses_T)

  state = jax.tree.map(jnp.zeros_like, gradient(start)[0].state)
  (x, _), (path, losses) = jax.lax.scan(step, (start, state), length=steps)
  jacobian_TD = jax.jacrev(_losses)(x)
  shortest = min_norm_weights(jacobian_TD @ jacobian_TD.T) @ jacobian_TD
  return path, losses, jnp.linalg.norm(shortest)


def study() -> Study:
  """Returns the study."""
  return MultipleGradientDescent()
