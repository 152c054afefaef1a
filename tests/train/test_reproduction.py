import dataclasses
import json
import struct
import types

import pytest

from jaxformers.train.report import read_report
from jaxformers.train.reproduction import reproduce
from jaxformers.train.study import Study
from jaxformers.train.study import above
from jaxformers.train.workspace import StudyDirectory
from jaxformers.train.workspace import Workspace

measured = []


@dataclasses.dataclass(frozen=True)
class Powers(Study):
  """Measures 2 and 3 to the power of the seed."""

  claim = 'Powers of 3 are larger.'
  source = 'Arithmetic.'
  bound: float = 0.0
  fail_at: int = 99  # the number of the measurement that is killed

  def variants(self):
    return 'two', 'three, larger'

  def measure(self, variant, seed, workspace):
    if len(measured) == self.fail_at:
      raise KeyboardInterrupt
    measured.append((variant, seed))
    base = 2 if variant == 'two' else 3
    return {'power': base**seed, 'curve': [1, base], 'none': None}

  def judge(self, results):
    gain = results.mean('three, larger', 'power') - results.mean('two', 'power')
    return [above('gain', gain, self.bound)]

  def draw(self, results, figure):
    axes = figure.subplots()
    axes.plot(results.seeds, results.values('two', 'power'), label='two')
    figure.legend(loc='outside right upper')


KEYS = [(v, s) for s in (0, 1, 2) for v in ('two', 'three, larger')]
CLASSES = {'Powers': Powers}


@pytest.fixture(autouse=True)
def _forget():
  measured.clear()


@pytest.fixture
def undrawn(monkeypatch):
  monkeypatch.setattr(
    'jaxformers.train.reproduction.draw_study', lambda *_: None
  )


def run(study, path, **options):
  return reproduce(study, path, **options)


@pytest.mark.usefixtures('undrawn')
def test_every_variant_is_measured_once_with_every_seed(tmp_path, capsys):
  report = run(Powers(), tmp_path / 'study')
  assert measured == KEYS
  assert report.results.measurements['three, larger']['power'] == [1, 3, 9]
  # (13 - 7) / 3
  assert report.judgements[0].seen == pytest.approx(2)
  assert report.verdict == 'reproduced'
  out = capsys.readouterr().out
  assert '[4/6] three, larger, seed 1: power 3\n' in out
  assert 'three, larger  4.333 ± 4.2  -\n' in out
  assert 'holds: gain: 2 > 0\n' in out
  assert run(Powers(), tmp_path / 'study') == report
  assert len(measured) == 6


@pytest.mark.usefixtures('undrawn')
def test_an_interrupted_study_goes_on_where_it_stopped(tmp_path):
  whole = run(Powers(), tmp_path / 'whole')
  measured.clear()
  study = Powers(fail_at=3)
  for done in (3, 6):
    if done == 3:
      with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / 'study')
      assert not (tmp_path / 'study' / 'result.json').exists()
      measured.append('a session between')
    else:
      resumed = run(study, tmp_path / 'study')
  assert [key for key in measured if key != 'a session between'] == KEYS
  assert resumed.results == whole.results


@pytest.mark.usefixtures('undrawn')
def test_a_directory_of_other_options_is_refused(tmp_path):
  run(Powers(), tmp_path / 'study')
  measured.clear()
  with pytest.raises(ValueError, match=r'bound: 0\.0 -> 1\.0\n.*--workdir'):
    run(Powers(bound=1.0), tmp_path / 'study')
  assert measured == []


@pytest.mark.usefixtures('undrawn')
def test_a_result_of_other_options_is_not_overwritten(tmp_path):
  out = tmp_path / 'results'
  run(Powers(), tmp_path / 'a', name='powers', out=out)
  text = (out / 'powers.json').read_text()
  measured.clear()
  with pytest.raises(
    ValueError, match=r'of other options:\n  seeds: .*\n.*out'
  ):
    run(Powers(seeds=(5,)), tmp_path / 'b', name='powers', out=out)
  assert (out / 'powers.json').read_text() == text
  assert measured == []
  run(Powers(), tmp_path / 'c', name='powers', out=out)
  (out / 'powers.json').write_text('{"loss": 1}')
  with pytest.raises(ValueError, match='is not the result of a study'):
    run(Powers(), tmp_path / 'd', name='powers', out=out)
  with pytest.raises(NotADirectoryError, match='choose another --out'):
    run(Powers(), tmp_path / 'd', out=out / 'powers.json')


def test_the_result_can_be_read_back_and_drawn(tmp_path):
  report = run(Powers(bound=2.5), tmp_path, name='powers')
  assert report.verdict == 'not reproduced'
  assert read_report(tmp_path / 'powers.json', CLASSES) == report
  content = json.loads((tmp_path / 'powers.json').read_text())
  assert content['verdict'] == 'not reproduced'
  assert content['judgements'][0] == {
    'statement': 'gain', 'seen': pytest.approx(2), 'relation': '>',
    'bound': 2.5, 'holds': False,
  }  # fmt: skip
  assert content['measurements']['two']['none'] == [None] * 3
  assert content['study']['seeds'] == [0, 1, 2]
  assert content['versions']['jax']
  png = (tmp_path / 'powers.png').read_bytes()
  assert png.startswith(b'\x89PNG\r\n\x1a\n')
  assert png.endswith(b'IEND\xaeB`\x82')
  assert struct.unpack('>2I', png[16:24]) == (1200, 750)


def test_a_file_that_is_no_result_is_refused(tmp_path):
  path = tmp_path / 'a.json'
  for text, message in (
    ('{', 'is not JSON'),
    ('[1]', 'is not the result of a study'),
    ('{"study": {"class": "Powers"}}', "is damaged: KeyError.'measurements'"),
    ('{"study": {"class": "Power"}}', "unknown class 'Power'; did you mean"),
  ):
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
      read_report(path, CLASSES)


@pytest.mark.usefixtures('undrawn')
def test_measurements_by_an_older_file_are_pointed_out(
  tmp_path, monkeypatch, capsys
):
  run(Powers(), tmp_path)
  assert 'Note' not in capsys.readouterr().out
  monkeypatch.setattr(
    'jaxformers.train.reproduction._checksum', lambda _: 'new'
  )
  run(Powers(), tmp_path)
  assert f'has changed since; delete {tmp_path}' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'power': float('nan')}, 'three, larger, seed 0: power is nan'),
    ({'extra': 1.0}, "'extra' is missing from some"),
  ],
)
def test_a_wrong_measurement_says_whose_it_is(
  tmp_path, monkeypatch, change, message
):
  right = Powers.measure

  def wrong(self, variant, seed, workspace):
    values = right(self, variant, seed, workspace)
    return values if variant == 'two' else {**values, **change}

  monkeypatch.setattr(Powers, 'measure', wrong)
  with pytest.raises(ValueError, match=message):
    run(Powers(), tmp_path)
  assert len(StudyDirectory(tmp_path).load_measurements()) == 1


def test_a_study_without_criteria_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(Powers, 'judge', lambda *_: [])
  with pytest.raises(ValueError, match=r'Powers\.judge\(\) gave no judgement'):
    run(Powers(), tmp_path)


def test_damaged_measurements_are_not_measured_over(tmp_path):
  directory = StudyDirectory(tmp_path)
  directory.measurements.write_text('[{"variant": "two"')
  with pytest.raises(ValueError, match=r'measurements\.json is damaged'):
    directory.load_measurements()


@pytest.fixture
def trained(monkeypatch):
  calls = []

  def train(experiment, workdir):
    calls.append((experiment.steps, workdir))
    return types.SimpleNamespace(variables={}, result={}, step=experiment.steps)

  monkeypatch.setattr('jaxformers.train.workspace.train', train)
  return calls


def test_a_workspace_trains_equal_experiments_once(tmp_path, tiny, trained):
  workspace = Workspace(StudyDirectory(tmp_path))
  runs = [workspace.train(tiny(steps=n)) for n in (3, 4, 3)]
  assert [steps for steps, _ in trained] == [3, 4]
  assert runs[0] is runs[2]
  assert runs[1].step == 4
  workspace.forget()
  workspace.train(tiny(steps=3))
  (_, first), (_, other), (_, again) = trained
  assert first == again != other
  assert first.parent == tmp_path / 'trainings'


def test_metrics_are_those_of_the_training(tmp_path, tiny, trained):
  workspace = Workspace(StudyDirectory(tmp_path))
  workspace.train(tiny())
  folder = trained[0][1]
  folder.mkdir(parents=True)
  (folder / 'metrics.jsonl').write_text(
    '{"step": 1, "split": "train", "loss": 2.0}\n'
    '{"step": 1, "split": "heldout", "loss": 1.0}\n'
  )
  assert [x['loss'] for x in workspace.metrics(tiny())] == [2.0]
  assert [x['loss'] for x in workspace.metrics(tiny(), 'heldout')] == [1.0]
  assert len(trained) == 1


def test_a_signal_during_training_leaves_the_study(
  tmp_path, tiny, monkeypatch, capsys
):
  monkeypatch.setattr('jaxformers.train.workspace.train', lambda *_: None)
  monkeypatch.setattr(
    Powers, 'measure', lambda self, v, s, workspace: workspace.train(tiny())
  )
  assert run(Powers(), tmp_path) is None
  assert 'the same command goes on' in capsys.readouterr().out
  assert StudyDirectory(tmp_path).load_measurements() == []
