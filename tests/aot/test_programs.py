"""Programs compiled for TPUs, against what was found before."""

import importlib.util
import itertools
import json
import pathlib
import re

import pytest

from jaxformers.aot import Topology
from jaxformers.cli import main

ROOT = pathlib.Path(__file__).parents[2]
LM = str(ROOT / 'experiments' / 'lm.py')


@pytest.fixture(scope='module')
def table():
  path = ROOT / 'scripts' / 'compile_programs.py'
  spec = importlib.util.spec_from_file_location('compile_programs', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def kept(table, program):
  return json.loads((table.EXPECTED / f'{program.name}.json').read_text())


def locked(package):
  """Versions of a package in the lock of the compilers, for all Pythons."""
  text = (ROOT / 'requirements-tpu.lock').read_text()
  return re.findall(rf'^{package}==(\S+)', text, re.MULTILINE)


def test_every_program_has_a_file_that_says_what_it_is(table):
  names = {program.name for program in table.programs()}
  assert names == {path.stem for path in table.EXPECTED.glob('*.json')}
  for program in table.programs():
    tree = kept(table, program)
    assert tree['topology'] == program.topology
    assert tuple(tree['settings']) == program.settings
    assert all(found['fits'] for found in tree['versions'].values())


def test_every_program_is_held_against_the_locked_compilers(table):
  for program in table.programs():
    jax, libtpu = locked('jax'), locked('libtpu')
    known = {f'jax {a}, libtpu {b}' for a, b in itertools.product(jax, libtpu)}
    if Topology.parse(program.topology).chip.platform == 'cuda':
      known = {f'jax {a}, jax-cuda13-plugin {a}' for a in jax}
    assert known & kept(table, program)['versions'].keys(), program.name


def test_collectives_hold_no_sequence_that_is_cut(table):
  cut = [p for p in table.programs() if p.mesh == table.CUT_MESH]
  assert len(cut) == len(table.CUT)
  for program in cut:
    for found in kept(table, program)['versions'].values():
      sizes = found['collective_bytes']
      # Passed round a ring, a device gets no more than it had.
      sizes = {k: n for k, n in sizes.items() if k != 'collective-permute'}
      assert 0 < max(sizes.values()) < table.WHOLE, program.name


def test_a_change_of_more_than_a_tenth_is_named(table):
  old = {
    'fits': True,
    'peak_bytes': 100,
    'copied_whole': 0,
    'collective_bytes': {'all-gather': 8},
  }
  near = {**old, 'peak_bytes': 109}
  more = {
    'fits': False,
    'peak_bytes': 111,
    'copied_whole': 1,
    'collective_bytes': {'all-reduce': 1},
  }
  assert table.changes(old, near) == []
  assert table.changes(old, more) == [
    'fits: True became False',
    'all-gather: 8 became 0',
    'all-reduce: 0 became 1',
    'copied_whole: 0 became 1',
    'peak_bytes: 100 became 111',
  ]


def test_numbers_of_another_compiler_are_no_reason_to_pass(
  table, monkeypatch, capsys
):
  report = {
    'fits': True,
    'peak_bytes': 1,
    'copied_whole': 0,
    'traffic': [],
    'versions': {'jax': '9.9'},
  }
  monkeypatch.setattr(table, 'compiled', lambda program: report)
  monkeypatch.setattr(table, 'environment', lambda topology: {})
  monkeypatch.setattr('sys.argv', ['compile_programs', '--only', 'lm_lru'])
  assert table.main() == 1
  assert 'lm_lru was not compared' in capsys.readouterr().out


@pytest.mark.parametrize(
  'name', ['lm_attention', 'lm_decode', 'lm_cut_lru', 'lm_two_slices']
)
def test_a_program_asks_for_what_it_asked_for_before(name, table):
  pytest.importorskip('libtpu', reason="needs the extra 'tpu'")
  [program] = [p for p in table.programs() if p.name == name]
  try:
    assert table.check(program) == []
  except table.UnknownVersion as error:  # Not in an environment of the lock.
    pytest.skip(str(error))


def test_what_does_not_fit_fails_and_names_the_largest_arrays(capfd):
  pytest.importorskip('libtpu', reason="needs the extra 'tpu'")
  words = ['compile', LM, '--topology', 'v5e:1x1', '--fast', '--step', 'train']
  settings = ['batch_size=4096', 'data.length=2048', 'model.width=768']
  words += [w for s in settings for w in ('--set', s)]
  assert main(words) == 1
  shown = capfd.readouterr()
  assert 'does not fit' in shown.out
  assert 'largest arrays of the program' in shown.out
  assert 'too much per device' in shown.err


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['--topology', 'v5x:2x2'], 'unknown generation'),
    (['--topology', 'v5e:2x2', '--mesh', 'fsdp'], 'AXIS=NUMBER'),
    (['--topology', 'v5e:2x2', '--mesh', 'model=4'], 'AXIS=NUMBER'),
  ],
)
def test_what_makes_no_sense_is_refused(words, message, capsys, monkeypatch):
  # As if the compiler were there: it is not reached.
  monkeypatch.setattr('jaxformers.aot.compile.environment', lambda topology: {})
  assert main(['compile', LM, *words]) == 2
  assert message in capsys.readouterr().err


def test_without_the_compiler_one_line_says_what_to_install(
  capsys, monkeypatch
):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  assert main(['compile', LM, '--topology', 'v5e:2x2']) == 2
  [line] = capsys.readouterr().err.splitlines()
  assert "pip install 'jaxformers[tpu]'" in line
