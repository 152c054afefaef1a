"""LegS rebuilds a signal from about pi states per cycle, if its steps are exact.

A sum of sines with up to so many cycles over its length is written sample by
sample into a LegS memory, and rebuilt from the last state alone. Half a cycle
wants pi / 2 polynomials, and some eight more make the rest converge. Then the
error is that of the steps: the exact ones leave none but that of holding samples.

Source: Gu, Dao, Ermon, Rudra and Re, "HiPPO", 2020, arXiv 2008.07669; Su Jianlin,
"Revisiting SSM (2)", 2024, kexue.fm/archives/10137 (schemes).
Run: `jaxformers reproduce experiments/hippo_reconstruction.py`
Expected: reproduced. With ceil(5 pi) + 9 = 25 states a signal of 5 cycles comes back
with an error of 0.9e-4, with floor(5 pi) = 15 of 0.20; with 25 states and steps
of the midpoint rule the error is 2.0e-4, with bilinear ones 0.0076, and with
those of Euler 0.05.
Time: 15 seconds on 2 CPU cores.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from jaxformers.ops import ApproximateLegS
from jaxformers.ops import ExactLegS
from jaxformers.ops import LegS
from jaxformers.ops import hippo_memory
from jaxformers.train import Judgement
from jaxformers.train import Results
from jaxformers.train import Study
from jaxformers.train import Workspace
from jaxformers.train import above
from jaxformers.train import below
from jaxformers.train.figure import COLOURS
from jaxformers.train.figure import PALETTE
from jaxformers.train.figure import plot_band

SCHEMES = 'midpoint', 'bilinear', 'forward_euler', 'backward_euler'
ENOUGH = 9  # states beyond pi per cycle


@dataclasses.dataclass(frozen=True)
class Reconstruction(Study):
  """Writes sums of sines into memories, and rebuilds them.

  Attributes:
    seeds: of the phases.
    cycles: the fastest sine of each signal, which exact steps write.
    compared: one of them, which approximate steps write too.
    length: samples.
    sizes: numbers of states.
  """

  claim = (
    'LegS rebuilds a signal of c cycles from pi c + 8 states, and exact steps '
    'beat the midpoint rule, bilinear steps and those of Euler, in this order.'
  )
  source = (
    'Gu et al., "HiPPO: Recurrent Memory with Optimal Polynomial Projections", '
    '2020, arXiv 2008.07669; Su Jianlin, 2024, kexue.fm/archives/10137'
  )
  cycles: tuple[int, ...] = (2, 5, 10)
  compared: int = 5
  length: int = 1024
  sizes: tuple[int, ...] = tuple(range(2, 51, 2))

  def __post_init__(self):
    if self.compared not in self.cycles:
      raise ValueError(
        f'cycles {self.cycles} must contain compared={self.compared}.'
      )

  def variants(self) -> tuple[str, ...]:
    exact = (_name('exact', c) for c in self.cycles)
    return *exact, *(_name(s, self.compared) for s in SCHEMES)

  def measure(
    self, variant: str, seed: int, workspace: Workspace
  ) -> dict[str, Any]:
    del workspace
    method, cycles = variant.split(', ')
    cycles = int(cycles.split()[0])
    u_L = draw_signal(seed, cycles, self.length)
    few, many = few_and_many(cycles)
    # The system is triangular: a smaller memory is the first part of a larger.
    largest = max(*self.sizes, many)
    with jax.enable_x64(True):
      x_S = np.asarray(memorize(jnp.asarray(u_L), largest, method))
    error = lambda size: rebuilding_error(u_L, x_S[:size])
    return {
      'few': error(few),
      'many': error(many),
      'errors': [error(size) for size in self.sizes],
    }

  def judge(self, results: Results) -> list[Judgement]:
    judgements = []
    for cycles in self.cycles:
      few, many = few_and_many(cycles)
      name = _name('exact', cycles)
      judgements += [
        below(
          f'{cycles} cycles: error with {many} states',
          results.values(name, 'many').max(),
          1e-3,
        ),
        above(
          f'{cycles} cycles: error with {few} states',
          results.values(name, 'few').min(),
          0.05,
        ),
      ]
    many = few_and_many(self.compared)[1]
    error = {
      s: results.mean(_name(s, self.compared), 'many')
      for s in ('exact', *SCHEMES)
    }
    error['better Euler'] = min(error['forward_euler'], error['backward_euler'])
    order = 'exact', 'midpoint', 'bilinear', 'better Euler'
    return judgements + [
      above(f'{many} states: error of {b} over {a}', error[b] / error[a], 1)
      for a, b in zip(order, order[1:], strict=False)
    ]

  def draw(self, results: Results, figure: Any) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    for cycles, colour in zip(self.cycles, PALETTE, strict=False):
      errors = results.values(_name('exact', cycles), 'errors')
      label = f'exact, {cycles} cycles'
      plot_band(left, self.sizes, errors, label=label, color=colour)
      left.axvline(
        math.pi * cycles + 8, color=colour, linestyle=':', linewidth=1.2
      )
    colours = [COLOURS['baseline'], *PALETTE[3:]]
    for scheme, colour in zip(SCHEMES, colours, strict=False):
      errors = results.values(_name(scheme, self.compared), 'errors')
      label = scheme.replace('_e', ' E')
      plot_band(right, self.sizes, errors, label=label, color=colour)
    index = self.cycles.index(self.compared)
    errors = results.values(_name('exact', self.compared), 'errors')
    plot_band(right, self.sizes, errors, color=PALETTE[index])
    left.set_yscale('log')
    left.set_ylim(1e-5, 3)
    left.set_ylabel('root mean square error')
    left.set_title('exact steps; dotted: pi cycles + 8')
    right.set_title(f'{self.compared} cycles')
    for axes in (left, right):
      axes.set_xlabel('states')
    figure.legend(loc='outside right upper')


def few_and_many(cycles: int) -> tuple[int, int]:
  """Returns the sizes at which a signal is lost, and rebuilt."""
  return math.floor(math.pi * cycles), math.ceil(math.pi * cycles) + ENOUGH


def draw_signal(seed: int, cycles: int, length: int) -> np.ndarray:
  """Returns 1 to `cycles` cycles with random phases, of unit mean square."""
  rng = np.random.default_rng(seed)
  middle_L1 = (np.arange(length)[:, None] + 0.5) / length
  phases = rng.uniform(0, 2 * np.pi, cycles)
  angle = 2 * np.pi * np.arange(1, cycles + 1) * middle_L1 + phases
  u_L = np.sin(angle).sum(axis=1)
  return u_L / np.sqrt(np.mean(u_L**2))


@functools.partial(jax.jit, static_argnums=(1, 2))
def memorize(u_L: Array, size: int, method: str) -> Array:
  """Returns the state after the last sample."""
  if method == 'exact':
    dynamics = ExactLegS(size)
  else:
    dynamics = ApproximateLegS(size, method)
  last = hippo_memory(
    u_L[None, :, None],
    dynamics,
    readout_SD=jnp.zeros((size, 1)),
    method='sequential',
  ).last
  return last.x_BSD[0, :, 0]


def rebuilding_error(u_L: np.ndarray, x_S: np.ndarray) -> float | None:
  """Returns the root mean square error in the middle of all samples."""
  length = len(u_L)
  age_L = length - np.arange(length) - 0.5
  rebuilt_L = LegS().decoder(len(x_S), age_L, length) @ x_S
  error = np.sqrt(np.mean((rebuilt_L - u_L) ** 2))
  return error if np.isfinite(error) else None


def _name(method: str, cycles: int) -> str:
  return f'{method}, {cycles} cycles'


def study() -> Study:
  """Returns the study."""
  return Reconstruction()
