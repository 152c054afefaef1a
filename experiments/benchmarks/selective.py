"""The fused selective scan beside forms that hold all decays and states.

First the recurrence alone, forward and forward with backward: `fused`, and
`sequential` and `associative`, which make the arrays of all decays, inputs and
states and scan those, where they need less than 4 GiB; with the temporary memory
of each. Then a whole Mamba block: ours, the published JAX form (everything materialised, an associative
scan, as in mamba-jax), and the reference of the authors in PyTorch, a loop over
tokens, if PyTorch is installed. In turns within one run.

The allocator is left as it is. Materialised forms gain from
`MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_`, set large, since much of
their time goes into fresh pages; the fused form does not need it. Set them to
compare, and the result says so.

Run: python -m experiments.benchmarks.selective --save
Peers: pip install torch
Expected: forward with backward the fused form is at least 5 times as fast as
either other form, in at most 5 % of their temporary memory; the block is at
least 3 times as fast as the published form.
Time: about 6 minutes on 2 CPU cores.
"""

import argparse
from collections.abc import Callable
import functools
import importlib.util
import os
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import timing
from jaxformers.nn.mixers import Mamba
from jaxformers.ops import selective_recurrence

METHODS = 'fused', 'sequential', 'associative'
MOST_MEMORY = 4 * 2**30
"""Temporary bytes above which a program is not run."""

Function = Callable[..., Any]


def arrays(length: int, channels: int, states: int) -> list[jax.Array]:
  """Returns input, raw steps, a, b and c of one sequence."""
  keys = jax.random.split(jax.random.key(0), 4)
  rates_S = -jnp.arange(1.0, states + 1)
  return [
    jax.random.normal(keys[0], (1, length, channels)),
    jax.random.normal(keys[1], (1, length, channels)) - 3,
    jnp.broadcast_to(rates_S, (channels, states)),
    jax.random.normal(keys[2], (1, length, states)),
    jax.random.normal(keys[3], (1, length, states)),
  ]


def recurrence(method: str) -> Function:
  """Returns the recurrence with softplus inside, of five arrays."""
  return lambda *inputs: selective_recurrence(
    *inputs, softplus=True, method=method
  ).out_BLE


def ways(function: Function, inputs: list[Any]) -> dict[str, Any]:
  """Returns compiled programs of forward, and of forward with backward."""
  gradient = jax.grad(
    lambda *inputs: jnp.sin(function(*inputs)).sum(), range(len(inputs))
  )
  return {
    'forward': jax.jit(function).lower(*inputs).compile(),
    'both': jax.jit(gradient).lower(*inputs).compile(),
  }


def of_recurrence(
  length: int, channels: int, states: int, rounds: int
) -> dict[str, float]:
  """Compares the methods of the recurrence.

  Args:
    length: L.
    channels: E.
    states: S.
    rounds: how often each is timed.
  """
  inputs = arrays(length, channels, states)
  programs = {m: ways(recurrence(m), inputs) for m in METHODS}
  memory = {
    m: by_way['both'].memory_analysis().temp_size_in_bytes
    for m, by_way in programs.items()
  }
  seconds = timing.seconds_in_turns(
    {
      f'{method} {way}': functools.partial(program, *inputs)
      for method, by_way in programs.items()
      if memory[method] < MOST_MEMORY
      for way, program in by_way.items()
    },
    rounds,
  )
  results = {'fused_temporary_megabytes': memory['fused'] / 2**20}
  for way, key in (('forward', 'forward'), ('both', 'forward_backward')):
    own = seconds[f'fused {way}']
    results[f'{key}_ms'] = 1e3 * statistics.median(own)
    for method in METHODS[1:]:
      if f'{method} {way}' in seconds:
        results[f'{key}_speed_relative_to_{method}'] = timing.ratio(
          seconds[f'{method} {way}'], own
        )
  for method in METHODS[1:]:
    results[f'memory_relative_to_{method}'] = memory['fused'] / memory[method]
  return results


def published(params: Any, x_BLD: jax.Array) -> jax.Array:
  """A Mamba block as JAX ports write it: all states, an associative scan."""
  x_BLF = x_BLD @ params['in']['w_DF']
  weight_WF = params['convolution']['w_WF']
  x_BLF = jax.lax.conv_general_dilated(
    x_BLF,
    weight_WF[:, None],
    (1,),
    [(len(weight_WF) - 1, 0)],
    dimension_numbers=('NWC', 'WIO', 'NWC'),
    feature_group_count=x_BLF.shape[-1],
  )
  x_BLF = jax.nn.silu(x_BLF + params['convolution']['b_F'])
  rank, states = len(params['step']['w_RF']), params['a_log_FS'].shape[1]
  step_BLR, b_BLS, c_BLS = jnp.split(
    x_BLF @ params['select']['w_FN'], (rank, rank + states), axis=-1
  )
  step_BLF = jax.nn.softplus(
    step_BLR @ params['step']['w_RF'] + params['step_bias_F']
  )
  decay_BLFS = jnp.exp(step_BLF[..., None] * -jnp.exp(params['a_log_FS']))
  write_BLFS = (step_BLF * x_BLF)[..., None] * b_BLS[:, :, None]
  _, state_BLFS = jax.lax.associative_scan(
    lambda one, other: (one[0] * other[0], other[0] * one[1] + other[1]),
    (decay_BLFS, write_BLFS),
    axis=1,
  )
  y_BLF = jnp.einsum('BLFS,BLS->BLF', state_BLFS, c_BLS)
  y_BLF += params['skip_F'] * x_BLF
  y_BLF *= jax.nn.silu(x_BLD @ params['gate']['w_DF'])
  return y_BLF @ params['out']['w_FD']


def of_torch(params: Any, x_BLD: jax.Array) -> dict[str, Function]:
  """The same in PyTorch, with a loop over tokens, forward and with backward.

  Tokens are taken apart once. The authors' code indexes them one by one, whose
  backward pass makes an array of all tokens for each: time O(L^2).
  """
  import torch

  tensor = lambda z: torch.tensor(np.asarray(z)).requires_grad_()
  p = jax.tree.map(tensor, params)
  x = tensor(x_BLD)

  def run():
    functional = torch.nn.functional
    weight_WF = p['convolution']['w_WF']
    h = (x @ p['in']['w_DF']).transpose(1, 2)
    h = functional.conv1d(
      functional.pad(h, (len(weight_WF) - 1, 0)),
      weight_WF.T[:, None],
      p['convolution']['b_F'],
      groups=h.shape[1],
    )
    h = functional.silu(h).transpose(1, 2)
    rank, states = len(p['step']['w_RF']), p['a_log_FS'].shape[1]
    selected = h @ p['select']['w_FN']
    low, b, c = selected.split([rank, states, states], dim=-1)
    step = functional.softplus(low @ p['step']['w_RF'] + p['step_bias_F'])
    decay = torch.exp(step[..., None] * -torch.exp(p['a_log_FS']))
    write = (step * h)[..., None] * b[:, :, None]
    state = torch.zeros_like(decay[:, 0])
    out = []
    by_token = (z.unbind(1) for z in (decay, write, c))
    for decay_i, write_i, c_i in zip(*by_token, strict=True):
      state = decay_i * state + write_i
      out.append(torch.einsum('bfs,bs->bf', state, c_i))
    y = torch.stack(out, dim=1) + p['skip_F'] * h
    y = y * functional.silu(x @ p['gate']['w_DF'])
    return y @ p['out']['w_FD']

  def forward():
    with torch.no_grad():
      return run() is None

  leaves = [x, *jax.tree.leaves(p)]
  return {
    'forward': forward,
    'both': lambda: torch.autograd.grad(run().sin().sum(), leaves) is None,
  }


def of_block(
  length: int, width: int, states: int, rounds: int
) -> dict[str, float]:
  """Compares whole blocks, after making sure that they compute the same.

  Args:
    length: L.
    width: D; half the number of channels.
    states: S.
    rounds: how often each is timed.
  """
  mixer = Mamba(state_size=states)
  x_BLD = jax.random.normal(jax.random.key(1), (1, length, width))
  params = jax.jit(mixer.init)(jax.random.key(0), x_BLD)['params']
  ours = lambda params, x_BLD: mixer.apply({'params': params}, x_BLD)[0]
  inputs = [params, x_BLD]
  programs = {'ours': ways(ours, inputs), 'published': ways(published, inputs)}
  np.testing.assert_allclose(
    programs['ours']['forward'](*inputs),
    programs['published']['forward'](*inputs),
    rtol=1e-4,
    atol=1e-4,
  )
  timed = {
    f'{name} {way}': functools.partial(program, *inputs)
    for name, by_way in programs.items()
    for way, program in by_way.items()
  }
  if importlib.util.find_spec('torch'):
    for way, function in of_torch(params, x_BLD).items():
      timed[f'torch {way}'] = function
  seconds = timing.seconds_in_turns(timed, rounds)
  results = {}
  for way, key in (('forward', 'forward'), ('both', 'forward_backward')):
    own = seconds[f'ours {way}']
    results[f'{key}_ms'] = 1e3 * statistics.median(own)
    for name in ('published', 'torch'):
      if f'{name} {way}' in seconds:
        results[f'{key}_speed_relative_to_{name}'] = timing.ratio(
          seconds[f'{name} {way}'], own
        )
  return results


def measure(
  lengths: tuple[int, ...],
  channels: int,
  states: tuple[int, ...],
  rounds: int,
) -> dict[str, Any]:
  """Measures everything.

  Args:
    lengths: L of the recurrence; the second is that of the block.
    channels: E.
    states: numbers per channel S; the first is that of the block.
    rounds: how often each thing is timed.
  """
  return {
    'channels': channels,
    'allocator': {
      name: value
      for name, value in os.environ.items()
      if name.startswith('MALLOC_')
    },
    **{
      f'recurrence_states_{size}': {
        str(length): of_recurrence(length, channels, size, rounds)
        for length in lengths
      }
      for size in states
    },
    'mamba_block': of_block(lengths[1], channels // 2, states[0], rounds),
  }


def main() -> None:
  """Measures and reports."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--save', action='store_true', help='keep the results')
  arguments = parser.parse_args()
  results = measure((1024, 4096, 16384, 65536), 256, (16, 64), rounds=5)
  timing.report('selective', results, arguments.save)


if __name__ == '__main__':
  main()
