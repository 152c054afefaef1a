# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A language model from scratch
#
# A small Transformer learns the King James Bible byte by byte, is sampled from,
# is stopped and goes on, and then gets another layer in the place of attention.
# A few minutes on two CPU cores; on a GPU or TPU nothing changes but the time.

# %%
import subprocess
import sys

if 'google.colab' in sys.modules:
  # Before there is a release on PyPI: 'git+https://...' of your copy instead.
  pip = [sys.executable, '-m', 'pip', 'install', '-q']
  subprocess.run([*pip, 'jaxformers'], check=True)

# %%
import dataclasses
import pathlib
import shutil

import matplotlib.pyplot as plt

from jaxformers.data import TextData
from jaxformers.models import LanguageModel
from jaxformers.nn import Block
from jaxformers.nn import FeedForward
from jaxformers.nn import Stack
from jaxformers.nn.mixers import Attention
from jaxformers.nn.mixers import RecurrentBlock
from jaxformers.ops import Rotary
from jaxformers.ops import Window
from jaxformers.optim import AdamW
from jaxformers.optim import WarmupCosine
from jaxformers.train import Experiment
from jaxformers.train import NGram
from jaxformers.train import open_run
from jaxformers.train import train
from jaxformers.train.figure import smooth
from jaxformers.train.figure import style
from jaxformers.train.metrics import read_metrics

plt.rcParams.update(style())

# %% tags=["parameters"]
path = None  # a text file of yours; None for the King James Bible
steps = 300
width = 128
depth = 4
length = 128  # bytes per row
sample_bytes = 300
folder = 'runs/language_model'  # other settings want another one

# %% [markdown]
# ## Model
#
# A model is a value: a tree of frozen dataclasses that holds no parameters. What
# stands between tokens, the *mixer*, is an object in a slot, and so are its
# positions and its mask. The window is as long as a row, so in training it
# changes nothing; in a sample that grows longer it keeps distances familiar.


# %%
def model_with(mixer):
  block = Block(mixer, FeedForward(hidden=4 * width))
  stack = Stack(block, depth=depth, scan=False)
  return LanguageModel(vocab_size=256, width=width, stack=stack)


attention = Attention(num_heads=4, position=Rotary(), mask=Window(length))

# %% [markdown]
# ## Experiment
#
# An experiment holds all that decides the outcome of a run: model, data, what is
# minimised (by default the cross-entropy of the next token), optimiser, steps,
# seed. Eight books of the Bible are held out. A model of n-grams of the same text
# stands beside it, so that the number means something.

# %%
experiment = Experiment(
  model=model_with(attention),
  data=TextData(path=path, length=length),
  optimizer=AdamW(WarmupCosine(peak=3e-3, warmup_steps=steps // 8)),
  steps=steps,
  batch_size=16,
  evaluate_every=steps // 4,
  evaluate_batches=8,
  checkpoint_every=steps // 2,
  baseline=NGram(context=5),
  preview=None,
)
runs = pathlib.Path(folder)
state = train(experiment, runs / 'attention')

# %% [markdown]
# ## Sample
#
# A run directory holds the record of the experiment, metrics and checkpoints;
# opened again, it is a model with its parameters. Temperatures below 1 draw
# likelier text.


# %%
def show_samples(directory):
  prompts = 'And God said', 'In the morning'
  texts = [prompt.encode() for prompt in prompts]
  run = open_run(directory)
  for row, piece in run.sample(prompts, tokens=sample_bytes, temperature=0.6):
    texts[row] += piece
  for text in texts:
    print(text.decode(errors='replace') + '\n')


show_samples(runs / 'attention')

# %% [markdown]
# ## Stop and go on
#
# Whatever ends a run, the same call goes on from its newest checkpoint. Here the
# last one is taken away, as if the machine had failed before it was saved: the
# second half is trained again, and every number is what it was, to the last bit.

# %%
metrics = runs / 'attention' / 'metrics.jsonl'
before = metrics.read_text()
shutil.rmtree(runs / 'attention' / 'checkpoints' / str(steps))
state = train(experiment, runs / 'attention')
print('every bit as before:', metrics.read_text() == before)
assert metrics.read_text() == before

# %% [markdown]
# ## Another mixer
#
# Griffin's recurrent block keeps a memory of constant size and needs no positions.
# Nothing else changes: the experiment is a value, and `dataclasses.replace` gives
# another one.

# %%
recurrent = dataclasses.replace(
  experiment, model=model_with(RecurrentBlock(width)), baseline=None
)
state = train(recurrent, runs / 'recurrent')
show_samples(runs / 'recurrent')

# %%
figure, axes = plt.subplots(figsize=(7, 3.6))
for name in ('attention', 'recurrent'):
  lines = read_metrics(runs / name / 'metrics.jsonl')
  loss = [x['loss'] for x in lines if x['split'] == 'train']
  (curve,) = axes.plot(smooth(loss, max(5, steps // 30)), label=name)
  heldout = [x for x in lines if x['split'] == 'heldout']
  axes.plot(
    [x['step'] for x in heldout],
    [x['loss'] for x in heldout],
    'o',
    color=curve.get_color(),
  )
  print(f'{name}: {heldout[-1]["bits_per_byte"]:.2f} bits per held-out byte')
axes.set_xlabel('step')
axes.set_ylabel('nats per byte (points: held out)')
legend = axes.legend()

# %% [markdown]
# ## What next
#
# - Train for longer: 1000 steps of the model in `experiments/lm.py` take about
#   five minutes on two cores.
# - Put your own text into `path`, or a `tokenizer.json` into
#   `TextData(tokenizer=HuggingFaceTokenizer(...))`.
# - Swap more: `Mamba()`, `RWKV6(num_heads=4)`, `GatedFeedForward(...)`, or a tuple
#   of blocks in `Stack` that repeats, such as two recurrent ones and one with
#   local attention.
# - The same file trains on several hosts and resumes on other devices: see
#   `docs/scale.md`.
