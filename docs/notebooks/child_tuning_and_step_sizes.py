# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # ChildTuning, and step sizes that learn themselves
#
# Two links for a chain of optax. ChildTuning updates a part of a network, the
# child. Exponentiated gradients adapt a step size per tensor and a gain per entry
# while training goes on. One minute on two CPU cores.

# %%
import subprocess
import sys

if 'google.colab' in sys.modules:
  # Before there is a release on PyPI: 'git+https://...' of your copy instead.
  pip = [sys.executable, '-m', 'pip', 'install', '-q']
  subprocess.run([*pip, 'jaxformers'], check=True)

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jaxformers.optim import adapt_step_size
from jaxformers.optim import child_tuning_d
from jaxformers.optim import child_tuning_f
from jaxformers.optim import fisher
from jaxformers.optim import top_fraction_mask
from jaxformers.train.figure import COLOURS
from jaxformers.train.figure import plot_band
from jaxformers.train.figure import style

plt.rcParams.update(style())

# %% tags=["parameters"]
walk_steps = 4000
walkers = 200
tuning_steps = 300
seeds = 8
quadratic_steps = 1500

# %% [markdown]
# ## A random child
#
# `child_tuning_f(p)` keeps each entry of the gradient with probability p and divides
# it by p: $g \leftarrow m\,g / p$, $m \sim \mathrm{Bernoulli}(p)$. The mean stays.
# Adam, however, divides by the root of the mean square, and that of the masked
# gradient is 1 / p times as large: the mean step shrinks by $\sqrt p$, as if the
# learning rate were smaller. After Adam (*update dropout*) the mask leaves mean
# steps as they are. (Xu et al., 2021, arXiv 2109.05687; Su Jianlin, 2021,
# kexue.fm/archives/8764.)


# %%
@functools.partial(jax.jit, static_argnums=0)
def mean_step(place, p):
  """Returns the mean of Adam's steps on gradients 1 + noise."""
  adam, key = optax.scale_by_adam(), jax.random.key(0)
  if place is None:
    optimizer = adam
  else:
    child = child_tuning_f(p, jax.random.key(1))
    optimizer = optax.chain(
      *((child, adam) if place == 'before' else (adam, child))
    )

  def step(state, i):
    noise = jax.random.normal(jax.random.fold_in(key, i), (walkers,))
    update, state = optimizer.update(1 + noise, state)
    return state, update.mean()

  state = optimizer.init(jnp.zeros(walkers))
  means = jax.lax.scan(step, state, jnp.arange(walk_steps))[1]
  return means[walk_steps // 4 :].mean()


fractions = np.array([0.1, 0.2, 0.3, 0.5, 0.7])
plain = mean_step(None, 1.0)
figure, axes = plt.subplots(figsize=(6, 3.4))
p = np.linspace(0.05, 1, 100)
axes.plot(p, np.sqrt(p), color='0.6', label=r'$\sqrt{p}$')
for place in ('before', 'after'):
  lengths = [mean_step(place, f) / plain for f in fractions]
  axes.plot(fractions, lengths, 'o', label=f'masked {place} Adam')
axes.set_xlabel('p, the fraction that is kept')
axes.set_ylabel('mean step, plain Adam = 1')
axes.set_ylim(0, 1.1)
legend = axes.legend()

# %% [markdown]
# So an experiment with masked gradients belongs beside one whose learning rate is
# smaller by $\sqrt p$: otherwise it compares learning rates.
#
# ## The child that matters
#
# `child_tuning_d` fixes the child once: the entries with the largest Fisher
# information $F = \mathrm{mean}_j (\partial \log p(y_j | x_j) / \partial\theta)^2$.
# Here a classifier of 10 classes that was trained on many examples is tuned on few
# of a task with the classes shifted a little.

# %%
CLASSES, WIDTH, HIDDEN = 10, 20, 64
teacher = jax.random.normal(jax.random.key(0), (WIDTH, CLASSES))
other = 0.8 * teacher + 0.6 * jax.random.normal(
  jax.random.key(1), teacher.shape
)


def examples(key, matrix, count):
  x_key, noise_key = jax.random.split(key)
  x = jax.random.normal(x_key, (count, WIDTH))
  noise = jax.random.gumbel(noise_key, (count, CLASSES))
  return x, jnp.argmax(2 * jnp.tanh(x) @ matrix + noise, axis=1)


def logits(params, x):
  return jax.nn.relu(x @ params['w_in'] + params['b']) @ params['w_out']


def loss(params, batch):
  x, label = batch
  return optax.softmax_cross_entropy_with_integer_labels(
    logits(params, x), label
  ).mean()


def minimise(optimizer, params, batch, measure):
  """Returns the last parameters, and what is measured after each step."""

  def step(carry, _):
    params, state = carry
    gradient = jax.grad(loss)(params, batch)
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), measure(params)

  carry = params, optimizer.init(params)
  (params, _), measured = jax.lax.scan(step, carry, length=tuning_steps)
  return params, measured


@jax.jit
def pretrain():
  in_key, out_key = jax.random.split(jax.random.key(2))
  params = {
    'w_in': jax.random.normal(in_key, (WIDTH, HIDDEN)) * WIDTH**-0.5,
    'b': jnp.zeros(HIDDEN),
    'w_out': jax.random.normal(out_key, (HIDDEN, CLASSES)) * HIDDEN**-0.5,
  }
  many = examples(jax.random.key(3), teacher, 4096)
  return minimise(optax.adam(3e-3), params, many, lambda params: None)[0]


params = pretrain()
test = examples(jax.random.key(4), other, 2048)
print(f'loss on the new task before tuning: {loss(params, test):.3f}')

# %%
learning_rate, p = 1e-3, 0.3


@functools.partial(jax.jit, static_argnums=0)
def tune(name, seed):
  """Tunes on 256 examples of the seed's own, and returns the test losses."""
  few = examples(jax.random.fold_in(jax.random.key(5), seed), other, 256)
  adam = optax.adam(learning_rate)
  if name == 'all':
    optimizer = adam
  elif name == 'all, smaller steps':
    optimizer = optax.adam(learning_rate * p**0.5)
  elif name == 'ChildTuning-F':
    optimizer = optax.chain(child_tuning_f(p, jax.random.key(seed)), adam)
  else:
    mask = top_fraction_mask(fisher(loss, params, [few]), p)
    optimizer = child_tuning_d(mask, adam)
  return minimise(optimizer, params, few, lambda params: loss(params, test))[1]


figure, axes = plt.subplots(figsize=(7, 3.6))
for name in ('all', 'all, smaller steps', 'ChildTuning-F', 'ChildTuning-D'):
  curves = jax.vmap(functools.partial(tune, name))(jnp.arange(seeds))
  plot_band(axes, np.arange(1, tuning_steps + 1), curves, label=name)
  best = curves.min(1)
  print(f'{name:20} best {best.mean():.3f} +- {best.std():.3f}', end='  ')
  print(f'last {curves[:, -1].mean():.3f} +- {curves[:, -1].std():.3f}')
axes.set_xlabel('step of tuning')
axes.set_ylabel('test loss, nats')
legend = axes.legend()

# %% [markdown]
# Tuning everything is fastest, and first to learn the few examples by heart.
# ChildTuning-F does, to the width of a line, what Adam does with the smaller
# learning rate. With the least losses on the way all four are close to each other:
# here ChildTuning is a way to go slowly, and stopping in time another.
#
# ## Step sizes that learn themselves
#
# Let $h$ be the last update, negated, before a scale $s$ multiplied it. The loss
# falls by about $\langle g, h \rangle$ per unit of $s$, so a step after which the
# gradient still points the same way was too short. $s$ is positive, so it is learnt
# by an exponentiated gradient:
# $s \leftarrow s\,e^{\gamma \langle g, h \rangle / (\|g\| \|h\|)}$. Gains per
# entry follow the sign of gradient times mean gradient in the same way. (Amid et
# al., 2022, arXiv 2202.00145; Su Jianlin, 2022, kexue.fm/archives/8968.)
#
# A quadratic with 50 curvatures between 0.02 and 2, noisy gradients, and an optimum
# that jumps halfway; SGD with momentum, with and without.

# %%
wrappers = {
  'SGD': lambda sgd: sgd,
  'learnt scale': lambda sgd: adapt_step_size(sgd, None, 0.01),
  'learnt gains': lambda sgd: adapt_step_size(sgd, 0.01, None),
  'both': lambda sgd: adapt_step_size(sgd, 0.01, 0.01),
}
keys = jax.random.split(jax.random.key(6), 3)
curvature = jnp.exp(
  jax.random.uniform(keys[0], (50,), minval=np.log(0.02), maxval=np.log(2))
)
optima = jax.random.normal(keys[1], (2, 50))
noise = 0.05 * jax.random.normal(keys[2], (quadratic_steps, 50))


@functools.partial(jax.jit, static_argnums=0)
def descend(wrap, rate):
  """Returns the losses on the way, and the states of the optimiser."""
  optimizer = wrap(optax.sgd(rate, momentum=0.9))

  def step(carry, inputs):
    x, state = carry
    t, noise = inputs
    away = x - optima[(t >= quadratic_steps // 2).astype(int)]
    updates, state = optimizer.update(curvature * away + noise, state, x)
    x = optax.apply_updates(x, updates)
    return (x, state), (jnp.sum(curvature * away**2) / 2, state)

  x = jnp.zeros(50)
  inputs = jnp.arange(quadratic_steps), noise
  return jax.lax.scan(step, (x, optimizer.init(x)), inputs)[1]


rates = np.array([1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
for name, wrap in wrappers.items():
  style_of = {'color': COLOURS['baseline']} if name == 'SGD' else {}
  means = [descend(wrap, rate)[0].mean() for rate in rates]
  left.plot(rates, means, marker='o', label=name, **style_of)
  right.plot(descend(wrap, rates[2])[0], **style_of)
left.set_xscale('log')
left.set_yscale('log')
right.set_yscale('log')
left.set_xlabel('learning rate')
left.set_ylabel('mean loss')
right.set_xlabel(f'step, at the learning rate {rates[2]:g}')
right.set_ylabel('loss')
legend = left.legend()

# %% [markdown]
# Where the learning rate is far too small, scales and gains make up for most of it;
# where it is right, they change little. The state shows what was learnt: at a rate
# that is too small the scale rises to its bound of 10, at one that is too large it
# falls.

# %%
figure, axes = plt.subplots(figsize=(6, 3.4))
for rate in (1e-3, 3e-2, 3e-1):
  _, state = descend(wrappers['learnt scale'], rate)
  axes.plot(np.exp(state.log_scale), label=f'learning rate {rate:g}')
axes.set_yscale('log')
axes.set_xlabel('step')
axes.set_ylabel('learnt scale')
legend = axes.legend()

# %% [markdown]
# ## What next
#
# - In an `Experiment` the same are `ChildTuningF(inner=AdamW(...))`,
#   `ChildTuningD('mask.npz')` and `AdaptStepSize(AdamW(...))`.
# - Around Adam, gains belong behind it: `gain_placement='post'`.
# - Change `p`, the number of examples, and how far the new task is from the old.
# - `exponentiated_gradient` updates parameters themselves by products, which suits
#   positive ones and sparse ones.
