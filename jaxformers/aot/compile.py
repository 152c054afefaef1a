"""Compiles a step of an experiment for a machine that is not here.

Nothing is allocated and no data is read: parameters, state and batch are shapes
with their places on the mesh of the machine. The compiler is that of the
machine, so memory, layouts and collectives are those that it will have.
"""

import importlib.metadata
import importlib.util
import os
import re
import time
from typing import Any

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from jaxformers.aot.hardware import Topology
from jaxformers.aot.hardware import memory_fraction
from jaxformers.aot.hlo import Module
from jaxformers.aot.report import Part
from jaxformers.aot.report import Report
from jaxformers.aot.report import Traffic
from jaxformers.aot.search import remat_of
from jaxformers.train.experiment import Experiment
from jaxformers.train.flops import matmul_flops
from jaxformers.train.flops import model_flops
from jaxformers.train.flops import programs_in
from jaxformers.train.holdings import holdings
from jaxformers.train.program import abstract_batch
from jaxformers.train.program import abstract_state
from jaxformers.train.sharding import STATE_RULES
from jaxformers.train.sharding import on_mesh
from jaxformers.train.sharding import shardings
from jaxformers.train.step import evaluate_step_of
from jaxformers.train.step import train_step_of

_NAMED = 8
"""How many arrays a report names."""


def environment(topology: Topology) -> dict[str, str]:
  """Returns environment variables that a process which compiles must have.

  Args:
    topology: the machine.

  Raises:
    ImportError: if its compiler is not installed.
  """
  if topology.chip.platform == 'tpu':
    if importlib.util.find_spec('libtpu') is None:
      raise ImportError(
        'compiling for TPUs needs their compiler, which also runs without a '
        "TPU: pip install 'jaxformers[tpu]'."
      )
    # The last three keep the compiler from looking for machines around it, and
    # processes beside each other from locking each other out.
    return {
      'JAX_PLATFORMS': 'cpu',
      'TPU_SKIP_MDS_QUERY': '1',
      'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
      'TPU_WORKER_HOSTNAMES': 'localhost',
      'TPU_WORKER_ID': '0',
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    }
  if importlib.util.find_spec('jax_cuda13_plugin') is None:
    raise ImportError(
      'compiling for GPUs needs the plugin of JAX, which also runs without a '
      "GPU: pip install 'jaxformers[gpu-aot]'."
    )
  return {'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': '-1'}


def devices_of(topology: Topology) -> list[Any]:
  """Returns the devices of a machine, good for compiling only.

  Args:
    topology: the machine.
  """
  shape = 'x'.join(map(str, topology.shape))
  if topology.chip.platform == 'cuda':
    found = topologies.get_topology_desc(
      platform='cuda', target_config=topology.chip.description, topology=shape
    )
    return list(found.devices)
  # v4 has two cores that act as one device; small slices lie on one host.
  options = {'num_slices': topology.slices}
  if topology.chip.name == 'v4':
    options['chip_config_name'] = 'megacore'
  if max(topology.shape) == 1:
    options['chips_per_host_bounds'] = (1, 1, 1)
  found = topologies.get_topology_desc(
    topology_name=f'{topology.chip.name}:{shape}', platform='tpu', **options
  )
  return list(found.devices)


def compile_step(
  experiment: Experiment,
  topology: Topology,
  *,
  step: str = 'train',
  length: int | None = None,
  fast: bool = False,
) -> Report:
  """Compiles a step of an experiment and reports what it asks for.

  Args:
    experiment: the run; its mesh is that of the machine.
    topology: the machine.
    step: `'train'` for the train step, `'evaluate'` for that on held-out rows,
      `'decode'` for one new token per row of a batch.
    length: how many tokens the state of decoding holds; None for that of the
      rows of the data.
    fast: whether to optimise less, several times faster, which hardly changes
      the memory.

  Raises:
    ValueError: if the experiment does not fit the mesh, or there is no such
      step.
  """
  fraction = memory_fraction(topology.chip, os.environ)
  mesh = experiment.mesh.build(devices_of(topology))
  jitted, arguments, kept = _program(experiment, mesh, step, length)
  traced = jitted.trace(*arguments)
  lowered = traced.lower()
  begin = time.monotonic()
  if fast:
    jax.config.update('jax_optimization_level', 'O0')
  try:
    compiled, error = lowered.compile(), None
  except jax.errors.JaxRuntimeError as raised:
    compiled, error = None, raised
    if 'RESOURCE_EXHAUSTED' not in str(raised):
      raise
  seconds = time.monotonic() - begin
  devices = topology.devices
  flops = matmul_flops(traced.jaxpr.jaxpr)
  needed = model_flops(experiment, *arguments) if step == 'train' else flops
  facts = dict(
    program=step,
    topology=topology.name,
    mesh=dict(mesh.shape),
    versions=_versions(topology),
    parts=kept,
    flops=flops / devices,
    model_flops=needed / devices,
    tokens=_tokens(experiment, step),
    seconds_to_compile=seconds,
    remat=remat_of(experiment),
    memory_fraction=fraction,
  )
  if error is not None:
    found = _exhausted(str(error), traced.jaxpr, kept)
    return Report(**facts, **found)
  memory = fraction * topology.chip.memory
  return Report(**facts, **_measured(compiled, topology, memory))


def _program(experiment, mesh, step, length):
  """Returns the step for `jax.jit`, its arguments, and what stays in memory."""
  state = abstract_state(experiment, mesh)
  places = jax.tree.map(lambda leaf: leaf.sharding, state)
  if step == 'decode':
    return _decode_program(experiment, mesh, state, length)
  batch = abstract_batch(experiment, mesh)
  if step == 'train':
    function = on_mesh(train_step_of(experiment), mesh)
    jitted = jax.jit(function, donate_argnums=0, out_shardings=(places, None))
  elif step == 'evaluate':
    jitted = jax.jit(on_mesh(evaluate_step_of(experiment), mesh))
  else:
    raise ValueError(
      f"step must be 'train', 'evaluate' or 'decode', got {step!r}."
    )
  return jitted, (state, batch), _kept(state)


def _decode_program(experiment, mesh, state, length):
  """One token per row, with states as long as asked."""
  model, rows = experiment.model, experiment.batch_size
  example = experiment.data.example()
  if not hasattr(model, 'initial_state') or 'tokens' not in example:
    raise ValueError(
      f'{type(model).__name__} cannot be decoded: it has no initial_state, or '
      'its data no tokens.'
    )
  length = length or example['tokens'].shape[0]
  shapes = jax.eval_shape(lambda: model.initial_state(rows, length))
  carried = jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    shapes,
    shardings(shapes, mesh, STATE_RULES),
  )
  places = jax.tree.map(lambda leaf: leaf.sharding, carried)
  token_BL = jax.ShapeDtypeStruct(
    (rows, 1),
    jnp.int32,
    sharding=NamedSharding(mesh, PartitionSpec(STATE_RULES['B'])),
  )

  def decode_step(variables, tokens_BL, carried):
    logits_BLV, carried = model.apply(variables, tokens_BL, carried)
    return jnp.argmax(logits_BLV, axis=-1), carried

  jitted = jax.jit(
    on_mesh(decode_step, mesh), donate_argnums=2, out_shardings=(None, places)
  )
  variables = state.variables
  kept = _kept({'params': variables, 'state': carried})
  return jitted, (variables, token_BL, carried), kept


def _kept(tree) -> tuple[Part, ...]:
  """Returns what stays in memory, by the first words of the names."""
  sizes = {}
  for holding in holdings(tree):
    head = holding.name.partition('/')[0]
    sizes[head] = sizes.get(head, 0) + holding.local_bytes
  parts = [Part(f'{head} in all', size) for head, size in sizes.items()]
  return tuple(sorted(parts, key=lambda p: -p.bytes))


def _tokens(experiment, step):
  example = experiment.data.example()
  length = next(iter(example.values())).size if step != 'decode' else 1
  return experiment.batch_size * length


def _versions(topology):
  tpu = topology.chip.platform == 'tpu'
  compiler = 'libtpu' if tpu else 'jax-cuda13-plugin'
  return {n: importlib.metadata.version(n) for n in ('jax', compiler)}


def _measured(compiled, topology, memory):
  stats = compiled.memory_analysis()
  module = Module(compiled.as_text())
  collectives = module.collectives(
    topology.island, topology.devices // topology.island
  )
  traffic = []
  for kind in sorted({c.kind for c in collectives}):
    own = [c for c in collectives if c.kind == kind]
    traffic.append(
      Traffic(
        kind=kind,
        bytes=sum(c.bytes for c in own),
        sent=sum(c.sent for c in own if not c.crosses),
        sent_far=sum(c.sent for c in own if c.crosses),
        count=len(own),
      )
    )
  return dict(
    fits=stats.peak_memory_in_bytes <= memory,
    peak_bytes=float(stats.peak_memory_in_bytes),
    buffers=tuple(
      Part(f'{b.shape} {_place(b.source)}'.strip(), b.bytes)
      for b in module.largest_buffers(_NAMED)
    ),
    memory_traffic=module.memory_traffic(),
    traffic=tuple(traffic),
  )


def _place(source: str) -> str:
  """Shortens a name that JAX gave an operation."""
  kept = [
    part
    for part in re.sub(r'jit\((\w+)\)/', '', source).split('/')
    if part not in ('while', 'body', 'closed_call', 'checkpoint', 'rematted')
  ]
  return '/'.join(kept[-5:])


_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40, '': 1}


def _exhausted(message: str, program: Any = None, kept: tuple[Part, ...] = ()):
  """Reads what the compiler says about memory that does not suffice."""
  number = r'([\d.]+)([KMGT]?)'
  peak = None
  if used := re.search(rf'Used {number} of', message):
    peak = float(used[1]) * _UNITS[used[2]]
  elif used := re.search(rf'temporaries \({number}\) exceeds', message):
    peak = float(used[1]) * _UNITS[used[2]] + sum(part.bytes for part in kept)
  entries = re.findall(
    rf'Size: {number}.*?\n(?:\s+Operator: op_name="([^"]*)".*?\n)?'
    r'\s+Shape: (\S+)',
    message,
  )
  buffers = [
    Part(
      f'{shape.partition("{")[0]} {_place(name)}'.strip(), float(n) * _UNITS[u]
    )
    for n, u, name, shape in entries
  ]
  if not buffers and program is not None:
    buffers = _largest_results(program)
  return dict(
    fits=False,
    peak_bytes=peak,
    buffers=tuple(buffers[:_NAMED]),
    memory_traffic=0.0,
    traffic=(),
  )


def _largest_results(program: Any) -> list[Part]:
  """Returns the largest arrays that a program makes, over all devices."""
  found = {}

  def visit(jaxpr):
    for equation in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
      for variable in equation.outvars:
        shape = variable.aval
        if hasattr(shape, 'size') and hasattr(shape.dtype, 'itemsize'):
          name = (
            f'{shape.str_short()} {equation.primitive.name}, over all devices'
          )
          found[name] = float(shape.size * shape.dtype.itemsize)
      for inner in programs_in(equation.params):
        visit(inner)

  visit(program)
  parts = [Part(name, size) for name, size in found.items()]
  return sorted(parts, key=lambda part: -part.bytes)
