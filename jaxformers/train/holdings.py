"""Who holds what: a readable list of arrays, their parts and their bytes."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Holding(NamedTuple):
  """An array that devices share out.

  Attributes:
    name: its path in the tree.
    shape: of the whole.
    dtype: of its numbers.
    split: `(axis, mesh axes, parts)` for each axis that is cut.
    bytes: of the whole.
    local_bytes: what each device holds.
    copies: how many devices hold each part.
  """

  name: str
  shape: tuple[int, ...]
  dtype: str
  split: tuple[tuple[int, str, int], ...]
  bytes: int
  local_bytes: int
  copies: int


def holdings(tree: Any) -> list[Holding]:
  """Returns what devices hold of each array, largest share first.

  Args:
    tree: arrays or their shapes, with `NamedSharding`.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  found = [_holding(path, leaf) for path, leaf in leaves]
  return sorted(found, key=lambda h: (-h.local_bytes, h.name))


def _holding(path, leaf):
  mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
  split = []
  for axis, names in enumerate(spec):
    names = (names,) if isinstance(names, str) else names or ()
    parts = math.prod(mesh.shape[name] for name in names)
    if parts > 1:
      split.append((axis, ' x '.join(names), parts))
  size = jnp.dtype(leaf.dtype).itemsize
  local = size * math.prod(leaf.sharding.shard_shape(leaf.shape))
  return Holding(
    name=jax.tree_util.keystr(path, simple=True, separator='/'),
    shape=tuple(leaf.shape),
    dtype=str(jnp.dtype(leaf.dtype)),
    split=tuple(split),
    bytes=size * math.prod(leaf.shape),
    local_bytes=local,
    copies=mesh.size // math.prod(parts for *_, parts in split),
  )


def holdings_table(tree: Any) -> str:
  """Returns the same as text, with sums by the first word of the names.

  Args:
    tree: see `holdings`.
  """
  found = holdings(tree)
  groups = {}
  for holding in found:
    group = groups.setdefault(holding.name.partition('/')[0], [0, 0])
    group[0] += holding.local_bytes
    group[1] += holding.bytes
  total = [sum(sizes) for sizes in zip(*groups.values(), strict=True)]
  lines = ['each device holds, of all:']
  for name, (local, whole) in [*groups.items(), ('in all', total)]:
    lines.append(f'{readable(local):>12} {readable(whole):>12}  {name}')
  lines += ['', 'array by array, largest first:']
  for h in found:
    cut = ', '.join(f'axis {i} over {names} {n}' for i, names, n in h.split)
    copies = f'{h.copies} copies' if h.copies > 1 else ''
    how = '; '.join(filter(None, (cut, copies))) or 'whole'
    shape = f'{h.dtype}{list(h.shape)}'
    lines.append(
      f'{readable(h.local_bytes):>12} {readable(h.bytes):>12}  {h.name} {shape}'
      f' ({how})'
    )
  return '\n'.join(lines)


def readable(count: float) -> str:
  """Writes a number of bytes for people.

  Args:
    count: how many.
  """
  for unit, size in (('GiB', 2**30), ('MiB', 2**20), ('KiB', 2**10)):
    if abs(count) >= size:
      return f'{count / size:.2f} {unit}'
  return f'{count:.0f} B'
