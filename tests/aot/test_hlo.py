"""What is read from compiled programs, against counts made by hand."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import pytest

from jaxformers.aot.hlo import Module
from jaxformers.aot.hlo import _members
from jaxformers.aot.hlo import array_bytes
from jaxformers.train import MeshShape


def compiled(function, *arguments, out=None):
  """The optimised program of a function on a mesh of 8 devices."""
  shapes = [
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    for shape, sharding in arguments
  ]
  return Module(
    jax.jit(function, out_shardings=out).lower(*shapes).compile().as_text()
  )


@pytest.fixture(scope='module')
def mesh():
  return MeshShape(data=1, fsdp=8).build()


def on(mesh, *axes):
  return NamedSharding(mesh, PartitionSpec(*axes))


def test_a_weight_that_is_shared_out_is_gathered_once(mesh):
  module = compiled(
    lambda x, w: x @ jax.lax.with_sharding_constraint(w, on(mesh)),
    ((16, 64), on(mesh, 'fsdp')),
    ((64, 32), on(mesh, 'fsdp')),
    out=on(mesh, 'fsdp'),
  )
  [gather] = module.collectives(island=8)
  assert (gather.kind, gather.group, gather.crosses) == ('all-gather', 8, False)
  assert gather.bytes == 4 * 64 * 32
  assert gather.sent == 4 * 64 * 32 * 7 / 8


def test_a_loop_counts_as_often_as_it_runs(mesh):
  def layers(x, w):
    def layer(x, w):
      return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, on(mesh))), None

    return jax.lax.scan(layer, x, w)[0]

  module = compiled(
    layers,
    ((16, 64), on(mesh, 'fsdp')),
    ((5, 64, 64), on(mesh, None, 'fsdp')),
    out=on(mesh, 'fsdp'),
  )
  gathered = [c for c in module.collectives(8) if c.kind == 'all-gather']
  assert sum(c.bytes for c in gathered) == 5 * 4 * 64 * 64
  # Each round reads and writes at least the rows and the gathered weight.
  assert module.memory_traffic() > 5 * 4 * (2 * 2 * 64 + 2 * 64 * 64)


def test_the_gradient_of_copies_is_reduced_once(mesh):
  module = compiled(
    jax.grad(lambda w, x: jnp.sum((x @ w) ** 2)),
    ((64, 32), on(mesh)),
    ((16, 64), on(mesh, 'fsdp')),
    out=on(mesh),
  )
  [reduce] = module.collectives(island=4)
  assert (reduce.kind, reduce.group, reduce.crosses) == ('all-reduce', 8, True)
  assert reduce.bytes == 4 * 64 * 32
  assert reduce.sent == 2 * 4 * 64 * 32 * 7 / 8


def test_the_largest_arrays_come_first_with_their_origin(mesh):
  module = compiled(
    lambda x, y: jnp.sum(jnp.sort(x @ y, axis=0) ** 2),
    ((64, 256), on(mesh)),
    ((256, 512), on(mesh)),
  )
  largest = module.largest_buffers(2)
  assert largest[0].bytes == 4 * 64 * 512
  assert largest[0].shape == 'f32[64,512]'
  assert 'dot_general' in largest[0].source or 'sort' in largest[0].source


def test_sizes_are_read_from_shapes():
  text = '(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, pred[8], s32[], token[], u4[4])'
  assert array_bytes(text) == [12, 8, 4, 2]
  assert array_bytes(text, memory_only=True) == [0, 8, 4, 2]
  assert array_bytes('f8e4m3fn[10]{0}') == [10]


@pytest.mark.parametrize(
  ('groups', 'expected'),
  [
    ('replica_groups={{0,2},{1,3}}, ', [0, 2]),
    ('replica_groups={}, ', list(range(8))),
    ('dimensions={0}', list(range(8))),
    ('replica_groups=[2,4]<=[8], ', [0, 1, 2, 3]),
    ('replica_groups=[4,2]<=[2,4]T(1,0), ', [0, 4]),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}, ", [0, 1, 2, 3]),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}, ", [0, 4]),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, ", list(range(8))),
    (
      "replica_groups=mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'c'}, ",
      [0, 2],
    ),
  ],
)
def test_groups_are_read_in_all_their_notations(groups, expected):
  assert _members(groups, 8) == expected


def test_a_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match='no HLO module'):
    Module('hello')


def test_what_a_collective_started_with_is_not_what_it_gives():
  text = """HloModule m

ENTRY %main (p: f32[2]) -> f32[8] {
  %p = f32[2]{0} parameter(0)
  %several = ((f32[2]{0:T(8)}, f32[3]{0}), (f32[8]{0:T(8)}, f32[12]{0})) \
all-gather-start(%p, %p), channel_id=1, replica_groups={{0,1,2,3}}
  %one = (f32[2]{0}, f32[2]{0}, u32[], u32[]) collective-permute-start(%p), \
channel_id=2, source_target_pairs={{0,1},{1,0}}
}
"""
  found = {c.kind: c for c in Module(text).collectives(island=1)}
  assert found['all-gather'].bytes == 4 * 20
  assert found['collective-permute'].bytes == 8
  assert found['collective-permute'].crosses


def test_slices_send_each_other_what_their_hosts_carry():
  text = """HloModule m

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %after = token[] after-all()
  %send = (f32[8]{0}, u32[], token[]) send(%p, %after), channel_id=4, \
is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type=\
"ALL_REDUCE"}
}
"""
  [found] = Module(text).collectives(island=4, islands=4)
  assert (found.kind, found.bytes, found.crosses) == ('all-reduce', 32, True)
  assert found.sent == 2 * 32 * 3 / 4


def test_groups_that_are_not_named_are_all_devices():
  text = """HloModule m, num_partitions=4

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %all = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups={}, \
to_apply=%add
  %ragged = f32[8]{0} ragged-all-to-all(%p, %p, %p, %p, %p, %p), \
channel_id=2, replica_groups={}
  %copies = f32[8]{0} all-reduce(%p), replica_groups={}, to_apply=%add
}
"""
  every, ragged = Module(text).collectives(island=2, islands=2)
  assert (every.kind, every.group, every.crosses) == ('all-reduce', 4, True)
  assert (ragged.kind, ragged.sent) == ('ragged-all-to-all', 32 * 3 / 4)


def test_groups_in_an_unknown_notation_are_refused():
  with pytest.raises(ValueError, match='cannot read the groups .*=new'):
    _members('replica_groups=new[2]', 8)


def test_all_that_shard_map_makes_counts_though_it_shares_a_channel(mesh):
  def round_the_ring(x, y):
    turn = [(i, (i + 1) % 8) for i in range(8)]
    x, y = (jax.lax.ppermute(a, 'fsdp', turn) for a in (x, y))
    return x, jnp.sin(y)

  spec = PartitionSpec('fsdp')
  function = jax.shard_map(
    round_the_ring, mesh=mesh, in_specs=spec, out_specs=spec
  )
  rows = (16, 64), on(mesh, 'fsdp')
  found = compiled(function, rows, rows).collectives(island=8)
  assert {c.kind for c in found} == {'collective-permute'}
  assert sum(c.bytes for c in found) == 2 * 4 * 2 * 64
