"""Attention as a recurrent network equals attention, in the space it claims."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.ops import Causal
from jaxformers.ops import ConstantScale
from jaxformers.ops import InverseSqrt
from jaxformers.ops import Lengths
from jaxformers.ops import LogLength
from jaxformers.ops import NoPosition
from jaxformers.ops import Rotary
from jaxformers.ops import Segments
from jaxformers.ops import TokenLayer
from jaxformers.ops import Window
from jaxformers.ops import attend
from jaxformers.ops import attend_newest_first
from jaxformers.ops import attend_streaming
from jaxformers.ops import embedding_reads
from jaxformers.ops import reread
from jaxformers.ops import rms_norm

B, L, H, G, K, V = 2, 7, 4, 2, 4, 3
IDS = np.array([[0, 0, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0]])
MASKS = {
  'window': Window(3) & Lengths(jnp.array([0, 5])),
  'segments': Segments(jnp.asarray(IDS), jnp.asarray(IDS)) & Causal(),
}


def near(actual, expected, tolerance=1e-12):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def arrays(groups):
  rng = np.random.default_rng(0)
  widths = (H, K), (groups, K), (groups, V)
  return [rng.normal(size=(B, L, *width)) for width in widths]


def test_three_keys_by_hand_from_the_newest_back():
  key = np.array([[0, 0], [np.log(2), 0], [np.log(4), 1]])
  value = np.array([[1.0, 0], [0, 1], [1, 1]])
  query = np.broadcast_to([1.0, 0], (3, 2))
  sums = []
  for start in (2, 1, 0):
    newest = [x[None, start:, None] for x in (query, key, value)]
    partial = attend_newest_first(*newest, scale=ConstantScale(1.0))
    sums.append([*partial.numerator[0, -1, 0], *partial.denominator[0, -1]])
  near(sums, [[4, 4, 4], [4, 6, 6], [5, 6, 7]], 1e-6)
  near(partial.out[0, -1, 0], [5 / 7, 6 / 7], 1e-6)


def test_from_the_newest_back_equals_attention():
  inputs, scale = arrays(H), LogLength(4)

  @jax.jit
  def both(*inputs):
    expected = attend(*inputs, mask=Causal(), scale=scale)
    return attend_newest_first(*inputs, scale=scale).out, expected

  with jax.enable_x64(True):
    near(*both(*inputs))


@pytest.mark.parametrize(
  ('mask', 'position', 'scale'),
  [
    ('window', NoPosition(), LogLength(4)),
    ('segments', Rotary(), InverseSqrt()),
  ],
)
def test_streaming_equals_attention_with_gradients(mask, position, scale):
  options = {'mask': MASKS[mask], 'position': position, 'scale': scale}
  inputs = arrays(G)

  def result(function):
    def loss(*inputs):
      out = function(*inputs, **options)
      return jnp.sum(jnp.sin(out)), out

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    return jax.jit(gradient)(*inputs)

  with jax.enable_x64(True):
    actual = result(lambda *inputs, **o: attend_streaming(*inputs, **o).out)
    expected = result(functools.partial(attend, implementation='xla'))
  jax.tree.map(near, actual, expected)


def test_streaming_does_not_overflow():
  logits = np.array([1000.0, -5, 2000, 1999])
  one = np.ones((1, 1, 1, 1))
  with jax.enable_x64(True):
    partial = attend_streaming(
      one,
      logits.reshape(1, 4, 1, 1),
      np.arange(4.0).reshape(1, 4, 1, 1),
      scale=ConstantScale(1.0),
    )
    out, log_normalizer = partial.out.item(), partial.log_normalizer.item()
  near(out, (2 + 3 * math.exp(-1)) / (1 + math.exp(-1)), 1e-15)
  near(log_normalizer, 2000 + math.log1p(math.exp(-1)), 1e-15)


def test_streaming_needs_as_many_keys_as_queries_where_positions_matter():
  query, key, value = arrays(G)
  with pytest.raises(ValueError, match='7 queries against 6 keys'):
    attend_streaming(query, key[:, 1:], value[:, 1:], mask=Causal())


D, VOCABULARY = 6, 5
rotary = Rotary()


def model(depth):
  """An embedding and layers of one token, with random weights."""
  rng = np.random.default_rng(depth)
  draw = lambda *shape: jnp.asarray(
    rng.normal(size=shape) / math.sqrt(shape[0])
  )
  table_VD = draw(VOCABULARY, D)

  def turn(x_HK, position):
    return rotary.store(x_HK[None, None], position[None, None])[0, 0]

  def layer():
    w_q, w_k, w_v = draw(D, H, K), draw(D, G, K), draw(D, G, V)
    w_o, w_in, w_out = draw(H, V, D), draw(D, 8), draw(8, D)

    def query(x_D, position):
      q_HK = jnp.einsum('d,dhk->hk', rms_norm(x_D), w_q)
      return turn(q_HK, position) / math.sqrt(K)

    def key_value(x_D, position):
      x_D = rms_norm(x_D)
      k_GK = jnp.einsum('d,dgk->gk', x_D, w_k)
      return turn(k_GK, position), jnp.einsum('d,dgv->gv', x_D, w_v)

    def finish(x_D, attended_HV):
      x_D = x_D + jnp.einsum('hv,hvd->d', attended_HV, w_o)
      return x_D + jnp.tanh(rms_norm(x_D) @ w_in) @ w_out

    return TokenLayer(query, key_value, finish)

  return lambda token: table_VD[token], [layer() for _ in range(depth)]


def in_parallel(embed, layers, token_L):
  """The same model, all positions of a layer at once."""
  x_LD = jax.vmap(embed)(token_L)
  position_L = jnp.arange(len(token_L))
  for layer in layers:
    query = jax.vmap(layer.query)(x_LD, position_L)
    key, value = jax.vmap(layer.key_value)(x_LD, position_L)
    attended = attend(
      query[None],
      key[None],
      value[None],
      mask=Causal(),
      scale=ConstantScale(1.0),
    )
    x_LD = jax.vmap(layer.finish)(x_LD, attended[0])
  return x_LD


@pytest.mark.parametrize('depth', [1, 3])
def test_reading_again_equals_the_parallel_model(depth):
  with jax.enable_x64(True):
    embed, layers = model(depth)
    token_L = jnp.asarray([3, 1, 4, 1, 0, 2, 2])
    expected = jax.jit(functools.partial(in_parallel, embed, layers))(token_L)

    @jax.jit
    def every_position(token_L):
      return jax.lax.map(
        lambda i: reread(embed, layers, token_L, i), jnp.arange(L)
      )

    out_LD, reads_L = every_position(token_L)
  near(out_LD, expected, 1e-13)
  assert reads_L.tolist() == [embedding_reads(i + 1, depth) for i in range(L)]
  assert reads_L.sum() == embedding_reads(L, depth, 'all')


def test_without_layers_one_embedding_is_read():
  embed, _ = model(0)
  out_D, reads = reread(embed, [], jnp.array([3, 1]), 1)
  near(out_D, embed(1))
  assert reads == 1


def test_reads_are_counted_as_published():
  assert embedding_reads(7, 3, 'all') == 210
  assert [embedding_reads(n, 2) for n in (16, 32, 64)] == [136, 528, 2080]
  assert embedding_reads(32, 2, 'all') == 5984
  assert embedding_reads(64, 2, 'all') == 45_760
  assert embedding_reads(64, 3, 'all') == 766_480
  assert embedding_reads(10, 1, 'all') == 10 * 11 // 2
  with pytest.raises(ValueError, match="'last' or 'all'"):
    embedding_reads(3, 2, 'first')


def test_reading_again_takes_the_same_memory_at_every_length():
  embed, layers = model(2)

  def temporaries(function, length):
    tokens = jax.ShapeDtypeStruct((length,), jnp.int32)
    compiled = jax.jit(function).lower(tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  lengths = 16, 32, 64
  again, parallel = (
    [temporaries(function, length) for length in lengths]
    for function in (
      lambda tokens: reread(embed, layers, tokens, len(tokens) - 1),
      lambda tokens: in_parallel(embed, layers, tokens)[-1],
    )
  )
  assert again[0] == again[1] == again[2]
  assert parallel[2] > 4 * parallel[0] > 4 * again[0]
