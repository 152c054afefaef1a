"""The frame of a page: style, and how it is written to a file.

A page is one file that needs no other and no network: it has no script, and its
policy forbids whatever lies outside.
"""

import pathlib
from typing import Any

import jaxformers
from jaxformers.pages.drawing import PALETTES
from jaxformers.pages.drawing import with_own_names
from jaxformers.pages.markup import Html
from jaxformers.pages.markup import join
from jaxformers.pages.markup import tag
from jaxformers.train.directory import write_whole

_MARK = 'jaxformers report'
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = (pathlib.Path(__file__).parent / 'page.css').read_text('utf-8')


def page(title: str, *sections: Any) -> str:
  """Writes a whole page.

  Args:
    title: Of the page.
    *sections: What it holds.
  """
  head = tag(
    'head',
    tag('meta', charset='utf-8'),
    tag('meta', name='generator', content=_MARK),
    tag('meta', http_equiv='Content-Security-Policy', content=_POLICY),
    tag('meta', name='viewport', content='width=device-width, initial-scale=1'),
    tag('title', title),
    tag('style', Html(f':root {{ {_colours()} }}\n{_STYLE}')),
  )
  command = tag('code', 'jaxformers report')
  body = tag(
    'body',
    _theme(),
    tag('main', tag('h1', title), *sections),
    tag('footer', 'Made by ', command, f' {jaxformers.__version__}.'),
  )
  whole = tag('html', head, with_own_names(body), lang='en')
  return f'<!DOCTYPE html>\n{whole}\n'


def section(title: str, *children: Any) -> Html:
  """Writes a part of a page under its heading.

  Args:
    title: The heading.
    *children: What it holds.
  """
  return tag('section', tag('h2', title), *children)


def save(path: pathlib.Path, text: str) -> None:
  """Writes a page to a file, whole or not at all.

  Args:
    path: The file; an older page of this command is replaced.
    text: From `page`.

  Raises:
    FileExistsError: If there is something else.
    OSError: If it cannot be written.
  """
  if path.exists() and not _is_page(path):
    raise FileExistsError(
      f'{path} exists and is not a page of this command; choose another '
      '--output, or delete it first.'
    )
  try:
    write_whole(path, text)
  except OSError as error:
    raise OSError(
      f'cannot write {path} ({error.strerror}); choose another --output.'
    ) from error


def _is_page(path: pathlib.Path) -> bool:
  if not path.is_file():
    return False
  with path.open('rb') as file:
    return tag('meta', name='generator', content=_MARK).encode() in file.read(
      500
    )


def _theme() -> Html:
  """Returns the choice between light and dark."""
  choices = (
    join(
      tag(
        'input',
        type='radio',
        name='theme',
        id=f'theme-{name}',
        checked=True if name == 'auto' else None,
      ),
      tag('label', name, for_=f'theme-{name}'),
    )
    for name in ('auto', 'light', 'dark')
  )
  return tag('fieldset', tag('legend', 'colours', class_='unseen'), *choices)


def _colours() -> str:
  return ' '.join(
    f'--{name}: light-dark({light}, {dark});'
    for name, (light, dark) in PALETTES.items()
  )
