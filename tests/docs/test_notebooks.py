"""The notebooks run, and each `.ipynb` is that of its source."""

import ast
import pathlib

import matplotlib
import matplotlib.pyplot as plt
import pytest

import jaxformers

jupytext = pytest.importorskip('jupytext', reason='extra dev')
nbclient = pytest.importorskip('nbclient', reason='extra dev')
nbformat = pytest.importorskip('nbformat', reason='extra dev')

ROOT = pathlib.Path(jaxformers.__file__).parents[1]
SOURCES = sorted((ROOT / 'docs' / 'notebooks').glob('*.py'))
LARGEST = 300_000  # bytes of a notebook with its figures

# What the cell tagged `parameters` of each notebook says, made small.
TOYS = {
  'attention_extrapolation': {
    'steps': 2, 'width': 8, 'train_length': 24, 'times': (2,), 'rows': 8,
    'entropy_keys': 32,
  },
  'child_tuning_and_step_sizes': {
    'walk_steps': 8, 'walkers': 4, 'tuning_steps': 4, 'seeds': 2,
    'quadratic_steps': 8,
  },
  'language_model': {
    'path': 'text.txt', 'steps': 4, 'width': 16, 'depth': 1, 'length': 16,
    'sample_bytes': 4,
  },
  'multi_task_gradients': {'steps': 4, 'network_steps': 4, 'hidden': 4},
  'state_spaces': {
    'samples': 40, 'cycles': 1, 'sizes': (4,), 'length': 8, 'width': 8,
    'steps': 2, 'compared': ('S4D',), 'periods': ((4, 12),),
  },
}  # fmt: skip
SMALLEST = 'child_tuning_and_step_sizes'


def toy(name):
  """Returns a notebook in which the parameters are small ones."""
  notebook = jupytext.read(ROOT / 'docs' / 'notebooks' / f'{name}.py')
  (place,) = (
    place
    for place, cell in enumerate(notebook.cells)
    if 'parameters' in cell.metadata.get('tags', ())
  )
  known = {
    target.id
    for line in ast.parse(notebook.cells[place].source).body
    for target in line.targets
  }
  assert set(TOYS[name]) <= known
  values = '\n'.join(f'{key} = {value!r}' for key, value in TOYS[name].items())
  notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(values))
  return notebook


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """An empty folder to run in, but for a text."""
  (tmp_path / 'text.txt').write_text('In the beginning was the word. ' * 60)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def test_every_notebook_is_tested():
  assert [path.stem for path in SOURCES] == sorted(TOYS)


@pytest.mark.parametrize('name', TOYS)
def test_the_code_of_a_notebook_runs(name, folder):
  code = '\n'.join(
    cell.source for cell in toy(name).cells if cell.cell_type == 'code'
  )
  plt.switch_backend('agg')
  with matplotlib.rc_context():
    exec(compile(code, f'{name}.py', 'exec'), {'__name__': 'notebook'})
  assert plt.get_fignums()
  plt.close('all')


def test_a_notebook_runs_in_a_kernel(folder, monkeypatch):
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', 'true')
  for variable in ('JUPYTER_RUNTIME_DIR', 'IPYTHONDIR'):
    monkeypatch.setenv(variable, str(folder / variable))
  notebook = toy(SMALLEST)
  nbclient.NotebookClient(notebook, timeout=120).execute()
  shown = [
    output.get('data', {})
    for cell in notebook.cells
    for output in cell.get('outputs', ())
  ]
  assert any('image/png' in data for data in shown)


@pytest.mark.parametrize('source', SOURCES, ids=lambda path: path.stem)
def test_a_notebook_is_that_of_its_source(source):
  path = source.with_suffix('.ipynb')
  notebook = nbformat.read(path, 4)
  nbformat.validate(notebook)
  cells, wanted = (
    [(c.cell_type, c.source, c.metadata.get('tags')) for c in book.cells]
    for book in (notebook, jupytext.read(source))
  )
  assert cells == wanted, 'run scripts/build_notebooks.py'
  outputs = [
    output for cell in notebook.cells for output in cell.get('outputs', ())
  ]
  assert outputs
  assert not any(output.output_type == 'error' for output in outputs)
  assert path.stat().st_size < LARGEST
