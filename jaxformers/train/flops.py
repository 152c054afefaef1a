"""How much arithmetic a program asks for, and how much a device can do.

Compilers count a loop body once, whatever its length, so their numbers are of
no use for models whose layers are scanned. The traced program tells the truth:
it holds the length of every scan, and the recomputation that `jax.checkpoint`
adds.
"""

import math
from typing import Any

import jax
from jax.interpreters import partial_eval

from jaxformers.train.experiment import Experiment
from jaxformers.train.objective import Batch
from jaxformers.train.state import TrainState
from jaxformers.train.step import evaluate_step_of
from jaxformers.train.step import train_step_of

_TERA = 1e12

# Dense bfloat16 multiply-adds, two operations each, without structured
# sparsity, per device as JAX counts devices: chips of TPU v2, v3 and 7x hold
# two. The longest name that begins the device kind decides.
# Sources: cloud.google.com/tpu/docs/v2 to /tpu7x, "system architecture", peak
# compute per chip (v2: 46, v3: 123, 7x: 2307); data sheets of NVIDIA A10, A30,
# A100, L4, L40S, H100, H200, GH200 and the HGX and GB200 pages for Blackwell,
# where bfloat16 with sparsity is twice the dense number. JAX's own table of TPUs
# (`jax._src.tpu_info`, 0.12) agrees to 1 %, but for v3, which it gives 140.
_PEAK_TERA_FLOPS = {
  'TPU v2': 23.0,
  'TPU v3': 61.5,
  'TPU v4': 275.0,
  'TPU v4 lite': 138.0,
  'TPU v5': 459.0,
  'TPU v5p': 459.0,
  'TPU v5 lite': 197.0,
  'TPU v5e': 197.0,
  'TPU v6 lite': 918.0,
  'TPU v6e': 918.0,
  'TPU7x': 1153.5,
  'TPU v7x': 1153.5,
  'NVIDIA A10': 125.0,
  'NVIDIA A10G': 70.0,
  'NVIDIA A30': 165.0,
  'NVIDIA A100': 312.0,
  'NVIDIA L4': 121.0,
  'NVIDIA L40S': 362.0,
  'NVIDIA H100': 989.0,
  'NVIDIA H100 PCIe': 756.0,
  'NVIDIA H100 NVL': 835.0,
  'NVIDIA H200': 989.0,
  'NVIDIA H200 NVL': 835.0,
  'NVIDIA GH200': 989.0,
  'NVIDIA B200': 2250.0,
  'NVIDIA GB200': 2500.0,
}


def matmul_flops(jaxpr: jax.extend.core.Jaxpr) -> int:
  """Counts the operations of the matrix products and convolutions of a program.

  A product of `[..., L, K]` and `[..., K, M]` counts `2 L M K` for each element
  of the batch. A scan counts its body times its length, a Pallas kernel times
  its grid, a `shard_map` times its shards; a condition counts its most
  expensive branch; a `while` loop counts its body once, since the number of
  rounds is not known before it runs. Everything else counts nothing, nor does
  what no result depends on, since compilers drop it.

  Args:
    jaxpr: a traced program, such as `jax.make_jaxpr(step)(*args).jaxpr`; a
      closed one will do.

  Returns:
    Floating-point operations of one call, over all devices.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> program = jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 5)))
    >>> matmul_flops(program.jaxpr)
    60
  """
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return sum(map(_flops, live.eqns))


def model_flops(experiment: Experiment, state: TrainState, batch: Batch) -> int:
  """Counts the operations that a model needs to learn from a batch.

  Three times those of its forward pass, since the gradient of a product is two
  products; or those of the train step if they are fewer, as where parameters
  are frozen. What is computed again to save memory or to cut sequences does not
  count, nor what a method computes beyond the gradient.

  Args:
    experiment: the run.
    state: arrays or their shapes.
    batch: arrays or their shapes.

  Returns:
    Floating-point operations of one step, over all devices.
  """
  step, forward = (
    matmul_flops(jax.make_jaxpr(function)(state, batch))
    for function in (train_step_of(experiment), evaluate_step_of(experiment))
  )
  return min(step, 3 * forward)


def _flops(eqn: Any) -> int:
  """Counts one equation."""
  if eqn.primitive.name == 'dot_general':
    (contracted, _), _ = eqn.params['dimension_numbers']
    shape = eqn.invars[0].aval.shape
    summed = math.prod(shape[axis] for axis in contracted)
    return 2 * eqn.outvars[0].aval.size * summed
  if eqn.primitive.name == 'conv_general_dilated':
    kernel = eqn.invars[1].aval
    outputs = kernel.shape[eqn.params['dimension_numbers'].rhs_spec[0]]
    return 2 * eqn.outvars[0].aval.size * (kernel.size // max(outputs, 1))
  inner = [matmul_flops(program) for program in programs_in(eqn.params)]
  if eqn.primitive.name == 'cond':
    return max(inner)
  return _repeats(eqn) * sum(inner)


def programs_in(params: dict[str, Any]) -> list[Any]:
  """Returns the programs among the parameters of an equation.

  Args:
    params: of a traced equation.
  """
  is_program = lambda leaf: hasattr(leaf, 'eqns') or hasattr(leaf, 'jaxpr')
  leaves = jax.tree.leaves(params, is_leaf=is_program)
  return [leaf for leaf in leaves if is_program(leaf)]


def _repeats(eqn: Any) -> int:
  """Returns how often an equation runs the programs within it."""
  match eqn.primitive.name:
    case 'scan':
      return eqn.params['length']
    case 'shard_map':
      sizes = eqn.params['mesh'].shape
      return math.prod(sizes[axis] for axis in eqn.params['newly_manual_axes'])
    case 'pallas_call':
      return math.prod(eqn.params['grid_mapping'].grid)
  return 1


def peak_flops(device: Any) -> float | None:
  """Returns the most that a device can do, for the utilisation of its peak.

  Args:
    device: a `jax.Device`, or anything with a `device_kind`.

  Returns:
    Dense bfloat16 operations per second from the data sheet, or None for CPUs
    and devices that are not in the table.
  """
  kind = device.device_kind
  names = [
    name
    for name in _PEAK_TERA_FLOPS
    if kind == name or kind.startswith((f'{name} ', f'{name}-'))
  ]
  return _TERA * _PEAK_TERA_FLOPS[max(names, key=len)] if names else None
