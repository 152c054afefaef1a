"""Whether a configuration value fits the annotation of its field."""

import collections.abc
import dataclasses
import functools
import types
import typing
from typing import Any, Literal, Protocol

import numpy as np

from jaxformers.train.record import is_dtype


class Part(Protocol):
  """Stands for "any frozen dataclass or module" where nothing is annotated."""


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
  """Maps the fields of a dataclass to their annotations.

  Args:
    cls: A dataclass.

  Returns:
    The annotations, evaluated where that is possible.
  """
  written = {field.name: field.type for field in dataclasses.fields(cls)}
  try:
    return written | typing.get_type_hints(cls)
  except Exception:  # names imported for type checkers only: any error at all
    return written


def expected(annotation: Any, value: Any) -> Any:
  """Chooses what a field takes: its annotation, or the type of its value.

  Args:
    annotation: As written; one such as `Any` says nothing.
    value: What stands in the field, `dataclasses.MISSING` for nothing.

  Returns:
    An annotation that says as much as the two together do.
  """
  if _is_informative(annotation) or value is None:
    return annotation
  if value is dataclasses.MISSING:
    return Any
  if is_dtype(value):
    return np.dtype
  return Part if dataclasses.is_dataclass(value) else type(value)


def element(annotation: Any, index: int) -> Any:
  """Gives the annotation of one element of a tuple.

  Args:
    annotation: That of the tuple, possibly one member of a union.
    index: Which element.

  Returns:
    The element's annotation, `Any` where there is none.
  """
  for member in members(annotation):
    arguments = typing.get_args(member)
    if typing.get_origin(member) is not tuple or not arguments:
      continue
    if arguments[-1] is Ellipsis:
      return arguments[0]
    if index < len(arguments):
      return arguments[index]
  return Any


def members(annotation: Any) -> tuple[Any, ...]:
  """Flattens an annotation into the alternatives that it allows.

  Args:
    annotation: Such as `int | None`.

  Returns:
    Its alternatives; one if it is not a union.
  """
  annotation = getattr(annotation, '__value__', annotation)  # type X = ...
  annotation = getattr(annotation, '__supertype__', annotation)  # NewType
  origin = typing.get_origin(annotation)
  if origin is typing.Annotated:
    return members(typing.get_args(annotation)[0])
  if origin in (typing.Union, types.UnionType):
    parts = (members(part) for part in typing.get_args(annotation))
    return tuple(member for part in parts for member in part)
  return (annotation,)


def fit(value: Any, annotation: Any) -> Any:
  """Gives a value as its field wants it.

  Args:
    value: A number, string, boolean, None, dtype, object or tuple of such.
    annotation: Of the field.

  Returns:
    The value; an int becomes a float, and a float that is a whole number an
    int, where only that one is wanted. Nothing else is converted: a boolean is
    not an int.

  Raises:
    TypeError: If the value does not fit; says what was expected and what came.
  """
  if fits(value, annotation):
    return value
  for member in members(annotation):
    converted = _converted(value, member)
    if fits(converted, member):
      return converted
  raise TypeError(f'expected {describe(annotation)}, got {_shown(value)}')


def fits(value: Any, annotation: Any) -> bool:
  """Whether a value fits an annotation as it is.

  Args:
    value: See `fit`.
    annotation: See `fit`; what cannot be checked allows everything.

  Returns:
    True if no conversion is needed.
  """
  return any(_fits_member(value, member) for member in members(annotation))


def takes_words(annotation: Any) -> bool:
  """Whether text without quotes may stand for a string here.

  Args:
    annotation: Of the field.

  Returns:
    True if it allows strings, unless it also allows dtypes: there a misspelt
    dtype must not pass as a string.
  """
  parts = members(annotation)
  strings = any(
    part is str
    or typing.get_origin(part) is Literal
    and any(isinstance(choice, str) for choice in typing.get_args(part))
    for part in parts
  )
  return strings and not any(map(_takes_dtypes, parts))


def describe(annotation: Any) -> str:
  """Writes an annotation for an error message.

  Args:
    annotation: Of a field.

  Returns:
    Such as `int or None`.
  """
  return ' or '.join(dict.fromkeys(map(_describe_member, members(annotation))))


_PLAIN = (bool, int, float, str)
_EXACT_INTEGERS = 2.0**53  # beyond, a float no longer says which integer


def _is_informative(annotation: Any) -> bool:
  vague = (Any, object)
  unresolved = (str, typing.ForwardRef, typing.TypeVar)
  return not any(
    member in vague or isinstance(member, unresolved)
    for member in members(annotation)
  )


def _converted(value: Any, member: Any) -> Any:
  if member is float and type(value) is int:
    return float(value)
  if member is int and type(value) is float and value.is_integer():
    return int(value) if abs(value) <= _EXACT_INTEGERS else value
  if typing.get_origin(member) is tuple and type(value) is tuple:
    kinds = [element(member, i) for i in range(len(value))]
    pairs = zip(value, kinds, strict=True)
    return tuple(_converted_element(x, kind) for x, kind in pairs)
  return value


def _converted_element(value: Any, annotation: Any) -> Any:
  try:
    return fit(value, annotation)
  except TypeError:
    return value


def _fits_member(value: Any, member: Any) -> bool:
  if not _is_informative(member):
    return True
  if member in (None, types.NoneType):
    return value is None
  if member in _PLAIN:
    return type(value) is member
  if _takes_dtypes(member):
    return is_dtype(value)
  origin = typing.get_origin(member) or member
  if origin is Literal:
    choices = typing.get_args(member)
    return any(type(value) is type(c) and value == c for c in choices)
  if origin is tuple:
    return _fits_tuple(value, typing.get_args(member))
  if origin is collections.abc.Callable:
    return callable(value)
  if getattr(origin, '_is_protocol', False):
    return _fits_protocol(value, origin)
  return isinstance(value, origin) if isinstance(origin, type) else True


def _takes_dtypes(member: Any) -> bool:
  return member in (np.dtype, type) or typing.get_origin(member) in (
    np.dtype,
    type,
  )


def _fits_tuple(value: Any, kinds: tuple[Any, ...]) -> bool:
  if type(value) is not tuple:
    return False
  if kinds and kinds[-1] is Ellipsis:
    return all(fits(x, kinds[0]) for x in value)
  if not kinds:
    return True
  return len(value) == len(kinds) and all(map(fits, value, kinds))


def _fits_protocol(value: Any, protocol: type) -> bool:
  """Checks the names only, as a runtime-checkable protocol would."""
  if not dataclasses.is_dataclass(value):
    return False
  names: set[str] = set()
  for base in protocol.__mro__:
    if getattr(base, '_is_protocol', False) and base is not Protocol:
      names |= vars(base).keys() | getattr(base, '__annotations__', {}).keys()
  public = (n for n in names if n == '__call__' or not n.startswith('_'))
  fields = {field.name for field in dataclasses.fields(value)}
  # Of the class, not the value: a property might read a file.
  return all(name in fields or hasattr(type(value), name) for name in public)


def _describe_member(member: Any) -> str:
  if member in (None, types.NoneType):
    return 'None'
  if member is Part:
    return 'an object'
  if _takes_dtypes(member):
    return 'a dtype'
  if typing.get_origin(member) is Literal:
    return f'one of {", ".join(map(repr, typing.get_args(member)))}'
  if isinstance(member, type) and not typing.get_args(member):
    return member.__name__
  return str(member).replace('typing.', '')


def _shown(value: Any) -> str:
  if value is None:
    return 'None'
  if dataclasses.is_dataclass(value):
    return type(value).__name__
  return f'{value!r} ({type(value).__name__})'
