"""What gradients of several tasks cost beside the gradient of their sum.

Four tasks share a small Transformer, the compiled program of each mode tells
its temporary memory, and the modes run in turns. Layers are scanned: unrolled,
the compiler keeps more of what it need not.

Run: python -m experiments.benchmarks.multitask --save
Time: about 2 minutes on 2 CPU cores.
"""

import argparse
from collections.abc import Callable
import functools
import statistics
from typing import Any, get_args

import jax
from jax import Array
import jax.numpy as jnp

from experiments.benchmarks import timing
from jaxformers.losses import cross_entropy
from jaxformers.models import LanguageModel
from jaxformers.nn import Block
from jaxformers.nn import FeedForward
from jaxformers.nn import Stack
from jaxformers.nn.mixers import Attention
from jaxformers.ops import Rotary
from jaxformers.optim.tasks import MGDA
from jaxformers.optim.tasks import multitask_value_and_grad
from jaxformers.optim.tasks.gradient import Mode

TASKS, CLASSES = 4, 16


def model_of(width: int, depth: int) -> LanguageModel:
  """Returns a model whose outputs are shared out among the tasks."""
  block = Block(
    Attention(num_heads=width // 32, position=Rotary()), FeedForward(4 * width)
  )
  return LanguageModel(TASKS * CLASSES, width, Stack(block, depth))


def losses_of(model: LanguageModel) -> Callable[..., Array]:
  """Returns the function from parameters and tokens to a loss per task."""

  def losses(params: Any, tokens_BL: Array) -> Array:
    logits_BLV, _ = model.apply({'params': params}, tokens_BL)
    parts = jnp.split(logits_BLV, TASKS, axis=-1)
    digits = [tokens_BL // 2**i % CLASSES for i in range(TASKS)]
    pairs = zip(parts, digits, strict=True)
    return jnp.stack(
      [cross_entropy(p, d).cross_entropy_BL.mean() for p, d in pairs]
    )

  return losses


def measure(
  width: int, depth: int, batch: tuple[int, int], rounds: int
) -> dict[str, Any]:
  """Measures memory and time of each mode.

  Args:
    width: of the model.
    depth: of the model.
    batch: rows and tokens per row.
    rounds: how often each thing is timed.
  """
  model = model_of(width, depth)
  losses = losses_of(model)
  tokens_BL = jax.random.randint(
    jax.random.key(0), batch, 0, TASKS * CLASSES, jnp.int32
  )
  params = model.init(jax.random.key(1), tokens_BL[:1])['params']
  functions = {'one': jax.grad(lambda p, t: losses(p, t).sum())}
  for mode in get_args(Mode):
    functions[mode] = multitask_value_and_grad(losses, MGDA(), mode)
  programs = {
    name: jax.jit(f).lower(params, tokens_BL).compile()
    for name, f in functions.items()
  }
  memory = {
    name: program.memory_analysis().temp_size_in_bytes
    for name, program in programs.items()
  }
  calls = {
    name: functools.partial(program, params, tokens_BL)
    for name, program in programs.items()
  }
  seconds = timing.seconds_in_turns(calls, rounds)
  results = {
    'width_depth': [width, depth],
    'batch': list(batch),
    'parameter_bytes': sum(4 * x.size for x in jax.tree.leaves(params)),
    'one_backward_temporary_bytes': memory['one'],
    'one_backward_ms': 1e3 * statistics.median(seconds['one']),
  }
  for mode in get_args(Mode):
    results[f'{mode}_memory_relative_to_one'] = memory[mode] / memory['one']
    results[f'{mode}_time_relative_to_one'] = timing.ratio(
      seconds[mode], seconds['one']
    )
  return results


def main() -> None:
  """Measures and reports."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--save', action='store_true', help='keep the results')
  arguments = parser.parse_args()
  results = measure(width=192, depth=8, batch=(16, 128), rounds=5)
  timing.report('multitask', results, arguments.save)


if __name__ == '__main__':
  main()
