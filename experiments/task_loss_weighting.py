"""Dividing losses or gradients by themselves makes tasks indifferent to units.

Two regression tasks share six tanh units. The loss of the second is multiplied
by 2^-13, some 1e-4, or 100 is added to it, and the same network is trained
again. What is shown is the part of the second task's own loss that remains.

Source: Su Jianlin, "Multi-task learning (1): in the name of loss", 2022,
kexue.fm/archives/8870.
Run: `jaxformers reproduce experiments/task_loss_weighting.py`
Expected: reproduced. In the other units, 17 times as much of the second loss
remains with equal weights, and exactly as much with all others. With the
constant, 24 times as much remains if losses are divided by themselves, 6 times
if by their first values, and exactly as much if gradients are by their norms.
Time: a minute on 2 CPU cores.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
import optax

from jaxformers.optim.tasks import Equal
from jaxformers.optim.tasks import InitialLoss
from jaxformers.optim.tasks import InverseLoss
from jaxformers.optim.tasks import UnitGradients
from jaxformers.optim.tasks import multitask_value_and_grad
from jaxformers.train import Judgement
from jaxformers.train import Results
from jaxformers.train import Study
from jaxformers.train import Workspace
from jaxformers.train import above
from jaxformers.train import below
from jaxformers.train.figure import PALETTE

WEIGHTINGS = {
  'equal': Equal(),
  'first loss': InitialLoss(),
  'own loss': InverseLoss(floor=1e-20),
  'gradient norm': UnitGradients(eps=1e-30),
}
# A power of two, some 1e-4: rounding is the same, which steps of a length that
# does not decay, such as sums of unit gradients, would amplify.
FACTOR = 2.0**-13
CHANGES = 'unchanged', 'times 2^-13', 'plus 100'
INPUTS, HIDDEN = 20, 6
NOISE = 0.2  # Without it losses fall until nothing but rounding is left.


@dataclasses.dataclass(frozen=True)
class TaskLossWeighting(Study):
  """Measures what remains of the loss of a task in other units.

  Attributes:
    steps: of training.
    rows: examples, all of which make up a batch.
    learning_rate: of Adam at first; falls linearly to 0.
  """

  claim = (
    'Dividing each loss by its first value or by itself makes training '
    'indifferent to the scale of a loss, and dividing gradients by their norms '
    'also to a constant added to it.'
  )
  source = (
    'Su Jianlin, "Multi-task learning (1): in the name of loss", 2022, '
    'kexue.fm/archives/8870'
  )
  seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
  steps: int = 800
  rows: int = 256
  learning_rate: float = 0.01

  def variants(self) -> tuple[str, ...]:
    return tuple(WEIGHTINGS)

  def measure(
    self, variant: str, seed: int, workspace: Workspace
  ) -> dict[str, Any]:
    del workspace
    # In double precision, or rounding would grow over the steps.
    with jax.enable_x64(True):
      remaining = _train(variant, self.steps, self.rows, self.learning_rate)
      cases = jnp.array([[1.0, 0.0], [FACTOR, 0.0], [1.0, 100.0]])
      values = jax.vmap(remaining, (None, 0, 0))(seed, *cases.T)
      return dict(zip(CHANGES, np.asarray(values), strict=True))

  def judge(self, results: Results) -> list[Judgement]:
    plain = {v: results.values(v, CHANGES[0]) for v in results.variants}

    def change(variant, name):
      ratios = results.values(variant, name) / plain[variant]
      return np.abs(ratios - 1).max()

    def worse(variant, name):
      return results.mean(variant, name) / plain[variant].mean()

    unmoved = 'largest relative change of what remains'
    times = 'how many times as much remains'
    return [
      *(
        below(f'{unmoved}, {v}, {CHANGES[1]}', change(v, CHANGES[1]), 1e-4)
        for v in ('first loss', 'own loss', 'gradient norm')
      ),
      below(
        f'{unmoved}, gradient norm, {CHANGES[2]}',
        change('gradient norm', CHANGES[2]),
        1e-4,
      ),
      above(f'{times}, equal, {CHANGES[1]}', worse('equal', CHANGES[1]), 10),
      above(
        f'{times}, own loss, {CHANGES[2]}', worse('own loss', CHANGES[2]), 10
      ),
    ]

  def draw(self, results: Results, figure: Any) -> None:
    axes = figure.subplots()
    for i, (colour, name) in enumerate(zip(PALETTE, CHANGES, strict=False)):
      at = np.arange(len(results.variants)) + 0.2 * (i - 1)
      values = np.array([results.values(v, name) for v in results.variants])
      axes.plot(
        at, values.mean(axis=1), '_', color=colour, markersize=16, mew=3,
        label=name,
      )  # fmt: skip
      axes.plot(
        np.repeat(at, values.shape[1]), values.ravel(), '.', color=colour
      )
    axes.set_yscale('log')
    ticks = 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0
    axes.set_yticks(ticks, [f'{tick:g}' for tick in ticks])
    axes.minorticks_off()
    axes.set_xticks(range(len(results.variants)), results.variants)
    axes.set_xlabel('losses are divided by (equal: by nothing)')
    axes.set_ylabel('part of the loss of task 2 that remains')
    figure.legend(
      handles=axes.get_legend_handles_labels()[0],
      title='loss of task 2',
      loc='outside right upper',
    )


@functools.cache
def _train(variant: str, steps: int, rows: int, learning_rate: float) -> Any:
  """Returns the function from seed, factor and constant to what remains."""
  optimizer = optax.adam(optax.linear_schedule(learning_rate, 0.0, steps))

  @jax.jit
  def remaining(seed: Array, factor: Array, constant: Array) -> Array:
    data_key, key = jax.random.split(jax.random.key(seed))
    x_BD, y_BT = _data(data_key, rows)

    def own_losses(params):
      h_BF = jnp.tanh(x_BD @ params['w_DF'] + params['b_F'])
      errors_BT = h_BF @ params['w_FT'] + params['b_T'] - y_BT
      return jnp.mean(errors_BT**2, axis=0)

    def losses(params):
      own_T = own_losses(params)
      return jnp.stack([own_T[0], factor * own_T[1] + constant])

    gradient = multitask_value_and_grad(losses, WEIGHTINGS[variant])
    params = _params(key)

    def step(carry, _):
      params, state, tasks = carry
      value, gradients = gradient(params, state=tasks)
      updates, state = optimizer.update(gradients, state)
      return (optax.apply_updates(params, updates), state, value.state), None

    tasks = gradient(params)[0].state
    tasks = jax.tree.map(jnp.zeros_like, tasks)
    carry = params, optimizer.init(params), tasks
    (last, _, _), _ = jax.lax.scan(step, carry, length=steps)
    return own_losses(last)[1] / own_losses(params)[1]

  return remaining


def _data(key: Array, rows: int) -> tuple[Array, Array]:
  """Returns inputs, and noisy targets that need three tanh units each."""
  x_key, w_key, noise_key = jax.random.split(key, 3)
  x_BD = jax.random.normal(x_key, (rows, INPUTS))
  w_DF = jax.random.normal(w_key, (INPUTS, HIDDEN)) / jnp.sqrt(INPUTS)
  h_BF = jnp.tanh(x_BD @ w_DF)
  noise_BT = NOISE * jax.random.normal(noise_key, (rows, 2))
  return x_BD, h_BF.reshape(rows, 2, -1).sum(axis=-1) + noise_BT


def _params(key: Array) -> dict[str, Array]:
  in_key, out_key = jax.random.split(key)
  return {
    'w_DF': jax.random.normal(in_key, (INPUTS, HIDDEN)) / jnp.sqrt(INPUTS),
    'b_F': jnp.zeros(HIDDEN),
    'w_FT': jax.random.normal(out_key, (HIDDEN, 2)) / jnp.sqrt(HIDDEN),
    'b_T': jnp.zeros(2),
  }


def study() -> Study:
  """Returns the study."""
  return TaskLossWeighting()
