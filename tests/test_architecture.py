"""The rules that keep the library small and its parts apart."""

import ast
import importlib
import inspect
import pathlib
import pkgutil
import statistics
import subprocess
import sys

import pytest

import jaxformers

ROOT = pathlib.Path(jaxformers.__file__).parent
FILES = sorted(ROOT.rglob('*.py'))

# What each package may import besides itself: arrows point down only.
MAY_IMPORT = {
  'ops': set(),
  'losses': {'ops'},
  'optim': {'ops'},
  'text': set(),
  'data': {'text'},
  'nn': {'ops'},
  'models': {'ops', 'nn'},
  'decode': {'ops', 'nn', 'models'},
  'diagnostics': {'ops', 'nn'},
  'train': {
    'ops', 'nn', 'models', 'decode', 'losses', 'optim', 'text', 'data',
    'diagnostics',
  },
  'testing': {
    'ops', 'nn', 'models', 'decode', 'losses', 'optim', 'text', 'data', 'train',
    'aot',
  },
  'aot': {'nn', 'train'},
  'pages': {'train'},
  'cli': {'train', 'data', 'decode', 'text', 'aot', 'pages'},
}  # fmt: skip
MATHEMATICS = ('ops', 'losses')


def imported(path):
  """Names of all modules that a file imports, wherever it does so."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      yield node.module


def package_of(path):
  relative = path.relative_to(ROOT)
  return relative.parts[0] if len(relative.parts) > 1 else None


@pytest.mark.parametrize(
  'package', sorted({package_of(f) for f in FILES} - {None})
)
def test_imports_point_downwards(package):
  allowed = MAY_IMPORT[package] | {package}
  for path in (f for f in FILES if package_of(f) == package):
    for name in imported(path):
      parts = name.split('.')
      if parts[0] == 'jaxformers' and len(parts) > 1:
        assert parts[1] in allowed, f'{path} must not import {name}'


@pytest.mark.parametrize('package', MATHEMATICS)
def test_mathematics_does_not_know_flax(package):
  for path in (f for f in FILES if package_of(f) == package):
    outside = {name.split('.')[0] for name in imported(path)}
    outside -= set(sys.stdlib_module_names)
    assert outside <= {'jax', 'jaxtyping', 'numpy', 'jaxformers'}, path


def functions(kinds=(ast.FunctionDef,)):
  for path in FILES:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, kinds):
        yield path, node


def code_lines(node):
  """Lines of a function's body, docstring and nested blanks left out."""
  body = node.body
  if ast.get_docstring(node) is not None:
    body = body[1:]
  return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_functions_are_short_and_take_few_arguments():
  sizes, parameters = [], []
  for _, node in functions():
    sizes.append(code_lines(node))
    arguments = node.args
    names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    parameters.append(len([a for a in names if a.arg != 'self']))
  assert statistics.median(sizes) <= 12
  assert statistics.quantiles(sizes, n=10)[-1] <= 50
  assert statistics.quantiles(parameters, n=10)[-1] <= 5


def test_there_is_no_utils_module():
  names = {path.stem for path in FILES}
  assert not names & {'utils', 'util', 'helpers', 'misc', 'common'}


def public_symbols(package):
  module = importlib.import_module(f'jaxformers.{package}')
  for name, value in vars(module).items():
    if not name.startswith('_') and callable(value):
      yield name, value


# What holds or combines rather than computes has no publication.
NO_SOURCE = {
  'Additive', 'Both', 'Bias', 'Causal', 'Dense', 'DenseBias', 'Either', 'Factor', 'Lengths', 'Mask',
  'NoMask', 'NoPosition',
  'Segments', 'Window', 'Attended', 'Block', 'Linear', 'Stack', 'TokenLosses',
  'Mixer', 'AttentionState', 'Constant', 'FromOptax', 'LanguageModelState',
  'LinearAttended', 'LinearAttentionState', 'LinearMemory', 'Recurred', 'Recurrence',
  'DiagonalOutput', 'DiagonalState', 'Discretized', 'NormalLegS',
  'Convolved', 'LowRankSystem', 'Modes', 'ModesState', 'NormalForm', 'RTFState',
  'Reread', 'RetentionState', 'TokenLayer', 'PlusMinusState', 'GainState',
  'MambaState', 'RGLRUState', 'RecurrentBlockState', 'RWKV4State', 'TokenShiftState',
  'GatedRecurred', 'WKV', 'WKVState', 'ScaleState', 'Selected', 'ShortConvolved',
  'Mamba2State', 'RWKV6State', 'AggregateState', 'GramWeighting',
  'Multitask', 'Retrospective', 'Scalarizer', 'StackedCombination', 'Stateless',
  'HippoMemoryState', 'HippoRNNState', 'Measure', 'LinearSystem',
  'Dynamics', 'ConstantDynamics', 'Memorized', 'MemoryState',
  'dynamics_of',
}  # fmt: skip


@pytest.mark.parametrize(
  'package',
  [
    'ops',
    'nn',
    'nn.mixers',
    'optim',
    'optim.tasks',
    'losses',
    'models',
    'diagnostics',
  ],  # fmt: skip
)
def test_public_parts_name_their_source(package):
  for name, value in public_symbols(package):
    text = inspect.getdoc(value) or ''
    assert text, f'{name} has no docstring'
    if name not in NO_SOURCE:
      assert 'Source:' in text, f'{name} names no source'


def test_public_functions_are_annotated():
  for path, node in functions():
    if node.name.startswith('_') or package_of(path) == 'testing':
      continue
    if node in ast.parse(path.read_text()).body:
      assert node.returns is not None, f'{path}: {node.name}'


def test_every_module_has_a_docstring():
  for path in FILES:
    assert ast.get_docstring(ast.parse(path.read_text())), path


def test_importing_the_package_is_free():
  code = (
    'import sys, jaxformers; '
    "heavy = {'jax', 'numpy', 'flax', 'grain'} & set(sys.modules); "
    'assert not heavy, heavy'
  )
  subprocess.run([sys.executable, '-c', code], check=True)


def test_importing_everything_touches_no_device():
  modules = [
    m.name
    for m in pkgutil.walk_packages([str(ROOT)], 'jaxformers.')
    if not m.name.endswith('__main__')
  ]
  code = (
    'import importlib, jax\n'
    f'for name in {modules!r}: importlib.import_module(name)\n'
    'from jax._src import xla_bridge\n'
    'assert not xla_bridge.backends_are_initialized()\n'
  )
  subprocess.run([sys.executable, '-W', 'error', '-c', code], check=True)
