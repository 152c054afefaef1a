"""LoRA+ against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformers.ops import LowRank
from jaxformers.ops import lora_init
from jaxformers.optim import AdamW
from jaxformers.optim import ChildTuningF
from jaxformers.optim import Constant
from jaxformers.optim import FromOptax
from jaxformers.optim import LoRAPlus
from jaxformers.optim import WarmupLinear
from jaxformers.optim import lora_labels
from jaxformers.optim import lora_plus

PARAMS = {'w_DE': jnp.ones((4, 3)), 'embed': {'table_VD': jnp.ones((5, 4))}}
LOW_RANK = LowRank(('w_DE', 'table_VD'), rank=2)
IN, OUT = 'lora_in_DR', 'lora_out_RE'


@pytest.fixture(scope='module')
def adapters():
  return lora_init(jax.random.key(0), PARAMS, LOW_RANK)


def change(optimizer, params, gradient):
  update = jax.jit(optimizer.update)
  return update(gradient, optimizer.init(params), params)[0]


def test_labels_are_sides_and_embeddings(adapters):
  with_bias = {**adapters, 'bias': jnp.ones(3), 'norm': {'w': jnp.ones((2, 2))}}
  assert lora_labels(with_bias) == {
    'w_DE': {IN: 'in', OUT: 'out'},
    'embed': {'table_VD': {'lora_in_VR': 'embed', 'lora_out_RD': 'embed'}},
    'bias': 'out',
    'norm': {'w': 'in'},
  }
  flax = {'Embed_0': {'embedding': {'lora_in': jnp.ones((5, 2))}}}
  assert lora_labels(flax)['Embed_0']['embedding']['lora_in'] == 'embed'


def test_the_first_step_moves_the_output_side_by_the_larger_rate(adapters):
  # y = x (W + A B): with B = 0 there is no gradient in A.
  x = jnp.arange(8.0).reshape(2, 4)

  def loss(adapters):
    lora_in, lora_out = adapters['w_DE'].values()
    return jnp.sum(jnp.sin(x @ PARAMS['w_DE'] + x @ lora_in @ lora_out))

  gradient = jax.grad(loss)(adapters)
  assert not gradient['w_DE'][IN].any()
  adam = lambda rate: optax.adam(rate, eps=1e-30)
  updates = change(lora_plus(adam, 1e-3, ratio=16), adapters, gradient)
  assert not updates['w_DE'][IN].any()
  np.testing.assert_allclose(
    updates['w_DE'][OUT], -0.016 * np.sign(gradient['w_DE'][OUT]), rtol=1e-4
  )


def test_each_group_has_its_rate(adapters):
  ones = jax.tree.map(jnp.ones_like, adapters)
  updates = change(lora_plus(optax.sgd, 0.1, 4.0, 0.01), adapters, ones)
  for leaf, rate in ((IN, 0.1), (OUT, 0.4)):
    np.testing.assert_allclose(updates['w_DE'][leaf], -rate, rtol=1e-6)
  for leaf in updates['embed']['table_VD'].values():
    np.testing.assert_allclose(leaf, -0.01, rtol=1e-6)


def test_a_ratio_of_one_is_the_optimiser_itself(adapters):
  adapters = {'w_DE': adapters['w_DE']}
  gradient = jax.tree.map(jnp.cos, adapters)
  expected = change(optax.adamw(0.1), adapters, gradient)
  updates = change(lora_plus(optax.adamw, 0.1, 1.0), adapters, gradient)
  # Compiled in two ways, so equal to rounding.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected
  )


def test_groups_may_differ_in_more_than_their_rate(adapters):
  make = {name: optax.sgd for name in ('in', 'embed')}
  make['out'] = lambda rate: optax.chain(
    optax.add_decayed_weights(0.5), optax.sgd(rate)
  )
  zero = jax.tree.map(jnp.zeros_like, adapters)
  params = jax.tree.map(jnp.ones_like, adapters)
  updates = change(lora_plus(make, 0.1, 2.0), params, zero)
  assert not updates['w_DE'][IN].any()
  np.testing.assert_allclose(updates['w_DE'][OUT], -0.1, rtol=1e-6)


def test_in_an_experiment_all_groups_follow_one_schedule_and_are_clipped_as_one(
  adapters,
):
  schedule = WarmupLinear(peak=1.0, warmup_steps=4)
  inner = FromOptax('sgd', schedule, max_gradient_norm=1.0)
  optimizer = LoRAPlus(inner, 2.0, Constant(0.5)).build(10)
  ones = jax.tree.map(jnp.ones_like, adapters)
  norm = np.sqrt(sum(a.size for a in jax.tree.leaves(ones)))
  state = optimizer.init(adapters)
  for step in range(3):
    updates, state = optimizer.update(ones, state, adapters)
    rate = schedule.schedule(10)(step)
    for leaf, ratio in ((IN, 1), (OUT, 2)):
      np.testing.assert_allclose(
        updates['w_DE'][leaf], -ratio * rate / norm, rtol=1e-5
      )
    for leaf in updates['embed']['table_VD'].values():
      np.testing.assert_allclose(leaf, -0.5 / norm, rtol=1e-5)


def test_bad_options_are_refused():
  with pytest.raises(ValueError, match='ratio must be positive, got 0'):
    lora_plus(optax.adam, 1e-3, 0)
  with pytest.raises(ValueError, match="expected optimisers of .'in'"):
    lora_plus({'in': optax.adam}, 1e-3)
  with pytest.raises(ValueError, match='put LoRAPlus inside it instead'):
    LoRAPlus(ChildTuningF(inner=AdamW()))
