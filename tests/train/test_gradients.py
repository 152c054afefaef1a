"""Penalised and adversarial gradients in the trainer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
import numpy as np
import optax
import pytest

from jaxformers.data import batch_at
from jaxformers.optim import FGM
from jaxformers.optim import PGD
from jaxformers.optim import Constant
from jaxformers.optim import Flooding
from jaxformers.optim import FromOptax
from jaxformers.optim import GradientPenalty
from jaxformers.train import MeshShape
from jaxformers.train import train
from jaxformers.train.metrics import read_metrics
from jaxformers.train.program import build
from jaxformers.train.step import init_state
from jaxformers.train.step import train_step_of

RATE = 0.1


@pytest.fixture(scope='module')
def start(tiny):
  experiment = tiny(optimizer=FromOptax('sgd', Constant(RATE), (), None))
  batch = batch_at(experiment.data.prepare().train, 0, batch_size=8, seed=0)
  return experiment, batch, jax.jit(lambda: init_state(experiment, batch))()


@functools.cache
def compiled(experiment):
  return jax.jit(train_step_of(experiment))


def gradient_of(start, gradient):
  """Returns the metrics and the gradient that a step of descent shows."""
  experiment, batch, state = start
  experiment = dataclasses.replace(experiment, gradient=gradient)
  new, metrics = compiled(experiment)(state, batch)
  move = jax.tree.map(lambda a, b: (a - b) / RATE, state.params, new.params)
  return metrics, move


def test_a_penalty_adds_the_product_with_the_hessian(start):
  """Which is the difference of gradients along the gradient."""
  plain, g = gradient_of(start, None)
  metrics, penalised = gradient_of(start, GradientPenalty(0.5))
  np.testing.assert_allclose(metrics['loss'], plain['loss'], rtol=1e-6)
  np.testing.assert_allclose(
    metrics['minimized'] - plain['loss'],
    0.25 * plain['gradient_norm'] ** 2,
    rtol=1e-3,
  )
  experiment, batch, state = start
  moved = jax.tree.map(lambda p, d: p + 1e-4 * d, state.params, g)
  _, there = gradient_of(
    (experiment, batch, state._replace(params=moved)), None
  )
  expected = jax.tree.map(lambda a, b: a + 5000 * (b - a), g, there)
  error = optax.tree.norm(optax.tree.sub(penalised, expected))
  assert error < 0.1 * optax.tree.norm(optax.tree.sub(expected, g))


def test_an_attacked_embedding_has_a_larger_loss(start):
  metrics, _ = gradient_of(start, FGM(0.01))
  assert metrics['minimized'] > metrics['loss'] + 1e-3


def test_a_flooded_run_trains_to_its_end(tiny, tmp_path):
  experiment = tiny(steps=2, gradient=Flooding(100.0), preview=None)
  train(experiment, tmp_path / 'run')
  first, second = [
    x
    for x in read_metrics(tmp_path / 'run' / 'metrics.jsonl')
    if x['split'] == 'train'
  ]
  assert first['minimized'] == pytest.approx(200 - first['loss'])
  assert second['loss'] > first['loss']


@pytest.mark.parametrize(
  'gradient', [GradientPenalty(0.1), FGM(), PGD(), Flooding(0.1)]
)
def test_gradients_that_do_not_add_up_are_refused_in_parts(tiny, gradient):
  with pytest.raises(ValueError, match='set accumulate=1'):
    tiny(accumulate=2, gradient=gradient)


@pytest.mark.parametrize(
  'gradient',
  [
    GradientPenalty(0.3),
    GradientPenalty(0.3, squared=False, parameters='w_DF'),
    GradientPenalty(0.3, mode='rev_rev'),
    GradientPenalty(0.3, mode='finite_diff', squared=False),
    FGM(0.3, parameters='w_'),
    PGD(0.3, parameters='w_'),
    Flooding(100.0),
  ],
)
def test_split_parameters_are_reduced_and_never_gathered(gradient):
  """By a loss that needs no parameter on another device itself."""
  mesh = jax.make_mesh((2, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
  specs = {'w_DF': jax.P('a', 'b'), 'w_FD': jax.P(None, 'b'), 'b_F': jax.P('b')}
  shapes = {'w_DF': (4, 6), 'w_FD': (6, 4), 'b_F': (6,)}
  keys = jax.random.split(jax.random.key(0), len(specs))
  params = {
    name: jax.random.normal(key, shapes[name])
    for key, name in zip(keys, specs, strict=True)
  }

  def loss(params, scale):
    return sum(jnp.cosh(scale * w).sum() for w in params.values()), ()

  run = jax.jit(gradient.value_and_grad(loss))
  alone = run(params, 0.7)
  placed = {
    name: jax.device_put(w, NamedSharding(mesh, specs[name]))
    for name, w in params.items()
  }
  compiled = run.lower(placed, 0.7).compile()
  for word in ('all-gather', 'all-to-all', 'permute'):
    assert word not in compiled.as_text()
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
    alone,
    compiled(placed, 0.7),
  )


def test_a_split_model_has_the_penalised_gradient_of_a_whole_one(start):
  experiment, batch, _ = start
  penalty = GradientPenalty(0.5)
  whole, _ = gradient_of(start, penalty)
  shape = MeshShape(data=2, fsdp=2, tensor=2)
  split = dataclasses.replace(experiment, gradient=penalty, mesh=shape)
  program = build(split, split.data.prepare())
  _, metrics = program.train_step(program.init(), *program.place([batch]))
  for name in ('loss', 'minimized', 'gradient_norm'):
    np.testing.assert_allclose(metrics[name], whole[name], rtol=1e-4)
