"""What `jax.shard_map` asks of the carries of loops."""

from typing import Any

import jax


def varying_alike(tree: Any) -> Any:
  """Lets arrays vary over the same axes of a mesh, within `jax.shard_map`.

  What is the same on all devices would have its gradient added up over them in
  each round of a loop; this way it is after the loop.

  Source: none; the carry of a loop must vary over the same axes throughout.

  Args:
    tree: of arrays.
  """
  varying = lambda x: jax.typeof(x).manual_axis_type.varying
  axes = frozenset().union(*map(varying, jax.tree.leaves(tree)))
  return jax.tree.map(
    lambda x: jax.lax.pcast(x, tuple(axes - varying(x)), to='varying'), tree
  )
