"""Kills a training run at random moments and checks that nothing is lost.

The same command is started again and again and killed with SIGKILL after a
random time, then left to finish. Its metrics must equal, bit for bit, those of a
run that was never killed; every start must resume from the newest checkpoint
that was finished; no checkpoint may be unreadable.

Run: python scripts/crash_test.py --kills 20 --save
Time: about 6 minutes on 2 CPU cores.
"""

import argparse
import json
import pathlib
import random
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
RESULT = ROOT / 'experiments' / 'benchmarks' / 'results' / 'crash_test.json'
SMALL = (
  'steps=16000',
  'batch_size=4',
  'model.width=32',
  'model.stack.depth=1',
  'model.stack.block.feedforward.hidden=64',
  'model.stack.block.mixer.num_heads=2',
  'data.length=32',
  'evaluate_every=1000',
  'evaluate_batches=2',
  'checkpoint_every=20',
  'baseline=None',
  'preview.tokens=20',
)


def command(workdir: pathlib.Path, settings: tuple[str, ...]) -> list[str]:
  """Returns the command that trains the small run."""
  words = [sys.executable, '-m', 'jaxformers', 'train']
  words += [str(ROOT / 'experiments' / 'lm.py'), '--workdir', str(workdir)]
  return words + [word for s in settings for word in ('--set', s)]


def start(
  workdir: pathlib.Path, settings: tuple[str, ...], seconds: float | None
) -> tuple[str, bool]:
  """Runs the command; returns its output, and whether it had to be killed."""
  process = subprocess.Popen(
    command(workdir, settings),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  try:
    output, _ = process.communicate(timeout=seconds)
  except subprocess.TimeoutExpired:
    process.kill()
    return process.communicate()[0], True
  if process.returncode:
    raise RuntimeError(f'exit status {process.returncode}:\n{output}')
  return output, False


def newest_checkpoint(workdir: pathlib.Path) -> int:
  """Returns the newest finished checkpoint, 0 if there is none."""
  folder = workdir / 'checkpoints'
  names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
  return max((int(name) for name in names if name.isdigit()), default=0)


def crash_test(
  folder: pathlib.Path,
  kills: int,
  span: tuple[float, float],
  settings: tuple[str, ...] = SMALL,
  seed: int = 0,
) -> dict[str, object]:
  """Runs once straight through and once with kills, and compares.

  Args:
    folder: an empty folder for both runs.
    kills: how many times to kill.
    span: shortest and longest time in seconds before a kill.
    settings: what to change in the main job.
    seed: of the moments.

  Returns:
    What happened. `lost` and `damaged` must be 0 and `identical` True.
  """
  moments = random.Random(seed)
  start(folder / 'straight', settings, None)
  killed = folder / 'killed'
  resumed, lost, damaged = [], 0, 0
  while True:
    saved = newest_checkpoint(killed)
    limit = moments.uniform(*span) if len(resumed) < kills else None
    output, was_killed = start(killed, settings, limit)
    damaged += 'damaged' in output
    if found := re.search(r'resuming after step (\d+)', output):
      lost += int(found[1]) != saved
    if not was_killed:
      break
    resumed.append(newest_checkpoint(killed))
  straight = (folder / 'straight' / 'metrics.jsonl').read_bytes()
  return {
    'kills': len(resumed),
    'newest_checkpoint_after_each_kill': resumed,
    'lost': lost,
    'damaged': damaged,
    'identical': (killed / 'metrics.jsonl').read_bytes() == straight,
  }


def main() -> int:
  """Runs the test and reports; the exit status is 0 if nothing was lost."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--save', action='store_true', help='keep the result')
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    result = crash_test(pathlib.Path(folder), arguments.kills, (3.0, 13.0))
  text = json.dumps(result, indent=2)
  print(text)
  if arguments.save:
    RESULT.write_text(text + '\n')
  return int(bool(result['lost'] or result['damaged'])) or (
    not result['identical']
  )


if __name__ == '__main__':
  sys.exit(main())
