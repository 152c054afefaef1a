"""Runs that begin with another: as they are, and as adapters beside it."""

import dataclasses
import shutil

import jax
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from jaxformers.nn import LoRA
from jaxformers.ops import LowRank
from jaxformers.optim import AdamW
from jaxformers.optim import ChildTuningF
from jaxformers.optim import Constant
from jaxformers.optim import LoRAPlus
from jaxformers.train import FromRun
from jaxformers.train import MeshShape
from jaxformers.train import open_run
from jaxformers.train import train
from jaxformers.train.errors import RunFailed
from jaxformers.train.program import abstract_state
from jaxformers.train.program import build
from jaxformers.train.run_directory import RunDirectory

pytestmark = pytest.mark.xdist_group('fine_tuning')

LOW_RANK = LowRank(('query', 'table'), rank=2, start='symmetric', dropout=0.1)


@pytest.fixture(scope='module')
def base(tiny, tmp_path_factory):
  """The directory of a trained model."""
  workdir = tmp_path_factory.mktemp('runs') / 'base'
  train(tiny(steps=2, preview=None), workdir)
  return workdir


@pytest.fixture(scope='module')
def fine_tuning(tiny, base):
  """An experiment that trains adapters beside it."""
  return tiny(
    model=LoRA(tiny().model, LOW_RANK),
    optimizer=LoRAPlus(AdamW(Constant(0.01)), 4.0, Constant(0.01)),
    start=FromRun(str(base)),
    steps=4,
    evaluate_every=4,
  )


@pytest.fixture(scope='module')
def tuned(fine_tuning, tmp_path_factory):
  """The directory of that run, and its last state."""
  workdir = tmp_path_factory.mktemp('runs') / 'tuned'
  return workdir, train(fine_tuning, workdir)


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_adapters_learn_beside_a_model_that_stands_still(
  base, tuned, fine_tuning
):
  _, state = tuned
  first = build(fine_tuning, fine_tuning.data.prepare()).init().variables
  started = fine_tuning.model.adopt(first, open_run(base).variables)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    state.frozen,
    started['frozen'],
  )
  moved = jax.tree.map(
    lambda a, b: abs(a - b).max(), state.params, started['params']
  )
  assert min(jax.tree.leaves(moved)) > 1e-4
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer_state):
    assert leaf.ndim == 0 or path[-1].key.startswith('lora_')


def test_adapters_lower_the_loss_of_the_model_they_began_with(base, tuned):
  tuned_loss = open_run(tuned[0]).evaluate()['loss']
  assert tuned_loss < open_run(base).evaluate()['loss']


def test_merged_adapters_give_the_same_logits(tuned):
  workdir, _ = tuned
  run = open_run(workdir)
  tokens = np.arange(32).reshape(2, 16)
  logits, _ = jax.jit(run.experiment.model.apply)(run.variables, tokens)
  merged = run.merged()
  assert merged.experiment.model == run.experiment.model.model
  other, _ = jax.jit(merged.experiment.model.apply)(merged.variables, tokens)
  np.testing.assert_allclose(logits, other, rtol=1e-4, atol=1e-5)
  assert (workdir / 'sample.txt').read_bytes().startswith(b'1: ')


def test_checkpoints_hold_adapters_only(tuned):
  directory = RunDirectory(tuned[0])
  contents = directory.checkpoints / '4' / 'contents' / 'metadata'
  assert 'w_DHK.lora_in_DR' in contents.read_text()
  assert 'frozen' not in contents.read_text()
  assert [path.name for path in directory.frozen.iterdir()] == ['0']


def test_adapters_are_split_like_their_matrices(fine_tuning):
  mesh = MeshShape(data=2, fsdp=2, tensor=2).build()
  state = abstract_state(fine_tuning, mesh)
  lora_in, lora_out = state.params['stack']['scanned_0']['mixer']['query'][
    'w_DHK'
  ].values()
  assert lora_in.sharding.spec == PartitionSpec(None, 'fsdp', None)
  assert lora_out.sharding.spec == PartitionSpec(None, None, 'tensor', None)
  whole = state.frozen['stack']['scanned_0']['mixer']['query']['w_DHK']
  assert whole.sharding.spec == PartitionSpec(None, 'fsdp', 'tensor', None)


def test_a_resumed_run_needs_no_start_and_ends_with_the_same_bits(
  fine_tuning, tuned, base, tmp_path
):
  workdir, expected = tuned
  directory = RunDirectory(tmp_path / 'copy')
  shutil.copytree(workdir, directory.path)
  shutil.rmtree(directory.checkpoints / '4')
  hidden = base.rename(tmp_path / 'elsewhere')
  state = train(fine_tuning, directory.path)
  hidden.rename(base)
  equal(state, expected)
  shutil.rmtree(directory.frozen)
  with pytest.raises(RunFailed, match='which held the variables .* is gone'):
    train(fine_tuning, directory.path)


def test_all_parameters_can_be_tuned_from_a_start(base, tiny, tmp_path):
  still = ChildTuningF(inner=AdamW(Constant(0.0), weight_decay=0.0))
  experiment = tiny(
    start=FromRun(str(base), 'best'), optimizer=still, steps=1, preview=None
  )
  state = train(experiment, tmp_path / 'run')
  equal(state.params, open_run(base, checkpoint='best').variables['params'])


def test_a_start_that_does_not_fit_is_refused(base, tiny, tmp_path):
  wider = tiny(start=FromRun(str(base)), preview=None)
  wider = dataclasses.replace(wider, model=wider.model.clone(width=16))
  with pytest.raises(
    ValueError,
    match=r'cannot begin with FromRun.*is float32.* there and float32.* here',
  ):
    train(wider, tmp_path / 'run')
  missing = tiny(start=FromRun(str(base.with_name('bass'))), preview=None)
  with pytest.raises(FileNotFoundError, match="did you mean '?.*base"):
    train(missing, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
  with pytest.raises(
    ValueError, match='LanguageModel has no adapters to merge'
  ):
    open_run(base).merged()
