"""Kernels of vendors: what they are given, and that programs lower for all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.ops import ALiBi
from jaxformers.ops import Causal
from jaxformers.ops import Lengths
from jaxformers.ops import LogLength
from jaxformers.ops import NoMask
from jaxformers.ops import ReRoPE
from jaxformers.ops import Rotary
from jaxformers.ops import Segments
from jaxformers.ops import Window
from jaxformers.ops import attend
from jaxformers.ops import attend_partial
from jaxformers.ops import supports
from jaxformers.ops import vendor

B, L, H, G, K = 2, 128, 2, 1, 128
IDS = jnp.repeat(jnp.array([[1, 2, 2, 0], [1, 1, 1, 3]]), 32, axis=1)


def arrays(dtype=jnp.float32):
  return [
    jax.random.normal(jax.random.key(i), (B, L, heads, K), dtype)
    for i, heads in enumerate((H, G, G))
  ]


@pytest.mark.parametrize(
  'mask',
  [NoMask(), Causal() & Segments(IDS, IDS), Window(40)],
  ids=['none', 'packed', 'window'],
)
def test_the_tpu_kernel_interpreted_equals_ours_with_gradients(mask):
  query, key, value = arrays()

  def of_kernel(query, key, value):
    query *= K**-0.5
    return vendor.attend_tpu(query, key, value, mask, interpret=True)

  def of_ours(query, key, value):
    return attend(query, key, value, mask=mask, implementation='xla')

  def run(function):
    def loss(*inputs):
      out = function(*inputs)
      return jnp.sin(out).sum(), out

    gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    return jax.jit(gradient)(query, key, value)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
    run(of_kernel),
    run(of_ours),
  )


@pytest.mark.parametrize(
  ('implementation', 'platform'),
  [
    ('xla', 'cuda'),
    ('xla', 'tpu'),
    ('blockwise', 'cuda'),
    ('blockwise', 'tpu'),
    ('tpu', 'tpu'),
  ],
)
def test_programs_lower_for_accelerators_without_one(implementation, platform):
  def loss(query, key, value):
    options = {'mask': Causal(), 'position': Rotary(), 'scale': LogLength()}
    out = attend(query, key, value, implementation=implementation, **options)
    return out.astype(jnp.float32).sum()

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
  exported = jax.export.export(gradient, platforms=[platform])(
    *arrays(jnp.bfloat16)
  )
  assert exported.platforms == (platform,)
  kernel = 'tpu_custom_call' in exported.mlir_module()
  assert kernel == (implementation == 'tpu')


def test_what_a_kernel_cannot_do_is_said():
  half = {'dtype': jnp.bfloat16, 'lengths': (L, L)}
  for name in ('cudnn', 'tpu'):
    assert supports(name, **half) is None
    assert supports(name, mask=Window(4), position=Rotary(), **half) is None
    assert 'no bias' in supports(name, bias=ALiBi(), **half)
    assert 'neither statistics' in supports(name, statistics=True, **half)
    assert 'one product per pair' in supports(name, position=ReRoPE(4), **half)
    assert 'without an offset' in supports(name, mask=Causal(offset=3), **half)
    assert 'as many queries as keys' in supports(
      name, mask=Causal(), dtype=jnp.bfloat16, lengths=(1, L)
    )
    either = Causal() | Lengths(jnp.ones(B, int))
    assert 'not Either' in supports(name, mask=either, **half)
    twice = Window(4) & Window(5)
    assert 'one mask of a class' in supports(name, mask=twice, **half)
  assert 'not float32' in supports('cudnn', lengths=(L, L))
  assert 'multiples of 128' in supports('tpu', lengths=(100, 100))
  assert supports('cudnn', mask=Lengths(jnp.ones(B, int)), **half) is None
  assert 'not Lengths' in supports(
    'tpu', mask=Lengths(jnp.ones(B, int)), **half
  )


def test_asking_for_the_impossible_names_what_is_possible():
  query, key, value = arrays()
  with pytest.raises(ValueError, match="'cudnn' cannot.*'xla' and 'blockwise'"):
    attend(query, key, value, implementation='cudnn')
  with pytest.raises(ValueError, match='neither statistics nor partial'):
    attend_partial(query, key, value, implementation='tpu')


def test_cudnn_gets_what_the_masks_say(monkeypatch):
  calls = []

  def peer(query, key, value, **options):
    calls.append(options)
    return query

  monkeypatch.setattr(jax.nn, 'dot_product_attention', peer)
  length_B = jnp.array([0, 3])
  out = attend(
    *arrays(jnp.bfloat16),
    mask=Window(5) & Lengths(length_B),
    implementation='cudnn',
  )
  (options,) = calls
  assert options.pop('key_value_seq_lengths') is length_B
  assert options == {
    'scale': 1.0,
    'is_causal': True,
    'implementation': 'cudnn',
    'local_window_size': (4, 0),
  }
  assert (out[0] == 0).all()
  assert (out[1] != 0).any()
