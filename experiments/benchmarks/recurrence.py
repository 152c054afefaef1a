"""The elementwise linear recurrence beside the speed of memory and JAX's own.

1. The scan ladder: time as a multiple of a stream over the same arrays, which
   reads what the recurrence reads and writes what it writes without any
   recurrence. Forward it reads decays and inputs and writes states; backward it
   reads decays, states and gradients and writes two gradients. Beside our
   methods stands `jax.lax.associative_scan`, differentiated by JAX.
2. The mixers S5 and LRU beside the form in which they were published in JAX:
   complex products, batch by `jax.vmap`, and `jax.lax.associative_scan` over a
   decay that is copied to each step; and, up to 4096 steps and if PyTorch is
   installed, beside a loop over the steps in PyTorch.

On CPU, from about 4 M numbers per array, times are those of fresh pages of
memory rather than of arithmetic, for the stream as well: set
MALLOC_TOP_PAD_=MALLOC_MMAP_THRESHOLD_=MALLOC_TRIM_THRESHOLD_=4294967296 to keep
them. The results say whether this was set.

Run: python -m experiments.benchmarks.recurrence --save
Peers: pip install torch
Time: 8 minutes on 2 CPU cores, and 4 GiB of memory.
"""

import argparse
from collections.abc import Callable
import functools
import importlib.util
import os
import statistics
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import timing
from jaxformers.nn import GatedOutput
from jaxformers.nn.mixers import LRU
from jaxformers.nn.mixers import S5
from jaxformers.ops import discretize
from jaxformers.ops import linear_recurrence

CHANNELS = 256
LONGEST_LOOP = 4096
"""Steps up to which loops of PyTorch are timed."""

Run = Callable[..., Any]


def of_jax(decay: jax.Array, input: jax.Array) -> jax.Array:
  """Returns the states by JAX's own scan, with JAX's own derivative."""

  def combine(earlier, later):
    return later[0] * earlier[0], later[0] * earlier[1] + later[1]

  return jax.lax.associative_scan(combine, (decay, input), axis=1)[1]


def ours(method: str) -> Run:
  """Returns states by one of our methods."""
  return lambda *x: linear_recurrence(*x, method=method).states


def stream(decay: jax.Array, input: jax.Array) -> jax.Array:
  """Reads and writes what the recurrence does."""
  return decay * 0.5 + input


def stream_back(
  decay: jax.Array, input: jax.Array, states_bar: jax.Array
) -> tuple[jax.Array, ...]:
  """Reads and writes what the recurrence and its gradient do."""
  states = jax.lax.optimization_barrier(stream(decay, input))
  input_bar = decay * 0.5 + states_bar
  return states, input_bar, input_bar * states


def with_gradient(run: Run) -> Run:
  """Returns states and both gradients."""

  def both(decay, input, states_bar):
    states, pull = jax.vjp(run, decay, input)
    return states, *pull(states_bar)

  return both


def compare(
  functions: dict[str, Run],
  arrays: Any,
  rounds: int,
  loops: dict[str, Callable[[], Any]] | None = None,
) -> Any:
  """Returns seconds of the first, and ratios of all others to it.

  Args:
    functions: of the arrays, to be compiled.
    arrays: what they take.
    rounds: how often each is timed.
    loops: others, which need nothing.
  """
  ready = {
    name: functools.partial(jax.jit(function), *arrays)
    for name, function in functions.items()
  } | (loops or {})
  seconds = timing.seconds_in_turns(ready, rounds)
  first, *others = ready
  return {
    f'{first}_seconds': statistics.median(seconds[first]),
    **{n: timing.ratio(seconds[n], seconds[first]) for n in others},
  }


def ladder(length: int, rounds: int) -> dict[str, Any]:
  """Compares all methods with the stream.

  Args:
    length: number of steps.
    rounds: how often each is timed.
  """
  keys = jax.random.split(jax.random.key(0), 3)
  shape = 1, length, CHANNELS
  decay = jax.random.uniform(keys[0], shape)
  arrays = decay, *(jax.random.normal(key, shape) for key in keys[1:])
  methods = {
    **{m: ours(m) for m in ('auto', 'chunked', 'associative')},
    'of_jax': of_jax,
  }
  backward = {name: with_gradient(run) for name, run in methods.items()}
  return {
    'length': length,
    'forward': compare({'stream': stream, **methods}, arrays[:2], rounds),
    'forward_and_backward': compare(
      {'stream': stream_back, **backward}, arrays, rounds
    ),
  }


class System(NamedTuple):
  """A diagonal system as published code has it, complex."""

  decay_S: jax.Array
  in_SD: jax.Array
  out_DS: jax.Array
  skip_D: jax.Array


def published(system: System, x_BLD: jax.Array) -> jax.Array:
  """Runs a system as the published code of S5 and LRU does."""
  decay_S, in_SD, out_DS, skip_D = system

  def combine(earlier, later):
    return later[0] * earlier[0], later[0] * earlier[1] + later[1]

  def one(x_LD):
    decay_LS = decay_S * jnp.ones((x_LD.shape[0], decay_S.shape[0]))
    input_LS = jax.vmap(lambda x: in_SD @ x)(x_LD)
    _, states_LS = jax.lax.associative_scan(combine, (decay_LS, input_LS))
    y_LD = jax.vmap(lambda h: (out_DS @ h).real)(states_LS)
    return y_LD + skip_D * x_LD

  return jax.vmap(one)(x_BLD)


def in_torch(system: System, x_BLD: jax.Array) -> dict[str, Run]:
  """Returns loops over the steps, forward and with backward."""
  import torch

  given = [torch.tensor(np.asarray(z)).requires_grad_() for z in system]
  x = torch.tensor(np.asarray(x_BLD)).requires_grad_()

  def run():
    decay, to_states, from_states, skip = given
    state, states = 0, []
    for entering in (x.to(decay.dtype) @ to_states.T).unbind(1):
      state = decay * state + entering
      states.append(state)
    y = (torch.stack(states, dim=1) @ from_states.T).real
    return y + skip * x

  def forward():
    with torch.no_grad():
      return run().numpy()

  def both():
    return torch.autograd.grad((run() ** 2).sum(), [*given, x]) is None

  return {'forward': forward, 'forward_and_backward': both}


def system_of_s5(params: dict[str, jax.Array]) -> System:
  """Returns the system that parameters of ours make, S5 as published."""
  eigenvalues = jax.lax.complex(params['a_re_S'], params['a_im_S'])
  decay, gain = discretize(eigenvalues, jnp.exp(params['step_S']))
  in_DS = gain * jax.lax.complex(*params['in_NDS'])
  out_SD = 2 * jax.lax.complex(*params['out_NSD'])
  return System(decay, in_DS.T, out_SD.T, params['skip_D'])


def system_of_lru(params: dict[str, jax.Array]) -> System:
  """Returns the system that parameters of ours make, LRU as published."""
  log_decay = jax.lax.complex(
    -jnp.exp(params['nu_S']), jnp.exp(params['theta_S'])
  )
  in_DS = jnp.exp(params['gamma_S']) * jax.lax.complex(*params['in_NDS'])
  out_SD = jax.lax.complex(*params['out_NSD'])
  return System(jnp.exp(log_decay), in_DS.T, out_SD.T, params['skip_D'])


def mixer_costs(
  mixer: nn.Module,
  system: Callable[[Any], System],
  shape: tuple[int, int, int],
  rounds: int,
) -> dict[str, Any]:
  """Compares a mixer with the form in which it was published, and a loop.

  Args:
    mixer: without anything after its recurrence.
    system: makes of its parameters what published code has.
    shape: B, L and D.
    rounds: how often each is timed.
  """
  x_BLD = jax.random.normal(jax.random.key(0), shape)
  params = jax.jit(mixer.init)(jax.random.key(1), x_BLD)['params']
  run = lambda params, x_BLD: mixer.apply({'params': params}, x_BLD)[0]
  peer = lambda params, x_BLD: published(system(params), x_BLD)
  arrays = params, x_BLD
  out_BLD = jax.jit(run)(*arrays)
  differences = {'published': out_BLD - jax.jit(peer)(*arrays)}
  loops = {}
  if importlib.util.find_spec('torch') and shape[1] <= LONGEST_LOOP:
    loops = in_torch(system(params), x_BLD)
    differences['torch'] = out_BLD - loops['forward']()

  def gradient(run):
    loss = lambda *x: jnp.sum(run(*x) ** 2)
    return jax.value_and_grad(loss, argnums=(0, 1))

  functions = {'ours': run, 'published': peer}
  gradients = {name: gradient(run) for name, run in functions.items()}
  ways = {'forward': functions, 'forward_and_backward': gradients}
  return {
    'shape': shape,
    'largest_difference': {
      name: float(jnp.abs(x).max()) for name, x in differences.items()
    },
    **{
      way: compare(
        functions, arrays, rounds, {'torch': loops[way]} if loops else None
      )
      for way, functions in ways.items()
    },
  }


def measure(
  lengths: tuple[int, ...],
  shapes: tuple[tuple[int, int, int], ...],
  rounds: int,
) -> dict[str, Any]:
  """Measures everything.

  Args:
    lengths: of the ladder.
    shapes: B, L and D of the mixers.
    rounds: how often each thing is timed.
  """
  plain = GatedOutput(gate='none', activation='identity')
  results = {
    'malloc_top_pad': os.environ.get('MALLOC_TOP_PAD_'),
    'ladder': [ladder(length, rounds) for length in lengths],
    's5': [],
    'lru': [],
  }
  for shape in shapes:
    width = shape[-1]
    s5 = S5(state_size=2 * width, output=plain)
    lru = LRU(state_size=width, r_min=0.9, r_max=0.999, output=plain)
    results['s5'].append(mixer_costs(s5, system_of_s5, shape, rounds))
    results['lru'].append(mixer_costs(lru, system_of_lru, shape, rounds))
  return results


def main() -> None:
  """Measures and reports."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--save', action='store_true', help='keep the results')
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument(
    '--lengths', type=int, nargs='+', default=[1024, 4096, 16384, 65536]
  )
  arguments = parser.parse_args()
  lengths = tuple(arguments.lengths)
  shapes = (8, 1024, 128), *((1, length, CHANNELS) for length in lengths)
  results = measure(lengths, shapes, arguments.rounds)
  timing.report('recurrence', results, arguments.save)


if __name__ == '__main__':
  main()
