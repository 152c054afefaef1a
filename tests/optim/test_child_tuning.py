"""ChildTuning against published numbers, NumPy and its statistics."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from jaxformers.optim import AdamW
from jaxformers.optim import ChildTuningD
from jaxformers.optim import ChildTuningF
from jaxformers.optim import Constant
from jaxformers.optim import FromOptax
from jaxformers.optim import TransformersAdamW
from jaxformers.optim import child_tuning_d
from jaxformers.optim import child_tuning_f
from jaxformers.optim import fisher
from jaxformers.optim import load_mask
from jaxformers.optim import save_mask
from jaxformers.optim import top_fraction_mask
from jaxformers.optim import transformers_adamw

KEY = jax.random.key(3)


def stepped(transform, params, gradients):
  """Returns the parameters after each gradient."""
  update = jax.jit(transform.update)
  state, points = transform.init(params), []
  for gradient in gradients:
    updates, state = update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    points.append(params)
  return points


@pytest.mark.parametrize(
  ('adamw', 'first', 'second'),
  [
    (transformers_adamw, (0.89910158, 0.999), (0.83126472, 0.92366291)),
    (optax.adamw, (0.89900005, 0.999), (0.83109527, 0.92358737)),
  ],
)
def test_two_steps_give_the_numbers_of_the_official_code(adamw, first, second):
  # Masks (1, 0) and (0, 1), p = 0.5: the first entry moves while it is masked.
  with jax.enable_x64(True):
    optimizer = adamw(0.1, eps=1e-6, weight_decay=0.01)
    masked = [jnp.array([2.0, 0.0]), jnp.array([0.0, 2.0])]
    points = stepped(optimizer, jnp.ones(2), masked)
    np.testing.assert_allclose(points, [first, second], atol=6e-9)


def test_without_bias_correction_the_first_step_is_ten_and_more_times_as_long():
  # (1 - b1) / sqrt(1 - b2) = 0.1 / sqrt(0.001).
  optimizer = transformers_adamw(0.1, eps=0.0, correct_bias=False)
  (point,) = stepped(optimizer, jnp.zeros(1), [jnp.ones(1)])
  np.testing.assert_allclose(point, -0.1 * 0.1 / np.sqrt(0.001), rtol=1e-5)


def test_transformers_adamw_decays_the_leaves_of_its_mask():
  params = {'w_DF': jnp.ones((1, 1)), 'b_F': jnp.ones(1)}
  zero = jax.tree.map(jnp.zeros_like, params)
  optimizer = TransformersAdamW(Constant(0.1), weight_decay=0.5).build(1)
  (point,) = stepped(optimizer, params, [zero])
  np.testing.assert_allclose(point['w_DF'], 0.95, rtol=1e-6)
  assert point['b_F'] == 1
  with pytest.raises(ValueError, match='needs params'):
    optimizer.update(zero, optimizer.init(params))


@pytest.mark.parametrize('coarse', [False, True])
@pytest.mark.parametrize('p', [0.25, 0.7])
def test_masked_gradients_have_mean_and_variance_of_the_formulas(p, coarse):
  transform = child_tuning_f(p, KEY, coarse=coarse)
  g = jnp.full((400, 400), 3.0)
  masked, _ = jax.jit(transform.update)(g, transform.init(g))
  kept = round(256 * p) / 256 if coarse else p
  np.testing.assert_allclose(np.unique(masked), [0, 3 / kept], rtol=1e-6)
  # Six standard errors of a mean over 160,000 draws.
  deviation = 3 * np.sqrt((1 - kept) / kept)
  assert abs(float(masked.mean()) - 3) < 6 * deviation / 400
  np.testing.assert_allclose(masked.std(), deviation, rtol=0.02)


def test_masks_differ_between_steps_and_leaves_and_repeat_with_the_key():
  transform = child_tuning_f(0.5, KEY)
  g = {'x': jnp.ones(64), 'y': jnp.ones(64)}
  first, state = transform.update(g, transform.init(g))
  second, _ = transform.update(g, state)
  again, _ = child_tuning_f(0.5, KEY).update(g, transform.init(g))
  other, _ = child_tuning_f(0.5, jax.random.key(4)).update(g, transform.init(g))
  np.testing.assert_array_equal(first['x'], again['x'])
  for different in (first['y'], second['x'], other['x']):
    assert (first['x'] != different).any()


@pytest.mark.parametrize('coarse', [False, True])
def test_keeping_all_changes_nothing(coarse):
  g = {'x': jnp.arange(5.0), 'y': jnp.ones((2, 3), jnp.bfloat16)}
  transform = child_tuning_f(1.0, KEY, coarse=coarse)
  jax.tree.map(
    np.testing.assert_array_equal, transform.update(g, transform.init(g))[0], g
  )


def test_without_rescaling_kept_entries_stay_as_they_are():
  transform = child_tuning_f(0.5, KEY, rescale=False)
  masked, _ = transform.update(jnp.full(64, 3.0), transform.init(None))
  np.testing.assert_array_equal(np.unique(masked), [0, 3])


@pytest.mark.parametrize('coarse', [False, True])
def test_masks_are_the_same_on_every_mesh_and_drawn_without_communication(
  coarse,
):
  transform = child_tuning_f(0.5, KEY, coarse=coarse)
  g = jnp.ones((16, 8))
  expected, _ = jax.jit(transform.update)(g, transform.init(g))
  for shape in ((8, 1), (2, 4)):
    mesh = jax.make_mesh(shape, ('a', 'b'), (AxisType.Auto,) * 2)
    split = NamedSharding(mesh, PartitionSpec('a', 'b'))
    update = jax.jit(transform.update, out_shardings=(split, None))
    arguments = jax.device_put(g, split), transform.init(g)
    masked, _ = update(*arguments)
    np.testing.assert_array_equal(masked, expected)
    program = update.lower(*arguments).compile().as_text()
    for word in ('all-gather', 'all-to-all', 'all-reduce', 'permute'):
      assert word not in program


@pytest.mark.parametrize('p', [0.1, 0.3, 0.39, 0.5, 0.9, 1.0])
def test_the_mask_is_that_of_the_percentile(p):
  rng = np.random.default_rng(0)
  tree = {'x': rng.exponential(size=(7, 13)) ** 8, 'y': rng.normal(size=40)}
  tree = jax.tree.map(np.float32, tree)
  mask = top_fraction_mask(tree, p)
  every = np.concatenate([a.ravel() for a in tree.values()])
  threshold = np.percentile(every, 100 * (1 - p))
  for name, scores in tree.items():
    np.testing.assert_array_equal(mask[name], scores >= threshold)
  kept = sum(int(m.sum()) for m in mask.values())
  assert abs(kept / every.size - p) <= 1 / every.size


def test_what_is_not_scored_is_not_masked():
  scores = {'layer_0': {'w': jnp.arange(4.0)}, 'embed': jnp.arange(2.0)}
  mask = top_fraction_mask(scores, 0.5, scored='layer')
  np.testing.assert_array_equal(mask['layer_0']['w'], [0, 0, 1, 1])
  assert mask['embed'].shape == ()
  assert mask['embed']
  with pytest.raises(ValueError, match="path that 'head' is found in"):
    top_fraction_mask(scores, 0.5, scored='head')


def regression(params, batch, key=None):
  residual = batch['x'] @ params['w'] + params['b'] - batch['y']
  if key is not None:
    residual = residual * jax.random.bernoulli(key)
  return jnp.mean(residual**2)


@pytest.fixture(scope='module')
def batches():
  rng = np.random.default_rng(1)
  make = lambda n: {
    'x': rng.normal(size=(n, 3)).astype(np.float32),
    'y': rng.normal(size=n).astype(np.float32),
  }
  return [make(6), make(6), make(5)]


PARAMS = {'w': np.array([1.0, -2.0, 0.5], np.float32), 'b': np.float32(0.25)}


def example_gradients(batches):
  x = np.concatenate([b['x'] for b in batches]).astype(np.float64)
  y = np.concatenate([b['y'] for b in batches])
  residual = x @ PARAMS['w'] + PARAMS['b'] - y
  return {'w': 2 * residual[:, None] * x, 'b': 2 * residual}


@pytest.mark.parametrize('chunk', [1, 4])
def test_fisher_by_example_is_the_mean_squared_gradient(batches, chunk):
  scores = fisher(regression, PARAMS, batches, chunk=chunk)
  gradients = example_gradients(batches)
  for name in PARAMS:
    expected = (gradients[name] ** 2).mean(axis=0)
    np.testing.assert_allclose(scores[name], expected, rtol=1e-5)


def test_fisher_by_batch_squares_clipped_means(batches):
  scores = fisher(regression, PARAMS, batches, mode='batch', max_norm=1.0)
  expected = {'w': np.zeros(3), 'b': 0.0}
  for batch in batches:
    for name, gradient in example_gradients([batch]).items():
      mean = gradient.mean(axis=0)
      mean = mean * min(1, 1 / (np.linalg.norm(mean) + 1e-6))
      expected[name] += mean**2 / len(batches)
  for name in PARAMS:
    np.testing.assert_allclose(scores[name], expected[name], rtol=1e-5)


def test_fisher_gives_each_example_noise_of_its_own(batches):
  gradients = example_gradients(batches)['b']
  scores = fisher(regression, PARAMS, batches, key=KEY)
  kept = np.array(
    [
      float(scores['b']) * len(gradients),
      (gradients**2).sum(),
    ]
  )
  assert 0 < kept[0] < kept[1]


def test_fisher_of_a_split_batch_is_that_of_a_whole_one(batches):
  batch = jax.tree.map(lambda a: np.concatenate([a, a[:2]]), batches[0])
  expected = fisher(regression, PARAMS, [batch], chunk=4)
  mesh = jax.make_mesh(
    (4,), ('data',), (AxisType.Auto,), devices=jax.devices()[:4]
  )
  split = NamedSharding(mesh, PartitionSpec('data'))
  scores = fisher(regression, PARAMS, [jax.device_put(batch, split)], chunk=4)
  for name in PARAMS:
    np.testing.assert_allclose(scores[name], expected[name], rtol=1e-5)


def test_outside_the_child_only_decay_moves_parameters():
  params = jnp.ones(2)
  mask = np.array([True, False])
  adamw = optax.adamw(1e-2, weight_decay=1e-2)
  gradients = [jnp.ones(2)] * 10
  link = optax.chain(child_tuning_d(mask), adamw)
  official = stepped(link, params, gradients)[-1]
  np.testing.assert_allclose(official[1], 0.9990004, atol=1e-7)
  wrapped = stepped(child_tuning_d(mask, adamw), params, gradients)[-1]
  np.testing.assert_array_equal(wrapped, official)
  kept = child_tuning_d(mask, adamw, mask_decay=True)
  frozen = stepped(kept, params, gradients)[-1]
  assert frozen[1] == 1
  assert frozen[0] == official[0]


def test_rescaling_divides_by_the_fraction_of_the_masked_leaves():
  params = {'x': jnp.ones(4), 'y': jnp.ones(3)}
  mask = {'x': np.array([True, False, False, False]), 'y': True}
  transform = child_tuning_d(mask, rescale=True)
  updates, _ = transform.update(params, transform.init(params))
  np.testing.assert_array_equal(updates['x'], [4, 0, 0, 0])
  np.testing.assert_array_equal(updates['y'], params['y'])


def test_a_bool_masks_a_subtree():
  params = {'a': {'x': jnp.ones(2), 'y': jnp.ones(3)}, 'b': jnp.ones(1)}
  transform = child_tuning_d({'a': False, 'b': True})
  updates, _ = transform.update(params, transform.init(params))
  assert not updates['a']['x'].any()
  assert not updates['a']['y'].any()
  assert updates['b'] == 1


def test_clipping_comes_before_the_mask():
  # Clipped, all 64 entries are 1 / 8; the mask doubles those that it keeps.
  params = {'x': jnp.zeros(64)}
  sgd = FromOptax('sgd', Constant(1.0))
  optimizer = ChildTuningF(p=0.5, inner=sgd).build(1)
  (point,) = stepped(optimizer, params, [{'x': jnp.full(64, 5.0)}])
  np.testing.assert_allclose(np.unique(point['x']), [-0.25, 0], rtol=1e-6)


def test_update_dropout_masks_the_whole_update():
  params = {'x': jnp.zeros(64)}
  inner = AdamW(Constant(0.1), max_gradient_norm=None)
  optimizer = ChildTuningF(p=0.5, inner=inner, place='update').build(1)
  (point,) = stepped(optimizer, params, [{'x': jnp.ones(64)}])
  np.testing.assert_allclose(np.unique(point['x']), [-0.2, 0], atol=1e-6)


def test_a_mask_goes_through_a_file_into_an_optimiser(tmp_path):
  params = {'a': {'x': jnp.zeros((3, 5))}, 'b': jnp.zeros(2)}
  mask = {'a': {'x': np.arange(15).reshape(3, 5) % 4 == 0}, 'b': True}
  path = tmp_path / 'mask.npz'
  save_mask(path, mask)
  jax.tree.map(np.testing.assert_array_equal, load_mask(path, params), mask)
  sgd = FromOptax('sgd', Constant(1.0), max_gradient_norm=None)
  optimizer = ChildTuningD(str(path), sgd).build(1)
  gradient = jax.tree.map(jnp.ones_like, params)
  (point,) = stepped(optimizer, params, [gradient])
  np.testing.assert_array_equal(point['a']['x'], -1.0 * mask['a']['x'])
  np.testing.assert_array_equal(point['b'], [-1, -1])
  with pytest.raises(ValueError, match='has no mask for c; make a new one'):
    load_mask(path, {'c': jnp.zeros(1)})


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: child_tuning_f(0.0, KEY), r'p must lie in \(0, 1\], got 0.0'),
    (lambda: child_tuning_f(1.5, KEY), r'p must lie in \(0, 1\], got 1.5'),
    (
      lambda: child_tuning_f(0.001, KEY, coarse=True),
      'less than 8 bits can draw',
    ),
    (lambda: ChildTuningF(p=-1.0), r'p must lie in \(0, 1\]'),
    (lambda: ChildTuningF(place='after'), "must be 'gradient' or 'update'"),
    (lambda: top_fraction_mask({'x': jnp.ones(1)}, 0.0), 'p must lie in'),
    (lambda: child_tuning_d(True, mask_decay=True), 'pass it as inner'),
    (lambda: child_tuning_d({'y': True}).init({'x': jnp.ones(1)}), 'structure'),
    (
      lambda: child_tuning_d({'x': np.ones(2)}).init({'x': jnp.ones(2)}),
      r"mask of \['x'\] must be bool of shape \(2,\) or a single bool, got",
    ),
    (lambda: fisher(regression, PARAMS, []), 'no batches'),
    (lambda: fisher(regression, PARAMS, [], chunk=0), 'chunk must be at'),
    (
      lambda: fisher(regression, PARAMS, [], mode='row'),
      "'example' or 'batch'",
    ),
  ],
)
def test_bad_input_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
