"""Attention rows of prescribed entropy."""

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from jaxformers.ops import Causal
from jaxformers.ops import ConstantScale
from jaxformers.ops import EntropyNormalizedSoftmax
from jaxformers.ops import InverseSqrt
from jaxformers.ops import Rotary
from jaxformers.ops import Segments
from jaxformers.ops import attend
from jaxformers.ops import attention_weights
from jaxformers.ops import entropy_multiplier

B, L, H, G, K = 2, 8, 4, 2, 6
IDS = np.array([[1] * 8, [3] * 5 + [0] * 3], np.int32)
OPTIONS = dict(mask=Causal() & Segments(IDS, IDS), position=Rotary())
# How many keys each row of the batch sees.
COUNTS = np.array([[*range(1, 9)], [1, 2, 3, 4, 5, 0, 0, 0]])


def arrays(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  return tuple(
    jax.random.normal(key, (B, L, heads, K), dtype)
    for key, heads in zip(keys, (H, G, G), strict=True)
  )


def solved(score, target):
  """gamma by bisection on its logarithm, in float64."""
  low, high = -20.0, 20.0
  for _ in range(200):
    middle = (low + high) / 2
    z = np.exp(middle) * (score - score.max())
    p = np.exp(z) / np.exp(z).sum()
    entropy = -(p[p > 0] @ np.log(p[p > 0]))
    low, high = (middle, high) if entropy > target else (low, middle)
  return np.exp(low), p


@pytest.mark.parametrize(
  ('kind', 'target'),
  [
    (EntropyNormalizedSoftmax(1.0), lambda n: 1.0),
    (EntropyNormalizedSoftmax(0.6, relative=True), lambda n: 0.6 * np.log(n)),
  ],
)
def test_every_row_has_its_entropy_as_found_by_bisection(kind, target):
  with jax.enable_x64(True):
    query, key, value = arrays(jnp.float64)

    @jax.jit
    def run(query, key, value):
      options = OPTIONS | dict(implementation='xla')
      return (
        attend(query, key, value, kind=kind, statistics=True, **options),
        attention_weights(query, key, **OPTIONS).logits,
        entropy_multiplier(query, key, kind, **OPTIONS),
      )

    result, logits, gamma = run(query, key, value)
    value = np.repeat(value, H // G, axis=2)
    for b, h, i in np.ndindex(B, H, L):
      n = COUNTS[b, i]
      if n == 0:
        assert (result.out[b, i, h] == 0).all()
        assert result.log_normalizer[b, i, h] == -np.inf
        continue
      score = np.asarray(logits[b, h, i, :n])
      if target(n) < np.log(n):
        multiplier, p = solved(score, target(n))
        np.testing.assert_allclose(result.entropy[b, i, h], target(n))
      else:  # more than n keys can have, or just one key
        multiplier, p = float(n == 1), np.ones(n) / n
      np.testing.assert_allclose(gamma[b, h, i], multiplier, rtol=1e-7)
      np.testing.assert_allclose(
        result.out[b, i, h], p @ value[b, :n, h], rtol=1e-7, atol=1e-9
      )
      np.testing.assert_allclose(
        result.log_normalizer[b, i, h],
        np.log(np.exp(multiplier * score).sum()),
        rtol=1e-7,
        atol=1e-9,
      )


def test_the_multiplier_gives_any_implementation_the_entropy():
  query, key, value = arrays()
  kind = EntropyNormalizedSoftmax(0.7, relative=True)

  @jax.jit
  def both(query, key, value):
    gamma = entropy_multiplier(query, key, kind, **OPTIONS)
    scale = InverseSqrt() * ConstantScale(gamma)
    return (
      attend(query, key, value, kind=kind, **OPTIONS),
      attend(
        query,
        key,
        value,
        scale=scale,
        implementation='blockwise',
        block=5,
        **OPTIONS,
      ),
    )

  np.testing.assert_allclose(*both(query, key, value), rtol=1e-4, atol=1e-5)


def test_multiplying_the_scores_changes_nothing():
  kind = EntropyNormalizedSoftmax(0.8)
  run = jax.jit(lambda *x, c: attend(*x, kind=kind, scale=ConstantScale(c)))
  np.testing.assert_allclose(
    run(*arrays(), c=7.0), run(*arrays(), c=0.02), rtol=1e-3, atol=1e-4
  )


def test_gradients_are_those_of_finite_differences():
  with jax.enable_x64(True):
    kind = EntropyNormalizedSoftmax(0.6, relative=True)
    ids = jnp.asarray(IDS[1:, :6])
    options = dict(mask=Causal() & Segments(ids, ids), position=Rotary())
    inputs = tuple(x[:1, :6] for x in arrays(jnp.float64))
    run = jax.jit(lambda *x: attend(*x, kind=kind, **options))
    check_grads(run, inputs, order=1, modes='rev', atol=1e-5, rtol=1e-5)


def test_uniform_and_single_rows_pass_no_gradient_to_scores():
  kind = EntropyNormalizedSoftmax(5.0)  # more than log 8
  query, key, value = arrays()
  gradients = jax.jit(
    jax.grad(
      lambda q, k, v: jnp.sin(attend(q, k, v, kind=kind, mask=Causal())).sum(),
      argnums=(0, 1, 2),
    )
  )(query, key, value)
  assert (gradients[0] == 0).all()
  assert (gradients[1] == 0).all()
  assert (gradients[2] != 0).all()


def test_tied_maxima_share_the_weight_and_stay_finite():
  query = jnp.ones((1, 1, 1, 1))
  key = jnp.array([1.0, 1.0, 0.0, -1.0])[None, :, None, None]
  value = jnp.eye(4)[None, :, None]
  kind = EntropyNormalizedSoftmax(0.5)  # below log 2
  out = jax.jit(lambda *x: attend(*x, kind=kind))(query, key, value)
  np.testing.assert_allclose(out[0, 0, 0], [0.5, 0.5, 0, 0], atol=1e-6)
  gamma = jax.jit(lambda *x: entropy_multiplier(*x, kind))(query, key)
  assert np.isinf(gamma).all()


@pytest.mark.parametrize(
  ('target', 'relative'),
  [(0.0, False), (-1.0, False), (1.0, True), (0.0, True)],
)
def test_targets_without_a_meaning_are_refused(target, relative):
  with pytest.raises(ValueError, match=r'target > 0 in nats.*between 0 and 1'):
    EntropyNormalizedSoftmax(target, relative)


def test_blockwise_says_that_it_cannot():
  with pytest.raises(ValueError, match='additive kinds only, not Entropy'):
    attend(
      *arrays(),
      kind=EntropyNormalizedSoftmax(1.0),
      implementation='blockwise',
    )
