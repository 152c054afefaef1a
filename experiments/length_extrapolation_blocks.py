"""Attention learns to copy over 64 tokens; what does it do over 512?

A small decoder with RoPE learns to go on with a repeated block of 8 to 24
tokens, in rows of 64, and is then asked for the last 64 of 512 tokens without
any further training. Beyond 64 it meets distances that it never saw and more
keys than it ever weighed. Methods change the positions (position interpolation,
NTK-aware frequencies, YaRN, ReRoPE, leaky ReRoPE) or the scale of the scores:
`retrofit` multiplies them by log n / log 64 once there are n > 64 keys, `log n`
was also trained with log n / log 64. Inverse leaky ReRoPE is trained with steps
of 16 beyond a window of 16, and reads with RoPE.

Frequencies are slowed for 512 tokens at either length, but for dynamic NTK,
which leaves RoPE alone at 64.

Source: Su Jianlin, kexue.fm/archives/8823 (log n), 9675 and 9706 (NTK-RoPE),
9708 (ReRoPE), 9728 (inverse leaky ReRoPE), 2021 to 2023; Chen et al., arXiv
2306.15595 (position interpolation); Peng et al., arXiv 2309.00071 (YaRN).
Run: `jaxformers reproduce experiments/length_extrapolation_blocks.py`
Expected: not measured yet.
Time: not measured yet.
"""

from collections.abc import Iterator
import dataclasses
from typing import Any

from jaxformers.data import RepeatedBlocks
from jaxformers.models import LanguageModel
from jaxformers.nn import Block
from jaxformers.nn import Embed
from jaxformers.nn import FeedForward
from jaxformers.nn import Head
from jaxformers.nn import Normal
from jaxformers.nn import Stack
from jaxformers.nn.mixers import Attention
from jaxformers.ops import DynamicNTK
from jaxformers.ops import Interpolation
from jaxformers.ops import InverseSqrt
from jaxformers.ops import LeakyReRoPE
from jaxformers.ops import LogLength
from jaxformers.ops import LogLengthRetrofit
from jaxformers.ops import NTKFixed
from jaxformers.ops import NTKMixed
from jaxformers.ops import NTKOld
from jaxformers.ops import ReRoPE
from jaxformers.ops import Rotary
from jaxformers.ops import YaRN
from jaxformers.ops import YaRNScale
from jaxformers.optim import AdamW
from jaxformers.optim import WarmupCosine
from jaxformers.train import Experiment
from jaxformers.train import Judgement
from jaxformers.train import Results
from jaxformers.train import Study
from jaxformers.train import Workspace
from jaxformers.train import evaluate_last_tokens
from jaxformers.train.figure import COLOURS
from jaxformers.train.figure import PALETTE

INVERSE = 'inverse leaky ReRoPE'
SCALES = 'plain', 'retrofit', 'log n'


@dataclasses.dataclass(frozen=True)
class LengthExtrapolationBlocks(Study):
  """Measures accuracies at the trained length and far beyond it.

  Attributes:
    train_length: tokens per row in training, a multiple of 4.
    test_length: tokens per row beyond it.
    steps: of training.
    heldout_rows: rows to be measured on.
  """

  claim = (
    'A model trained with RoPE copies over 8 times longer rows with ReRoPE and '
    'a log n scale, or with YaRN, and not with RoPE or interpolation.'
  )
  source = (
    'Su Jianlin, 2021 to 2023, kexue.fm/archives/8823, 9706, 9708, 9728; Peng '
    'et al., "YaRN", 2023, arXiv 2309.00071'
  )
  train_length: int = 64
  test_length: int = 512
  steps: int = 600
  heldout_rows: int = 128

  def variants(self) -> tuple[str, ...]:
    return (*self._methods(self.test_length), INVERSE)

  def _methods(self, length: int) -> dict[str, tuple[Any, Any]]:
    """Returns positions and scale of what reads rows of a length."""
    known, scale = self.train_length, InverseSqrt()
    factor = self.test_length / known
    spectra = {
      'RoPE': Rotary(),
      'PI': Rotary(spectrum=Interpolation(factor)),
      'NTK old': Rotary(spectrum=NTKOld(factor)),
      'NTK fixed': Rotary(spectrum=NTKFixed(factor)),
      'NTK mixed': Rotary(spectrum=NTKMixed(factor)),
      'NTK dynamic': Rotary(spectrum=DynamicNTK(1, known, length)),
    }
    windows = {
      'ReRoPE 1/4': ReRoPE(known // 4),
      'ReRoPE 1/2': ReRoPE(known // 2),
      'leaky ReRoPE 1/4': LeakyReRoPE(known // 4, slope=16),
      'leaky ReRoPE 1/2': LeakyReRoPE(known // 2, slope=16),
    }
    yarn = Rotary(spectrum=YaRN(factor, known)), scale * YaRNScale(factor)
    return {
      **{name: (position, scale) for name, position in spectra.items()},
      'YaRN': yarn,
      **{name: (position, scale) for name, position in windows.items()},
    }

  def measure(
    self, variant: str, seed: int, workspace: Workspace
  ) -> dict[str, float]:
    measured = {}
    for scale, length in self._columns():
      run = workspace.train(self._experiment(variant, scale, seed))
      data = RepeatedBlocks(length, heldout_rows=self.heldout_rows)
      found = evaluate_last_tokens(
        self._reader(variant, scale, length),
        run.variables,
        data.prepare().heldout,
        self.train_length,
      )
      measured[_name(scale, length)] = found.accuracy
    return measured

  def _columns(self) -> Iterator[tuple[str, int]]:
    for scale in SCALES:
      for length in (self.train_length, self.test_length):
        yield scale, length

  def _reader(self, variant: str, scale: str, length: int) -> LanguageModel:
    """Returns the model that is measured."""
    method = 'RoPE' if variant == INVERSE else variant
    position, base = self._methods(length)[method]
    factors = {
      'retrofit': LogLengthRetrofit(self.train_length),
      'log n': LogLength(self.train_length),
    }
    return _model(position, base * factors[scale] if scale in factors else base)

  def _experiment(self, variant: str, scale: str, seed: int) -> Experiment:
    """Returns what trains the model; methods and `retrofit` have no say."""
    position, factor = Rotary(), self.test_length / self.train_length
    if variant == INVERSE:
      position = LeakyReRoPE(self.train_length // 4, slope=1 / (2 * factor))
    grown = InverseSqrt() * LogLength(self.train_length)
    return Experiment(
      model=_model(position, grown if scale == 'log n' else InverseSqrt()),
      data=RepeatedBlocks(self.train_length, heldout_rows=self.heldout_rows),
      optimizer=AdamW(
        learning_rate=WarmupCosine(2e-3, warmup_steps=50, final_fraction=0),
        b2=0.999,
        weight_decay=0.0,
        max_gradient_norm=None,
      ),
      steps=self.steps,
      batch_size=32,
      seed=seed,
      evaluate_every=self.steps,
      checkpoint_every=self.steps,
      keep_best=0,
      preview=None,
    )

  def judge(self, results: Results) -> list[Judgement]:
    def far(variant, scale='plain'):
      return results.mean(variant, _name(scale, self.test_length))

    def near(variant, scale='plain'):
      return results.mean(variant, _name(scale, self.train_length))

    def gain(what, seen, relation, bound):
      return Judgement(f'accuracy at {what}', seen, relation, bound)

    n, many = self.train_length, self.test_length
    best = far('ReRoPE 1/2', 'retrofit')
    changes = [abs(near(v, 'retrofit') - near(v)) for v in results.variants]
    turned = abs(near('ReRoPE 1/2', 'retrofit') - near('RoPE'))
    return [
      gain(
        f'{many}, RoPE, gain by retrofit',
        far('RoPE', 'retrofit') - far('RoPE'),
        '>=',
        0.08,
      ),
      gain(f'{n}, largest change by retrofit', max(changes), '<=', 0),
      gain(f'{many}, YaRN less RoPE', far('YaRN') - far('RoPE'), '>=', 0.25),
      gain(f'{n}, PI', near('PI'), '<=', 0.5),
      gain(f'{many}, ReRoPE 1/2 with retrofit', best, '>=', 0.85),
      gain(
        f'{many}, the same less RoPE with retrofit',
        best - far('RoPE', 'retrofit'),
        '>=',
        0.3,
      ),
      gain(f'{n}, the same, distance from RoPE', turned, '<=', 0.02),
      gain(
        f'{many}, {INVERSE} less RoPE', far(INVERSE) - far('RoPE'), '>=', 0.25
      ),
    ]

  def draw(self, results: Results, figure: Any) -> None:
    axes = figure.subplots()
    rows = range(len(results.variants))
    for column, scale in enumerate(SCALES):
      for row, variant in enumerate(results.variants):
        values = results.values(variant, _name(scale, self.test_length))
        y = row + 0.2 * (column - 1)
        style = {'color': PALETTE[column]}
        axes.plot([values.min(), values.max()], [y, y], alpha=0.4, **style)
        label = scale if row == 0 else None
        axes.plot(values.mean(), y, 'o', markersize=5, label=label, **style)
    near = [
      results.mean(v, _name('plain', self.train_length))
      for v in results.variants
    ]
    axes.plot(
      near,
      rows,
      '|',
      color=COLOURS['baseline'],
      markersize=14,
      label=f'plain, at {self.train_length}',
    )
    axes.set_yticks(rows, results.variants)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    axes.set_xlabel(
      f'accuracy on the last {self.train_length} of {self.test_length} tokens'
    )
    figure.legend(loc='outside right upper')


def _model(position: Any, scale: Any) -> LanguageModel:
  mixer = Attention(num_heads=2, position=position, scale=scale)
  block = Block(mixer=mixer, feedforward=FeedForward(hidden=256))
  return LanguageModel(
    vocab_size=32,
    width=64,
    stack=Stack(block=block, depth=2, scan=False),
    # Ids of large variance and a head of its own: with the usual small, shared
    # table, copying takes several times more steps to be found.
    embed=Embed(initializer=Normal(1.0)),
    head=Head(),
  )


def _name(scale: str, length: int) -> str:
  return f'{scale}, {length}'


def study() -> Study:
  """Returns the study."""
  return LengthExtrapolationBlocks()
