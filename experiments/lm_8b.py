"""A model of eight billion parameters over 128 thousand tokens, for a pod.

The shape of Llama 3 8B (Grattafiori et al., "The Llama 3 Herd of Models", 2024,
arXiv 2407.21783, table 3) from the parts of `experiments/lm.py`: 32 layers of
width 4096, 8 heads of keys for 32 of queries, rows of 8192 tokens, for a slice
of 256 TPU v5p or v5e. Give it a text and the tokenizer of your choice.

Run: `jaxformers train experiments/lm_8b.py --set data.path=TEXT
--set 'data.tokenizer=HuggingFaceTokenizer(path="tokenizer.json")'`, on every host
of the machine; first `jaxformers compile experiments/lm_8b.py
--topology v5p:4x8x8`, on any computer.
Expected: it fits; `launch/expected` holds its memory and collectives. It has not
been trained.
"""

import jax.numpy as jnp

from jaxformers.data import TextData
from jaxformers.models import LanguageModel
from jaxformers.nn import Block
from jaxformers.nn import GatedFeedForward
from jaxformers.nn import Head
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
    mixer=Attention(num_heads=32, num_kv_heads=8, position=Rotary(base=5e5)),
    feedforward=GatedFeedForward(hidden=14336),
  )
  return Experiment(
    model=LanguageModel(
      vocab_size=128_256,
      width=4096,
      stack=Stack(block=block, depth=32, remat='nothing_saveable'),
      head=Head(),
      dtype=jnp.bfloat16,
    ),
    data=TextData(length=8192),
    optimizer=AdamW(learning_rate=WarmupCosine(peak=3e-4, warmup_steps=1000)),
    steps=100_000,
    batch_size=256,
    mesh=MeshShape(data=1, fsdp=-1),
    evaluate_every=1000,
    evaluate_batches=16,
    checkpoint_every=500,
  )
