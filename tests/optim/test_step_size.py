"""Learnt step sizes against hand-computed numbers and NumPy."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformers.optim import AdamW
from jaxformers.optim import AdaptStepSize
from jaxformers.optim import Constant
from jaxformers.optim import FromOptax
from jaxformers.optim import adapt_gains
from jaxformers.optim import adapt_scale
from jaxformers.optim import adapt_step_size
from jaxformers.optim.optimizer import weight_decay_mask
from jaxformers.train.record import from_record
from jaxformers.train.record import known_classes
from jaxformers.train.record import to_record

START = np.array([1.0, -2.0])
GRADIENTS = np.array([[0.5, -1.0], [0.4, 0.2], [-0.3, 0.6]])


def momentum(rate=0.1, mu=0.9):
  return optax.chain(optax.scale(rate), optax.trace(mu), optax.scale(-1.0))


def run(transform, params, gradients):
  """Returns parameters and state after each step, stacked, in float64."""
  with jax.enable_x64(True):
    params, gradients = jax.tree.map(jnp.asarray, (params, gradients))

    def step(carry, gradient):
      params, state = carry
      updates, state = transform.update(gradient, state, params)
      params = optax.apply_updates(params, updates)
      return (params, state), (params, state)

    @jax.jit
    def scan(params, state):
      return jax.lax.scan(step, (params, state), gradients)[1]

    return jax.tree.map(np.asarray, scan(params, transform.init(params)))


def near(actual, expected, tolerance=1e-8):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def test_the_published_recursion_by_hand():
  transform = adapt_step_size(momentum(), 0.1, 0.05)
  params, state = run(transform, START, GRADIENTS)
  near(np.exp(state.log_scale), [1, 1, 0.95554401])
  near(np.exp(state.inner.log_gain[-1]), [1, 0.81873075])
  near(params[-1], [0.81274253, -1.81320070])


def test_the_raw_recursion_by_hand():
  transform = adapt_step_size(
    momentum(), 0.1, 0.05, gain_mode='raw', scale_mode='raw'
  )
  params, state = run(transform, START, GRADIENTS)
  near(np.exp(state.log_scale[-1]), 0.99660677)
  near(np.exp(state.inner.log_gain[-1]), [1.00660064, 0.95876885])
  near(params[-1], [0.81732230, -1.82379346])


def test_without_average_the_gains_multiply_successive_gradients():
  transform = adapt_gains(optax.sgd(0.1), 0.1, beta=0.0, mode='raw')
  params, state = run(transform, START, GRADIENTS)
  products = GRADIENTS[1:] * GRADIENTS[:-1]
  gains = np.exp(0.1 * np.cumsum(np.pad(products, ((1, 0), (0, 0))), axis=0))
  near(np.exp(state.log_gain), gains, 1e-14)
  near(gains[-1], [1.00803209, 0.99203191])
  near(params[-1], START - 0.1 * (gains * GRADIENTS).sum(axis=0), 1e-14)
  near(params[-1], [0.93943291, -1.97912589])


class Inner:
  """Inner optimisers in NumPy: return the step that is subtracted."""

  def __init__(self, kind):
    self.kind, self.m, self.v, self.t = kind, 0.0, 0.0, 0

  def __call__(self, g):
    self.t += 1
    if self.kind == 'momentum':
      self.m = 0.9 * self.m + 0.1 * g
      return self.m
    self.m = 0.9 * self.m + 0.1 * g
    self.v = 0.99 * self.v + 0.01 * g * g
    m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.99**self.t)
    return 0.1 * m / (np.sqrt(v) + 1e-8)


INNER = {'momentum': momentum, 'adam': lambda: optax.adam(0.1, b2=0.99)}


def recursion(kind, params, gradients, options):
  """The recursion for a list of tensors, in NumPy and as it is written."""
  count = len(params)
  inner = [Inner(kind) for _ in range(count)]
  p, m = [np.ones_like(x) for x in params], [np.zeros_like(x) for x in params]
  h, s = [np.zeros_like(x) for x in params], np.ones(count)
  raw = options['mode'] == 'raw'
  for t in range(len(gradients[0])):
    g = [gradient[t] for gradient in gradients]
    dots = np.array([(a * b).sum() for a, b in zip(g, h, strict=True)])
    g2 = np.array([(a * a).sum() for a in g])
    h2 = np.array([(b * b).sum() for b in h])
    if options['scope'] == 'global':
      dots, g2, h2 = (np.full(count, x.sum()) for x in (dots, g2, h2))
    if not raw:
      dots = dots / ((np.sqrt(g2) + 1e-10) * (np.sqrt(h2) + 1e-10))
    s = np.clip(s * np.exp(options['scale_lr'] * dots), 0.9, 1.05)
    for i in range(count):
      a = g[i] * m[i] / (1 - 0.8 ** max(t, 1)) if raw else np.sign(g[i] * m[i])
      p[i] = p[i] ** (1 - options['decay']) * np.exp(options['gain_lr'] * a)
      p[i] = np.clip(p[i], 0.7, 1.2)
      if options['placement'] == 'pre':
        h[i], direction = inner[i](p[i] * g[i]), g[i]
      else:
        direction = inner[i](g[i])
        h[i] = p[i] * direction
      m[i] = 0.8 * m[i] + 0.2 * direction
      params[i] = params[i] - s[i] * h[i]
  return params, p, s


@pytest.mark.parametrize(
  ('kind', 'mode', 'scope', 'placement'),
  [
    ('momentum', 'normalised', 'tensor', 'pre'),
    ('momentum', 'raw', 'global', 'pre'),
    ('adam', 'normalised', 'global', 'post'),
    ('adam', 'raw', 'tensor', 'post'),
  ],
)
def test_all_options_by_numpy(kind, mode, scope, placement):
  rng = np.random.default_rng(0)
  shapes = {'a': (3,), 'b': (2, 4)}
  params = {n: rng.normal(size=shape) for n, shape in shapes.items()}
  gradients = {n: rng.normal(size=(40, *x)) + 0.3 for n, x in shapes.items()}
  transform = adapt_step_size(
    INNER[kind](),
    0.05,
    0.1,
    beta=0.8,
    gain_bounds=(0.7, 1.2),
    scale_bounds=(0.9, 1.05),
    gain_mode=mode,
    scale_mode=mode,
    scope=scope,
    gain_placement=placement,
    gain_decay=0.1,
  )
  seen, state = run(transform, params, gradients)
  options = {
    'mode': mode, 'scope': scope, 'placement': placement, 'decay': 0.1,
    'gain_lr': 0.05, 'scale_lr': 0.1,
  }  # fmt: skip
  expected, gains, scales = recursion(
    kind, list(params.values()), list(gradients.values()), options
  )
  for i, name in enumerate(shapes):
    near(seen[name][-1], expected[i], 1e-12)
    near(np.exp(state.inner.log_gain[name][-1]), gains[i], 1e-12)
    scale = state.log_scale if scope == 'global' else state.log_scale[name]
    near(np.exp(scale[-1]), scales[i], 1e-12)
  assert np.unique(np.concatenate([g.ravel() for g in gains])).size > 2


def test_without_learning_rates_it_is_the_inner_optimiser():
  adam = optax.adam(0.1)
  for transform in (
    adapt_step_size(adam, 0.0, 0.0),
    adapt_step_size(adam, 0.0, 0.0, scope='global', gain_placement='post'),
    adapt_step_size(adam, None, None),
  ):
    params, _ = run(transform, START, GRADIENTS)
    np.testing.assert_array_equal(params, run(adam, START, GRADIENTS)[0])


def test_scales_alone_keep_one_tree_and_gains_alone_two():
  params = {'w': jnp.ones((2, 3)), 'b': jnp.ones(3)}
  inner = optax.sgd(0.1)

  def numbers(transform):
    return sum(x.size for x in jax.tree.leaves(transform.init(params)))

  scales, gains, count = 2, 2 * 9, 1
  assert numbers(adapt_step_size(inner, None)) == scales + 9
  assert numbers(adapt_step_size(inner, scale_lr=None)) == count + gains
  assert numbers(adapt_step_size(inner)) == scales + 9 + count + gains
  one = adapt_step_size(inner, None, scope='global').init(params)
  assert one.log_scale.shape == ()


def test_scales_and_gains_stay_within_bounds():
  gradients = np.concatenate([np.ones((40, 2)), -np.ones((1, 2))])
  for mode in ('normalised', 'raw'):
    for signs in (1, (-1.0) ** np.arange(41)[:, None]):
      transform = adapt_step_size(
        optax.sgd(0.1),
        1.0,
        1.0,
        gain_bounds=(0.5, 3.0),
        scale_bounds=(0.25, 2.0),
        gain_mode=mode,
        scale_mode=mode,
      )
      _, state = run(transform, START, signs * gradients)
      for log, low, high in (
        (state.inner.log_gain, 0.5, 3.0),
        (state.log_scale, 0.25, 2.0),
      ):
        assert np.exp(log).min() >= low * (1 - 1e-12)
        assert np.exp(log).max() <= high * (1 + 1e-12)


def test_the_first_step_is_that_of_the_inner_optimiser():
  params, state = run(adapt_step_size(momentum(), 9.0, 9.0), START, GRADIENTS)
  near(params[0], START - 0.1 * GRADIENTS[0], 1e-15)
  assert state.log_scale[0] == 0
  assert not state.inner.log_gain[0].any()


def test_normalised_step_sizes_do_not_depend_on_the_size_of_gradients():
  transform = adapt_step_size(optax.sgd(1.0), 0.1, 0.1)
  _, state = run(transform, START, GRADIENTS)
  _, large = run(transform, START, 1e3 * GRADIENTS)
  near(large.log_scale, state.log_scale, 1e-8)
  near(large.inner.log_gain, state.inner.log_gain, 1e-15)


def test_permuted_entries_get_permuted_steps():
  rng = np.random.default_rng(5)
  order, gradients = rng.permutation(6), rng.normal(size=(20, 6))
  transform = adapt_step_size(momentum(), 0.1, 0.1)
  start = rng.normal(size=6)
  params, _ = run(transform, start, gradients)
  permuted, _ = run(transform, start[order], gradients[:, order])
  near(permuted, params[:, order], 1e-12)


def test_gains_before_adam_are_undone_and_after_it_are_not():
  gradients = np.ones((60, 2))
  steps = {}
  for placement in ('pre', 'post'):
    transform = adapt_gains(
      optax.adam(0.1, b2=0.9), 0.1, bounds=(0.1, 4.0), placement=placement
    )
    params, state = run(transform, START, gradients)
    near(np.exp(state.log_gain[-1]), 4, 1e-12)
    steps[placement] = (params[-2] - params[-1]) / 0.1
  near(steps['pre'], 1, 0.02)
  near(steps['post'], 4, 1e-6)


def test_accumulators_may_be_narrow():
  params = {'w': jnp.ones(3)}
  transform = adapt_step_size(optax.sgd(0.1), accumulator_dtype=jnp.bfloat16)
  state = transform.init(params)
  _, after = transform.update(params, state, params)
  for one in (state, after):
    assert one.previous['w'].dtype == jnp.bfloat16
    assert one.inner.average['w'].dtype == jnp.bfloat16
    assert one.inner.log_gain['w'].dtype == jnp.float32


def test_the_inner_optimiser_gets_all_extra_arguments():
  def update(updates, state, params=None, *, factor, **extra_args):
    del params, extra_args
    return jax.tree.map(lambda u: factor * u, updates), state

  inner = optax.GradientTransformationExtraArgs(
    lambda _: optax.EmptyState(), update
  )
  transform = adapt_step_size(inner)
  params = jnp.ones(2)
  updates, _ = transform.update(
    params, transform.init(params), params, factor=7.0, value=1.0
  )
  np.testing.assert_array_equal(updates, 7)


PARAMS = {'w_DF': np.array([[1.0, 2.0]]), 'b_F': np.array([3.0, 4.0])}
SLOPES = {'w_DF': np.ones((3, 1, 2)), 'b_F': np.ones((3, 2))}


def test_an_experiment_clips_before_and_decays_after():
  adamw = AdamW(Constant(0.1), weight_decay=0.5, max_gradient_norm=0.5)
  adapted = AdaptStepSize(adamw, gain_lr=0.5, scale_lr=0.5)
  # The same by hand: clipping, adaptation of Adam alone, then the decay.
  by_hand = optax.chain(
    optax.clip_by_global_norm(0.5),
    adapt_step_size(optax.adam(0.1, b2=0.95), 0.5, 0.5, gain_placement='post'),
    optax.add_decayed_weights(-0.1 * 0.5, weight_decay_mask),
  )
  seen, _ = run(adapted.build(3), PARAMS, SLOPES)
  expected, _ = run(by_hand, PARAMS, SLOPES)
  for name in PARAMS:
    near(seen[name], expected[name], 1e-7)


def test_an_experiment_without_adaptation_is_its_optimiser():
  for optimizer in (
    AdamW(Constant(0.1), weight_decay=0.5, max_gradient_norm=0.5),
    FromOptax('sgd', Constant(0.1)),
  ):
    adapted = AdaptStepSize(optimizer, None, None)
    seen, _ = run(adapted.build(3), PARAMS, SLOPES)
    expected, _ = run(optimizer.build(3), PARAMS, SLOPES)
    for name in PARAMS:
      near(seen[name], expected[name], 1e-7)
    assert adapted.learning_rate == Constant(0.1)
    assert from_record(to_record(adapted), known_classes()) == adapted


def test_an_experiment_has_all_options_with_their_defaults():
  options = inspect.signature(adapt_step_size).parameters
  fields = {f.name: f.default for f in dataclasses.fields(AdaptStepSize)}
  assert list(fields)[1:] == list(options)[1:]
  differing = [n for n in list(fields)[1:] if fields[n] != options[n].default]
  assert differing == ['gain_placement']


def test_bad_options_are_named():
  inner = optax.sgd(0.1)
  for options, message in (
    ({'mode': 'sign'}, "mode must be one of .*'raw'.*, got 'sign'"),
    ({'scope': 'leaf'}, "scope must be one of .*'global'.*, got 'leaf'"),
    ({'scale_lr': -1.0}, 'scale_lr must not be negative, got -1'),
    ({'bounds': (2.0, 1.0)}, r'0 < low <= 1 <= high, got \(2.0, 1.0\)'),
  ):
    with pytest.raises(ValueError, match=message):
      adapt_scale(inner, **options)
  for options, message in (
    ({'placement': 'after'}, "placement must be one of .*, got 'after'"),
    ({'beta': 1.0}, r'beta must lie in \[0, 1\), got 1.0'),
    ({'decay': -0.1}, r'decay must lie in \[0, 1\), got -0.1'),
    ({'bounds': (0.0, 1.0)}, 'scales and gains start at 1'),
  ):
    with pytest.raises(ValueError, match=message):
      adapt_gains(inner, **options)
