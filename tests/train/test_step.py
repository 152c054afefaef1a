"""Updates: accumulation, skipping, sharding, multi-task losses, statistics."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.data import batch_at
from jaxformers.models import LanguageModel
from jaxformers.nn import Block
from jaxformers.nn import FeedForward
from jaxformers.nn import Stack
from jaxformers.nn.mixers import Attention
from jaxformers.train import MeshShape
from jaxformers.train import NextToken
from jaxformers.train.program import build
from jaxformers.train.step import init_state
from jaxformers.train.step import train_step_of


def close(a, b, tolerance=2e-5):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      x, y, rtol=tolerance, atol=tolerance
    ),
    a,
    b,
  )


def fresh(experiment, batch):
  """Compiled: drawing parameters one by one would compile each draw."""
  return jax.jit(lambda: init_state(experiment, batch))()


def first_batch(experiment, rows):
  return batch_at(rows, 0, batch_size=experiment.batch_size, seed=0)


def uneven(batch):
  """Removes targets so that parts of the batch differ in their number."""
  targets = batch['targets'].copy()
  targets[:5, 3:] = -1
  targets[6] = -1
  return {**batch, 'targets': targets}


def test_accumulated_parts_update_like_the_whole_batch(tiny):
  experiment = tiny()
  batch = uneven(first_batch(experiment, experiment.data.prepare().train))
  results = []
  for parts in (1, 2, 8):
    own = dataclasses.replace(experiment, accumulate=parts)
    state = fresh(own, batch)
    results.append(jax.jit(train_step_of(own))(state, batch))
  for state, metrics in results[1:]:
    close(state.params, results[0][0].params)
    close(metrics, results[0][1])


def test_metrics_say_what_happened(tiny):
  experiment = tiny()
  batch = uneven(first_batch(experiment, experiment.data.prepare().train))
  state = fresh(experiment, batch)
  new, metrics = jax.jit(train_step_of(experiment))(state, batch)
  assert metrics['targets'] == (batch['targets'] >= 0).sum()
  np.testing.assert_allclose(metrics['learning_rate'], 1e-2 / 3, rtol=1e-6)
  logits, _ = experiment.model.apply(state.variables, batch['tokens'])
  nats = -jax.nn.log_softmax(logits)
  b, t = np.nonzero(batch['targets'] >= 0)
  expected = np.asarray(nats)[b, t, batch['targets'][b, t]].mean()
  np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-5)
  assert int(new.step) == 1
  changed = jax.tree.map(lambda a, b: (a != b).any(), new.params, state.params)
  assert all(jax.tree.leaves(changed))


def test_every_mesh_takes_the_same_steps(tiny):
  found = []
  for mesh in (
    MeshShape(data=8),
    MeshShape(fsdp=8),
    MeshShape(data=4, tensor=2),
    MeshShape(data=1, sequence=8),
    MeshShape(data=1, fsdp=2, tensor=2, sequence=2),
  ):
    experiment = tiny(mesh=mesh)
    program = build(experiment, experiment.data.prepare())
    state = program.init()
    for step in range(3):
      batch = batch_at(
        program.prepared.train, step, batch_size=8, seed=experiment.seed
      )
      state, metrics = program.train_step(state, *program.place([batch]))
    found.append((metrics, jax.device_get(state.params)))
    close(found[0], found[-1], 1e-4)


def test_parameters_and_moments_lie_where_their_letters_say(tiny):
  experiment = tiny(mesh=MeshShape(data=2, fsdp=2, tensor=2))
  program = build(experiment, experiment.data.prepare())
  state = program.init()
  places = {
    jax.tree_util.keystr(path): leaf.sharding.spec
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }
  named = {k: v for k, v in places.items() if "'w_DF'" in k}
  assert len(named) == 3  # The parameter and both of Adam's moments.
  assert set(named.values()) == {jax.P(None, 'fsdp', 'tensor')}


def test_sizes_that_do_not_divide_are_refused(tiny, tiny_model):
  experiment = tiny(model=tiny_model(width=12), mesh=MeshShape(data=1, fsdp=8))
  with pytest.raises(
    ValueError, match='axis D of size 12 does not divide among'
  ):
    build(experiment, experiment.data.prepare())
  experiment = tiny(batch_size=12)
  with pytest.raises(ValueError, match='12 does not divide into 8 parts'):
    build(experiment, experiment.data.prepare())
  with pytest.raises(ValueError, match='does not fit 8 devices'):
    MeshShape(data=3).build()


def test_too_small_a_vocabulary_is_refused(tiny, tiny_model):
  experiment = tiny(model=tiny_model(vocab_size=100))
  with pytest.raises(ValueError, match=r'set model.vocab_size=256 or more'):
    build(experiment, experiment.data.prepare())


def test_an_update_that_is_not_finite_is_skipped_if_asked(tiny):
  experiment = tiny(non_finite='skip')
  batch = first_batch(experiment, experiment.data.prepare().train)
  state = fresh(experiment, batch)
  broken = state._replace(
    params={**state.params, 'norm': {'scale_D': jnp.full(8, jnp.nan)}}
  )
  step = jax.jit(train_step_of(experiment))
  new, metrics = step(broken, batch)
  assert metrics['skipped'] == 1
  assert int(new.step) == 1
  jax.tree.map(
    np.testing.assert_array_equal,
    (new.params, new.optimizer_state),
    (broken.params, broken.optimizer_state),
  )
  assert step(state, batch)[1]['skipped'] == 0


class Noisy(nn.Module):
  """Adds a loss of its own and counts its calls."""

  @nn.compact
  def __call__(self, x_BLD):
    count = self.variable('statistics', 'count', lambda: jnp.zeros([]))
    if not self.is_initializing():
      count.value += 1
    self.sow('losses', 'size', jnp.mean(x_BLD**2))
    return x_BLD


def test_side_losses_are_tasks_and_statistics_are_kept(tiny):
  block = Block(Attention(num_heads=2), Noisy())
  experiment = tiny(model=LanguageModel(256, 8, Stack(block, 2)))
  batch = first_batch(experiment, experiment.data.prepare().train)
  state = fresh(experiment, batch)
  for parts, calls in ((1, 1), (2, 3)):
    own = dataclasses.replace(experiment, accumulate=parts)
    state, metrics = jax.jit(train_step_of(own))(state, batch)
    assert metrics['size'] > 0
    np.testing.assert_allclose(
      metrics['loss'], metrics['cross_entropy'] + metrics['size'], rtol=1e-6
    )
    counts = jax.tree.leaves(state.statistics)
    np.testing.assert_array_equal(counts[0], [calls, calls])


def test_z_loss_is_a_task_of_its_own(tiny):
  experiment = tiny(objective=NextToken(z_loss=0.5))
  batch = first_batch(experiment, experiment.data.prepare().train)
  state = fresh(experiment, batch)
  losses = experiment.objective.loss(
    experiment.model, state.variables, batch, jax.random.key(0), True
  )
  logits, _ = experiment.model.apply(state.variables, batch['tokens'])
  expected = 0.5 * jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)
  np.testing.assert_allclose(losses.tasks['z_loss'], expected, rtol=1e-5)
  np.testing.assert_allclose(
    losses.total, losses.tasks['cross_entropy'] + expected, rtol=1e-6
  )


def test_packed_segments_change_what_tokens_see(tiny):
  experiment = tiny()
  batch = first_batch(experiment, experiment.data.prepare().train)
  batch['segments'][:, 8:] = 2
  state = fresh(experiment, batch)

  def loss(packed):
    return NextToken(packed=packed).loss(
      experiment.model, state.variables, batch, jax.random.key(0), True
    )

  assert loss(True).total != loss(False).total


def test_randomness_is_a_function_of_seed_and_step(tiny, tiny_model):
  block = Block(Attention(num_heads=2), FeedForward(hidden=16), dropout=0.5)
  experiment = tiny(model=tiny_model(stack=Stack(block, 2)))
  batch = first_batch(experiment, experiment.data.prepare().train)
  state = fresh(experiment, batch)
  step = jax.jit(train_step_of(experiment))
  losses = [
    float(step(state._replace(step=jnp.int32(i)), batch)[1]['loss'])
    for i in (0, 0, 1)
  ]
  assert losses[0] == losses[1] != losses[2]


@dataclasses.dataclass(frozen=True)
class Doubled:
  """Minimises twice the loss."""

  accumulates: bool = True

  def value_and_grad(self, loss_fn):
    def doubled(*arguments):
      loss, aux = loss_fn(*arguments)
      return 2 * loss, aux

    return jax.value_and_grad(doubled, has_aux=True)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_gradient_function_takes_the_place_of_the_gradient(tiny, accumulate):
  experiment = tiny(accumulate=accumulate)
  batch = uneven(first_batch(experiment, experiment.data.prepare().train))
  state = fresh(experiment, batch)
  doubled = dataclasses.replace(experiment, gradient=Doubled())
  plain = jax.jit(train_step_of(experiment))(state, batch)[1]
  metrics = jax.jit(train_step_of(doubled))(state, batch)[1]
  assert 'minimized' not in plain
  np.testing.assert_allclose(metrics['loss'], plain['loss'], rtol=1e-6)
  np.testing.assert_allclose(metrics['minimized'], 2 * plain['loss'], rtol=1e-6)
  np.testing.assert_allclose(
    metrics['gradient_norm'], 2 * plain['gradient_norm'], rtol=1e-5
  )


def test_a_gradient_that_does_not_add_up_is_refused_in_parts(tiny):
  with pytest.raises(ValueError, match='Doubled of the parts .* accumulate=1'):
    tiny(accumulate=2, gradient=Doubled(accumulates=False))
