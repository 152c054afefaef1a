"""Trains one small model on many meshes and processes, and compares the losses.

The model is that of the main job, made small. Every mesh runs on 8 forced devices
of the CPU: of one process, of two, and of four, which exchange through sockets
what hosts exchange through a network. All must take the steps of one device, up
to the order in which float32 numbers are added.

Run: python scripts/mesh_matrix.py --save
Time: about 8 minutes on 2 CPU cores.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
RESULT = ROOT / 'experiments' / 'benchmarks' / 'results' / 'mesh_matrix.json'
# Relative, over 8 steps of AdamW at a learning rate of up to 3e-3. A loss is a
# mean over 2048 targets, each after sums of at most 256 terms.
TOLERANCES = {'loss': 1e-5, 'gradient_norm': 1e-4}
PROCESSES = (1, 2, 4)
DEVICES = 8
MESHES = {
  'data': 'MeshShape(data=8)',
  'fsdp': 'MeshShape(data=1, fsdp=8)',
  'tensor': 'MeshShape(data=1, tensor=8)',
  'sequence': 'MeshShape(data=1, sequence=8)',
  'mixed': 'MeshShape(data=1, fsdp=2, tensor=2, sequence=2)',
  'dcn': 'MeshShape(dcn=2, data=2, fsdp=2)',
}
SMALL = (
  'steps=8',
  'batch_size=16',
  'model.width=64',
  'model.stack.depth=2',
  'model.stack.block.feedforward.hidden=128',
  'model.stack.block.mixer.num_heads=8',
  'data.length=128',
  'optimizer.learning_rate.warmup_steps=2',
  'evaluate_every=8',
  'evaluate_batches=2',
  'checkpoint_every=8',
  'baseline=None',
  'preview=None',
)


def train(
  workdir: pathlib.Path, processes: int, devices: int, mesh: str
) -> list[dict[str, float]]:
  """Trains the small model and returns the lines of its metrics.

  Args:
    workdir: of the run.
    processes: how many.
    devices: how many each of them has.
    mesh: over all devices, as an expression.
  """
  words = [sys.executable, str(ROOT / 'launch' / 'local.py')]
  words += ['--processes', str(processes), '--cpu-devices', str(devices), '--']
  words += ['train', str(ROOT / 'experiments' / 'lm.py')]
  words += ['--workdir', str(workdir)]
  words += [w for s in (*SMALL, f'mesh={mesh}') for w in ('--set', s)]
  path = f'{ROOT}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'
  done = subprocess.run(
    words,
    env=os.environ | {'PYTHONPATH': path},
    capture_output=True,
    text=True,
  )
  if done.returncode:
    raise RuntimeError(f'{words}\n{done.stdout}\n{done.stderr}')
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def deviations(
  expected: list[dict[str, float]], found: list[dict[str, float]]
) -> dict[str, float]:
  """Returns the largest relative deviation of each quantity over all lines.

  Args:
    expected: metrics of one run.
    found: of another.
  """
  pairs = list(zip(expected, found, strict=True))
  return {
    name: max(abs(b[name] / a[name] - 1) for a, b in pairs if name in a)
    for name in TOLERANCES
  }


def matrix(meshes: list[str]) -> dict[str, object]:
  """Trains on all meshes and processes.

  Args:
    meshes: names of those to try.

  Returns:
    The losses of one device, and how far the others are from them.
  """
  with tempfile.TemporaryDirectory() as folder:
    runs = pathlib.Path(folder)
    expected = train(runs / 'one', 1, 1, 'MeshShape()')
    found = {}
    for mesh in meshes:
      for processes in PROCESSES:
        devices = DEVICES // processes
        name = f'{mesh}, {processes} x {devices}'
        workdir = runs / f'{mesh}_{processes}'
        lines = train(workdir, processes, devices, MESHES[mesh])
        found[name] = deviations(expected, lines)
        print(name, found[name], flush=True)
  largest = {
    name: max(row[name] for row in found.values()) for name in TOLERANCES
  }
  return {
    'losses_of_one_device': [x['loss'] for x in expected],
    'tolerances': TOLERANCES,
    'largest': largest,
    'agrees': all(largest[name] <= TOLERANCES[name] for name in TOLERANCES),
    'deviations': found,
  }


def main() -> int:
  """Runs the matrix; the exit status is 0 if all agree."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--meshes', nargs='+', choices=MESHES, default=list(MESHES)
  )
  parser.add_argument('--save', action='store_true', help='keep the result')
  arguments = parser.parse_args()
  result = matrix(arguments.meshes)
  text = json.dumps(result, indent=2)
  print(text)
  if arguments.save:
    RESULT.write_text(text + '\n')
  return int(not result['agrees'])


if __name__ == '__main__':
  sys.exit(main())
