"""Gradient descent with large steps ends at flatter minima, as a penalty would.

The loss (a b - 0.6)^2 / 2 is zero along a hyperbola; it is flattest where |(a, b)|
is smallest, 1.0954. Descent from (2.8, 3.5) ends nearer to it the larger its
learning rate h is, because it follows the flow of L + (h / 4) |dL|^2. Small steps
on L + (lambda / 2) |dL|^2 do the same.

Source: Barrett and Dherin, "Implicit Gradient Regularization", 2020, arXiv
2009.11162, their model of two parameters; kexue.fm/archives/7787.
Run: `jaxformers reproduce experiments/implicit_regularization.py`
Expected: reproduced. The last norm falls from 2.1345 at h = 0.001 to 1.8067 at 0.06
and 1.3475 at 0.09; with lambda = 0.03 at h = 0.001 it is 2.0052.
Time: 5 seconds on 2 CPU cores.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from jaxformers.optim import with_gradient_penalty
from jaxformers.train import Judgement
from jaxformers.train import Results
from jaxformers.train import Study
from jaxformers.train import Workspace
from jaxformers.train import above
from jaxformers.train import below
from jaxformers.train.figure import COLOURS
from jaxformers.train.figure import PALETTE

TARGET = 0.6
START = (2.8, 3.5)
SHOWN = 60  # points of a path that are kept, dense where it is fast


def loss(params: Array) -> Array:
  """Of a network with one hidden unit and one example."""
  a, b = params
  return (a * b - TARGET) ** 2 / 2


@dataclasses.dataclass(frozen=True)
class ImplicitRegularization(Study):
  """Descends with several learning rates and penalties.

  Attributes:
    seeds: nothing is random.
    rates: learning rates h without penalty, rising; the first also descends
      the penalised losses.
    large: one of them, which is held against the first.
    penalties: lambda.
    time: h times the number of steps.
  """

  claim = (
    'Gradient descent with larger steps ends at flatter minima, like descent '
    'with a penalty on the norm of the gradient.'
  )
  source = (
    'Barrett and Dherin, "Implicit Gradient Regularization", 2020, arXiv '
    '2009.11162'
  )
  seeds: tuple[int, ...] = (0,)
  rates: tuple[float, ...] = (0.001, 0.01, 0.03, 0.06, 0.09)
  large: float = 0.06
  penalties: tuple[float, ...] = (0.01, 0.03)
  time: float = 30.0

  def __post_init__(self):
    if self.large not in self.rates:
      raise ValueError(f'rates {self.rates} must contain large={self.large}.')

  def variants(self) -> tuple[str, ...]:
    rates = (_name('h', h) for h in self.rates)
    return *rates, *(_name('lambda', x) for x in self.penalties)

  def measure(
    self, variant: str, seed: int, workspace: Workspace
  ) -> dict[str, Any]:
    del seed, workspace
    kind, number = variant.split(' = ')
    rate = float(number) if kind == 'h' else self.rates[0]
    penalty = float(number) if kind == 'lambda' else 0.0
    with jax.enable_x64(True):
      steps = round(self.time / rate)
      path = np.asarray(descend(rate, penalty, steps))
    shown = np.unique(np.geomspace(1, steps + 1, SHOWN).round().astype(int)) - 1
    shown = np.interp(
      np.linspace(0, 1, SHOWN), np.linspace(0, 1, len(shown)), shown
    )
    a, b = path[shown.round().astype(int)].T
    return {
      'norm': np.linalg.norm(path[-1]),
      'loss': float(loss(path[-1])),
      'a': a,
      'b': b,
    }

  def judge(self, results: Results) -> list[Judgement]:
    norms = [results.mean(_name('h', h), 'norm') for h in self.rates]
    large = results.mean(_name('h', self.large), 'norm')
    penalised = results.mean(_name('lambda', self.penalties[-1]), 'norm')
    return [
      below(
        'largest change of the norm from h to the next', max(np.diff(norms)), 0
      ),
      above(
        f'norm at h = {self.rates[0]:g} less that at {self.large:g}',
        norms[0] - large,
        0.25,
      ),
      below(f'norm with lambda = {self.penalties[-1]:g}', penalised, 2.02),
    ]

  def draw(self, results: Results, figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    a = np.geomspace(0.12, 4.5, 200)
    left.plot(a, TARGET / a, color=COLOURS['baseline'], label='loss 0')
    for h, colour in zip(self.rates, PALETTE, strict=False):
      name = _name('h', h)
      a, b = (results.values(name, x)[0] for x in 'ab')
      left.plot(a, b, color=colour, marker='.', label=name)
    left.set_xlim(-0.5, 3)
    left.set_ylim(-0.3, 3.7)
    left.set_xlabel('a')
    left.set_ylabel('b')
    norms = [results.mean(_name('h', h), 'norm') for h in self.rates]
    right.plot(
      self.rates, norms, marker='o', color=COLOURS['text'], label='implicit: h'
    )
    norms = [results.mean(_name('lambda', x), 'norm') for x in self.penalties]
    # Half the learning rate is the penalty that does the same.
    right.plot(
      [2 * x for x in self.penalties],
      norms,
      marker='s',
      linestyle='none',
      color=COLOURS['baseline'],
      label='explicit: 2 lambda',
    )
    right.axhline(
      (2 * TARGET) ** 0.5, color=COLOURS['baseline'], linestyle='--'
    )
    right.set_xlabel('h, or 2 lambda')
    right.set_ylabel('last norm of (a, b)')
    right.legend()
    figure.legend(
      handles=left.get_legend_handles_labels()[0], loc='outside right upper'
    )


@functools.partial(jax.jit, static_argnums=2)
def descend(rate: float, penalty: float, steps: int) -> Array:
  """Returns the path of gradient descent, `[steps + 1, 2]`."""
  gradient = with_gradient_penalty(loss, penalty)

  def step(params, _):
    return params - rate * gradient(params)[1], params

  last, path = jax.lax.scan(step, jnp.array(START), length=steps)
  return jnp.concatenate([path, last[None]])


def _name(kind: str, number: float) -> str:
  return f'{kind} = {number:g}'


def study() -> Study:
  """Returns the study."""
  return ImplicitRegularization()
