"""LoRA+ helps much where `lora_in` begins at 0, and less with the usual start.

LoRA+ trains the output side of low-rank adapters with a learning rate some 16
times that of the input side, and says so for either start. A student `tanh(x (W
+ A B))` learns a teacher whose matrix differs from W by rank 4, with all pairs of
learning rates on a grid. What counts is the best loss at each ratio of the two:
of pairs with equal rates, and of pairs 10 to 100 times apart.

Source: Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024,
arXiv 2402.12354, sections 3 and 4.
Run: `jaxformers reproduce experiments/lora_plus_starts.py`
Expected: partly reproduced. At n = 256, larger rates for lora_out divide the best
loss by 8 where lora_in begins at 0, and by 2 where lora_out does. There the loss
is lower anyway, hardly depends on ratios from 0.01 to 30, and is lost at 100.
Time: 2 minutes of computing on CPU.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
import optax

from jaxformers.ops import LowRank
from jaxformers.ops import lora_init
from jaxformers.optim import lora_plus
from jaxformers.train import Judgement
from jaxformers.train import Results
from jaxformers.train import Study
from jaxformers.train import Workspace
from jaxformers.train import below
from jaxformers.train.figure import PALETTE

STARTS = {'lora_in = 0': 'output', 'lora_out = 0': 'uniform'}
LAST = 10  # batches that a loss is averaged over
TEACHER_RANK = 4


@dataclasses.dataclass(frozen=True)
class LoRAPlusStarts(Study):
  """Finds the best loss at each ratio of learning rates.

  Attributes:
    widths: inputs and outputs n of the matrix; the judged one among them.
    judged: the width that decides.
    exponents: the rates are 10 to the power of half of each.
    rank: of the adapters.
    steps: of Adam, each with a fresh batch.
    batch_size: rows per step.
  """

  claim = (
    'A learning rate for lora_out that is 10 to 100 times that for lora_in learns '
    'better than equal rates, whichever of the two begins at 0.'
  )
  source = 'Hayou et al., "LoRA+", 2024, arXiv 2402.12354'
  widths: tuple[int, ...] = (64, 256, 1024)
  judged: int = 256
  exponents: tuple[int, ...] = tuple(range(-10, -1))
  rank: int = 8
  steps: int = 120
  batch_size: int = 128

  def __post_init__(self):
    if self.judged not in self.widths or len(self.exponents) < 5:
      raise ValueError(
        f'widths must contain {self.judged}, got {self.widths}, and there must '
        'be at least five exponents.'
      )

  def variants(self) -> tuple[str, ...]:
    return tuple(STARTS)

  @property
  def _ratios(self) -> np.ndarray:
    """Half the logarithms to base 10 of the ratios of rates."""
    reach = len(self.exponents) - 1
    return np.arange(-reach, reach + 1)

  def measure(
    self, variant: str, seed: int, workspace: Workspace
  ) -> dict[str, Any]:
    options = LowRank(('w_DE',), self.rank, self.rank, start=STARTS[variant])
    numbers = {}
    for width in self.widths:
      losses = _losses(
        jax.random.key(seed),
        width,
        options,
        self.exponents,
        self.steps,
        self.batch_size,
      )
      numbers[_name(width)] = [
        _best(np.diagonal(losses, offset)) for offset in self._ratios
      ]
    return numbers

  def judge(self, results: Results) -> list[Judgement]:
    ratios = self._ratios
    judgements = []
    for start in results.variants:
      # Losses spread over decades: their logarithms are averaged over seeds.
      losses = np.log(results.values(start, _name(self.judged))).mean(axis=0)
      apart = losses[(ratios >= 2) & (ratios <= 4)].min()
      judgements.append(
        below(
          f'{start}: best loss at ratios of 10 to 100 over that at 1, n = '
          f'{self.judged}',
          math.exp(apart - losses[ratios == 0].item()),
          0.35,
        )
      )
    return judgements

  def draw(self, results: Results, figure: Any) -> None:
    panels = figure.subplots(1, len(self.widths), sharey=True, squeeze=False)
    for axes, width in zip(panels[0], self.widths, strict=True):
      for colour, start in zip(PALETTE, results.variants, strict=False):
        losses = results.values(start, _name(width))
        x = 10 ** (self._ratios / 2)
        axes.fill_between(
          x, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.2
        )
        mean = np.exp(np.log(losses).mean(axis=0))
        axes.plot(x, mean, 'o-', color=colour, label=start)
      axes.set_xscale('log')
      axes.set_yscale('log')
      axes.set_title(f'n = {width}')
      axes.set_xlabel('rate of out / in')
    panels[0, 0].set_ylabel('best loss after training')
    figure.legend(
      handles=panels[0, 0].get_legend_handles_labels()[0],
      loc='outside right upper',
    )


def _name(width: int) -> str:
  return f'losses, n = {width}'


def _best(losses: Sequence[float]) -> float:
  """Returns the smallest loss; one that is not finite has diverged."""
  return float(np.nanmin(np.where(np.isfinite(losses), losses, 1.0)))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _losses(
  key: Array,
  width: int,
  options: LowRank,
  exponents: tuple[int, ...],
  steps: int,
  batch_size: int,
) -> Array:
  """Returns the loss after training; rates of lora_in by rates of lora_out."""
  keys = jax.random.split(key, 5)
  params = {'w_DE': jax.random.normal(keys[0], (width, width))}
  w_DE = params['w_DE'] / math.sqrt(width)
  teacher_DR = jax.random.normal(keys[1], (width, TEACHER_RANK))
  teacher_RE = jax.random.normal(keys[2], (TEACHER_RANK, width))
  change_DE = teacher_DR @ teacher_RE / math.sqrt(width * TEACHER_RANK)
  first = lora_init(keys[3], params, options)

  def train(in_rate, out_rate):
    adam = lora_plus(optax.adam, in_rate, out_rate / in_rate)

    def step(carry, i):
      adapters, state = carry
      key = jax.random.fold_in(keys[4], i)
      x_BD = jax.random.normal(key, (batch_size, width))
      base_BE = x_BD @ w_DE
      y_BE = jnp.tanh(base_BE + x_BD @ change_DE)

      def loss(adapters):
        in_DR, out_RE = adapters['w_DE'].values()
        changed_BE = options.scale * (x_BD @ in_DR) @ out_RE
        return jnp.mean((jnp.tanh(base_BE + changed_BE) - y_BE) ** 2)

      value, gradient = jax.value_and_grad(loss)(adapters)
      updates, state = adam.update(gradient, state, adapters)
      return (optax.apply_updates(adapters, updates), state), value

    _, losses = jax.lax.scan(step, (first, adam.init(first)), jnp.arange(steps))
    return losses[-LAST:].mean()

  rates = 10 ** (jnp.array(exponents) / 2)
  by_out = jax.vmap(train, in_axes=(None, 0))
  return jax.vmap(by_out, in_axes=(0, None))(rates, rates)


def study() -> Study:
  """Returns the study."""
  return LoRAPlusStarts()
