"""Masking gradients under Adam shrinks the mean step by sqrt(p).

Adam walks along gradients `mu + sigma noise` whose distribution never changes.
ChildTuning masks them with probability 1 - p and divides the rest by p; update
dropout masks Adam's steps instead. What is compared is the mean and the variance
of the steps with those of plain Adam on the same noise. The source adds that the
variance of the steps decreases; the theory says that it grows, to
`1 - p s` over `1 - s` with `s = mu^2 / (mu^2 + sigma^2)`.

Source: Su Jianlin, "ChildTuning: try adding dropout to the gradients", 2021,
kexue.fm/archives/8764; Xu et al., 2021, arXiv 2109.05687.
Run: `jaxformers reproduce experiments/child_tuning_steps.py`
Expected: partly reproduced. Mean steps are sqrt(p) times as long, within 1 %, and
update dropout leaves them as they are; but the variance of the steps grows, by
1.7 where p = 0.3 and mu = sigma.
Time: 1 minute on CPU.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
import optax

from jaxformers.optim import child_tuning_f
from jaxformers.train import Judgement
from jaxformers.train import Results
from jaxformers.train import Study
from jaxformers.train import Workspace
from jaxformers.train import below
from jaxformers.train.figure import PALETTE

PLACES = 'gradient', 'update'


@dataclasses.dataclass(frozen=True)
class ChildTuningSteps(Study):
  """Measures the steps of Adam on gradients of constant distribution.

  Attributes:
    signals: mu / sigma, mean over deviation of a gradient; the first is held to
      the first of the tolerances, and so on.
    tolerances: how far the mean step may be from sqrt(p) times its length.
    fractions: values of p.
    size: how many parameters walk at once.
    steps: that are measured, after as many as the moments need.
    settle: steps that are not.
  """

  claim = (
    'Under Adam, gradients of which a fraction p is kept give steps with a mean '
    'sqrt(p) times as long and a smaller variance.'
  )
  source = (
    'Su Jianlin, "ChildTuning: try adding dropout to the gradients", 2021, '
    'kexue.fm/archives/8764'
  )
  signals: tuple[float, ...] = (1.0, 0.1)
  tolerances: tuple[float, ...] = (0.01, 0.02)
  fractions: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7)
  size: int = 200
  steps: int = 20_000
  settle: int = 5_000

  def variants(self) -> tuple[str, ...]:
    return tuple(f'mu / sigma = {signal:g}' for signal in self.signals)

  def measure(
    self, variant: str, seed: int, workspace: Workspace
  ) -> dict[str, Any]:
    signal = float(variant.split()[-1])
    key = jax.random.fold_in(jax.random.key(seed), round(1000 * signal))
    walk = functools.partial(
      _walk, key, signal, size=self.size, steps=self.steps, settle=self.settle
    )
    plain = _adam(None, 1.0)
    mean, variance = walk(plain)
    numbers = {}
    for place in PLACES:
      found = [walk(_adam(place, p)) for p in self.fractions]
      numbers[f'mean, {place}'] = [m / mean for m, _ in found]
      numbers[f'variance, {place}'] = [v / variance for _, v in found]
    return numbers

  def judge(self, results: Results) -> list[Judgement]:
    roots = np.sqrt(self.fractions)
    judgements = []
    for variant, tolerance in zip(
      results.variants, self.tolerances, strict=True
    ):
      mean = results.mean(variant, 'mean, gradient')
      judgements.append(
        below(
          f'{variant}: largest error of sqrt(p) as the length of mean steps',
          np.abs(mean / roots - 1).max(),
          tolerance,
        )
      )
    first = results.variants[0]
    return [
      *judgements,
      below(
        f'{first}: largest change of mean steps by update dropout',
        np.abs(results.mean(first, 'mean, update') - 1).max(),
        0.005,
      ),
      below(
        f'{first}: largest variance of steps relative to plain Adam',
        results.mean(first, 'variance, gradient').max(),
        1,
      ),
    ]

  def draw(self, results: Results, figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    p = np.linspace(min(self.fractions), 1, 50)
    left.plot(p, np.sqrt(p), color='0.6', label='theory')
    for colour, variant, signal in zip(
      PALETTE, results.variants, self.signals, strict=False
    ):
      share = signal**2 / (1 + signal**2)
      right.plot(p, (1 - p * share) / (1 - share), color='0.6')
      for axes, name in ((left, 'mean'), (right, 'variance')):
        for place, marker in zip(PLACES, 'os', strict=True):
          values = results.mean(variant, f'{name}, {place}')
          label = f'{variant}, {place} masked'
          axes.plot(self.fractions, values, marker, color=colour, label=label)
    for axes in (left, right):
      axes.axhline(1, color='0.85', linewidth=1, zorder=0)
      axes.set_xlabel('p, fraction that is kept')
    left.set_ylabel('mean step, plain Adam = 1')
    right.set_ylabel('variance of steps, plain Adam = 1')
    right.set_yscale('log')
    figure.legend(
      handles=left.get_legend_handles_labels()[0], loc='outside right upper'
    )


def _adam(
  place: str | None, p: float
) -> Callable[[Array], optax.GradientTransformation]:
  """Returns a maker of Adam with a mask; it takes the key of the masks."""

  def make(key):
    links = [optax.scale_by_adam()]
    if place is not None:
      at = 0 if place == 'gradient' else 1
      links.insert(at, child_tuning_f(p, key))
    return optax.chain(*links)

  return make


@functools.partial(jax.jit, static_argnames=('make', 'size', 'steps', 'settle'))
def _walk(
  key: Array,
  signal: float,
  make: Callable[[Array], optax.GradientTransformation],
  *,
  size: int,
  steps: int,
  settle: int,
) -> tuple[Array, Array]:
  """Returns mean and variance of the steps after the moments have settled."""
  noise_key, mask_key = jax.random.split(key)
  transform = make(mask_key)

  def step(carry, i):
    state, mean, square = carry
    noise = jax.random.normal(jax.random.fold_in(noise_key, i), (size,))
    update, state = transform.update(signal + noise, state)
    counts = i >= settle
    mean = mean + jnp.where(counts, update, 0).mean() / steps
    square = square + jnp.where(counts, update**2, 0).mean() / steps
    return (state, mean, square), None

  zero = jnp.zeros([])
  start = transform.init(jnp.zeros(size)), zero, zero
  (_, mean, square), _ = jax.lax.scan(step, start, jnp.arange(settle + steps))
  return mean, square - mean**2


def study() -> Study:
  """Returns the study."""
  return ChildTuningSteps()
