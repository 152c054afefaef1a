"""Clean data keep a rein on training with noisy data, without a coefficient.

Logistic regression on 400 examples of which 30 % have the wrong label. The loss
of 60 clean ones is an auxiliary task: it must not rise, and has no other say.

Source: Su Jianlin, "Multi-task learning (3): in the name of primary and
secondary", 2022, kexue.fm/archives/8907 (which proposes it without numbers).
Run: `jaxformers reproduce experiments/primary_and_auxiliary.py`
Expected: reproduced. The clean loss ends 0.0019 nats above its least without
and 0.00002 with the constraint; the noisy loss is 0.5801 either way. Accuracy
gains nothing by it (0.771 either way); the sum of both losses reaches 0.842.
Time: a minute on 2 CPU cores.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.optim.tasks import Primary
from jaxformers.optim.tasks import ReferenceLoss
from jaxformers.optim.tasks import multitask_value_and_grad
from jaxformers.train import Judgement
from jaxformers.train import Results
from jaxformers.train import Study
from jaxformers.train import Workspace
from jaxformers.train import above
from jaxformers.train import below
from jaxformers.train.figure import PALETTE
from jaxformers.train.figure import plot_band

WEIGHTINGS = {
  'noisy only': ReferenceLoss((1.0, 1e30)),  # The clean loss counts nothing.
  'clean must not rise': Primary(),
  'sum': ReferenceLoss((1.0, 1.0)),
}


@dataclasses.dataclass(frozen=True)
class PrimaryAndAuxiliary(Study):
  """Measures how far a loss rises again that must not rise.

  Attributes:
    inputs: dimension of the examples.
    noisy: how many examples the primary task has.
    flipped: part of them with the wrong label.
    clean: how many examples the auxiliary task has.
    steps: of gradient descent on all examples.
    learning_rate: of it.
  """

  claim = (
    'Projecting the gradient of a primary loss keeps an auxiliary loss from '
    'rising, at no cost to the primary one.'
  )
  source = (
    'Su Jianlin, "Multi-task learning (3): in the name of primary and '
    'secondary", 2022, kexue.fm/archives/8907'
  )
  seeds: tuple[int, ...] = tuple(range(8))
  inputs: int = 40
  noisy: int = 400
  flipped: float = 0.3
  clean: int = 60
  steps: int = 800
  learning_rate: float = 0.3

  def variants(self) -> tuple[str, ...]:
    return tuple(WEIGHTINGS)

  def measure(
    self, variant: str, seed: int, workspace: Workspace
  ) -> dict[str, Any]:
    del workspace
    options = self.inputs, self.noisy, self.flipped, self.clean
    with jax.enable_x64(True):
      run = functools.partial(_descend, variant, self.steps, options)
      losses, accuracy = jax.device_get(
        jax.jit(run)(jax.random.key(seed), self.learning_rate)
      )
    clean = losses[:, 1]
    shown = np.unique(np.geomspace(1, len(losses), 100).astype(int)) - 1
    return {
      'step': shown + 1,
      'rise of the clean loss': (clean - np.minimum.accumulate(clean))[shown],
      'clean loss': clean[-1],
      'last less least clean loss': clean[-1] - clean.min(),
      'largest rise of the clean loss': np.diff(clean).max(),
      'noisy loss': losses[-1, 0],
      'accuracy': accuracy,
    }

  def judge(self, results: Results) -> list[Judgement]:
    plain, own = 'noisy only', 'clean must not rise'
    rise = 'last less least clean loss'
    reduced = results.mean(plain, rise) / max(results.mean(own, rise), 1e-12)
    noisy = results.values(own, 'noisy loss')
    cost = (noisy / results.values(plain, 'noisy loss')).mean() - 1
    return [
      above(f'how many times smaller is: {rise}', reduced, 20),
      below('relative change of the noisy loss', abs(cost), 1e-3),
    ]

  def draw(self, results: Results, figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    styles = zip(PALETTE, 'o+s', results.variants, strict=False)
    for colour, marker, variant in styles:
      steps = results.values(variant, 'step')[0]
      curves = 1e3 * results.values(variant, 'rise of the clean loss')
      style = {'color': colour, 'label': variant}
      plot_band(left, steps, curves, **style)
      noisy = results.values(variant, 'noisy loss')
      accuracy = results.values(variant, 'accuracy')
      right.plot(
        noisy, accuracy, marker, mfc='none', mew=1.5, markersize=9, **style
      )
    left.set_xscale('log')
    left.set_xlabel('step')
    left.set_ylabel('rise of the loss of clean examples in mnats')
    right.set_xlabel('final loss of noisy examples in nats')
    right.set_ylabel('accuracy on new examples')
    figure.legend(
      handles=right.get_legend_handles_labels()[0], loc='outside right upper'
    )


def _examples(key, direction_D, count, flipped):
  """Returns examples and labels of 0 and 1, some of them flipped."""
  x_key, flip_key = jax.random.split(key)
  x_BD = jax.random.normal(x_key, (count, len(direction_D)))
  is_flipped_B = jax.random.bernoulli(flip_key, flipped, (count,))
  return x_BD, ((x_BD @ direction_D > 0) ^ is_flipped_B).astype(x_BD.dtype)


def _loss(w_D, examples):
  x_BD, y_B = examples
  z_B = x_BD @ w_D
  return jnp.mean(jax.nn.softplus(z_B) - y_B * z_B)


def _descend(variant, steps, options, key, learning_rate):
  """Returns losses `[steps, 2]` and the final accuracy on new examples."""
  inputs, noisy, flipped, clean = options
  keys = jax.random.split(key, 4)
  direction_D = jax.random.normal(keys[0], (inputs,))
  sets = [
    _examples(keys[1], direction_D, noisy, flipped),
    _examples(keys[2], direction_D, clean, 0.0),
  ]
  losses = lambda w_D: jnp.stack([_loss(w_D, examples) for examples in sets])
  gradient = multitask_value_and_grad(losses, WEIGHTINGS[variant])

  def step(w_D, _):
    value, direction_D = gradient(w_D, state=())
    return w_D - learning_rate * direction_D, value.losses_T

  start_D = jnp.zeros(inputs, direction_D.dtype)
  w_D, losses_LT = jax.lax.scan(step, start_D, length=steps)
  x_BD, y_B = _examples(keys[3], direction_D, 4000, 0.0)
  return losses_LT, jnp.mean((x_BD @ w_D > 0) == y_B)


def study() -> Study:
  """Returns the study."""
  return PrimaryAndAuxiliary()
