"""Parts in the frameworks of others; docs/interoperation.md shows how."""

from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformers.nn import Block
from jaxformers.nn import FeedForward
from jaxformers.nn.mixers import LRU
from jaxformers.nn.mixers import RWKV6
from jaxformers.nn.mixers import Attention
from jaxformers.nn.mixers import Mamba2
from jaxformers.ops import Rotary
from jaxformers.optim import adapt_step_size

B, L, D = 2, 8, 16
MIXERS = {
  'attention': Attention(num_heads=2, position=Rotary()),
  'lru': LRU(state_size=4),
  'mamba2': Mamba2(state_size=4, head_dim=8),
  'rwkv6': RWKV6(num_heads=2),
}


@pytest.fixture
def x_BLD():
  return jax.random.normal(jax.random.key(0), (B, L, D))


def in_nnx(module, x_BLD, **seeds):
  """Returns the module as one of NNX, its parameters drawn in one program."""
  inner = nn.Sequential([module])

  @nnx.jit
  def make(x_BLD):
    rngs = nnx.Rngs(0, **seeds)
    return nnx.bridge.ToNNX(inner, rngs=rngs).lazy_init(x_BLD)

  return make(x_BLD)


def params_of(model):
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))['layers_0']


@pytest.mark.parametrize('mixer', MIXERS.values(), ids=MIXERS)
def test_a_mixer_in_nnx_reads_pieces_as_linen_reads_the_whole(mixer, x_BLD):
  model = in_nnx(mixer, x_BLD)
  expected_BLD, _ = jax.jit(mixer.apply)({'params': params_of(model)}, x_BLD)
  read = nnx.jit(lambda model, x_BLD, state: model(x_BLD, state))
  state = mixer.initial_state(B, L, D, x_BLD.dtype)
  first_BLD, state = read(model, x_BLD[:, : L // 2], state)
  rest_BLD, state = read(model, x_BLD[:, L // 2 :], state)
  y_BLD = jnp.concatenate([first_BLD, rest_BLD], axis=1)
  np.testing.assert_allclose(y_BLD, expected_BLD, atol=1e-5)


def test_training_in_nnx_gives_the_parameters_of_a_loop_on_optax(x_BLD):
  mixer = MIXERS['lru']
  model = in_nnx(mixer, x_BLD)
  transform = adapt_step_size(optax.sgd(0.1, momentum=0.9))
  params = params_of(model)
  opt_state = transform.init(params)
  optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)

  @nnx.jit
  def nnx_step(model, optimizer):
    loss = lambda model: jnp.mean((model(x_BLD)[0] - 1) ** 2)
    optimizer.update(model, nnx.grad(loss)(model))

  @jax.jit
  def linen_step(params, opt_state):
    def loss(params):
      return jnp.mean((mixer.apply({'params': params}, x_BLD)[0] - 1) ** 2)

    gradient = jax.grad(loss)(params)
    updates, opt_state = transform.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  start = params
  for _ in range(3):
    nnx_step(model, optimizer)
    params, opt_state = linen_step(params, opt_state)
  moved = jax.tree.map(lambda p, q: float(jnp.abs(p - q).max()), params, start)
  assert all(distance > 1e-3 for distance in jax.tree.leaves(moved))
  jax.tree.map(
    lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-4, atol=1e-5),
    params_of(model),
    params,
  )


def test_dropout_takes_its_noise_from_the_rngs_of_nnx(x_BLD):
  block = Block(LRU(state_size=4), FeedForward(hidden=8), dropout=0.5)
  model = in_nnx(block, x_BLD, dropout=1)
  read = nnx.jit(
    lambda model, is_fixed: model(x_BLD, deterministic=is_fixed)[0],
    static_argnums=1,
  )
  np.testing.assert_array_equal(read(model, True), read(model, True))
  noisy_BLD = read(model, False)
  assert not np.allclose(noisy_BLD, read(model, False), atol=1e-3)
