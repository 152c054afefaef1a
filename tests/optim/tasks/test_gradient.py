"""Gradients of several losses: modes, heads, masks, metrics, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformers.optim.tasks import DBMTL
from jaxformers.optim.tasks import MGDA
from jaxformers.optim.tasks import AdamMetric
from jaxformers.optim.tasks import CAGrad
from jaxformers.optim.tasks import Equal
from jaxformers.optim.tasks import GradDrop
from jaxformers.optim.tasks import GradNorm
from jaxformers.optim.tasks import InverseLoss
from jaxformers.optim.tasks import NashMTL
from jaxformers.optim.tasks import Primary
from jaxformers.optim.tasks import UnitGradients
from jaxformers.optim.tasks import aggregate_tasks
from jaxformers.optim.tasks import multitask_value_and_grad
from jaxformers.optim.tasks import normalize_task_gradients
from jaxformers.optim.tasks import representation_value_and_grad
from jaxformers.optim.tasks import task_gram

TASKS = 3
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=(TASKS, 8)), jnp.float32)


def make_params():
  rng = np.random.default_rng(2)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  heads = {f'head_{i}': {'w_F': normal(5)} for i in range(TASKS)}
  return {'encoder': {'w_DF': normal(4, 5), 'b_F': normal(5)}, **heads}


PARAMS = make_params()


def encode(encoder, x=X):
  return jnp.tanh(x @ encoder['w_DF'] + encoder['b_F'])


def decode(heads, h_BF):
  predictions = [h_BF @ heads[f'head_{i}']['w_F'] for i in range(TASKS)]
  return jnp.mean((jnp.stack(predictions) - Y) ** 2, axis=1)


def losses(params):
  return decode(params, encode(params['encoder']))


def is_shared(params):
  return jax.tree_util.tree_map_with_path(
    lambda path, _: 'encoder' in jax.tree_util.keystr(path), params
  )


@functools.cache
def jacobian():
  return jax.device_get(jax.jit(jax.jacrev(losses))(PARAMS))


def flat(tree, *leading):
  leaves = jax.tree.leaves(tree)
  return np.concatenate([np.reshape(x, (*leading, -1)) for x in leaves], -1)


def close(a, b, tolerance=1e-5):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, tolerance, tolerance), a, b
  )


@functools.cache
def gradient_of(weighting, mode='gram_then_backward', shared_mask=is_shared):
  return jax.jit(
    multitask_value_and_grad(losses, weighting, mode, shared_mask=shared_mask)
  )


@pytest.mark.parametrize(
  'mode', ['gram_then_backward', 'stacked', 'sequential']
)
def test_shared_parameters_are_weighed_and_heads_are_not(mode):
  value, gradients = gradient_of(NashMTL(), mode)(PARAMS)
  j = jacobian()
  shared = flat(j['encoder'], TASKS)
  np.testing.assert_allclose(value.losses_T, losses(PARAMS), rtol=1e-6)
  np.testing.assert_allclose(
    value.gram_TT, shared @ shared.T, rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(
    flat(gradients['encoder']), value.weights_T @ shared, rtol=1e-4, atol=1e-5
  )
  for i in range(TASKS):
    own = f'head_{i}'
    close(gradients[own]['w_F'], j[own]['w_F'][i])
  assert (shared @ flat(gradients['encoder']) > 0).all()


def test_one_backward_pass_does_for_weights_of_losses():
  gradient = gradient_of(InverseLoss())
  value, gradients = gradient(PARAMS)
  assert value.gram_TT is None
  expected = jax.grad(lambda p: jnp.log(losses(p)).sum())(PARAMS)
  close(gradients, expected)
  report, same = gradient_of(InverseLoss(), 'stacked')(PARAMS)
  close(same, expected)
  assert report.gram_TT.shape == (TASKS, TASKS)
  passes = str(jax.make_jaxpr(gradient)(PARAMS)).count('dot_general')
  plain = jax.make_jaxpr(jax.grad(lambda p: losses(p).sum()))(PARAMS)
  assert passes == str(plain).count('dot_general')


@pytest.mark.parametrize('mode', ['gram_then_backward', 'stacked'])
def test_absent_tasks_have_no_part(mode):
  mask = jnp.array([True, False, True])
  value, gradients = gradient_of(UnitGradients(), mode)(PARAMS, mask=mask)
  assert value.weights_T[1] == 0
  j = flat(jacobian()['encoder'], TASKS)[[0, 2]]
  expected = (j / np.linalg.norm(j, axis=1, keepdims=True)).sum(axis=0)
  np.testing.assert_allclose(flat(gradients['encoder']), expected, 1e-4, 1e-5)
  np.testing.assert_array_equal(gradients['head_1']['w_F'], 0)


def test_states_go_from_call_to_call():
  gradient = gradient_of(GradNorm())
  value, _ = gradient(PARAMS)
  again, _ = gradient(PARAMS, state=value.state)
  np.testing.assert_allclose(value.weights_T, 1, rtol=1e-6)
  assert np.abs(again.weights_T - 1).max() > 1e-3


def test_a_metric_changes_the_products_and_adam_gives_one():
  params = PARAMS
  transform = optax.chain(optax.clip(1.0), optax.adam(1e-2))
  state = transform.init(params)
  plain = AdamMetric().of(state)
  assert all((x == 1).all() for x in jax.tree.leaves(plain))
  value, gradients = gradient_of(MGDA())(params)
  _, state = transform.update(gradients, state, params)
  metric = AdamMetric().of(state)
  own, combined = gradient_of(MGDA())(params, metric=metric)
  j, p = flat(jacobian()['encoder'], TASKS), flat(metric['encoder'])
  np.testing.assert_allclose(own.gram_TT, (j * p) @ j.T, rtol=1e-3)
  assert np.abs(own.weights_T - value.weights_T).max() > 1e-3
  u = flat(combined['encoder'])
  assert (j @ (p * u) >= (u * p) @ u * (1 - 1e-3)).all()
  with pytest.raises(ValueError, match='has 0 second moments nu'):
    AdamMetric().of(optax.sgd(0.1).init(params))


def test_the_gram_matrix_alone():
  _, gram_TT = jax.jit(lambda p: task_gram(losses, p, shared_mask=is_shared))(
    PARAMS
  )
  j = flat(jacobian()['encoder'], TASKS)
  np.testing.assert_allclose(gram_TT, j @ j.T, rtol=1e-4, atol=1e-5)


def test_weights_at_a_shared_representation():
  heads = {k: v for k, v in PARAMS.items() if k != 'encoder'}
  gradient = jax.jit(representation_value_and_grad(encode, decode, MGDA()))
  value, (encoder, own) = gradient((PARAMS['encoder'], heads))
  h_BF = encode(PARAMS['encoder'])
  jh = flat(jax.jacrev(decode, argnums=1)(heads, h_BF), TASKS)
  np.testing.assert_allclose(value.gram_TT, jh @ jh.T, rtol=1e-4, atol=1e-6)
  j = jacobian()
  np.testing.assert_allclose(
    flat(encoder), value.weights_T @ flat(j['encoder'], TASKS), 1e-4, 1e-5
  )
  close(own['head_1']['w_F'], j['head_1']['w_F'][1])
  with pytest.raises(ValueError, match='GradDrop needs gradients of the param'):
    representation_value_and_grad(encode, decode, GradDrop())


def test_what_does_not_fit_is_refused():
  with pytest.raises(TypeError, match="'mgda' cannot combine tasks"):
    multitask_value_and_grad(losses, 'mgda')
  with pytest.raises(ValueError, match="must be one of .* got 'both'"):
    multitask_value_and_grad(losses, MGDA(), 'both')
  with pytest.raises(ValueError, match="DBMTL combines .* set mode='stacked'"):
    multitask_value_and_grad(losses, DBMTL())
  total = lambda p: losses(p).sum()
  with pytest.raises(
    ValueError, match=r'losses have shape \(\), expected \[T\]'
  ):
    multitask_value_and_grad(total, MGDA())(PARAMS)


STACKED = {'w_DF': jnp.asarray(np.random.default_rng(3).normal(size=(3, 2, 4)))}
ZEROS = {'w_DF': jnp.zeros((2, 4))}


def test_a_link_of_a_chain_combines_stacked_updates():
  link = aggregate_tasks(CAGrad(0.4), tasks=3)
  transform = optax.chain(link, optax.sgd(0.1))
  state = transform.init(ZEROS)
  updates, state = jax.jit(transform.update)(STACKED, state, ZEROS)
  g = flat(STACKED, 3)
  expected = -0.1 * state[0].weights_T @ g
  np.testing.assert_allclose(flat(updates), expected, rtol=1e-5)
  assert state[0].is_finite_T.all()


def test_a_link_names_the_task_that_is_not_finite():
  link = aggregate_tasks(MGDA(), tasks=3)
  broken = {'w_DF': STACKED['w_DF'].at[1, 0, 0].set(jnp.nan)}
  update = jax.jit(link.update)
  updates, state = update(broken, link.init(ZEROS))
  np.testing.assert_array_equal(state.is_finite_T, [True, False, True])
  assert np.isnan(updates['w_DF']).all()
  mask = jnp.array([True, False, True])
  updates, state = update(broken, link.init(ZEROS), task_mask=mask)
  assert state.is_finite_T.all()
  assert np.isfinite(updates['w_DF']).all()
  same, _ = update(STACKED, link.init(ZEROS), task_mask=mask)
  np.testing.assert_array_equal(updates['w_DF'], same['w_DF'])


@pytest.mark.parametrize('combination', [DBMTL(), GradDrop()])
def test_a_link_combines_gradients_themselves(combination):
  link = aggregate_tasks(combination, tasks=3)
  update = jax.jit(link.update)
  losses_T = jnp.array([1.0, 2.0, 3.0])
  updates, state = update(STACKED, link.init(ZEROS), task_losses=losses_T)
  assert updates['w_DF'].shape == (2, 4)
  assert (state.weights_T > 0).all()
  updates, again = update(
    {'w_DF': STACKED['w_DF'] * jnp.inf}, state, task_losses=losses_T
  )
  assert np.isnan(updates['w_DF']).all()
  jax.tree.map(
    np.testing.assert_array_equal, again.combination, state.combination
  )


def test_normalised_gradients_are_a_link_too():
  link = normalize_task_gradients()
  updates, _ = jax.jit(link.update)(STACKED, link.init(ZEROS))
  g = flat(STACKED, 3)
  unit = g / np.linalg.norm(g, axis=1, keepdims=True)
  np.testing.assert_allclose(flat(updates), unit.sum(axis=0), rtol=1e-5)
  assert np.linalg.norm(flat(updates)) <= 3


@pytest.mark.parametrize(
  'link', [aggregate_tasks(MGDA(), tasks=4), normalize_task_gradients()]
)
def test_a_missing_axis_of_tasks_is_named(link):
  updates = {'w_DF': STACKED['w_DF'], 'scale': jnp.ones([])}
  with pytest.raises(ValueError, match=r'axis of \d tasks, but updates\['):
    link.update(updates, link.init(ZEROS))


def test_a_link_asks_for_losses_where_it_reads_them():
  link = aggregate_tasks(Equal(), tasks=3)
  with pytest.raises(ValueError, match='Equal reads losses; pass update'):
    link.update(STACKED, link.init(ZEROS))
  with pytest.raises(ValueError, match=r'shape \(2,\), expected \(3,\)'):
    link.update(STACKED, link.init(ZEROS), task_losses=jnp.ones(2))
  with pytest.raises(ValueError, match='no task 5 among 3'):
    aggregate_tasks(Primary(5), tasks=3).init(ZEROS)
