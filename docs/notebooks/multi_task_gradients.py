# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Gradients of several tasks
#
# Two losses share parameters, their gradients disagree, and they are measured in
# units of their own. What should a step do? One minute on two CPU cores.

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

from jaxformers.ops import min_norm_weights
from jaxformers.optim.tasks import MGDA
from jaxformers.optim.tasks import CAGrad
from jaxformers.optim.tasks import Equal
from jaxformers.optim.tasks import InverseLoss
from jaxformers.optim.tasks import NashMTL
from jaxformers.optim.tasks import Normalized
from jaxformers.optim.tasks import PCGrad
from jaxformers.optim.tasks import TaskCombiner
from jaxformers.optim.tasks import UPGrad
from jaxformers.optim.tasks import multitask_value_and_grad
from jaxformers.train.figure import PALETTE
from jaxformers.train.figure import style

plt.rcParams.update(style())

# %% tags=["parameters"]
steps = 2000
learning_rate = 0.02
network_steps = 300
hidden = 32

# %% [markdown]
# ## Conflict
#
# Gradients $g_1, g_2$ conflict where $\langle g_1, g_2\rangle < 0$: along their sum
# one loss may rise. MGDA takes the shortest of all mixtures,
# $\min_{w \ge 0,\ w_1 + w_2 = 1} \|w_1 g_1 + w_2 g_2\|$, whose inner product with
# every gradient is at least its own squared norm, so no loss rises. Where it is 0,
# no direction serves both: such points are Pareto-stationary. (Su Jianlin, 2022,
# kexue.fm/archives/8896; Sener and Koltun, 2018, arXiv 1810.04650.)

# %%
angles = jnp.linspace(0, 2 * jnp.pi, 200)
first = jnp.array([1.0, 0.0])
second = jnp.array([-0.6, 1.2])
shares = jnp.linspace(0, 1, 50)[:, None]
mixtures = shares * first + (1 - shares) * second
weights = min_norm_weights(
  jnp.stack([first, second]) @ jnp.stack([first, second]).T
)
shortest = weights[0] * first + weights[1] * second
print('weights', weights, 'inner products', shortest @ first, shortest @ second)

figure, axes = plt.subplots(figsize=(5, 3.6))
axes.plot(*mixtures.T, color='0.6', label='mixtures')
for vector, label, colour in (
  (first, '$g_1$', PALETTE[0]),
  (second, '$g_2$', PALETTE[2]),
  (shortest, 'shortest', PALETTE[1]),
):
  axes.quiver(
    0,
    0,
    *vector,
    angles='xy',
    scale_units='xy',
    scale=1,
    color=colour,
    label=label,
  )
axes.set_xlim(-0.8, 1.2)
axes.set_ylim(-0.1, 1.3)
axes.set_aspect('equal')
axes.set_xlabel('first parameter')
axes.set_ylabel('second parameter')
legend = axes.legend()

# %% [markdown]
# ## Two quadratics
#
# `multitask_value_and_grad` is `jax.value_and_grad` for a vector of losses: the
# second argument says how gradients become one. Descent of the mean raises a loss
# on many of its steps; MGDA never does. Each rule chooses its own point of the
# front; those that go on along it must raise a loss there.

# %%
curvature = jnp.array([[[1.0, 0.0], [0.0, 10.0]], [[10.0, 3.0], [3.0, 1.5]]])
centre = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
weightings = {
  'mean': Equal(),
  'MGDA': MGDA(),
  'PCGrad': PCGrad(),
  'CAGrad': CAGrad(0.5),
  'UPGrad': UPGrad(),
  'Nash-MTL': NashMTL(),
}


def quadratics(x):
  offset = x - centre
  return jnp.einsum('TD,TDE,TE->T', offset, curvature, offset) / 2


@functools.partial(jax.jit, static_argnums=0)
def descend(weighting, start):
  gradient = multitask_value_and_grad(quadratics, weighting)

  def step(carry, _):
    x, state = carry
    value, direction = gradient(x, state=state)
    return (x - learning_rate * direction, value.state), (x, value.losses_T)

  state = jax.tree.map(jnp.zeros_like, gradient(start)[0].state)
  return jax.lax.scan(step, (start, state), length=steps)[1]


figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
for width, (name, weighting), colour in zip(
  np.linspace(5, 1, 6), weightings.items(), PALETTE, strict=True
):
  path, losses = jax.device_get(descend(weighting, jnp.array([3.0, 2.0])))
  rises = int((np.diff(losses, axis=0) > 1e-6).any(1).sum())
  print(f'{name:9} steps that raise a loss {rises:5}, at the end', losses[-1])
  for axes, points in ((left, path), (right, losses)):
    axes.plot(*points.T, color=colour, linewidth=width, label=name)
    axes.plot(*points[-1], 'o', color=colour, markersize=4 + 2 * width)
left.set_xlabel('first parameter')
left.set_ylabel('second parameter')
right.set_xlabel('loss of task 1')
right.set_ylabel('loss of task 2')
right.set_xscale('symlog', linthresh=0.1)
right.set_yscale('symlog', linthresh=0.1)
legend = right.legend(loc='center left', bbox_to_anchor=(1, 0.5))

# %% [markdown]
# ## Units
#
# A network learns two functions at once. The second loss is multiplied by a
# factor, as if it were measured in other units. The sum then serves one task and
# neglects the other. So does MGDA, the other way round: the shortest mixture is
# nearly the shorter gradient. Weights that divide each loss by itself (`InverseLoss`,
# the gradient of $\log L_1 + \log L_2$) or each gradient by its norm, and those of
# Nash-MTL, do not depend on units; what they leave is the noise of runs that round
# differently. (Su Jianlin, 2022, kexue.fm/archives/8870.)

# %%
x = jax.random.uniform(jax.random.key(0), (256, 2), minval=-1)
targets = jnp.stack([jnp.sin(3 * x[:, 0]) * x[:, 1], jnp.cos(4 * x[:, 1])], 1)
shapes = {
  'w1': (2, hidden),
  'b1': (hidden,),
  'w2': (hidden, hidden),
  'w3': (hidden, 2),
}
keys = jax.random.split(jax.random.key(1), len(shapes))
start = {
  name: jax.random.normal(key, shape) * shape[0] ** -0.5
  for key, (name, shape) in zip(keys, shapes.items(), strict=True)
}


def regression(params, factor):
  h = jnp.tanh(x @ params['w1'] + params['b1'])
  y = jnp.tanh(h @ params['w2']) @ params['w3']
  return ((y - targets) ** 2).mean(0) * jnp.stack([1.0, factor])


@functools.partial(jax.jit, static_argnums=0)
def fit(weighting, factor):
  """Returns both losses at the end, in units of 1."""
  gradient = multitask_value_and_grad(regression, weighting)
  optimizer = optax.adam(1e-2)

  def step(carry, _):
    params, opt_state, state = carry
    value, g = gradient(params, factor, state=state)
    updates, opt_state = optimizer.update(g, opt_state)
    return (optax.apply_updates(params, updates), opt_state, value.state), None

  state = jax.tree.map(jnp.zeros_like, gradient(start, factor)[0].state)
  carry = start, optimizer.init(start), state
  (params, _, _), _ = jax.lax.scan(step, carry, length=network_steps)
  return regression(params, 1.0)


factors = np.array([1e-3, 1e-2, 0.1, 1, 10, 100, 1e3], np.float32)
rules = {
  'sum': Equal(),
  'own loss': InverseLoss(),
  'MGDA': MGDA(),
  'MGDA of unit gradients': Normalized(MGDA()),
  'Nash-MTL': NashMTL(),
}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
for name, weighting in rules.items():
  losses = np.array([fit(weighting, factor) for factor in factors])
  for task in (0, 1):
    axes[task].plot(factors, losses[:, task], marker='o', label=name)
for task in (0, 1):
  axes[task].set_xscale('log')
  axes[task].set_yscale('log')
  axes[task].set_xlabel('units of the second loss')
  axes[task].set_ylabel(f'loss of task {task + 1}, in units of 1')
legend = axes[1].legend(loc='center left', bbox_to_anchor=(1, 0.5))

# %% [markdown]
# ## In the trainer
#
# An objective returns losses by name; `Experiment(..., tasks=...)` says how they
# are combined, and the metrics of the run then hold weights, norms and cosines.

# %%
tasks = TaskCombiner(Normalized(MGDA()))
print(tasks)

# %% [markdown]
# ## What next
#
# - Add a third task, or a task that half of the batches do not have (`mask=`).
# - `Primary()` minimises one loss and keeps the others from rising.
# - `FAMO()` needs one backward pass for any number of tasks, and `look_back`.
# - `docs/tasks.md` lists all rules and what they cost.
