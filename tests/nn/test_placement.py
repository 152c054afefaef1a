"""Where activations lie, and that it changes nothing but that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.models import LanguageModel
from jaxformers.nn import Block
from jaxformers.nn import FeedForward
from jaxformers.nn import Stack
from jaxformers.nn.mixers import Attention
from jaxformers.nn.placement import LOOKED_UP_RULES
from jaxformers.nn.placement import place
from jaxformers.ops import Rotary
from jaxformers.train import MeshShape
from jaxformers.train.sharding import batch_sharding
from jaxformers.train.sharding import on_mesh
from jaxformers.train.sharding import shardings


def placed_spec(x, letters, mesh, **options):
  """Where `place` puts an array."""
  function = on_mesh(lambda x: place(x * 2, letters, **options), mesh)
  x = jax.device_put(x, jax.NamedSharding(mesh, jax.P()))
  return jax.jit(function)(x).sharding.spec


def test_letters_say_where_an_activation_lies():
  mesh = MeshShape(data=2, fsdp=2, tensor=2).build()
  x = jnp.ones((8, 4, 6))
  rows = ('data', 'fsdp')
  assert placed_spec(x, 'BLD', mesh)[0] == rows
  assert placed_spec(x, 'BLF', mesh)[2] == 'tensor'
  assert placed_spec(x, 'BLD', mesh, rules=LOOKED_UP_RULES)[2] == 'fsdp'


def test_what_does_not_divide_is_left_to_the_compiler():
  mesh = MeshShape(data=8).build()
  assert 'data' not in placed_spec(jnp.ones((3, 2)), 'BL', mesh)


def test_without_a_mesh_nothing_happens():
  x = jnp.ones((2, 3))
  assert place(x, 'BL') is x
  with pytest.raises(ValueError, match='names 3 axes'):
    place(x, 'BLD')


@pytest.mark.parametrize('packed', [False, True])
def test_a_model_whose_sequences_are_cut_gives_the_same(packed):
  block = Block(
    Attention(num_heads=4, num_kv_heads=2, position=Rotary()),
    FeedForward(hidden=16),
  )
  model = LanguageModel(vocab_size=16, width=16, stack=Stack(block, depth=2))
  tokens_BL = jax.random.randint(jax.random.key(1), (4, 16), 0, 16)
  segments_BL = jnp.repeat(jnp.array([[1, 1, 2, 0]]), 4, axis=1)
  segments_BL = jnp.tile(segments_BL, (4, 1)) if packed else None
  variables = jax.jit(model.init)(jax.random.key(0), tokens_BL)

  def loss(variables, tokens_BL, segments_BL):
    logits_BLV, _ = model.apply(variables, tokens_BL, segments_BL=segments_BL)
    is_token = 1.0 if segments_BL is None else segments_BL[..., None] != 0
    return jnp.mean(jnp.sin(logits_BLV) * is_token)

  function = jax.value_and_grad(loss)
  expected = jax.jit(function)(variables, tokens_BL, segments_BL)
  mesh = MeshShape(data=2, fsdp=1, tensor=2, sequence=2).build()
  there = batch_sharding(mesh)
  compiled = (
    jax.jit(on_mesh(function, mesh))
    .lower(
      jax.device_put(variables, shardings(variables, mesh)),
      jax.device_put(tokens_BL, there),
      None if segments_BL is None else jax.device_put(segments_BL, there),
    )
    .compile()
  )
  actual = compiled(
    jax.device_put(variables, shardings(variables, mesh)),
    jax.device_put(tokens_BL, there),
    None if segments_BL is None else jax.device_put(segments_BL, there),
  )
  for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
  assert 'collective-permute' in compiled.as_text()
