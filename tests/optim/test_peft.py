"""Low-rank training beside peft. Needs the extra `peers`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformers.ops import LowRank
from jaxformers.ops import lora_init
from jaxformers.ops import lora_merge
from jaxformers.optim import lora_plus

pytestmark = pytest.mark.filterwarnings('ignore')
torch = pytest.importorskip('torch', reason="needs the extra 'peers'")
peft = pytest.importorskip('peft', reason="needs the extra 'peers'")
loraplus = pytest.importorskip('peft.optimizers.loraplus')

VOCAB, WIDTH, HIDDEN, STEPS = 9, 6, 5, 20
RATE, RATIO, EMBED_RATE = 3e-3, 8.0, 2e-2


def peer_model():
  torch.manual_seed(0)
  layers = {
    'embed': torch.nn.Embedding(VOCAB, WIDTH),
    'up': torch.nn.Linear(WIDTH, HIDDEN),
    'tanh': torch.nn.Tanh(),
    'down': torch.nn.Linear(HIDDEN, WIDTH),
  }
  model = torch.nn.Sequential()
  for name, layer in layers.items():
    model.add_module(name, layer)
  return model.double()


def array(tensor):
  return jnp.asarray(tensor.detach().numpy().copy())


def weights(model):
  kernel = lambda layer: {
    'kernel': array(layer.weight).T,
    'bias': array(layer.bias),
  }
  return {
    'embed': {'embedding': array(model.embed.weight)},
    'up': kernel(model.up),
    'down': kernel(model.down),
  }


def adapters_of(model):
  model = model.base_model.model
  pair = lambda a, b: {'lora_in': array(a).T, 'lora_out': array(b).T}
  linear = lambda layer: pair(
    layer.lora_A['default'].weight, layer.lora_B['default'].weight
  )
  embed = model.embed
  return {
    'embed': {
      'embedding': pair(
        embed.lora_embedding_A['default'], embed.lora_embedding_B['default']
      )
    },
    'up': {'kernel': linear(model.up)},
    'down': {'kernel': linear(model.down)},
  }


@pytest.mark.parametrize('rank_stabilized', [False, True])
def test_training_by_lora_plus_is_that_of_peft(rank_stabilized):
  with jax.enable_x64(True):
    compare(rank_stabilized)


def compare(rank_stabilized):
  rng = np.random.default_rng(0)
  ids = rng.integers(0, VOCAB, 32)
  target = rng.normal(size=(32, WIDTH))
  low_rank = LowRank(
    ('embedding', 'kernel'), 3, 6.0, rank_stabilized=rank_stabilized
  )
  peer = peer_model()
  params = weights(peer)
  config = peft.LoraConfig(
    r=3,
    lora_alpha=6,
    use_rslora=rank_stabilized,
    target_modules=['embed', 'up', 'down'],
  )
  peer = peft.get_peft_model(peer, config, autocast_adapter_dtype=False)
  peer = peer.double()
  adapters = adapters_of(peer)
  ours = lora_init(jax.random.key(0), params, low_rank)
  assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, adapters)
  optimizer = loraplus.create_loraplus_optimizer(
    peer,
    torch.optim.AdamW,
    lr=RATE,
    loraplus_lr_ratio=RATIO,
    loraplus_lr_embedding=EMBED_RATE,
    loraplus_weight_decay=0.1,
  )
  tx = lora_plus(
    lambda rate: optax.adamw(rate, weight_decay=0.1), RATE, RATIO, EMBED_RATE
  )
  state = tx.init(adapters)

  @jax.jit
  def step(adapters, state):
    def loss(adapters):
      p = lora_merge(params, adapters, low_rank)
      x = p['embed']['embedding'][ids]
      x = jnp.tanh(x @ p['up']['kernel'] + p['up']['bias'])
      x = x @ p['down']['kernel'] + p['down']['bias']
      return jnp.mean((x - target) ** 2)

    value, gradient = jax.value_and_grad(loss)(adapters)
    updates, state = tx.update(gradient, state, adapters)
    return optax.apply_updates(adapters, updates), state, value

  for _ in range(STEPS):
    peer_loss = torch.nn.functional.mse_loss(
      peer(torch.as_tensor(ids)), torch.as_tensor(target)
    )
    optimizer.zero_grad()
    peer_loss.backward()
    optimizer.step()
    adapters, state, loss = step(adapters, state)
    np.testing.assert_allclose(loss, peer_loss.item(), rtol=1e-9)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)
  jax.tree.map(close, adapters, adapters_of(peer))
  merged = lora_merge(params, adapters, low_rank)
  jax.tree.map(close, merged, weights(peer.merge_and_unload()))
