"""Step sizes that learn themselves make up for a mistuned learning rate.

A quadratic with 50 curvatures between 0.02 and 2, noisy gradients, and an optimum
that jumps halfway. SGD with momentum has its learning rate set too low, or right;
exponentiated gradients adapt a scale and a gain per entry around it.

Source: Amid, Anil, Fifty and Warmuth, "Step-size Adaptation Using Exponentiated
Gradient Updates", 2022, arXiv 2202.00145 (there: networks, and rotated digits).
Run: `jaxformers reproduce experiments/learnt_step_sizes.py`
Expected: reproduced. At a learning rate of 0.001 the mean loss is 1.97 with SGD and
0.56 with learnt steps; at 0.03 it is 0.22 and 0.21. Mechanic, which replaces the
learning rate altogether, has 1.47 and 1.16.
Time: 10 seconds on 2 CPU cores.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from jaxformers.optim import adapt_step_size
from jaxformers.train import Judgement
from jaxformers.train import Results
from jaxformers.train import Study
from jaxformers.train import Workspace
from jaxformers.train import below
from jaxformers.train.figure import COLOURS
from jaxformers.train.figure import plot_band

BASELINE, FULL = 'SGD', 'learnt scale and gains'
META_RATE = 0.01  # of the logarithms of scales and gains

# What learns the step sizes of SGD. Mechanic is there to compare with.
WRAPPERS = {
  BASELINE: lambda sgd: sgd,
  'learnt scale': lambda sgd: adapt_step_size(sgd, None, META_RATE),
  'learnt gains': lambda sgd: adapt_step_size(sgd, META_RATE, None),
  FULL: lambda sgd: adapt_step_size(sgd, META_RATE, META_RATE),
  'Mechanic, of optax': optax.contrib.mechanize,
}


@dataclasses.dataclass(frozen=True)
class LearntStepSizes(Study):
  """Measures losses on the way, for learning rates of all sizes.

  Attributes:
    rates: learning rates.
    mistuned: the one that is too low.
    tuned: the one that is about right.
    steps: the optimum jumps at half of them.
    width: number of parameters.
    noise: standard deviation of the gradients' noise.
  """

  claim = (
    'Step sizes that learn themselves make up for a mistuned learning rate.'
  )
  source = (
    'Amid, Anil, Fifty and Warmuth, "Step-size Adaptation Using Exponentiated '
    'Gradient Updates", 2022, arXiv 2202.00145'
  )
  seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
  rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
  mistuned: float = 1e-3
  tuned: float = 3e-2
  steps: int = 1500
  width: int = 50
  noise: float = 0.05

  def __post_init__(self):
    if not {self.mistuned, self.tuned} <= set(self.rates):
      raise ValueError(
        f'rates must contain mistuned={self.mistuned} and tuned={self.tuned}, '
        f'got {self.rates}.'
      )

  def variants(self) -> tuple[str, ...]:
    return tuple(WRAPPERS)

  def measure(
    self, variant: str, seed: int, workspace: Workspace
  ) -> dict[str, Any]:
    del workspace
    losses = [
      np.asarray(_losses(self, variant, rate, seed)) for rate in self.rates
    ]
    means = [x.mean() for x in losses]
    mistuned = self.rates.index(self.mistuned)
    return {
      'mean loss, mistuned': means[mistuned],
      'mean loss, tuned': means[self.rates.index(self.tuned)],
      'mean loss by rate': means,
      'loss on the way': losses[mistuned][self._shown],
    }

  @property
  def _shown(self) -> np.ndarray:
    return np.arange(0, self.steps, max(self.steps // 50, 1))

  def judge(self, results: Results) -> list[Judgement]:
    def part(name):
      return results.mean(FULL, name) / results.mean(BASELINE, name)

    statement = 'mean loss over that of {}, at the learning rate {:g}'
    return [
      below(statement.format(BASELINE, rate), part(f'mean loss, {name}'), bound)
      for name, rate, bound in (
        ('mistuned', self.mistuned, 0.4),
        ('tuned', self.tuned, 1.05),
      )
    ]

  def draw(self, results: Results, figure: Any) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    for variant in results.variants:
      style = {'color': COLOURS['baseline']} if variant == BASELINE else {}
      values = results.values(variant, 'mean loss by rate')
      plot_band(left, self.rates, values, label=variant, marker='o', **style)
      values = results.values(variant, 'loss on the way')
      plot_band(right, self._shown, values, **style)
    left.set_xscale('log')
    left.set_yscale('log')
    left.set_xlabel('learning rate')
    left.set_ylabel('loss (left: mean over steps)')
    right.set_xlabel(f'step, at the learning rate {self.mistuned:g}')
    figure.legend(loc='outside right upper')


@functools.partial(jax.jit, static_argnums=(0, 1))
def _losses(
  study: LearntStepSizes, variant: str, rate: float, seed: int
) -> Array:
  """Returns the loss before each step."""
  keys = jax.random.split(jax.random.key(seed), 3)
  low, high = math.log(0.02), math.log(2)
  shape = (study.width,)
  curvature_D = jnp.exp(
    jax.random.uniform(keys[0], shape, minval=low, maxval=high)
  )
  optima_2D = jax.random.normal(keys[1], (2, *shape))
  noise_LD = study.noise * jax.random.normal(keys[2], (study.steps, *shape))
  optimizer = WRAPPERS[variant](optax.sgd(rate, momentum=0.9))

  def step(carry, step_and_noise):
    x_D, state = carry
    t, noise_D = step_and_noise
    away_D = x_D - optima_2D[(t >= study.steps // 2).astype(int)]
    loss = jnp.sum(curvature_D * away_D**2) / 2
    gradient_D = curvature_D * away_D + noise_D
    updates, state = optimizer.update(gradient_D, state, x_D)
    return (optax.apply_updates(x_D, updates), state), loss

  x_D = jnp.zeros(shape)
  steps = jnp.arange(study.steps), noise_LD
  return jax.lax.scan(step, (x_D, optimizer.init(x_D)), steps)[1]


def study() -> Study:
  """Returns the study."""
  return LearntStepSizes()
