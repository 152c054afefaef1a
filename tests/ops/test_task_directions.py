"""Directions for several tasks: worked examples, properties, edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from jaxformers.ops import aligned_weights
from jaxformers.ops import cagrad_weights
from jaxformers.ops import config_weights
from jaxformers.ops import hybrid_weights
from jaxformers.ops import imtl_g_weights
from jaxformers.ops import min_norm_weights
from jaxformers.ops import nash_weights
from jaxformers.ops import pcgrad_weights
from jaxformers.ops import primary_weights
from jaxformers.ops import sign_dropout
from jaxformers.ops import softmax_descent_weights
from jaxformers.ops import upgrad_weights

TASKS = 4
MOST = 5  # Fewer tasks are computed as so many, the others absent.
IN_TURN = jnp.arange(MOST) + jnp.zeros((MOST, 1), int)
IS_PRIMARY = jnp.arange(MOST) < 2
SCHEMES = {
  'mgda': min_norm_weights,
  'pcgrad': lambda gram, mask: pcgrad_weights(gram, IN_TURN, mask),
  'cagrad': lambda gram, mask: cagrad_weights(gram, 0.5, mask),
  'imtl_g': imtl_g_weights,
  'config': config_weights,
  'nash': lambda gram, mask: nash_weights(gram, mask, max_norm=None),
  'aligned': aligned_weights,
  'upgrad': upgrad_weights,
  'primary': lambda gram, mask: primary_weights(gram, 0, mask),
  'hybrid': lambda gram, mask: hybrid_weights(gram, IS_PRIMARY, mask),
  'softmax': lambda gram, mask: softmax_descent_weights(
    gram, jnp.zeros(MOST), 1.0, 100, mask
  )[0],
}
JITTED = {name: jax.jit(function) for name, function in SCHEMES.items()}


def computed(function, g, mask=None):
  """Returns float64 weights of gradients `[T, D]`."""
  g = np.asarray(g, np.float64)
  padded = np.zeros((MOST, g.shape[1]))
  padded[: len(g)] = g
  present = np.zeros(MOST, bool)
  present[: len(g)] = True if mask is None else mask
  padded[~present] = np.nan
  with jax.enable_x64(True):
    w = function(jnp.asarray(padded @ padded.T), jnp.asarray(present))
    return np.asarray(w)[: len(g)]


def weights(name, g, mask=None):
  return computed(JITTED[name], g, mask)


def direction(name, g, mask=None):
  return weights(name, g, mask) @ np.asarray(g, np.float64)


def some(seed=0, tasks=TASKS, width=6):
  """Gradients that conflict, zero not among their mixtures."""
  return np.random.default_rng(seed).normal(size=(tasks, width))


@pytest.mark.parametrize(
  ('name', 'w', 'u'),
  [
    ('mgda', (0.4, 0.6), (0.2, 0.6)),
    ('pcgrad', (1.5, 2), (1, 2)),
    ('upgrad', (0.75, 1), (0.5, 1)),
    ('imtl_g', (0.41421356, 0.58578644), (0.24264069, 0.58578644)),
    ('nash', (0.92387953, 1.30656296), (0.54119610, 1.30656296)),
    ('aligned', (0.41458980, 0.55278640), (0.27639320, 0.55278640)),
    ('cagrad', (0.5, 0.75), (0.25, 0.75)),
    ('primary', (1, 1), (1, 1)),
  ],
)
def test_two_conflicting_gradients(name, w, u):
  g = [[2, 0], [-1, 1]]
  np.testing.assert_allclose(weights(name, g), w, atol=1e-8)
  np.testing.assert_allclose(direction(name, g), u, atol=1e-8)


def test_the_radius_of_cagrad():
  g = np.array([[2.0, 0.0], [-1.0, 1.0]])
  mean = g.mean(axis=0)
  with jax.enable_x64(True):
    cases, gram = jnp.array([0.0, 0.4, 1e6]), jnp.asarray(g @ g.T)
    every = jax.jit(jax.vmap(cagrad_weights, (None, 0)))
    none, some, far = np.asarray(every(gram, cases)) @ g
  np.testing.assert_allclose(none, mean, atol=1e-12)
  np.testing.assert_allclose(some, [0.3, 0.7], atol=1e-8)
  np.testing.assert_allclose(
    np.linalg.norm(some - mean), 0.4 * np.linalg.norm(mean), rtol=1e-8
  )
  shortest = np.array([0.2, 0.6]) / np.hypot(0.2, 0.6)
  np.testing.assert_allclose(far / np.linalg.norm(far), shortest, atol=1e-5)


@pytest.mark.parametrize('seed', [0, 1])
def test_cagrad_helps_the_worst_task_as_much_as_can_be(seed):
  g = some(seed)
  mean = g.mean(axis=0)
  radius = 0.5 * np.linalg.norm(mean)
  u = direction('cagrad', g)
  assert np.linalg.norm(u - mean) <= radius * (1 + 1e-9)
  # Directions of the ball drawn close and far: none serves the worst better.
  rng = np.random.default_rng(0)
  steps = rng.normal(size=(2000, g.shape[1]))
  steps *= rng.choice([1e-3, 1e-1, 1], (2000, 1))
  others = u - mean + radius * steps
  others *= np.minimum(
    1, radius / np.linalg.norm(others, axis=1, keepdims=True)
  )
  assert ((mean + others) @ g.T).min(axis=1).max() <= (g @ u).min() + 1e-9


def test_the_projection_that_a_greedy_iteration_misses():
  g = [[-2, -1, 1], [1, 0, 0], [1, 1, 0]]
  np.testing.assert_allclose(weights('primary', g), [1, 1, 1], atol=1e-9)
  np.testing.assert_allclose(direction('primary', g), [0, 0, 1], atol=1e-9)


def test_projections_meet_their_conditions():
  for seed in range(20):
    g = some(seed, width=5)
    w = weights('primary', g)
    u = w @ g
    scale = np.linalg.norm(g, axis=1) * np.linalg.norm(u)
    along = g @ u
    assert (along[1:] >= -1e-6 * scale[1:]).all()
    assert (w >= 0).all()
    assert np.abs(w[1:] * along[1:]).max() <= 1e-9
    np.testing.assert_allclose(along[0], u @ u, rtol=1e-6, atol=1e-12)
    assert np.linalg.norm(u) <= np.linalg.norm(g[0]) * (1 + 1e-12)
    again = direction('primary', [u, *g[1:]])
    np.testing.assert_allclose(again, u, atol=1e-9)
    scaled = direction('primary', g * np.array([[1], [7], [0.1], [3]]))
    np.testing.assert_allclose(scaled, u, atol=1e-9)
    theirs, _ = optimize.nnls(g[1:].T, -g[0])
    np.testing.assert_allclose(u, g[0] + theirs @ g[1:], atol=1e-9)


def test_one_auxiliary_task_by_the_closed_form():
  for seed in range(5):
    g = some(seed, tasks=2)
    expected = max(-g[0] @ g[1], 0) / (g[1] @ g[1])
    np.testing.assert_allclose(weights('primary', g), [1, expected], rtol=1e-9)
  np.testing.assert_allclose(
    weights('primary', [[1, 2], [0, 0]]), [1, 0], atol=0
  )
  np.testing.assert_allclose(
    direction('primary', [[1, 2], [-3, -6]]), 0, atol=1e-9
  )
  np.testing.assert_allclose(weights('primary', [[1, 2]]), [1])


def test_hybrid_lies_between_its_limits():
  g = some(1, width=5)
  two = [True, True, False, False]
  np.testing.assert_allclose(
    weights('hybrid', g, two)[:2], weights('mgda', g[:2]), atol=1e-9
  )
  one = [True, False, True, True]
  np.testing.assert_allclose(
    weights('hybrid', g, one), weights('primary', g, one), atol=1e-8
  )
  w = weights('hybrid', g)
  u = w @ g
  np.testing.assert_allclose(w[:2].sum(), 1, rtol=1e-9)
  assert (g[:2] @ u >= u @ u - 1e-9).all()
  assert (g[2:] @ u >= -1e-9).all()


def test_upgrad_averages_projections():
  g = some(2)
  order = [np.roll(np.arange(TASKS), -i) for i in range(TASKS)]
  mean = np.mean([direction('primary', g[o]) for o in order], axis=0)
  np.testing.assert_allclose(direction('upgrad', g), mean, atol=1e-8)


def surgery(g):
  """PCGrad by its loops, in the order of the tasks."""
  total = 0
  for i, own in enumerate(g):
    v = own.copy()
    for j, other in enumerate(g):
      if i != j and v @ other < 0:
        v = v - (v @ other) / (other @ other) * other
    total = total + v
  return total


def test_surgery_by_its_loops():
  for seed in range(5):
    g = some(seed, width=3)
    np.testing.assert_allclose(direction('pcgrad', g), surgery(g), atol=1e-9)


def test_impartial_directions_project_alike():
  for seed in range(5):
    g = some(seed)
    unit = g / np.linalg.norm(g, axis=1, keepdims=True)
    impartial = unit @ direction('imtl_g', g)
    np.testing.assert_allclose(impartial, impartial[0], rtol=1e-9)
    u = np.linalg.pinv(unit) @ np.ones(TASKS)
    u *= (g @ u).sum() / (u @ u)
    np.testing.assert_allclose(direction('config', g), u, rtol=1e-7)
    w = weights('nash', g)
    np.testing.assert_allclose(w * (g @ (w @ g)), 1, rtol=1e-9)
    np.testing.assert_allclose(np.sum((w @ g) ** 2), TASKS, rtol=1e-9)


def test_nash_where_public_solvers_fail():
  g = np.array([[1e-3, 0.0, 0.0], [-2.0, 30.0, 1.0], [1.0, -0.9, 5e3]])
  w = weights('nash', g)
  np.testing.assert_allclose(w * (g @ (w @ g)), 1, rtol=1e-8)
  short = computed(jax.jit(lambda k, m: nash_weights(k, m, 0.5)), g)
  np.testing.assert_allclose(np.linalg.norm(short @ g), 0.5, rtol=1e-9)


def test_aligned_by_singular_values():
  g = some(3)
  left, values, right = np.linalg.svd(g, full_matrices=False)
  mean = np.full(TASKS, 1 / TASKS)
  for scale, size in (
    ('min', values[-1]),
    ('median', np.sqrt(np.median(values**2))),
    ('rmse', np.sqrt((values**2).mean())),
  ):
    own = jax.jit(lambda k, m, s=scale: aligned_weights(k, m, s))
    u = computed(own, g) @ g
    np.testing.assert_allclose(u, size * mean @ left @ right, rtol=1e-8)
  with pytest.raises(ValueError, match="'min', 'median' or 'rmse', got 'max'"):
    aligned_weights(jnp.eye(2), scale='max')


@pytest.mark.parametrize('name', SCHEMES)
def test_the_order_of_tasks_does_not_matter(name):
  if name == 'pcgrad':  # it does
    return
  order = [1, 0, 3, 2] if name == 'hybrid' else [2, 0, 3, 1]
  if name == 'primary':
    order = [0, 3, 1, 2]
  g = some(4)
  np.testing.assert_allclose(
    weights(name, g[order]), weights(name, g)[order], atol=1e-9
  )


@pytest.mark.parametrize('name', SCHEMES)
def test_absent_tasks_leave_the_rest_as_if_they_were_not(name):
  g = some(5)
  mask = [True, True, False, True]
  kept = [0, 1, 3]
  w = weights(name, g, mask)
  assert w[2] == 0
  np.testing.assert_allclose(w[kept], weights(name, g[kept]), atol=1e-8)
  np.testing.assert_array_equal(weights(name, g, [False] * 4), 0)


@pytest.mark.parametrize('name', SCHEMES)
def test_opposite_zero_and_dependent_gradients_give_finite_weights(name):
  g = some(6)
  for case in (
    np.stack([g[0], -g[0], g[1], -g[1]]),
    np.stack([g[0], 0 * g[0], g[1], g[2]]),
    np.stack([g[0], g[0], 2 * g[0], g[1]]),
    0 * g,
  ):
    w = weights(name, case)
    assert np.isfinite(w).all()
    if not case.any():
      np.testing.assert_allclose(w @ case, 0, atol=0)


@pytest.mark.parametrize('name', ['mgda', 'nash', 'imtl_g', 'config', 'hybrid'])
def test_opposite_gradients_leave_nothing_to_do(name):
  u = direction(name, [[1, 2], [-1, -2]])
  np.testing.assert_allclose(u, 0, atol=1e-9)


def test_invariances():
  g = some(7)
  scaled = g * np.array([[5], [1], [0.01], [1]])
  np.testing.assert_allclose(
    direction('nash', scaled), direction('nash', g), rtol=1e-7
  )
  twin = np.concatenate([g, g[:1]])
  np.testing.assert_allclose(
    direction('mgda', twin), direction('mgda', g), atol=1e-9
  )
  long = np.stack([g[0], 3 * g[0]])
  np.testing.assert_allclose(weights('mgda', long), [1, 0], atol=1e-9)
  np.testing.assert_allclose(weights('mgda', np.eye(4)), 0.25, rtol=1e-9)


def test_sign_dropout_keeps_one_sign_and_its_mean():
  g = np.array([[2.0, 1.0, -1.0, 3.0], [-1.0, 1.0, -1.0, 0.0]])
  mask = jnp.ones(2, bool)
  draw = jax.jit(
    jax.vmap(lambda key: sign_dropout({'w': jnp.asarray(g)}, key, mask))
  )
  u = np.asarray(draw(jax.random.split(jax.random.key(0), 4000))['w'])
  np.testing.assert_array_equal(np.unique(u[:, 0]), [-1, 2])
  assert (u[:, 1:] == [2, -2, 3]).all()
  # Positive with probability (1 + (2 - 1) / (2 + 1)) / 2 = 2/3.
  np.testing.assert_allclose((u[:, 0] == 2).mean(), 2 / 3, atol=0.03)
  leak = sign_dropout(
    {'w': jnp.asarray(g)}, jax.random.key(0), mask, jnp.ones(2)
  )
  np.testing.assert_allclose(leak['w'], g.sum(axis=0), rtol=1e-6)
  absent = sign_dropout(
    {'w': jnp.asarray(g).at[1].set(jnp.nan)},
    jax.random.key(0),
    jnp.array([True, False]),
  )
  np.testing.assert_allclose(absent['w'], g[0], rtol=1e-6)


@pytest.mark.parametrize(
  ('name', 'u', 'tolerance'),
  [
    ('mgda', [0.092401216, 0.623708207, 0.693009119], 1e-8),
    ('cagrad', [-0.038631094, 0.205297760, 1.769315554], 3e-8),
    ('imtl_g', [0.119839619, 0.428402472, 0.865125826], 1e-8),
    ('aligned', [0.157475962, 0.193166470, 0.668638675], 1e-8),
    ('config', [0.461514420, 1.649820994, 3.331686536], 1e-8),
    # torchjd adds 1e-4 to the diagonal of the normalised Gram matrix.
    ('upgrad', [0.329884805, 0.036699896, 1.784975631], 1e-3),
  ],
)
def test_directions_are_those_of_torchjd_0_18_0(name, u, tolerance):
  g = [[2, 0, 1], [-1, 1, 0.5], [0.5, -2, 3]]
  np.testing.assert_allclose(direction(name, g), u, atol=tolerance)


def exact_projector():
  return pytest.importorskip('torchjd.linalg').QuadprogProjector(reg_eps=1e-10)


@pytest.mark.parametrize(
  ('name', 'peer', 'tolerance'),
  [
    # Frank-Wolfe steps come near at 1 / their number.
    ('mgda', lambda a: a.MGDA(epsilon=1e-12, max_iters=5000), 1e-2),
    ('cagrad', lambda a: a.CAGrad(c=0.5), 1e-3),
    ('imtl_g', lambda a: a.IMTLG(), 1e-6),
    ('aligned', lambda a: a.AlignedMTL(), 1e-6),
    ('config', lambda a: a.ConFIG(), 1e-6),
    ('upgrad', lambda a: a.UPGrad(projector=exact_projector()), 1e-5),
  ],
)
@pytest.mark.filterwarnings('ignore')
def test_directions_are_those_of_torchjd(name, peer, tolerance):
  torch = pytest.importorskip('torch', reason="needs the extra 'peers'")
  peer = peer(pytest.importorskip('torchjd.aggregation'))
  for seed in range(20):
    g = some(seed)
    expected = peer(torch.as_tensor(g)).numpy()
    np.testing.assert_allclose(
      direction(name, g),
      expected,
      atol=tolerance * np.linalg.norm(expected),
    )
