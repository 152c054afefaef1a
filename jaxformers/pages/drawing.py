"""Figures of matplotlib as part of a page, in its colours, light or dark."""

from collections.abc import Callable
import io
import itertools
import re
from typing import Any

from jaxformers.pages.markup import Html
from jaxformers.pages.markup import escape
from jaxformers.pages.markup import tag
from jaxformers.train.figure import COLOURS
from jaxformers.train.figure import PALETTE
from jaxformers.train.figure import style

_DARK = ('#6cabf0', '#f28492', '#70c795', '#efb964', '#b9a3e6', '#63cccc')
# Names of colours on a page, with what they are in light and in dark.
PALETTES = {
  'page': ('#ffffff', '#15181c'),
  'card': ('#f5f6f8', '#1e2329'),
  'text': (COLOURS['text'], '#e4e6e9'),
  'quiet': ('#5c6168', '#9aa2ab'),  # smaller text
  'grid': (COLOURS['grid'], '#363c44'),
  'grey': (COLOURS['baseline'], '#9aa2ab'),
  **{f'c{i}': pair for i, pair in enumerate(zip(PALETTE, _DARK, strict=True))},
}
_NAMES = {light: f'var(--{name})' for name, (light, _) in PALETTES.items()}
_NAMES['#000000'] = 'var(--text)'
_NO_METADATA = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))


def drawn(
  draw: Callable[[Any], None], size: tuple[float, float], label: str
) -> Html:
  """Draws a figure as SVG.

  Args:
    draw: Draws into an empty figure.
    size: Width and height in inches, at letters of 10 points.
    label: What it shows, for those who cannot see it.

  Returns:
    An element; `with_own_names` keeps its names apart from those of others.
  """
  import matplotlib
  from matplotlib.backends.backend_svg import FigureCanvasSVG
  from matplotlib.figure import Figure

  clear = dict.fromkeys(('axes.facecolor', 'savefig.facecolor'), 'none')
  constant = {'svg.hashsalt': 'jaxformers', 'path.simplify_threshold': 0.3}
  with matplotlib.rc_context(style() | clear | constant):
    figure = Figure(size, layout='constrained', facecolor='none')
    FigureCanvasSVG(figure)
    draw(figure)
    out = io.StringIO()
    figure.savefig(out, format='svg', metadata=_NO_METADATA)
  return _inline(out.getvalue(), label)


def with_own_names(page: Html) -> Html:
  """Gives each figure of a page names of its own.

  Args:
    page: A page whose figures come from `drawn`.

  Returns:
    The page; names within figures begin with the number of the figure.
  """
  numbers = itertools.count(1)

  def rename(found: re.Match) -> str:
    own = rf'\1f{next(numbers)}-'
    return re.sub(r'( id="|href="#|url\(#)', own, found[0])

  return Html(re.sub(r'<svg.*?</svg>', rename, page, flags=re.DOTALL))


def _inline(svg: str, label: str) -> Html:
  """Turns a file of SVG into an element of a page."""
  opening = re.search(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', svg)
  content = svg[opening.end() : svg.rindex('</svg>')]
  unseen = r'<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->'
  content = re.sub(unseen, '', content, flags=re.DOTALL)
  content = content.replace('xlink:href', 'href')
  content = re.sub(r'#[0-9a-f]{6}\b', lambda c: _NAMES.get(c[0], c[0]), content)
  content = re.sub(r'\s*\n\s*', '\n', content)
  # What has no colour of its own is black in SVG; here it is that of the text.
  return tag(
    'svg',
    Html(content),
    role='img',
    aria_label=escape(label),
    viewBox=opening[1],
    fill='currentColor',
  )
