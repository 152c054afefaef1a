"""The training loop, to be read from top to bottom."""

from collections.abc import Callable
import contextlib
import json
import math
import os
import pathlib
from typing import Any

import jax

from jaxformers.data import batches
from jaxformers.diagnostics.decays import growing_layers
from jaxformers.train import record as records
from jaxformers.train.checkpoint import Checkpoints
from jaxformers.train.directory import versions
from jaxformers.train.directory import write_whole
from jaxformers.train.distributed import agreement
from jaxformers.train.distributed import check_same
from jaxformers.train.distributed import explained
from jaxformers.train.distributed import tell_all
from jaxformers.train.distributed import wait_for_all
from jaxformers.train.errors import FailedTogether
from jaxformers.train.errors import RunFailed
from jaxformers.train.evaluation import evaluate
from jaxformers.train.experiment import Experiment
from jaxformers.train.figure import plot_loss
from jaxformers.train.flops import model_flops
from jaxformers.train.flops import peak_flops
from jaxformers.train.frozen import with_frozen
from jaxformers.train.frozen import without_frozen
from jaxformers.train.interrupt import Interrupt
from jaxformers.train.metrics import MetricsLog
from jaxformers.train.metrics import read_metrics
from jaxformers.train.profile import Profile
from jaxformers.train.program import Program
from jaxformers.train.program import abstract_batch
from jaxformers.train.program import build
from jaxformers.train.progress import Progress
from jaxformers.train.run import Run
from jaxformers.train.run_directory import RunDirectory
from jaxformers.train.start import first_state
from jaxformers.train.start import starting_variables
from jaxformers.train.state import TrainState
from jaxformers.train.step import Metrics


def train(
  experiment: Experiment,
  workdir: str | os.PathLike[str],
  *,
  profile_steps: int = 0,
) -> TrainState | None:
  """Runs an experiment in a directory, or goes on where it stopped.

  After kill -9 the same call goes on from the newest readable checkpoint, and
  from there `metrics.jsonl` gets the bits that it would have got.

  Where `jax.distributed` was started, all processes call this.

  Args:
    experiment: the run.
    workdir: holds the run; made if missing. One that holds the same experiment
      is resumed, on any number of devices and processes and with another mesh
      if need be; one that holds anything else is refused.
    profile_steps: how many steps to record for xprof in `profile/`.

  Returns:
    The final state, or None if a signal asked to leave before the end.

  Raises:
    RunFailed: if a loss is not finite, or a checkpoint cannot be written.
    ValueError: if the parts of the experiment, or the directory, do not fit.
  """
  directory = RunDirectory(pathlib.Path(workdir))
  process = jax.process_index()
  say = print if process == 0 else _silent
  # Everything that can be wrong with the experiment, before a file is made.
  record = records.to_record(experiment)
  check_same('settings', list(records.tree(record)))
  check_same('versions', _lines(versions()))
  with agreement():
    program = build(experiment, experiment.data.prepare())
  check_same('data', _lines(program.prepared.facts))
  is_new = tell_all(not directory.exists)
  base = starting_variables(program) if is_new else None
  with explained(), contextlib.ExitStack() as stack:
    with agreement():
      stack.enter_context(directory.locked(process))
      directory.prepare(
        record, device=jax.devices()[0].device_kind, process=process
      )
    holder = tell_all(directory.holder() if process == 0 else None)
    with agreement():
      directory.check_shared(holder)
    with (
      Checkpoints(
        directory.checkpoints,
        keep_latest=experiment.keep_latest,
        keep_best=experiment.keep_best,
        report=say,
      ) as checkpoints,
      Interrupt() as interrupt,
    ):
      # Where a run starts: 1. its newest checkpoint that can be read; 2. what
      # `experiment.start` gives; 3. afresh.
      abstract = program.abstract_state
      restored = checkpoints.restore('latest', without_frozen(abstract))
      if restored:
        state = restored.state
      else:
        state = first_state(program, base or starting_variables(program))
      del base  # Not needed any more, and as large as the model.
      state = with_frozen(state, abstract, directory)
      first = int(state.step)
      say(_opening(program, directory, first))
      if first < experiment.steps:
        profile = Profile(
          directory.profile, first + 1, experiment.steps, profile_steps
        )
        with profile:
          state = _run(
            program, directory, checkpoints, interrupt, state, record, profile
          )
    if int(state.step) < experiment.steps:
      say(
        f'Left after step {int(state.step)} because of '
        f'{interrupt.requested}; the same command goes on from there.'
      )
      return None
    _finish(program, directory, state, say)
    wait_for_all()
    return state


def _run(program, directory, checkpoints, interrupt, state, record, profile):
  """Runs the steps that are left and returns the last state."""
  experiment, first = program.experiment, int(state.step)
  train_step = profile(program.train_step)
  rows = batches(
    program.prepared.train,
    batch_size=experiment.batch_size,
    seed=experiment.seed,
    first_step=first,
    part=program.rows,
  )
  with (
    MetricsLog(
      directory.metrics, directory.events, first_step=first + 1
    ) as log,
    Progress(**_meter(program), first_step=first) as progress,
  ):
    pending = None  # Metrics of the step before: read while the device works.

    def settle():
      nonlocal pending
      if pending is not None:
        report(*pending, log, progress, experiment.non_finite)
      pending = None

    for step, batch in enumerate(program.place(rows), start=first + 1):
      state, metrics = train_step(state, batch)
      settle()
      pending = step, metrics
      leaving = interrupt.reached(step) or step == experiment.steps
      heldout = None
      if step % experiment.evaluate_every == 0 or step == experiment.steps:
        settle()
        with progress.pause():
          heldout = _evaluate(program, state, step)
        log.write(step, 'heldout', heldout)
        progress.message(_summary(step, heldout))
      if step % experiment.checkpoint_every == 0 or leaving:
        settle()  # No checkpoint of a step whose loss was not finite.
        with progress.pause():
          checkpoints.save(
            step,
            without_frozen(state),
            progress={'step': step, 'seed': experiment.seed},
            record=record,
            metrics=heldout and {'heldout_loss': heldout['loss']},
          )
      if leaving:
        checkpoints.wait()
        return state


def report(
  step: int,
  metrics: Metrics,
  log: MetricsLog,
  progress: Progress,
  non_finite: str,
) -> None:
  """Writes and shows the metrics of a step.

  Args:
    step: its number.
    metrics: scalars on the device, which this waits for.
    log: writes them.
    progress: shows them.
    non_finite: `'stop'` if such metrics end the run.

  Raises:
    RunFailed: if one is not finite and that shall stop the run.
  """
  values = {name: float(v) for name, v in jax.device_get(metrics).items()}
  log.write(step, 'train', values)
  progress.update(step, values)
  if timing := progress.timing:
    log.write_timing(step, timing)
  bad = [name for name, value in values.items() if not math.isfinite(value)]
  if bad and non_finite == 'stop':
    shown = ', '.join(f'{name} {value:g}' for name, value in values.items())
    # All processes have the same metrics, and one complaint is enough.
    kind = RunFailed if jax.process_index() == 0 else FailedTogether
    raise kind(
      f'step {step}: {" and ".join(bad)} not finite ({shown}). Nothing of '
      'this step was saved. Lower the learning rate, clip gradients, or set '
      "non_finite='skip' to leave out such updates." + growing_layers(values)
    )


def _evaluate(program: Program, state: TrainState, step: int):
  """Measures held-out losses; at the end on all rows."""
  last = step == program.experiment.steps
  limit = None if last else program.experiment.evaluate_batches
  return evaluate(
    program.evaluate_step,
    state,
    program.heldout(limit),
    program.prepared.facts.get('heldout_bytes_per_token'),
  )


def _meter(program: Program) -> dict[str, Any]:
  """Returns what the progress display needs to know of the work."""
  experiment = program.experiment
  batch = abstract_batch(experiment, program.mesh)
  peak = peak_flops(jax.devices()[0])
  flops = None
  if peak is not None:
    flops = model_flops(experiment, program.abstract_state, batch)
  return {
    'total_steps': experiment.steps,
    'tokens_per_step': next(iter(batch.values())).size,
    'flops_per_step': flops,
    'peak_flops': peak and peak * program.mesh.size,
  }


def _opening(program: Program, directory: RunDirectory, first: int) -> str:
  """Returns what a run says before it begins."""
  experiment, facts = program.experiment, program.prepared.facts
  count, frozen = (
    sum(leaf.size for leaf in jax.tree.leaves(tree))
    for tree in (program.abstract_state.params, program.abstract_state.frozen)
  )
  kind = jax.devices()[0].device_kind
  corpus = ', '.join(
    f'{facts[f"{split}_tokens"]:,} tokens {word}'
    for split, word in (('train', 'to train on'), ('heldout', 'held out'))
    if f'{split}_tokens' in facts
  )
  name = facts.get('corpus', type(experiment.data).__name__)
  lines = [
    f'{type(experiment.model).__name__}: {count:,} parameters'
    f'{f" beside {frozen:,} frozen" if frozen else ""} on '
    f'{program.mesh.size} x {kind}{_processes()}',
    f'data: {"; ".join(filter(None, (name, corpus)))}',
    f'run:  {directory.path} (steps {first + 1} to {experiment.steps})',
  ]
  if first >= experiment.steps:
    lines[-1] = f'run:  {directory.path} is finished ({first} steps)'
  elif first:
    lines.append(f'resuming after step {first}')
  return '\n'.join(lines)


def _processes() -> str:
  count = jax.process_count()
  return f' in {count} processes' if count > 1 else ''


def _lines(values: dict[str, Any]) -> list[str]:
  return [f'{name}={value!r}' for name, value in values.items()]


def _summary(step: int, heldout: dict[str, float]) -> str:
  name = 'bits_per_byte' if 'bits_per_byte' in heldout else 'loss'
  text = name.replace('_', ' ')
  return f'step {step}: held-out {text} {heldout[name]:.3f}'


def _finish(
  program: Program,
  directory: RunDirectory,
  state: TrainState,
  say: Callable[[str], None],
) -> None:
  """Shows what came of a finished run: result, figure and sample."""
  experiment, text = program.experiment, None
  if experiment.preview is not None:  # All processes have a part of the model.
    text = Run(experiment, state.result, int(state.step)).preview()
  if jax.process_index() != 0:
    return
  baselines = {}
  if experiment.baseline is not None:
    bits = experiment.baseline.bits_per_byte(experiment.data)
    if bits is not None:
      baselines[experiment.baseline.label] = bits
      write_whole(directory.baselines, json.dumps(baselines) + '\n')
  last = _last_heldout(directory)
  if 'bits_per_byte' in last:
    say(f'\nheld-out bits per byte: {last["bits_per_byte"]:.3f}')
    for label, bits in baselines.items():
      say(f'  {label} on the same split: {bits:.3f}')
  plot_loss(
    directory.metrics,
    directory.figure,
    title=directory.path.name,
    baselines=baselines,
  )
  say(f'loss curve: {directory.figure}')
  if text is not None:
    directory.sample.write_bytes(text)
    say(f'sample:     {directory.sample}\n')
    say(text.decode('utf-8', 'replace'))


def _last_heldout(directory: RunDirectory) -> dict[str, Any]:
  """Returns the last held-out line of a run's metrics, {} if there is none."""
  lines = read_metrics(directory.metrics)
  return next((x for x in reversed(lines) if x['split'] == 'heldout'), {})


def _silent(text: str) -> None:
  del text
