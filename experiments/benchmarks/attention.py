"""Blockwise attention beside `jax.nn.dot_product_attention`.

Causal self-attention, forward and forward with backward, in turns within one
run. Where scores would not fit comfortably, only the blockwise form runs; what
is compared there is its own cost: of a causal mask and of a window against full
attention, and its memory at two lengths.

Run: python -m experiments.benchmarks.attention --save
Time: about 3 minutes on 2 CPU cores.
"""

import argparse
from collections.abc import Callable
import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import timing
from jaxformers.ops import Causal
from jaxformers.ops import Mask
from jaxformers.ops import NoMask
from jaxformers.ops import Window
from jaxformers.ops import attend

HEADS, WIDTH = 4, 64
Attend = Callable[..., jax.Array]


def ours(mask: Mask) -> Attend:
  """Returns blockwise attention with that mask."""
  return functools.partial(attend, mask=mask, implementation='blockwise')


def peer(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """JAX's own attention, causal."""
  return jax.nn.dot_product_attention(query, key, value, is_causal=True)


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


def against_peer(length: int, dtype: Any, rounds: int) -> dict[str, float]:
  """Times both at one length."""
  inputs = arrays(length, dtype)
  programs = {
    'forward': jax.jit(ours(Causal())),
    'both': jax.jit(gradient(ours(Causal()))),
    'peer_forward': jax.jit(peer),
    'peer_both': jax.jit(gradient(peer)),
  }
  seconds = timing.seconds_in_turns(
    {name: functools.partial(f, *inputs) for name, f in programs.items()},
    rounds,
  )
  return {
    'forward_ms': 1e3 * statistics.median(seconds['forward']),
    'forward_backward_ms': 1e3 * statistics.median(seconds['both']),
    'forward_speed_relative_to_jax': timing.ratio(
      seconds['peer_forward'], seconds['forward']
    ),
    'forward_backward_speed_relative_to_jax': timing.ratio(
      seconds['peer_both'], seconds['both']
    ),
  }


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
    lengths: where the peer runs as well.
    long: where it does not.
    rounds: how often each thing is timed.
  """
  results = {
    f'{jnp.dtype(dtype).name}_{length}': against_peer(length, dtype, rounds)
    for dtype in (jnp.float32, jnp.bfloat16)
    for length in lengths
  }
  small, large = temporary_bytes(long // 4), temporary_bytes(long)
  return {
    'batch_heads_width': [1, HEADS, WIDTH],
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
  results = measure((512, 2048, 4096), long=16384, rounds=7)
  timing.report('attention', results, arguments.save)


if __name__ == '__main__':
  main()
