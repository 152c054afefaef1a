"""What learning its step sizes costs an optimiser, beside AdamW alone.

Such updates are bound by memory. AdamW reads and writes about ten numbers per
parameter; a scale needs the last update and the gradient once more, gains two
more arrays, and where the compiler makes one loop per array, as on CPU, all of
these are read several times. Two ratios, each within one run:

1. updates alone: parameters in place, by a gradient that is there;
2. whole training steps of the main job, which is what a user notices.

Run: python -m experiments.benchmarks.step_size --save
Time: 3 minutes on 2 CPU cores, and 9 GiB of memory.
"""

import argparse
import dataclasses
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import lm
from experiments.benchmarks import timing
from experiments.benchmarks.train_step import Stepper
from jaxformers.optim import AdaptStepSize
from jaxformers.optim import adapt_step_size
from jaxformers.train import Experiment

ADAM = optax.adam(1e-3)
OPTIMIZERS = {
  'adamw': ADAM,
  'scale': adapt_step_size(ADAM, gain_lr=None),
  'scale_and_gains': adapt_step_size(ADAM, gain_placement='post'),
  'scale_and_gains_bfloat16': adapt_step_size(
    ADAM, gain_placement='post', accumulator_dtype=jnp.bfloat16
  ),
}
# Weight decay stands outside of the adaptation.
DECAY = optax.add_decayed_weights(-1e-4)


class Updater:
  """Updates parameters in place by one gradient."""

  def __init__(self, optimizer: optax.GradientTransformation, gradients: Any):
    optimizer = optax.chain(optimizer, DECAY)
    self.gradients = gradients
    self.params = jax.tree.map(jnp.ones_like, gradients)
    self.state = optimizer.init(self.params)

    def step(params, state, gradients):
      updates, state = optimizer.update(gradients, state, params)
      return optax.apply_updates(params, updates), state

    self.step = jax.jit(step, donate_argnums=(0, 1))

  def __call__(self) -> Any:
    self.params, self.state = self.step(self.params, self.state, self.gradients)
    return self.params


def update_costs(leaves: int, width: int, rounds: int) -> dict[str, Any]:
  """Compares updates alone.

  Args:
    leaves: number of matrices.
    width: each has so many rows, and four times as many columns.
    rounds: how often each is timed.
  """
  shape = width, 4 * width
  gradients = {
    f'w_{i}': jax.random.normal(jax.random.key(i), shape) for i in range(leaves)
  }
  updaters = {n: Updater(o, gradients) for n, o in OPTIMIZERS.items()}
  seconds = timing.seconds_in_turns(updaters, rounds)
  return {
    'parameters': leaves * 4 * width**2,
    'adamw_update_seconds': statistics.median(seconds['adamw']),
    'update_relative_to_adamw': _ratios(seconds),
  }


def step_costs(experiment: Experiment, rounds: int) -> dict[str, Any]:
  """Compares whole training steps.

  Args:
    experiment: what is trained; its optimiser is adapted.
    rounds: how often each is timed.
  """
  prepared = experiment.data.prepare()
  adapted = dataclasses.replace(
    experiment, optimizer=AdaptStepSize(experiment.optimizer)
  )
  steppers = {
    'adamw': Stepper(experiment, prepared),
    'scale_and_gains': Stepper(adapted, prepared),
  }
  seconds = timing.seconds_in_turns(steppers, rounds)
  params = steppers['adamw'].state.params
  return {
    'step_parameters': sum(p.size for p in jax.tree.leaves(params)),
    'step_tokens': experiment.batch_size * experiment.data.length,
    'adamw_step_seconds': statistics.median(seconds['adamw']),
    'step_relative_to_adamw': _ratios(seconds),
  }


def _ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
  return {
    name: timing.ratio(samples, seconds['adamw'])
    for name, samples in seconds.items()
    if name != 'adamw'
  }


def measure(
  experiment: Experiment, *, leaves: int, width: int, rounds: int
) -> dict[str, Any]:
  """Measures both ratios.

  Args:
    experiment: what is trained.
    leaves: number of matrices that are updated alone.
    width: each has so many rows, and four times as many columns.
    rounds: how often each thing is timed.
  """
  return {
    **update_costs(leaves, width, rounds),
    **step_costs(experiment, rounds),
  }


def main() -> None:
  """Measures and reports."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--save', action='store_true', help='keep the results')
  parser.add_argument('--leaves', type=int, default=24, help='of 4 M numbers')
  arguments = parser.parse_args()
  results = measure(
    lm.experiment(), leaves=arguments.leaves, width=1024, rounds=15
  )
  timing.report('step_size', results, arguments.save)


if __name__ == '__main__':
  main()
