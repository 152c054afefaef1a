"""Short convolutions, against a loop over the tokens of each segment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.ops import short_convolution
from jaxformers.ops.segments import advance
from jaxformers.ops.segments import start

B, L, D, W = 3, 9, 2, 4
rng = np.random.default_rng(0)
X = rng.normal(size=(B, L, D))
WEIGHT = rng.normal(size=(W, D))
BIAS = rng.normal(size=D)
SEGMENTS = np.array([
  [1, 1, 0, 1, 0, 0, 2, 2, 0],
  [0, 0, 5, 5, 5, 5, 5, 3, 3],
  [0, 0, 0, 0, 0, 0, 0, 0, 0],
])  # fmt: skip


def looped(x_LD, weight_WD, bias_D):
  """The definition, on the tokens of one segment."""
  width = len(weight_WD)
  out_LD = np.tile(bias_D, (len(x_LD), 1))
  for i in range(len(x_LD)):
    for j in range(min(width, i + 1)):
      out_LD[i] += weight_WD[width - 1 - j] * x_LD[i - j]
  return out_LD


@jax.jit
def convolve(x_BLD, weight_WD, buffer_BND, cursor, segments_BL):
  places, cursor = advance(cursor, segments_BL)
  return *short_convolution(
    x_BLD, weight_WD, BIAS, buffer_BND, places=places
  ), cursor


@pytest.mark.parametrize('cuts', [(L,), (1, 3, 5)])
def test_packed_pieces_with_garbage_at_padding_equal_the_loop(cuts):
  with jax.enable_x64(True):
    x = jnp.where(SEGMENTS[..., None] == 0, jnp.nan, X)
    buffer, cursor = jnp.zeros((B, W - 1, D)), start(B)
    outputs, begin = [], 0
    for length in cuts:
      piece = slice(begin, begin + length)
      out, buffer, cursor = convolve(
        x[:, piece], WEIGHT, buffer, cursor, SEGMENTS[:, piece]
      )
      outputs.append(out)
      begin += length
    out = np.concatenate(outputs, axis=1)
  assert np.isfinite(out).all()
  for row, segments_L in enumerate(SEGMENTS):
    for segment in set(segments_L) - {0}:
      here = segments_L == segment
      expected = looped(X[row, here], WEIGHT, BIAS)
      np.testing.assert_allclose(out[row, here], expected, rtol=1e-12)
    tokens = X[row, segments_L != 0]
    line = np.concatenate([np.zeros((W - 1, D)), tokens])
    np.testing.assert_array_equal(buffer[row], line[len(tokens) :])


def test_a_buffer_continues_a_sequence_without_places():
  whole, last = short_convolution(jnp.asarray(X), WEIGHT, BIAS)
  expected = np.stack([looped(x, WEIGHT, BIAS) for x in X])
  np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-5)
  outputs, buffer = [], None
  for begin in range(L):
    piece = jnp.asarray(X[:, begin : begin + 1])
    out, buffer = short_convolution(piece, WEIGHT, BIAS, buffer)
    outputs.append(out)
  np.testing.assert_allclose(
    np.concatenate(outputs, 1), whole, rtol=1e-5, atol=1e-6
  )
  np.testing.assert_array_equal(buffer, last)


def test_one_tap_is_a_gain_and_two_are_a_token_shift():
  x = jnp.asarray(X, jnp.bfloat16)
  places, _ = advance(start(B), jnp.asarray(SEGMENTS))
  out, buffer = short_convolution(x, jnp.full((1, D), 2.0), places=places)
  assert out.dtype == jnp.bfloat16
  assert buffer.shape == (B, 0, D)
  here = SEGMENTS != 0
  np.testing.assert_array_equal(out[here], 2 * x[here])
  shifted, buffer = short_convolution(x, jnp.array([[1.0] * D, [0.0] * D]))
  assert buffer.dtype == jnp.float32
  np.testing.assert_array_equal(shifted[:, 1:], x[:, :-1])
  np.testing.assert_array_equal(shifted[:, 0], 0)


def test_what_does_not_fit_is_refused():
  x = jnp.zeros((B, L, D))
  with pytest.raises(ValueError, match=r'weight must have shape \[4, 2\]'):
    short_convolution(x, jnp.zeros((W, D + 1)))
  with pytest.raises(ValueError, match=r'buffer must have shape \[3, 3, 2\]'):
    short_convolution(x, WEIGHT, None, jnp.zeros((B, W, D)))
  with pytest.raises(ValueError, match='at least one token and one tap'):
    short_convolution(x, jnp.zeros((0, D)))
