"""Every experiment and benchmark runs at toy size."""

import dataclasses
import importlib.util
import pathlib

import pytest

from jaxformers.cli import experiment_file
from jaxformers.cli import main
from jaxformers.data import TextData
from jaxformers.nn.mixers import Retention
from jaxformers.train import read_report
from jaxformers.train.metrics import read_metrics
from jaxformers.train.record import to_record

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted((ROOT / 'experiments').glob('[a-z]*.py'))
EXPERIMENTS = [p for p in FILES if '\ndef experiment()' in p.read_text()]
STUDIES = [p for p in FILES if '\ndef study()' in p.read_text()]
TOY = (
  'steps=2', 'batch_size=8', 'model.width=16', 'model.stack.depth=1',
  'model.stack.block.mixer.num_heads=2', 'data.length=16',
  'model.stack.block.feedforward.hidden=16', 'evaluate_batches=1',
  'model.stack.block.mixer.num_kv_heads=None', 'model.vocab_size=256',
  'baseline=None', 'preview.tokens=3', 'mesh.data=8', 'mesh.fsdp=1',
)  # fmt: skip
TOY_STUDIES = {
  'attention_concentration': (
    'keys=16', 'queries=4', 'width=4', 'lengths=(0.5, 8.0)',
  ),
  'child_tuning_steps': (
    'signals=(1.0,)', 'tolerances=(0.01,)', 'fractions=(0.5,)', 'size=4',
    'steps=20', 'settle=5',
  ),
  'closed_form_head': ('sizes=(8, 16, 64)', 'few=1', 'iterations=2'),
  'digits_memory': (
    'methods=("S4D-Lin",)', 'blank=4', 'width=4', 'depth=1',
    'states=2', 'epochs=1', 'batch_size=700',
  ),
  'entropy_versus_length': (
    'lengths=(16, 32)', 'base=16', 'sigmas=(1.0, 3.0)', 'queries=4',
  ),
  'gradient_optimal_scale': (
    'dot=(1.0,)', 'recommended=1.0', 'cosine=(10.0,)', 'keys=(16,)', 'width=8',
    'steps=2', 'batch_size=8',
  ),
  'hippo_delay_line': (
    'fastest=(1.0,)', 'sizes=(2, 4)', 'windows=3',
  ),
  'hippo_reconstruction': ('cycles=(1,)', 'compared=1', 'length=16', 'sizes=(2,)'),
  'implicit_regularization': (
    'rates=(0.01, 0.06)', 'penalties=(0.03,)', 'time=1.0',
  ),
  'learnt_step_sizes': (
    'rates=(0.1,)', 'mistuned=0.1', 'tuned=0.1', 'steps=4', 'width=2',
  ),
  'length_extrapolation_blocks': (
    'methods=("ReRoPE 1/2",)', 'train_length=24', 'test_length=48',
    'steps=1', 'heldout_rows=8',
  ),
  'length_extrapolation_text': (
    'methods=("windowed RoPE", "ReRoPE 1/2")', 'data.length=16', 'times=(1, 2)',
    'width=16', 'depth=1', 'steps=1', 'windows=8',
  ),
  'local_cosines': ('steps=3',),
  'lora_plus_ratio': (
    'shapes=((8, 8), (8, 4))', 'ranks=(2,)', 'rows=2', 'repeats=2',
  ),
  'lora_plus_starts': (
    'widths=(8,)', 'judged=8', 'exponents=(-6, -5, -4, -3, -2)', 'rank=2',
    'steps=10', 'batch_size=4',
  ),
  'multiple_gradient_descent': ('steps=20',),
  'multitask_text': (
    'factors=(1.0,)', 'steps=1', 'width=8', 'length=16', 'batch_size=8',
    f'path="{ROOT / "LICENSE"}"',
  ),
  'primary_and_auxiliary': ('steps=10', 'noisy=40', 'clean=10'),
  'selective_copying': (
    'length=4', 'count=2', 'width=4', 'state_size=2', 'depth=1', 'steps=2',
    'points=1', 'batch_size=2', 'judged=4',
  ),
  'sgd_schedules': ('steps=30',),
  'sparse_targets': ('inputs=4', 'steps=4'),
  'state_space_text': (
    'models=("attention", "Mamba-2 + attention")', 'data.length=16', 'width=16',
    'depth=2', 'heads=2', 'steps=1', 'batch_size=64',
  ),
  'task_loss_weighting': ('steps=10', 'rows=16'),
}  # fmt: skip


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def read(result, path):
  classes = experiment_file.classes_with(experiment_file.load(path))
  return read_report(result, classes)


def is_png(path):
  return path.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'


@pytest.fixture
def small_text(tmp_path):
  path = tmp_path / 'small.txt'
  path.write_text('In the beginning was the word.\n' * 200)
  return str(path)


@pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda p: p.stem)
def test_an_experiment_trains_from_the_command_line(path, tmp_path, small_text):
  workdir = tmp_path / 'run'
  settings = [w for s in TOY for w in ('--set', s)]
  settings += ['--set', f'data.path={small_text}']
  status = main(['train', str(path), '--workdir', str(workdir), *settings])
  assert status == 0
  assert [x['step'] for x in read_metrics(workdir / 'metrics.jsonl')] == [
    1,
    2,
    2,
  ]


@pytest.mark.parametrize('path', STUDIES, ids=lambda p: p.stem)
def test_a_study_is_judged_from_the_command_line(path, tmp_path):
  words = [w for s in TOY_STUDIES[path.stem] for w in ('--set', s)]
  words += ['--set', 'seeds=(0,)', '--workdir', str(tmp_path)]
  assert main(['reproduce', str(path), *words]) == 0
  report = read(tmp_path / f'{path.stem}.json', path)
  assert report.results.seeds == (0,)
  assert is_png(tmp_path / f'{path.stem}.png')


@pytest.mark.parametrize('path', STUDIES, ids=lambda p: p.stem)
def test_the_result_of_a_study_is_that_of_its_file(path):
  report = read(path.parent / 'results' / f'{path.stem}.json', path)
  study = experiment_file.study_of(experiment_file.load(path))
  assert to_record(report.study) == to_record(study)
  assert report.results.variants == study.variants()
  again = study.judge(report.results)
  for old, new in zip(report.judgements, again, strict=True):
    assert (old.statement, old.bound) == (new.statement, new.bound)
    assert old.seen == pytest.approx(new.seen, rel=1e-9)
    assert old.holds == new.holds
  assert is_png(ROOT / 'docs' / 'figures' / f'{path.stem}.png')


def test_figures_are_drawn_from_results_alone(tmp_path, monkeypatch):
  figures = load(ROOT / 'scripts' / 'draw_figures.py')
  monkeypatch.setattr(figures, 'FIGURES', tmp_path)
  figures.draw_result(figures.RESULTS / f'{STUDIES[0].stem}.json')
  assert is_png(tmp_path / f'{STUDIES[0].stem}.png')


def test_the_page_of_the_studies_says_what_their_results_say():
  figures = load(ROOT / 'scripts' / 'draw_figures.py')
  page = (ROOT / 'docs' / 'studies.md').read_text()
  assert page == figures.studies_page(), 'run scripts/draw_figures.py'


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_an_experiment_says_what_it_expects(path):
  text = load(path).__doc__
  for word in ('Run: ', 'Expected: '):
    assert word in text


@pytest.fixture
def toy_experiment(small_text):
  experiment = load(ROOT / 'experiments' / 'lm.py').experiment()
  block = experiment.model.stack.block
  block = block.clone(
    mixer=block.mixer.clone(num_heads=2),
    feedforward=block.feedforward.clone(hidden=16),
  )
  stack = experiment.model.stack.clone(block=block, depth=1)
  return dataclasses.replace(
    experiment,
    model=experiment.model.clone(width=16, stack=stack),
    data=TextData(path=small_text, length=16),
    batch_size=8,
  )


def test_the_train_step_benchmark_measures(toy_experiment, monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT))
  from experiments.benchmarks import train_step

  results = train_step.measure(toy_experiment, rounds=2, size=64, depths=(1, 2))
  assert 0 < results['fraction_of_peak'] < 1
  for name in ('tokens_per_second', 'speed_relative_to_flax', 'compile_ratio'):
    assert results[name] > 0
  assert results['fraction_outside_xla'] < 1


def test_the_step_size_benchmark_measures(toy_experiment, monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT))
  from experiments.benchmarks import step_size

  results = step_size.measure(toy_experiment, leaves=1, width=4, rounds=1)
  assert results['parameters'] == 64
  for name in ('update_relative_to_adamw', 'step_relative_to_adamw'):
    assert results[name]['scale_and_gains'] > 0


def test_the_child_tuning_benchmark_measures(toy_experiment, monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT))
  from experiments.benchmarks import child_tuning

  results = child_tuning.measure(toy_experiment, rounds=1, update_rounds=1)
  for what in ('step', 'update'):
    assert results[f'child_tuning_{what}_relative_to_adamw'] > 0


def test_the_attention_benchmark_measures(monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT))
  from experiments.benchmarks import attention

  results = attention.measure((16,), long=1024, rounds=1)
  assert results['float32_16']['forward_speed_relative_to_jax'] > 0
  assert 0 < results['masks_1024']['window_256_relative_to_full']
  assert results['memory_growth'] < 5


def test_the_multitask_benchmark_measures(monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT))
  from experiments.benchmarks import multitask

  results = multitask.measure(32, depth=2, batch=(2, 16), rounds=1)
  for mode in ('gram_then_backward', 'stacked', 'sequential'):
    assert results[f'{mode}_time_relative_to_one'] > 0
    assert results[f'{mode}_memory_relative_to_one'] > 0


def test_the_selective_benchmark_measures(monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT))
  from experiments.benchmarks import selective

  results = selective.measure((16, 64), 8, (2,), rounds=1)
  fused = results['recurrence_states_2']['64']
  assert fused['forward_backward_speed_relative_to_associative'] > 0
  assert 0 < fused['memory_relative_to_associative']
  assert results['mamba_block']['forward_speed_relative_to_published'] > 0


def test_the_state_space_benchmark_measures(monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT))
  from experiments.benchmarks import state_spaces

  results = state_spaces.measure((96,), width=4, states=(4,), rounds=1)
  for name in ('fft', 'direct'):
    speeds = results['states_4']['96']
    assert speeds[f'chunked_both_speed_relative_to_{name}'] > 0


def test_the_benchmark_of_matrix_states_measures(monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT))
  from experiments.benchmarks import matrix_states

  monkeypatch.setattr(matrix_states, 'HEADS', 2)
  monkeypatch.setattr(matrix_states, 'WIDTH', 4)
  monkeypatch.setattr(matrix_states, 'CHUNKS', (4,))
  few = {'retention': Retention(num_heads=2)}
  monkeypatch.setattr(matrix_states, 'MIXERS', few)
  results = matrix_states.measure(8, (4, 8), rounds=1, kinds=('channel',))
  result = results['decay_per_channel']
  assert result['largest_difference'] < 1e-5 * result['largest_output']
  assert result['forward_backward_time_relative_to_ours']['storing'] > 0
  assert results['next_token']['retention']['largest_ratio'] > 0


def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(
  tmp_path, small_text
):
  crash = load(ROOT / 'scripts' / 'crash_test.py')
  settings = (
    *(s for s in TOY if not s.startswith(('steps', 'mesh'))),
    'steps=60',
    'checkpoint_every=5',
    f'data.path={small_text}',
  )
  result = crash.crash_test(tmp_path, 2, (6.0, 9.0), settings)
  assert result['identical']
  assert (result['lost'], result['damaged']) == (0, 0)
