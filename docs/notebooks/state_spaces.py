# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # State spaces: memories of constant size
#
# A linear system $x' = A x + B u$ writes its input $u$ into a state $x$. HiPPO
# chooses $A$ and $B$ so that the state holds the coefficients of the past in a basis
# of polynomials; a layer learns what to read from them. A few minutes on two CPU
# cores.

# %%
import subprocess
import sys

if 'google.colab' in sys.modules:
  # Before there is a release on PyPI: 'git+https://...' of your copy instead.
  pip = [sys.executable, '-m', 'pip', 'install', '-q']
  subprocess.run([*pip, 'jaxformers'], check=True)

# %%
import pathlib

import jax
import jax.numpy as jnp
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
from jaxformers.nn.mixers import S4D
from jaxformers.nn.mixers import Attention
from jaxformers.nn.mixers import Mamba
from jaxformers.ops import ExactLegS
from jaxformers.ops import LegS
from jaxformers.ops import Modes
from jaxformers.ops import Rotary
from jaxformers.ops import diagonal_form
from jaxformers.ops import discretize
from jaxformers.ops import hippo_memory
from jaxformers.ops import mode_kernel
from jaxformers.ops import reconstruct
from jaxformers.optim import AdamW
from jaxformers.optim import WarmupCosine
from jaxformers.train import Experiment
from jaxformers.train import train
from jaxformers.train.figure import smooth
from jaxformers.train.figure import style
from jaxformers.train.metrics import read_metrics

plt.rcParams.update(style())

# %% tags=["parameters"]
samples = 1000
cycles = 5
sizes = (8, 16, 25)
length = 256
width = 64
steps = 250
compared = ('S4D', 'attention')
periods = ((12, 12), (4, 12))  # shortest and longest
folder = 'runs/state_spaces'  # other settings want another one

# %% [markdown]
# ## A memory of everything so far
#
# LegS keeps, at every time t, the best polynomial approximation of all of $u$ on
# $[0, t]$. Its matrices are lower triangular and known in closed form:
# $A_{nk} = -\sqrt{(2n+1)(2k+1)}$ for $n > k$, $-(n+1)$ for $n = k$, and
# $B_n = \sqrt{2n+1}$, with $x' = (A x + B u) / t$. `hippo_memory` takes exact steps.
# (Gu et al., 2020, arXiv 2008.07669; Su Jianlin, 2024, kexue.fm/archives/10114.)
#
# Half a cycle wants $\pi / 2$ polynomials and a few more make the rest converge: a
# signal of 5 cycles comes back from 25 numbers.

# %%
LegS().system(5)

# %%
rng = np.random.default_rng(0)
middle = (np.arange(samples)[:, None] + 0.5) / samples
angle = 2 * np.pi * np.arange(1, cycles + 1) * middle
signal = (
  np.sin(angle + rng.uniform(0, 2 * np.pi, cycles)).sum(1).astype(np.float32)
)
age = samples - np.arange(samples) - 0.5

figure, axes = plt.subplots(figsize=(7.5, 3.4))
axes.plot(signal, color='0.75', linewidth=5, label=f'signal, {samples} samples')
for size in sizes:
  memory = hippo_memory(signal[None, :, None], ExactLegS(size)).last
  rebuilt = reconstruct(LegS(), memory.x_BSD, age, np.full(1, float(samples)))
  error = jnp.sqrt(jnp.mean((rebuilt[0, :, 0] - signal) ** 2))
  axes.plot(rebuilt[0, :, 0], label=f'{size} states: error {error:.1g}')
axes.set_xlabel('sample')
legend = axes.legend(loc='center left', bbox_to_anchor=(1, 0.5))

# %% [markdown]
# ## A layer: what is read from such a memory
#
# For the same system at all times, writing and reading is a convolution with
# $k_\ell = \mathrm{Re}\,c\,\bar A^\ell\,\bar B$. S4D keeps the eigenvalues of
# A alone; S4D-Lin has $-1/2 + i \pi n$. Read alike, these modes are a Fourier series
# that fades and comes back after a time of 2, which is 2 / step tokens: small steps
# remember long, large steps only what is near. (Gu et al., 2022, arXiv 2206.11893.)

# %%
eigenvalues, inputs = diagonal_form('lin', 16)
figure, axes = plt.subplots(figsize=(7.5, 3.2))
for step in (0.1, 0.03, 0.01):
  decay, gain = discretize(eigenvalues, step, 'zoh')
  readout = jnp.ones_like(inputs)
  modes = Modes(decay[None], (gain * inputs)[None], readout[None])
  axes.plot(mode_kernel(modes, length)[0] / step, label=f'step {step}')
axes.set_xlabel('tokens ago')
axes.set_ylabel('weight, all modes read alike')
legend = axes.legend()

# %% [markdown]
# ## Parallel = step by step
#
# In training a whole row is read at once; while sampling, token by token, from a
# state that never grows. Both are one call: a state goes in, a state comes out.

# %%
mixers = {
  'S4D': S4D(state_size=32),
  'Mamba': Mamba(state_size=8),
  'attention': Attention(num_heads=4, position=Rotary()),
}
x = jax.random.normal(jax.random.key(0), (1, length, width))
for name, mixer in mixers.items():
  variables = jax.jit(mixer.init)(jax.random.key(1), x)
  apply = jax.jit(mixer.apply)
  whole, _ = apply(variables, x)
  state = mixer.initial_state(1, length, width, x.dtype)
  numbers = sum(leaf.size for leaf in jax.tree.leaves(state))
  tokens = []
  for i in range(length):
    y, state = apply(variables, x[:, i : i + 1], state)
    tokens.append(y)
  difference = jnp.abs(jnp.concatenate(tokens, 1) - whole).max()
  print(
    f'{name:10} largest difference {difference:.0e}; state: {numbers} numbers'
  )
  assert difference < 1e-3

# %% [markdown]
# ## A fixed distance, and one that varies
#
# Rows repeat a random block of tokens. If the block is always as long, the answer
# is always the same number of tokens ago, and a convolution that is the same for
# all rows finds it. If the length varies from row to row, where to look depends on
# what is read.


# %%
def experiment_with(mixer, shortest, longest):
  return Experiment(
    model=LanguageModel(
      vocab_size=16,
      width=width,
      stack=Stack(Block(mixer, FeedForward(2 * width)), depth=2, scan=False),
      embed=Embed(initializer=Normal(1.0)),
      head=Head(),
    ),
    data=RepeatedBlocks(
      48, vocab_size=16, shortest=shortest, longest=longest, heldout_rows=64
    ),
    optimizer=AdamW(WarmupCosine(4e-3, warmup_steps=40), weight_decay=0.0),
    steps=steps,
    batch_size=16,
    evaluate_every=steps,
    checkpoint_every=steps,
    preview=None,
  )


losses = {}
for shortest, longest in periods:
  for name in compared:
    directory = pathlib.Path(folder) / f'{name}_{shortest}_{longest}'
    experiment = experiment_with(mixers[name], shortest, longest)
    state = train(experiment, directory)
    losses[shortest, longest, name] = [
      line['loss']
      for line in read_metrics(directory / 'metrics.jsonl')
      if line['split'] == 'train'
    ]

# %%
figure, panels = plt.subplots(
  1, len(periods), figsize=(9, 3.6), sharey=True, squeeze=False
)
for axes, (shortest, longest) in zip(panels[0], periods, strict=True):
  for name in compared:
    axes.plot(smooth(losses[shortest, longest, name], 15), label=name)
  axes.axhline(np.log(16), color='0.6', linestyle=':', label='guessing')
  axes.set_xlabel('step')
  axes.set_title(f'periods from {shortest} to {longest}')
panels[0, 0].set_ylabel('nats per token')
legend = panels[0, -1].legend()

# %% [markdown]
# With one period both learn the task within a hundred steps. With periods that vary
# neither is done after 250: S4D has stopped falling, attention is below it and
# still falls.
#
# ## What next
#
# - Train longer, and add `'Mamba'` to `compared`: it chooses its steps by the token.
#   `docs/studies.md` has what that is good for (Selective copying), and delay lines
#   and images read pixel by pixel for HiPPO memories.
# - `S4`, `S5`, `LRU`, `RTF`, `Mamba2` and `HippoMemory` stand in the same slot.
# - `ApproximateLegS(25, 'bilinear')` in the place of `ExactLegS(25)`, with
#   `method='sequential'`, shows what steps cost that are not exact.
# - Build a layer of your own on `linear_recurrence`: `docs/recurrence.md`.
