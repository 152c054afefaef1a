"""A byte model reads the Bible in pieces of 64; does more context help it?

A small decoder with RoPE learns the King James Bible byte by byte, in rows of
64, and is then asked for the same 64 bytes of held-out text after 0 to 448
bytes of context, without any further training. A model that can use context
gets better with it. Methods change the positions (position interpolation,
NTK-aware frequencies, YaRN, ReRoPE, leaky ReRoPE), and each is measured with and
without `retrofit`, which multiplies scores by log n / log 64 once there are
n > 64 keys.

Frequencies are slowed for 512 bytes at all lengths, but for dynamic NTK, which
follows the length. The 64 bytes that are measured are the same at all lengths;
at 64 the first of them has no context, so that any way to use some helps. The
reference is therefore RoPE with a window of 64 bytes, which shows the model
nothing unfamiliar: a method that is better than it uses what is farther away.

Source: Su Jianlin, kexue.fm/archives/8823 (log n), 9675 and 9706 (NTK-RoPE),
9708 (ReRoPE), 2021 to 2023; Chen et al., arXiv 2306.15595 (position
interpolation); Peng et al., arXiv 2309.00071 (YaRN).
Run: `jaxformers reproduce experiments/length_extrapolation_text.py`
Expected: 5 of 6 criteria hold. Bits per byte after 64 and 512 bytes: RoPE 1.89
and 4.88, interpolation 5.2 and 5.4, NTK mixed 2.94 and 4.58 (3.09 after 256),
YaRN 2.11 and 2.66, ReRoPE with a window of half the rows 1.89 and 1.89, with
retrofit 1.86. Not reproduced: windowed RoPE has 1.84, so that what ReRoPE gains
is the familiar 64 bytes, and more of them cost it a little. Retrofit helps that
ReRoPE, and NTK mixed with two seeds of three, but neither YaRN nor leaky ReRoPE.
Time: about 45 minutes on 2 CPU cores that were busy with other work as well.
"""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from jaxformers.data import TextData
from jaxformers.models import LanguageModel
from jaxformers.nn import Block
from jaxformers.nn import FeedForward
from jaxformers.nn import Stack
from jaxformers.nn.mixers import Attention
from jaxformers.ops import Causal
from jaxformers.ops import DynamicNTK
from jaxformers.ops import Interpolation
from jaxformers.ops import InverseSqrt
from jaxformers.ops import LeakyReRoPE
from jaxformers.ops import LogLengthRetrofit
from jaxformers.ops import NTKMixed
from jaxformers.ops import ReRoPE
from jaxformers.ops import Rotary
from jaxformers.ops import Window
from jaxformers.ops import YaRN
from jaxformers.ops import YaRNScale
from jaxformers.optim import AdamW
from jaxformers.optim import WarmupCosine
from jaxformers.train import Experiment
from jaxformers.train import Judgement
from jaxformers.train import Results
from jaxformers.train import Study
from jaxformers.train import Workspace
from jaxformers.train import above
from jaxformers.train import below
from jaxformers.train import evaluate_last_tokens
from jaxformers.train.figure import COLOURS
from jaxformers.train.figure import PALETTE
from jaxformers.train.figure import plot_band

SCALES = 'plain', 'retrofit'
WINDOWED = 'windowed RoPE'
# What is compared, and the colours it is drawn in.
METHODS = {
  'RoPE': COLOURS['text'],
  WINDOWED: COLOURS['baseline'],
  'PI': PALETTE[3],
  'NTK mixed': PALETTE[2],
  'NTK dynamic': '#8c6d46',
  'YaRN': PALETTE[4],
  'ReRoPE 1/4': PALETTE[5],
  'ReRoPE 1/2': PALETTE[0],
  'leaky ReRoPE 1/4': PALETTE[1],
}


@dataclasses.dataclass(frozen=True)
class LengthExtrapolationText(Study):
  """Measures bits per byte of the same bytes after ever more context.

  Attributes:
    methods: those that are compared, some of `METHODS`; what is judged and not
      measured does not hold.
    data: the text; its length is that of the rows in training.
    times: lengths of what is read, as multiples of it, in increasing order
      from 1.
    width: of the model.
    depth: layers of it.
    steps: of training.
    windows: number of places in the held-out text to be measured.
  """

  claim = (
    'A model trained with RoPE on short texts gets worse with longer context; '
    'with ReRoPE and a log n scale it gets better.'
  )
  source = (
    'Su Jianlin, "ReRoPE", 2023, kexue.fm/archives/9708; NTK-RoPE: '
    'kexue.fm/archives/9706; Peng et al., "YaRN", 2023, arXiv 2309.00071'
  )
  methods: tuple[str, ...] = tuple(METHODS)
  data: TextData = TextData(length=64)
  times: tuple[int, ...] = (1, 2, 4, 8)
  width: int = 128
  depth: int = 4
  steps: int = 1000
  windows: int = 96

  def __post_init__(self):
    if unknown := set(self.methods) - set(METHODS):
      raise ValueError(f'methods has {unknown}; there are {tuple(METHODS)}.')

  def variants(self) -> tuple[str, ...]:
    return self.methods

  def _reading(self, method: str, length: int) -> dict[str, Any]:
    """Returns how attention reads rows of a length."""
    known, factor = self.data.length, self.times[-1]
    positions = {
      'RoPE': Rotary(),
      WINDOWED: Rotary(),
      'PI': Rotary(spectrum=Interpolation(factor)),
      'NTK mixed': Rotary(spectrum=NTKMixed(factor)),
      'NTK dynamic': Rotary(spectrum=DynamicNTK(1, known, length)),
      'YaRN': Rotary(spectrum=YaRN(factor, known)),
      'ReRoPE 1/4': ReRoPE(known // 4),
      'ReRoPE 1/2': ReRoPE(known // 2),
      'leaky ReRoPE 1/4': LeakyReRoPE(known // 4, slope=16),
    }
    scale = InverseSqrt()
    if method == 'YaRN':
      scale *= YaRNScale(factor)
    mask = Window(known) if method == WINDOWED else Causal()
    return {'position': positions[method], 'scale': scale, 'mask': mask}

  def measure(
    self, variant: str, seed: int, workspace: Workspace
  ) -> dict[str, float]:
    run = workspace.train(self._experiment(seed))
    rows = self._rows()
    measured = {}
    for scale in SCALES:
      for length in self._lengths():
        reading = self._reading(variant, length)
        if scale == 'retrofit':
          reading['scale'] *= LogLengthRetrofit(self.data.length)
        found = evaluate_last_tokens(
          self._model(**reading),
          run.variables,
          [{k: v[-length:] for k, v in row.items()} for row in rows],
          self.data.length,
        )
        measured[_name(scale, length)] = found.bits
    return measured

  def _lengths(self) -> list[int]:
    return [n * self.data.length for n in self.times]

  def _rows(self) -> list[dict[str, np.ndarray]]:
    """Returns held-out rows of the longest context, spread over the books."""
    data = dataclasses.replace(self.data, length=self._lengths()[-1])
    heldout = data.prepare().heldout
    full = [row for row in heldout if (row['targets'] >= 0).all()]
    places = np.linspace(0, len(full) - 1, min(self.windows, len(full)))
    return [full[i] for i in places.astype(int)]

  def _experiment(self, seed: int) -> Experiment:
    return Experiment(
      model=self._model(position=Rotary()),
      data=self.data,
      optimizer=AdamW(learning_rate=WarmupCosine(peak=3e-3)),
      steps=self.steps,
      batch_size=32,
      seed=seed,
      evaluate_every=self.steps,
      checkpoint_every=max(self.steps // 4, 1),
      keep_best=0,
      preview=None,
    )

  def _model(self, **reading: Any) -> LanguageModel:
    mixer = Attention(num_heads=4, **reading)
    feedforward = FeedForward(4 * self.width, activation='squared_relu')
    block = Block(mixer=mixer, feedforward=feedforward)
    return LanguageModel(
      vocab_size=256,
      width=self.width,
      stack=Stack(block=block, depth=self.depth, scan=False),
    )

  def judge(self, results: Results) -> list[Judgement]:
    short, long = self._lengths()[0], self._lengths()[-1]

    def at(length, method, scale):
      if method not in results.variants:
        return math.nan
      return results.mean(method, _name(scale, length))

    def far(method, scale='plain'):
      return at(long, method, scale)

    best = far('ReRoPE 1/2', 'retrofit')
    gain = best - at(short, 'ReRoPE 1/2', 'retrofit')
    ntk, bits = far('NTK mixed'), f'bits per byte at {long}'
    return [
      above(
        f'{bits}: RoPE, less those at {short}',
        far('RoPE') - at(short, 'RoPE', 'plain'),
        0.1,
      ),
      below(
        f'{bits}: ReRoPE 1/2 with retrofit, less those at {short}', gain, 0
      ),
      below(
        f'{bits}: ReRoPE 1/2 with retrofit, less windowed RoPE',
        best - far(WINDOWED),
        0,
      ),
      above(f'{bits}: NTK mixed less ReRoPE 1/2', ntk - far('ReRoPE 1/2'), 0),
      above(f'{bits}: RoPE less NTK mixed', far('RoPE') - ntk, 0),
      above(
        f'{bits}: NTK mixed less the same with retrofit',
        ntk - far('NTK mixed', 'retrofit'),
        0,
      ),
    ]

  def draw(self, results: Results, figure: Any) -> None:
    lengths = self._lengths()
    panels = figure.subplots(1, 2)
    for axes in panels:
      for method, scale in itertools.product(results.variants, SCALES):
        curves = np.stack(
          [results.values(method, _name(scale, n)) for n in lengths], axis=1
        )
        line = {'linestyle': '-' if scale == 'plain' else ':', 'marker': '.'}
        plot_band(axes, lengths, curves, color=METHODS[method], **line)
      axes.set_xscale('log', base=2)
      axes.set_xticks(lengths, lengths)
      axes.set_xlabel('bytes that are read')
    panels[0].set_ylabel(f'bits per byte of the last {self.data.length}')
    best = panels[0].dataLim.y0
    panels[1].set_ylim(best - 0.01, best + 0.11)
    panels[1].set_title('the same, closer')
    for method in results.variants:
      panels[0].plot([], [], color=METHODS[method], label=method)
    panels[0].plot([], [], ':', color=COLOURS['text'], label='with retrofit')
    figure.legend(loc='outside right upper')


def _name(scale: str, length: int) -> str:
  return f'{scale}, {length}'


def study() -> Study:
  """Returns the study."""
  return LengthExtrapolationText()
