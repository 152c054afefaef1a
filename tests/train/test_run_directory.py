import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import pytest

import jaxformers
from jaxformers.train.run_directory import RunDirectory

OLD = {'class': 'Experiment', 'steps': 3, 'rates': [0.1, {'float': 'inf'}]}
NEW = OLD | {'steps': 4}


def test_the_files_of_a_run_have_fixed_places(tmp_path):
  run = RunDirectory(str(tmp_path))
  names = {
    'metrics': 'metrics.jsonl',
    'checkpoints': 'checkpoints',
    'events': 'events',
    'figure': 'loss.png',
    'sample': 'sample.txt',
    'record': 'experiment.json',
  }
  for attribute, name in names.items():
    assert getattr(run, attribute) == tmp_path / name


def test_a_fresh_run_records_its_settings_versions_and_device(tmp_path):
  run = RunDirectory(tmp_path / 'runs' / 'a')
  run.prepare(OLD, device='cpu')
  written = json.loads(run.record.read_text())
  assert written['experiment'] == OLD
  assert written['device'] == 'cpu'
  assert written['versions']['jax'] == jax.__version__
  assert written['versions']['jaxformers'] == jaxformers.__version__
  assert written['versions']['python'] == '.'.join(
    map(str, sys.version_info[:3])
  )
  assert run.load() == OLD
  assert os.listdir(run.path) == ['experiment.json']


def test_the_same_settings_resume_and_leave_the_record_alone(tmp_path):
  run = RunDirectory(tmp_path)
  run.prepare(OLD, device='first')
  before = run.record.read_bytes()
  run.metrics.write_text('{}\n')
  run.prepare(OLD, device='second')
  assert run.record.read_bytes() == before


@pytest.mark.parametrize('process', [0, 1])
def test_other_settings_are_refused_with_the_difference(tmp_path, process):
  run = RunDirectory(tmp_path)
  run.prepare(OLD)
  with pytest.raises(ValueError, match=r'steps: 3 -> 4\n.*--workdir'):
    run.prepare(NEW, process=process)
  assert run.load() == OLD


def test_a_directory_with_other_things_is_refused_and_left_alone(tmp_path):
  (tmp_path / 'thesis.tex').write_text('x')
  run = RunDirectory(tmp_path)
  message = r'not empty and not a run \(it holds thesis.tex, .*--workdir'
  with pytest.raises(ValueError, match=message):
    run.prepare(OLD)
  with pytest.raises(ValueError, match=message), run.locked():
    pass
  assert os.listdir(tmp_path) == ['thesis.tex']


def test_what_a_killed_start_leaves_is_no_obstacle(tmp_path):
  (tmp_path / 'lock').touch()
  (tmp_path / 'experiment.json.new').write_text('{"exper')
  run = RunDirectory(tmp_path)
  run.prepare(OLD)
  assert run.load() == OLD


@pytest.mark.parametrize('below', ['', 'deeper'])
def test_a_file_in_the_way_is_named(tmp_path, below):
  (tmp_path / 'file').touch()
  run = RunDirectory(tmp_path / 'file' / below)
  with pytest.raises(NotADirectoryError, match='file is in the way.*--workdir'):
    run.prepare(OLD)


def test_a_directory_that_cannot_be_made_is_named(tmp_path, monkeypatch):
  def refuse(*args, **kwargs):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(pathlib.Path, 'mkdir', refuse)
  with pytest.raises(PermissionError, match=r'cannot write to .*/a \(Permiss'):
    RunDirectory(tmp_path / 'a').prepare(OLD)


def test_a_directory_that_cannot_be_written_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(os, 'access', lambda path, mode: False)
  with pytest.raises(PermissionError, match='cannot write to .*--workdir'):
    RunDirectory(tmp_path).prepare(OLD)


def test_only_process_0_writes(tmp_path):
  run = RunDirectory(tmp_path / 'a')
  with run.locked(process=1):
    run.prepare(OLD, process=1)
  assert not run.path.exists()


def test_a_missing_run_names_the_nearest(tmp_path):
  RunDirectory(tmp_path / 'kjv-deep').prepare(OLD)
  with pytest.raises(FileNotFoundError, match='did you mean .*/kjv-deep'):
    RunDirectory(tmp_path / 'kjv-dep').load()
  with pytest.raises(FileNotFoundError, match='in .* there are kjv-deep'):
    RunDirectory(tmp_path / 'other').load()
  with pytest.raises(FileNotFoundError, match='there are no runs in'):
    RunDirectory(tmp_path / 'x' / 'other').load()
  with pytest.raises(FileNotFoundError, match=r'not a run: .*experiment\.json'):
    RunDirectory(tmp_path).load()


@pytest.mark.parametrize('text', ['{"experiment":', '[]', '{}', '\xff'])
def test_a_damaged_record_is_named(tmp_path, text):
  (tmp_path / 'experiment.json').write_bytes(text.encode('latin-1'))
  with pytest.raises(ValueError, match=r'experiment\.json is damaged'):
    RunDirectory(tmp_path).load()


def test_a_second_trainer_is_told_who_holds_the_directory(tmp_path):
  (tmp_path / 'lock').write_text('pid 123456789 on a host with a long name\n')
  run = RunDirectory(tmp_path)
  other = RunDirectory(tmp_path).locked()
  with run.locked():
    message = f'in use by pid {os.getpid()} on {socket.gethostname()}; wait'
    with pytest.raises(BlockingIOError, match=message), other:
      pass
  with run.locked():
    run.prepare(OLD)


HOLD = """
import sys, time
from jaxformers.train.run_directory import RunDirectory
with RunDirectory(sys.argv[1]).locked():
  print('held', flush=True)
  time.sleep(60)
"""


def test_the_lock_of_a_killed_trainer_is_free_at_once(tmp_path):
  holder = subprocess.Popen(
    [sys.executable, '-c', HOLD, str(tmp_path)],
    stdout=subprocess.PIPE,
    text=True,
  )
  run = RunDirectory(tmp_path)
  try:
    assert holder.stdout.readline() == 'held\n'
    with pytest.raises(BlockingIOError, match=f'pid {holder.pid} '):
      run.locked().__enter__()
  finally:
    holder.kill()
    holder.communicate()
  started = time.monotonic()
  with run.locked():
    run.prepare(OLD)
  assert time.monotonic() - started < 1


def test_a_file_system_without_locks_is_warned_about(tmp_path, monkeypatch):
  import fcntl

  def refuse(descriptor, operation):
    raise OSError(95, 'Operation not supported')

  monkeypatch.setattr(fcntl, 'flock', refuse)
  with (
    pytest.warns(UserWarning, match='has no locks .Operation not supported'),
    RunDirectory(tmp_path).locked(),
  ):
    pass


@pytest.mark.parametrize('path', ['gs://bucket/run', 's3://bucket/run'])
def test_stores_that_are_no_file_systems_are_refused(path):
  with pytest.raises(ValueError, match='Mount the store'):
    RunDirectory(pathlib.Path(path))
