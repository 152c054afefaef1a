"""Cosine scores and their multipliers, fixed and learned."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import nn
from jaxformers.nn.mixers import Attention
from jaxformers.ops import ConstantScale
from jaxformers.ops import NoMask
from jaxformers.ops import cosine_optimal_scale
from jaxformers.train.record import from_record
from jaxformers.train.record import known_classes
from jaxformers.train.record import to_record

H, K = 2, 4
X = jax.random.normal(jax.random.key(1), (1, 7, 8))


def cosine(scale):
  return Attention(
    num_heads=H,
    head_dim=K,
    mask=NoMask(),
    qk_norm=nn.UnitNorm(eps=0.0),
    scale=scale,
  )


def reference(params, scale_H):
  """Attention with cosine scores, head by head, in float64."""
  x = np.asarray(X[0], np.float64)
  out = 0
  for h, scale in enumerate(scale_H):
    query, key, value = (
      x @ np.asarray(params[name][leaf][:, h], np.float64)
      for name, leaf in (
        ('query', 'w_DHK'), ('key', 'w_DGK'), ('value', 'w_DGK'),
      )
    )  # fmt: skip
    query /= np.linalg.norm(query, axis=-1, keepdims=True)
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    powers = np.exp(scale * query @ key.T)
    mixed = powers @ value / powers.sum(axis=-1, keepdims=True)
    out += mixed @ np.asarray(params['out']['w_HKD'][h], np.float64)
  return out


def test_cosine_attention_with_the_scale_of_the_largest_gradient():
  scale = cosine_optimal_scale(64, 32)
  np.testing.assert_allclose(scale, 10.2495, atol=5e-5)
  mixer = cosine(ConstantScale(scale))
  y, variables = jax.jit(mixer.init_with_output)(jax.random.key(0), X)
  expected = reference(variables['params'], [scale] * H)
  np.testing.assert_allclose(y[0][0], expected, rtol=1e-4, atol=1e-5)


def test_a_learned_cosine_scale_starts_as_told_and_is_one_per_head():
  mixer = cosine(nn.LearnedCosineScale())
  params = jax.jit(mixer.init)(jax.random.key(0), X)['params']
  t_H = params['score']['log_scale_H']
  np.testing.assert_allclose(t_H, [math.log(10)] * H, rtol=1e-6)

  @jax.jit
  def run(t_H):
    own = {**params, 'score': {'log_scale_H': t_H}}
    y, _ = mixer.apply({'params': own}, X)
    return (y**2).sum(), y[0]

  # The second head is beyond the bound, and has no gradient there.
  t_H = jnp.array([math.log(3.0), math.log(500.0)])
  (_, y), gradient = jax.value_and_grad(run, has_aux=True)(t_H)
  np.testing.assert_allclose(
    y, reference(params, [3.0, 100.0]), rtol=1e-4, atol=1e-5
  )
  assert gradient[0] != 0
  assert gradient[1] == 0


def test_a_learned_cosine_scale_is_part_of_the_configuration():
  mixer = cosine(nn.LearnedCosineScale(start=20.0))
  assert from_record(to_record(mixer), known_classes()) == mixer


@pytest.mark.parametrize('start', [0.0, 100.0, -1.0])
def test_a_start_out_of_bounds_is_refused(start):
  with pytest.raises(ValueError, match='0 < start < largest, got start='):
    nn.LearnedCosineScale(start).init(jax.random.key(0), H)
