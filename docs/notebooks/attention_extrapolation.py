# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Attention on longer texts than it was trained on
#
# A model with rotary positions (RoPE) learns to copy in rows of 64 tokens and is
# then read at up to 512, without further training. What fails, and what helps?
# About two minutes on two CPU cores.

# %%
import subprocess
import sys

if 'google.colab' in sys.modules:
  # Before there is a release on PyPI: 'git+https://...' of your copy instead.
  pip = [sys.executable, '-m', 'pip', 'install', '-q']
  subprocess.run([*pip, 'jaxformers'], check=True)

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

from jaxformers.data import RepeatedBlocks
from jaxformers.models import LanguageModel
from jaxformers.nn import Block
from jaxformers.nn import Embed
from jaxformers.nn import FeedForward
from jaxformers.nn import Head
from jaxformers.nn import Normal
from jaxformers.nn import Stack
from jaxformers.nn.mixers import Attention
from jaxformers.ops import Causal
from jaxformers.ops import Interpolation
from jaxformers.ops import InverseSqrt
from jaxformers.ops import LogLength
from jaxformers.ops import LogLengthRetrofit
from jaxformers.ops import NTKMixed
from jaxformers.ops import ReRoPE
from jaxformers.ops import Rotary
from jaxformers.ops import YaRN
from jaxformers.ops import YaRNScale
from jaxformers.ops import attention_weights
from jaxformers.ops import entropy
from jaxformers.optim import AdamW
from jaxformers.optim import WarmupCosine
from jaxformers.train import Experiment
from jaxformers.train import evaluate_last_tokens
from jaxformers.train import open_run
from jaxformers.train import train
from jaxformers.train.figure import PALETTE
from jaxformers.train.figure import smooth
from jaxformers.train.figure import style

plt.rcParams.update(style())

# %% tags=["parameters"]
steps = 600
width = 64
train_length = 64
times = (1, 2, 4, 8)  # lengths that are read, as multiples of it
rows = 64  # to be measured on
entropy_keys = 1024
folder = 'runs/attention_extrapolation'  # other settings want another one

# %% [markdown]
# ## Two things change with the length
#
# **Positions.** With RoPE the score of a query at i and a key at j depends on the
# distance $r = i - j$ alone, and the model has seen none beyond 64. Schemes differ
# in the position $P(r)$ that they give to a distance:
#
# - RoPE: $P(r) = r$.
# - Position interpolation for $k$ times the length: $P(r) = r / k$. No distance is
#   new, but neighbours are closer than ever before.
# - ReRoPE with a window w: $P(r) = \min(r, w)$. Near keys are as they were, and
#   beyond the window all are equally far.
#
# NTK-aware frequencies and YaRN do as RoPE in the fast pairs of coordinates and
# interpolate in the slow ones.

# %%
longest = train_length * times[-1]
window = train_length // 2
distance = np.arange(longest)
figure, axes = plt.subplots(figsize=(6, 3.4))
axes.plot(distance, distance, label='RoPE')
axes.plot(distance, distance / times[-1], label='interpolation')
axes.plot(distance, np.minimum(distance, window), label='ReRoPE')
axes.axhspan(0, train_length, color='0.93', label='seen in training')
axes.set_xlabel('distance of query and key')
axes.set_ylabel('position the model sees')
legend = axes.legend()

# %% [markdown]
# **The number of keys.** A softmax over n keys whose scores keep their spread has
# an entropy that grows with $\log n$: attention blurs. If scores are multiplied by
# $\log n / \log n_0$, n being counted for each query, it stays nearly constant,
# here for scores with a standard deviation of 3. (Su Jianlin, "Attention scale
# from entropy invariance", 2021, kexue.fm/archives/8823.)


# %%
@jax.jit
def mean_entropy(query, key):
  """Entropies by number of visible keys, without and with log n."""
  scales = InverseSqrt(), InverseSqrt() * LogLength(train_length)
  found = []
  for scale in scales:
    weighed = attention_weights(
      query[None], key[None], mask=Causal(), scale=scale
    )
    found.append(entropy(weighed.logits, weighed.is_visible).mean((0, 1)))
  return found


keys = jax.random.split(jax.random.key(0))
query, key = (jax.random.normal(k, (entropy_keys, 4, 64)) for k in keys)
plain, scaled = mean_entropy(3 * query, key)

figure, axes = plt.subplots(figsize=(6, 3.4))
n = np.arange(1, entropy_keys + 1)
axes.plot(n, smooth(plain, 31), label='plain')
axes.plot(n, smooth(scaled, 31), label=r'$\log n$')
axes.plot(n, np.log(n), color='0.6', linestyle=':', label='uniform weights')
axes.set_xscale('log')
axes.set_xlabel('keys that a query sees')
axes.set_ylabel('entropy of its weights, nats')
legend = axes.legend()

# %% [markdown]
# ## A model that copies
#
# Rows repeat a random block of 8 to 24 tokens. From the second repetition on a
# model that looks one period back is always right; guessing is right once in 32.


# %%
def model_with(position, scale=InverseSqrt()):
  mixer = Attention(num_heads=2, position=position, scale=scale)
  block = Block(mixer, FeedForward(hidden=4 * width))
  return LanguageModel(
    vocab_size=32,
    width=width,
    stack=Stack(block, depth=2, scan=False),
    embed=Embed(initializer=Normal(1.0)),
    head=Head(),
  )


data = RepeatedBlocks(train_length, heldout_rows=rows)
experiment = Experiment(
  model=model_with(Rotary()),
  data=data,
  optimizer=AdamW(
    WarmupCosine(2e-3, warmup_steps=50, final_fraction=0),
    b2=0.999,
    weight_decay=0.0,
    max_gradient_norm=None,
  ),
  steps=steps,
  batch_size=32,
  evaluate_every=steps // 2,
  checkpoint_every=steps,
  preview=None,
)
state = train(experiment, folder)
variables = open_run(folder).variables

# %% [markdown]
# ## The same parameters, read in other ways
#
# Positions and scales own no parameters, so another model with the same
# parameters is another object in a slot. `LogLengthRetrofit(64)` multiplies scores
# by $\log n / \log 64$ for queries that see more than 64 keys and leaves the others
# alone: it suits a model that was trained without.

# %%
factor = times[-1]
log_n = InverseSqrt() * LogLengthRetrofit(train_length)
readings = {
  'RoPE': model_with(Rotary()),
  'RoPE, log n': model_with(Rotary(), log_n),
  'interpolation': model_with(Rotary(spectrum=Interpolation(factor))),
  'NTK mixed': model_with(Rotary(spectrum=NTKMixed(factor))),
  'YaRN': model_with(
    Rotary(spectrum=YaRN(factor, train_length)),
    InverseSqrt() * YaRNScale(factor),
  ),
  'ReRoPE': model_with(ReRoPE(window)),
  'ReRoPE, log n': model_with(ReRoPE(window), log_n),
}
lengths = [train_length * k for k in times]
heldout = {
  n: RepeatedBlocks(n, heldout_rows=rows).prepare().heldout for n in lengths
}
print(' ' * 14, *(f'{n:6}' for n in lengths))
accuracies = {}
for name, reader in readings.items():
  accuracies[name] = [
    evaluate_last_tokens(reader, variables, heldout[n], train_length).accuracy
    for n in lengths
  ]
  print(f'{name:14}', *(f'{a:6.2f}' for a in accuracies[name]))

# %%
figure, axes = plt.subplots(figsize=(7, 3.8))
methods = [name for name in readings if 'log n' not in name]
colours = dict(zip(methods, PALETTE, strict=False))
for name, values in accuracies.items():
  axes.plot(
    lengths,
    values,
    'o--' if 'log n' in name else 'o-',
    color=colours[name.removesuffix(', log n')],
    label=name,
  )
axes.set_xscale('log', base=2)
axes.set_xticks(lengths, lengths)
axes.set_ylim(0, 1.02)
axes.set_xlabel('tokens that are read')
axes.set_ylabel(f'accuracy on the last {train_length}')
legend = axes.legend(loc='center left', bbox_to_anchor=(1, 0.5))

# %% [markdown]
# Positions and the number of keys are two problems, and both count: with ReRoPE
# and $\log n$ together most copies are right at eight times the length.
# Interpolation moves neighbours closer than the model can tell apart, at the
# trained length too; it is meant to be followed by some training. NTK-aware
# frequencies are no better than RoPE here, YaRN is.
#
# This is one seed of one task. `docs/studies.md` has three seeds of two: on text a
# window of the trained length is hard to beat, because little is gained from
# farther away.
#
# ## What next
#
# - Train with `LogLength(train_length)` in the slot from the start.
# - Try `LeakyReRoPE`, `DynamicNTK`, or a `Window` as mask.
# - `attention_report(model, variables, tokens)` of `jaxformers.diagnostics` measures
#   entropies in every head of a trained model.
# - Write a scale or a position scheme of your own: `docs/attention.md`.
