"""Growing scores with log n keeps the entropy of peaked attention the same.

Softmax over n scores of standard deviation sigma at n = 512 keys, with and
without the factor log(n) / log(512). With sigma = 3 and more, which is what
trained heads have, entropy hardly depends on n; with sigma = 1 it is only
flattened, and without the factor it follows the normal limit log n - sigma^2 / 2.

Source: Su Jianlin, "Attention scale from entropy invariance", 2021,
kexue.fm/archives/8823; the normal limit from kexue.fm/archives/9034.
Run: `jaxformers reproduce experiments/entropy_versus_length.py`
Expected: at sigma = 3, entropies of 2.97 at 512 keys and 2.96 at 4096 with the
factor, of 2.97 and 4.40 nats without.
Time: half a minute on 2 CPU cores.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.ops import ConstantScale
from jaxformers.ops import LogLength
from jaxformers.ops import attend
from jaxformers.train import Judgement
from jaxformers.train import Results
from jaxformers.train import Study
from jaxformers.train import Workspace
from jaxformers.train import above
from jaxformers.train import below
from jaxformers.train.figure import COLOURS
from jaxformers.train.figure import PALETTE
from jaxformers.train.figure import plot_band


@dataclasses.dataclass(frozen=True)
class EntropyVersusLength(Study):
  """Measures entropies of attention to independent normal scores.

  Attributes:
    lengths: numbers of keys.
    base: the one at which the factor is 1; must be among them.
    sigmas: standard deviations of scores, without the factor.
    peaked: the one that is judged; must be among them.
    queries: rows to average over.
  """

  claim = (
    'Growing scores with log n keeps the entropy of peaked attention the same '
    'from 512 to 4096 keys.'
  )
  source = (
    'Su Jianlin, "Attention scale from entropy invariance", 2021, '
    'kexue.fm/archives/8823'
  )
  lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
  base: int = 512
  sigmas: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0)
  peaked: float = 3.0
  queries: int = 1024

  def __post_init__(self):
    if self.base not in self.lengths or self.peaked not in self.sigmas:
      raise ValueError(
        f'base {self.base} must be one of lengths {self.lengths}, and peaked '
        f'{self.peaked} one of sigmas {self.sigmas}.'
      )

  def variants(self) -> tuple[str, ...]:
    return 'plain', 'log n'

  def measure(
    self, variant: str, seed: int, workspace: Workspace
  ) -> dict[str, Any]:
    del workspace
    factor = LogLength(self.base) if variant == 'log n' else ConstantScale(1.0)
    measured = {}
    for sigma in self.sigmas:
      entropies = [self._entropy(seed, n, sigma, factor) for n in self.lengths]
      measured[_curve(sigma)] = entropies
      at_base = entropies[self.lengths.index(self.base)]
      measured[_change(sigma)] = entropies[-1] - at_base
    return measured

  def _entropy(self, seed: int, n: int, sigma: float, scale: Any) -> Any:
    """Returns the mean entropy of rows of n scores, in nats."""
    # Vectors of one entry: the query is sigma, so scores are sigma times keys.
    query_BLHK = jnp.full((self.queries, 1, 1, 1), sigma)
    key = jax.random.fold_in(jax.random.key(seed), n)
    key_BMGK = jax.random.normal(key, (self.queries, n, 1, 1))
    attended = attend(
      query_BLHK, key_BMGK, key_BMGK, scale=scale, statistics=True
    )
    return attended.entropy.mean()

  def judge(self, results: Results) -> list[Judgement]:
    change = f'change of entropy at sigma = {self.peaked:g}, in nats'
    plain, grown = (
      results.mean(v, _change(self.peaked)) for v in ('plain', 'log n')
    )
    return [
      below(f'{change}, with log n', abs(grown), 0.15),
      above(f'{change}, without', abs(plain), 1.2),
      below(
        f'distance from log n - sigma^2 / 2 at sigma = {self.sigmas[0]:g}, '
        f'largest from {self.base} keys on',
        self._distance_from_limit(results),
        0.02,
      ),
    ]

  def _distance_from_limit(self, results: Results) -> float:
    entropies = results.mean('plain', _curve(self.sigmas[0]))
    distances = np.abs(entropies - self._limit(self.sigmas[0]))
    return distances[self.lengths.index(self.base) :].max()

  def _limit(self, sigma: float) -> np.ndarray:
    return np.log(self.lengths) - sigma**2 / 2

  def draw(self, results: Results, figure: Any) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    for axes, variant in zip(panels, results.variants, strict=True):
      for colour, sigma in zip(PALETTE, self.sigmas, strict=False):
        curves = results.values(variant, _curve(sigma))
        style = {
          'color': colour,
          'label': f'$\\sigma$ = {sigma:g}',
          'marker': '.',
        }
        plot_band(axes, self.lengths, curves, **style)
      axes.set_xscale('log', base=2)
      axes.set_xticks(self.lengths, self.lengths, rotation=45)
      axes.set_title(variant)
      axes.set_xlabel('number of keys n')
    style = {'color': COLOURS['baseline'], 'linestyle': '--'}
    limit = f'log n - $\\sigma^2$ / 2\nat $\\sigma$ = {self.sigmas[0]:g}'
    panels[0].plot(
      self.lengths, self._limit(self.sigmas[0]), label=limit, **style
    )
    panels[0].set_ylabel('entropy of attention weights in nats')
    figure.legend(
      handles=panels[0].get_legend_handles_labels()[0],
      loc='outside right upper',
    )


def _curve(sigma: float) -> str:
  return f'entropies, sigma = {sigma:g}'


def _change(sigma: float) -> str:
  return f'change, sigma = {sigma:g}'


def study() -> Study:
  """Returns the study."""
  return EntropyVersusLength()
