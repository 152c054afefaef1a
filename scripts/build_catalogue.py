"""Writes the catalogue of techniques, docs/catalogue.md.

Names that belong together come from docs/techniques.toml. All else is read from
where it is kept: explanations and sources from docstrings, rows from the tables
of the conformance suites, verdicts from the results of studies.

Run: python scripts/build_catalogue.py
"""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import pathlib
import re
import symtable
import tomllib
import types

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / 'docs' / 'catalogue.md'
README = ROOT / 'README.md'
BEGIN, END = '<!-- techniques -->\n', '<!-- end of techniques -->'
TABLE = ROOT / 'docs' / 'techniques.toml'
RESULTS = ROOT / 'experiments' / 'results'
HEAD = """# Catalogue

Written by `scripts/build_catalogue.py`. Explanations are those of the docstrings. A row of a conformance table runs the whole suite of
[mixers](../jaxformers/testing/mixers.py) or [optimisers](../jaxformers/testing/transforms.py) on the part; parts without a row have tests of
their own. A study holds a published claim against criteria that were fixed beforehand, and [the page on studies](studies.md) has its numbers.

"""
# What the names of a package are called, in the order in which they are shown.
KINDS = {
  'ops': 'Operators',
  'nn': 'Modules',
  'nn.mixers': 'Modules',
  'models': 'Modules',
  'losses': 'Losses',
  'optim': 'Optimisers',
  'optim.tasks': 'Optimisers',
  'diagnostics': 'Measurements',
  'data': 'Data',
  'text': 'Data',
  'decode': 'Decoding',
  'train': 'Training',
}
SECTIONS = ('Source:', 'Args:', 'Attributes:', 'Returns:')
CONFORMANCE = (
  ('tests/nn/test_mixers.py', 'TestMixers'),
  ('tests/optim/test_transforms.py', 'TestTransforms'),
)
IMPORTS = {
  'functools': 'import functools',
  'jax': 'import jax',
  'jnp': 'import jax.numpy as jnp',
  'np': 'import numpy as np',
  'optax': 'import optax',
}


@dataclasses.dataclass(frozen=True)
class Technique:
  """An entry of the table.

  Attributes:
    name: the heading.
    family: the chapter.
    parts: public names; the first has the explanation and the source.
    snippet: lines that run, given the imports and arrays that they name.
    studies: names of files in `experiments/`.
    page: of the documentation, that says more.
  """

  name: str
  family: str
  parts: list[str]
  snippet: str
  studies: list[str] = dataclasses.field(default_factory=list)
  page: str | None = None


def main() -> None:
  """Writes the page, and the table of README."""
  PAGE.write_text(catalogue_page())
  README.write_text(readme())


def techniques() -> list[Technique]:
  """Returns the table."""
  return [Technique(**row) for row in _table()['technique']]


@functools.cache
def _table() -> dict:
  return tomllib.loads(TABLE.read_text())


@functools.cache
def public_names() -> dict[str, str]:
  """Returns the packages of all public functions and classes, by name."""
  found = {}
  for package in KINDS:
    module = importlib.import_module(f'jaxformers.{package}')
    for name, value in vars(module).items():
      if callable(value) and not name.startswith('_'):
        if name in found:
          raise ValueError(f'{name} is public in {found[name]} and {package}')
        found[name] = package
  return found


def part(name: str) -> object:
  """Returns what a public name stands for."""
  package = public_names()[name]
  return getattr(importlib.import_module(f'jaxformers.{package}'), name)


def source_of(name: str) -> str | None:
  """Returns the source that a docstring names; None for no publication."""
  text = inspect.getdoc(part(name)) or ''
  found = re.search(r'^Source:(.*?)(?:\n\s*\n|\Z)', text, re.DOTALL | re.M)
  source = ' '.join(found[1].split()) if found else 'none'
  return None if source.startswith('none') else source


def explanation(name: str) -> str:
  """Returns the summary of a docstring and the paragraph after it."""
  text = inspect.getdoc(part(name))
  paragraphs = text.split('\n\n')[:2]
  kept = [p for p in paragraphs if not p.startswith(SECTIONS)]
  joined = ' '.join(' '.join(kept).split())
  joined = re.sub(r':math:`(.*?)`', r'$\1$', joined)
  # A paragraph that leads up to a list or a formula ends before it does.
  return re.sub(r'\.[^.]*[:,]$', '.', joined)


def linked(source: str) -> str:
  """Makes links of the addresses in a source."""
  rules = (
    (r'arXiv (\d{4}\.\d{4,5})', r'[arXiv \1](https://arxiv.org/abs/\1)'),
    (
      r'(?:https://)?((?:kexue\.fm/archives|github\.com)/[\w./-]*[\w/-])',
      r'[\1](https://\1)',
    ),
    (
      r'openreview (\w+)',
      r'[openreview \1](https://openreview.net/forum?id=\1)',
    ),
  )
  for pattern, link in rules:
    source = re.sub(pattern, link, source)
  return source


def snippet(technique: Technique) -> str:
  """Returns the code of a technique with its imports and arrays."""
  code = technique.snippet.strip()
  arrays = ''
  while missing := _lines_that_make(_free(arrays + code)):
    arrays = missing + arrays
  names = _free(arrays + code)
  libraries = [line for name, line in IMPORTS.items() if name in names]
  ours = [
    f'from jaxformers.{package} import {", ".join(sorted(group))}'
    for package in KINDS
    if (group := [n for n in names if public_names().get(n) == package])
  ]
  head = '\n'.join(libraries) + '\n\n' * bool(libraries and ours)
  return head + '\n'.join(ours) + '\n\n' + arrays + code + '\n'


def _lines_that_make(names: set[str]) -> str:
  """Returns the lines that make those of the names that are given."""
  given = _table()['given'].items()
  return ''.join(
    f'{line}\n' for made, line in given if names & {*made.split(', ')}
  )


def _free(code: str) -> set[str]:
  """Returns the names that code reads and does not make."""
  scopes = [symtable.symtable(code, 'snippet', 'exec')]
  for scope in scopes:
    scopes += scope.get_children()
  read = {
    symbol.get_name()
    for scope in scopes
    for symbol in scope.get_symbols()
    if symbol.is_referenced() and symbol.is_global()
  }
  made = {s.get_name() for s in scopes[0].get_symbols() if s.is_assigned()}
  return read - made


@functools.cache
def conformance_rows() -> dict[str, list[str]]:
  """Returns the rows of the conformance tables that each name takes part in."""
  rows = {}
  for path, table in CONFORMANCE:
    spec = importlib.util.spec_from_file_location('table', ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for case in getattr(module, table).cases:
      subject = getattr(case, 'mixer', None) or case.factory
      for name in _named(subject, module):
        rows.setdefault(name, []).append(case.name)
  return rows


def _named(value: object, module: types.ModuleType) -> set[str]:
  """Returns the public names that a row of a table is made of."""
  if isinstance(value, functools.partial):
    inside = [value.func, *value.args, *value.keywords.values()]
    return set().union(*(_named(x, module) for x in inside))
  if isinstance(value, types.FunctionType) and value.__module__ == 'table':
    names = value.__code__.co_names
    inside = [getattr(module, n) for n in names if hasattr(module, n)]
    inside += [cell.cell_contents for cell in value.__closure__ or ()]
    return set().union(*(_named(x, module) for x in inside))
  if getattr(value, '__name__', None) in public_names():
    return {value.__name__}
  if not dataclasses.is_dataclass(value):
    return set()
  inside = [
    getattr(value, field.name)
    for field in dataclasses.fields(value)
    if field.name not in ('parent', 'name')
    and getattr(value, field.name) != field.default
  ]
  own = {type(value).__name__} & public_names().keys()
  return own.union(*(_named(x, module) for x in inside))


def rows_of(technique: Technique) -> list[str]:
  """Returns the conformance rows of a technique."""
  found = conformance_rows()
  rows = [row for name in technique.parts for row in found.get(name, ())]
  return list(dict.fromkeys(rows))


def verdict(study: str) -> str:
  """Returns what came of a study."""
  return json.loads((RESULTS / f'{study}.json').read_text())['verdict']


def anchor(heading: str) -> str:
  """Returns the anchor of a heading, as GitHub makes it."""
  return re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')


def overview() -> str:
  """Returns the table of all techniques, with the outcome of their studies."""
  lines = ['| technique | conformance rows | studies |', '| --- | --- | --- |']
  families = set()
  for technique in techniques():
    if technique.family not in families:
      lines.append(f'| **{technique.family}** | | |')
      families.add(technique.family)
    studies = [_study_link(study) for study in technique.studies]
    lines.append(
      f'| [{technique.name}](#{anchor(technique.name)}) '
      f'| {len(rows_of(technique)) or ""} | {"; ".join(studies)} |'
    )
  return '\n'.join(lines) + '\n'


def readme() -> str:
  """Returns README with the techniques of today."""
  families = {}
  for technique in techniques():
    link = f'[{technique.name}](docs/catalogue.md#{anchor(technique.name)})'
    families.setdefault(technique.family, []).append(link)
  rows = [f'| {name} | {", ".join(x)} |\n' for name, x in families.items()]
  head, rest = README.read_text().split(BEGIN)
  table = '| | |\n| --- | --- |\n' + ''.join(rows)
  return head + BEGIN + table + END + rest.partition(END)[2]


def _study_link(study: str) -> str:
  title = study.replace('_', ' ')
  heading = anchor(f'{title.capitalize()}: {verdict(study)}')
  return f'[{title}](studies.md#{heading}): {verdict(study)}'


def catalogue_page() -> str:
  """Returns the page."""
  chapters = {}
  for technique in techniques():
    chapters.setdefault(technique.family, []).append(_section(technique))
  return (
    HEAD
    + overview()
    + ''.join(
      f'\n## {family}\n' + ''.join(sections)
      for family, sections in chapters.items()
    )
  )


def _section(technique: Technique) -> str:
  """Returns the part of the page on one technique."""
  first = technique.parts[0]
  return f"""
### {technique.name}

{explanation(first)}

Source: {linked(source_of(first))}

```python
{snippet(technique)}```

{_facts(technique)}
"""


def _facts(technique: Technique) -> str:
  """Lists the parts of a technique and how far it is done."""
  kinds = {}
  for name in technique.parts:
    kind = KINDS[public_names()[name]]
    kinds.setdefault(kind, []).append(_link_to_code(name))
  lines = [
    f'- {kind}: {", ".join(kinds[kind])}'
    for kind in dict.fromkeys(KINDS.values())
    if kind in kinds
  ]
  rows = ', '.join(f'`{row}`' for row in rows_of(technique))
  lines.append(f'- Conformance rows: {rows or "none"}')
  for study in technique.studies:
    figure = f'[figure](figures/{study}.png)'
    lines.append(f'- Study: {_study_link(study)} ({figure})')
  if not technique.studies:
    lines.append('- Study: none')
  if technique.page:
    lines.append(f'- More: [{technique.page}]({technique.page})')
  return '\n'.join(lines)


def _link_to_code(name: str) -> str:
  file = pathlib.PurePath(*part(name).__module__.split('.')).with_suffix('.py')
  return f'[`{name}`](../{file})'


if __name__ == '__main__':
  main()
