"""Configurations as JSON-able records, and back without running any code.

A configuration is a tree of frozen dataclasses (Linen modules among them),
tuples, dtypes, numbers, strings, booleans and None. Its record is what a run
directory keeps: `{'class': name, **fields}` for an object (`class` is a keyword
of Python, so no field can bear that name), a list for a tuple,
`{'dtype': name}`, and `{'float': 'nan' | 'inf' | '-inf'}` for the numbers that
JSON lacks. A record names classes; which names mean anything is decided by the
mapping that the reader passes, never by the record.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import difflib
import functools
import importlib
import math
import re
import shlex
import types
from typing import Any

from flax import linen as nn
import jax.numpy as jnp
import numpy as np

# The packages whose public names a record or an override may mention.
PACKAGES = (
  'jaxformers.ops',
  'jaxformers.nn',
  'jaxformers.nn.mixers',
  'jaxformers.models',
  'jaxformers.losses',
  'jaxformers.optim',
  'jaxformers.optim.tasks',
  'jaxformers.data',
  'jaxformers.text',
  'jaxformers.decode',
  'jaxformers.train',
)

Record = Any  # None | bool | int | float | str | list[Record] | dict

_ABSENT = object()


def nearest(name: str, known: Iterable[str]) -> str:
  """Ends a sentence about an unknown name with the closest known one.

  Args:
    name: What was asked for.
    known: The names that exist.

  Returns:
    `; did you mean 'x'?`, or a full stop where nothing is close.
  """
  matches = difflib.get_close_matches(name, list(known), n=1)
  return f"; did you mean '{matches[0]}'?" if matches else '.'


@functools.cache
def dtypes() -> Mapping[str, Any]:
  """Maps the name of each dtype that JAX has to its scalar type.

  Returns:
    Such as `{'float32': jnp.float32, 'bfloat16': jnp.bfloat16, ...}`.
  """
  scalar_types = (x for x in vars(jnp).values() if isinstance(x, _SCALAR_TYPE))
  return {x.dtype.name: x for x in scalar_types}


def is_dtype(value: Any) -> bool:
  """Whether a value is one of the ways to write a dtype, strings excepted.

  Args:
    value: Anything.

  Returns:
    True for `jnp.float32`, `np.float32` and `np.dtype('float32')`.
  """
  if isinstance(value, (np.dtype, _SCALAR_TYPE)):
    return True
  return isinstance(value, type) and issubclass(value, np.generic)


def fields_of(part: Any) -> tuple[str, ...]:
  """Names the fields of a dataclass that belong to the configuration.

  Args:
    part: A dataclass or an instance of one.

  Returns:
    The constructor's fields in order, without `parent` and `name`, which
    Linen adds to every module.
  """
  cls = part if isinstance(part, type) else type(part)
  hidden = ('parent', 'name') if issubclass(cls, nn.Module) else ()
  names = (f.name for f in dataclasses.fields(cls) if f.init)
  return tuple(name for name in names if name not in hidden)


def is_part(value: Any) -> bool:
  """Whether a value is an instance of a frozen dataclass or a Linen module.

  Args:
    value: Anything.

  Returns:
    True if its fields can be recorded one by one.
  """
  if isinstance(value, nn.Module):
    return True
  if isinstance(value, type) or not dataclasses.is_dataclass(value):
    return False
  return type(value).__dataclass_params__.frozen


def to_record(obj: Any, path: str = '') -> Record:
  """Writes a configuration as values that JSON can hold.

  Args:
    obj: A frozen dataclass, a Linen module, a tuple of such, a dtype, a
      number, a string, a boolean or None.
    path: Where `obj` stands, for the error message.

  Returns:
    The record; `from_record` gives an equal object back.

  Raises:
    ValueError: If something in the tree is of another type; the message names
      its path.
  """
  if obj is None or type(obj) in (bool, int, str):
    return obj
  if type(obj) is float:
    return obj if math.isfinite(obj) else {'float': str(obj)}
  if type(obj) is tuple:
    return [to_record(x, _join(path, i)) for i, x in enumerate(obj)]
  if is_dtype(obj):
    return {'dtype': _dtype_name(obj, path)}
  if is_part(obj):
    values = {
      n: to_record(getattr(obj, n), _join(path, n)) for n in fields_of(obj)
    }
    return {'class': type(obj).__name__, **values}
  raise ValueError(_cannot_record(obj, path))


def from_record(
  record: Record, classes: Mapping[str, type], path: str = ''
) -> Any:
  """Builds the object that a record describes, from the given classes only.

  Nothing that the record names is imported or executed. A field that the
  record lacks, because an older version wrote it, takes the default of its
  class if it has one.

  Args:
    record: What `to_record` returned, also after a round trip through JSON.
    classes: Maps each class name that may occur to its class; see
      `known_classes` and `classes_of`.
    path: Where `record` stands, for the error messages.

  Returns:
    An object equal to the recorded one; lists become tuples.

  Raises:
    ValueError: If a class or field is unknown, a field without a default is
      missing, or a constructor refuses its values; the message names the path.
  """
  if record is None or isinstance(record, (bool, int, float, str)):
    return record
  if isinstance(record, list):
    return tuple(
      from_record(x, classes, _join(path, i)) for i, x in enumerate(record)
    )
  if _is_object(record):
    return _build(record, classes, path)
  if isinstance(record, dict) and set(record) == {'dtype'}:
    return _dtype(record['dtype'], path)
  if isinstance(record, dict) and record.get('float') in _NON_FINITE:
    return float(record['float'])
  raise ValueError(
    f"{_at(path)}expected a value, a list or an object with a 'class', got "
    f'{record!r}; the record was not written by jaxformers.'
  )


def differences(old: Record, new: Record) -> list[str]:
  """Lists where two records differ, one line per place.

  Args:
    old: A record.
    new: Another one.

  Returns:
    Lines such as `model.stack.depth: 4 -> 6`, in the order of the fields; an
    object replaced by one of another class is one line. Empty if both agree.
  """
  return [
    f'{path or "experiment"}: {before} -> {after}'
    for path, (before, after) in differing([old, new])
  ]


def differing(
  records: Sequence[Record], path: str = ''
) -> list[tuple[str, list[str]]]:
  """Lists where records differ from one another.

  Args:
    records: At least one.
    path: Where all of them stand.

  Returns:
    For each place its path, and what each record has there, in the order of the
    fields; objects of different classes are one place.
  """
  first = records[0]
  if all(_is_object(r) and r['class'] == first['class'] for r in records):
    keys = list(dict.fromkeys(key for r in records for key in r))
    below = [(key, [r.get(key, _ABSENT) for r in records]) for key in keys]
  elif all(_is_long(r) and len(r) == len(first) for r in records):
    below = [
      (str(i), list(x)) for i, x in enumerate(zip(*records, strict=True))
    ]
  elif all(type(r) is type(first) and r == first for r in records):
    return []
  else:
    return [(path, [describe(r) for r in records])]
  return [
    place
    for key, values in below
    for place in differing(values, _join(path, key))
  ]


def describe(record: Record) -> str:
  """Writes a record as the expression that an override would read.

  Args:
    record: A record.

  Returns:
    Such as `Attention(num_heads=4, position=Rotary(base=10000.0))`.
  """
  if record is _ABSENT:
    return '(absent)'
  if isinstance(record, list):
    inner = ', '.join(map(describe, record))
    return f'({inner},)' if len(record) == 1 else f'({inner})'
  if not isinstance(record, dict):
    return repr(record)
  if not _is_object(record):
    return str(next(iter(record.values())))
  fields = (f'{k}={describe(v)}' for k, v in record.items() if k != 'class')
  return f'{record["class"]}({", ".join(fields)})'


def tree(record: Record, path: str = '') -> Iterator[str]:
  """Prints a record as an indented tree of settings.

  Args:
    record: The record of an object.
    path: Where it stands.

  Yields:
    `path=value` for each value, quoted for the shell where that is needed, so
    that the line can follow `--set`; `path: Class` above the values of an
    object.
  """
  depth = path.count('.') if path else -1
  indent = '  ' * max(depth, 0)
  if is_branch(record):
    if path:
      yield f'{indent}{path}: {record["class"] if _is_object(record) else "tuple"}'
    for key, value in _items(record):
      yield from tree(value, _join(path, key))
  else:
    yield indent + _for_shell(f'{path}={_word(record)}')


def is_branch(record: Record) -> bool:
  """Whether a record has settings of its own below it.

  Args:
    record: A record.

  Returns:
    True for an object with fields, and for a tuple with objects.
  """
  return _is_object(record) and len(record) > 1 or _is_long(record)


def known_classes() -> dict[str, type]:
  """Maps the public configuration classes of jaxformers by name.

  Returns:
    Every dataclass and Linen module that a package of `PACKAGES` exports.

  Raises:
    ValueError: If two different classes share a name.
  """
  found: dict[str, type] = {}
  for name in PACKAGES:
    module = importlib.import_module(name)
    classes = classes_of(module).items()
    ours = {k: c for k, c in classes if c.__module__.startswith('jaxformers.')}
    found = merge_classes(found, ours)
  return found


def classes_of(module: types.ModuleType) -> dict[str, type]:
  """Maps the dataclasses in a module's namespace by name.

  Args:
    module: Such as a user's experiment file after loading.

  Returns:
    Its public dataclasses and Linen modules, imported ones included.

  Raises:
    ValueError: If two different classes share a name.
  """
  found: dict[str, type] = {}
  for name, value in vars(module).items():
    if name.startswith('_') or not isinstance(value, type):
      continue
    if dataclasses.is_dataclass(value):
      found = merge_classes(found, {value.__name__: value})
  return found


def merge_classes(
  first: Mapping[str, type], second: Mapping[str, type]
) -> dict[str, type]:
  """Joins two mappings of classes that must not contradict each other.

  Args:
    first: Class names and classes.
    second: More of them.

  Returns:
    All of them.

  Raises:
    ValueError: If one name means different classes.
  """
  for name in first.keys() & second.keys():
    one, other = first[name], second[name]
    if one is not other:
      raise ValueError(
        f'two classes are called {name}: {one.__module__}.{name} and '
        f'{other.__module__}.{name}; a record tells classes apart by their '
        'names, so rename one of them.'
      )
  return {**first, **second}


_SCALAR_TYPE = type(jnp.float32)
_NON_FINITE = ('nan', 'inf', '-inf')


def _join(path: str, key: str | int) -> str:
  return f'{path}.{key}' if path else str(key)


def _at(path: str) -> str:
  return f'{path}: ' if path else ''


def _is_object(record: Record) -> bool:
  return isinstance(record, dict) and 'class' in record


def _is_long(record: Record) -> bool:
  return isinstance(record, list) and any(map(_is_object, record))


def _items(record: Record) -> list[tuple[str, Record]]:
  if isinstance(record, list):
    return [(str(i), value) for i, value in enumerate(record)]
  return [(key, value) for key, value in record.items() if key != 'class']


def _word(record: Record) -> str:
  """Leaves out the quotes of a string that no reader can mistake."""
  plain = isinstance(record, str) and re.fullmatch(r'[\w./-]+', record)
  ambiguous = ('None', 'True', 'False', *dtypes())
  return record if plain and record not in ambiguous else describe(record)


def _for_shell(text: str) -> str:
  """Quotes a word for the shell where needed, doubly if that reads better."""
  if "'" in text and not re.search(r'["$`\\!]', text):
    return f'"{text}"'
  return shlex.quote(text)


def _dtype_name(dtype: Any, path: str) -> str:
  for name, scalar_type in dtypes().items():
    if scalar_type == dtype:
      return name
  raise ValueError(f'{_at(path)}cannot record the dtype {dtype!r}.')


def _dtype(name: Any, path: str) -> Any:
  if not isinstance(name, str) or name not in dtypes():
    raise ValueError(
      f'{_at(path)}unknown dtype {name!r}{nearest(str(name), dtypes())}'
    )
  return dtypes()[name]


def _cannot_record(obj: Any, path: str) -> str:
  advice = 'use a frozen dataclass'
  if isinstance(obj, (np.generic, np.ndarray)):
    advice = 'use a plain Python number or a tuple of them'
  elif isinstance(obj, list):
    advice = 'use a tuple'
  kind = f'{type(obj).__module__}.'.removeprefix('builtins.')
  return (
    f'{path or "experiment"}: cannot record a <{kind}{type(obj).__qualname__}>'
    f' ({obj!r:.60}); {advice}.'
  )


def _build(record: dict, classes: Mapping[str, type], path: str) -> Any:
  cls = _class(record['class'], classes, path)
  _check_keys(record, cls, path)
  values = {
    key: from_record(value, classes, _join(path, key))
    for key, value in record.items()
    if key != 'class'
  }
  try:
    return cls(**values)
  except (TypeError, ValueError) as error:
    raise ValueError(f'{_at(path)}{error}') from error


def _class(kind: Any, classes: Mapping[str, type], path: str) -> type:
  if not isinstance(kind, str) or kind not in classes:
    raise ValueError(
      f'{_at(path)}unknown class {kind!r}{nearest(str(kind), classes)} '
      'A class of your own becomes known when you pass the experiment file '
      'that defines or imports it: --code FILE.'
    )
  return classes[kind]


def _check_keys(record: dict, cls: type, path: str) -> None:
  fields = fields_of(cls)
  for key in record.keys() - {'class', *fields}:
    raise ValueError(
      f'{_join(path, key)}: {cls.__name__} has no field {key!r}'
      f'{nearest(key, fields)} Its fields: {", ".join(fields)}.'
    )
  required = (f.name for f in dataclasses.fields(cls) if not _has_default(f))
  for name in required:
    if name in fields and name not in record:
      raise ValueError(
        f'{_join(path, name)}: the record lacks this field of {cls.__name__}, '
        'which has no default; the run was made by another version of the '
        'class.'
      )


def _has_default(field: dataclasses.Field) -> bool:
  absent = dataclasses.MISSING
  return field.default is not absent or field.default_factory is not absent
