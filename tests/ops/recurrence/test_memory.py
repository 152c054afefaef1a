"""What fused recurrences keep for the backward pass, by what XLA allocates."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxformers.ops import rg_lru
from jaxformers.ops import selective_recurrence
from jaxformers.ops import wkv

L, E, S = 2048, 32, 16


def temporaries(run, *shapes):
  """Returns how many numbers a gradient holds besides arguments and results."""
  loss = lambda *arrays: jnp.sum(run(*arrays)[0] ** 2)
  gradient = jax.jit(jax.grad(loss, argnums=tuple(range(len(shapes)))))
  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  compiled = gradient.lower(*shapes).compile()
  return compiled.memory_analysis().temp_size_in_bytes / 4


def test_a_fused_selective_scan_takes_a_twentieth_of_one_with_all_states():
  x, b, shapes = (1, L, E), (1, L, S), ((E, S), (E,))

  def by(method):
    run = functools.partial(selective_recurrence, softplus=True, method=method)
    return temporaries(run, x, x, shapes[0], b, b, shapes[1])

  # The associative form holds more than the sequential one.
  assert by('fused') < 0.05 * by('sequential')


@pytest.mark.parametrize(('operator', 'count'), [(wkv, 2), (rg_lru, 3)])
def test_others_hold_no_state_of_each_token(operator, count):
  def run(*arrays):
    *arrays, gain = arrays
    gains = (gain, gain) if operator is wkv else (gain,)
    return operator(*arrays, *gains)

  shapes = *[(1, L, E)] * count, (E,)
  # Inputs and their gradients in chunks, and little besides.
  assert temporaries(run, *shapes) < (count + 3) * L * E
