"""Layers with a long memory read digits pixel by pixel, across a blank.

Handwritten digits of 8 x 8 pixels come as 64 numbers, and then as many zeros; the
class is read from the last step. So what was seen must be carried over at least
64 steps in a state of constant size, for which linear recurrences are built, if
they begin with time constants that are long enough. The same layer with short
ones must fail, which shows that the task measures memory. Attention, which looks
back, is there to compare with. Mamba is judged like those with a long memory,
although it decides itself what to keep.

Two blocks of width 32; each mixer has 64 complex modes per channel, or as many
states.

Source: Gu et al., "On the Parameterization and Initialization of Diagonal State
Space Models", 2022, arXiv 2206.11893 (there: sequential CIFAR and the Long Range
Arena); for the effect of short time constants: Orvieto et al., "Resurrecting
Recurrent Neural Networks for Long Sequences", 2023, arXiv 2303.06349.
Run: `pip install scikit-learn`, `jaxformers reproduce experiments/digits_memory.py`
Expected: accuracies of 0.93 to 0.96 with complex modes and a long memory (S4D,
S4, S5, RTF, LRU), and of 0.08, below chance, with a short one. Not reproduced: with
real modes alone S4D has 0.20 and Mamba 0.08. Each bound, 0.85 and 0.2, was fixed
before anything was measured. Attention is not judged.
Time: about 1 minute per variant and seed on 2 CPU cores.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
import optax

from jaxformers.nn import Block
from jaxformers.nn import FeedForward
from jaxformers.nn import LayerNorm
from jaxformers.nn import Linear
from jaxformers.nn import PreNorm
from jaxformers.nn import Stack
from jaxformers.nn.mixers import LRU
from jaxformers.nn.mixers import RTF
from jaxformers.nn.mixers import S4
from jaxformers.nn.mixers import S4D
from jaxformers.nn.mixers import S5
from jaxformers.nn.mixers import Attention
from jaxformers.nn.mixers import Mamba
from jaxformers.ops import Rotary
from jaxformers.train import Judgement
from jaxformers.train import Results
from jaxformers.train import Study
from jaxformers.train import Workspace
from jaxformers.train import above
from jaxformers.train import below
from jaxformers.train.figure import COLOURS
from jaxformers.train.figure import PALETTE

CLASSES, PIXELS, HELD_OUT = 10, 64, 360
SHORT = 'S4D, short memory'
RING, SHORT_RING = 'LRU, ring 0.9 to 0.999', 'LRU, ring 0 to 0.5'
ATTENTION = 'attention'


@dataclasses.dataclass(frozen=True)
class DigitsMemory(Study):
  """Trains classifiers of digits that are followed by a blank.

  Attributes:
    methods: keys of `mixers`, of which each is judged but attention.
    blank: zeros after the pixels.
    width: D.
    depth: number of blocks.
    states: complex modes per channel.
    epochs: passes over the data.
    batch_size: digits per step.
    learning_rate: the highest, of AdamW; it falls to 0 like a cosine.
  """

  claim = (
    'Linear recurrences that begin with long time constants classify digits '
    'pixel by pixel across a blank; with short ones they are at chance.'
  )
  source = (
    'Gu et al., "On the Parameterization and Initialization of Diagonal State '
    'Space Models", 2022, arXiv 2206.11893'
  )
  seeds: tuple[int, ...] = (0,)
  methods: tuple[str, ...] = (
    'S4D-Lin', 'S4D-Inv', 'S4D-LegS', 'S4D-Quad', 'S4D-Real', 'S4', 'S5', 'RTF',
    RING, 'Mamba', SHORT, SHORT_RING, ATTENTION,
  )  # fmt: skip
  blank: int = 64
  width: int = 32
  depth: int = 2
  states: int = 64
  epochs: int = 20
  batch_size: int = 96
  learning_rate: float = 4e-3

  def __post_init__(self):
    unknown = set(self.methods) - set(self.blocks())
    if unknown:
      raise ValueError(
        f'methods must be among {", ".join(self.blocks())}, got {unknown}.'
      )

  def blocks(self) -> dict[str, Block]:
    """Returns the block of each method."""
    length, size = PIXELS + self.blank, 2 * self.states
    mixers = {
      f'S4D-{name}': S4D(size, start=name.lower())
      for name in ('Lin', 'Inv', 'LegS', 'Quad', 'Real')
    }
    mixers['S4'] = S4(length, size)
    mixers['S5'] = S5(size)
    mixers['RTF'] = RTF(length, self.states)
    mixers[RING] = LRU(self.states, r_min=0.9, r_max=0.999)
    mixers[SHORT_RING] = LRU(self.states, r_min=0.0, r_max=0.5)
    mixers['Mamba'] = Mamba()
    # Half of a mode is gone after a step of 1.4 = log(2) / (1/2).
    mixers[SHORT] = S4D(size, start='lin', steps=(1.4, 14.0))
    residual = PreNorm(LayerNorm())
    blocks = {name: Block(m, residual=residual) for name, m in mixers.items()}
    blocks[ATTENTION] = Block(
      Attention(num_heads=4, position=Rotary()),
      FeedForward(hidden=4 * self.width),
      residual,
    )
    return blocks

  def variants(self) -> tuple[str, ...]:
    return self.methods

  def measure(
    self, variant: str, seed: int, workspace: Workspace
  ) -> dict[str, Any]:
    del workspace
    accuracy, losses = _train(self, variant, seed, *digits(self.blank))
    every = max(len(losses) // 40, 1)
    return {
      'accuracy': accuracy,
      'loss on the way': np.asarray(losses)[::every],
    }

  def judge(self, results: Results) -> list[Judgement]:
    judgements = []
    for variant in results.variants:
      accuracy = results.mean(variant, 'accuracy')
      if variant in (SHORT, SHORT_RING):
        judgements.append(below(f'accuracy of {variant}', accuracy, 0.2))
      elif variant != ATTENTION:
        judgements.append(above(f'accuracy of {variant}', accuracy, 0.85))
    return judgements

  def draw(self, results: Results, figure: Any) -> None:
    axes = figure.subplots()
    for row, variant in enumerate(results.variants):
      own = variant != ATTENTION
      colour = PALETTE[0] if own else COLOURS['baseline']
      values = results.values(variant, 'accuracy')
      axes.barh(row, values.mean(), color=colour, alpha=0.5)
      axes.plot(values, np.full(len(values), row), 'o', color=colour)
    axes.axvline(1 / CLASSES, color='black', linestyle=':', label='chance')
    axes.set_yticks(range(len(results.variants)), results.variants)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel('accuracy on held-out digits')
    figure.legend(loc='outside right upper')


class Classifier(nn.Module):
  """Reads a sequence of numbers and classifies it from the last step.

  Attributes:
    stack: the layers.
    width: D.
  """

  stack: Stack
  width: int

  @nn.compact
  def __call__(self, x_BL: Array) -> Array:
    x_BLD = Linear('ND', (self.width,), use_bias=True)(x_BL[..., None])
    x_BLD, _ = self.stack(x_BLD)
    last_BD = LayerNorm()(x_BLD[:, -1])
    return Linear('DN', (CLASSES,), use_bias=True)(last_BD)


@functools.cache
def digits(blank: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns sequences `[N, L]` and classes `[N]`; the last ones are held out."""
  try:
    from sklearn.datasets import load_digits
  except ImportError as error:
    raise ImportError(
      'the digits come with scikit-learn: pip install scikit-learn.'
    ) from error
  pixels_NL, labels_N = load_digits(return_X_y=True)
  order_N = np.random.default_rng(0).permutation(len(labels_N))
  pixels_NL = np.pad(pixels_NL[order_N] / 16, ((0, 0), (0, blank)))
  return pixels_NL.astype(np.float32), labels_N[order_N].astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train(
  study: DigitsMemory, variant: str, seed: int, x_NL: Array, labels_N: Array
) -> tuple[Array, Array]:
  """Returns the accuracy on what is held out, and the losses on the way."""
  model = Classifier(Stack(study.blocks()[variant], study.depth), study.width)
  keys = jax.random.split(jax.random.key(seed))
  params = model.init(keys[0], x_NL[:1])
  count = len(x_NL) - HELD_OUT
  per_epoch = count // study.batch_size
  steps = per_epoch * study.epochs
  adamw = optax.adamw(
    optax.cosine_decay_schedule(study.learning_rate, steps), weight_decay=0.01
  )

  def loss(params, rows_B):
    logits_BN = model.apply(params, x_NL[rows_B])
    return optax.softmax_cross_entropy_with_integer_labels(
      logits_BN, labels_N[rows_B]
    ).mean()

  def step(carry, rows_B):
    params, state = carry
    value, gradient = jax.value_and_grad(loss)(params, rows_B)
    updates, state = adamw.update(gradient, state, params)
    return (optax.apply_updates(params, updates), state), value

  orders = jax.vmap(lambda key: jax.random.permutation(key, count))(
    jax.random.split(keys[1], study.epochs)
  )
  orders = orders[:, : per_epoch * study.batch_size]
  (params, _), losses = jax.lax.scan(
    step, (params, adamw.init(params)), orders.reshape(steps, study.batch_size)
  )
  logits_BN = model.apply(params, x_NL[count:])
  accuracy = jnp.mean(logits_BN.argmax(axis=-1) == labels_N[count:])
  return accuracy, losses


def study() -> Study:
  """Returns the study."""
  return DigitsMemory()
