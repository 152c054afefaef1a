"""The recurrence over steps that are split among devices."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from jaxformers.ops import linear_recurrence
from jaxformers.ops import sharded_linear_recurrence

B, L, S = 2, 32, 3
rng = np.random.default_rng(0)
INPUT = rng.normal(size=(B, L, S))
INITIAL = rng.normal(size=(B, S))
DECAY = rng.uniform(-1, 1, size=(B, L, S))
FLAGS = {'reset': rng.random((B, L)) < 0.1, 'skip': rng.random((B, L)) < 0.1}
SPLIT, WHOLE = PartitionSpec(None, 'steps'), PartitionSpec()


def loss(run, *arrays):
  states, last = run(*arrays)
  weight = jnp.arange(states.shape[1])[:, None]
  return jnp.sum(jnp.sin(states) * weight) + jnp.sum(jnp.cos(last))


def sharded(decay, input, initial, flags=None, **options):
  mesh = jax.make_mesh((8,), ('steps',), axis_types=(AxisType.Auto,))

  def local(decay, input, initial, flags):
    return tuple(
      sharded_linear_recurrence(
        decay, input, initial, axis_name='steps', **flags, **options
      )
    )

  run = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(SPLIT if decay.ndim == 3 else WHOLE, SPLIT, WHOLE, SPLIT),
    out_specs=(SPLIT, WHOLE),
  )
  return run(decay, input, initial, flags or {})


@pytest.mark.parametrize(
  ('decay', 'flags', 'options'),
  [
    (DECAY, FLAGS, {}),
    (DECAY[0, 0], None, {'reverse': True, 'method': 'chunked', 'chunk': 3}),
  ],
)
def test_eight_devices_equal_one_in_all_derivatives(decay, flags, options):
  @functools.partial(jax.jit, static_argnums=0)
  def results(run, *point):
    gradient = jax.grad(functools.partial(loss, run), argnums=(0, 1, 2))
    return tuple(run(*point)), jax.jvp(gradient, point, point)

  reverse = options.get('reverse', False)
  with jax.enable_x64(True):
    actual, expected = (
      results(functools.partial(run, **more), decay, INPUT, INITIAL)
      for run, more in (
        (sharded, {'flags': flags, **options}),
        (linear_recurrence, {**(flags or {}), 'reverse': reverse}),
      )
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
    actual,
    expected,
  )


def test_devices_exchange_states_and_nothing_as_long_as_the_sequence():
  length = 4096
  shape = jax.ShapeDtypeStruct((B, length, S), jnp.float32)
  initial = jax.ShapeDtypeStruct((B, S), jnp.float32)
  gradient = jax.jit(jax.grad(functools.partial(loss, sharded), (0, 1, 2)))
  text = gradient.lower(shape, shape, initial).compile().as_text()
  exchanged = re.findall(
    r'= \(?(\w+\[[\d,]*\].*?) '
    r'(?:all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(',
    text,
  )
  sizes = [
    np.prod([int(n) for n in dims.split(',') if n])
    for found in exchanged
    for dims in re.findall(r'\w+\[([\d,]*)\]', found)
  ]
  assert sizes
  assert max(sizes) <= 8 * B * S
