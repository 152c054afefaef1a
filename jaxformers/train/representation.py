"""Gradients at the output of a part of a model, without changing the model."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def shapes_at(
  path: str, function: Callable[..., Any], *arguments: Any
) -> list[jax.ShapeDtypeStruct]:
  """Returns shapes and dtypes of the arrays that a submodule puts out.

  Args:
    path: of the submodule, such as `'stack'` or `'stack/layer_0'`.
    function: calls the model.
    *arguments: of the function; shapes will do.

  Raises:
    ValueError: if the function does not call the submodule, or more than once.
  """
  seen, found = [], []

  def look(module_path, output):
    seen.append(module_path)
    if module_path == path:
      found.append(
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _arrays(output)]
      )
    return output

  jax.eval_shape(_watched(look, function), *arguments)
  if not found:
    known = ', '.join(sorted({p for p in seen if p})) or 'none'
    raise ValueError(
      f'tasks.representation: the model has no submodule {path!r}; it has '
      f'{known}.'
    )
  if len(found) > 1:
    raise ValueError(
      f'tasks.representation: the model calls {path!r} {len(found)} times in '
      'one pass; choose a submodule that it calls once.'
    )
  return found[0]


def with_added(path: str, function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns `(added, *arguments) -> function(*arguments)`.

  What is added to the output of a submodule are arrays as `shapes_at` gives
  them; where they are zero, the derivative with respect to them is that with
  respect to the output.

  Args:
    path: of the submodule, which stands outside of scanned layers.
    function: calls the model.
  """

  def call(added, *arguments):
    def add(module_path, output):
      if module_path != path:
        return output
      rest = iter(added)
      plus = lambda x: x + next(rest) if _is_real(x) else x
      return jax.tree.map(plus, output)

    return _watched(add, function)(*arguments)

  return call


def _watched(change, function):
  """Returns a function whose submodules' outputs pass through `change`."""

  def intercept(call, args, kwargs, context):
    output = call(*args, **kwargs)
    if context.method_name != '__call__':
      return output
    return change('/'.join(context.module.path), output)

  def watched(*arguments):
    with nn.intercept_methods(intercept):
      return function(*arguments)

  return watched


def _arrays(output):
  return [x for x in jax.tree.leaves(output) if _is_real(x)]


def _is_real(x):
  return jnp.issubdtype(jnp.result_type(x), jnp.inexact)
