"""How Sphinx builds the site: `make site`."""

import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from public_names import DOCS
from public_names import expand

import jaxformers

project = 'jaxformers'
author = 'The jaxformers authors'
copyright = f'2026, {author}'
version = release = jaxformers.__version__

extensions = [
  'myst_nb',
  'sphinx.ext.autodoc',
  'sphinx.ext.mathjax',
  'sphinx.ext.napoleon',
  'sphinx_copybutton',
]
html_theme = 'sphinx_book_theme'
html_title = 'jaxformers'
html_theme_options = {
  'show_toc_level': 2,
  'use_download_button': False,
  'navbar_persistent': [],  # the sidebar has a search field
}
html_static_path = ['_static']
html_css_files = ['site.css']

myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3
nb_execution_mode = 'off'  # tests run the examples

# Names between backticks are links where there is such a name.
default_role = 'py:obj'
add_module_names = False
autodoc_default_options = {
  'members': True,
  'member-order': 'bysource',
  'special-members': '__call__',
}
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [('Attributes', 'params_style')]
napoleon_attr_annotations = False  # signatures have them
python_maximum_signature_line_length = 78


def read_source(app, docname, source):
  """Writes out what a page only names."""
  del app
  if not (DOCS / f'{docname}.md').exists():
    return  # a notebook
  source[0] = expand(docname, source[0])
  if docname == 'index':
    source[0] = re.sub(r'^[\w/]*\*\n', keep_if_any, source[0], flags=re.M)


def keep_if_any(found):
  """Keeps a pattern of a table of contents if there are such pages."""
  return found[0] if list(DOCS.glob(f'{found[0].strip()}')) else ''


def mark_up(app, what, name, obj, options, lines):
  """Turns what docstrings have of Markdown into reStructuredText."""
  del app, what, name, obj, options
  text = '\n'.join(lines)
  # "num_heads: H." is no list whose first item is H.
  text = re.sub(r'^( *\w+: [A-Za-z])\.', r'\1\\.', text, flags=re.M)
  text = re.sub(r'(?<![\w$`])\$([^$`]+)\$', r':math:`\1`', text)
  text = re.sub(
    r'arXiv\s(\d{4}\.\d{4,5})', r'`arXiv \1 <https://arxiv.org/abs/\1>`__', text
  )
  text = re.sub(
    r'```python\n(.*?)```',
    lambda found: '.. code-block:: python\n\n' + indented(found[1]),
    text,
    flags=re.DOTALL,
  )
  lines[:] = text.split('\n')


def skip_fields(app, what, name, obj, skip, options):
  """Leaves out fields of tuples, which the docstring of the class explains."""
  del app, what, name, options
  return skip or (obj.__doc__ or '').startswith('Alias for field number')


def shorten(app, what, name, obj, options, signature, returned):
  """Leaves out of signatures what Flax adds, and where JAX keeps its arrays."""
  del app, what, name, obj, options
  if signature is None:
    return None
  if signature == '(*args, **kwargs)':  # of a protocol
    return '', None
  signature = re.sub(r', parent: .*?, name: [^,)]*', '', signature)
  short = lambda text: re.sub(r'\bjax(lib)?\.[\w.]*Array\b', 'Array', text)
  return short(signature), returned and short(returned)


def indented(text):
  """Moves a block to the right."""
  return ''.join(f'  {line}\n' for line in text.splitlines())


def setup(app):
  """Connects the hooks."""
  app.connect('source-read', read_source)
  app.connect('autodoc-skip-member', skip_fields)
  app.connect('autodoc-process-signature', shorten)
  app.connect('autodoc-process-docstring', mark_up, priority=400)
