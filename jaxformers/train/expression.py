"""Configuration values from text: a small language that runs no code.

It has literals (`3`, `1e-3`, `'text'`, `None`, `inf`), tuples, dtypes by name
and known classes called with keyword arguments. Text is parsed with `ast` and
translated node by node; nothing is evaluated.
"""

import ast
from collections.abc import Mapping
import dataclasses
from typing import Any
import warnings

from jaxformers.train import annotation as annotations
from jaxformers.train.record import dtypes
from jaxformers.train.record import fields_of
from jaxformers.train.record import nearest

_WORDS = ('None', 'True', 'False')
_NUMBERS = {'inf': float('inf'), 'nan': float('nan')}


def read(text: str, annotation: Any, classes: Mapping[str, type]) -> Any:
  """Reads the value of a field.

  Args:
    text: Such as `0.5`, `bfloat16` or `Attention(num_heads=8)`. Where the
      field takes strings, everything that is not a value of another type that
      the field takes is the string itself, without quotes.
    annotation: What the field takes.
    classes: Maps the class names that may be called to their classes.

  Returns:
    The value, as `annotation.fit` leaves it.

  Raises:
    ValueError: If the text is not in the language, or a constructor refuses
      its arguments.
    TypeError: If the value does not fit the field.
  """
  node = _parse(text)
  if annotations.takes_words(annotation) and not _is_meant(node, classes):
    return annotations.fit(_word(text, node, annotation, classes), annotation)
  if node is None:
    raise ValueError(
      f'cannot read {text!r}; expected {annotations.describe(annotation)}, '
      'written as a number, a quoted string, a tuple, a dtype or '
      'Class(field=value).'
    )
  return annotations.fit(_build(node, annotation, classes), annotation)


def _parse(text: str) -> ast.expr | None:
  """Gives the syntax tree of an expression, None where it is not one."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # of odd backslashes in file names
      return ast.parse(text.strip(), mode='eval').body
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return None


def _is_meant(node: ast.expr | None, classes: Mapping[str, type]) -> bool:
  """Whether text can only be meant as a value, also where strings stand."""
  if isinstance(node, ast.Constant):
    return node.value is None or isinstance(node.value, (bool, str))
  return isinstance(node, ast.Call) and _name(node.func) in classes


def _word(
  text: str,
  node: ast.expr | None,
  annotation: Any,
  classes: Mapping[str, type],
) -> Any:
  """Gives the value if the field takes one of its type, else the text."""
  if node is None or isinstance(node, ast.Name):
    return text
  try:
    value = _build(node, annotation, classes)
  except ValueError:
    return text
  return value if annotations.fits(value, annotation) else text


def _build(node: ast.expr, annotation: Any, classes: Mapping[str, type]) -> Any:
  """Translates one node of the syntax tree."""
  if isinstance(node, ast.Constant) and _is_plain(node.value):
    return node.value
  if isinstance(node, ast.UnaryOp):
    return _signed(node, classes)
  if isinstance(node, (ast.Tuple, ast.List)):
    return tuple(
      _build(x, annotations.element(annotation, i), classes)
      for i, x in enumerate(node.elts)
    )
  if isinstance(node, ast.Name):
    return _named(node.id, annotation, classes)
  if isinstance(node, ast.Call):
    return _call(node, classes)
  raise ValueError(
    f'cannot read {ast.unparse(node)!r}; only literals, tuples, dtypes and '
    'Class(field=value) are understood, no computations.'
  )


def _is_plain(value: Any) -> bool:
  return value is None or type(value) in (bool, int, float, str)


def _signed(node: ast.UnaryOp, classes: Mapping[str, type]) -> int | float:
  """Reads `-3`, `+3` and `-inf`."""
  value = _build(node.operand, float, classes)
  if type(value) in (int, float) and isinstance(node.op, ast.USub):
    return -value
  if type(value) in (int, float) and isinstance(node.op, ast.UAdd):
    return value
  raise ValueError(f'cannot read {ast.unparse(node)!r}; expected a number.')


def _named(name: str, annotation: Any, classes: Mapping[str, type]) -> Any:
  """Reads a bare name: a string where strings stand, a number or a dtype."""
  if annotations.takes_words(annotation):
    return name
  if name in _NUMBERS:
    return _NUMBERS[name]
  if name in dtypes():
    return dtypes()[name]
  if name in classes:
    raise ValueError(f'{name} is a class; write {name}() to make one.')
  known = (*classes, *dtypes(), *_WORDS)
  raise ValueError(f'unknown name {name!r}{nearest(name, known)}')


def _call(node: ast.Call, classes: Mapping[str, type]) -> Any:
  """Reads `Class(field=value, ...)`."""
  name = _name(node.func)
  if name not in classes:
    raise ValueError(f'unknown class {name!r}{nearest(name, classes)}')
  _check_arguments(node, classes[name])
  values = {
    keyword.arg: _argument(classes[name], keyword, classes)
    for keyword in node.keywords
  }
  try:
    return classes[name](**values)
  except (TypeError, ValueError) as error:
    raise ValueError(str(error)) from error


def _name(node: ast.expr) -> str:
  return node.id if isinstance(node, ast.Name) else ast.unparse(node)


def _check_arguments(node: ast.Call, cls: type) -> None:
  """Refuses positional, starred, repeated and unknown arguments."""
  fields = fields_of(cls)
  given = [keyword.arg for keyword in node.keywords]
  if node.args or None in given:
    raise ValueError(
      f'{cls.__name__} takes its values by name: {cls.__name__}'
      f'({", ".join(f"{field}=..." for field in fields)}).'
    )
  for name in given:
    if name not in fields:
      raise ValueError(
        f'{cls.__name__} has no field {name!r}{nearest(name, fields)} '
        f'Its fields: {", ".join(fields) or "none"}.'
      )
    if given.count(name) > 1:
      raise ValueError(f'{cls.__name__} is given {name!r} twice.')


def _argument(
  cls: type, keyword: ast.keyword, classes: Mapping[str, type]
) -> Any:
  """Reads one argument as the class's field wants it."""
  defaults = {field.name: field.default for field in dataclasses.fields(cls)}
  declared = annotations.field_types(cls)[keyword.arg]
  annotation = annotations.expected(declared, defaults[keyword.arg])
  try:
    value = _build(keyword.value, annotation, classes)
    return annotations.fit(value, annotation)
  except (TypeError, ValueError) as error:
    raise ValueError(f'{cls.__name__}.{keyword.arg}: {error}') from error
