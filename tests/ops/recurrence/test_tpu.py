"""The kernel for TPUs, compiled by their compiler where that is installed."""

import os
import subprocess
import sys

import pytest

from jaxformers.aot import Topology
from jaxformers.aot import environment

PROGRAM = """
import functools, jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxformers.ops import linear_recurrence, selective_recurrence
from jaxformers.ops.segments import Places

topology = topologies.get_topology_desc(
  topology_name='v5e:2x2', platform='tpu', num_slices=1
)
mesh = topologies.make_mesh(topology, (4,), ('x',))

def compiled(run, spec, *arrays):
  sharding = NamedSharding(mesh, spec)
  shapes = [jax.ShapeDtypeStruct(*x, sharding=sharding) for x in arrays]
  loss = lambda *x: jnp.sum(run(*x).real ** 2)
  gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
  return gradient.lower(*shapes).compile().as_text()

def local(spec):
  run = lambda *x: linear_recurrence(*x, method='pallas').states
  return jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)

rows = P('x')
for arrays in (
  (((4, 1024, 256), jnp.float32), ((4, 1024, 256), jnp.float32)),
  (((4, 1, 256), jnp.float32), ((4, 1000, 256), jnp.bfloat16)),
  (((4, 1, 40), jnp.complex64), ((4, 30, 40), jnp.complex64)),
):
  assert compiled(local(rows), rows, *arrays).count('tpu_custom_call') == 2

steps = P(None, 'x')
split = jax.shard_map(
  lambda *x: linear_recurrence(
    *x, axis_name='x', method='pallas'
  ).states,
  mesh=mesh, in_specs=steps, out_specs=steps,
)
both = ((2, 1024, 256), jnp.float32)
assert compiled(split, steps, both, both).count('tpu_custom_call') == 4

# The selective scan, with a row on each device.
ones = jnp.ones((1, 1000), jnp.int32)
for channels, groups, states, discretization, places in (
  (1024, 1, 16, 'euler', None),
  (600, 2, 64, 'zoh', Places(ones, ones)),
):
  def loss(x, step, b, c, a):
    out, last = selective_recurrence(
      x, step, a, b, c, softplus=True, places=places, method='pallas',
      discretization=discretization,
    )
    return out.sum() + last.sum()

  specs = rows, rows, rows, rows, P()
  shapes = (4, 1000, channels), (4, 1000, groups, states), (channels, states)
  arrays = [
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    for shape, spec in zip((*shapes[:1] * 2, *shapes[1:2] * 2, shapes[2]), specs)
  ]
  gradient = jax.shard_map(
    lambda *x: jax.grad(loss, range(5))(*x),
    mesh=mesh, in_specs=specs, out_specs=specs,
  )
  text = jax.jit(gradient).lower(*arrays).compile().as_text()
  assert text.count('tpu_custom_call') == 2
print('compiled')
"""


def test_the_kernel_compiles_for_tpus_forwards_and_backwards():
  pytest.importorskip('libtpu')
  process = subprocess.run(
    [sys.executable, '-c', PROGRAM],
    env=os.environ | environment(Topology.parse('v5e:2x2')),
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.stdout.endswith('compiled\n'), process.stderr
