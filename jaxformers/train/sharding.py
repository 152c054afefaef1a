"""Which device holds what: one mesh, one table from letters to mesh axes.

Models never mention devices. A parameter's name ends in the letters of its
dimensions, the table says along which axis of the mesh each letter is split,
and the optimiser's moments follow because they carry the same names.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

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


@dataclasses.dataclass(frozen=True)
class MeshShape:
  """How many devices each axis of the mesh has.

  Attributes:
    data: copies of the parameters, each with its part of the batch; -1 for all
      devices that the other axes leave.
    fsdp: parts of the batch that also share out the parameters.
    tensor: parts of heads, hidden units and vocabulary.
    sequence: parts of each sequence.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  sequence: int = 1

  def sizes(self, devices: int) -> dict[str, int] | None:
    """Returns the size of each axis, or None if they do not fit the devices.

    Args:
      devices: how many there are.
    """
    sizes = dataclasses.asdict(self)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if self.data == -1 and fixed > 0:
      sizes['data'] = devices // fixed
    fits = math.prod(sizes.values()) == devices and min(sizes.values()) >= 1
    return sizes if fits else None

  def build(self) -> Mesh:
    """Returns the mesh over all devices of all processes.

    Raises:
      ValueError: if the axes do not multiply to the number of devices.
    """
    sizes = self.sizes(jax.device_count())
    if sizes is None:
      raise ValueError(
        f'{self} does not fit {jax.device_count()} devices: its axes must '
        'multiply to that number; data=-1 takes what the others leave.'
      )
    axis_types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types)


def batch_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
  """Returns how a batch `[B, L, ...]` lies on the mesh."""
  axes = [('data', 'fsdp'), 'sequence'][:ndim]
  return NamedSharding(mesh, PartitionSpec(*axes))


def shardings(
  tree: Any, mesh: Mesh, rules: dict[str, str] | None = None
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
    mesh_axis = rules.get(letter)
    if mesh_axis is None or mesh.shape[mesh_axis] == 1:
      return None
    if size % mesh.shape[mesh_axis] == 0:
      return mesh_axis
    if letter == 'G' and size < mesh.shape[mesh_axis]:
      return None
    raise ValueError(
      f'{name}: axis {letter} of size {size} does not divide among the '
      f'{mesh.shape[mesh_axis]} devices of mesh axis {mesh_axis!r}; change '
      'the size or the mesh.'
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
