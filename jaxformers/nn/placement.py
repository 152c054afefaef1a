"""Where activations lie when a program runs on many devices.

Parameters are placed by their names; activations follow from them, mostly. Where
the compiler would have to guess, layers say it: `place(x_BLD, 'BLD')` asks for
what the letters mean on the mesh of the surrounding program. Without a mesh, or
on one device, it does nothing.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax import Array
from jax.sharding import AbstractMesh
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from jaxformers.ops.recurrence.varying import varying_alike

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

CHANNEL_RULES: dict[str, tuple[str, ...]] = {'B': ROWS, 'D': ('sequence',)}
"""The same for layers that treat each channel by itself, and sequences as a
whole: from `ACTIVATION_RULES` to here and back it is one exchange among the
devices of `sequence`."""

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


def on_shares(
  operator: Callable[..., Any],
  letters: str,
  out: str,
  *,
  rules: dict[str, tuple[str, ...]] = ACTIVATION_RULES,
  **named: str,
) -> Callable[..., Any]:
  """Lets an operator run on the shares of sequences that are cut.

  Where the mesh of the surrounding program cuts sequences, each device runs the
  operator within `jax.shard_map` on what the rules give it: by default its share
  of the tokens, with `axis_name='sequence'`, by `CHANNEL_RULES` whole sequences
  of its share of the channels. Everywhere else the operator is called as it is.
  Heads or channels are cut over `tensor` all or not at all, but for a single one
  that is shared by the others.

  `on_shares(rg_lru, 'BLF BLF BLF F BF', 'BLF BF')(x_BLF, ...)`

  Source: none; `jax.shard_map`.

  Args:
    operator: of arrays and options; returns an array, or a tuple.
    letters: of the axes of each positional array, of a tree of arrays those that
      all have, as the first ones. None may stand for an array.
    out: the same of each result.
    rules: mesh axes of each letter.
    **named: letters of arrays that are given by name, besides `places`, `reset`
      and `skip`. All else that has a name is an option.

  Returns:
    The operator, for the same arguments.
  """
  named = {'places': 'BL', 'reset': 'BL', 'skip': 'BL', **named}

  def run(*arrays, **options):
    given = {name: options.pop(name) for name in named if name in options}
    mesh = jax.sharding.get_abstract_mesh()
    pairs = zip(letters.split(), arrays, strict=True)
    pairs = *pairs, *((named[name], x) for name, x in given.items())
    cut = _cuts(mesh, pairs, rules)
    if ('sequence',) not in cut.values():
      return operator(*arrays, **given, **options)
    if 'sequence' in cut.get('L', ()):
      options['axis_name'] = 'sequence'

    def on_share(arrays, given):
      # Gradients of what all share are then added up once, not in each step.
      arrays, given = varying_alike((arrays, given))
      result = operator(*arrays, **given, **options)
      # Of the kind that `out_specs` has, whatever its name.
      return tuple(result) if isinstance(result, tuple) else result

    spec = lambda word: PartitionSpec(*(cut.get(letter) for letter in word))
    *outs, last = map(spec, out.split())
    # Else what comes before and after might be split as the rules say, too.
    arrays = tuple(map(_place_tokens, letters.split(), arrays))
    results = jax.shard_map(
      on_share,
      mesh=mesh,
      in_specs=(
        tuple(map(spec, letters.split())),
        {name: spec(named[name]) for name in given},
      ),
      out_specs=(*outs, last) if outs else last,
    )(arrays, given)
    if not outs:
      return _place_tokens(out, results)
    return tuple(map(_place_tokens, out.split(), results))

  return run


def _place_tokens(letters, x):
  """Places what has one vector per token."""
  return place(x, letters) if letters == 'BLD' else x


def _cuts(mesh, pairs, rules):
  """Returns the mesh axes that cut each letter's axis."""
  sizes = {
    letter: size
    for word, tree in pairs
    for x in jax.tree.leaves(tree)
    for letter, size in zip(word, x.shape, strict=False)
  }
  cut = {
    letter: axes_of(mesh, rules.get(letter, ()), size)
    for letter, size in sizes.items()
  }
  heads = [k for k, n in sizes.items() if rules.get(k) == ('tensor',) and n > 1]
  if not all(cut[letter] for letter in heads):
    cut |= dict.fromkeys(heads, ())
  return cut


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
