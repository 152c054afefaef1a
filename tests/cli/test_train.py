import pathlib
import sys

import pytest

from jaxformers.cli import main
from jaxformers.train.experiment import Experiment

TINY = '''"""A tiny run."""
import dataclasses

from flax import linen as nn

import neighbour
from jaxformers.train.experiment import Experiment


class Model(nn.Module):
  width: int = 4


class Wider(nn.Module):
  width: int = neighbour.WIDTH


def experiment():
  return Experiment(model=Model(), steps=5)
'''


@pytest.fixture
def file(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', sys.path[:])
  (tmp_path / 'neighbour.py').write_text('WIDTH = 8\n')
  path = tmp_path / 'tiny.py'
  path.write_text(TINY)
  yield path
  sys.modules.pop('neighbour', None)


@pytest.fixture
def trained(monkeypatch):
  calls = []
  monkeypatch.setattr(
    'jaxformers.train.loop.train',
    lambda *given, **options: calls.append(given),
  )
  return calls


def refused(capsys, *words):
  assert main(['train', *map(str, words)]) == 2
  return capsys.readouterr().err


def test_the_experiment_of_a_file_is_trained(file, trained):
  assert main(['train', 'tiny.py']) == 0
  [(experiment, workdir)] = trained
  assert isinstance(experiment, Experiment)
  assert experiment.steps == 5
  assert workdir == pathlib.Path('runs/tiny')


def test_settings_and_workdir_are_passed_on(file, trained):
  words = ['--set', 'steps=7', '--set', 'model=Wider()', '--workdir', 'there']
  assert main(['train', str(file), *words]) == 0
  [(experiment, workdir)] = trained
  assert experiment.steps == 7
  assert (type(experiment.model).__name__, experiment.model.width) == (
    'Wider',
    8,
  )
  assert workdir == pathlib.Path('there')


def test_profiling_and_the_status_after_leaving_early_can_be_asked_for(
  file, monkeypatch
):
  asked = []
  monkeypatch.setattr(
    'jaxformers.train.loop.train',
    lambda *given, **options: asked.append(options),
  )  # Returns None, as `train` does when it leaves early.
  assert main(['train', 'tiny.py']) == 0
  assert main(['train', 'tiny.py', '--profile', '--left-status', '75']) == 75
  assert main(['train', 'tiny.py', '--profile', '3']) == 0
  assert [options['profile_steps'] for options in asked] == [0, 5, 3]


def test_show_prints_every_setting_and_trains_nothing(file, trained, capsys):
  assert main(['train', 'tiny.py', '--show', '--set', 'model.width=6']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[:2] == ['model: Model', '  model.width=6']
  assert 'steps=5' in lines
  assert trained == []


def test_a_wrong_setting_is_refused(file, trained, capsys):
  err = refused(capsys, file, '--set', 'model.widht=3')
  assert "model.widht: Model has no field 'widht'; did you mean 'width'" in err
  assert trained == []


def test_a_missing_file_names_the_nearest(file, capsys):
  assert 'did you mean tiny.py?' in refused(capsys, 'tinny.py')
  assert 'there is no file zzz.py; `jaxformers list' in refused(
    capsys, 'zzz.py'
  )
  assert 'is a directory; expected a Python file' in refused(capsys, '.')


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('x = 3', 'has no function def experiment() -> Experiment'),
    ('experiment = 3', 'has no function def experiment() -> Experiment'),
    ('def experiment():\n  return 3', 'must return an Experiment, got 3 (int)'),
    ('def experiment(', 'bad.py:1: SyntaxError'),
    (
      '\nfoo = 1 / 0',
      'bad.py:2: ZeroDivisionError: division by zero\n    foo =',
    ),
    (
      'def experiment():\n  return wrong',
      "bad.py:2: NameError: name 'wrong' is not defined\n    return wrong",
    ),
    ('import no_such_module', 'bad.py:1: ModuleNotFoundError: No module named'),
    (
      'def experiment(x):\n  return x',
      'bad.py: TypeError: experiment() missing',
    ),
    (
      'import json\nvalue = json.loads("{")',
      'bad.py:2: JSONDecodeError: Expecting property name',
    ),
  ],
)
def test_a_faulty_file_is_explained(tmp_path, capsys, content, message):
  bad = tmp_path / 'bad.py'
  bad.write_text(content)
  err = refused(capsys, bad)
  assert message in err
  assert 'Traceback' not in err


def test_a_class_that_shares_a_name_with_the_library_is_refused(
  file, trained, capsys
):
  file.write_text(TINY.replace('class Wider(', 'class Attention('))
  assert 'two classes are called Attention' in refused(capsys, file)
