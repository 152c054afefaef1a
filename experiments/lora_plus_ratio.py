"""Both factors of LoRA do their share at a ratio of about sqrt(n / R) of rates.

Steps in the direction of the sign lower the loss by the learning rate times the
sum of the magnitudes of the gradient. Where `lora_in` has entries of size
1 / sqrt(n) and `lora_out` of 1 / sqrt(R), as stable training wants, equal shares
of both factors of an `n x m` matrix ask for rates in the ratio `n / sqrt(m R)`:
10 to 23 for square matrices of width 768 to 4096 and rank 8, near the 16 that
LoRA+ recommends. The source writes it for square matrices, `sqrt(n / R)`.

Source: Su Jianlin, "LoRA with different learning rates", 2024,
kexue.fm/archives/10001; Hayou et al., "LoRA+", 2024, arXiv 2402.12354.
Run: `jaxformers reproduce experiments/lora_plus_ratio.py`
Expected: reproduced; the measured ratio is the formula within 10 %.
Time: seconds.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from jaxformers.train import Judgement
from jaxformers.train import Results
from jaxformers.train import Study
from jaxformers.train import Workspace
from jaxformers.train import below
from jaxformers.train.figure import PALETTE


@dataclasses.dataclass(frozen=True)
class LoRAPlusRatio(Study):
  """Measures gradients of both factors of random layers.

  Attributes:
    shapes: inputs n and outputs m of the matrices.
    ranks: values of R.
    rows: inputs per gradient.
    repeats: random layers per shape, rank and seed.
  """

  claim = (
    'Both factors of LoRA lower the loss alike where the learning rate of the '
    'output side is n / sqrt(m R) times that of the input side.'
  )
  source = (
    'Su Jianlin, "LoRA with different learning rates", 2024, '
    'kexue.fm/archives/10001'
  )
  shapes: tuple[tuple[int, int], ...] = (
    (64, 64), (256, 256), (1024, 1024), (4096, 4096), (1024, 256), (256, 1024)
  )  # fmt: skip
  ranks: tuple[int, ...] = (4, 8, 32)
  rows: int = 32
  repeats: int = 16

  def variants(self) -> tuple[str, ...]:
    return tuple(f'{n} x {m}' for n, m in self.shapes)

  def measure(
    self, variant: str, seed: int, workspace: Workspace
  ) -> dict[str, Any]:
    n, m = map(int, variant.split(' x '))
    keys = jax.random.split(jax.random.key(seed), self.repeats)
    ratios = [
      np.mean([_ratio(key, n, m, rank, self.rows) for key in keys])
      for rank in self.ranks
    ]
    laws = [n / math.sqrt(m * rank) for rank in self.ranks]
    return {'ratio': ratios, 'ratio over law': np.divide(ratios, laws)}

  def judge(self, results: Results) -> list[Judgement]:
    return [
      below(
        f'{kind} matrices: largest relative error of n / sqrt(m R)',
        max(
          np.abs(results.mean(variant, 'ratio over law') - 1).max()
          for variant, shape in zip(results.variants, self.shapes, strict=True)
          if (shape[0] == shape[1]) == (kind == 'square')
        ),
        0.15,
      )
      for kind in ('square', 'other')
    ]

  def draw(self, results: Results, figure: Any) -> None:
    axes = figure.subplots()
    line = np.array([0.5, 64])
    axes.loglog(line, line, color='0.6', label='$n / \\sqrt{m R}$')
    colours = [*PALETTE, '0.3'] * len(self.shapes)
    for colour, variant in zip(colours, results.variants, strict=False):
      ratio = results.mean(variant, 'ratio')
      law = ratio / results.mean(variant, 'ratio over law')
      axes.plot(law, ratio, 'o', color=colour, label=variant)
    axes.set_xlabel('n / sqrt(m R)')
    axes.set_ylabel('ratio of the gradients, sums of magnitudes')
    figure.legend(loc='outside right upper')


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _ratio(key: Array, n: int, m: int, rank: int, rows: int) -> Array:
  """Returns the sum of |dL/dA| over that of |dL/dB| in a random layer."""
  shapes = (rows, n), (rows, m), (n, rank), (rank, m)
  x_LD, dy_LE, in_DR, out_RE = (
    jax.random.normal(k, shape)
    for k, shape in zip(jax.random.split(key, 4), shapes, strict=True)
  )
  _, back = jax.vjp(
    lambda factors: x_LD @ factors[0] @ factors[1],
    (in_DR / math.sqrt(n), out_RE / math.sqrt(rank)),
  )
  ((d_in_DR, d_out_RE),) = back(dy_LE)
  return jnp.abs(d_in_DR).sum() / jnp.abs(d_out_RE).sum()


def study() -> Study:
  """Returns the study."""
  return LoRAPlusRatio()
