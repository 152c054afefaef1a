"""Attention in a ring of devices, against attention on one."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from jaxformers.ops import Causal
from jaxformers.ops import InverseSqrt
from jaxformers.ops import LogLength
from jaxformers.ops import NoMask
from jaxformers.ops import NoPosition
from jaxformers.ops import ReRoPE
from jaxformers.ops import Rotary
from jaxformers.ops import Segments
from jaxformers.ops import Window
from jaxformers.ops import attend
from jaxformers.ops import ring_attend
from jaxformers.train import MeshShape

B, L, H, G, K = 2, 24, 4, 2, 8
rng = np.random.default_rng(0)
QUERY = rng.normal(size=(B, L, H, K))
KEY, VALUE = rng.normal(size=(2, B, L, G, K))
SEGMENT = np.array(
  [[1] * 5 + [2] * 13 + [0] * 6, [1] * 11 + [0] * 2 + [3] * 11], np.int32
)
POSITION = np.arange(L)


def in_a_ring(mesh, segmented, **options):
  """Attention with the sequence cut over 4 devices and rows over 2."""

  def attended(query, key, value, position, segment):
    segment = segment if segmented else None
    return ring_attend(
      query,
      key,
      value,
      axis_name='sequence',
      query_position=position,
      key_position=position,
      query_segment=segment,
      key_segment=segment,
      **options,
    )

  part = PartitionSpec('data', 'sequence')
  return jax.shard_map(
    attended,
    mesh=mesh,
    in_specs=(part, part, part, PartitionSpec('sequence'), part),
    out_specs=part,
    check_vma=False,
  )


@pytest.mark.parametrize(
  ('segmented', 'options'),
  [
    (False, {'mask': Causal(), 'position': Rotary()}),
    (True, {'mask': Causal() & Window(7), 'position': ReRoPE(window=4)}),
    (
      True,
      {
        'mask': NoMask(),
        'position': NoPosition(),
        'scale': InverseSqrt() * LogLength(base_length=6, least=2),
      },
    ),
  ],
  ids=[
    'causal_rotary',
    'window_rerope_segments',
    'encoder_log_length_segments',
  ],
)
def test_values_and_gradients_are_those_of_the_whole(segmented, options):
  mesh = MeshShape(data=2, sequence=4).build()
  mask = options['mask']
  whole = mask & Segments(SEGMENT, SEGMENT) if segmented else mask

  def loss(attended, query, key, value):
    return jnp.sum(jnp.sin(attended(query, key, value)))

  one = functools.partial(
    attend,
    **options | {'mask': whole},
    query_position=POSITION,
    key_position=POSITION,
    implementation='xla',
  )
  ring = in_a_ring(mesh, segmented, block=4, **options)
  several = lambda *arrays: ring(*arrays, POSITION, SEGMENT)
  with jax.enable_x64(True):
    arrays = [jnp.asarray(x, jnp.float64) for x in (QUERY, KEY, VALUE)]
    results = [
      jax.jit(
        jax.value_and_grad(functools.partial(loss, f), argnums=(0, 1, 2))
      )(*arrays)
      for f in (one, several)
    ]
  for a, b in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_no_device_ever_holds_all_keys_or_scores():
  mesh = MeshShape(data=1, sequence=8).build()
  long = 8 * 64
  part = jax.NamedSharding(mesh, PartitionSpec(None, 'sequence'))
  array = jax.ShapeDtypeStruct((1, long, 1, 4), jnp.float32, sharding=part)
  position = jax.ShapeDtypeStruct(
    (long,),
    jnp.int32,
    sharding=jax.NamedSharding(mesh, PartitionSpec('sequence')),
  )

  def loss(query, key, value, position):
    ring = in_a_ring(mesh, False, mask=Causal(), position=Rotary(), block=32)
    segment = jnp.ones((1, long), jnp.int32)
    return jnp.sum(ring(query, key, value, position, segment) ** 2)

  compiled = (
    jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    .lower(array, array, array, position)
    .compile()
  )
  text = compiled.as_text()
  assert 'collective-permute' in text
  assert 'all-gather' not in text
  assert f'{long},1,4' not in text
  # Nothing of the size of a device's scores against all keys.
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * 64 * long


def test_what_cannot_go_round_is_refused():
  arrays = jnp.ones((3, 1, 4, 1, 2))
  options = {
    'axis_name': 'sequence',
    'query_position': np.arange(4),
    'key_position': np.arange(4),
  }
  ones = jnp.ones((1, 4), jnp.int32)
  with pytest.raises(ValueError, match='cannot go round'):
    ring_attend(*arrays, mask=Segments(ones, ones), **options)
  with pytest.raises(ValueError, match='together'):
    ring_attend(*arrays, query_segment=ones, **options)
