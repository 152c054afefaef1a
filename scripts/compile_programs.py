"""Compiles what the library has for machines that are not here.

`python scripts/compile_programs.py` compiles every program of the table below,
each in a process of its own, and compares peak memory, collective bytes and arrays
that were copied whole with `launch/expected/NAME.json`; a change of more than 10 %
is an error. `--write` keeps what was found instead, and `--only NAME` takes some
of the table.

It takes about a quarter of a minute per program, and needs the compilers: `pip
install -r requirements-tpu.lock` for TPUs, `pip install 'jaxformers[gpu-aot]'` for
GPUs. Programs whose compiler is missing are named and left out. Numbers depend on
the compiler, so each file holds them by its version; one that it does not know
is an error too.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile

from jaxformers.aot import Topology
from jaxformers.aot import environment

ROOT = pathlib.Path(__file__).parents[1]
EXPECTED = ROOT / 'launch' / 'expected'
SLICE = 'v5e:2x4'
SMALL = (
  'model.width=128', 'model.stack.depth=2', 'batch_size=32', 'data.length=256',
)  # fmt: skip
MIXERS = {
  'attention': 'Attention(num_heads=4, position=Rotary())',
  'attention_rerope': 'Attention(num_heads=4, position=ReRoPE(window=64))',
  'attention_blockwise': (
    'Attention(num_heads=4, num_kv_heads=2, implementation="blockwise")'
  ),
  'linear_attention': 'LinearAttention(num_heads=4)',
  'griffin': 'RecurrentBlock(recurrence=RGLRU(num_heads=4))',
  'hippo_memory': 'HippoMemory(size=16)',
  'hippo_rnn': 'HippoRNN(size=16)',
  'lru': 'LRU(state_size=64)',
  'mamba': 'Mamba()',
  'mamba2': 'Mamba2(head_dim=32, state_size=32)',
  'retention': 'Retention(num_heads=4)',
  'rtf': 'RTF(length=256, state_size=16)',
  'rwkv4': 'RWKV4()',
  'rwkv6': 'RWKV6(num_heads=4)',
  's4': 'S4(length=256, state_size=16)',
  's4d': 'S4D(state_size=16)',
  's5': 'S5(state_size=64)',
}
# Several kinds of layers in one stack.
BLOCKS = {
  'rwkv4_channel_mixing': (
    'Block(mixer=RWKV4()), Block(mixer=RWKV4ChannelMixing())'
  ),
  'hybrid': (
    'Block(mixer=Mamba2(head_dim=32, state_size=32)), '
    'Block(mixer=Attention(num_heads=4, mask=Window(size=64)), '
    'feedforward=FeedForward(hidden=512))'
  ),
}
# Steps whose gradient is not that of one loss in all parameters.
STEPS = {
  'tasks': (
    'objective.z_loss=1e-4',
    'tasks=TaskCombiner(weighting=NashMTL())',
  ),
  'gradient_penalty': ('gradient=GradientPenalty(strength=0.1)',),
  'adversarial': ('gradient=FGM(epsilon=0.5)',),
}
# A model with sizes of its own.
LORA = (
  'model=LoRA(model=LanguageModel(vocab_size=256, width=128, stack=Stack('
  'block=Block(mixer=Attention(num_heads=4), feedforward=FeedForward('
  'hidden=512)), depth=2)), low_rank=LowRank(rules=("mixer/(query|value)",)))'
)
# Mixers that decode from a state as large as at the first token.
DECODED = 'mamba', 'mamba2', 'lru'
# Mixers whose sequences a mesh cuts in four, and what they read.
CUT = 'attention', 'lru', 'mamba', 'mamba2', 'retention'
CUT_MESH = 'data=2,sequence=4'
CUT_ROWS, CUT_LENGTH, WIDTH = 8, 4096, 128
WHOLE = CUT_ROWS // 2 * CUT_LENGTH * WIDTH * 4
"""Bytes of the activations of a device's rows, were their sequences not cut."""


@dataclasses.dataclass(frozen=True)
class Program:
  """A step that is compiled.

  Attributes:
    name: of its file.
    experiment: file under `experiments/`.
    topology: the machine.
    mesh: axes of the mesh, as `--mesh` takes them; None for the experiment's.
    step: which step.
    settings: changes to the experiment.
  """

  name: str
  experiment: str
  topology: str
  mesh: str | None = None
  step: str = 'train'
  settings: tuple[str, ...] = ()


def programs() -> list[Program]:
  """Returns the table."""
  return [
    *(_small(name, _mixer(name)) for name in MIXERS),
    *(
      _small(name, f'model.stack.block=({blocks})')
      for name, blocks in BLOCKS.items()
    ),
    *(
      _small(name, _mixer('attention'), *settings)
      for name, settings in STEPS.items()
    ),
    Program(
      'lm_lora', 'lm', SLICE, 'fsdp=4,tensor=2', settings=(*SMALL[2:], LORA)
    ),
    dataclasses.replace(_small('decode', _mixer('attention')), step='decode'),
    *(
      dataclasses.replace(_small(f'decode_{name}', _mixer(name)), step='decode')
      for name in DECODED
    ),
    *map(_cut, CUT),
    Program('lm_v4', 'lm', 'v4:2x2x1', 'fsdp=4'),
    Program('lm_v6e', 'lm', 'v6e:2x2', 'fsdp=4'),
    Program('lm_tpu7x', 'lm', 'tpu7x:2x2x1', 'fsdp=8'),
    Program('lm_two_slices', 'lm', '2*v5e:2x2', 'dcn=2,fsdp=4'),
    Program('lm_h100', 'lm', 'h100:1x1x8', 'fsdp=8'),
    Program('lm_1b_v5e_64', 'lm_1b', 'v5e:8x8'),
    Program('lm_8b_v5e_256', 'lm_8b', 'v5e:16x16'),
    Program('lm_8b_v5p_256', 'lm_8b', 'v5p:4x8x8'),
  ]


def _small(name: str, *settings: str) -> Program:
  """Returns a program of two layers on eight chips."""
  settings = *SMALL, *settings
  return Program(
    f'lm_{name}', 'lm', SLICE, 'fsdp=4,tensor=2', settings=settings
  )


def _mixer(name: str) -> str:
  return f'model.stack.block.mixer={MIXERS[name]}'


def _cut(name: str) -> Program:
  """Returns a program whose sequences are long and shared out."""
  sizes = *SMALL[:2], f'batch_size={CUT_ROWS}', f'data.length={CUT_LENGTH}'
  return Program(
    f'lm_cut_{name}', 'lm', SLICE, CUT_MESH, settings=(*sizes, _mixer(name))
  )


def compiled(program: Program) -> dict:
  """Compiles a program and returns its report."""
  path = ROOT / 'experiments' / f'{program.experiment}.py'
  words = [sys.executable, '-m', 'jaxformers', 'compile', str(path), '--fast']
  words += ['--topology', program.topology, '--step', program.step]
  words += ['--mesh', program.mesh] if program.mesh else []
  words += [w for s in program.settings for w in ('--set', s)]
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / 'report.json'
    done = subprocess.run(
      [*words, '--json', str(out)], capture_output=True, text=True, cwd=ROOT
    )
    if not out.exists():
      raise RuntimeError(f'{program.name}: {done.stderr[-2000:]}')
    return json.loads(out.read_text())


def summary(report: dict) -> dict:
  """Returns what is compared of a report."""
  return {
    'fits': report['fits'],
    'peak_bytes': report['peak_bytes'],
    'copied_whole': report['copied_whole'],
    'collective_bytes': {t['kind']: t['bytes'] for t in report['traffic']},
  }


def changes(expected: dict, found: dict, tolerance: float = 0.1) -> list[str]:
  """Says what differs by more than the tolerance."""
  lines = []
  if expected['fits'] != found['fits']:
    lines.append(f'fits: {expected["fits"]} became {found["fits"]}')
  numbers = 'peak_bytes', 'copied_whole'
  old, new = (
    {**{name: tree.get(name) for name in numbers}, **tree['collective_bytes']}
    for tree in (expected, found)
  )
  for name in sorted(old.keys() | new.keys()):
    # A peak is None where the compiler does not say it.
    before, after = old.get(name) or 0, new.get(name) or 0
    if abs(after - before) > tolerance * before:
      lines.append(f'{name}: {before:.4g} became {after:.4g}')
  return lines


class UnknownVersion(Exception):
  """There are no numbers of a compiler to compare with."""


def check(program: Program, *, write: bool = False) -> list[str]:
  """Compiles a program and compares it with its file, or writes that.

  Raises:
    UnknownVersion: if the file has no numbers of the compiler's version.
  """
  path = EXPECTED / f'{program.name}.json'
  known = json.loads(path.read_text()) if path.exists() else {}
  report = compiled(program)
  version = ', '.join(f'{k} {v}' for k, v in report['versions'].items())
  found = summary(report)
  versions = known.get('versions', {})
  if write:
    described = dataclasses.asdict(program)
    tree = {**described, 'versions': {**versions, version: found}}
    EXPECTED.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=2, sort_keys=True) + '\n')
    old = versions.get(version)
    return changes(old, found) if old else ['new']
  if version not in versions:
    raise UnknownVersion(
      f'{program.name} was not compared: {path.name} has numbers of '
      f'{"; ".join(versions) or "no compiler"}, and this is {version}. Install '
      'requirements-tpu.lock, or keep the numbers of this one by --write.'
    )
  return changes(versions[version], found)


def main() -> int:
  """Runs the command."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--write', action='store_true')
  parser.add_argument('--only', nargs='+', metavar='NAME')
  arguments = parser.parse_args()
  failed = False
  for program in programs():
    if arguments.only and program.name not in arguments.only:
      continue
    try:
      environment(Topology.parse(program.topology))
      lines = check(program, write=arguments.write)
      failed |= bool(lines) and not arguments.write
    except ImportError as error:
      lines = [f'LEFT OUT, {error}']
    except (RuntimeError, UnknownVersion) as error:
      lines, failed = [str(error)], True
    print(f'{program.name}: {"; ".join(lines) or "ok"}', flush=True)
  return int(failed)


if __name__ == '__main__':
  sys.exit(main())
