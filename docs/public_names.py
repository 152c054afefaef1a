"""Writes out what pages of the site only name, so that no file is generated.

A page under api/ names modules of a package, one block per package,

    ```{public} jaxformers.ops
    masks patterns
    ```

and gets the documentation of all that they make public. A page that is nothing
but a link to a file elsewhere in the repository becomes that file.
"""

import functools
import importlib
import inspect
import os
import pathlib
import re

DOCS = pathlib.Path(__file__).parent
BLOCK = re.compile(r'```\{public\} (\S+)\n(.*?)```', re.DOTALL)
LINK = re.compile(r'\]\((?!https?:|#)([^)\s#]+)')
CODE = re.compile(r'\[`(\w+)`\]\([./]*jaxformers/[\w/]+\.py\)')
PACKAGES = (
  'ops', 'nn', 'nn.mixers', 'models', 'losses', 'optim', 'optim.tasks',
  'diagnostics', 'decode', 'data', 'text', 'train', 'aot', 'testing',
)  # fmt: skip


def expand(docname: str, text: str) -> str:
  """Returns the text of a page as Sphinx shall read it.

  Args:
    docname: the path of the page below docs/, without its ending.
    text: what the file holds.
  """
  text = CODE.sub(_link_to_reference, text)
  page = DOCS / f'{docname}.md'
  if elsewhere := stands_for(page):
    text = relinked(elsewhere.read_text(), elsewhere.parent, page.parent)
  else:
    text = relinked(text, page.parent, page.parent)
  return BLOCK.sub(lambda found: _documentation(*found.groups()), text)


def stands_for(page: pathlib.Path) -> pathlib.Path | None:
  """Returns the file that a page is nothing but a link to, if so."""
  found = re.fullmatch(r'\[[^]]*\]\((\.\./[^)]+\.md)\)\s*', page.read_text())
  return (page.parent / found[1]).resolve() if found else None


@functools.cache
def pages_elsewhere() -> dict[pathlib.Path, pathlib.Path]:
  """Returns the pages of the site that are files elsewhere, by those files."""
  found = {stands_for(page): page for page in DOCS.glob('*.md')}
  return {file: page for file, page in found.items() if file}


def relinked(text: str, origin: pathlib.Path, folder: pathlib.Path) -> str:
  """Returns text from one folder with links that are right in another."""

  def link(found):
    target = (origin / found[1]).resolve()
    target = pages_elsewhere().get(target, target)
    return f']({os.path.relpath(target, folder)}'

  return LINK.sub(link, text)


def listed(text: str) -> dict[str, list[str]]:
  """Returns the modules that a page names, by package."""
  return {package: names.split() for package, names in BLOCK.findall(text)}


@functools.cache
def public(package: str) -> dict[str, list[str]]:
  """Returns the public names of a package, by the module that makes them."""
  names = {}
  for name, value in vars(importlib.import_module(package)).items():
    if not name.startswith('_') and callable(value):
      module = value.__module__.removeprefix(f'{package}.')
      names.setdefault(module, []).append(name)
  return names


def _link_to_reference(found: re.Match) -> str:
  """Turns a link to the file of a name into one to its documentation."""
  for package in PACKAGES:
    if any(found[1] in n for n in public(f'jaxformers.{package}').values()):
      return f'{{py:obj}}`~jaxformers.{package}.{found[1]}`'
  return f'`{found[1]}`'


def _documentation(package: str, modules: str) -> str:
  """Returns the sections on modules of a package."""
  names = public(package)
  return '\n'.join(_section(package, m, names[m]) for m in modules.split())


def _section(package: str, module: str, names: list[str]) -> str:
  """Returns a heading, what the module says of itself, and its names."""
  said = inspect.getdoc(importlib.import_module(f'{package}.{module}'))
  blocks = '\n'.join(_directive(package, name) for name in names)
  return f"""
## {module}

```{{eval-rst}}
.. currentmodule:: {package}

{said.partition(chr(10))[0]}

{blocks}
```
"""


def _directive(package: str, name: str) -> str:
  """Returns the line that documents a name."""
  value = getattr(importlib.import_module(package), name)
  kind = 'class' if inspect.isclass(value) else 'function'
  return f'.. auto{kind}:: {name}\n'
