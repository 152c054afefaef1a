"""HTML that is escaped unless it says that it is HTML."""

import html
from typing import Any

_VOID = frozenset({'input', 'meta', 'img'})
# A browser would drop or misread control characters: each has a picture.
_PICTURES = {
  code: 0x2400 + code for code in range(32) if chr(code) not in '\n\t'
}
_PICTURES[0x7F] = 0x2421


class Html(str):
  """Text that is HTML already; any other text is escaped."""


def escape(value: Any) -> Html:
  """Writes a value so that a browser shows it as it is.

  Args:
    value: HTML, which is left alone, or anything else.

  Returns:
    HTML; control characters are pictures such as U+2400.
  """
  if isinstance(value, Html):
    return value
  return Html(html.escape(str(value)).translate(_PICTURES))


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
  """Writes an element.

  Args:
    name: Of the element.
    *children: What it holds: HTML, or text to escape.
    **attributes: By name; `class_` and the like for keywords, `_` for `-`
      elsewhere. Those that are None are left out, True has no value.
  """
  words = [name]
  for key, value in attributes.items():
    key = key.removesuffix('_').replace('_', '-')
    if value is True:
      words.append(key)
    elif value is not None:
      words.append(f'{key}="{escape(value)}"')
  start = f'<{" ".join(words)}>'
  if name in _VOID:
    return Html(start)
  return Html(f'{start}{join(*children)}</{name}>')


def join(*children: Any) -> Html:
  """Writes one after another.

  Args:
    *children: HTML, or text to escape.
  """
  return Html(''.join(map(escape, children)))


def table(heading: list[Any], rows: list[list[Any]], *, caption: str) -> Html:
  """Writes a table that scrolls sideways where it is too wide.

  Args:
    heading: Names of the columns.
    rows: Cells of each row; the first names the row.
    caption: What it shows, for those who cannot see it.
  """
  head = tag('tr', *(tag('th', cell, scope='col') for cell in heading))
  body = [
    tag('tr', tag('th', first, scope='row'), *(tag('td', x) for x in rest))
    for first, *rest in rows
  ]
  whole = tag(
    'table',
    tag('caption', caption, class_='unseen'),
    tag('thead', head),
    tag('tbody', *body),
  )
  return tag('div', whole, class_='wide', tabindex=0)


def fold(summary: Any, *children: Any) -> Html:
  """Writes what is shown when its summary is clicked.

  Args:
    summary: One line.
    *children: What is folded away.
  """
  return tag('details', tag('summary', summary), *children)


def facts(pairs: dict[str, Any]) -> Html:
  """Writes names with their values.

  Args:
    pairs: Values by name.
  """
  boxes = (
    tag('div', tag('dt', name), tag('dd', value))
    for name, value in pairs.items()
  )
  return tag('dl', *boxes)
