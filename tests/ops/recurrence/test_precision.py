"""Which digits of their factors matrix products may drop, on any device."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from jaxformers.ops import Modes
from jaxformers.ops import linear_attention
from jaxformers.ops import lti_convolution
from jaxformers.ops import outer_recurrence
from jaxformers.ops.segments import advance
from jaxformers.ops.segments import start

B, L, D, S = 2, 40, 4, 4


def products(function, *shapes):
  """Returns the precision of each product and of each in its gradient."""
  total = lambda *arrays: sum(map(jnp.sum, jax.tree.leaves(function(*arrays))))
  gradient = jax.jit(jax.grad(total, argnums=tuple(range(len(shapes)))))
  module = jax.export.export(gradient, platforms=('tpu',))(*shapes)
  found = re.findall(r'stablehlo.dot_general.*', module.mlir_module())
  assert found
  return {'precision = [HIGHEST, HIGHEST]' in line for line in found}


def shape(*sizes, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(sizes, dtype)


def convolved(x, *parts, packed):
  places = None
  if packed:
    places, _ = advance(start(B), jnp.ones((B, L), jnp.int32))
  modes = Modes(*(jax.lax.complex(part, part) for part in parts))
  return jax.tree.map(jnp.real, lti_convolution(x, modes, places=places))


def test_modes_are_multiplied_in_float32():
  for dtype in (jnp.float32, jnp.bfloat16):
    for packed in (False, True):
      run = functools.partial(convolved, packed=packed)
      shapes = shape(B, L, D, dtype=dtype), *[shape(D, S)] * 3
      assert products(run, *shapes) == {True}


@pytest.mark.parametrize(
  'run',
  [
    functools.partial(outer_recurrence, method='chunked', chunk=16),
    functools.partial(outer_recurrence, method='parallel_chunks', chunk=16),
    functools.partial(outer_recurrence, method='recurrent'),
    functools.partial(linear_attention, causal=False),
  ],
)
def test_keys_and_values_are_multiplied_with_the_digits_that_they_have(run):
  is_attention = run.func is linear_attention
  decays = () if is_attention else (shape(B, L, 2, S),)
  arrays = lambda dtype: (shape(B, L, 2, S, dtype=dtype),) * 3
  assert products(run, *arrays(jnp.float32), *decays) == {True}
  assert products(run, *arrays(jnp.bfloat16), *decays) == {False}
