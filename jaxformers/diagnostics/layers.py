"""What layers have sown, sorted by layer, whether they are scanned or not."""

from collections.abc import Iterator, Mapping
import functools
import re
from typing import Any

import flax.linen as nn
import jax

from jaxformers.nn.depth import unroll


@functools.partial(jax.jit, static_argnames=('model', 'collection'))
def sown_by(
  model: nn.Module,
  collection: str,
  variables: Any,
  inputs: tuple[Any, ...],
  options: dict[str, Any],
) -> Mapping[str, Any]:
  """Runs a model and returns what its layers have sown, compiled once for each.

  Source: none; a property of this library.

  Args:
    model: the model, which must hash.
    collection: into which they sow.
    variables: its variables.
    inputs: what it takes.
    options: what it takes by name.
  """
  _, sown = model.apply(variables, *inputs, mutable=[collection], **options)
  return sown.get(collection, {})


def by_layer(
  sown: Mapping[str, Any], params: Mapping[str, Any], name: str
) -> dict[str, Any]:
  """Returns what all modules have sown under a name, in the order of layers.

  Source: none; a property of this library.

  Args:
    sown: a collection after a call in which it was mutable.
    params: the parameters, which tell how many layers there are.
    name: under which modules sow.

  Returns:
    The values, named by the path of their module, where layers of a scanned
    `Stack` are called `layer_0`, `layer_1`, ... A module that is called several
    times has `#0`, `#1`, ... after its name.
  """
  return dict(_layers(sown, params, name, ()))


def _layers(
  tree: Mapping[str, Any],
  params: Mapping[str, Any],
  wanted: str,
  path: tuple[str, ...],
) -> Iterator[tuple[str, Any]]:
  tree, params = _unrolled(tree, params)
  for name in sorted(tree, key=_in_order):
    value = tree[name]
    if isinstance(value, Mapping):
      yield from _layers(value, params.get(name, {}), wanted, (*path, name))
    elif name == wanted:
      for call, measures in enumerate(value):
        number = f'#{call}' if len(value) > 1 else ''
        yield ('/'.join(path) or name) + number, measures


def _unrolled(tree, params):
  """Gives the layers of a scanned stack names of their own."""
  if not params or not all(name.startswith('scanned_') for name in params):
    return tree, params
  # Blocks that have sown nothing count too.
  every = {name: tree.get(name, {}) for name in params}
  return unroll(every), jax.eval_shape(unroll, params)


def _in_order(name):
  """Sorts `layer_10` after `layer_9`."""
  parts = re.split(r'(\d+)', name)
  return [int(part) if part.isdigit() else part for part in parts]
