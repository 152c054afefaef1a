"""Rotations and sinusoidal codes against hand-computed numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.ops import Rotary
from jaxformers.ops import rope_frequencies
from jaxformers.ops import rotate
from jaxformers.ops import sinusoidal

X = jnp.array([1.0, 2, 3, 4])[None, None, None]


@pytest.mark.parametrize(
  ('pairing', 'expected'),
  [
    ('half', [-1.984110649, 1.959900667, 2.462377902, 4.019799668]),
    ('interleaved', [-1.142639664, 1.922075597, 2.959850668, 4.029799502]),
  ],
)
def test_rotation_by_one_position(pairing, expected):
  y = rotate(X, jnp.array([[1]]), rope_frequencies(4), pairing)
  np.testing.assert_allclose(y[0, 0, 0], expected, rtol=1e-6)


def test_pairings_are_one_function_up_to_a_permutation():
  x = jax.random.normal(jax.random.key(0), (2, 3, 2, 8))
  order = np.array([0, 2, 4, 6, 1, 3, 5, 7])
  position = jnp.arange(3)[None]
  half = rotate(x[..., order], position, rope_frequencies(8), 'half')
  inter = rotate(x, position, rope_frequencies(8), 'interleaved')
  np.testing.assert_allclose(half, inter[..., order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('pairing', ['half', 'interleaved'])
def test_rotations_compose_and_keep_norms(pairing):
  x = jax.random.normal(jax.random.key(0), (1, 1, 2, 8))

  def turn(x, p):
    return rotate(x, jnp.array([[p]]), rope_frequencies(8), pairing)

  y = turn(turn(x, -1.5), 4.0)
  np.testing.assert_allclose(y, turn(x, 2.5), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
  )
  np.testing.assert_array_equal(turn(x, 0), x)


def test_bfloat16_inputs_get_float32_angles():
  x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
  y = rotate(x, jnp.array([[257]]), rope_frequencies(4))
  exact = np.cos(257.0) - np.sin(257.0)
  np.testing.assert_allclose(float(y[0, 0, 0, 0]), exact, atol=0.01)


def test_partial_rotary_leaves_the_other_coordinates():
  x = jax.random.normal(jax.random.key(0), (1, 2, 1, 6))
  y = Rotary(rotary_dim=4).store(x, jnp.array([[3, 4]]))
  np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
  turned = rotate(x[..., :4], jnp.array([[3, 4]]), rope_frequencies(4))
  np.testing.assert_array_equal(y[..., :4], turned)


@pytest.mark.parametrize(
  ('layout', 'spacing', 'expected'),
  [
    (
      'interleaved',
      'paper',
      [0.1411200081, -0.9899924966, 0.0299955002, 0.9995500337],
    ),
    ('concat', 't2t', [0.1411200081, 0.0003, -0.9899924966, 0.99999995]),
  ],
)
def test_sinusoidal_code_of_position_three(layout, spacing, expected):
  code = sinusoidal(jnp.array([[3]]), 4, layout=layout, spacing=spacing)
  np.testing.assert_allclose(code[0, 0], expected, rtol=1e-5)


def test_sinusoidal_odd_width_has_one_sine_more():
  code = sinusoidal(jnp.arange(4)[None], 5)
  even = base = 10000.0 ** (-np.arange(3) / 2.5)
  np.testing.assert_allclose(
    code[0, :, 0::2], np.sin(np.arange(4)[:, None] * even), atol=1e-6
  )
  np.testing.assert_allclose(
    code[0, :, 1::2], np.cos(np.arange(4)[:, None] * base[:2]), atol=1e-6
  )


def test_odd_rotations_are_refused():
  with pytest.raises(ValueError, match='even number of them.*got 5'):
    Rotary().store(jnp.zeros((1, 2, 1, 5)), jnp.arange(2)[None])
  with pytest.raises(ValueError, match='at most the head width 4, got 6'):
    Rotary(rotary_dim=6).store(X, jnp.zeros((1, 1)))
  with pytest.raises(ValueError, match="'half' or 'interleaved', got 'pairs'"):
    Rotary(pairing='pairs')
