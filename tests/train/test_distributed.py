"""Runs on several processes, each a real one with CPU devices of its own."""

import contextlib
import hashlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxformers.cli import main
from jaxformers.data import TextData
from jaxformers.data import batch_at
from jaxformers.train import distributed
from jaxformers.train.errors import ProcessLost
from jaxformers.train.errors import RunFailed
from jaxformers.train.metrics import read_metrics
from jaxformers.train.run_directory import RunDirectory

pytestmark = pytest.mark.xdist_group('distributed')

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 10
EXPERIMENT = '''
import dataclasses
import os
import time

from jaxformers.data import TextData
from jaxformers.models import LanguageModel
from jaxformers.nn import Block, FeedForward, Stack
from jaxformers.nn.mixers import Attention
from jaxformers.optim import AdamW, WarmupCosine
from jaxformers.train import Experiment


class Slow:
  """Rows that take their time if the environment says so."""

  def __init__(self, rows):
    self.rows, self.pause = rows, float(os.environ.get('PAUSE', 0))

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, i):
    time.sleep(self.pause)
    return self.rows[i]


@dataclasses.dataclass(frozen=True)
class Text(TextData):
  def prepare(self):
    prepared = super().prepare()
    return dataclasses.replace(prepared, train=Slow(prepared.train))


def experiment():
  block = Block(Attention(num_heads=2), FeedForward(hidden=16))
  return Experiment(
    model=LanguageModel(256, 8, Stack(block, 1)),
    data=Text(path='text.txt', length=16),
    optimizer=AdamW(WarmupCosine(peak=1e-2, warmup_steps=2)),
    steps=10, batch_size=8, evaluate_every=5, checkpoint_every=2,
    preview=None,
  )
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with an experiment and its text."""
  folder = tmp_path_factory.mktemp('distributed')
  (folder / 'tiny.py').write_text(EXPERIMENT)
  lines = [f'{i}: the cat sat on mat number {i % 7}.\n' for i in range(300)]
  (folder / 'text.txt').write_text(''.join(lines))
  return folder


def free_port():
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return listener.getsockname()[1]


def launch(folder, words, *, devices=1, **variables):
  """Starts a process with CPU devices of its own."""
  own = {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(devices),
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'PYTHONPATH': str(ROOT),
    'PYTHONUNBUFFERED': '1',
    **variables,
  }
  return subprocess.Popen(
    [sys.executable, *map(str, words)],
    cwd=folder,
    env=os.environ | own,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def train_words(workdir, *extra):
  words = ['-m', 'jaxformers', 'train', 'tiny.py', '--workdir', workdir]
  return [*words, '--compile-cache', 'programs', *extra]


@contextlib.contextmanager
def two_processes(folder, workdir, *extra, own=((), ()), **variables):
  """Starts two processes of a run, and ends what is left of them."""
  who = ['--coordinator', f'127.0.0.1:{free_port()}', '--processes', '2']
  words = train_words(workdir, *who, '--heartbeat-timeout', 10, *extra)
  started = [
    launch(folder, [*words, '--process', i, *own[i]], **variables)
    for i in range(2)
  ]
  try:
    yield started
  finally:
    for process in started:
      process.kill()
      process.communicate()


def finish(process, seconds=120):
  out, err = process.communicate(timeout=seconds)
  return process.returncode, out, err


def wait_for_step(workdir, step, process):
  """Returns when a run has written the metrics of a step."""
  end = time.monotonic() + 120
  path = workdir / 'metrics.jsonl'
  while not (path.exists() and path.read_bytes().count(b'"train"') >= step):
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < end
    time.sleep(0.05)


@pytest.fixture(scope='module')
def straight(folder):
  """A run of two processes that Slurm started, not interrupted."""
  slurm = {
    'SLURM_JOB_ID': str(os.getpid()),
    'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_NTASKS': '2',
    'SLURM_STEP_TASKS_PER_NODE': '2',
    'JAX_COORDINATOR_PORT': str(free_port()),
  }
  words = train_words('straight')
  processes = [
    launch(folder, words, **slurm, SLURM_PROCID=str(i), SLURM_LOCALID=str(i))
    for i in range(2)
  ]
  outputs = [finish(process) for process in processes]
  assert [status for status, _, _ in outputs] == [0, 0], outputs
  return folder / 'straight', [out for _, out, _ in outputs]


def test_only_process_0_writes_and_prints(straight):
  workdir, (first, second) = straight
  assert 'on 2 x cpu in 2 processes' in first
  assert f'step {STEPS}: held-out bits per byte' in first
  spoken = [x for x in second.splitlines() if not x.startswith('[Gloo]')]
  assert spoken == []
  assert len(list((workdir / 'events').iterdir())) == 1
  assert list((workdir.parent / 'programs').glob('*-cache'))
  lines = read_metrics(workdir / 'metrics.jsonl')
  assert [x['step'] for x in lines if x['split'] == 'train'] == list(
    range(1, STEPS + 1)
  )


def test_sigterm_and_the_death_of_one_process_cost_no_bit(straight, folder):
  workdir, _ = straight
  broken = folder / 'broken'
  with two_processes(
    folder, 'broken', '--left-status', 75, PAUSE='0.05'
  ) as processes:
    wait_for_step(broken, 2, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    (status, out, err), (other, _, _) = map(finish, processes)
  assert (status, other) == (75, 75), err
  assert 'because of SIGTERM; the same command goes on from there' in out
  left = int(out.partition('Left after step ')[2].split()[0])
  assert left < STEPS
  assert (broken / 'checkpoints' / str(left)).is_dir()

  with two_processes(folder, 'broken', PAUSE='0.05') as processes:
    wait_for_step(broken, left + 1, processes[0])
    processes[1].kill()
    killed = time.monotonic()
    status, _, err = finish(processes[0])
  assert time.monotonic() - killed < 60
  assert status in (75, -signal.SIGABRT), err
  assert 'another task died' in err or 'has probably died' in err

  with two_processes(folder, 'broken') as processes:
    statuses = [finish(process)[0] for process in processes]
  assert statuses == [0, 0]
  name = 'metrics.jsonl'
  assert (broken / name).read_bytes() == (workdir / name).read_bytes()


def test_two_processes_of_four_devices_train_like_two_of_one(straight, folder):
  words = [ROOT / 'launch' / 'local.py', '--processes', 2, '--cpu-devices', 4]
  words += ['--', *train_words('wide')[2:]]
  words += ['--set', 'mesh=MeshShape(data=1, fsdp=2, tensor=2, sequence=2)']
  words += ['--set', 'preview=Preview(prompt="1: ", tokens=5)']
  status, _, err = finish(launch(folder, words))
  assert status == 0, err
  # The model that writes it lies on the devices of both processes.
  assert (folder / 'wide' / 'sample.txt').read_bytes().startswith(b'1: ')
  expected, found = (
    read_metrics(path / 'metrics.jsonl')
    for path in (straight[0], folder / 'wide')
  )
  assert len(expected) == len(found)
  for a, b in zip(expected, found, strict=True):
    assert (a['step'], a['split']) == (b['step'], b['split'])
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-5)


WORKER = '''
"""Restores, hashes, saves; and hashes the rows of four steps."""
import hashlib, json, sys
import jax
from jax.experimental import multihost_utils
from jaxformers.train import distributed
from jaxformers.train.override import override_all

port, count, index, mesh, step = sys.argv[1:]
count, index, step = int(count), int(index), int(step)
distributed.start(f'127.0.0.1:{port}', count, index)
import tiny
from jaxformers.data import batches
from jaxformers.train.checkpoint import Checkpoints
from jaxformers.train.program import build
from jaxformers.train.record import known_classes

experiment = override_all(tiny.experiment(), [f'mesh={mesh}'], known_classes())
program = build(experiment, experiment.data.prepare())
with Checkpoints('moved') as checkpoints:
  if step:
    restored = checkpoints.restore('latest', program.abstract_state)
    assert restored.step == step - 1
    state = restored.state
  else:
    state = program.init()
  checkpoints.save(step, state, progress={}, record={})
digest = hashlib.sha256()
for leaf in jax.tree.leaves(state):
  digest.update(multihost_utils.process_allgather(leaf, tiled=True).tobytes())
rows = {}
read = batches(program.prepared.train, batch_size=8, seed=0,
               first_step=4 * step, part=program.rows)
for number, batch in zip(range(4 * step, 4 * step + 4), read):
  placed = next(program.place([batch]))['tokens']
  for shard in placed.addressable_shards:
    if shard.index[1] == slice(None):
      first = shard.index[0].start or 0
      for row, tokens in enumerate(shard.data, start=first):
        rows[f'{number} {row}'] = jax.device_get(tokens).tolist()
print(json.dumps({'state': digest.hexdigest(), 'rows': rows}))
'''


def test_a_checkpoint_and_the_data_move_between_numbers_of_processes(folder):
  (folder / 'worker.py').write_text(WORKER)
  moves = [
    (2, 4, 'MeshShape(fsdp=4)'),
    (1, 2, 'MeshShape(data=1, tensor=2)'),
    (2, 4, 'MeshShape(fsdp=2, tensor=2)'),
  ]
  states, rows = set(), {}
  for step, (count, devices, mesh) in enumerate(moves):
    port = free_port()
    processes = [
      launch(folder, ['worker.py', port, count, i, mesh, step], devices=devices)
      for i in range(count)
    ]
    for status, out, err in map(finish, processes):
      assert status == 0, err
      found = json.loads(out.splitlines()[-1])
      states.add(found['state'])
      rows |= found['rows']
  assert len(states) == 1
  assert len(rows) == 3 * 4 * 8
  data = TextData(path=str(folder / 'text.txt'), length=16).prepare().train
  whole, moved = hashlib.sha256(), hashlib.sha256()
  for step in range(12):
    whole.update(batch_at(data, step, batch_size=8, seed=0)['tokens'].tobytes())
    for row in range(8):
      moved.update(np.array(rows[f'{step} {row}'], np.int32).tobytes())
  assert whole.hexdigest() == moved.hexdigest()


def test_processes_that_disagree_say_so_once(folder):
  with two_processes(
    folder, 'disagree', own=((), ('--set', 'steps=11'))
  ) as processes:
    (status, _, err), (other, _, other_err) = map(finish, processes)
  assert (status, other) == (2, 1)
  assert 'process 1: this process has other settings than process 0' in err
  assert '- steps=10' in err
  assert '+ steps=11' in err
  assert 'jaxformers: error' not in other_err
  assert not (folder / 'disagree').exists()


def test_a_coordinator_that_nobody_answers_for_is_named(folder):
  where = f'127.0.0.1:{free_port()}'
  words = ['--coordinator', where, '--processes', 2, '--process', 1]
  words = train_words('alone', *words, '--start-timeout', 2)
  status, _, err = finish(launch(folder, words))
  assert status == 75
  assert 'waited 2 seconds in vain' in err
  assert where in err


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['--processes', '2'], 'several processes need --coordinator HOST:PORT'),
    (['--coordinator', 'host'], "must be HOST:PORT, got 'host'"),
    (['--coordinator', 'h:1', '--processes', '2'], 'got 2 and None'),
    (
      ['--coordinator', 'h:1', '--processes', '2', '--process', '2'],
      'with 0 <= I < N, got 2 and 2',
    ),
  ],
)
def test_options_that_do_not_go_together_are_refused(
  folder, capsys, words, message
):
  assert main(['train', str(folder / 'tiny.py'), *words]) == 2
  assert message in capsys.readouterr().err


def test_a_port_in_use_is_named(folder, capsys):
  with socket.create_server(('', 0)) as listener:
    where = f'127.0.0.1:{listener.getsockname()[1]}'
    words = ['--coordinator', where, '--processes', '2', '--process', '0']
    assert main(['train', str(folder / 'tiny.py'), *words]) == 2
  assert f'process 0 cannot listen at {where}' in capsys.readouterr().err


SLURM = {'SLURM_STEP_NODELIST': 'a', 'SLURM_STEP_TASKS_PER_NODE': '1(x4)'}


@pytest.mark.parametrize(
  ('environment', 'expected'),
  [
    (SLURM | {'SLURM_NTASKS': '4'}, True),
    (SLURM | {'SLURM_NTASKS': '1'}, False),
    ({'SLURM_JOB_ID': '3', 'SLURM_NTASKS': '4'}, False),  # not under srun
    ({'OMPI_COMM_WORLD_SIZE': '2'}, True),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, True),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, False),
    ({'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2'}, True),
    ({'KUBERNETES_SERVICE_HOST': '10.0.0.1'}, False),
    (
      {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '0'},
      True,
    ),
    ({}, False),
  ],
)
def test_launchers_of_several_processes_are_recognised(environment, expected):
  assert distributed.is_cluster(environment) == expected


@pytest.mark.parametrize(
  ('environment', 'expected'),
  [
    ({}, []),
    (SLURM, []),  # a host of its own: all GPUs, not only the first
    ({'SLURM_STEP_TASKS_PER_NODE': '8(x2)'}, None),
    ({'OMPI_COMM_WORLD_LOCAL_SIZE': '1'}, []),
    ({'OMPI_COMM_WORLD_LOCAL_SIZE': '8'}, None),
    ({'SLURM_STEP_TASKS_PER_NODE': '8', 'CUDA_VISIBLE_DEVICES': '3'}, []),
    ({'SLURM_STEP_TASKS_PER_NODE': '8', 'CUDA_VISIBLE_DEVICES': '0,1'}, None),
    (SLURM | {'JAX_LOCAL_DEVICE_IDS': '0'}, None),
  ],
)
def test_a_process_with_a_host_of_its_own_has_all_its_devices(
  environment, expected
):
  assert distributed.local_devices(environment) == expected


def test_a_directory_that_is_not_shared_is_refused(tmp_path):
  run = RunDirectory(tmp_path)
  with run.locked():
    run.check_shared(run.holder(), seconds=0)
    with pytest.raises(ValueError, match='is not the directory that process 0'):
      run.check_shared('pid 1 on elsewhere\n', seconds=0.3)
  with pytest.raises(ValueError, match='on a file system that they share'):
    RunDirectory(tmp_path / 'empty').check_shared('pid 1', seconds=0)


def test_the_loss_of_a_process_is_explained_and_other_errors_are_not(
  monkeypatch,
):
  def fail(text, outer=None):
    with distributed.explained():
      try:
        raise jax.errors.JaxRuntimeError(text)
      except jax.errors.JaxRuntimeError as error:
        raise outer or error from error

  closed = 'UNKNOWN: Gloo all-reduce failed: Connection closed by peer'
  with pytest.raises(jax.errors.JaxRuntimeError, match='Gloo'):
    fail(closed)
  monkeypatch.setattr(distributed, 'several', lambda: True)
  with pytest.raises(ProcessLost, match='is lost .*closed by peer.*same'):
    fail(closed)
  with pytest.raises(ProcessLost, match='closed by peer'):
    fail(closed, RunFailed('The checkpoint of step 3 could not be saved.'))
  with pytest.raises(jax.errors.JaxRuntimeError, match='out of memory'):
    fail('RESOURCE_EXHAUSTED: out of memory')
