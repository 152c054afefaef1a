"""Weights handed out, and what is measured of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.ops import AttentionDiagnostics
from jaxformers.ops import Causal
from jaxformers.ops import ConstantScale
from jaxformers.ops import InverseSqrt
from jaxformers.ops import LogLength
from jaxformers.ops import ReRoPE
from jaxformers.ops import Rotary
from jaxformers.ops import Segments
from jaxformers.ops import Window
from jaxformers.ops import attend
from jaxformers.ops import attention_diagnostics
from jaxformers.ops import attention_weights

B, L, H, G, K = 2, 9, 4, 2, 6
IDS = np.array([[1] * 3 + [2] * 4 + [0] * 2, [3] * 9], np.int32)


def arrays(length=L, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  return tuple(
    jax.random.normal(key, (B, length, heads, K), dtype)
    for key, heads in zip(keys, (H, G, G), strict=True)
  )


OPTIONS = {
  'packed': dict(mask=Causal() & Segments(IDS, IDS), position=Rotary()),
  'scaled': dict(
    mask=Window(4), position=ReRoPE(2), scale=InverseSqrt() * LogLength(8, 1)
  ),
  'biased': dict(bias=np.sin(np.arange(L * L, dtype='f4')).reshape(1, 1, L, L)),
  'biased by key': dict(bias=np.arange(L, dtype='f4').reshape(1, 1, 1, L)),
}


@pytest.mark.parametrize('name', OPTIONS)
def test_weights_are_those_that_attention_gives_to_values(name):
  query, key, value = arrays()
  rows = np.array([7, 0, 3])

  @jax.jit
  def both(query, key, value):
    return (
      attend(query, key, value, implementation='xla', **OPTIONS[name]),
      attention_weights(query, key, **OPTIONS[name]),
      attention_weights(query, key, rows=rows, **OPTIONS[name]),
    )

  out, all_rows, some = both(query, key, value)
  expected = np.einsum(
    'bhlm,bmhv->blhv', all_rows.weights, np.repeat(value, H // G, axis=2)
  )
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
  visible = np.broadcast_to(all_rows.is_visible, all_rows.weights.shape)
  assert (np.asarray(all_rows.weights)[~visible] == 0).all()
  logits = np.where(visible, all_rows.logits, -np.inf)
  with np.errstate(divide='ignore'):
    normalizer = np.log(np.exp(logits).sum(axis=-1))
  np.testing.assert_allclose(all_rows.log_normalizer, normalizer, rtol=1e-5)
  for whole, part in zip(all_rows, some, strict=True):
    np.testing.assert_allclose(
      part, np.asarray(whole)[:, :, rows], rtol=1e-6, atol=1e-6
    )


@jax.jit
def unscaled(query, key):
  return attention_diagnostics(query, key, scale=ConstantScale(1.0))


def row_of(p):
  """A query and keys whose weights are p; scores log(p) + 1."""
  query = jnp.ones((1, 1, 1, 2))
  score = jnp.asarray(np.log(p) + 1, jnp.float32)
  return query, jnp.stack([score, 0 * score], axis=-1)[None, :, None]


def test_the_measures_of_a_row_of_halves_and_quarters():
  query, key = row_of([0.5, 0.25, 0.125, 0.125])
  actual = unscaled(query, key)
  log_2 = math.log(2)
  gamma = log_2 * math.sqrt(((1.25) ** 2 + 0.25**2 + 2 * 0.75**2) / 4)
  expected = AttentionDiagnostics(
    visible_keys=4,
    entropy=1.2130075660,
    relative_entropy=0.875,
    concentration=0.8528028654,
    effective_support=2.9090909091,
    max_weight=0.5,
    top_k_mass=1,
    beta=1 - 2.25 * log_2,
    gamma=gamma,
    softmax_concentration=math.exp(-(gamma**2) / 2),
    jacobian_l1=1 - 0.34375,
  )
  for found, number in zip(actual, expected, strict=True):
    assert found.shape == (1,)
    np.testing.assert_allclose(found[0], number, rtol=1e-5)


def test_the_largest_eight_of_sixteen_equal_weights_are_half():
  query, key = row_of([1 / 16] * 16)
  actual = unscaled(query, key)
  np.testing.assert_allclose(actual.top_k_mass, 0.5, rtol=1e-6)
  np.testing.assert_allclose(actual.relative_entropy, 1, rtol=1e-6)


def packed_and_alone(query, key):
  """Measures two packed segments, and each alone."""

  def measured(part, mask=Causal()):
    options = dict(mask=mask, position=Rotary())
    return attention_diagnostics(query[:1, part], key[:1, part], **options)

  packed = measured(slice(None), Causal() & Segments(IDS[:1], IDS[:1]))
  return packed, [measured(slice(3)), measured(slice(3, 7))]


def test_rows_without_a_choice_and_padding_do_not_count():
  packed, alone = jax.jit(packed_and_alone)(*arrays()[:2])
  # Rows see 1 .. 3 and 1 .. 4 keys; those that see 1 are left out.
  np.testing.assert_allclose(packed.visible_keys, 14 / 5, rtol=1e-6)
  for found, first, second in zip(packed, *alone, strict=True):
    expected = (2 * first + 3 * second) / 5
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_of_many_queries_sixty_four_are_looked_at_in_memory_of_their_size():
  length = 300
  query, key, _ = arrays(length)
  program = jax.jit(
    lambda query, key: attention_diagnostics(query, key, mask=Causal())
  )
  text = str(jax.make_jaxpr(program)(query, key))
  assert f'{length},{length}' not in text
  assert f'[{B},{H},64,{length}]' in text
  sampled = program(query, key)
  mean = sampled.visible_keys
  assert (np.abs(mean - (length + 1) / 2) < 25).all()


def test_measures_are_float32_pass_no_gradient_and_are_0_without_a_choice():
  query, key, _ = arrays(dtype=jnp.bfloat16)
  # One row sees nothing, in the other each token sees itself.
  ids = jnp.stack([jnp.zeros(L, jnp.int32), jnp.arange(L)])
  hidden = Segments(ids, ids)
  measured = jax.jit(attention_diagnostics)(query, key, mask=hidden)
  for measure in measured:
    assert measure.dtype == jnp.float32
    assert (measure == 0).all()

  def total(query, key, scale):
    measures = attention_diagnostics(query, key, scale=ConstantScale(scale))
    return sum(m.sum() for m in measures)

  gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(query, key, 0.5)
  assert not any(g.any() for g in jax.tree.leaves(gradients))
