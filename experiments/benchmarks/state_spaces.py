"""Training S4D in chunks, beside convolutions by Fourier transforms.

One sequence, 256 channels of 16 or 64 real states each; forward, and forward with
backward down to eigenvalues, inputs, readouts and steps. In turns within one run:

- `chunked`: what `S4D` does;
- `fft`: a Fourier transform with the kernel from powers in two levels;
- `direct`: the same with the kernel from a matrix of powers `[D, S, L]`, as in the
  short published implementations. It runs as far as that fits;
- `sequential`: step by step, forward only.

Then memory, as compiled. The bar: training in chunks is at least 1.8 times as fast
as `direct`.

Run: python -m experiments.benchmarks.state_spaces --save
Time: about 8 minutes on 2 CPU cores, and 8 GiB of memory.
"""

import argparse
from collections.abc import Callable
import functools
import statistics
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import timing
from jaxformers.ops import Modes
from jaxformers.ops import diagonal_form
from jaxformers.ops import discretize
from jaxformers.ops import kernel_convolution
from jaxformers.ops import lti_convolution

DIRECT = 16384
"""The direct kernel runs up to this length."""
Parameters = tuple[Array, ...]


def parameters(width: int, states: int) -> Parameters:
  """Returns real and imaginary eigenvalues and readouts, and steps."""
  eigenvalues_S, _ = diagonal_form('lin', states)
  shape = width, states // 2
  keys = jax.random.split(jax.random.key(0), 3)
  log_step_D1 = jax.random.uniform(
    keys[0], (width, 1), minval=np.log(1e-3), maxval=np.log(1e-1)
  )
  return (
    jnp.broadcast_to(eigenvalues_S.real, shape),
    jnp.broadcast_to(eigenvalues_S.imag, shape),
    jax.random.normal(keys[1], shape),
    jax.random.normal(keys[2], shape),
    log_step_D1,
  )


def sampled(params: Parameters) -> tuple[Modes, Array]:
  """Returns the system in discrete time, and the logarithms of its decays."""
  real_DS, imag_DS, readout_re_DS, readout_im_DS, log_step_D1 = params
  eigenvalues_DS = jax.lax.complex(real_DS, imag_DS)
  step_D1 = jnp.exp(log_step_D1)
  decay_DS, gain_DS = discretize(eigenvalues_DS, step_D1)
  readout_DS = 2 * jax.lax.complex(readout_re_DS, readout_im_DS)
  return Modes(decay_DS, gain_DS, readout_DS), step_D1 * eigenvalues_DS


def by(method: str) -> Callable[[Array, Parameters], Array]:
  """Returns our convolution by a method."""

  def run(x_BLD, params):
    return lti_convolution(x_BLD, sampled(params)[0], method=method).out

  return run


def direct(x_BLD: Array, params: Parameters) -> Array:
  """Convolves with a kernel from a matrix of powers."""
  modes, log_decay_DS = sampled(params)
  steps_L = jnp.arange(x_BLD.shape[1])
  powers_DSL = jnp.exp(log_decay_DS[..., None] * steps_L)
  weight_DS = modes.input * modes.readout
  kernel_DL = jnp.einsum('DS,DSL->DL', weight_DS, powers_DSL).real
  return kernel_convolution(x_BLD, kernel_DL)


def gradient(function: Callable[..., Array]) -> Callable[..., Any]:
  """Returns the gradient of a sum of squares."""
  return jax.grad(lambda *inputs: jnp.sum(function(*inputs) ** 2), (0, 1))


METHODS = {'chunked': by('chunked'), 'fft': by('fft'), 'direct': direct}


def at_length(
  length: int, width: int, states: int, rounds: int, longest: int
) -> dict[str, Any]:
  """Times and weighs all methods at one length."""
  inputs = (
    jax.random.normal(jax.random.key(1), (1, length, width)),
    parameters(width, states),
  )
  functions, memory = {}, {}
  for name, function in METHODS.items():
    forward, both = jax.jit(function), jax.jit(gradient(function))
    compiled = both.lower(*inputs).compile()
    memory[name] = compiled.memory_analysis().temp_size_in_bytes
    if name != 'direct' or length <= longest:
      functions[f'{name} forward'] = functools.partial(forward, *inputs)
      functions[f'{name} both'] = functools.partial(both, *inputs)
  functions['sequential forward'] = functools.partial(
    jax.jit(by('sequential')), *inputs
  )
  seconds = timing.seconds_in_turns(functions, rounds)
  results: dict[str, Any] = {
    f'{name.replace(" ", "_")}_ms': 1e3 * statistics.median(samples)
    for name, samples in seconds.items()
  }
  for way in ('forward', 'both'):
    for name in ('fft', 'direct', 'sequential'):
      if f'{name} {way}' in seconds:
        results[f'chunked_{way}_speed_relative_to_{name}'] = timing.ratio(
          seconds[f'{name} {way}'], seconds[f'chunked {way}']
        )
  for name, size in memory.items():
    results[f'{name}_temporary_bytes'] = size
  return results


def measure(
  lengths: tuple[int, ...],
  *,
  width: int,
  states: tuple[int, ...],
  rounds: int,
  longest: int = DIRECT,
) -> dict[str, Any]:
  """Measures everything.

  Args:
    lengths: of the sequences.
    width: channels.
    states: numbers per channel, counted as real.
    rounds: how often each is timed.
    longest: length up to which the direct kernel is timed.
  """
  return {
    'batch_width': [1, width],
    **{
      f'states_{size}': {
        str(length): at_length(length, width, size, rounds, longest)
        for length in lengths
      }
      for size in states
    },
  }


def main() -> None:
  """Measures and reports."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--save', action='store_true', help='keep the results')
  arguments = parser.parse_args()
  lengths = 1024, 4096, 16384, 65536
  results = measure(lengths, width=256, states=(16, 64), rounds=5)
  timing.report('state_spaces', results, arguments.save)


if __name__ == '__main__':
  main()
