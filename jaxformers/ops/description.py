"""What masks and biases share: frozen pytrees that compare positions."""

from collections.abc import Callable
import dataclasses

import jax
from jax import Array
from jaxtyping import Real


def description(*, data: tuple[str, ...] = ()) -> Callable[[type], type]:
  """Makes a class a frozen dataclass and a pytree.

  Args:
    data: the fields that hold arrays; all others are static.
  """

  def decorate(cls):
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    meta = [name for name in names if name not in data]
    return jax.tree_util.register_dataclass(cls, list(data), meta)

  return decorate


def distances(
  query_position: Real[Array, 'B L'], key_position: Real[Array, 'B M']
) -> Real[Array, 'B 1 L M']:
  """Returns query minus key position, for all heads.

  Args:
    query_position: B may be 1.
    key_position: B may be 1.
  """
  return query_position[:, None, :, None] - key_position[:, None, None, :]
