"""Runs whose tasks are combined: accumulation, heads, absence, meshes."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformers.data import batch_at
from jaxformers.losses import cross_entropy
from jaxformers.optim import Constant
from jaxformers.optim import FromOptax
from jaxformers.optim import GradientPenalty
from jaxformers.optim.tasks import DBMTL
from jaxformers.optim.tasks import FAMO
from jaxformers.optim.tasks import MGDA
from jaxformers.optim.tasks import AdamMetric
from jaxformers.optim.tasks import Equal
from jaxformers.optim.tasks import InverseLoss
from jaxformers.optim.tasks import NashMTL
from jaxformers.optim.tasks import Normalized
from jaxformers.optim.tasks import Primary
from jaxformers.optim.tasks import TaskCombiner
from jaxformers.optim.tasks import Uncertainty
from jaxformers.train import Losses
from jaxformers.train import MeshShape
from jaxformers.train import NextToken
from jaxformers.train import train
from jaxformers.train.checkpoint import Checkpoints
from jaxformers.train.evaluation import evaluate
from jaxformers.train.metrics import read_metrics
from jaxformers.train.program import build
from jaxformers.train.record import from_record
from jaxformers.train.record import known_classes
from jaxformers.train.record import to_record
from jaxformers.train.step import init_state
from jaxformers.train.step import train_step_of


class Bigram(nn.Module):
  """Scores the next byte by the last one: all that these tests need."""

  width: int = 8
  vocab_size: int = 256

  @nn.compact
  def __call__(self, tokens_BL):
    normal = nn.initializers.normal(0.5)
    table_VD = self.param('table_VD', normal, (self.vocab_size, self.width))
    w_DV = self.param('w_DV', normal, (self.width, self.vocab_size))
    return table_VD[tokens_BL] @ w_DV


@dataclasses.dataclass(frozen=True)
class EvenOdd(NextToken):
  """Predicts even and odd bytes, two tasks with targets of their own.

  Attributes:
    spoil: multiplies the loss of odd bytes.
  """

  spoil: float = 1.0

  def loss(self, model, variables, batch, key, deterministic):
    del key, deterministic
    logits_BLV = model.apply(variables, batch['tokens'])
    tasks, weights = {}, {}
    for name, rest in (('even', 0), ('odd', 1)):
      targets_BL = batch['targets']
      own_BL = jnp.where(targets_BL % 2 == rest, targets_BL, -1)
      losses = cross_entropy(logits_BLV, own_BL)
      weights[name] = losses.is_target_BL.sum(dtype=jnp.float32)
      total = losses.cross_entropy_BL.sum()
      tasks[name] = total / jnp.maximum(weights[name], 1)
    tasks['odd'] *= self.spoil
    weight = weights['even'] + weights['odd']
    return Losses(tasks, {}, {}, weight, weights)


def first_batch(experiment):
  rows = experiment.data.prepare().train
  return batch_at(rows, 0, batch_size=experiment.batch_size, seed=0)


def stepped(experiment, batch, state=None):
  if state is None:
    state = jax.jit(lambda: init_state(experiment, batch))()
  return jax.jit(train_step_of(experiment))(state, batch)


def close(a, b, tolerance=2e-5):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, tolerance, tolerance), a, b
  )


@pytest.fixture
def small(tiny):
  """Returns a maker of experiments with two tasks."""
  return functools.partial(
    tiny, model=Bigram(), objective=EvenOdd(), preview=None
  )


def two_tasks(small, weighting, mode='stacked', **changes):
  return small(tasks=TaskCombiner(weighting, mode), **changes)


def test_the_mean_of_two_tasks_is_half_their_sum(small):
  plain = small()
  mean = two_tasks(small, Equal(), 'gram_then_backward')
  batch = first_batch(plain)
  results = [stepped(e, batch)[1] for e in (plain, mean)]
  norms = [r['gradient_norm'] for r in results]
  np.testing.assert_allclose(norms[0], 2 * norms[1], rtol=1e-5)
  assert results[1]['weight/even'] == results[1]['weight/odd'] == 0.5
  np.testing.assert_allclose(results[0]['loss'], results[1]['loss'], rtol=1e-6)


def test_the_metrics_report_the_conflict(small):
  experiment = two_tasks(small, MGDA(), 'gram_then_backward')
  batch = first_batch(experiment)
  state = jax.jit(lambda: init_state(experiment, batch))()

  def task(params, name):
    losses = experiment.objective.loss(
      experiment.model, {'params': params}, batch, jax.random.key(0), False
    )
    return losses.tasks[name]

  grad = jax.jit(jax.grad(task), static_argnums=1)
  flat = [
    np.concatenate(
      [np.ravel(x) for x in jax.tree.leaves(grad(state.params, n))]
    )
    for n in ('even', 'odd')
  ]
  _, metrics = stepped(experiment, batch)
  norms = [np.linalg.norm(g) for g in flat]
  cosine = flat[0] @ flat[1] / norms[0] / norms[1]
  np.testing.assert_allclose(metrics['cosine/even/odd'], cosine, rtol=1e-3)
  np.testing.assert_allclose(metrics['gradient_norm/odd'], norms[1], rtol=1e-4)
  w = [metrics['weight/even'], metrics['weight/odd']]
  np.testing.assert_allclose(sum(w), 1, rtol=1e-5)
  u = w[0] * flat[0] + w[1] * flat[1]
  np.testing.assert_allclose(
    metrics['gradient_norm'], np.linalg.norm(u), rtol=1e-4
  )


@pytest.mark.parametrize(
  ('weighting', 'mode'), [(NashMTL(), 'stacked'), (FAMO(), 'sequential')]
)
def test_parts_of_a_batch_give_the_update_of_the_whole(small, weighting, mode):
  experiment = two_tasks(small, weighting, mode)
  batch = first_batch(experiment)
  batch['targets'][:3] = np.where(
    batch['targets'][:3] % 2 == 0, batch['targets'][:3], -1
  )
  whole = stepped(experiment, batch)
  parts = stepped(dataclasses.replace(experiment, accumulate=4), batch)
  close(parts[0], whole[0])
  close(parts[1], whole[1])


def test_what_is_not_exact_in_parts_is_refused(small):
  with pytest.raises(ValueError, match="set tasks.mode='stacked'"):
    two_tasks(small, MGDA(), 'gram_then_backward', accumulate=2)
  plain = small(accumulate=2)
  with pytest.raises(ValueError, match='numbers of targets of their own'):
    stepped(plain, first_batch(plain))


def test_an_absent_task_has_no_part(small):
  experiment = two_tasks(small, Normalized(MGDA()), 'gram_then_backward')
  batch = first_batch(experiment)
  batch['targets'] = np.where(batch['targets'] % 2 == 0, batch['targets'], -1)
  _, metrics = stepped(experiment, batch)
  assert metrics['weight/odd'] == metrics['odd'] == 0
  np.testing.assert_allclose(metrics['gradient_norm'], 1, rtol=1e-4)


def test_a_loss_that_is_not_finite_is_named_and_skipped(small):
  experiment = two_tasks(small, Uncertainty(), non_finite='skip')
  experiment = dataclasses.replace(
    experiment, objective=EvenOdd(spoil=float('inf'))
  )
  batch = first_batch(experiment)
  before = jax.jit(lambda: init_state(experiment, batch))()
  after, metrics = stepped(experiment, batch, before)
  assert not np.isfinite(metrics['odd'])
  assert np.isfinite(metrics['even'])
  assert metrics['skipped'] == 1
  close(after.tasks, before.tasks)
  close(after.params, before.params)


def test_order_heads_and_metric_of_a_combiner(small):
  combiner = TaskCombiner(
    Primary(), order=('odd', 'even'), own=('table',), metric=AdamMetric()
  )
  experiment = small(tasks=combiner)
  batch = first_batch(experiment)
  state, metrics = stepped(experiment, batch)
  assert metrics['weight/odd'] == 1  # The first is the primary task.
  _, again = stepped(experiment, batch, state)
  assert metrics['cosine/odd/even'] != again['cosine/odd/even']
  bad = dataclasses.replace(combiner, order=('odd', 'prime'))
  with pytest.raises(
    ValueError, match=r"objective has the tasks \['even', 'odd"
  ):
    init_state(dataclasses.replace(experiment, tasks=bad), batch)
  bad = dataclasses.replace(combiner, own=('head_9',))
  with pytest.raises(ValueError, match="no parameter matches 'head_9'"):
    init_state(dataclasses.replace(experiment, tasks=bad), batch)


def losses_of(experiment, batch):
  """Returns the jitted functions from parameters to each loss."""

  def task(name, params):
    losses = experiment.objective.loss(
      experiment.model, {'params': params}, batch, jax.random.key(0), False
    )
    return losses.tasks[name]

  return [functools.partial(task, name) for name in ('even', 'odd')]


@pytest.mark.parametrize('mode', ['stacked', 'sequential'])
def test_each_task_can_be_penalised(small, mode):
  """Against backward passes through backward passes, and inverse losses."""
  experiment = two_tasks(
    small,
    InverseLoss(),
    mode,
    gradient=GradientPenalty(0.5),
    optimizer=FromOptax('sgd', Constant(1.0), (), None),
  )
  batch = first_batch(experiment)
  before = jax.jit(lambda: init_state(experiment, batch))()
  after, metrics = stepped(experiment, batch, before)

  def penalised(loss, params):
    value, gradient = jax.value_and_grad(loss)(params)
    square = sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient))
    return value + 0.25 * square

  expected = jax.tree.map(jnp.zeros_like, before.params)
  for name, loss in zip(
    ('even', 'odd'), losses_of(experiment, batch), strict=True
  ):
    own = jax.jit(jax.value_and_grad(functools.partial(penalised, loss)))
    value, gradient = own(before.params)
    np.testing.assert_allclose(metrics[f'minimized/{name}'], value, rtol=1e-4)
    weighted = optax.tree.scale(1 / metrics[name], gradient)
    expected = jax.tree.map(jnp.add, expected, weighted)
  moved = jax.tree.map(jnp.subtract, before.params, after.params)
  close(moved, expected, 1e-4)
  with pytest.raises(ValueError, match="set tasks.mode='stacked' or 'sequ"):
    two_tasks(small, MGDA(), 'gram_then_backward', gradient=GradientPenalty(1))


class Encoder(nn.Module):
  """The part of a model whose output tasks share."""

  width: int = 8

  @nn.compact
  def __call__(self, tokens_BL):
    normal = nn.initializers.normal(0.5)
    table_VD = self.param('table_VD', normal, (256, self.width))
    w_DE = self.param('w_DE', normal, (self.width, self.width))
    return jnp.tanh(table_VD[tokens_BL] @ w_DE), None


class Encoded(nn.Module):
  """Scores by a linear head after so many calls of an encoder."""

  calls: int = 1
  encoder_class: type = Encoder

  @nn.compact
  def __call__(self, tokens_BL):
    encoder = self.encoder_class(name='encoder')
    for _ in range(self.calls):
      h_BLE, _ = encoder(tokens_BL)
    normal = nn.initializers.normal(0.5)
    return h_BLE @ self.param('w_EV', normal, (8, 256))


def at_encoder(path='encoder', **changes):
  return TaskCombiner(MGDA(), own=('w_EV',), representation=path, **changes)


def test_tasks_are_weighed_at_the_representation_they_share(small):
  experiment = small(
    model=Encoded(),
    tasks=at_encoder(),
    optimizer=FromOptax('sgd', Constant(1.0), (), None),
  )
  batch = first_batch(experiment)
  before = jax.jit(lambda: init_state(experiment, batch))()
  after, metrics = stepped(experiment, batch, before)
  moved = jax.tree.map(jnp.subtract, before.params, after.params)

  def head(h_BLE, w_EV):
    tasks = []
    for rest in (0, 1):
      is_own_BL = batch['targets'] % 2 == rest
      log_p_BLV = jax.nn.log_softmax(h_BLE @ w_EV)
      at = jnp.take_along_axis(log_p_BLV, batch['targets'][..., None], -1)
      tasks.append(-jnp.sum(at[..., 0] * is_own_BL) / is_own_BL.sum())
    return jnp.stack(tasks)

  params = before.params
  encode = lambda p: Encoder().apply({'params': p}, batch['tokens'])[0]
  h_BLE, pull = jax.vjp(encode, params['encoder'])
  arguments = h_BLE, params['w_EV']
  by_h, by_w = jax.jit(jax.jacrev(head, argnums=(0, 1)))(*arguments)
  g = np.asarray(by_h, np.float64).reshape(2, -1)
  # The shortest vector on the line between two.
  share = np.clip((g[1] - g[0]) @ g[1] / np.sum((g[1] - g[0]) ** 2), 0, 1)
  np.testing.assert_allclose(metrics['weight/even'], share, rtol=1e-3)
  (expected,) = pull(share * by_h[0] + (1 - share) * by_h[1])
  close(moved['encoder'], expected, 1e-4)
  close(moved['w_EV'], by_w.sum(axis=0), 1e-4)
  cosine = g[0] @ g[1] / np.linalg.norm(g[0]) / np.linalg.norm(g[1])
  np.testing.assert_allclose(metrics['cosine/even/odd'], cosine, atol=1e-5)


def test_a_representation_must_be_there_once(small):
  experiment = small(model=Encoded(), tasks=at_encoder('decoder'))
  batch = first_batch(experiment)
  with pytest.raises(ValueError, match="no submodule 'decoder'; it has enc"):
    stepped(experiment, batch)
  twice = small(model=Encoded(calls=2), tasks=at_encoder())
  with pytest.raises(ValueError, match="calls 'encoder' 2 times"):
    stepped(twice, batch)
  within = Encoded(encoder_class=nn.remat(Encoder))
  with pytest.raises(ValueError, match="'encoder' stands within layers"):
    stepped(small(model=within, tasks=at_encoder()), batch)
  with pytest.raises(ValueError, match="mode='gram_then_backward' and metric"):
    at_encoder(mode='stacked')
  with pytest.raises(ValueError, match='Equal does not weigh by inner prod'):
    TaskCombiner(Equal(), representation='encoder')


def test_famo_sees_what_the_step_did(small):
  experiment = two_tasks(small, FAMO(), 'gram_then_backward')
  batch = first_batch(experiment)
  before = jax.jit(lambda: init_state(experiment, batch))()
  after, metrics = stepped(experiment, batch, before)
  losses = [float(metrics[name]) for name in ('even', 'odd')]
  w = np.reciprocal(losses) / np.reciprocal(losses).sum()
  np.testing.assert_allclose(metrics['weight/even'], w[0], rtol=1e-5)
  falls = [
    np.log(loss(before.params) / loss(after.params))
    for loss in losses_of(experiment, batch)
  ]
  # The first step of Adam has the sign of the slope, and the learning rate.
  logits = 0.025 * np.sign([falls[1] - falls[0], falls[0] - falls[1]])
  np.testing.assert_allclose(after.tasks.learned.value_T, logits, rtol=1e-3)


def test_combiners_are_recorded(small):
  experiment = two_tasks(small, Normalized(NashMTL(max_norm=None), 'loss'))
  record = to_record(experiment.tasks)
  assert from_record(record, known_classes()) == experiment.tasks


def test_every_mesh_combines_alike_and_the_state_goes_on(small, tmp_path):
  results = []
  for shape in (MeshShape(data=8), MeshShape(data=2, fsdp=2, tensor=2)):
    experiment = two_tasks(small, DBMTL(), mesh=shape)
    program = build(experiment, experiment.data.prepare())
    state = program.init()
    for _ in range(2):
      placed = program.place([first_batch(experiment)])
      state, metrics = program.train_step(state, *placed)
    results.append((metrics, jax.device_get(state)))
  close(*results, 1e-4)
  places = {
    leaf.sharding.spec
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.tasks.average)
    if 'w_DV' in jax.tree_util.keystr(path)
  }
  assert places == {jax.P(None, 'fsdp', 'tensor')}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(2, state, progress={}, record={})
    restored = checkpoints.restore('latest', program.abstract_state).state
  jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_tasks_are_evaluated_over_targets_of_their_own():
  def losses(even, odd, weights):
    values = [jnp.float32(x) for x in (even, odd, *weights)]
    tasks = {'even': values[0], 'odd': values[1]}
    own = {'even': values[2], 'odd': values[3]}
    return Losses(tasks, {}, {}, values[2] + values[3], own)

  batches = [losses(1, 3, (4, 1)), losses(2, 5, (0, 3))]
  found = evaluate(lambda _, batch: batch, None, batches)
  assert (found['even'], found['odd'], found['targets']) == (1, 4.5, 8)
  assert found['loss'] == 5.5


def test_a_run_with_tasks_goes_through_the_loop(small, tmp_path):
  experiment = two_tasks(small, Uncertainty(), steps=2)
  train(experiment, tmp_path / 'run')
  lines = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
  assert {'even', 'odd', 'weight/even', 'cosine/even/odd'} <= set(lines[0])
  assert lines[-1]['split'] == 'heldout'
