"""Metrics are exact, in order, and do not remember what a run forgot."""

import json
import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from jaxformers.train.errors import RunFailed
from jaxformers.train.metrics import MetricsLog
from jaxformers.train.metrics import read_metrics


def open_log(folder, first_step=1):
  return MetricsLog(
    folder / 'metrics.jsonl', folder / 'events', first_step=first_step
  )


def write_steps(log, steps):
  for step in steps:
    log.write(step, 'train', {'loss': 1 / step, 'grad_norm': step / 3})
    if step % 2 == 0:
      log.write(step, 'heldout', {'bits_per_byte': 2 / step})
    log.write_timing(step, {'tokens_per_second': 1000.0 + step})


def read_events(folder):
  """Reads event files by their published framing, checksums included."""
  events = []
  for path in sorted(folder.iterdir()):
    content = path.read_bytes()
    while content:
      (length,) = struct.unpack('<Q', content[:8])
      data = content[12 : 12 + length]
      checksums = content[8:12] + content[12 + length : 16 + length]
      assert struct.unpack('<II', checksums) == (
        masked_crc32c(content[:8]),
        masked_crc32c(data),
      )
      events.append(event_pb2.Event.FromString(data))
      content = content[16 + length :]
  return events


def test_line_holds_step_split_and_values(tmp_path):
  with open_log(tmp_path) as log:
    log.write(12, 'train', {'loss': 2.5, 'grad_norm': 1})
  text = (tmp_path / 'metrics.jsonl').read_text()
  line = '{"step": 12, "split": "train", "loss": 2.5, "grad_norm": 1.0}\n'
  assert text == line


def test_line_is_in_the_file_before_the_log_is_closed(tmp_path):
  with open_log(tmp_path) as log:
    log.write(1, 'train', {'loss': 1.0})
    assert len(read_metrics(tmp_path / 'metrics.jsonl')) == 1
    assert read_events(tmp_path / 'events')[-1].step == 1


def test_float32_comes_back_bit_for_bit(tmp_path):
  values = np.random.default_rng(0).integers(0, 2**32, 200, dtype=np.uint32)
  values = values.view(np.float32)
  values = values[np.isfinite(values)]
  with open_log(tmp_path) as log:
    for step, value in enumerate(values, start=1):
      log.write(
        step, 'train', {'loss': value if step % 2 else jnp.float32(value)}
      )
  read = [line['loss'] for line in read_metrics(tmp_path / 'metrics.jsonl')]
  # JAX on CPU may flush numbers below the normal range to zero.
  normal = np.abs(values) >= np.finfo(np.float32).tiny
  assert np.array_equal(np.array(read, np.float32)[normal], values[normal])


def test_numbers_that_are_not_finite_are_valid_json(tmp_path):
  odd = {'a': math.nan, 'b': math.inf, 'c': -math.inf}
  with open_log(tmp_path) as log:
    log.write(1, 'train', odd)
  path = tmp_path / 'metrics.jsonl'
  strict = json.loads(path.read_text(), parse_constant=pytest.fail)
  assert [strict[k] for k in 'abc'] == ['NaN', 'Infinity', '-Infinity']
  (line,) = read_metrics(path)
  assert math.isnan(line['a'])
  assert (line['b'], line['c']) == (math.inf, -math.inf)


def test_time_is_kept_out_of_the_metrics(tmp_path):
  with open_log(tmp_path) as log:
    write_steps(log, [1])
  assert 'tokens' not in (tmp_path / 'metrics.jsonl').read_text()
  (timing,) = read_metrics(tmp_path / 'timing.jsonl')
  assert timing == {'step': 1, 'tokens_per_second': 1001.0}


@pytest.mark.parametrize('first_step', [1, 4, 7, 8])
def test_resumed_file_equals_the_uninterrupted_one(tmp_path, first_step):
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  with open_log(whole) as log:
    write_steps(log, range(1, 11))
  with open_log(broken) as log:
    write_steps(log, range(1, 8))
  with (broken / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 8, "split": "tra')  # killed here
  with open_log(broken, first_step) as log:
    write_steps(log, range(first_step, 11))
  for name in ('metrics.jsonl', 'timing.jsonl'):
    assert (broken / name).read_bytes() == (whole / name).read_bytes()
  assert sorted(p.name for p in broken.iterdir()) == [
    'events',
    'metrics.jsonl',
    'timing.jsonl',
  ]


def test_complete_json_without_end_of_line_counts_as_torn(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1, "split": "train"}\n{"step": 2, "loss": 1.2}')
  assert [line['step'] for line in read_metrics(path)] == [1]


def test_empty_file_has_no_metrics(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('')
  assert read_metrics(tmp_path / 'metrics.jsonl') == []


@pytest.mark.parametrize('line', ['{"step": 1,', '[1]', '{"loss": 2}', '"a"'])
def test_damaged_line_within_the_file_is_named(tmp_path, line):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
  with pytest.raises(ValueError, match=r'metrics\.jsonl, line 2: expected'):
    read_metrics(path)
  with pytest.raises(ValueError, match='line 2'):
    open_log(tmp_path)


@pytest.mark.parametrize('name', ['step', 'split'])
def test_reserved_names_are_refused(tmp_path, name):
  with open_log(tmp_path) as log:
    with pytest.raises(ValueError, match=f'must not be called {name}'):
      log.write(1, 'train', {name: 1.0})


def test_event_files_hold_every_scalar(tmp_path):
  with open_log(tmp_path) as log:
    write_steps(log, [1, 2])
  first, start, *events = read_events(tmp_path / 'events')
  assert first.file_version == 'brain.Event:2'
  assert start.session_log.status == event_pb2.SessionLog.START
  scalars = {
    (event.step, value.tag): value.simple_value
    for event in events
    for value in event.summary.value
  }
  assert scalars == {
    (1, 'train/loss'): 1.0,
    (1, 'train/grad_norm'): np.float32(1 / 3),
    (1, 'timing/tokens_per_second'): 1001.0,
    (2, 'train/loss'): 0.5,
    (2, 'train/grad_norm'): np.float32(2 / 3),
    (2, 'heldout/bits_per_byte'): 1.0,
    (2, 'timing/tokens_per_second'): 1002.0,
  }


def test_resume_within_a_second_adds_a_file_that_purges_the_rest(tmp_path):
  for first_step in (1, 3):
    with open_log(tmp_path, first_step) as log:
      write_steps(log, range(first_step, first_step + 4))
  assert len(list((tmp_path / 'events').iterdir())) == 2
  starts = [e for e in read_events(tmp_path / 'events') if e.session_log.status]
  assert [event.step for event in starts] == [1, 3]


def test_only_process_0_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with open_log(tmp_path) as log:
    write_steps(log, [1, 2])
  assert list(tmp_path.iterdir()) == []


def test_place_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(RunFailed, match='Cannot write metrics to .*file'):
    open_log(tmp_path / 'file' / 'run')


def test_full_disk_stops_the_run_with_a_sentence(tmp_path):
  with open_log(tmp_path) as log:
    log._metrics_file.close()
    log._metrics_file = open('/dev/full', 'ab', buffering=0)
    with pytest.raises(RunFailed, match='No space left on device.*resumes'):
      log.write(1, 'train', {'loss': 1.0})
