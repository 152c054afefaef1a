"""Softmax attention can concentrate on single keys; linear attention cannot.

The concentration of weights is their mean magnitude over their root mean square:
1 for equal weights of n keys, 1 / sqrt(n) for a single one. Queries and keys are
drawn from c N(0, I): the longer they are, the more weights may differ.

Source: Su Jianlin, "Can attention really concentrate?", 2023,
kexue.fm/archives/9889.
Run: `jaxformers reproduce experiments/attention_concentration.py`
Expected: at c = 8 softmax has 0.05 (1.1 of 512 keys share the weight), elu + 1
has 0.96 (475 keys); the scores themselves have 0.80 at every c, and their
squared positive parts 0.41.
Time: 10 seconds on 2 CPU cores.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from jaxformers.ops import concentration
from jaxformers.ops import effective_support
from jaxformers.train import Judgement
from jaxformers.train import Results
from jaxformers.train import Study
from jaxformers.train import Workspace
from jaxformers.train import above
from jaxformers.train import below
from jaxformers.train.figure import COLOURS
from jaxformers.train.figure import plot_band


def softmax(query_LK: Array, key_MK: Array) -> Array:
  """Weights proportional to exponentials of scores."""
  return jax.nn.softmax(query_LK @ key_MK.T / math.sqrt(key_MK.shape[-1]))


def relu_squared(query_LK: Array, key_MK: Array) -> Array:
  """The squared positive parts of scores."""
  return jax.nn.relu(query_LK @ key_MK.T) ** 2


def scores(query_LK: Array, key_MK: Array) -> Array:
  """The scores themselves: linear attention without features."""
  return query_LK @ key_MK.T


def elu_features(query_LK: Array, key_MK: Array) -> Array:
  """Linear attention with the non-negative features elu(x) + 1."""
  return (jax.nn.elu(query_LK) + 1) @ (jax.nn.elu(key_MK) + 1).T


FAMILIES: dict[str, Callable[[Array, Array], Array]] = {
  'softmax': softmax,
  'relu squared': relu_squared,
  'linear': scores,
  'linear, elu + 1': elu_features,
}


@dataclasses.dataclass(frozen=True)
class Concentration(Study):
  """Measures weights of normal queries and keys of growing length.

  Attributes:
    keys: number of keys.
    queries: number of queries to average over.
    width: of queries and keys.
    lengths: c, the standard deviation of their entries.
  """

  claim = (
    'Softmax attention can concentrate on single keys; linear attention cannot.'
  )
  source = (
    'Su Jianlin, "Can attention really concentrate?", 2023, '
    'kexue.fm/archives/9889'
  )
  keys: int = 512
  queries: int = 512
  width: int = 64
  lengths: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)

  def variants(self) -> tuple[str, ...]:
    return tuple(FAMILIES)

  def measure(
    self, variant: str, seed: int, workspace: Workspace
  ) -> dict[str, Any]:
    del workspace
    query_key, key_key = jax.random.split(jax.random.key(seed))
    query_LK = jax.random.normal(query_key, (self.queries, self.width))
    key_MK = jax.random.normal(key_key, (self.keys, self.width))

    @jax.jit
    def measure(c):
      weights_LM = FAMILIES[variant](c * query_LK, c * key_MK)
      return (
        concentration(weights_LM).mean(),
        effective_support(weights_LM).mean(),
      )

    measured = [measure(c) for c in self.lengths]
    by_length, support = zip(*measured, strict=True)
    return {
      'concentration': jnp.stack(by_length),
      'at the longest': by_length[-1],
      'keys that share the weight': support[-1],
    }

  def judge(self, results: Results) -> list[Judgement]:
    c = f'c = {self.lengths[-1]:g}'
    longest = {v: results.mean(v, 'at the longest') for v in results.variants}
    smallest = results.values('linear', 'concentration').mean(axis=0).min()
    return [
      below(f'concentration of softmax at {c}', longest['softmax'], 0.06),
      above(f'that of elu + 1 at {c}', longest['linear, elu + 1'], 0.9),
      above('that of linear scores, smallest over c', smallest, 0.75),
    ]

  def draw(self, results: Results, figure: Any) -> None:
    axes = figure.subplots()
    for variant in results.variants:
      values = results.values(variant, 'concentration')
      plot_band(axes, self.lengths, values, label=variant, marker='o')
    axes.axhline(
      self.keys**-0.5,
      color=COLOURS['baseline'],
      linestyle='--',
      label=f'a single key of {self.keys}',
    )
    axes.set_xscale('log', base=2)
    axes.set_xticks(self.lengths, [f'{c:g}' for c in self.lengths])
    axes.set_ylim(0, 1.03)
    axes.set_xlabel('c, standard deviation of the entries of queries and keys')
    axes.set_ylabel('concentration of weights (small is concentrated)')
    figure.legend(loc='outside right upper')


def study() -> Study:
  """Returns the study."""
  return Concentration()
