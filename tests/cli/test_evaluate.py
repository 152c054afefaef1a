import dataclasses
import json
import math

import pytest

from jaxformers.cli import evaluate
from jaxformers.cli import main
from jaxformers.data import TextData


@dataclasses.dataclass(frozen=True)
class Settings:
  data: TextData = TextData()
  batch_size: int = 4


class FakeRun:
  experiment = Settings()
  step = 30

  def evaluate(self, experiment):
    self.evaluated = experiment
    return {'loss': 1.25, 'bits_per_byte': 1.8033688}


@pytest.fixture
def opened(monkeypatch):
  fake = FakeRun()
  monkeypatch.setattr('jaxformers.train.run.open_run', lambda *a, **k: fake)
  return fake


def test_metrics_are_printed_as_a_table(opened, capsys):
  assert main(['eval', 'runs/a']) == 0
  out = capsys.readouterr().out
  assert out == 'loss           1.25\nbits_per_byte  1.80337\n'
  assert opened.evaluated == Settings()


def test_metrics_are_printed_as_json(opened, capsys):
  assert main(['eval', 'runs/a', '--json']) == 0
  expected = {'step': 30, 'loss': 1.25, 'bits_per_byte': 1.8033688}
  assert json.loads(capsys.readouterr().out) == expected


def test_settings_change_what_is_evaluated(opened):
  words = ['--set', 'data.path=my text.txt', '--set', 'batch_size=2']
  assert main(['eval', 'runs/a', *words]) == 0
  assert opened.evaluated == Settings(TextData(path='my text.txt'), 2)


def test_a_wrong_setting_is_refused(opened, capsys):
  assert main(['eval', 'runs/a', '--set', 'data.pth=x']) == 2
  assert "did you mean 'path'?" in capsys.readouterr().err


def test_json_stays_valid_when_a_number_is_not_finite():
  text = evaluate.as_json(1, {'loss': math.nan, 'other': math.inf})
  assert text == '{"step": 1, "loss": null, "other": null}'
