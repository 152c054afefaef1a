"""Reports: the roofline against numbers by hand, verdicts, and files."""

import ast
import dataclasses
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxformers.aot import CHIPS
from jaxformers.aot import Report
from jaxformers.aot import Topology
from jaxformers.aot import candidates
from jaxformers.aot import ranking
from jaxformers.aot import table
from jaxformers.aot.compile import _exhausted
from jaxformers.aot.compile import environment
from jaxformers.aot.hardware import memory_fraction
from jaxformers.aot.report import Part
from jaxformers.aot.report import Traffic
from jaxformers.cli import compile as compiling
from jaxformers.cli import main
from jaxformers.models import LanguageModel
from jaxformers.nn import Block
from jaxformers.nn import FeedForward
from jaxformers.nn import Stack
from jaxformers.nn.mixers import Attention
from jaxformers.train import Experiment

ROOT = pathlib.Path(__file__).parents[2]
REPORT = Report(
  program='train',
  topology='2*v5e:2x2',
  mesh={'dcn': 2, 'data': 1, 'fsdp': 4, 'tensor': 1, 'sequence': 1},
  versions={'jax': '1.0'},
  fits=True,
  peak_bytes=4 * 2**30,
  parts=(Part('params in all', 2**30),),
  buffers=(Part('f32[8]', 32),),
  flops=197e12,
  model_flops=197e12 * 0.75,
  memory_traffic=0.41e12,
  traffic=(Traffic('all-reduce', 3e9, 50e9, 6.25e9, 1),),
  tokens=1000,
  seconds_to_compile=1.0,
)


def test_the_roofline_is_that_of_the_busiest_resource():
  seconds = REPORT.seconds()
  assert seconds == pytest.approx(
    {'compute': 1.0, 'memory': 0.5, 'links': 0.5, 'network': 2.0}
  )
  estimate = REPORT.estimate()
  assert estimate['step_seconds'] == pytest.approx(2.0)
  assert estimate['step_seconds_without_overlap'] == pytest.approx(4.0)
  assert estimate['utilisation'] == pytest.approx(0.375)
  assert estimate['tokens_per_second'] == pytest.approx(500)


def test_a_report_is_a_file_and_a_table():
  tree = json.loads(json.dumps(REPORT.to_json()))
  assert Report.from_json(tree) == REPORT
  text = table(REPORT)
  assert 'copied' not in text
  warned = table(dataclasses.replace(REPORT, copied_whole=2))
  assert 'copied 2 arrays to all devices' in warned
  for part in ('8 devices', '4.00 GiB of 15.75 GiB', 'all-reduce', '38%'):
    assert part in text


@pytest.mark.parametrize(
  ('parts', 'advice'),
  [
    ((Part('params in all', 10 * 2**30),), 'share them out'),
    ((Part('params in all', 2**30),), 'nothing_saveable'),
  ],
)
def test_what_does_not_fit_says_by_how_much_and_what_to_change(parts, advice):
  full = dataclasses.replace(
    REPORT, fits=False, peak_bytes=17 * 2**30, parts=parts
  )
  assert '1.25 GiB too much' in full.verdict()
  assert advice in full.verdict()
  assert 'peak rates' not in table(full)
  assert full.to_json()['estimate'] is None
  assert ranking([full, REPORT]) == [REPORT, full]


def test_the_compiler_is_understood_when_memory_runs_out():
  message = (
    'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in '
    'memory space hbm. Used 24.01G of 15.75G hbm. Exceeded hbm capacity by '
    '8.26G.\n\nLargest program allocations in hbm:\n\n'
    '  1. Size: 1.50G\n'
    '     Operator: op_name="jit(step)/while/body/dot_general" stack_frame_id=1\n'
    '     Shape: bf16[24,4,4096,2048]{3,2,1,0:T(8,128)(2,1)}\n'
    '     Unpadded size: 1.50G\n'
  )
  found = _exhausted(message)
  assert found['peak_bytes'] == 24.01 * 2**30
  [part] = found['buffers']
  assert part == Part('bf16[24,4,4096,2048] dot_general', 1.5 * 2**30)


def test_a_compiler_that_names_no_arrays_is_helped():
  message = (
    'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
    'for HLO temporaries (727.35G) exceeds available HBM (15.75G).'
  )
  program = jax.make_jaxpr(lambda x: jnp.sum(jax.lax.map(jnp.sin, x)))
  found = _exhausted(message, program(jnp.ones((4, 8))))
  assert found['peak_bytes'] == 727.35 * 2**30
  kept = (Part('params in all', 2**30),)
  more = _exhausted(message, None, kept)
  assert more['peak_bytes'] == 728.35 * 2**30
  assert found['buffers'][0] == Part('float32[4,8] scan, over all devices', 128)
  assert found['buffers'][1] == Part('float32[8] sin, over all devices', 32)


def test_how_much_is_too_much_may_be_unknown():
  found = _exhausted('RESOURCE_EXHAUSTED: too large')
  full = dataclasses.replace(REPORT, **found)
  assert full.verdict().startswith(
    'does not fit: the compiler does not say by how much; '
  )
  more = dataclasses.replace(full, peak_bytes=2.0**40)
  assert ranking([full, more, REPORT]) == [REPORT, more, full]
  assert Report.from_json(json.loads(json.dumps(full.to_json()))) == full


def test_programs_get_a_part_of_the_memory_of_a_gpu():
  gpu, tpu = CHIPS['h100'], CHIPS['v5e']
  given = {'XLA_CLIENT_MEM_FRACTION': '.9'}
  former = {'XLA_PYTHON_CLIENT_MEM_FRACTION': '1.0'}
  found = [memory_fraction(gpu, words) for words in ({}, given, former)]
  assert found == [0.75, 0.9, 1.0]
  assert memory_fraction(tpu, given) == 1
  for text in ('0.0', '1.5', 'most'):
    with pytest.raises(ValueError, match='above 0 and at most 1, got'):
      memory_fraction(gpu, {'XLA_CLIENT_MEM_FRACTION': text})
  report = dataclasses.replace(
    REPORT, topology='h100:1x1x8', memory_fraction=0.75
  )
  assert report.memory == 0.75 * 84929347584
  assert '4.00 GiB of 59.32 GiB' in report.verdict()
  assert '75% of the memory of a GPU; XLA_CLIENT_MEM' in table(report)


def test_topologies_are_read_and_written():
  slices = Topology.parse('2*v5p:4x4x8')
  assert (slices.devices, slices.chips, slices.island) == (256, 256, 128)
  assert slices.name == '2*v5p:4x4x8'
  assert Topology.parse('tpu7x:2x2x1').devices == 8
  hosts = Topology.parse('h100:1x2x8')
  assert (hosts.devices, hosts.island) == (16, 8)
  for chip in CHIPS.values():
    assert chip.memory > 1e10
    assert chip.flops / chip.memory_bandwidth > 100


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('v5e', 'GENERATION:SHAPE'),
    ('tpu7:2x2x1', "did you mean 'tpu7x'"),
    ('v5e:2x2x2', '2 positive numbers'),
    ('v5p:2x2', '3 positive numbers'),
    ('v5e:0x2', '2 positive numbers'),
    ('2*h100:1x1x8', 'only TPUs'),
  ],
)
def test_what_is_no_topology_is_refused(text, message):
  with pytest.raises(ValueError, match=message):
    Topology.parse(text)


def test_a_compiler_that_is_missing_is_named(monkeypatch):
  monkeypatch.setattr(sys, 'path', [])
  for name in [n for n in sys.modules if n.startswith(('libtpu', 'jax_'))]:
    monkeypatch.delitem(sys.modules, name)
  with pytest.raises(ImportError, match=r'jaxformers\[tpu\]'):
    environment(Topology.parse('v5e:2x2'))
  with pytest.raises(ImportError, match=r'jaxformers\[gpu-aot\]'):
    environment(Topology.parse('h100:1x1x8'))


def test_candidates_share_out_all_devices_and_rows():
  block = Block(mixer=Attention(num_heads=4))
  model = LanguageModel(vocab_size=256, width=64, stack=Stack(block, depth=2))
  experiment = Experiment(model=model, batch_size=16)
  topology = Topology.parse('2*v5e:2x4')
  found = list(candidates(experiment, topology))
  assert len({(c.mesh, c.model.stack.remat) for c in found}) == len(found)
  for candidate in found:
    sizes = candidate.mesh.sizes(16)
    assert sizes['dcn'] == 2
    assert 16 % (sizes['dcn'] * sizes['data'] * sizes['fsdp']) == 0
  assert {c.mesh.tensor for c in found} == {1, 2, 4, 8}
  assert {c.model.stack.remat for c in found} == {
    None, 'dots_with_no_batch_dims_saveable', 'nothing_saveable',
  }  # fmt: skip
  fixed = {'data': 1, 'tensor': 4}
  some = list(candidates(experiment, topology, fixed=fixed))
  assert {(c.mesh.data, c.mesh.tensor, c.mesh.fsdp) for c in some} == {
    (1, 4, 2)
  }


def test_sequences_are_cut_where_that_is_fixed_and_cut_no_rows():
  experiment = Experiment(model=FeedForward(hidden=8), batch_size=8)
  topology = Topology.parse('v5e:4x4')
  assert all(c.mesh.tensor > 1 for c in candidates(experiment, topology))
  fixed = {'sequence': 2, 'tensor': 1}
  found = [c.mesh for c in candidates(experiment, topology, fixed=fixed)]
  assert [(m.data, m.fsdp, m.sequence) for m in found] == [
    (1, 8, 2), (2, 4, 2), (4, 2, 2), (8, 1, 2),
  ]  # fmt: skip
  assert not list(candidates(experiment, topology, fixed={'sequence': 3}))


def test_a_model_without_a_stack_is_tried_on_meshes_alone():
  experiment = Experiment(model=FeedForward(hidden=8), batch_size=16)
  found = list(candidates(experiment, Topology.parse('v5e:2x2')))
  assert len({c.mesh for c in found}) == len(found) > 1
  assert all(c.model == experiment.model for c in found)


def test_the_page_of_pods_is_that_of_the_reports():
  path = ROOT / 'scripts' / 'pod_reports.py'
  spec = importlib.util.spec_from_file_location(path.stem, path)
  script = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(script)
  assert (ROOT / 'docs' / 'pods.md').read_text() == script.page()
  best = json.loads((script.REPORTS / 'lm_8b_v5e_256.json').read_text())[0]
  assert best['fits']


def test_a_search_tries_no_policy_that_keeps_more_than_one_without_room(
  monkeypatch, tmp_path, capsys
):
  tried = []

  def compiled(arguments, variables, extra):
    found = dict(word.split('=', 1) for word in extra)
    tensor = int(re.search(r'tensor=(\d)', found['mesh'])[1])
    remat = ast.literal_eval(found['model.stack.remat'])
    tried.append((tensor, remat))
    # Cut in two it fits if it recomputes, whole it never does.
    fits = tensor == 4 or (tensor == 2 and remat == 'nothing_saveable')
    sizes = {'dcn': 1, 'data': 1, 'fsdp': 4 // tensor, 'tensor': tensor}
    return dataclasses.replace(
      REPORT,
      topology='v5e:2x2',
      mesh=sizes | {'sequence': 1},
      fits=fits,
      peak_bytes=REPORT.peak_bytes if fits else 2.0**36,
      remat=remat,
    )

  monkeypatch.setattr(compiling, '_apart', compiled)
  monkeypatch.setattr('jaxformers.aot.compile.environment', lambda _: {})
  out = tmp_path / 'reports.json'
  words = ['compile', str(ROOT / 'experiments' / 'lm.py'), '--search']
  words += ['--topology', 'v5e:2x2', '--mesh', 'data=1', '--json', str(out)]
  assert main(words) == 0
  least, middle, most = (
    'nothing_saveable',
    'dots_with_no_batch_dims_saveable',
    None,
  )
  assert tried == [
    (1, least), (2, least), (2, middle), (4, least), (4, middle), (4, most),
  ]  # fmt: skip
  assert f'tensor=4 remat={most}: fits' in capsys.readouterr().out
  assert len(json.loads(out.read_text())) == len(tried)


def test_a_search_goes_on_after_a_candidate_that_cannot_be_compiled(
  monkeypatch, capsys
):
  outcomes = [-11, -11, 'time', 1]  # Signals are tried again.

  def finished(words, **options):
    assert options['timeout'] == 7
    outcome = outcomes.pop(0) if outcomes else 0
    if outcome == 'time':
      raise subprocess.TimeoutExpired(words, 7)
    if outcome == 0:
      report = dataclasses.replace(REPORT, topology='v5e:2x2')
      path = pathlib.Path(words[words.index('--worker') + 1])
      path.write_text(json.dumps(report.to_json()))
    return subprocess.CompletedProcess(words, outcome, '', 'a\nbroken')

  monkeypatch.setattr(subprocess, 'run', finished)
  monkeypatch.setattr('jaxformers.aot.compile.environment', lambda _: {})
  words = ['compile', str(ROOT / 'experiments' / 'lm.py'), '--search']
  words += ['--topology', 'v5e:2x2', '--mesh', 'data=1', '--timeout', '7']
  assert main(words) == 0
  out = capsys.readouterr().out
  for reason in (
    'failed: the compiler crashed twice (signal 11): broken',
    'failed: the compiler did not finish in 7 seconds; give it more',
    'failed: a broken',
  ):
    assert out.count(reason) == 2  # At once and in the end.
  assert 'fits: 4.00 GiB' in out
