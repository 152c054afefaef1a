"""Compiles what the library has for machines that are not here.

`python scripts/compile_programs.py` compiles every program of the table below,
each in a process of its own, and compares peak memory and collective bytes with
`launch/expected/NAME.json`; a change of more than 10 % is an error. `--write`
keeps what was found instead, and `--only NAME` takes some of the table.

It needs `pip install 'jaxformers[tpu]'`, and takes about a quarter of a minute
per program. Numbers depend on the compiler, so each file holds them by its
version; versions that it does not know are reported and not compared.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
EXPECTED = ROOT / 'launch' / 'expected'
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
  small = [
    Program(
      f'lm_{name}',
      'lm',
      'v5e:2x4',
      'fsdp=4,tensor=2',
      settings=(*SMALL, f'model.stack.block.mixer={mixer}'),
    )
    for name, mixer in MIXERS.items()
  ]
  decode = dataclasses.replace(small[0], name='lm_decode', step='decode')
  return [
    *small,
    decode,
    Program('lm_v4', 'lm', 'v4:2x2x1', 'fsdp=4'),
    Program('lm_v6e', 'lm', 'v6e:2x2', 'fsdp=4'),
    Program('lm_two_slices', 'lm', '2*v5e:2x2', 'dcn=2,fsdp=4'),
    Program('lm_1b_v5e_64', 'lm_1b', 'v5e:8x8'),
    Program('lm_8b_v5e_256', 'lm_8b', 'v5e:16x16'),
    Program('lm_8b_v5p_256', 'lm_8b', 'v5p:4x8x8'),
  ]


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
    'collective_bytes': {t['kind']: t['bytes'] for t in report['traffic']},
  }


def changes(expected: dict, found: dict, tolerance: float = 0.1) -> list[str]:
  """Says what differs by more than the tolerance."""
  lines = []
  if expected['fits'] != found['fits']:
    lines.append(f'fits: {expected["fits"]} became {found["fits"]}')
  old = {'peak_bytes': expected['peak_bytes'], **expected['collective_bytes']}
  new = {'peak_bytes': found['peak_bytes'], **found['collective_bytes']}
  for name in sorted(old.keys() | new.keys()):
    # A peak is None where the compiler does not say it.
    before, after = old.get(name) or 0, new.get(name) or 0
    if abs(after - before) > tolerance * before:
      lines.append(f'{name}: {before:.4g} became {after:.4g}')
  return lines


def check(program: Program, *, write: bool = False) -> list[str]:
  """Compiles a program and compares it with its file, or writes that."""
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
    return []
  if version not in versions:
    print(f'{program.name}: nothing to compare with for {version}')
    return []
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
    lines = check(program, write=arguments.write)
    failed |= bool(lines)
    print(f'{program.name}: {"; ".join(lines) or "ok"}', flush=True)
  return int(failed)


if __name__ == '__main__':
  sys.exit(main())
