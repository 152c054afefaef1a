"""Programs compiled for TPUs, against what was found before."""

import importlib.util
import json
import pathlib

import pytest

from jaxformers.cli import main

ROOT = pathlib.Path(__file__).parents[2]
LM = str(ROOT / 'experiments' / 'lm.py')


def scripts():
  path = ROOT / 'scripts' / 'compile_programs.py'
  spec = importlib.util.spec_from_file_location('compile_programs', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_every_program_has_a_file_that_says_what_it_is():
  table = scripts()
  names = {program.name for program in table.programs()}
  assert names == {path.stem for path in table.EXPECTED.glob('*.json')}
  for program in table.programs():
    kept = json.loads((table.EXPECTED / f'{program.name}.json').read_text())
    assert kept['topology'] == program.topology
    assert tuple(kept['settings']) == program.settings
    assert all(found['fits'] for found in kept['versions'].values())


def test_a_change_of_more_than_a_tenth_is_named():
  changes = scripts().changes
  old = {'fits': True, 'peak_bytes': 100, 'collective_bytes': {'all-gather': 8}}
  near = {**old, 'peak_bytes': 109}
  more = {
    'fits': False,
    'peak_bytes': 111,
    'collective_bytes': {'all-reduce': 1},
  }
  assert changes(old, near) == []
  assert changes(old, more) == [
    'fits: True became False',
    'all-gather: 8 became 0',
    'all-reduce: 0 became 1',
    'peak_bytes: 100 became 111',
  ]


@pytest.mark.parametrize('name', ['lm_attention', 'lm_decode', 'lm_two_slices'])
def test_a_program_asks_for_what_it_asked_for_before(name):
  pytest.importorskip('libtpu', reason="needs the extra 'tpu'")
  table = scripts()
  [program] = [p for p in table.programs() if p.name == name]
  assert table.check(program) == []


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
