"""Where activations lie when a program runs on many devices.

Parameters are placed by their names; activations follow from them, mostly. Where
the compiler would have to guess, layers say it: `place(x_BLD, 'BLD')` asks for
what the letters mean on the mesh of the surrounding program. Without a mesh, or
on one device, it does nothing.
"""

import math

import jax
from jax import Array
from jax.sharding import AbstractMesh
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

ROWS = 'dcn', 'data', 'fsdp'
"""Axes of the mesh that share out the rows of a batch."""

ACTIVATION_RULES: dict[str, tuple[str, ...]] = {
  'B': ROWS,
  'F': ('tensor',),
  'G': ('tensor',),
  'H': ('tensor',),
  'L': ('sequence',),
  'V': ('tensor',),
  'X': ('tensor',),
}
"""Mesh axes of each letter of an activation; other letters are not split."""

LOOKED_UP_RULES = ACTIVATION_RULES | {'B': ('dcn', 'data'), 'D': ('fsdp',)}
"""The same for rows that come out of a table whose width is split: from here
to `ACTIVATION_RULES` it is one exchange among the devices of `fsdp`."""


def place(
  x: Array,
  letters: str,
  rules: dict[str, tuple[str, ...]] = ACTIVATION_RULES,
) -> Array:
  """Asks for an activation to lie as its letters say.

  Axes that do not divide among their devices, and those that `jax.shard_map`
  has taken over, are left to the compiler. Mesh axes with other names than ours
  are not touched.

  Source: none; Xu et al., "GSPMD", 2021, arXiv 2105.04663, section 3 explains
  annotations.

  Args:
    x: an array with one axis per letter.
    letters: such as `'BLD'`.
    rules: mesh axes of each letter.

  Raises:
    ValueError: if there are more or fewer letters than axes.
  """
  if len(letters) != x.ndim:
    raise ValueError(
      f'{letters!r} names {len(letters)} axes of an array of shape '
      f'{list(x.shape)}.'
    )
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  spec = PartitionSpec(
    *(
      axes_of(mesh, rules.get(letter, ()), size) or PartitionSpec.UNCONSTRAINED
      for letter, size in zip(letters, x.shape, strict=True)
    )
  )
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def axes_of(
  mesh: AbstractMesh, axes: tuple[str, ...], size: int
) -> tuple[str, ...]:
  """Returns those axes of a mesh that may cut an array's axis of that size.

  Source: none; see `place`.

  Args:
    mesh: the mesh.
    axes: names, of which the mesh need not have all.
    size: what must divide among their devices; if it does not, none may.
  """
  types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  found = tuple(
    axis
    for axis in axes
    if types.get(axis) == AxisType.Auto and mesh.shape[axis] > 1
  )
  return found if size % math.prod(mesh.shape[a] for a in found) == 0 else ()


def sequence_mesh(length: int) -> AbstractMesh | None:
  """Returns the mesh of the surrounding program if it cuts sequences.

  Source: none; see `place`.

  Args:
    length: of the sequences, which must divide among the devices.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not axes_of(mesh, ('sequence',), length):
    return None
  return mesh
