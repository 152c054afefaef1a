"""How fast the main job trains, beside what the machine and plain Flax can do.

Four questions, each answered by ratios within one run:

1. Which part of the machine's matrix-product peak does the train step reach?
2. How does it compare with the same model written plainly on Flax's own
   `nn.MultiHeadDotProductAttention`?
3. Which part of a training loop's time is spent outside XLA (data, placement,
   dispatch, metrics, logging, progress)?
4. How does compile time grow from 4 to 48 scanned layers?

Run: python -m experiments.benchmarks.train_step --save
Time: about 3 minutes on 2 CPU cores.
"""

import argparse
import dataclasses
import io
import pathlib
import statistics
import tempfile
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments import lm
from experiments.benchmarks import timing
from jaxformers.data import batch_at
from jaxformers.data import batches
from jaxformers.nn import Stack
from jaxformers.ops import rope_frequencies
from jaxformers.ops import rotate
from jaxformers.train import Experiment
from jaxformers.train import loop
from jaxformers.train.flops import matmul_flops
from jaxformers.train.metrics import MetricsLog
from jaxformers.train.program import Program
from jaxformers.train.program import build
from jaxformers.train.progress import Progress


def rotary_attention(query, key, value, **options):
  """Flax's own attention on rotated queries and keys."""
  position = jnp.arange(query.shape[1])[None]
  frequencies = rope_frequencies(query.shape[-1])
  query = rotate(query, position, frequencies)
  key = rotate(key, position, frequencies)
  return nn.dot_product_attention(query, key, value, **options)


class PlainLanguageModel(nn.Module):
  """The main job's model as one would write it with Flax alone."""

  vocab_size: int
  width: int
  depth: int
  num_heads: int
  hidden: int

  @nn.compact
  def __call__(self, tokens, state=None, *, segments_BL=None, **_):
    embed = nn.Embed(self.vocab_size, self.width)
    x = embed(tokens)
    mask = nn.make_causal_mask(tokens)
    for _ in range(self.depth):
      attention = nn.MultiHeadDotProductAttention(
        self.num_heads, use_bias=False, attention_fn=rotary_attention
      )
      x += attention(nn.RMSNorm()(x), mask=mask)
      h = nn.Dense(self.hidden, use_bias=False)(nn.RMSNorm()(x))
      x += nn.Dense(self.width, use_bias=False)(jnp.square(nn.relu(h)))
    return embed.attend(nn.RMSNorm()(x)), state


def plain(experiment: Experiment) -> Experiment:
  """Returns the experiment with the plain model."""
  model = experiment.model
  block = model.stack.block
  return dataclasses.replace(
    experiment,
    model=PlainLanguageModel(
      model.vocab_size,
      model.width,
      model.stack.depth,
      block.mixer.num_heads,
      block.feedforward.hidden,
    ),
  )


class Stepper:
  """Runs train steps of an experiment on one batch."""

  def __init__(self, experiment: Experiment, prepared: Any):
    self.program = build(experiment, prepared)
    self.state = self.program.init()
    batch = batch_at(
      prepared.train, 0, batch_size=experiment.batch_size, seed=0
    )
    (self.batch,) = self.program.place([batch])

  def __call__(self) -> Any:
    self.state, metrics = self.program.train_step(self.state, self.batch)
    return metrics

  def flops(self) -> int:
    """Returns the matrix-product operations of one step."""
    jaxpr = jax.make_jaxpr(self.program.train_step)(self.state, self.batch)
    return matmul_flops(jaxpr.jaxpr)


def loop_seconds(program: Program, steps: int) -> float:
  """Times steps of the real loop: data, placement, metrics, log, progress."""
  experiment = program.experiment
  rows = batches(
    program.prepared.train, batch_size=experiment.batch_size, seed=0
  )
  state = program.init()
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    with (
      MetricsLog(path / 'metrics.jsonl', path / 'events', first_step=1) as log,
      Progress(steps, 0, 0, output=io.StringIO()) as progress,
    ):
      pending = None
      for step, batch in enumerate(program.place(rows), start=1):
        state, metrics = program.train_step(state, batch)
        if pending is not None:
          loop.report(*pending, log, progress, 'stop')
        pending = step, metrics
        if step == 2:  # Compiled, and the first batches are read.
          jax.block_until_ready(state)
          start = time.perf_counter()
        if step == steps + 2:
          break
      jax.block_until_ready(state)
      return (time.perf_counter() - start) / steps


def outside_xla(stepper: Stepper, rounds: int, steps: int) -> dict[str, float]:
  """Compares steps of the loop with bare calls, in turns."""
  bare, whole = [], []
  for _ in range(rounds):
    start = time.perf_counter()
    for _ in range(steps):
      metrics = stepper()
    jax.block_until_ready(metrics)
    bare.append((time.perf_counter() - start) / steps)
    whole.append(loop_seconds(stepper.program, steps))
  return {
    'bare_step_seconds': statistics.median(bare),
    'loop_step_seconds': statistics.median(whole),
    'fraction_outside_xla': 1 - timing.ratio(bare, whole),
  }


def compile_seconds(experiment: Experiment, prepared: Any, depth: int) -> float:
  """Times tracing and compiling of a train step with scanned layers."""
  stack = Stack(experiment.model.stack.block, depth)
  model = experiment.model.clone(stack=stack)
  program = build(dataclasses.replace(experiment, model=model), prepared)
  batch = batch_at(prepared.train, 0, batch_size=experiment.batch_size, seed=0)
  start = time.perf_counter()
  program.train_step.lower(program.abstract_state, batch).compile()
  return time.perf_counter() - start


def compile_growth(
  experiment: Experiment, prepared: Any, depths: tuple[int, int], rounds: int
) -> dict[str, Any]:
  """Compares compile times of two depths, in turns."""
  seconds = {depth: [] for depth in depths}
  for _ in range(rounds):
    for depth in depths:
      seconds[depth].append(compile_seconds(experiment, prepared, depth))
  few, many = depths
  return {
    f'compile_seconds_{few}_layers': statistics.median(seconds[few]),
    f'compile_seconds_{many}_layers': statistics.median(seconds[many]),
    'compile_ratio': timing.ratio(seconds[many], seconds[few]),
  }


def measure(
  experiment: Experiment, *, rounds: int, size: int, depths: tuple[int, int]
) -> dict[str, Any]:
  """Answers the four questions.

  Args:
    experiment: what is trained.
    rounds: how often each thing is timed.
    size: of the square matrices whose product gives the peak.
    depths: numbers of layers whose compile times are compared.
  """
  prepared = experiment.data.prepare()
  ours = Stepper(experiment, prepared)
  theirs = Stepper(plain(experiment), prepared)
  product, product_flops = timing.matrix_product(size)
  seconds = timing.seconds_in_turns(
    {'ours': ours, 'flax': theirs, 'product': product}, rounds
  )
  tokens = experiment.batch_size * experiment.data.length
  flops = ours.flops()
  peak = product_flops / min(seconds['product'])
  step = statistics.median(seconds['ours'])
  return {
    'parameters': sum(a.size for a in jax.tree.leaves(ours.state.params)),
    'tokens_per_step': tokens,
    'tokens_per_second': tokens / step,
    'matmul_flops_per_step': flops,
    'peak_flops_per_second': peak,
    'fraction_of_peak': flops / step / peak,
    'flax_tokens_per_second': tokens / statistics.median(seconds['flax']),
    'speed_relative_to_flax': timing.ratio(seconds['flax'], seconds['ours']),
    **outside_xla(ours, max(rounds // 5, 1), max(rounds // 2, 2)),
    **compile_growth(experiment, prepared, depths, max(rounds // 5, 1)),
  }


def main() -> None:
  """Measures and reports."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--save', action='store_true', help='keep the results')
  arguments = parser.parse_args()
  results = measure(lm.experiment(), rounds=25, size=1024, depths=(4, 48))
  timing.report('train_step', results, arguments.save)


if __name__ == '__main__':
  main()
