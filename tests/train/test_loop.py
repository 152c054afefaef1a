"""Whole runs: results, exact resume, signals, failures, runs reopened."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest

from jaxformers.nn import Block
from jaxformers.nn import FeedForward
from jaxformers.nn import Stack
from jaxformers.nn.mixers import Attention
from jaxformers.optim import AdamW
from jaxformers.optim import Averaged
from jaxformers.optim import Constant
from jaxformers.optim import averaged_params
from jaxformers.train import MeshShape
from jaxformers.train import NGram
from jaxformers.train import loop
from jaxformers.train import open_run
from jaxformers.train import record as records
from jaxformers.train import run as run_module
from jaxformers.train import step as step_module
from jaxformers.train import train
from jaxformers.train.checkpoint import Checkpoints
from jaxformers.train.checkpoint import kinds_of
from jaxformers.train.errors import RunFailed
from jaxformers.train.metrics import read_metrics

pytestmark = pytest.mark.xdist_group('loop')


@pytest.fixture(scope='module')
def template(tiny, tmp_path_factory):
  """An uninterrupted run of six steps, and its final state."""
  workdir = tmp_path_factory.mktemp('runs') / 'template'
  return workdir, train(tiny(), workdir)


@pytest.fixture
def finished(tiny, template, tmp_path):
  """The experiment, a copy of its finished run, and the final state."""
  workdir = tmp_path / 'finished'
  shutil.copytree(template[0], workdir)
  return tiny(), workdir, template[1]


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_run_leaves_metrics_events_checkpoints_figure_and_sample(finished):
  _, workdir, state = finished
  lines = read_metrics(workdir / 'metrics.jsonl')
  steps = {'train': [], 'heldout': []}
  for line in lines:
    steps[line['split']].append(line['step'])
  assert steps == {'train': [1, 2, 3, 4, 5, 6], 'heldout': [3, 6]}
  assert lines[-1]['loss'] < lines[0]['loss']
  bits = lines[-1]['cross_entropy'] / np.log(2)
  np.testing.assert_allclose(lines[-1]['bits_per_byte'], bits, rtol=1e-6)
  assert list((workdir / 'events').iterdir())
  assert (workdir / 'loss.png').read_bytes().startswith(b'\x89PNG')
  sample = (workdir / 'sample.txt').read_bytes()
  assert sample.startswith(b'1: ')
  assert len(sample) == 8
  record = json.loads((workdir / 'experiment.json').read_text())
  assert record['experiment']['steps'] == 6
  assert int(state.step) == 6


def test_what_the_baseline_reached_is_kept(finished):
  experiment, workdir, _ = finished
  experiment = dataclasses.replace(
    experiment, baseline=NGram(context=1), preview=None
  )
  content = json.loads((workdir / 'experiment.json').read_text())
  content['experiment'] = records.to_record(experiment)
  (workdir / 'experiment.json').write_text(json.dumps(content))
  assert not (workdir / 'baselines.json').exists()
  train(experiment, workdir)
  bits = experiment.baseline.bits_per_byte(experiment.data)
  kept = json.loads((workdir / 'baselines.json').read_text())
  assert kept == {'order-1 n-gram': bits}


def stop_after(monkeypatch, step):
  """Makes SIGTERM arrive while the given step is being reported."""
  report = loop.report

  def reporting(at, *arguments):
    if at == step:
      os.kill(os.getpid(), signal.SIGTERM)
    return report(at, *arguments)

  monkeypatch.setattr(loop, 'report', reporting)


def test_sigterm_saves_and_the_same_call_ends_with_the_same_bits(
  finished, tiny, tmp_path, monkeypatch, capsys
):
  experiment, straight, expected = finished
  workdir = tmp_path / 'interrupted'
  with monkeypatch.context() as patch:
    stop_after(patch, 3)
    assert train(experiment, workdir) is None
  out = capsys.readouterr().out
  assert 'because of SIGTERM; the same command goes on from there' in out
  state = train(experiment, workdir)
  assert 'resuming after step 4' in capsys.readouterr().out
  equal(state, expected)
  for name in ('metrics.jsonl', 'sample.txt'):
    assert (workdir / name).read_bytes() == (straight / name).read_bytes()


def test_a_run_cut_between_checkpoints_repeats_the_lost_steps_bit_for_bit(
  finished, tmp_path
):
  experiment, straight, expected = finished
  workdir = tmp_path / 'cut'
  shutil.copytree(straight, workdir)
  shutil.rmtree(workdir / 'checkpoints' / '6')
  with open(workdir / 'metrics.jsonl', 'ab') as file:
    file.write(b'{"step": 7, "spl')
  equal(train(experiment, workdir), expected)
  name = 'metrics.jsonl'
  assert (workdir / name).read_bytes() == (straight / name).read_bytes()


def test_a_corrupt_newest_checkpoint_is_stepped_over_and_said(finished, capsys):
  experiment, workdir, expected = finished
  before = (workdir / 'metrics.jsonl').read_bytes()
  newest = max(
    (p for p in (workdir / 'checkpoints' / '6').rglob('*') if p.is_file()),
    key=lambda p: p.stat().st_size,
  )
  newest.write_bytes(newest.read_bytes()[:-10])
  capsys.readouterr()
  equal(train(experiment, workdir), expected)
  out = capsys.readouterr().out
  assert 'The checkpoint of step 6 is damaged' in out
  assert 'resuming after step 4' in out
  assert (workdir / 'broken' / '6').is_dir()
  assert (workdir / 'metrics.jsonl').read_bytes() == before


def test_a_finished_run_says_so_and_trains_no_more(
  finished, monkeypatch, capsys
):
  experiment, workdir, expected = finished

  def refuse(*arguments):
    raise AssertionError('it trained')

  monkeypatch.setattr(loop, '_run', refuse)
  equal(train(experiment, workdir), expected)
  assert 'is finished (6 steps)' in capsys.readouterr().out


def test_another_configuration_is_refused_with_the_difference(finished):
  experiment, workdir, _ = finished
  before = (workdir / 'metrics.jsonl').read_bytes()
  with pytest.raises(ValueError, match='steps: 6 -> 7'):
    train(dataclasses.replace(experiment, steps=7), workdir)
  assert (workdir / 'metrics.jsonl').read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(
  tiny, tmp_path, monkeypatch
):
  original = step_module._gradients

  def exploding(experiment, state, batch, key):
    gradients, losses, tasks = original(experiment, state, batch, key)
    factor = jax.numpy.where(state.step == 2, jax.numpy.nan, 1.0)
    return jax.tree.map(lambda g: g * factor, gradients), losses, tasks

  monkeypatch.setattr(step_module, '_gradients', exploding)
  with pytest.raises(RunFailed, match='step 3: gradient_norm not finite'):
    train(tiny(), tmp_path / 'stop')
  saved = {p.name for p in (tmp_path / 'stop' / 'checkpoints').iterdir()}
  assert saved == {'2'}
  state = train(tiny(non_finite='skip'), tmp_path / 'skip')
  assert int(state.skipped) == 1


def test_a_run_is_reopened_to_sample_and_evaluate(finished, tmp_path):
  experiment, workdir, state = finished
  run = open_run(workdir)
  assert (run.experiment, run.step) == (experiment, 6)
  equal(run.variables, state.variables)
  last = read_metrics(workdir / 'metrics.jsonl')[-1]
  for name, value in run.evaluate().items():
    np.testing.assert_allclose(value, last[name], rtol=1e-6)

  def sample(**options):
    pieces = run.sample(['12: ', '7'], tokens=12, seed=3, **options)
    rows = [b'', b'']
    for row, text in pieces:
      rows[row] += text
    return rows

  assert sample() == sample()
  assert [len(row) for row in sample()] == [12, 12]
  greedy = sample(temperature=0.0)
  assert sample(top_k=1) == greedy
  stop = greedy[0][3:4].decode('latin-1')
  assert sample(temperature=0.0, stop=stop)[0].endswith(stop.encode('latin-1'))

  other = tmp_path / 'other.txt'
  other.write_text('something else entirely\n' * 50)
  data = dataclasses.replace(experiment.data, path=str(other))
  elsewhere = run.evaluate(dataclasses.replace(experiment, data=data))
  assert elsewhere['bits_per_byte'] > last['bits_per_byte']


def test_a_run_is_opened_without_its_data_and_on_other_devices(
  finished, text_file, monkeypatch
):
  _, workdir, state = finished
  path = workdir / 'experiment.json'
  record = path.read_text().replace(str(text_file), 'gone.txt')
  path.write_text(record.replace('"data": 8,', '"data": 64,'))
  run = open_run(workdir)
  assert run.experiment.mesh == MeshShape(fsdp=8)
  equal(run.variables, state.variables)
  assert b''.join(text for _, text in run.sample(['1: '], tokens=4))
  with pytest.raises(FileNotFoundError, match=r'gone\.txt'):
    run.evaluate()


def test_a_run_is_shared_out_as_asked_and_its_moments_are_not_read(
  finished, monkeypatch
):
  _, workdir, state = finished
  original, read = Checkpoints.restore, {}

  def restore(self, which, abstract_state):
    read.update(kinds_of(abstract_state))
    return original(self, which, abstract_state)

  monkeypatch.setattr(Checkpoints, 'restore', restore)
  run = open_run(workdir, mesh=MeshShape(data=1, fsdp=4, tensor=2))
  heads = {
    name.partition('.')[0] for name, kind in read.items() if kind != 'any'
  }
  assert heads == {'params', 'step', 'skipped'}
  equal(run.variables, state.variables)
  specs = {
    jax.tree_util.keystr(path): leaf.sharding.spec
    for path, leaf in jax.tree_util.tree_leaves_with_path(run.variables)
  }
  [named] = [spec for name, spec in specs.items() if 'w_DF' in name]
  assert named == jax.P(None, 'fsdp', 'tensor')
  last = read_metrics(workdir / 'metrics.jsonl')[-1]
  assert run.evaluate()['loss'] == pytest.approx(last['loss'], rel=1e-5)
  with pytest.raises(ValueError, match='does not fit 8 devices'):
    open_run(workdir, mesh=MeshShape(data=3))


@pytest.mark.parametrize(
  ('width', 'mesh', 'expected'),
  [
    (8, MeshShape(fsdp=2), MeshShape(fsdp=2)),  # Its own fits.
    (8, MeshShape(fsdp=16), MeshShape(fsdp=8)),
    (12, MeshShape(fsdp=6), MeshShape(fsdp=4)),
    (5, MeshShape(fsdp=5), MeshShape(fsdp=1)),
  ],
)
def test_on_other_devices_as_many_share_parameters_as_divide_the_width(
  tiny, tiny_model, width, mesh, expected
):
  model = tiny_model(width=width)
  if width % 2:
    attention = Attention(num_heads=1, head_dim=2)
    block = Block(attention, FeedForward(hidden=4))
    model = model.clone(stack=Stack(block, 1))
  found, state = run_module._here(tiny(model=model, mesh=mesh), None)
  assert found == expected
  sizes = {leaf.sharding.mesh.shape['fsdp'] for leaf in jax.tree.leaves(state)}
  assert sizes == {expected.fsdp}


def test_runs_that_cannot_be_opened_say_why(finished):
  _, workdir, _ = finished
  with pytest.raises(ValueError, match='no checkpoint of step 5'):
    open_run(workdir, checkpoint=5)
  assert open_run(workdir, checkpoint='best').step in (3, 4, 6)
  with pytest.raises(ValueError, match='must be one token'):
    open_run(workdir).sample(['a'], stop='ab')
  shutil.rmtree(workdir / 'checkpoints')
  with pytest.raises((RunFailed, FileNotFoundError)):
    open_run(workdir)


def test_no_code_in_a_run_directory_is_executed(finished):
  _, workdir, _ = finished
  path = workdir / 'experiment.json'
  text = path.read_text().replace('"NextToken"', '"os.system"')
  path.write_text(text)
  (workdir / 'experiment.py').write_text('raise SystemExit(3)')
  with pytest.raises(ValueError, match='os.system'):
    open_run(workdir)


def test_bytes_that_are_not_utf8_are_learned_like_any_others(tiny, tmp_path):
  text = tmp_path / 'latin.txt'
  text.write_bytes(bytes(range(256)) * 20)
  data = dataclasses.replace(tiny().data, path=str(text))
  state = train(tiny(data=data, preview=None), tmp_path / 'run')
  assert int(state.step) == 6
  assert not pathlib.Path(tmp_path / 'run' / 'sample.txt').exists()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'batch_size': 9, 'accumulate': 2}, '9 does not divide into accumulate=2'),
    ({'steps': 0}, 'steps must be at least 1, got 0'),
    ({'non_finite': 'ignore'}, "'stop' or 'skip', got 'ignore'"),
  ],
)
def test_experiments_that_make_no_sense_are_refused(tiny, change, message):
  with pytest.raises(ValueError, match=message):
    tiny(**change)


def test_the_mean_of_the_parameters_is_what_a_run_gives(tiny, tmp_path):
  experiment = tiny(optimizer=Averaged(AdamW(Constant(0.01))))
  state = train(experiment, tmp_path / 'run')
  mean = averaged_params(state.optimizer_state, state.params)
  run = open_run(tmp_path / 'run')
  jax.tree.map(np.testing.assert_array_equal, run.variables['params'], mean)
  last = open_run(tmp_path / 'run', averaged=False)
  jax.tree.map(
    np.testing.assert_array_equal, last.variables['params'], state.params
  )
  heldout = read_metrics(tmp_path / 'run' / 'metrics.jsonl')[-1]['loss']
  assert run.evaluate()['loss'] == pytest.approx(heldout, rel=1e-6)
  assert abs(last.evaluate()['loss'] - heldout) > 1e-3
  assert (tmp_path / 'run' / 'sample.txt').read_bytes() == run.preview()
