import json
import sys

import pytest

from jaxformers.cli import main

STUDY = '''"""A tiny study."""
import dataclasses

from jaxformers.train import Study
from jaxformers.train import below


@dataclasses.dataclass(frozen=True)
class Halves(Study):
  claim = 'Halves are small.'
  source = 'Nobody.'
  bound: float = 0.5

  def variants(self):
    return ('half',)

  def measure(self, variant, seed, workspace):
    (workspace.path / 'note.txt').write_text(variant)
    return {'value': seed / 2}

  def judge(self, results):
    return [below('value', results.mean('half', 'value'), self.bound)]

  def draw(self, results, figure):
    raise AssertionError


def study():
  return Halves(seeds=(0, 2))
'''


@pytest.fixture
def file(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', sys.path[:])
  monkeypatch.setattr(
    'jaxformers.train.reproduction.draw_study', lambda *_: None
  )
  path = tmp_path / 'halves.py'
  path.write_text(STUDY)
  return path


def refused(capsys, *words):
  assert main(['reproduce', *map(str, words)]) == 2
  return capsys.readouterr().err


def test_a_claim_that_does_not_hold_is_no_error(file, capsys):
  assert main(['reproduce', 'halves.py']) == 0
  assert capsys.readouterr().out == (
    '[1/2] half, seed 0: value 0\n'
    '[2/2] half, seed 2: value 1\n'
    '\n'
    'claim: Halves are small.\n'
    '\n'
    'variant  value\n'
    'half     0.5 ± 0.71\n'
    '\n'
    'does not hold: value: 0.5 < 0.5\n'
    '\n'
    'verdict: not reproduced\n'
    '\n'
    'result: runs/studies/halves/halves.json\n'
    'figure: runs/studies/halves/halves.png\n'
  )
  folder = file.parent / 'runs' / 'studies' / 'halves'
  assert (folder / 'files' / 'note.txt').read_text() == 'half'
  assert json.loads((folder / 'halves.json').read_text())['minutes'] == 0


def test_settings_and_directories_are_passed_on(file, capsys):
  words = ['--set', 'seeds=(4,)', '--set', 'bound=3', '--workdir', 'w']
  assert main(['reproduce', 'halves.py', *words, '--out', 'results']) == 0
  result = json.loads((file.parent / 'results' / 'halves.json').read_text())
  assert result['study'] == {'class': 'Halves', 'seeds': [4], 'bound': 3.0}
  assert result['measurements'] == {'half': {'value': [2.0]}}
  assert result['verdict'] == 'reproduced'
  assert (file.parent / 'w' / 'measurements.json').exists()
  assert 'result: results/halves.json\n' in capsys.readouterr().out


def test_show_prints_every_option_and_measures_nothing(file, capsys):
  assert main(['reproduce', 'halves.py', '--show', '--set', 'bound=2']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines == ["'seeds=(0, 2)'", 'bound=2.0']
  assert not (file.parent / 'runs').exists()


def test_wrong_options_are_refused(file, capsys):
  err = refused(capsys, 'halves.py', '--set', 'bond=1')
  assert "bond: Halves has no field 'bond'; did you mean 'bound'?" in err
  err = refused(capsys, 'halves.py', '--set', 'seeds=(0, 0)')
  assert 'Halves has seeds twice: (0, 0)' in err
  assert main(['reproduce', 'halves.py']) == 0
  err = refused(capsys, 'halves.py', '--set', 'bound=2')
  assert 'holds a study with other settings:\n  bound: 0.5 -> 2.0\n' in err


def test_a_file_without_a_study_is_refused(file, capsys):
  file.write_text('def experiment(): ...')
  err = refused(capsys, 'halves.py')
  assert 'has no function def study() -> Study; define one' in err
  file.write_text('def study():\n  return 3')
  err = refused(capsys, 'halves.py')
  assert 'study() must return a Study, got 3 (int)' in err
