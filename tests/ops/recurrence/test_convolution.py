"""Convolutions of linear time-invariant systems, against a NumPy loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.ops import Modes
from jaxformers.ops import kernel_convolution
from jaxformers.ops import lti_convolution
from jaxformers.ops import mode_kernel
from jaxformers.ops import segments

B, L, D, S, C = 2, 21, 3, 2, 4
METHODS = 'chunked', 'fft', 'sequential'
rng = np.random.default_rng(0)
INPUT = rng.normal(size=(B, L, D))
drawn = rng.normal(size=(3, D, S)) + 1j * rng.normal(size=(3, D, S))
DECAY = 0.9 * np.exp(1j * drawn[0].real)
DECAY[0, 0] = 0
MODES = Modes(DECAY, drawn[1], drawn[2])
INITIAL = rng.normal(size=(B, D, S)) + 1j * rng.normal(size=(B, D, S))
# Padding at the start, in the middle and at the end; a segment that goes on
# from before, short segments within a chunk, and one across chunks.
SEGMENTS = np.array(
  [
    [0, 4, 4, 0, 0, 4, 5, 6, 6, 7, 7, 7, 7, 0, 0, 0, 0, 0, 7, 7, 0],
    [3, 0, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 1, 1, 2, 2, 2, 2, 2],
  ],
  np.int32,
)


def looped(x, modes, state, segments_BL=None, begins=None):
  """The definition, in float64."""
  outputs = []
  for i in range(x.shape[1]):
    new = modes.decay * state + modes.input * x[:, i, :, None]
    if segments_BL is not None:
      fresh = modes.input * x[:, i, :, None]
      new = np.where(begins[:, i, None, None], fresh, new)
      new = np.where(segments_BL[:, i, None, None] == 0, state, new)
    state = new
    outputs.append(np.sum(modes.readout * state, axis=-1).real)
  return np.stack(outputs, axis=1), state


@functools.partial(jax.jit, static_argnames=('method', 'chunk'))
def convolve(x, modes, initial, places=None, *, method, chunk=C):
  return lti_convolution(
    x, modes, initial, places=places, method=method, chunk=chunk
  )


def near(actual, expected, tolerance=1e-12):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('method', METHODS)
def test_any_method_in_any_pieces_equals_the_loop(method):
  expected, expected_last = looped(INPUT, MODES, INITIAL)
  with jax.enable_x64(True):
    state, outputs, start = jnp.asarray(INITIAL), [], 0
    for length in (1, C, 2 * C, C + 4):
      piece = INPUT[:, start : start + length]
      out, state = convolve(piece, MODES, state, method=method)
      outputs.append(out)
      start += length
  assert start == L
  near(np.concatenate(outputs, axis=1), expected)
  near(state, expected_last)


@pytest.mark.parametrize('method', ['chunked', 'sequential'])
def test_packed_and_padded_pieces_equal_the_loop(method):
  with jax.enable_x64(True):
    cursor = segments.start(B)._replace(
      segment_B=jnp.array([9, 3], jnp.int32),
      number_B=jnp.array([1, 1], jnp.int32),
      position_B=jnp.array([5, 7], jnp.int32),
    )
    before, _ = segments.advance(cursor, SEGMENTS)
    begins = np.asarray(before.position_BL) == 0
    expected, expected_last = looped(INPUT, MODES, INITIAL, SEGMENTS, begins)
    is_token = SEGMENTS != 0
    garbage = np.where(is_token[..., None], INPUT, np.nan)
    for lengths in ((L,), (1, 2, 11, 7)):
      state, outputs, start, now = jnp.asarray(INITIAL), [], 0, cursor
      for length in lengths:
        piece = slice(start, start + length)
        places, now = segments.advance(now, SEGMENTS[:, piece])
        out, state = convolve(
          garbage[:, piece], MODES, state, places, method=method
        )
        outputs.append(out)
        start += length
      out = np.concatenate(outputs, axis=1)
      assert np.isfinite(out).all()
      near(out[is_token], expected[is_token])
      near(state, expected_last)


def test_gradients_of_all_methods_are_those_of_steps():
  with jax.enable_x64(True):
    places, _ = segments.advance(segments.start(B), SEGMENTS)

    def loss(method, places, x, modes, initial):
      modes, initial = (
        jax.tree.map(lambda z: jax.lax.complex(*z), tree)
        for tree in (modes, initial)
      )
      out, last = lti_convolution(
        x, modes, initial, places=places, method=method, chunk=C
      )
      if places is not None:
        out = jnp.where(SEGMENTS[..., None] == 0, 0, out)
      return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.abs(last) ** 2)

    parts = lambda z: jnp.stack([z.real, z.imag])
    point = INPUT, jax.tree.map(parts, MODES), parts(INITIAL)

    def gradient(method, places):
      function = functools.partial(loss, method, places)
      return jax.jit(jax.grad(function, argnums=(0, 1, 2)))(*point)

    for given, methods in ((None, ('chunked', 'fft')), (places, ('chunked',))):
      expected = gradient('sequential', given)
      for method in methods:
        jax.tree.map(
          lambda a, b: near(a, b, 1e-10), gradient(method, given), expected
        )


def direct(modes, length):
  """The matrix of powers that the library never makes."""
  powers = modes.decay[..., None] ** np.arange(length)
  return np.einsum('ds,dsl->dl', modes.readout * modes.input, powers).real


@pytest.mark.parametrize('length', [1, 2, 7, 64, 65])
def test_the_kernel_in_two_levels_is_that_of_powers(length):
  with jax.enable_x64(True):
    kernel = jax.jit(mode_kernel, static_argnums=1)(MODES, length)
  near(kernel, direct(MODES, length))


def test_kernels_of_both_directions_sum_over_all_inputs():
  kernel, backward = rng.normal(size=(2, D, L + 3))
  lag = np.arange(L)[:, None] - np.arange(L)
  weights = np.where(lag >= 0, kernel[:, abs(lag)], 0)
  both = weights + np.where(lag <= 0, backward[:, abs(lag)], 0)
  with jax.enable_x64(True):
    for args, matrix in (((kernel,), weights), ((kernel, backward), both)):
      out = jax.jit(kernel_convolution)(INPUT, *args)
      near(out, np.einsum('dlm,bmd->bld', matrix, INPUT))
    # A short kernel is one that ends in zeros.
    out = kernel_convolution(INPUT, kernel[:, :2])
    near(out[:, 1:], kernel[:, 0] * INPUT[:, 1:] + kernel[:, 1] * INPUT[:, :-1])


def test_float32_stays_near_float64_over_thousands_of_steps():
  length = 4096
  x = rng.normal(size=(1, length, D))
  decay = np.array([0.9, 0.99, 0.9999])[:, None] * np.exp([[0, 2.5j]])
  modes = Modes(decay, np.ones((D, 2)), np.ones((D, 2)))
  expected, _ = looped(x, modes, np.zeros((1, D, 2)))
  single = Modes(*(jnp.asarray(z, jnp.complex64) for z in modes))
  scale = np.abs(expected).max(axis=(0, 1))
  for method in METHODS:
    out, _ = convolve(jnp.float32(x), single, None, method=method, chunk=64)
    assert (np.abs(out - expected).max(axis=(0, 1)) / scale).max() < 1e-4


def test_memory_does_not_grow_with_the_number_of_modes_times_the_length():
  length, width, modes = 2048, 4, 16

  def loss(x, modes):
    modes = Modes(*(jax.lax.complex(z, z) for z in modes))
    return jnp.sum(lti_convolution(x, modes, method='chunked').out ** 2)

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))

  def temporaries(length):
    compiled = gradient.lower(
      jax.ShapeDtypeStruct((1, length, width), jnp.float32),
      Modes(*[jax.ShapeDtypeStruct((width, modes), jnp.float32)] * 3),
    ).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  growth = temporaries(2 * length) - temporaries(length)
  # In numbers per token and channel; a state of each token would be 32.
  assert growth / (4 * length * width) < 16


def test_bfloat16_goes_in_and_out():
  modes = Modes(*(jnp.asarray(z, jnp.complex64) for z in MODES))
  half = jnp.asarray(INPUT, jnp.bfloat16)
  expected, _ = convolve(half.astype(jnp.float32), modes, None, method='auto')
  out, last = convolve(half, modes, None, method='auto')
  assert (out.dtype, last.dtype) == (jnp.bfloat16, jnp.complex64)
  near(out.astype(jnp.float32), expected, 0.01)


def test_what_does_not_fit_is_said():
  x = jnp.zeros((B, L, D))
  modes = Modes(*[jnp.ones((D, S), jnp.complex64)] * 3)
  places, _ = segments.advance(segments.start(B), SEGMENTS)
  for match, function in (
    ('unknown method', lambda: lti_convolution(x, modes, method='slow')),
    ('fft', lambda: lti_convolution(x, modes, places=places, method='fft')),
    ('at least 1 token', lambda: lti_convolution(x, modes, chunk=0)),
    ('input must have', lambda: lti_convolution(x[0], modes)),
    ('modes must have', lambda: lti_convolution(x[..., :2], modes)),
    ('initial modes', lambda: lti_convolution(x, modes, modes.decay)),
  ):
    with pytest.raises(ValueError, match=match):
      function()
