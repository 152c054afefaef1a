"""Large cosines of all blocks with the gradient do not make a large cosine.

A small network is trained with Adam, as it is, or with its update turned towards
the gradient, parameter by parameter, until each has a cosine of at least 0.5 with
its gradient. The cosine of the whole update is kappa times a mean of those, and
kappa depends on how the two spread their lengths over the parameters.

Source: Su Jianlin, "Local and global cosine similarity", 2024,
kexue.fm/archives/9931.
Run: `jaxformers reproduce experiments/local_cosines.py`
Expected: reproduced. Clipped at 0.5 in every parameter, the whole update has less
on 70 % of the steps, down to 0.33; two constructed blocks with 0.9 each have 0.178
together. The identity holds to 1e-7.
Time: 10 seconds on 2 CPU cores.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
import optax

from jaxformers.diagnostics import tree_cosine_report
from jaxformers.train import Judgement
from jaxformers.train import Results
from jaxformers.train import Study
from jaxformers.train import Workspace
from jaxformers.train import above
from jaxformers.train import below
from jaxformers.train.figure import COLOURS
from jaxformers.train.figure import PALETTE
from jaxformers.train.figure import plot_band

WIDTHS = (8, 32, 32, 1)
EXAMPLES = 256


@dataclasses.dataclass(frozen=True)
class LocalCosines(Study):
  """Trains a network and looks at each update.

  Attributes:
    least: the least cosine of each parameter's update, where it is clipped.
    rate: learning rate.
    steps: of training.
  """

  claim = (
    'A bound on the cosine of every block of an update with the gradient does '
    'not bound the cosine of the whole.'
  )
  source = (
    'Su Jianlin, "Local and global cosine similarity", 2024, '
    'kexue.fm/archives/9931'
  )
  least: float = 0.5
  rate: float = 0.01
  steps: int = 100

  def variants(self) -> tuple[str, ...]:
    return 'Adam', 'Adam, clipped', 'constructed'

  def measure(
    self, variant: str, seed: int, workspace: Workspace
  ) -> dict[str, Any]:
    del workspace
    if variant == 'constructed':
      report = tree_cosine_report(*constructed(0.9))
      measured = [report.cosine, report.kappa, *_locals(report)]
      rows = np.array(measured)[:, None]
    else:
      least = self.least if variant == 'Adam, clipped' else -1.0
      rows = np.array(train(seed, least, self.rate, self.steps))
    names = 'cosine', 'kappa', 'smallest', 'error'
    return dict(zip(names, rows, strict=True))

  def judge(self, results: Results) -> list[Judgement]:
    error = max(results.values(v, 'error').max() for v in results.variants)
    clipped = {
      name: results.values('Adam, clipped', name)
      for name in ('cosine', 'smallest')
    }
    made = {
      n: results.mean('constructed', n)[0] for n in ('cosine', 'smallest')
    }
    return [
      below('largest error of the identity', error, 1e-5),
      above(
        'smallest cosine of a block, clipped',
        clipped['smallest'].min(),
        self.least - 1e-3,
      ),
      above(
        'share of steps on which the whole has less',
        np.mean(clipped['cosine'] < self.least),
        0,
      ),
      above('smallest cosine of a block, constructed', made['smallest'], 0.899),
      below('cosine of the whole, constructed', made['cosine'], 0.2),
    ]

  def draw(self, results: Results, figure: Any) -> None:
    steps = np.arange(1, self.steps + 1)
    for axes, variant in zip(
      figure.subplots(1, 2, sharey=True), results.variants, strict=False
    ):
      for name, colour in zip(
        ('cosine', 'smallest', 'kappa'), PALETTE, strict=False
      ):
        label = {
          'cosine': 'cosine of the whole',
          'smallest': 'smallest of a block',
        }
        values = results.values(variant, name)
        plot_band(
          axes, steps, values, label=label.get(name, name), color=colour
        )
      axes.axhline(0, color=COLOURS['grid'])
      axes.set_xlabel(f'step ({variant})')
    axes.axhline(self.least, color=COLOURS['baseline'], linestyle='--')
    axes.set_ylim(-0.3, 1.03)
    figure.axes[0].set_ylabel('cosine of update and gradient')
    figure.legend(
      handles=axes.get_legend_handles_labels()[0], loc='outside right upper'
    )


def constructed(cosine: float) -> tuple[list[Array], list[Array]]:
  """Two blocks with one cosine, each long where the other tree is short."""
  v = jnp.array([cosine, (1 - cosine**2) ** 0.5])
  return [jnp.array([0.1, 0.0]), jnp.array([1.0, 0.0])], [v, 0.1 * v]


def _locals(report):
  """The smallest cosine of a block, and the error of the identity."""
  c_N = jnp.stack([*report.block_cosines.values()])
  w_N = jnp.stack([*report.block_weights.values()])
  error = jnp.abs(report.cosine - report.kappa * jnp.sum(w_N * c_N))
  return c_N.min(), error


@functools.partial(jax.jit, static_argnums=3)
def train(
  seed: int, least: float, rate: float, steps: int
) -> tuple[Array, ...]:
  """Trains on a random teacher; returns what each step measured."""
  keys = jax.random.split(jax.random.key(seed), 3)
  x_ND = jax.random.normal(keys[0], (EXAMPLES, WIDTHS[0]))
  y_N = jnp.sin(x_ND @ jax.random.normal(keys[1], WIDTHS[:1]))
  adam = optax.adam(rate)

  def loss(params):
    return jnp.mean((network(params, x_ND) - y_N) ** 2)

  def step(carry, _):
    params, state = carry
    gradient = jax.grad(loss)(params)
    updates, state = adam.update(gradient, state, params)
    updates = jax.tree.map(functools.partial(turned, least), updates, gradient)
    report = tree_cosine_report(optax.tree.scale(-1, updates), gradient)
    measured = report.cosine, report.kappa, *_locals(report)
    return (optax.apply_updates(params, updates), state), measured

  params = draw_network(keys[2])
  return jax.lax.scan(step, (params, adam.init(params)), length=steps)[1]


def turned(least: float, update: Array, gradient: Array) -> Array:
  """Turns an update towards descent until its cosine is the least."""
  length, down = jnp.linalg.norm(update), -_unit(gradient)
  along = jnp.sum(_unit(update) * down)
  across = _unit(_unit(update) - along * down)
  clipped = length * (least * down + jnp.sqrt(1 - least**2) * across)
  return jnp.where(along < least, clipped, update)


def _unit(x):
  return x / jnp.maximum(jnp.linalg.norm(x), 1e-30)


def draw_network(key: Array) -> dict[str, list[Array]]:
  """Draws weights of variance 1 / fan-in."""
  sizes = [*zip(WIDTHS, WIDTHS[1:], strict=False)]
  keys = jax.random.split(key, len(sizes))
  return {
    'weights': [
      jax.random.normal(k, (m, n)) / m**0.5
      for k, (m, n) in zip(keys, sizes, strict=True)
    ],
    'offsets': [jnp.zeros(n) for n in WIDTHS[1:-1]],
  }


def network(params: dict[str, list[Array]], x_ND: Array) -> Array:
  """Tanh layers and a linear one without offset."""
  *hidden, last = params['weights']
  for w, b in zip(hidden, params['offsets'], strict=True):
    x_ND = jnp.tanh(x_ND @ w + b)
  return (x_ND @ last)[:, 0]


def study() -> Study:
  """Returns the study."""
  return LocalCosines()
