"""Stacks of layers: patterns, remat, converters, compile time, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.nn import Block
from jaxformers.nn import FeedForward
from jaxformers.nn import GatedFeedForward
from jaxformers.nn import LayerNorm
from jaxformers.nn import PostNorm
from jaxformers.nn import Stack
from jaxformers.nn.depth import stack
from jaxformers.nn.depth import unroll
from jaxformers.nn.mixers import Attention
from jaxformers.ops import Window

FULL = Block(Attention(num_heads=2), GatedFeedForward(hidden=12))
NEAR = Block(
  Attention(num_heads=2, mask=Window(2)),
  FeedForward(hidden=12, use_bias=True),
  residual=PostNorm(LayerNorm()),
)
X = jax.random.normal(jax.random.key(0), (2, 6, 8))


@pytest.fixture(scope='module')
def pattern():
  module = Stack((FULL, NEAR), depth=4)
  params = jax.jit(module.init)(jax.random.key(1), X)['params']
  return module, params


def test_a_tuple_of_blocks_repeats(pattern):
  module, params = pattern
  x = X
  for i in range(4):
    block = (FULL, NEAR)[i % 2]
    x, _ = block.apply({'params': unroll(params)[f'layer_{i}']}, x)
  np.testing.assert_allclose(
    module.apply({'params': params}, X)[0], x, rtol=1e-5, atol=1e-6
  )


def test_converters_are_inverse_and_name_layers_in_order(pattern):
  _, params = pattern
  unrolled = unroll(params)
  assert list(unrolled) == ['layer_0', 'layer_1', 'layer_2', 'layer_3']
  jax.tree.map(np.testing.assert_array_equal, stack(unrolled, 2), params)


def test_ten_layers_keep_their_order():
  params = {f'layer_{i}': {'w_D': jnp.full(3, i)} for i in range(12)}
  stacked = stack(params)['scanned_0']['w_D']
  np.testing.assert_array_equal(stacked[:, 0], np.arange(12))


def test_an_unrolled_stack_threads_states_like_a_scanned_one(pattern):
  module, params = pattern
  loop = module.clone(scan=False)
  outputs = []
  for m, p in ((module, params), (loop, unroll(params))):
    states = m.initial_state(2, 6, 8, jnp.float32)
    run = jax.jit(lambda x, states, m=m, p=p: m.apply({'params': p}, x, states))
    y_first, states = run(X[:, :4], states)
    y_rest, states = run(X[:, 4:], states)
    outputs.append((y_first, y_rest, states))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    *outputs,
  )


def test_remat_recomputes_and_its_policy_is_obeyed():
  def products(remat):
    module = Stack(FULL, depth=2, remat=remat)
    params = jax.eval_shape(module.init, jax.random.key(0), X)['params']
    gradient = jax.grad(lambda p: module.apply({'params': p}, X)[0].sum())
    text = str(jax.make_jaxpr(gradient)(params))
    return text.count('dot_general')

  assert products('nothing_saveable') > products('dots_saveable')
  assert products('dots_saveable') == products(None)


def test_compiled_size_does_not_grow_with_depth():
  def size(depth):
    module = Stack(FULL, depth=depth)
    params = jax.eval_shape(module.init, jax.random.key(0), X)['params']
    run = jax.jit(lambda p: module.apply({'params': p}, X)[0])
    return len(run.lower(params).as_text().splitlines())

  assert size(48) == size(4)


def test_dropout_differs_between_layers_and_steps_and_ends_when_told():
  module = Stack(FULL.clone(dropout=0.5), depth=2)
  params = module.init(jax.random.key(1), X)

  def run(seed):
    rngs = {'dropout': jax.random.key(seed)}
    return module.apply(params, X, rngs=rngs, deterministic=False)[0]

  assert (run(0) == run(0)).all()
  assert (run(0) != run(1)).any()
  plain = Stack(FULL, depth=2).apply(params, X)[0]
  np.testing.assert_array_equal(module.apply(params, X)[0], plain)


def test_depths_that_do_not_fit_the_pattern_are_refused():
  with pytest.raises(ValueError, match='depth 3 is not a positive multiple'):
    Stack((FULL, NEAR), depth=3).init(jax.random.key(0), X)


def test_an_unknown_remat_policy_names_the_nearest():
  with pytest.raises(ValueError, match="mean 'dots_saveable'"):
    Stack(FULL, depth=1, remat='dot_saveable').init(jax.random.key(0), X)


def test_converters_refuse_the_wrong_level(pattern):
  _, params = pattern
  with pytest.raises(ValueError, match='not of its parent'):
    unroll({'stack': params})
  with pytest.raises(ValueError, match='not of its parent'):
    stack({'stack': params})
  with pytest.raises(ValueError, match='4 layers do not repeat 3 blocks'):
    stack(unroll(params), 3)


@pytest.mark.parametrize(
  ('attention', 'message'),
  [
    (Attention(num_heads=3), 'width 8 does not divide into 3 heads'),
    (Attention(num_heads=4, num_kv_heads=3), 'cannot share 3 key-value heads'),
    (Attention(num_heads=0), '0 query heads'),
  ],
)
def test_widths_that_do_not_fit_are_refused(attention, message):
  with pytest.raises(ValueError, match=message):
    Block(attention).init(jax.random.key(0), X)


def test_more_tokens_than_the_state_holds_are_refused_or_turn_to_nan():
  attention = Attention(num_heads=2)
  variables = attention.init(jax.random.key(0), X)
  state = attention.initial_state(2, 8, 8, jnp.float32)
  with pytest.raises(
    ValueError, match='9 tokens do not fit a state made for 8'
  ):
    attention.apply(variables, jnp.zeros((2, 9, 8)), state)
  _, state = attention.apply(variables, X, state)
  y, _ = attention.apply(variables, X, state)
  assert np.isnan(y).all()
