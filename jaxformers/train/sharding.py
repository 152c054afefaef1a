"""Which device holds what: one mesh, one table from letters to mesh axes.

Models never mention devices. A parameter's name ends in the letters of its
dimensions, the table says along which axis of the mesh each letter is split,
and the optimiser's moments follow because they carry the same names.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from jaxformers.nn.placement import ROWS
from jaxformers.optim.optimizer import dimension_letters

RULES = {
  'D': 'fsdp',
  'F': 'tensor',
  'G': 'tensor',
  'H': 'tensor',
  'V': 'tensor',
  'X': 'tensor',
}
"""Mesh axis of each dimension letter; other letters are not split."""

STATE_RULES = {
  'B': ROWS,
  'F': 'tensor',
  'G': 'tensor',
  'H': 'tensor',
}
"""The same for what a model carries from call to call."""


@dataclasses.dataclass(frozen=True)
class MeshShape:
  """How many devices each axis of the mesh has; -1 for all that are left.

  Attributes:
    data: copies of the parameters, each with its part of the batch.
    fsdp: parts of the batch that also share out the parameters.
    tensor: parts of heads, hidden units and vocabulary.
    sequence: parts of each sequence.
    dcn: groups of devices that only the network of the data centre joins; each
      has copies of the parameters and its part of the batch. Slices of TPUs are
      such groups, and must be; hosts of GPUs may be.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  sequence: int = 1
  dcn: int = 1

  def sizes(self, devices: int) -> dict[str, int] | None:
    """Returns the size of each axis, or None if they do not fit the devices.

    Args:
      devices: how many there are.
    """
    sizes = {'dcn': self.dcn, **dataclasses.asdict(self)}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) == 1 and fixed > 0:
      sizes[free[0]] = devices // fixed
    fits = math.prod(sizes.values()) == devices and min(sizes.values()) >= 1
    return sizes if fits else None

  def build(self, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh, neighbours in it being neighbours in the machine.

    Args:
      devices: those to arrange; None for all of all processes.

    Raises:
      ValueError: if the axes do not multiply to the number of devices, or TPUs
        lie in several slices and `dcn` is not their number.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = self.sizes(len(devices))
    if sizes is None:
      raise ValueError(
        f'{self} does not fit {len(devices)} devices: its axes must '
        'multiply to that number; one that is -1 takes what the others leave.'
      )
    axis_types = (AxisType.Auto,) * len(sizes)
    return Mesh(_arranged(devices, sizes), tuple(sizes), axis_types=axis_types)


def _arranged(devices, sizes):
  """Returns an array of devices with an axis for each axis of the mesh."""
  shape = tuple(sizes.values())
  groups = len({getattr(device, 'slice_index', 0) for device in devices})
  if devices[0].platform != 'tpu':
    # XLA calls hosts of GPUs slices too, and numbers devices host by host. Any
    # axis may pass from one to the next.
    devices = sorted(devices, key=lambda device: device.id)
  elif groups not in (1, sizes['dcn']):
    raise ValueError(
      f'the devices lie in {groups} slices, so the mesh needs dcn={groups}, '
      f'got dcn={sizes["dcn"]}.'
    )
  if groups == 1 or groups != sizes['dcn']:
    return mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  return mesh_utils.create_hybrid_device_mesh(
    (1, *shape[1:]),
    (groups, *(1 for _ in shape[1:])),
    devices,
    allow_split_physical_axes=True,
  )


def axis_size(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
  """Returns how many devices one or several axes of a mesh have; 1 for None."""
  axes = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(mesh.shape[axis] for axis in axes)


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
  """Returns a function whose activations may be placed on a mesh.

  Args:
    function: what `jax.jit` shall compile; its layers may call
      `jaxformers.nn.place`.
    mesh: the mesh.
  """

  @functools.wraps(function)
  def placed(*arguments):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*arguments)

  return placed


def batch_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
  """Returns how a batch `[B, L, ...]` lies on the mesh."""
  axes = [ROWS, 'sequence'][:ndim]
  return NamedSharding(mesh, PartitionSpec(*axes))


def shardings(
  tree: Any,
  mesh: Mesh,
  rules: dict[str, str | tuple[str, ...]] | None = None,
) -> Any:
  """Returns the sharding of each leaf of parameters or optimiser state.

  Axes before the named ones, which scanning layers adds, are not split. Key and
  value heads (G) that are fewer than the devices are copied instead.

  Args:
    tree: arrays or their shapes, under their names.
    mesh: the mesh.
    rules: mesh axis of each letter; None for `RULES`.

  Raises:
    ValueError: if an axis does not divide among its devices.
  """
  rules = RULES if rules is None else rules

  def axis(name, letter, size):
    mesh_axes = rules.get(letter)
    parts = axis_size(mesh, mesh_axes)
    if parts == 1:
      return None
    if size % parts == 0:
      return mesh_axes
    if letter == 'G' and size < parts:
      return None
    raise ValueError(
      f'{name}: axis {letter} of size {size} does not divide among the '
      f'{parts} devices of mesh axis {mesh_axes!r}; change the size or the '
      'mesh.'
    )

  def sharding(path, leaf):
    letters = dimension_letters(path) if path else ''
    name = jax.tree_util.keystr(path)
    stacked = leaf.ndim - len(letters)
    if stacked < 0:  # A factored moment under the name of its parameter.
      letters, stacked = '', leaf.ndim
    axes = map(axis, [name] * len(letters), letters, leaf.shape[stacked:])
    return NamedSharding(mesh, PartitionSpec(*[None] * stacked, *axes))

  return jax.tree_util.tree_map_with_path(sharding, tree)
