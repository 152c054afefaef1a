"""Who holds what, against counts made by hand."""

import jax
import jax.numpy as jnp

from jaxformers.train import MeshShape
from jaxformers.train.holdings import holdings
from jaxformers.train.holdings import holdings_table
from jaxformers.train.sharding import shardings


def test_each_array_is_counted_in_parts_and_copies():
  mesh = MeshShape(data=2, fsdp=2, tensor=2).build()
  shapes = {
    'params': {
      'w_DF': jax.ShapeDtypeStruct((8, 6), jnp.float32),
      'scale_D': jax.ShapeDtypeStruct((8,), jnp.bfloat16),
    },
    'step': jax.ShapeDtypeStruct((), jnp.int32),
  }
  placed = jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    shapes,
    shardings(shapes, mesh),
  )
  weight, scale, step = holdings(placed)
  assert weight.name == 'params/w_DF'
  assert weight.split == ((0, 'fsdp', 2), (1, 'tensor', 2))
  assert (weight.bytes, weight.local_bytes, weight.copies) == (192, 48, 2)
  assert (scale.bytes, scale.local_bytes, scale.copies) == (16, 8, 4)
  assert (step.split, step.local_bytes, step.copies) == ((), 4, 8)
  text = holdings_table(placed)
  assert '56 B        208 B  params\n' in text
  assert '60 B        212 B  in all\n' in text
  assert 'axis 0 over fsdp 2, axis 1 over tensor 2; 2 copies' in text
