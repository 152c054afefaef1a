"""Which way gated recurrences go on a platform, if nobody says."""

import jax
import jax.numpy as jnp
import pytest

from jaxformers.ops import rg_lru
from jaxformers.ops import selective_recurrence
from jaxformers.ops import wkv

B, L, D = 2, 200, 4


def gated(x, gain, **options):
  return rg_lru(x, x, x, gain, **options)


def selective(x, gain, **options):
  rates = -jnp.stack([gain, gain], axis=1)
  reads = x[..., :2]
  return selective_recurrence(x, x, rates, reads, reads, **options)


def means(x, gain, **options):
  return wkv(x, x, gain, gain, **options)


@pytest.mark.parametrize('operator', [gated, selective, means])
def test_the_loop_is_for_cpus(operator):
  shapes = [
    jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((B, L, D), (D,))
  ]

  def program(platform, method):
    run = jax.jit(lambda x, gain: operator(x, gain, method=method))
    return jax.export.export(run, platforms=(platform,))(*shapes).mlir_module()

  for platform, method in (('cpu', 'fused'), ('tpu', 'chunked')):
    count = program(platform, 'auto').count('stablehlo.multiply')
    assert count == program(platform, method).count('stablehlo.multiply')
  counts = [
    program('cpu', method).count('stablehlo.multiply')
    for method in ('fused', 'chunked')
  ]
  assert counts[0] != counts[1]
