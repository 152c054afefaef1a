"""Learns the King James Bible byte by byte: the main job.

A small Transformer reads the Bible, but for eight held-out books, in some four
minutes on two CPU cores. An order-5 n-gram model of the same text stands beside
it.

Run: `jaxformers train experiments/lm.py`
Expected: 1.80 held-out bits per byte; the n-gram model has 1.66.
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
from jaxformers.ops import Window
from jaxformers.optim import AdamW
from jaxformers.optim import WarmupCosine
from jaxformers.train import Experiment
from jaxformers.train import NGram


def experiment() -> Experiment:
  """Returns the experiment."""
  block = Block(
    # A window as long as the training rows changes nothing in training, and
    # keeps distances familiar when a sample grows longer than a row.
    mixer=Attention(num_heads=3, mask=Window(128), position=Rotary()),
    feedforward=FeedForward(hidden=768, activation='squared_relu'),
  )
  return Experiment(
    model=LanguageModel(
      vocab_size=256,
      width=192,
      # Four layers compile in seconds unrolled, and then run a quarter faster.
      stack=Stack(block=block, depth=4, scan=False),
    ),
    data=TextData(length=128),
    optimizer=AdamW(learning_rate=WarmupCosine(peak=3e-3, warmup_steps=100)),
    steps=1000,
    batch_size=16,
    evaluate_every=250,
    baseline=NGram(context=5),
  )
