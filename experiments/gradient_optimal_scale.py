"""Attention optimises best with the scale that maximises its softmax gradient.

Two claims in one: with dot products, 2.5 / sqrt(d) gives the softmax a gradient
more than twice as large as 1 / sqrt(d) does, and is said to optimise better;
cosines need a multiplier well above 1, and not far above. Small decoders learn to
go on with random blocks that repeat; everything but the scale is the same.

Source: Su Jianlin, "Attention scale from gradient maximisation", 2023,
kexue.fm/archives/9812.
Run: `jaxformers reproduce experiments/gradient_optimal_scale.py`
Expected: partly reproduced. The gradient is 2.3 to 2.4 times as large, but the
loss after 400 steps is 2.83 with 2.5 / sqrt(d) and 2.70 with 1 / sqrt(d).
With cosines it is 2.78, 2.67 and 3.33 for the multipliers 1, 10 and 100.
Time: 9 minutes of computing on CPU; 20 where it was done, beside other work.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from jaxformers.data import RepeatedBlocks
from jaxformers.models import LanguageModel
from jaxformers.nn import Block
from jaxformers.nn import FeedForward
from jaxformers.nn import Stack
from jaxformers.nn import UnitNorm
from jaxformers.nn.mixers import Attention
from jaxformers.ops import ConstantScale
from jaxformers.ops import InverseSqrt
from jaxformers.ops import Rotary
from jaxformers.ops import softmax_jacobian_l1
from jaxformers.optim import AdamW
from jaxformers.optim import WarmupCosine
from jaxformers.train import Experiment
from jaxformers.train import Judgement
from jaxformers.train import Results
from jaxformers.train import Study
from jaxformers.train import Workspace
from jaxformers.train import above
from jaxformers.train.figure import PALETTE

LAST = 50  # steps that the loss is averaged over
ROWS = 256  # rows that the gradient is averaged over


@dataclasses.dataclass(frozen=True)
class GradientOptimalScale(Study):
  """Measures softmax gradients at initialisation, and losses after training.

  Attributes:
    dot: multipliers of dot products over sqrt(d), the usual 1 among them.
    recommended: the one that is held against 1.
    cosine: multipliers of cosines; the middle one is held against the outer.
    keys: numbers of keys at which the gradient is measured.
    width: of the model, which has 2 heads.
    steps: of training.
    batch_size: rows per step.
  """

  claim = (
    'Attention optimises best with the scale that maximises the gradient of its '
    'softmax: 2.5 / sqrt(d) with dot products, well above 1 with cosines.'
  )
  source = (
    'Su Jianlin, "Attention scale from gradient maximisation", 2023, '
    'kexue.fm/archives/9812'
  )
  dot: tuple[float, ...] = (0.4, 1.0, 2.5, 6.25)
  recommended: float = 2.5
  cosine: tuple[float, ...] = (1.0, 10.0, 100.0)
  keys: tuple[int, ...] = (512, 2048, 8192)
  width: int = 64
  steps: int = 400
  batch_size: int = 16

  def __post_init__(self):
    if not {1.0, self.recommended} <= set(self.dot) or not self.cosine:
      raise ValueError(
        f'dot must contain 1 and {self.recommended}, got {self.dot}, and cosine '
        f'a number, got {self.cosine}.'
      )

  def variants(self) -> tuple[str, ...]:
    dots = (_name('dot', multiplier) for multiplier in self.dot)
    cosines = (_name('cosine', multiplier) for multiplier in self.cosine)
    return *dots, *cosines

  def measure(
    self, variant: str, seed: int, workspace: Workspace
  ) -> dict[str, Any]:
    kind, multiplier = variant.split()
    experiment = self._experiment(kind, float(multiplier), seed)
    metrics = workspace.metrics(experiment)
    losses = np.array([line['loss'] for line in metrics])
    return {
      'loss': losses[-LAST:].mean(),
      'gradients': [
        _gradient(kind, float(multiplier), self._head_dim, n, seed)
        for n in self.keys
      ],
    }

  @property
  def _head_dim(self) -> int:
    return self.width // 2

  def _experiment(self, kind: str, multiplier: float, seed: int) -> Experiment:
    scale = ConstantScale(multiplier)
    if kind == 'dot':
      scale = scale * InverseSqrt()
    attention = Attention(
      num_heads=2,
      position=Rotary(),
      scale=scale,
      qk_norm=UnitNorm() if kind == 'cosine' else None,
    )
    block = Block(attention, FeedForward(hidden=4 * self.width))
    return Experiment(
      model=LanguageModel(32, self.width, Stack(block, depth=2)),
      data=RepeatedBlocks(length=64, vocab_size=32),
      optimizer=AdamW(
        WarmupCosine(peak=2e-3, warmup_steps=50), weight_decay=0.0
      ),
      steps=self.steps,
      batch_size=self.batch_size,
      seed=seed,
      evaluate_every=self.steps,
      checkpoint_every=self.steps,
      preview=None,
    )

  def judge(self, results: Results) -> list[Judgement]:
    recommended, usual = _name('dot', self.recommended), _name('dot', 1.0)
    loss = {v: results.mean(v, 'loss') for v in results.variants}
    gradient = {v: results.mean(v, 'gradients') for v in results.variants}
    cosines = (
      self.cosine[0],
      self.cosine[len(self.cosine) // 2],
      self.cosine[-1],
    )
    low, middle, high = (_name('cosine', multiplier) for multiplier in cosines)
    return [
      above(
        f'gradient of {recommended} over that of {usual}, smallest over n',
        (gradient[recommended] / gradient[usual]).min(),
        2.2,
      ),
      above(
        f'loss of {usual} less that of {recommended}, in nats',
        loss[usual] - loss[recommended],
        0,
      ),
      above(
        f'loss of {low} less that of {middle}, in nats',
        loss[low] - loss[middle],
        0,
      ),
      above(
        f'loss of {high} less that of {middle}, in nats',
        loss[high] - loss[middle],
        0.3,
      ),
    ]

  def draw(self, results: Results, figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    lines = 'dot', self.dot, 'dot products / $\\sqrt{d}$'
    others = 'cosine', self.cosine, 'cosines'
    for colour, (kind, multipliers, label) in zip(
      PALETTE, (lines, others), strict=False
    ):
      names = [_name(kind, multiplier) for multiplier in multipliers]
      gradients = [results.values(n, 'gradients')[:, 0] for n in names]
      losses = [results.values(n, 'loss') for n in names]
      style = {'color': colour, 'label': label}
      _draw_means(left, multipliers, gradients, style)
      _draw_means(right, multipliers, losses, style)
    for axes in (left, right):
      axes.set_xscale('log')
      axes.set_xlabel('multiplier of the scores')
    left.set_ylabel(f'gradient of the softmax, {self.keys[0]} random keys')
    right.set_ylabel(f'loss of the last {LAST} steps in nats per token')
    figure.legend(
      handles=left.get_legend_handles_labels()[0], loc='outside right upper'
    )


def _name(kind: str, multiplier: float) -> str:
  return f'{kind} {multiplier:g}'


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _gradient(
  kind: str, multiplier: float, head_dim: int, n: int, seed: int
) -> Array:
  """Returns the mean Jacobian mass of the softmax over n random scores."""
  query_key, key_key = jax.random.split(
    jax.random.fold_in(jax.random.key(seed), n)
  )
  if kind == 'dot':
    scores_LM = jax.random.normal(query_key, (ROWS, n))
  else:
    query_LK = _directions(query_key, ROWS, head_dim)
    scores_LM = query_LK @ _directions(key_key, n, head_dim).T
  weights_LM = jax.nn.softmax(multiplier * scores_LM)
  return softmax_jacobian_l1(weights_LM, multiplier).mean()


def _directions(key: Array, count: int, head_dim: int) -> Array:
  x_LK = jax.random.normal(key, (count, head_dim))
  return x_LK / jnp.linalg.norm(x_LK, axis=-1, keepdims=True)


def _draw_means(axes: Any, x: Any, values: Any, style: dict[str, Any]) -> None:
  """Draws means over seeds with their range as bars."""
  values = np.array(values)
  mean = values.mean(axis=1)
  reach = mean - values.min(axis=1), values.max(axis=1) - mean
  axes.errorbar(x, mean, reach, marker='o', capsize=3, **style)


def study() -> Study:
  """Returns the study."""
  return GradientOptimalScale()
