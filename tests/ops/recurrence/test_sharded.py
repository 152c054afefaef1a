"""Recurrences over tokens that are split among devices."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from jaxformers.ops import Rotary
from jaxformers.ops import linear_attention
from jaxformers.ops import linear_recurrence
from jaxformers.ops import lti_convolution
from jaxformers.ops import retention
from jaxformers.ops import rg_lru
from jaxformers.ops import selective_recurrence
from jaxformers.ops import short_convolution
from jaxformers.ops import ssd
from jaxformers.ops import wkv
from jaxformers.ops.recurrence import Modes
from jaxformers.ops.recurrence import WKVState
from jaxformers.ops.segments import advance
from jaxformers.ops.segments import start

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
      linear_recurrence(
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


# Of four shares with three tokens each, segment 1 fills three, and segment 3
# goes on past one that is all padding.
SEGMENTS = np.array([
  [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2],
  [0, 3, 3, 0, 0, 0, 3, 0, 3, 3, 4, 4],
])  # fmt: skip
PARTS = jnp.real, jnp.imag
M, D, H, K = SEGMENTS.shape[1], 4, 2, 2


def drawn(*shape, least=-1.0, most=1.0):
  return rng.uniform(least, most, size=shape)


def tokens(*shape, **range):
  return drawn(B, M, *shape, **range)


def modes():
  decay = drawn(D, 3, least=0.5, most=0.9) * np.exp(1j * drawn(D, 3))
  return Modes(decay, *(drawn(D, 3) + 1j * drawn(D, 3) for _ in range(2)))


def kept_memory(query, key, value, initial, **options):
  options |= {'position': Rotary(), 'chunk': 2}
  return retention(query, key, value, initial, **options)


def attended(query, key, value, initial=None, **options):
  del initial
  return linear_attention(query, key, value, position=Rotary(), **options)


# Operator, what has tokens, what is the same for all, and an initial state.
OPERATORS = {
  'short': (
    lambda x, w, buffer, **options: short_convolution(
      x, w, None, buffer, **options
    ),
    (tokens(D),),
    (drawn(4, D),),
    drawn(B, 3, D),
  ),
  'shorter': (
    lambda x, w, buffer, **options: short_convolution(
      x, w, None, buffer, **options
    ),
    (tokens(D),),
    (drawn(6, D),),
    drawn(B, 5, D),
  ),
  'rg_lru': (
    rg_lru,
    (tokens(D), tokens(D), tokens(D)),
    (drawn(D, least=-4),),
    drawn(B, D),
  ),
  'wkv': (
    wkv,
    (tokens(D), tokens(D)),
    (drawn(D, most=-0.1), drawn(D)),
    WKVState(drawn(B, D), drawn(B, D, least=0.5), drawn(B, D)),
  ),
  'selective': (
    lambda x, step, b, a, c, initial, **options: selective_recurrence(
      x, step, a, b, c, None, initial, softplus=True, **options
    ),
    (tokens(D), tokens(D), tokens(3)),
    (drawn(D, 3, most=-0.1), drawn(D, 3)),
    drawn(B, 3, D),
  ),
  'ssd': (
    lambda x, step, b, c, a, initial, **options: ssd(
      x, step, a, b, c, None, initial, **options
    ),
    (tokens(H, K), tokens(H, least=0.1), tokens(1, 3), tokens(1, 3)),
    (drawn(H, most=-0.1),),
    drawn(B, H, 3, K),
  ),
  'lti': (lti_convolution, (tokens(D),), (modes(),), drawn(B, D, 3) + 0j),
  'linear_attention_both_ways': (
    functools.partial(attended, causal=False, normalize=False),
    (tokens(H, K), tokens(H, K), tokens(H, K)),
    (),
    None,
  ),
  'retention': (
    functools.partial(kept_memory, stabilise='decay'),
    (tokens(H, K), tokens(H, K), tokens(H, K)),
    (),
    None,
  ),
}


@pytest.mark.parametrize('name', OPERATORS)
def test_every_operator_gives_on_four_devices_what_it_gives_on_one(name):
  operator, split, same, initial = OPERATORS[name]
  mesh = jax.make_mesh((4,), ('steps',), axis_types=(AxisType.Auto,))

  def local(split, same, initial, places):
    return tuple(operator(*split, *same, initial, places=places))

  def sharded(split, same, initial, places):
    def run(split, same, initial, places):
      arrays = *split, *same, initial
      return tuple(operator(*arrays, places=places, axis_name='steps'))

    return jax.shard_map(
      run,
      mesh=mesh,
      in_specs=(SPLIT, WHOLE, WHOLE, SPLIT),
      out_specs=(SPLIT, WHOLE),
    )(split, same, initial, places)

  def results(run, split, same, initial):
    def total(split, same):
      out, last = run(split, same, None, places)
      is_token = jnp.expand_dims(SEGMENTS != 0, range(2, out.ndim))
      out = jnp.where(is_token, out, 0)
      weight = jnp.arange(out.size).reshape(out.shape) % 7 - 3
      parts = [part(z) for z in jax.tree.leaves(last) for part in PARTS]
      loss = sum(jnp.sum(jnp.sin(z)) for z in parts)
      return jnp.sum(jnp.sin(out) * weight) + loss, (out, last)

    places, _ = advance(start(B), jnp.asarray(SEGMENTS))
    gradient = jax.grad(total, argnums=(0, 1), has_aux=True)
    return gradient(split, same), run(split, same, initial, None)

  with jax.enable_x64(True):
    actual, expected = (
      jax.jit(functools.partial(results, run))(split, same, initial)
      for run in (sharded, local)
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
    actual,
    expected,
  )
