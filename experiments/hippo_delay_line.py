"""LegT delays a signal by its window without any training.

Sums of twenty sines run through a window of length 1. The polynomials at its
middle and at its end decode the signal as it was half a window and a whole
window ago: well if there are enough states for the fastest sine, and not at all
with half as many.

Source: Voelker, Kajic and Eliasmith, "Legendre Memory Units", 2019; Gu et al.,
"HiPPO", 2020, arXiv 2008.07669.
Run: `jaxformers reproduce experiments/hippo_delay_line.py`
Expected: partly reproduced. Four states per cycle are at the edge: with 4 cycles,
16 states and half a window the error is 0.007 to 0.011, where the bound is 0.01
for the worst seed. With 8 cycles and 32 states it is 0.001. Half the states give
errors of 0.45 and more.
Time: 15 seconds on 2 CPU cores.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from jaxformers.ops import LegT
from jaxformers.ops import dynamics_of
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

RATE = 256  # samples per window
SINES = 20
DELAYS = {'half a window': 0.5, 'a window': 1.0}
SHOWN = range(-3 * RATE // 4, 0, 3)  # samples of the picture


@dataclasses.dataclass(frozen=True)
class DelayLine(Study):
  """Decodes delayed signals from LegT memories.

  Attributes:
    seeds: of the signals.
    fastest: largest frequency of each signal, in cycles per window.
    states_per_cycle: so many states are enough; half of them are too few.
    sizes: numbers of states that are measured.
    windows: length of the signals; errors count from the second window on.
  """

  claim = (
    'A LegT memory is a delay line without training, exact once it has four '
    'states per cycle in its window.'
  )
  source = (
    'Voelker, Kajic and Eliasmith, "Legendre Memory Units", 2019; Gu et al., '
    '"HiPPO", 2020, arXiv 2008.07669'
  )
  fastest: tuple[float, ...] = (4.0, 8.0)
  states_per_cycle: int = 4
  sizes: tuple[int, ...] = (4, 8, 12, 16, 20, 24, 28, 32, 40)
  windows: int = 20

  def __post_init__(self):
    missing = {
      size for f in self.fastest for size in self._few_and_many(f)
    } - set(self.sizes)
    if missing:
      raise ValueError(f'sizes {self.sizes} must contain {sorted(missing)}.')

  def _few_and_many(self, fastest):
    many = round(self.states_per_cycle * fastest)
    return many // 2, many

  def variants(self) -> tuple[str, ...]:
    return tuple(_name(f) for f in self.fastest)

  def measure(
    self, variant: str, seed: int, workspace: Workspace
  ) -> dict[str, Any]:
    del workspace
    fastest = float(variant.split()[0])
    signal = draw_signal(seed, fastest)
    length = self.windows * RATE
    with jax.enable_x64(True):
      u_L = jnp.asarray(signal((np.arange(length) + 0.5) / RATE))
      decoded = {s: np.asarray(decode(u_L, s)) for s in self.sizes}
    now_L = np.arange(1, length + 1) / RATE
    settled = now_L > 2
    measured = {}
    for i, (name, delay) in enumerate(DELAYS.items()):
      wanted_L = signal(now_L - delay)
      measured[name] = [
        np.sqrt(np.mean((decoded[s][:, i] - wanted_L)[settled] ** 2))
        for s in self.sizes
      ]
    few, many = self._few_and_many(fastest)
    curves = {
      'wanted': wanted_L,
      'enough': decoded[many][:, -1],
      'too few': decoded[few][:, -1],
    }
    return measured | {k: y[SHOWN].round(4) for k, y in curves.items()}

  def judge(self, results: Results) -> list[Judgement]:
    judgements = []
    for fastest in self.fastest:
      few, many = self._few_and_many(fastest)
      for delay in DELAYS:
        errors = results.values(_name(fastest), delay)
        at = lambda size, errors=errors: errors[:, self.sizes.index(size)]
        what = f'{fastest:g} cycles, delayed by {delay}: error with'
        judgements += [
          below(f'{what} {many} states', at(many).max(), 0.01),
          above(f'{what} {few} states', at(few).min(), 0.3),
        ]
    return judgements

  def draw(self, results: Results, figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    first = self.fastest[0]
    few, many = self._few_and_many(first)
    time = np.array(SHOWN) / RATE
    curves = {
      'wanted': ('signal a window ago', COLOURS['baseline'], 4.0),
      'enough': (f'{many} states', PALETTE[0], 1.4),
      'too few': (f'{few} states', PALETTE[1], 1.4),
    }
    for name, (label, colour, width) in curves.items():
      y = results.values(_name(first), name)[0]
      alpha = 0.5 if name == 'wanted' else 1.0
      left.plot(
        time, y, label=label, color=colour, linewidth=width, alpha=alpha
      )
    left.set_xlabel('time, in windows')
    left.set_ylabel('decoded signal')
    left.set_title(f'fastest sine: {first:g} cycles')
    low, high = left.get_ylim()
    left.set_ylim(low, high + 0.45 * (high - low))
    left.legend(loc='upper left')
    for fastest, colour in zip(self.fastest, PALETTE[2:], strict=False):
      for delay, style in zip(DELAYS, ('-', '--'), strict=True):
        errors = results.values(_name(fastest), delay)
        label = f'{fastest:g} cycles, {delay}'
        plot_band(
          right, self.sizes, errors, label=label, color=colour, linestyle=style
        )
    right.set_yscale('log')
    right.set_xlabel('states')
    right.set_ylabel('root mean square error')
    right.set_ylim(1e-6, 2)
    right.legend(loc='lower left')


def draw_signal(seed: int, fastest: float) -> Any:
  """Returns a function of time: sines of random frequencies, unit power."""
  rng = np.random.default_rng(seed)
  frequencies = rng.uniform(0, fastest, SINES)
  phases = rng.uniform(0, 2 * np.pi, SINES)

  def signal(time_L):
    angle = 2 * np.pi * frequencies * time_L[:, None] + phases
    return np.sin(angle).sum(axis=1) / np.sqrt(SINES / 2)

  return signal


@functools.partial(jax.jit, static_argnums=1)
def decode(u_L: Array, size: int) -> Array:
  """Returns the signal as it was before each delay, `[L, 2]`."""
  measure = LegT(window=1.0)
  decoder_NS = measure.decoder(size, [*DELAYS.values()])
  memorized = hippo_memory(
    jnp.repeat(u_L[None, :, None], len(DELAYS), axis=2),
    dynamics_of(measure, size, step=1 / RATE),
    readout_SD=jnp.asarray(decoder_NS).T,
  )
  return memorized.out[0]


def _name(fastest: float) -> str:
  return f'{fastest:g} cycles per window'


def study() -> Study:
  """Returns the study."""
  return DelayLine()
