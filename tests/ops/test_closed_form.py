"""Softmax heads in closed form against NumPy in float64 and Bayes' rule."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from jaxformers.ops import ClassStatistics
from jaxformers.ops import lda_covariance
from jaxformers.ops import lda_init
from jaxformers.ops import lda_merge
from jaxformers.ops import lda_psum
from jaxformers.ops import lda_solve
from jaxformers.ops import lda_update
from jaxformers.ops import ledoit_wolf_shrinkage
from jaxformers.ops import oas_shrinkage

WIDTH, CLASSES = 5, 3
update = jax.jit(lda_update)
solve = jax.jit(lda_solve, static_argnames='shrinkage')


def make_data(seed=0, size=60, offset=3.0):
  rng = np.random.default_rng(seed)
  labels = rng.integers(CLASSES, size=size)
  means = offset + rng.normal(size=(CLASSES, WIDTH))
  mixing = rng.normal(size=(WIDTH, WIDTH))
  return means[labels] + rng.normal(size=(size, WIDTH)) @ mixing, labels


def start(width=WIDTH, classes=CLASSES, dtype=jnp.float32):
  return lda_init(width, classes, dtype)


def statistics(x, labels):
  """Counts, means and scatter within classes, class by class."""
  counts = np.array([np.sum(labels == i) for i in range(CLASSES)])
  means = np.stack([x[labels == i].mean(0) for i in range(CLASSES)])
  rest = x - means[labels]
  return counts, means, rest.T @ rest


def differences(logits):
  return np.asarray(logits) - np.asarray(logits)[..., :1]


def near(a, b, **tolerances):
  for x, y in zip(a, b, strict=True):
    np.testing.assert_allclose(x, y, **tolerances)


def test_two_classes_on_a_line_by_hand():
  x, labels = jnp.array([[0.0], [2.0], [4.0], [6.0]]), jnp.array([0, 0, 1, 1])
  state = update(start(1, 2), x, labels)
  assert lda_covariance(state) == 1
  head = solve(state, shrinkage=0.0)
  kernel, bias = (differences(a)[..., 1] for a in head)
  np.testing.assert_allclose(kernel, 4, rtol=1e-6)
  np.testing.assert_allclose(bias, -12, rtol=1e-6)
  np.testing.assert_allclose(
    differences(head.logits(jnp.array([[3.0]]))), 0, atol=1e-5
  )


@pytest.mark.parametrize('cuts', [(), (1,), (7, 8, 40)])
def test_any_batches_give_the_statistics_of_all_data(cuts):
  x, labels = make_data(offset=100.0)
  state = start()
  for rows in np.split(np.arange(len(x)), cuts):
    size = -len(rows) % 16
    padded = np.pad(x[rows], ((0, size), (0, 0)), constant_values=np.nan)
    state = update(
      state,
      padded.astype(np.float32),
      np.pad(labels[rows], (0, size), constant_values=-1),
    )
  near(state, statistics(x, labels), rtol=1e-5, atol=1e-3)


def test_merging_is_associative_and_commutative():
  with jax.enable_x64(True):
    x, labels = make_data()
    a, b, c = (
      update(start(dtype=jnp.float64), x[part], labels[part])
      for part in (slice(0, 5), slice(5, 30), slice(30, 60))
    )
    merge = jax.jit(lda_merge)
    whole = statistics(x, labels)
    for merged in (merge(merge(a, b), c), merge(c, merge(b, a))):
      near(merged, whole, rtol=1e-12, atol=1e-12)
    near(merge(a, start(dtype=jnp.float64)), a, rtol=0)


def test_shards_are_merged_by_sums():
  with jax.enable_x64(True):
    x, labels = make_data(size=64)
    mesh = jax.make_mesh((8,), ('data',), (AxisType.Auto,))

    @jax.jit
    @functools.partial(
      jax.shard_map,
      mesh=mesh,
      in_specs=(PartitionSpec('data'), PartitionSpec('data')),
      out_specs=PartitionSpec(),
    )
    def gather(x, labels):
      state = jax.tree.map(
        lambda a: jax.lax.pcast(a, 'data', to='varying'),
        start(dtype=jnp.float64),
      )
      return lda_psum(lda_update(state, x, labels), 'data')

    near(gather(x, labels), statistics(x, labels), rtol=1e-12, atol=1e-12)


def test_direct_and_whitened_solutions_agree():
  """The recipe of the source, with the moments of the population."""
  with jax.enable_x64(True):
    x, labels = make_data()
    counts, means, _ = statistics(x, labels)
    p = counts / len(x)
    centre = x.mean(0)
    values, vectors = np.linalg.eigh(np.cov(x.T, ddof=0))
    whiten = vectors / np.sqrt(values)
    mu = (means - centre) @ whiten
    inverse = np.linalg.inv(np.eye(WIDTH) - (mu.T * p) @ mu)
    w = mu @ inverse
    b = np.log(p) - np.sum(w * mu, axis=1) / 2
    expected = (x - centre) @ whiten @ w.T + b
    state = update(start(dtype=jnp.float64), x, labels)
    found = solve(state, shrinkage=0.0).logits(x)
    near(differences(found), differences(expected), rtol=1e-9, atol=1e-9)


def test_posteriors_are_those_of_bayes_rule():
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    means = rng.normal(size=(CLASSES, WIDTH))
    root = rng.normal(size=(WIDTH, WIDTH))
    covariance, p = root @ root.T, np.array([0.2, 0.5, 0.3])
    head = lda_solve(ClassStatistics(100 * p, means, 100 * covariance), 0.0)
    x = rng.normal(size=(10, WIDTH))
    gap = x[:, None] - means
    distance = np.einsum('bvd,de,bve->bv', gap, np.linalg.inv(covariance), gap)
    expected = np.log(p) - distance / 2
    near(differences(head.logits(x)), differences(expected), rtol=1e-9)
    # Other priors move the bias alone.
    other = lda_solve(
      ClassStatistics(100 * p, means, 100 * covariance), 0.0, np.ones(3) / 3
    )
    np.testing.assert_allclose(other.kernel_DV, head.kernel_DV)
    near(
      differences(other.logits(x)),
      differences(-distance / 2),
      rtol=1e-9,
      atol=1e-9,
    )


def test_features_may_be_mapped_and_moved():
  with jax.enable_x64(True):
    x, labels = make_data()
    rng = np.random.default_rng(1)
    moved = x @ rng.normal(size=(WIDTH, WIDTH)) + 10 * rng.normal(size=WIDTH)
    logits = [
      differences(
        solve(
          update(start(dtype=jnp.float64), a, labels), shrinkage=0.0
        ).logits(a)
      )
      for a in (x, moved)
    ]
    near(*logits, rtol=1e-8, atol=1e-8)


def test_an_empty_class_has_probability_zero():
  x, labels = make_data()
  state = update(start(classes=4), x.astype(np.float32), labels)
  head = solve(state)
  assert head.bias_V[3] == -jnp.inf
  assert (head.kernel_DV[:, 3] == 0).all()
  fewer = solve(update(start(), x.astype(np.float32), labels))
  near(head.kernel_DV.T[:3], fewer.kernel_DV.T, rtol=1e-6)
  probabilities = jax.nn.softmax(head.logits(x))
  assert np.isfinite(probabilities).all()
  assert (probabilities[:, 3] == 0).all()


@pytest.mark.parametrize('shrinkage', [0.1, 'auto', 'oas'])
def test_a_constant_feature_is_no_trouble(shrinkage):
  x, labels = make_data()
  x[:, 2] = 7.0
  head = solve(
    update(start(), x.astype(np.float32), labels), shrinkage=shrinkage
  )
  assert all(np.isfinite(a).all() for a in head)


def test_one_example_per_class_gives_the_nearest_mean():
  x = 5 + np.random.default_rng(0).normal(size=(CLASSES, WIDTH))
  head = solve(update(start(), x.astype(np.float32), np.arange(CLASSES)))
  distances = np.square(x[:, None] + 0.01 - x).sum(-1)
  near(
    differences(head.logits(x + 0.01)),
    differences(-distances / 2),
    rtol=1e-4,
    atol=1e-4,
  )


def test_far_means_cost_no_digits_in_float32():
  x, labels = make_data(offset=0.0)
  near_state = update(start(), x.astype(np.float32), labels)
  far = (x.astype(np.float32) + np.float32(256)).astype(np.float32)
  far_state = update(start(), far, labels)
  np.testing.assert_allclose(
    far_state.scatter_DE, near_state.scatter_DE, rtol=1e-3, atol=1e-2
  )


def test_automatic_shrinkage_depends_on_the_number_of_examples():
  for size, dtype, expected in (
    (49, jnp.float32, 0.1),
    (50, jnp.float32, 1e-4),
  ):
    x, labels = make_data(size=size)
    state = update(start(dtype=dtype), x.astype(np.float32), labels)
    near(
      lda_covariance(state, 'auto'), lda_covariance(state, expected), rtol=1e-6
    )
  with pytest.raises(ValueError, match="'auto' or 'oas', got 'ledoit'"):
    lda_solve(state, 'ledoit')


def test_ledoit_and_wolf_by_their_definition():
  with jax.enable_x64(True):
    x, labels = make_data(size=20)
    _, means, scatter = statistics(x, labels)
    covariance, rest = scatter / 20, x - means[labels]
    sphere = np.trace(covariance) / WIDTH * np.eye(WIDTH)
    spread = np.sum((covariance - sphere) ** 2)
    own = [np.sum((np.outer(z, z) - covariance) ** 2) for z in rest]
    state = update(start(dtype=jnp.float64), x, labels)
    found = ledoit_wolf_shrinkage(state, x, labels)
    np.testing.assert_allclose(found, np.sum(own) / 20**2 / spread, rtol=1e-9)


def test_oracle_approximating_shrinkage_is_a_fixed_point():
  """Of the oracle for normal features, which knows the covariance."""
  with jax.enable_x64(True):
    x, labels = make_data(size=20)
    state = update(start(dtype=jnp.float64), x, labels)
    s = statistics(x, labels)[2] / 20
    sphere = np.trace(s) / WIDTH * np.eye(WIDTH)
    rho = 0.5
    for _ in range(500):
      sigma = (1 - rho) * s + rho * sphere
      # The formula of the oracle, iterated to its limit.
      a, b = np.trace(sigma @ s), np.trace(sigma) ** 2
      top = (1 - 2 / WIDTH) * a + b
      rho = top / ((20 + 1 - 2 / WIDTH) * a + (1 - 20 / WIDTH) * b)
    np.testing.assert_allclose(oas_shrinkage(state), rho, rtol=1e-6)


def test_shrinkage_estimates_of_a_sphere_and_of_a_line():
  rng = np.random.default_rng(0)
  sphere = rng.normal(size=(30, WIDTH)).astype(np.float32)
  labels = np.zeros(30, int)
  for features, low, high in (
    (sphere, 0.5, 1.0),
    (sphere[:, :1] * np.ones(WIDTH, np.float32), 0.0, 0.2),
  ):
    state = update(start(), features, labels)
    for rho in (
      oas_shrinkage(state),
      ledoit_wolf_shrinkage(state, features, labels),
    ):
      assert low <= rho <= high


def test_ledoit_and_wolf_are_those_of_scikit_learn():
  covariance = pytest.importorskip('sklearn.covariance')
  with jax.enable_x64(True):
    x, labels = make_data(size=20)
    _, means, _ = statistics(x, labels)
    rest = x - means[labels]
    state = update(start(dtype=jnp.float64), x, labels)
    _, expected = covariance.ledoit_wolf(rest, assume_centered=True)
    found = ledoit_wolf_shrinkage(state, x, labels)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
