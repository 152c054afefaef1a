"""What weighs tasks: states over steps, invariances, absent tasks, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.ops import imtl_l_loss
from jaxformers.ops import initial_cross_entropy
from jaxformers.ops import initial_squared_error
from jaxformers.ops import min_norm_weights
from jaxformers.ops import prior_cross_entropy
from jaxformers.ops import prior_squared_error
from jaxformers.optim.tasks import DBMTL
from jaxformers.optim.tasks import DWA
from jaxformers.optim.tasks import FAMO
from jaxformers.optim.tasks import IMTLG
from jaxformers.optim.tasks import IMTLL
from jaxformers.optim.tasks import MGDA
from jaxformers.optim.tasks import AlignedMTL
from jaxformers.optim.tasks import CAGrad
from jaxformers.optim.tasks import ConFIG
from jaxformers.optim.tasks import Equal
from jaxformers.optim.tasks import GradDrop
from jaxformers.optim.tasks import GradNorm
from jaxformers.optim.tasks import Hybrid
from jaxformers.optim.tasks import InitialLoss
from jaxformers.optim.tasks import InverseLoss
from jaxformers.optim.tasks import NashMTL
from jaxformers.optim.tasks import Normalized
from jaxformers.optim.tasks import PCGrad
from jaxformers.optim.tasks import PowerMean
from jaxformers.optim.tasks import Primary
from jaxformers.optim.tasks import ReferenceLoss
from jaxformers.optim.tasks import SoftmaxMGDA
from jaxformers.optim.tasks import Uncertainty
from jaxformers.optim.tasks import UnitGradients
from jaxformers.optim.tasks import UPGrad
from jaxformers.optim.tasks import aggregate_tasks
from jaxformers.optim.tasks import look_back
from jaxformers.optim.tasks.contract import weigh

ALL = jnp.ones(3, bool)
L = jnp.array([1.0, 4.0, 16.0])
G = np.random.default_rng(0).normal(size=(3, 5)) * [[1], [3], [0.2]]
K = jnp.asarray(G @ G.T, jnp.float32)
WEIGHTINGS = (
  Equal(), InitialLoss(), ReferenceLoss((1.0, 2.0, 3.0)), InverseLoss(),
  PowerMean(2.0), DWA(2), Uncertainty(), IMTLL(), GradNorm(), UnitGradients(),
  MGDA(), PCGrad(), CAGrad(), IMTLG(), NashMTL(), AlignedMTL(), UPGrad(),
  ConFIG(), Primary(), Hybrid(2), Normalized(MGDA(), 'loss+'), FAMO(),
  SoftmaxMGDA(),
)  # fmt: skip


def name_of(weighting):
  return type(weighting).__name__


def run(weighting, losses, masks=None, gram=K):
  """Returns the weights of one step after the other, compiled once."""
  losses = jnp.asarray(losses, jnp.float32)
  masks = jnp.ones(losses.shape, bool) if masks is None else jnp.array(masks)

  def step(state, inputs):
    weights_T, state = weigh(weighting, gram, *inputs, state)
    return state, weights_T

  scan = jax.jit(lambda *xs: jax.lax.scan(step, weighting.init(3), xs)[1])
  return np.asarray(scan(losses, masks))


@pytest.mark.parametrize('weighting', WEIGHTINGS, ids=name_of)
def test_absent_tasks_and_what_is_not_finite(weighting):
  good, gone = [1.0, 2.0, 0.5], [1.0, np.nan, 0.5]
  masks = [[True] * 3, [True, False, True], [True] * 3, [True] * 3]
  weights = run(weighting, [good, gone, gone, good], masks)
  assert np.isfinite(weights[:2]).all()
  assert weights[1, 1] == 0
  assert np.isnan(weights[2]).all()  # Present and not a number: not hidden,
  assert np.isfinite(weights[3]).all()  # and forgotten afterwards.
  nothing = run(weighting, [good], [[False] * 3])
  np.testing.assert_array_equal(nothing, 0)


def test_the_inverse_loss_gives_the_gradient_of_the_logarithms():
  weights = run(InverseLoss(), [L])[0]
  np.testing.assert_allclose(weights, jax.grad(lambda x: jnp.log(x).sum())(L))
  np.testing.assert_allclose(weights @ L, 3, rtol=1e-6)
  floored = run(InverseLoss(floor=0.5), [[0.1, 1.0, 2.0]])[0]
  np.testing.assert_allclose(floored, [2, 1, 0.5])


def test_initial_losses_are_means_of_the_first_batches_with_the_task():
  losses = [[1.0, 2.0, 9.0], [3.0, 2.0, 4.0], [100.0, 100.0, 6.0], [7.0] * 3]
  masks = [[True, True, False], *[[True] * 3] * 3]
  weights = run(InitialLoss(steps=2), losses, masks)
  np.testing.assert_allclose(
    1 / weights[1:], [[2, 2, 4], [2, 2, 5], [2, 2, 5]], rtol=1e-6
  )
  np.testing.assert_allclose(weights[0], [1, 0.5, 0], rtol=1e-6)


def test_what_is_known_beforehand():
  p = jnp.array([7.0, 2.0, 1.0])
  np.testing.assert_allclose(prior_cross_entropy(p), 0.80181855, rtol=1e-6)
  np.testing.assert_allclose(initial_cross_entropy(3), 1.09861229, rtol=1e-8)
  y = jnp.array([[1.0, 2.0], [3.0, 2.0]])
  np.testing.assert_allclose(initial_squared_error(y), 9)
  np.testing.assert_allclose(prior_squared_error(y), 1)
  weights = run(ReferenceLoss((1.0, 2.0, 4.0)), [L])[0]
  np.testing.assert_allclose(weights, [1, 0.5, 0.25])


def test_dwa_waits_for_two_epochs():
  losses = [[4.0, 1.0, 1.0], [2.0, 1.0, 1.0], [1.0] * 3, [2.0] * 3, [9.0] * 3]
  weights = run(DWA(steps_per_epoch=2, temperature=1.0), losses)
  np.testing.assert_allclose(weights[:4], 1, rtol=1e-6)
  expected = np.exp([0.5, 1.5, 1.5])  # 1.5 / 3, and 1.5 / 1 twice
  np.testing.assert_allclose(weights[4], 3 * expected / expected.sum(), 1e-5)


def test_learned_scales_arrive_at_the_inverse_losses():
  steps = np.tile(L, (600, 1))
  uncertain = run(Uncertainty(learning_rate=0.05), steps)
  np.testing.assert_allclose(uncertain[0], 0.5)
  np.testing.assert_allclose(uncertain[-1], 0.5 / L, rtol=1e-2)
  scaled = run(IMTLL(learning_rate=0.05), steps)
  np.testing.assert_allclose(scaled[-1], 1 / L, rtol=1e-2)
  slope = jax.grad(imtl_l_loss, 1)(L, jnp.log(scaled[-1]))
  np.testing.assert_allclose(slope, 0, atol=0.02)


def test_gradnorm_with_alpha_0_makes_the_norms_equal():
  weights = run(GradNorm(alpha=0.0, learning_rate=0.02), np.ones((800, 3)))
  norms = weights[-1] * np.linalg.norm(G, axis=1)
  np.testing.assert_allclose(norms / norms.mean(), 1, atol=0.1)
  np.testing.assert_allclose(weights.sum(axis=1), 3, rtol=1e-5)
  behind = run(GradNorm(), [[1.0, 1.0, 1.0], *[[0.2, 1.0, 1.0]] * 100])
  assert behind[-1, 0] < behind[1, 0]  # What is ahead gets less.


def test_famo_by_its_loops():
  """In NumPy: softmax, normalisation, its Jacobian, decay, and Adam."""
  losses = np.random.default_rng(2).uniform(0.5, 4, size=(4, 3))
  famo = FAMO(learning_rate=0.1, decay=0.01)
  step = jax.jit(lambda s, x: weigh(famo, None, x, ALL, s))
  back = jax.jit(lambda s, x: look_back(famo, x, s))
  state, logits = famo.init(3), np.zeros(3)
  first, second = np.zeros(3), np.zeros(3)
  for t, before in enumerate(losses[:3]):
    after = losses[t + 1]
    z = np.exp(logits) / np.exp(logits).sum()
    weights, state = step(state, jnp.asarray(before, jnp.float32))
    expected = (z / before) / (z / before).sum()
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    state = back(state, jnp.asarray(after, jnp.float32))
    jacobian = np.diag(z) - np.outer(z, z)
    slope = jacobian @ np.log(before / after) + 0.01 * logits
    first = 0.9 * first + 0.1 * slope
    second = 0.999 * second + 0.001 * slope**2
    m, v = first / (1 - 0.9 ** (t + 1)), second / (1 - 0.999 ** (t + 1))
    logits = logits - 0.1 * m / (np.sqrt(v) + 1e-8)
    np.testing.assert_allclose(state.learned.value_T, logits, rtol=1e-4)
  kept = back(state, jnp.array([1.0, jnp.inf, 1.0]))
  np.testing.assert_array_equal(kept.learned.value_T, state.learned.value_T)


def test_famo_lets_all_losses_fall_at_one_rate():
  """Then its shares are the weights of MGDA on the logarithms."""
  k = jnp.array([1.0, 2.0])  # Slopes of the logarithms, orthogonal.
  losses = lambda x: jnp.exp(-k * x)
  famo = FAMO(decay=0.0)

  def step(carry, _):
    x, state = carry
    weights, state = famo(losses(x), jnp.ones(2, bool), state)
    direction = weights * k * losses(x)
    new = x + 0.01 * direction / (weights * losses(x)).sum()
    state = look_back(famo, losses(new), state)
    return (new, state), k * (new - x)

  run = jax.jit(lambda c: jax.lax.scan(step, c, length=600))
  (_, state), falls = run((jnp.zeros(2), famo.init(2)))
  np.testing.assert_allclose(falls[0], [0.005, 0.02], rtol=1e-3)
  np.testing.assert_allclose(falls[-1, 0], falls[-1, 1], rtol=0.02)
  shares = jax.nn.softmax(state.learned.value_T)
  expected = min_norm_weights(jnp.diag(k**2))
  np.testing.assert_allclose(shares, expected, atol=0.01)


def test_softmax_descent_arrives_where_mgda_is():
  g = np.array([[2.0, 0.0], [-1.0, 1.0], [3.0, 3.0]])
  gram = jnp.asarray(g @ g.T, jnp.float32)
  weighting = SoftmaxMGDA(learning_rate=2.0, steps=3)
  weights = run(weighting, np.ones((300, 3)), gram=gram)
  np.testing.assert_allclose(weights[-1], [0.4, 0.6, 0], atol=2e-3)
  scaled = run(weighting, np.ones((2, 3)), gram=1e6 * gram)
  np.testing.assert_allclose(scaled, weights[:2], rtol=1e-4)


def test_unit_gradients_have_norm_one_and_may_conflict_in_threes():
  weights = run(UnitGradients(), [L])[0]
  np.testing.assert_allclose(
    np.linalg.norm(weights[:, None] * G, axis=1), 1, 1e-5
  )
  assert np.linalg.norm(weights @ G) <= 3
  g = np.array([[1.0, 0.0], [-0.6, 0.8], [-0.6, -0.8]])
  u = run(UnitGradients(), [L], gram=jnp.asarray(g @ g.T, jnp.float32))[0] @ g
  np.testing.assert_allclose(u, [-0.2, 0], atol=1e-6)


@pytest.mark.parametrize('by', ['l2', 'loss', 'loss+'])
def test_normalised_weightings_combine_what_they_see(by):
  size = {'l2': 1, 'loss': np.asarray(L), 'loss+': np.asarray(L)}[by]
  if by != 'loss':
    size = size * np.linalg.norm(G, axis=1)
  scaled = G / size[:, None]
  expected = min_norm_weights(jnp.asarray(scaled @ scaled.T, jnp.float32))
  weights = run(Normalized(MGDA(), by), [L])[0]
  np.testing.assert_allclose(weights * size, expected, atol=1e-5)


def test_normalised_mgda_ignores_scales_and_balances_tiny_gradients():
  g = np.array([[1.0, 0.2], [-0.3, 0.8], [0.4, 0.5], [0.002, 0.004]])
  alone = min_norm_weights(jnp.asarray(g @ g.T, jnp.float32))
  assert alone[3] > 0.95
  mask = jnp.ones(4, bool)
  for c in (1.0, 1e4):
    scaled = g * np.array([[1], [1], [c], [1]])
    gram = jnp.asarray(scaled @ scaled.T, jnp.float32)
    weights, _ = weigh(Normalized(), gram, jnp.ones(4), mask, ())
    u = np.asarray(weights) @ scaled
    cosines = g @ u / np.linalg.norm(g, axis=1)
    assert (cosines >= u @ u - 1e-5).all()
    assert np.linalg.norm(weights * np.linalg.norm(scaled, axis=1)) < 1
    if c == 1.0:
      first = u
  np.testing.assert_allclose(u, first, rtol=1e-4)


def test_orders_of_surgery_change_from_step_to_step():
  weights = run(PCGrad(), np.ones((12, 3)))
  again = run(PCGrad(), np.ones((12, 3)))
  np.testing.assert_array_equal(weights, again)
  assert len(np.unique(weights.round(4), axis=0)) > 1


def test_cagrad_of_the_authors_is_shorter():
  ours, theirs = (run(CAGrad(0.5, r), [L])[0] for r in (False, True))
  np.testing.assert_allclose(ours / 1.25, theirs, rtol=1e-6)


def test_dbmtl_by_its_loops():
  combination = DBMTL(decay=0.8, power=0.5)
  rng = np.random.default_rng(1)
  gradients = rng.normal(size=(3, 2, 4))
  losses = rng.uniform(1, 3, size=(3, 2))
  state = combination.init(2, {'w_D': jnp.zeros(4)})
  average = np.zeros((2, 4))
  for t in range(3):
    stacked = {'w_D': jnp.asarray(gradients[t], jnp.float32)}
    arguments = jnp.asarray(losses[t], jnp.float32), jnp.ones(2, bool)
    update, weights, state = combination(stacked, *arguments, state)
    log_gradient = gradients[t] / losses[t][:, None]
    beta = 0.8 / (t + 1) ** 0.5
    average = log_gradient + beta * (average - log_gradient)
    norms = np.linalg.norm(average, axis=1)
    np.testing.assert_allclose(weights, norms.max() / norms, rtol=1e-5)
    expected = (average * (norms.max() / norms)[:, None]).sum(axis=0)
    np.testing.assert_allclose(update['w_D'], expected, rtol=1e-4)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: InitialLoss(0), 'steps must be at least 1, got 0'),
    (lambda: ReferenceLoss((1.0, 0.0)), 'losses must be positive'),
    (lambda: ReferenceLoss((1.0,)).init(2), 'has 1 losses for 2 tasks'),
    (lambda: DWA(0), 'steps_per_epoch must be at least 1'),
    (lambda: SoftmaxMGDA(steps=0), 'steps must be at least 1, got 0'),
    (lambda: aggregate_tasks(FAMO(), 2), 'multitask_value_and_grad and look_b'),
    (lambda: Primary(3).init(3), 'no task 3 among 3'),
    (lambda: Hybrid(4).init(3), 'primaries must be 1 to 3'),
    (lambda: Normalized(MGDA(), 'l1'), "'l2', 'loss' or 'loss\\+', got 'l1'"),
    (lambda: GradDrop(leak=2), r'leak must lie in \[0, 1\], got 2'),
  ],
)
def test_wrong_options_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
