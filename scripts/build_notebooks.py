"""Executes notebooks of docs/notebooks and writes them with what they show.

Run: `python scripts/build_notebooks.py [NAME ...]`, all of them without a name.

The sources are the `.py` files; the `.ipynb` beside each is what this makes of it,
for Colab and the site. `--keep` only takes over changed text, and keeps what
cells showed where no code changed.
"""

import argparse
import os
import pathlib
import tempfile

import jupytext
import nbclient
import nbformat

FOLDER = pathlib.Path(__file__).parents[1] / 'docs' / 'notebooks'


def build(source: pathlib.Path, keep: bool) -> None:
  """Writes the notebook of a source.

  Args:
    source: the `.py`.
    keep: whether to take outputs from the notebook that is there.

  Raises:
    SystemExit: if code changed, so that outputs cannot be kept.
  """
  notebook = jupytext.read(source)
  for number, cell in enumerate(notebook.cells):
    cell.id = f'cell-{number}'  # or it would be another one every time
  target = source.with_suffix('.ipynb')
  if keep:
    take_outputs(notebook, nbformat.read(target, 4), source.name)
  else:
    execute(notebook)
  # What jupytext says of itself, and of the Python that it ran on.
  notebook.metadata.pop('jupytext', None)
  notebook.metadata.pop('language_info', None)
  nbformat.validate(notebook)
  nbformat.write(notebook, target)
  print(f'{target.name}: {target.stat().st_size / 1000:.0f} kB')


def execute(notebook: nbformat.NotebookNode) -> None:
  """Runs all cells in a folder of their own, and puts in what they show."""
  with tempfile.TemporaryDirectory() as folder:
    nbclient.NotebookClient(
      notebook,
      timeout=3600,
      record_timing=False,
      coalesce_streams=True,
      resources={'metadata': {'path': folder}},
    ).execute()


def take_outputs(
  notebook: nbformat.NotebookNode, shown: nbformat.NotebookNode, name: str
) -> None:
  """Copies outputs from a notebook with the same code."""
  cells, others = (
    [cell for cell in book.cells if cell.cell_type == 'code']
    for book in (notebook, shown)
  )
  if [c.source for c in cells] != [c.source for c in others]:
    raise SystemExit(f'{name}: code changed; build it without --keep.')
  for cell, other in zip(cells, others, strict=True):
    cell.outputs = other.outputs
    cell.execution_count = other.execution_count


def main() -> None:
  """Builds the notebooks that the command line names."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('names', nargs='*', metavar='NAME')
  parser.add_argument('--keep', action='store_true')
  arguments = parser.parse_args()
  names = arguments.names or sorted(path.stem for path in FOLDER.glob('*.py'))
  root = str(FOLDER.parents[1])
  os.environ['PYTHONPATH'] = os.pathsep.join(
    filter(None, (root, os.environ.get('PYTHONPATH')))
  )
  for name in names:
    build(FOLDER / f'{name}.py', arguments.keep)


if __name__ == '__main__':
  main()
