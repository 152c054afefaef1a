"""Checkpoints come back bit for bit, and survive kills, damage, full disks."""

import contextlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from jaxformers.train.checkpoint import NOT_READ
from jaxformers.train.checkpoint import Checkpoints
from jaxformers.train.errors import RunFailed


class State(NamedTuple):
  params: Any
  optimiser: Any
  step: Any


def make_state(seed=0):
  key = jax.random.key(seed)
  params = {
    'w_DE': jax.random.uniform(key, (64, 32)),
    'layers': {'scale_D': jnp.full((8,), 0.1 + seed, jnp.bfloat16)},
  }
  optimiser = optax.chain(optax.clip(1.0), optax.adamw(1e-3))
  return State(params, optimiser.init(params), jnp.int32(seed))


def abstract(state, sharding=None):
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding or leaf.sharding
    ),
    state,
  )


def save(checkpoints, step, loss=None):
  metrics = None if loss is None else {'heldout_loss': loss}
  checkpoints.save(
    step,
    make_state(step),
    progress={'position': [step, 2.5]},
    record={'kind': 'Experiment', 'name': None},
    metrics=metrics,
  )


def raw_bytes(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def assert_same(tree, expected):
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  assert raw_bytes(tree) == raw_bytes(expected)
  kinds = lambda t: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(t)]
  assert kinds(tree) == kinds(expected)


@pytest.fixture(scope='module')
def two_saved(tmp_path_factory):
  """A directory with checkpoints 1 and 2, to be copied and then damaged."""
  directory = tmp_path_factory.mktemp('saved') / 'checkpoints'
  with Checkpoints(directory) as checkpoints:
    save(checkpoints, 1, 3.0)
    save(checkpoints, 2, 2.0)
  return directory


@pytest.fixture
def copied(two_saved, tmp_path):
  return pathlib.Path(shutil.copytree(two_saved, tmp_path / 'checkpoints'))


def data_file(checkpoint):
  files = [p for p in checkpoint.rglob('*') if p.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x10
  path.write_bytes(content)


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_restored_state_has_the_same_bits_dtypes_and_types(two_saved):
  with Checkpoints(two_saved, read_only=True) as checkpoints:
    restored = checkpoints.restore('latest', abstract(make_state()))
  assert_same(restored.state, make_state(2))
  assert isinstance(restored.state, State)
  assert isinstance(restored.state.optimiser[1][0], optax.ScaleByAdamState)
  assert restored.step == 2
  assert restored.progress == {'position': [2, 2.5]}
  assert restored.record == {'kind': 'Experiment', 'name': None}


def test_leaves_that_are_not_wanted_are_not_read(two_saved):
  wanted = abstract(make_state())
  left_out = jax.tree.map(lambda _: NOT_READ, wanted.optimiser)
  with Checkpoints(two_saved, read_only=True) as checkpoints:
    state = checkpoints.restore(
      'best', wanted._replace(optimiser=left_out)
    ).state
    with pytest.raises(ValueError, match=r'params\.w_DE is float32.*absent'):
      checkpoints.restore('best', State({}, left_out, wanted.step))
  assert state.optimiser == left_out
  expected = make_state(2)
  assert_same(state.params, expected.params)
  assert_same(state.step, expected.step)


def test_negative_zero_and_nan_payloads_survive(tmp_path):
  odd = np.array([0x80000000, 0x7FC12345, 1], np.uint32).view(np.float32)
  state = {'odd': jnp.asarray(odd)}
  with Checkpoints(tmp_path / 'c') as checkpoints:
    checkpoints.save(1, state, progress={}, record={})
    checkpoints.wait()
    restored = checkpoints.restore(1, abstract(state))
  assert np.asarray(restored.state['odd']).tobytes() == odd.tobytes()


def test_state_may_be_donated_right_after_save(tmp_path):
  state = {'w': jnp.arange(100_000.0)}
  expected = np.asarray(state['w']).copy()
  target = abstract(state)
  overwrite = jax.jit(
    lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0
  )
  with Checkpoints(tmp_path / 'c') as checkpoints:
    checkpoints.save(1, state, progress={}, record={})
    overwrite(state)
    checkpoints.wait()
    restored = checkpoints.restore('latest', target)
  np.testing.assert_array_equal(restored.state['w'], expected)


def test_no_checkpoint_is_none(tmp_path):
  with Checkpoints(tmp_path / 'new') as checkpoints:
    assert checkpoints.steps() == []
    assert checkpoints.latest is None
    assert checkpoints.best is None
    assert checkpoints.restore('latest', {}) is None
    assert checkpoints.restore('best', {}) is None


def test_keeps_the_latest_two_and_the_best_two_also_after_reopening(tmp_path):
  losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0, 5: float('nan'), 6: None}
  for step, loss in losses.items():
    with Checkpoints(tmp_path) as checkpoints:
      save(checkpoints, step, loss)
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.steps() == [2, 3, 5, 6]
    assert checkpoints.latest == 6
    assert checkpoints.best == 2


def test_unevaluated_checkpoints_do_not_pile_up(tmp_path):
  with Checkpoints(tmp_path, keep_latest=1, keep_best=1) as checkpoints:
    for step in range(1, 5):
      save(checkpoints, step, 0.5 if step == 2 else None)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4]
  assert sorted(os.listdir(tmp_path)) == ['2', '4']


@pytest.mark.parametrize('loss', [float('nan'), float('inf'), None])
def test_best_is_never_one_without_a_finite_loss(tmp_path, loss):
  with Checkpoints(tmp_path) as checkpoints:
    save(checkpoints, 1, loss)
    assert checkpoints.best is None
    save(checkpoints, 2, 7.0)
    assert checkpoints.best == 2


def test_saving_a_step_twice_keeps_the_first(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    for seed in (1, 2):
      checkpoints.save(5, make_state(seed), progress={'a': seed}, record={})
    restored = checkpoints.restore('latest', abstract(make_state()))
  assert restored.progress == {'a': 1}
  assert_same(restored.state, make_state(1))


def test_plain_values_are_demanded_before_anything_is_written(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(TypeError, match='not JSON serializable'):
      checkpoints.save(1, make_state(), progress={'a': {1}}, record={})
    assert checkpoints.steps() == []


def test_unknown_step_lists_those_there_are(two_saved):
  with Checkpoints(two_saved, read_only=True) as checkpoints:
    with pytest.raises(ValueError, match='no checkpoint of step 7.*are 1, 2'):
      checkpoints.restore(7, abstract(make_state()))


def test_bad_numbers_of_checkpoints_are_refused(tmp_path):
  with pytest.raises(ValueError, match='keep_latest >= 1.*got 0 and 2'):
    Checkpoints(tmp_path, keep_latest=0)


def test_directory_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(
    RunFailed, match='Cannot make the checkpoint directory .*x'
  ):
    Checkpoints(tmp_path / 'file' / 'x')


def test_opening_read_only_creates_nothing(tmp_path):
  with Checkpoints(tmp_path / 'none', read_only=True) as checkpoints:
    assert checkpoints.restore('latest', {}) is None
  assert os.listdir(tmp_path) == []


def test_comes_back_on_a_mesh_of_eight_devices(two_saved):
  devices = mesh_utils.create_device_mesh((4, 2), jax.devices()[:8])
  mesh = jax.sharding.Mesh(devices, ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
  state = make_state()
  target = abstract(state, NamedSharding(mesh, PartitionSpec()))
  sharded = NamedSharding(mesh, PartitionSpec('a', 'b'))
  target.params['w_DE'] = jax.ShapeDtypeStruct(
    (64, 32), jnp.float32, sharding=sharded
  )
  with Checkpoints(two_saved, read_only=True) as checkpoints:
    restored = checkpoints.restore('latest', target)
  assert restored.state.params['w_DE'].sharding == sharded
  assert restored.state.params['w_DE'].addressable_shards[0].data.shape == (
    16,
    16,
  )
  assert_same(restored.state, make_state(2))


# Damage.


@pytest.mark.parametrize('harm', [flip, truncate, pathlib.Path.unlink])
def test_any_damage_of_any_file_is_found(two_saved, tmp_path, harm):
  sealed = [p for p in (two_saved / '2').rglob('*') if p.is_file()]
  names = [p.relative_to(two_saved) for p in sealed]
  assert len(names) > 10
  for number, name in enumerate(names):
    if str(name) in ('2/commit_success.txt', '2/_CHECKPOINT_METADATA'):
      continue  # written by orbax after the seal, and not needed
    copy = tmp_path / str(number) / 'checkpoints'
    shutil.copytree(two_saved, copy)
    harm(copy / name)
    told = []
    with Checkpoints(copy, report=told.append) as checkpoints:
      restored = checkpoints.restore('latest', abstract(make_state()))
    assert restored.step == 1
    assert_same(restored.state, make_state(1))
    assert 'step 2 is damaged' in told[0]


def test_damaged_newest_is_moved_aside_and_the_previous_taken(copied):
  flip(data_file(copied / '2'))
  (copied.parent / 'broken' / '2').mkdir(parents=True)
  told = []
  with Checkpoints(copied, report=told.append) as checkpoints:
    restored = checkpoints.restore('latest', abstract(make_state()))
    assert checkpoints.steps() == [1]
    assert checkpoints.best == 1
    save(checkpoints, 2, 1.5)  # the run goes on and reaches this step again
    again = checkpoints.restore('latest', abstract(make_state()))
  assert restored.step == 1
  assert_same(restored.state, make_state(1))
  assert again.step == 2
  assert 'step 2 is damaged: state/' in told[0]
  assert 'broken/2-2' in told[1]
  assert (copied.parent / 'broken' / '2-2' / 'seal.json').exists()


def test_read_only_steps_over_damage_without_moving_it(copied):
  flip(data_file(copied / '2'))
  told = []
  with Checkpoints(copied, read_only=True, report=told.append) as checkpoints:
    assert checkpoints.restore('latest', abstract(make_state())).step == 1
  assert len(told) == 1
  assert sorted(os.listdir(copied)) == ['1', '2']


def test_all_damaged_are_listed_and_left_in_place(copied):
  flip(data_file(copied / '1'))
  (copied / '2' / 'progress' / 'metadata').unlink()
  with Checkpoints(copied, report=lambda text: None) as checkpoints:
    with pytest.raises(
      RunFailed, match=r'2: progress/metadata is missing\n  1: state/.*bytes'
    ):
      checkpoints.restore('latest', abstract(make_state()))
  assert sorted(os.listdir(copied)) == ['1', '2']


def test_damaged_best_is_not_replaced_by_another(copied):
  flip(data_file(copied / '2'))
  with Checkpoints(copied, report=lambda text: None) as checkpoints:
    with pytest.raises(RunFailed, match='No checkpoint'):
      checkpoints.restore('best', abstract(make_state()))
  assert sorted(os.listdir(copied)) == ['1', '2']


@pytest.mark.parametrize(
  ('leaf', 'message'),
  [
    (
      jax.ShapeDtypeStruct((64, 31), jnp.float32),
      r'params\.w_DE is float32\[64, 32\] in the checkpoint and'
      r' float32\[64, 31\] here\. Use the configuration',
    ),
    (jax.ShapeDtypeStruct((64, 32), jnp.bfloat16), r'bfloat16\[64, 32\] here'),
    (
      {'x': jax.ShapeDtypeStruct((2,), jnp.int32)},
      r'params\.w_DE\.x is absent',
    ),
  ],
)
def test_another_model_is_told_which_leaf_differs(copied, leaf, message):
  target = abstract(make_state())
  target.params['w_DE'] = leaf
  told = []
  with Checkpoints(copied, report=told.append) as checkpoints:
    with pytest.raises(ValueError, match=message):
      checkpoints.restore('latest', target)
  assert told == []
  assert sorted(os.listdir(copied)) == ['1', '2']


# Failing and killed saves, in processes of their own.

_PROGRAM = """
import pathlib, resource, signal, sys
import jax, jax.numpy as jnp
jax.config.update('jax_platforms', 'cpu')
from jaxformers.train.checkpoint import Checkpoints
from jaxformers.train.errors import RunFailed

directory = pathlib.Path(sys.argv[1])

def save(checkpoints, step, size):
  state = {'w': jax.random.uniform(jax.random.key(step), (size, 1000))}
  checkpoints.save(step, state, progress={'step': step}, record={})

def fails(action):
  try:
    action()
  except RunFailed as error:
    print(error)
    return True
"""


def run_program(directory, body):
  program = _PROGRAM + textwrap.dedent(body)
  return subprocess.Popen(
    [sys.executable, '-c', program, directory],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process):
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0, err
  assert err == ''
  return out


def assert_readable(directory, step, size):
  target = {'w': jax.ShapeDtypeStruct((size, 1000), jnp.float32)}
  target = abstract(target, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
  with Checkpoints(directory) as checkpoints:
    restored = checkpoints.restore('latest', target)
  assert restored.step == restored.progress['step'] == step
  # Uniform numbers are the same bits however a program is optimised.
  expected = jax.random.uniform(jax.random.key(step), (size, 1000))
  np.testing.assert_array_equal(restored.state['w'], expected)


_FAILING_SAVE = """
with Checkpoints(directory) as checkpoints:
  save(checkpoints, 1, 10)
  checkpoints.wait()
  {limit}
  save(checkpoints, 2, 2000)
  assert fails(checkpoints.wait)
  assert checkpoints.steps() == [1]
"""


def test_file_too_large_leaves_the_old_checkpoint_and_says_so(tmp_path):
  limit = (
    'signal.signal(signal.SIGXFSZ, signal.SIG_IGN);'
    ' resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))'
  )
  out = finish(run_program(tmp_path, _FAILING_SAVE.format(limit=limit)))
  assert f'The checkpoint of step 2 could not be saved in {tmp_path}: ' in out
  assert 'File too large. The newest good checkpoint is that of step 1' in out
  assert 'the same command resumes from it' in out
  assert os.listdir(tmp_path) == ['1']
  assert_readable(tmp_path, 1, 10)


@pytest.fixture
def tiny_disk(tmp_path):
  disk = tmp_path / 'disk'
  disk.mkdir()
  if shutil.which('mount') is None:
    pytest.skip('no command to mount a file system with')
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=3m', 'tmpfs', disk]
  if subprocess.run(mount, capture_output=True, check=False).returncode:
    pytest.skip('mounting a small file system is not permitted here')
  yield disk
  subprocess.run(['umount', disk], check=True)


def test_full_disk_leaves_the_old_checkpoint_and_frees_the_rest(tiny_disk):
  directory = tiny_disk / 'checkpoints'
  out = finish(run_program(directory, _FAILING_SAVE.format(limit='')))
  assert 'No space left on device. The newest good checkpoint is that' in out
  assert os.listdir(directory) == ['1']
  assert_readable(directory, 1, 10)


def test_first_save_that_fails_says_that_there_is_no_other(tmp_path):
  directory = tmp_path / 'checkpoints'
  checkpoints = Checkpoints(directory)
  directory.rmdir()
  directory.write_text('in the way')
  with pytest.raises(
    RunFailed, match='step 1 could not.*no earlier checkpoint'
  ):
    with checkpoints:
      save(checkpoints, 1)


def test_failed_save_does_not_hide_why_a_run_stopped(tmp_path):
  directory = tmp_path / 'checkpoints'
  told = []
  checkpoints = Checkpoints(directory, report=told.append)
  checkpoints.save(4, {'w': jnp.ones(3)}, progress={}, record={})
  wait = checkpoints._manager.wait_until_finished
  errors = [OSError(5, 'I/O error', 'disk')]

  def fail_once():
    wait()
    if errors:
      raise errors.pop()

  checkpoints._manager.wait_until_finished = fail_once
  with contextlib.suppress(ZeroDivisionError), checkpoints:
    raise ZeroDivisionError
  assert told[0].startswith('The checkpoint of step 4 could not be saved')
  assert 'I/O error (disk)' in told[0]


_ENDLESS = """
with Checkpoints(directory) as checkpoints:
  save(checkpoints, 1, 2000)
  checkpoints.wait()
  print('ready', flush=True)
  for step in range(2, 10_000):
    save(checkpoints, step, 2000)
"""


@pytest.mark.parametrize('seed', range(3))
def test_kill_while_saving_leaves_a_readable_checkpoint(tmp_path, seed):
  process = run_program(tmp_path, _ENDLESS)
  assert process.stdout.readline() == 'ready\n'
  time.sleep(random.Random(seed).uniform(0, 0.4))
  process.send_signal(signal.SIGKILL)
  process.communicate()
  with Checkpoints(tmp_path, report=pytest.fail) as checkpoints:
    newest = checkpoints.latest
  assert_readable(tmp_path, newest, 2000)
