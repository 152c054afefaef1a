"""Blockwise attention beside JAX's own, tokamax and PyTorch.

Causal self-attention, forward and forward with backward, in turns within one
run. JAX's own attention runs as far as its scores fit comfortably; tokamax
(`xla_chunked`) and PyTorch (`scaled_dot_product_attention`) run if they are
installed. Then the cost of masks, and memory at two lengths.

Run: python -m experiments.benchmarks.attention --save
Peers: pip install torch tokamax
Time: about 6 minutes on 2 CPU cores.
"""

import argparse
from collections.abc import Callable
import functools
import importlib.util
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import timing
from jaxformers.ops import Causal
from jaxformers.ops import Mask
from jaxformers.ops import NoMask
from jaxformers.ops import Window
from jaxformers.ops import attend

HEADS, WIDTH = 4, 64
MATERIALISED = 4096
"""JAX's own attention runs up to this length."""
Attend = Callable[..., jax.Array]


def ours(mask: Mask) -> Attend:
  """Returns blockwise attention with that mask."""
  return functools.partial(attend, mask=mask, implementation='blockwise')


def of_jax(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """JAX's own attention, causal."""
  return jax.nn.dot_product_attention(query, key, value, is_causal=True)


def of_tokamax(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """The chunked attention of tokamax, causal."""
  import tokamax

  return tokamax.dot_product_attention(
    query, key, value, is_causal=True, implementation='xla_chunked'
  )


def arrays(length: int, dtype: Any) -> list[jax.Array]:
  """Returns queries, keys and values."""
  shape = 1, length, HEADS, WIDTH
  return [
    jax.random.normal(jax.random.key(i), shape).astype(dtype) for i in range(3)
  ]


def gradient(function: Attend) -> Attend:
  """Returns the gradient of a sum over the output."""
  return jax.grad(
    lambda *inputs: function(*inputs).astype(jnp.float32).sum(),
    argnums=(0, 1, 2),
  )


def of_torch(inputs: list[jax.Array]) -> dict[str, Callable[[], Any]]:
  """Returns PyTorch's attention of the same numbers, both ways."""
  import torch

  tensors = [
    torch.tensor(np.asarray(x, np.float32).swapaxes(1, 2).copy())
    .to(torch.float32 if x.dtype == jnp.float32 else torch.bfloat16)
    .requires_grad_()
    for x in inputs
  ]

  def run():
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(*tensors, is_causal=True)

  def forward():
    with torch.no_grad():
      run()

  def both():
    return torch.autograd.grad(run().float().sum(), tensors) and None

  return {'forward': forward, 'both': both}


def programs(length: int, dtype: Any) -> dict[str, Callable[[], Any]]:
  """Returns what is timed at one length, by name."""
  inputs = arrays(length, dtype)
  of_xla = {'ours': ours(Causal())}
  if length <= MATERIALISED:
    of_xla['jax'] = of_jax
  if importlib.util.find_spec('tokamax'):
    of_xla['tokamax'] = of_tokamax
  timed = {}
  for name, function in of_xla.items():
    forward, both = jax.jit(function), jax.jit(gradient(function))
    timed[f'{name} forward'] = functools.partial(forward, *inputs)
    timed[f'{name} both'] = functools.partial(both, *inputs)
  if importlib.util.find_spec('torch'):
    for name, function in of_torch(inputs).items():
      timed[f'torch {name}'] = function
  return timed


def against_peers(
  length: int, dtype: Any, rounds: int, peak: float
) -> dict[str, float]:
  """Times all of them at one length.

  Args:
    length: L = M.
    dtype: of queries, keys and values.
    rounds: how often each is timed.
    peak: float32 operations per second of this machine's matrix products.
  """
  seconds = timing.seconds_in_turns(programs(length, dtype), rounds)
  results = {}
  for way, key in (('forward', 'forward'), ('both', 'forward_backward')):
    own = seconds[f'ours {way}']
    results[f'{key}_ms'] = 1e3 * statistics.median(own)
    for name in ('jax', 'tokamax', 'torch'):
      if f'{name} {way}' in seconds:
        results[f'{key}_speed_relative_to_{name}'] = timing.ratio(
          seconds[f'{name} {way}'], own
        )
  if dtype == jnp.float32:
    operations = 2.0 * HEADS * length**2 * WIDTH
    results['forward_fraction_of_peak'] = (
      operations / statistics.median(seconds['ours forward']) / peak
    )
  return results


def by_mask(length: int, rounds: int) -> dict[str, float]:
  """Compares the cost of masks at one length, forward."""
  inputs = arrays(length, jnp.float32)
  masks = {'full': NoMask(), 'causal': Causal(), 'window_256': Window(256)}
  seconds = timing.seconds_in_turns(
    {
      name: functools.partial(jax.jit(ours(mask)), *inputs)
      for name, mask in masks.items()
    },
    rounds,
  )
  return {
    f'{name}_relative_to_full': timing.ratio(seconds[name], seconds['full'])
    for name in ('causal', 'window_256')
  }


def temporary_bytes(length: int) -> int:
  """Returns the temporary memory of forward and backward, compiled."""
  compiled = jax.jit(gradient(ours(Causal())))
  analysis = compiled.lower(*arrays(length, jnp.float32)).compile()
  return analysis.memory_analysis().temp_size_in_bytes


def measure(lengths: tuple[int, ...], long: int, rounds: int) -> dict[str, Any]:
  """Measures everything.

  Args:
    lengths: where peers run as well.
    long: where masks and memory are compared.
    rounds: how often each thing is timed; less often at the longest.
  """
  product, operations = timing.matrix_product(min(1024, long))
  seconds = timing.seconds_in_turns({'product': product}, rounds)['product']
  peak = operations / min(seconds)
  results = {
    f'{jnp.dtype(dtype).name}_{length}': against_peers(
      length, dtype, rounds if length <= 4096 else max(rounds // 3, 1), peak
    )
    for dtype in (jnp.float32, jnp.bfloat16)
    for length in lengths
  }
  small, large = temporary_bytes(long // 4), temporary_bytes(long)
  return {
    'peers': {
      name: importlib.import_module(name).__version__
      for name in ('tokamax', 'torch')
      if importlib.util.find_spec(name)
    },
    'batch_heads_width': [1, HEADS, WIDTH],
    'matrix_product_gflops': peak / 1e9,
    **results,
    f'masks_{long}': by_mask(long, max(rounds // 3, 1)),
    f'temporary_bytes_{long // 4}': small,
    f'temporary_bytes_{long}': large,
    'memory_growth': large / small,
  }


def main() -> None:
  """Measures and reports."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--save', action='store_true', help='keep the results')
  arguments = parser.parse_args()
  del sys.argv[1:]  # tokamax reads them as well and knows none of ours.
  results = measure((512, 2048, 4096, 16384), long=16384, rounds=5)
  timing.report('attention', results, arguments.save)


if __name__ == '__main__':
  main()
