"""Near and far attention merged, against the select of `attend`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.ops import Causal
from jaxformers.ops import InverseSqrt
from jaxformers.ops import LeakyReRoPE
from jaxformers.ops import LogLengthRetrofit
from jaxformers.ops import NoMask
from jaxformers.ops import ReRoPE
from jaxformers.ops import Rotary
from jaxformers.ops import Segments
from jaxformers.ops import attend
from jaxformers.ops import attend_near_and_far
from jaxformers.ops import decode_near_and_far

B, T, H, G, K = 2, 12, 4, 2, 6
# A factor per row that counts the keys of both parts.
RETROFIT = InverseSqrt() * LogLengthRetrofit(5)


@pytest.fixture(autouse=True)
def float64(request):
  # No generator: the garbage collector must not decide when this ends.
  context = jax.enable_x64(True)
  context.__enter__()
  request.addfinalizer(  # noqa: PT021
    lambda: context.__exit__(None, None, None)
  )


def arrays(dtype=jnp.float64):
  keys = jax.random.split(jax.random.key(0), 3)
  return tuple(
    jax.random.normal(key, (B, T, heads, K), dtype)
    for key, heads in zip(keys, (H, G, G), strict=True)
  )


def near(actual, expected, tolerance=1e-12):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def result(function, inputs, **options):
  """Output and gradients."""

  def loss(*inputs):
    out = function(*inputs, **options)
    return jnp.sin(out).sum(), out

  run = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
  (_, out), gradients = jax.jit(run)(*inputs)
  return out, gradients


@pytest.mark.parametrize(
  ('position', 'implementation'),
  [
    (ReRoPE(3), 'xla'),
    (ReRoPE(3), 'blockwise'),
    (LeakyReRoPE(3, 2.5, pairing='interleaved', rotary_dim=4), 'xla'),
    (LeakyReRoPE(4, 1 / 16), 'blockwise'),  # inverse: steps of 16
    (LeakyReRoPE(0, 2.0), 'blockwise'),  # nothing is near
    (ReRoPE(T), 'xla'),  # nothing is far
  ],
  ids=['rerope', 'blockwise', 'leaky', 'inverse', 'all_far', 'all_near'],
)
def test_merged_parts_equal_the_select_with_gradients(position, implementation):
  options = dict(position=position, scale=RETROFIT)
  actual = result(
    attend_near_and_far,
    arrays(),
    implementation=implementation,
    block=None if implementation == 'xla' else 5,
    **options,
  )
  expected = result(
    attend, arrays(), mask=Causal(), implementation='xla', **options
  )
  jax.tree.map(near, actual, expected)


def test_packed_rows_with_positions_of_their_own_equal_the_select():
  segments = np.array([[1] * 5 + [2] * 7, [4] * 9 + [0] * 3])
  place = np.stack([np.r_[0:5, 0:7], np.r_[20:29, 0:3]])
  options = dict(
    mask=Causal() & Segments(jnp.asarray(segments), jnp.asarray(segments)),
    query_position=jnp.asarray(place),
    key_position=jnp.asarray(place),
    position=ReRoPE(3),
    scale=RETROFIT,
  )
  query, key, value = arrays()
  garbage = jnp.where(segments[..., None, None] == 0, jnp.nan, key)
  actual, gradients = result(
    attend_near_and_far, (query, garbage, value), **options
  )
  expected, _ = result(attend, (query, key, value), **options)
  near(actual, expected)
  assert (np.asarray(actual)[segments == 0] == 0).all()
  assert all(np.isfinite(g).all() for g in gradients)


def test_the_newest_queries_alone_equal_their_rows():
  query, key, value = arrays()
  options = dict(position=LeakyReRoPE(3, 2.0), scale=RETROFIT)

  @jax.jit
  def both(query, key, value):
    place = jnp.arange(T - 4, T)
    newest = query[:, -4:]
    return (
      attend_near_and_far(newest, key, value, query_position=place, **options),
      attend_near_and_far(query, key, value, **options)[:, -4:],
    )

  near(*both(query, key, value))


def test_float32_is_near_float64():
  inputs = arrays(jnp.float32)
  options = dict(position=ReRoPE(3))
  single = jax.jit(lambda *x: attend_near_and_far(*x, **options))(*inputs)
  assert single.dtype == jnp.float32
  inputs = (x.astype(jnp.float64) for x in inputs)
  double = jax.jit(lambda *x: attend(*x, mask=Causal(), **options))(*inputs)
  near(single, double, 1e-5)


def test_masks_and_lengths_that_do_not_fit_are_refused():
  query, key, value = arrays()
  with pytest.raises(ValueError, match=r'causal mask, got NoMask\(\); use att'):
    attend_near_and_far(query, key, value, position=ReRoPE(3), mask=NoMask())
  with pytest.raises(ValueError, match='4 queries against 12 keys: pass query'):
    attend_near_and_far(query[:, -4:], key, value, position=ReRoPE(3))


@pytest.mark.parametrize(
  'position', [ReRoPE(3), LeakyReRoPE(3, 2.5), ReRoPE(0), LeakyReRoPE(40, 2.0)]
)
def test_decoding_from_far_keys_in_any_pieces_gives_the_whole(position):
  query, key, value = arrays()
  options = dict(position=position, scale=RETROFIT)
  expected = attend(query, key, value, mask=Causal(), **options)
  stored = position.far().store(key, jnp.arange(T)[None])
  slots = T + 4

  @jax.jit
  def step(query, length_B):
    # Of each row only the slots in use are finite.
    is_used = jnp.arange(slots) < length_B[:, None]

    def cache(x):
      x = jnp.pad(x, ((0, 0), (0, slots - T), (0, 0), (0, 0)))
      return jnp.where(is_used[..., None, None], x, jnp.nan)

    return decode_near_and_far(
      query, cache(stored), cache(value), length_B, **options
    )

  for start, end in ((0, 5), (5, 6), (6, 7), (7, T)):
    out = step(query[:, start:end], jnp.full(B, end))
    near(out, expected[:, start:end])
  # Rows of different lengths.
  place = np.array([2, 9])
  out = step(query[[0, 1], place][:, None], jnp.asarray(place + 1))
  near(out[:, 0], expected[[0, 1], place])


def test_a_decoding_step_rotates_the_keys_of_the_window_alone():
  slots, window = 100, 7
  key = jnp.zeros((B, slots, G, K))
  run = jax.make_jaxpr(
    lambda query, length_B: decode_near_and_far(
      query, key, key, length_B, position=ReRoPE(window)
    )
  )
  text = str(run(jnp.zeros((B, 1, H, K)), jnp.array([50, 80])))
  sines = [line for line in text.splitlines() if ' = sin ' in line]
  sizes = {line.split('f64[')[1].split(']')[0] for line in sines}
  # Of the newest keys, and of the query in both parts.
  assert sizes == {f'{B},{window},{K // 2}', f'{B},1,{K // 2}'}


def test_inverse_leaky_trains_all_distances_that_plain_rotations_use_later():
  # The article: w a quarter of the trained length, k = 1 / (2 x) for x times
  # longer texts. A cosine of one slow pair tells the distance.
  trained, times = 16, 4
  position = LeakyReRoPE(trained // 4, 1 / (2 * times), base=1e4)
  angle = 1e-3

  class Slow:
    def frequencies(self, dim, base):
      return np.array([angle])

  def distances(scheme, length):
    """Rotations between the last query and all keys."""
    one = jnp.ones((1, length, 1, 2)) * jnp.array([1.0, 0.0])
    place = jnp.arange(length)[None]
    branches = scheme.branches(one, scheme.store(one, place), place, place)
    found = np.zeros(length)
    for query, key, region in branches:
      cosine = np.einsum('k,mk->m', query[0, -1, 0], key[0, :, 0])
      turned = np.arccos(cosine.clip(-1, 1)) / angle
      holds = True if region is None else region(place, place)[0, 0, -1]
      found = np.where(holds, turned, found)
    return found

  position = LeakyReRoPE(position.window, position.slope, spectrum=Slow())
  seen = distances(position, trained)
  steps = [*range(4), *(4 + 8 * r for r in range(12))]
  near(seen[::-1], steps, 1e-6)
  later = distances(Rotary(spectrum=Slow()), times * trained)
  assert later.max() < seen.max()
  assert math.isclose(later.max(), times * trained - 1, rel_tol=1e-6)
