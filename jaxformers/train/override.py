"""Changing parts of a configuration by path: `model.stack.depth=6`."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
from typing import Any

from flax import linen as nn

from jaxformers.train import annotation as annotations
from jaxformers.train import expression
from jaxformers.train.record import fields_of
from jaxformers.train.record import is_part
from jaxformers.train.record import nearest


@dataclasses.dataclass(frozen=True)
class Setting:
  """One override.

  Attributes:
    path: Fields and tuple indices from the root, joined by dots.
    text: The new value as text.
    depth: How many names of the path lead to where we stand.
  """

  path: str
  text: str
  depth: int = 0

  @property
  def rest(self) -> list[str]:
    """The names that are still to be walked."""
    return self.path.split('.')[self.depth :]

  @property
  def here(self) -> str:
    """The path to where we stand."""
    return '.'.join(self.path.split('.')[: self.depth])


def override(
  obj: Any, path: str, text: str, classes: Mapping[str, type]
) -> Any:
  """Replaces one value of a configuration.

  Args:
    obj: A tree of frozen dataclasses, Linen modules and tuples; it is not
      changed.
    path: Such as `model.stack.block.0.mixer`: field names and tuple indices.
    text: The new value; see `expression.read`.
    classes: Maps the class names that the text may call to their classes.

  Returns:
    A new object that differs in that value.

  Raises:
    ValueError: If the path or the text is wrong, or a constructor refuses the
      value. The message begins with the path.
  """
  return _apply(obj, Any, [Setting(path, text)], classes)


def override_all(
  obj: Any, settings: Sequence[str], classes: Mapping[str, type]
) -> Any:
  """Replaces several values of a configuration at once.

  Every object is rebuilt once with all its new values, so values that are
  valid only together may be given in any order. A slot that is replaced is
  replaced first; paths that lead into it change the new object.

  Args:
    obj: See `override`.
    settings: Such as `['model.width=96', 'steps=10']`.
    classes: See `override`.

  Returns:
    The new object.

  Raises:
    ValueError: See `override`; also if a setting has no `=` or a path is
      given twice.
  """
  parsed = [_parse(setting) for setting in settings]
  paths = [setting.path for setting in parsed]
  for path in paths:
    if paths.count(path) > 1:
      raise ValueError(f'{path}: set twice; keep one of the settings.')
  return _apply(obj, Any, parsed, classes) if parsed else obj


def _parse(setting: str) -> Setting:
  path, equals, text = setting.partition('=')
  if not equals or not path.strip():
    raise ValueError(
      f'{setting!r} is not a setting; write path=value, such as seed=1.'
    )
  return Setting(path.strip(), text.strip())


def _apply(
  old: Any,
  annotation: Any,
  settings: Sequence[Setting],
  classes: Mapping[str, type],
) -> Any:
  """Applies the settings that lead to `old` or into it."""
  for setting in settings:
    if not setting.rest:
      old = _read(setting, annotations.expected(annotation, old), classes)
  deeper = [setting for setting in settings if setting.rest]
  if not deeper:
    return old
  if type(old) is tuple:
    return _apply_in_tuple(old, annotation, deeper, classes)
  return _apply_in_part(old, deeper, classes)


def _read(
  setting: Setting, annotation: Any, classes: Mapping[str, type]
) -> Any:
  try:
    return expression.read(setting.text, annotation, classes)
  except (TypeError, ValueError) as error:
    raise ValueError(f'{setting.path}: {error}') from error


def _apply_in_part(
  old: Any, settings: Sequence[Setting], classes: Mapping[str, type]
) -> Any:
  types = annotations.field_types(type(old)) if is_part(old) else {}
  new = {}
  for name, inner in _grouped(settings).items():
    _check_field(old, name, inner[0])
    new[name] = _apply(getattr(old, name), types[name], inner, classes)
  try:
    return _replaced(old, new)
  except (TypeError, ValueError) as error:
    paths = ', '.join(setting.path for setting in settings)
    raise ValueError(f'{paths}: {error}') from error


def _replaced(old: Any, new: dict[str, Any]) -> Any:
  if isinstance(old, nn.Module):
    return old.clone(**new)
  return dataclasses.replace(old, **new)


def _apply_in_tuple(
  old: tuple,
  annotation: Any,
  settings: Sequence[Setting],
  classes: Mapping[str, type],
) -> tuple:
  new = list(old)
  for name, inner in _grouped(settings).items():
    if not name.isdecimal() or int(name) >= len(old):
      raise ValueError(
        f'{inner[0].path}: {inner[0].here.rpartition(".")[0]} is a tuple of '
        f'{len(old)}; expected an index below {len(old)}, got {name!r}.'
      )
    i = int(name)
    kind = annotations.element(annotation, i)
    new[i] = _apply(old[i], kind, inner, classes)
  return tuple(new)


def _grouped(settings: Sequence[Setting]) -> dict[str, list[Setting]]:
  """Groups settings by their next name, and walks them over it."""
  groups: dict[str, list[Setting]] = {}
  for setting in settings:
    walked = dataclasses.replace(setting, depth=setting.depth + 1)
    groups.setdefault(setting.rest[0], []).append(walked)
  return groups


def _check_field(old: Any, name: str, setting: Setting) -> None:
  """Raises unless the object has the field that a setting walks into."""
  parent = setting.here.rpartition('.')[0]
  if not is_part(old):
    advice = f' Set it first: {parent}=Class(...).' if old is None else ''
    raise ValueError(
      f'{setting.path}: {parent or "the root"} is {old!r:.60}, which has no '
      f'fields.{advice}'
    )
  fields = fields_of(old)
  if name not in fields:
    raise ValueError(
      f'{setting.path}: {type(old).__name__} has no field {name!r}'
      f'{_suggestion(old, name, parent)} '
      f'Its fields: {", ".join(fields) or "none"}.'
    )


def _suggestion(old: Any, name: str, parent: str) -> str:
  """Names the same field deeper in the tree, or else the nearest one here."""
  prefix = f'{parent}.' if parent else ''
  deeper = [p for p in _paths(old) if p.rpartition('.')[2] == name]
  if deeper:
    return f'; did you mean {prefix}{min(deeper, key=len)}?'
  return nearest(name, fields_of(old))


def _paths(obj: Any) -> Iterator[str]:
  """Yields the path of everything inside an object."""
  if type(obj) is tuple:
    pairs = [(str(i), value) for i, value in enumerate(obj)]
  else:
    names = fields_of(obj) if is_part(obj) else ()
    pairs = [(name, getattr(obj, name)) for name in names]
  for name, value in pairs:
    yield name
    yield from (f'{name}.{path}' for path in _paths(value))
