"""A byte model of a billion parameters, for a pod.

The same parts as `experiments/lm.py`, at the size that a slice of 64 TPU v5e
trains: 24 layers of width 2048, bfloat16 products, rows of 4096 bytes.

Run: `jaxformers train experiments/lm_1b.py`, on every host of the machine; first
`jaxformers compile experiments/lm_1b.py --topology v5e:8x8`, on any computer.
Expected: it fits; `launch/expected` holds its memory and collectives. It has not
been trained.
"""

import jax.numpy as jnp

from jaxformers.data import TextData
from jaxformers.models import LanguageModel
from jaxformers.nn import Block
from jaxformers.nn import GatedFeedForward
from jaxformers.nn import Stack
from jaxformers.nn.mixers import Attention
from jaxformers.ops import Rotary
from jaxformers.optim import AdamW
from jaxformers.optim import WarmupCosine
from jaxformers.train import Experiment
from jaxformers.train import MeshShape


def experiment() -> Experiment:
  """Returns the experiment."""
  block = Block(
    mixer=Attention(num_heads=16, position=Rotary()),
    feedforward=GatedFeedForward(hidden=5632),
  )
  return Experiment(
    model=LanguageModel(
      vocab_size=256,
      width=2048,
      stack=Stack(block=block, depth=24, remat='nothing_saveable'),
      dtype=jnp.bfloat16,
    ),
    data=TextData(length=4096),
    optimizer=AdamW(learning_rate=WarmupCosine(peak=3e-4, warmup_steps=1000)),
    steps=100_000,
    batch_size=256,
    mesh=MeshShape(data=1, fsdp=-1),
    evaluate_every=1000,
    evaluate_batches=16,
    checkpoint_every=500,
  )
