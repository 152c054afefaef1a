"""Gradients at the output of a part of a model, without changing the model."""

from collections.abc import Callable
from typing import Any

from flax.core import tracers
import flax.linen as nn
import jax
import jax.numpy as jnp


def shapes_at(
  path: str, function: Callable[..., Any], *arguments: Any
) -> list[jax.ShapeDtypeStruct]:
  """Returns shapes and dtypes of the arrays that a submodule puts out.

  Args:
    path: of the submodule, such as `'stack'`.
    function: calls the model.
    *arguments: of the function; shapes will do.

  Raises:
    ValueError: if the function does not call the submodule, or more than once,
      or within a scan or a checkpoint.
  """
  seen, shapes, levels, outside = set(), [], [], []

  def look(module_path, output):
    seen.add(module_path)
    if module_path == path:
      levels.append(tracers.current_trace())
      arrays = _arrays(output)
      shapes.append([jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays])
    return output

  def run(*arguments):
    outside.append(tracers.current_trace())
    _watched(look, function)(*arguments)

  jax.eval_shape(run, *arguments)
  if any(level != outside[0] for level in levels):
    raise ValueError(
      f'tasks.representation: {path!r} stands within layers that are scanned '
      'or recomputed; choose a submodule around or after them.'
    )
  if not shapes:
    known = ', '.join(sorted(seen - {''})) or 'none'
    raise ValueError(
      f'tasks.representation: the model has no submodule {path!r}; it has '
      f'{known}.'
    )
  if len(shapes) > 1:
    raise ValueError(
      f'tasks.representation: the model calls {path!r} {len(shapes)} times in '
      'one pass; choose a submodule that it calls once.'
    )
  return shapes[0]


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
