"""How benchmarks measure: in turns, in one run, reported with their spread."""

from collections.abc import Callable
import json
import os
import pathlib
import platform
import statistics
import time
from typing import Any

import flax
import jax
import jax.numpy as jnp

PAUSE = 0.05
"""Seconds."""

RESULTS = pathlib.Path(__file__).parent / 'results'


def seconds_in_turns(
  functions: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
  """Times functions in turns, so that what disturbs one disturbs all.

  Before each there is a pause, in which threads of the one before that wait
  for more work by spinning, as those of OpenMP do, fall asleep.

  Args:
    functions: each runs once and returns arrays that are waited for; the first
      call of each, which compiles, is not timed.
    rounds: how often each is timed.

  Returns:
    Seconds of each round.
  """
  for function in functions.values():
    jax.block_until_ready(function())
  samples = {name: [] for name in functions}
  for _ in range(rounds):
    for name, function in functions.items():
      time.sleep(PAUSE)
      start = time.perf_counter()
      jax.block_until_ready(function())
      samples[name].append(time.perf_counter() - start)
  return samples


def ratio(a: list[float], b: list[float]) -> float:
  """Returns the median over rounds of a / b; rounds are neighbours in time."""
  return statistics.median(x / y for x, y in zip(a, b, strict=True))


def matrix_product(
  size: int, repeats: int = 10
) -> tuple[Callable[[], Any], float]:
  """Returns a chain of float32 products of square matrices, and its operations.

  The best time of it is what this machine can do in matrix products.

  Args:
    size: rows and columns.
    repeats: how many products one call makes, each of the result before.
  """
  a = jnp.eye(size, dtype=jnp.float32)
  chain = jax.jit(
    lambda a, b: jax.lax.fori_loop(0, repeats, lambda _, x: x @ a, b)
  )
  return lambda: chain(a, a), 2.0 * size**3 * repeats


def report(name: str, results: dict[str, Any], save: bool) -> None:
  """Prints results as JSON and keeps them if asked.

  Args:
    name: of the file in `results/`.
    results: plain values.
    save: whether to write the file.
  """
  device = jax.devices()[0]
  results = {
    'device': device.device_kind,
    'devices': jax.device_count(),
    'cpu_cores': os.cpu_count(),
    'machine': platform.machine(),
    'python': platform.python_version(),
    'jax': jax.__version__,
    'flax': flax.__version__,
    **results,
  }
  text = json.dumps(results, indent=2)
  print(text)
  if save:
    (RESULTS / f'{name}.json').write_text(text + '\n')
