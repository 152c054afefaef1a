"""Decays that have grown larger than 1 are found, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.diagnostics import decay_metrics
from jaxformers.diagnostics import decay_report
from jaxformers.diagnostics import growing_layers
from jaxformers.models import LanguageModel
from jaxformers.nn import Block
from jaxformers.nn import Stack
from jaxformers.nn.mixers import LRU
from jaxformers.nn.mixers import S5
from jaxformers.train import NextToken
from jaxformers.train.errors import RunFailed
from jaxformers.train.loop import report

FREE = Block(S5(state_size=4, blocks=1))
STACK = Stack((FREE, Block(LRU(state_size=4))), depth=4)
MODEL = LanguageModel(vocab_size=7, width=4, stack=STACK)
TOKENS = jnp.ones((1, 3), jnp.int32)
LAYERS = 'stack/layer_0/mixer', 'stack/layer_2/mixer'


@pytest.fixture(scope='module')
def variables():
  """In the third layer the real part of an eigenvalue is 2, and a step 0.1."""
  variables = jax.jit(MODEL.init)(jax.random.key(0), TOKENS)
  mixer = variables['params']['stack']['scanned_0']['mixer']
  mixer['a_re_S'] = mixer['a_re_S'].at[1, 0].set(2.0)
  mixer['step_S'] = jnp.full_like(mixer['step_S'], np.log(0.1))
  return variables


def test_a_report_names_layers_and_their_largest_decay(variables):
  sizes = decay_report(MODEL, variables, TOKENS)
  assert tuple(sizes) == LAYERS
  np.testing.assert_allclose(
    [sizes[layer] for layer in LAYERS], np.exp([-0.05, 0.2]), rtol=1e-6
  )
  clipped = Block(S5(state_size=4, blocks=1, clip_eigs=True))
  model = MODEL.clone(stack=STACK.clone(block=(clipped, STACK.block[1])))
  assert decay_report(model, variables, TOKENS) == {}


def test_training_steps_report_them_and_say_who_is_to_blame(variables):
  batch = {'tokens': TOKENS, 'targets': TOKENS, 'segments': TOKENS}
  key = jax.random.key(0)
  loss = jax.jit(NextToken().loss, static_argnums=(0, 4))
  losses = loss(MODEL, variables, batch, key, False)
  assert losses.variables == {}
  metrics = {name: float(value) for name, value in losses.metrics.items()}
  assert [*metrics] == [f'{layer}/largest_decay' for layer in LAYERS]
  assert growing_layers({LAYERS[0]: 3.0, **metrics}).startswith(
    f' Decays are larger than 1 in {LAYERS[1]} (1.2214'
  )

  class Ignored:
    timing = None

    def write(self, *args): ...

    def update(self, *args): ...

  failed = {'loss': jnp.nan, **metrics}
  with pytest.raises(RunFailed, match=rf'leave out.* in {LAYERS[1]} \(1\.22'):
    report(3, failed, Ignored(), Ignored(), 'stop')
  healthy = decay_metrics({}, {})
  assert growing_layers({'loss': 1.0, **healthy}) == ''
