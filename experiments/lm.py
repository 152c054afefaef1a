"""Learns the King James Bible byte by byte: the main job.

A small Transformer reads the Bible, but for eight held-out books, in some four
minutes on two CPU cores. An order-5 n-gram model of the same text stands beside
it.

Run: `jaxformers train experiments/lm.py`
Expected: see RESULT; held-out bits per byte below 2.3.
Your own text: add `--set data.path=FILE` and, for other tokens than bytes,
`--set 'data.tokenizer=HuggingFaceTokenizer(path="tokenizer.json")'` with
`--set model.vocab_size=N`.
"""

from jaxformers.data import TextData
from jaxformers.models import LanguageModel
from jaxformers.nn import Block
from jaxformers.nn import FeedForward
from jaxformers.nn import Stack
from jaxformers.nn.mixers import Attention
from jaxformers.ops import Rotary
from jaxformers.optim import AdamW
from jaxformers.optim import WarmupCosine
from jaxformers.train import Experiment
from jaxformers.train import NGram


def experiment() -> Experiment:
  """Returns the experiment."""
  block = Block(
    mixer=Attention(num_heads=4, position=Rotary()),
    feedforward=FeedForward(hidden=512, activation='squared_relu'),
  )
  return Experiment(
    model=LanguageModel(
      vocab_size=256, width=128, stack=Stack(block=block, depth=4)
    ),
    data=TextData(length=256),
    optimizer=AdamW(learning_rate=WarmupCosine(peak=4e-3, warmup_steps=100)),
    steps=1000,
    batch_size=16,
    baseline=NGram(context=5),
  )
