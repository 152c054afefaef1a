"""Factored low-rank layers against merged ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.models import LanguageModel
from jaxformers.nn import Block
from jaxformers.nn import Embed
from jaxformers.nn import GatedFeedForward
from jaxformers.nn import Head
from jaxformers.nn import LoRA
from jaxformers.nn import Stack
from jaxformers.nn import factored_apply
from jaxformers.nn.mixers import Attention
from jaxformers.ops import LowRank
from jaxformers.ops import Rotary
from jaxformers.ops import lora_apply
from jaxformers.ops import lora_init
from jaxformers.train.flops import matmul_flops

KEY = jax.random.key(0)


class FlaxLayers(nn.Module):
  """One of each Flax layer that can be adapted, one after the other."""

  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(7, 6, name='embed')
    x = embed(tokens)
    x = nn.Dense(4, name='dense')(x)
    x = nn.DenseGeneral((2, 3), name='general')(x)
    x = nn.DenseGeneral(6, axis=(-2, 1), name='inner_axes')(jnp.sin(x))
    x = nn.DenseGeneral(5, batch_dims=(0,), name='batched')(x)
    x = nn.Einsum((5, 2, 3), 'bti,iho->btho', name='einsum')(x)
    x = nn.Einsum((2, 3, 4), '...hi,hio->...ho', name='per_head')(x)
    x = nn.Conv(6, (2,), strides=2, padding='SAME', name='conv')(x)
    x = nn.Conv(6, (1,), name='pointwise')(jnp.cos(x))
    return embed.attend(x)


FLAX_RULES = (
  'embed', 'dense/', ('general/kernel', 'ioo'),
  ('inner_axes/kernel', 'iio'), ('batched/kernel', 'sio'),
  ('einsum/kernel', 'ioo'), ('per_head/kernel', 'sio'),
  ('(conv|pointwise)/kernel', 'iio'),
)  # fmt: skip


def language_model(feedforward=None, *, scan=True, **options):
  mixer = Attention(num_heads=2, position=Rotary())
  remat = 'nothing_saveable' if scan else None
  stack = Stack(Block(mixer, feedforward), 2, scan=scan, remat=remat)
  return LanguageModel(11, 4, stack, **options)


TOKENS = jax.random.randint(KEY, (2, 6), 0, 7)
MODELS = {
  'flax': (FlaxLayers(), FLAX_RULES),
  'scanned': (
    language_model(embed=Embed(scale_by_width=True)), ('stack', 'table')
  ),
  'unrolled': (
    language_model(GatedFeedForward(hidden=6), scan=False, head=Head()),
    ('layer_1', 'layer_0/.*out', 'head'),
  ),
}  # fmt: skip


def trained(model, low_rank):
  """Returns variables, and adapters both factors of which are not zero."""
  variables = jax.jit(model.init)(KEY, TOKENS)
  adapters = lora_init(KEY, variables['params'], low_rank)
  leaves, structure = jax.tree.flatten(adapters)
  rng = np.random.default_rng(0)
  leaves = [jnp.float32(rng.normal(size=a.shape) / 3) for a in leaves]
  return variables, structure.unflatten(leaves)


def first_of(result):
  return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize('name', MODELS)
def test_factored_layers_compute_what_merged_ones_do(name):
  model, rules = MODELS[name]
  with jax.enable_x64(True):
    low_rank = LowRank(rules, rank=2, alpha=3.0)
    variables, adapters = jax.tree.map(jnp.float64, trained(model, low_rank))
    factored = factored_apply(model, low_rank)
    merged = lora_apply(lambda p, x: model.apply({'params': p}, x), low_rank)

    def both(adapters):
      a = first_of(factored(variables, adapters, TOKENS))
      b = first_of(merged(variables['params'], adapters, TOKENS))
      return jnp.stack([jnp.sum(jnp.sin(y)) for y in (a, b)]), (a, b)

    # One pass gives both outputs and both gradients.
    gradients, (a, b) = jax.jit(jax.jacrev(both, has_aux=True))(adapters)
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    for gradient in jax.tree.leaves(gradients):
      np.testing.assert_allclose(*gradient, rtol=1e-5, atol=1e-5)
      assert gradient.any()
    plain = jax.jit(model.apply)(variables, TOKENS)
    assert abs(a - first_of(plain)).max() > 1e-3


def test_dropout_acts_before_the_first_factor_only():
  model, low_rank = (
    nn.Dense(3, use_bias=False),
    LowRank(('kernel',), rank=2, alpha=2.0, dropout=0.5),
  )
  x = jnp.arange(1.0, 5.0)
  variables = model.init(KEY, x)
  adapters = lora_init(KEY, variables['params'], low_rank)
  adapters = jax.tree.map(jnp.ones_like, adapters)
  quiet = factored_apply(model, low_rank)(variables, adapters, x)
  base = model.apply(variables, x)
  np.testing.assert_allclose(quiet - base, jnp.full(3, 20.0), rtol=1e-5)
  noisy = factored_apply(model, low_rank, deterministic=False)
  found = set()
  for seed in range(8):
    y = noisy(variables, adapters, x, rngs={'dropout': jax.random.key(seed)})
    found.add(round(float((y - base)[0]) / 4))
  # Twice (dropped inputs are doubled) twice (rank 2) any sum of 1, 2, 3 and 4.
  assert len(found) > 2
  assert found <= set(range(11))


def test_the_gradient_makes_no_whole_matrices():
  n, rank, rows = 32, 2, 8
  model, low_rank = nn.Dense(n, use_bias=False), LowRank(('kernel',), rank=rank)
  x = jnp.ones((rows, n))
  variables = model.init(KEY, x)
  adapters = lora_init(KEY, variables['params'], low_rank)
  factored = factored_apply(model, low_rank)
  merged = lora_apply(lambda p, x: model.apply({'params': p}, x), low_rank)

  def program(apply, params):
    loss = lambda adapters: jnp.sum(jnp.sin(apply(params, adapters, x)))
    return jax.make_jaxpr(jax.grad(loss))(adapters)

  own = program(factored, variables)
  assert f'f32[{n},{n}] = dot_general' not in str(own)
  # x W; x A, its product with B, and their three backward products.
  assert matmul_flops(own) == 2 * rows * n * n + 5 * 2 * rows * n * rank
  other = program(merged, variables['params'])
  assert matmul_flops(other) > 2 * matmul_flops(own)


@pytest.fixture(scope='module')
def adapted():
  model = language_model()
  lora = LoRA(model, LowRank(('mixer', 'table'), rank=2, start='symmetric'))
  return lora, jax.jit(lora.init)(KEY, TOKENS)


def test_only_adapters_are_parameters(adapted):
  lora, variables = adapted
  assert set(variables) == {'params', 'frozen'}
  base = jax.eval_shape(lora.model.init, KEY, TOKENS)['params']
  assert jax.tree.structure(variables['frozen']) == jax.tree.structure(base)
  for path, _ in jax.tree_util.tree_leaves_with_path(variables['params']):
    assert path[-1].key.startswith('lora_')


def test_an_adopted_model_computes_what_it_did(adapted):
  lora, variables = adapted
  base = jax.jit(lora.model.init)(jax.random.key(5), TOKENS)
  own = lora.adopt(variables, base)
  apply, of_base = jax.jit(lora.apply), jax.jit(lora.model.apply)
  expected, _ = of_base(base, TOKENS)
  logits, _ = apply(own, TOKENS)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
  moved = {**own, 'params': jax.tree.map(lambda a: 1.5 * a, own['params'])}
  logits, _ = apply(moved, TOKENS)
  merged, _ = of_base(lora.merge(moved), TOKENS)
  np.testing.assert_allclose(logits, merged, rtol=1e-4, atol=1e-4)
  assert abs(logits - expected).max() > 1e-2


def test_an_adapted_model_reads_in_pieces(adapted):
  lora, variables = adapted
  apply = jax.jit(lora.apply)
  whole, _ = apply(variables, TOKENS)
  first, state = apply(variables, TOKENS[:, :3], lora.initial_state(2, 6))
  second, _ = apply(variables, TOKENS[:, 3:], state)
  pieces = jnp.concatenate([first, second], axis=1)
  np.testing.assert_allclose(pieces, whole, rtol=1e-4, atol=1e-4)
  assert lora.vocab_size == 11


def test_side_outputs_of_the_model_come_through(adapted):
  lora, variables = adapted

  def sown(model, variables):
    run = lambda v: model.apply(v, TOKENS, mutable=['diagnostics'])[1]
    return jax.eval_shape(run, variables)

  expected = sown(lora.model, lora.merge(variables))
  assert 'diagnostics' in expected
  assert sown(lora, variables) == expected


class Product(nn.Module):
  @nn.compact
  def __call__(self, x):
    w = self.param('w_DF', nn.initializers.ones, (x.shape[-1], 3))
    return x @ w


def test_layers_that_cannot_use_an_adapter_are_refused():
  x = jnp.ones((1, 2))
  variables = Product().init(KEY, x)
  low_rank = LowRank(('w_DF',))
  adapters = lora_init(KEY, variables['params'], low_rank)
  with pytest.raises(ValueError, match='no layer that ran.*adapter of w_DF'):
    factored_apply(Product(), low_rank)(variables, adapters, x)
  with pytest.raises(ValueError, match="in the collection 'frozen', got"):
    LoRA(Product(), low_rank).apply({'params': adapters}, x)
