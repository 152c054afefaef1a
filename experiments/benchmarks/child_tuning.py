"""What ChildTuning costs beside AdamW: the update alone, and the whole train step.

Masks need a random number per parameter, with 32 bits or 8. They are drawn anew
at every step, so what they cost is what counts.

Run: python -m experiments.benchmarks.child_tuning --save
Time: about 2 minutes on 2 CPU cores.
"""

import argparse
import dataclasses
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from experiments import lm
from experiments.benchmarks import timing
from experiments.benchmarks.train_step import Stepper
from jaxformers.optim import ChildTuningF
from jaxformers.optim.optimizer import Optimizer
from jaxformers.train import Experiment


class Updater:
  """Runs updates of an optimiser, each on the result of the one before."""

  def __init__(self, optimizer: Optimizer, params: Any):
    transform = optimizer.build(1000)
    self.params = params
    self.state = jax.jit(transform.init)(params)
    self.updates = jax.tree.map(jnp.ones_like, params)
    self.update = jax.jit(transform.update, donate_argnums=(0, 1))

  def __call__(self) -> Any:
    self.updates, self.state = self.update(
      self.updates, self.state, self.params
    )
    return self.updates


def measure(
  experiment: Experiment, *, rounds: int, update_rounds: int
) -> dict[str, Any]:
  """Times AdamW, and ChildTuning around it with fine and coarse masks.

  Args:
    experiment: what is trained, with AdamW.
    rounds: how often each train step is timed.
    update_rounds: how often each update alone is timed.
  """
  adamw = experiment.optimizer
  optimizers = {
    'adamw': adamw,
    'child_tuning': ChildTuningF(p=0.3, inner=adamw),
    'child_tuning_coarse': ChildTuningF(p=0.3, inner=adamw, coarse=True),
  }
  prepared = experiment.data.prepare()
  steppers = {
    name: Stepper(dataclasses.replace(experiment, optimizer=o), prepared)
    for name, o in optimizers.items()
  }
  params = jax.tree.map(jnp.copy, steppers['adamw'].state.params)
  updaters = {name: Updater(o, params) for name, o in optimizers.items()}
  steps = timing.seconds_in_turns(steppers, rounds)
  updates = timing.seconds_in_turns(updaters, update_rounds)
  results: dict[str, Any] = {
    'parameters': sum(a.size for a in jax.tree.leaves(params))
  }
  for what, seconds in (('step', steps), ('update', updates)):
    for name, own in seconds.items():
      results[f'{name}_{what}_seconds'] = statistics.median(own)
    for name in list(optimizers)[1:]:
      relative = timing.ratio(seconds[name], seconds['adamw'])
      results[f'{name}_{what}_relative_to_adamw'] = relative
  return results


def main() -> None:
  """Measures and reports."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--save', action='store_true', help='keep the results')
  arguments = parser.parse_args()
  results = measure(lm.experiment(), rounds=25, update_rounds=50)
  timing.report('child_tuning', results, arguments.save)


if __name__ == '__main__':
  main()
