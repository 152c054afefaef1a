"""The elementwise recurrence, against loops in NumPy and in Python."""

import functools

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from jaxformers.ops import check_decay
from jaxformers.ops import linear_recurrence
from jaxformers.ops.recurrence import fastest_method

B, L, S, C = 2, 8, 3, 3
METHODS = {
  'sequential': None,
  'chunked': C,
  'associative': None,
  'pallas': None,
}
rng = np.random.default_rng(0)
INPUT = rng.normal(size=(B, L, S))
INITIAL = rng.normal(size=(B, S))
DECAY = rng.uniform(-1, 1, size=(B, L, S))
DECAY[:, :, 0] = rng.choice([0.0, 1.0, np.exp(-30)], size=(B, L))
# At a chunk's edge, within, at the start, twice in a row, and where both meet.
RESET = np.zeros((B, L), bool)
RESET[0, [3, 5]] = RESET[1, [0, 6, 7]] = True
SKIP = np.zeros((B, L), bool)
SKIP[0, [0, 1, 5]] = SKIP[1, [2, 7]] = True


def looped(decay, input, state, reset=None, skip=None, reverse=False):
  """The definition, step by step."""
  decay = jnp.broadcast_to(decay, input.shape)
  states = [None] * input.shape[1]
  for t in range(len(states))[:: -1 if reverse else 1]:
    kept = decay[:, t]
    if reset is not None:
      kept = jnp.where(reset[:, t, None], 0, kept)
    new = kept * state + input[:, t]
    state = new if skip is None else jnp.where(skip[:, t, None], state, new)
    states[t] = state
  return jnp.stack(states, axis=1), state


CASES = {
  'per_step': (DECAY, INPUT, INITIAL, {'reset': RESET, 'skip': SKIP}),
  'complex_constant_reversed': (
    DECAY[0, 0] * np.exp(1j * np.arange(S)),
    INPUT + 1j * INPUT[::-1],
    INITIAL * 1j,
    {'reverse': True},
  ),
}


def derivatives(run, decay, input, initial, options):
  """Returns states, last state, and the gradients of a number made of them."""

  def loss(*arrays):
    states, last = run(*arrays, **options)
    weight = jnp.arange(1.0, L + 1)[:, None]
    loss = jnp.sum(jnp.sin(states) * weight) + jnp.sum(jnp.cos(last))
    return loss.real, (states, last)

  gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
  return gradient(decay, input, initial)


@functools.cache
def expected(case):
  decay, input, initial, options = CASES[case]
  run = functools.partial(derivatives, looped, options=options)
  with jax.enable_x64(True):
    return jax.jit(run)(decay, input, initial)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('method', METHODS)
def test_any_method_equals_the_loop_with_its_gradients(method, case):
  decay, input, initial, options = CASES[case]
  run = functools.partial(
    linear_recurrence, method=method, chunk=METHODS[method]
  )
  run = jax.jit(functools.partial(derivatives, run, options=options))
  with jax.enable_x64(True):
    actual = run(decay, input, initial)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
    actual,
    expected(case),
  )
  if case == 'per_step':  # The other has sums over all steps in its gradients.
    return
  singles = (
    jnp.asarray(x, jnp.result_type(x, jnp.float32))
    for x in (decay, input, initial)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    run(*singles),
    expected(case),
  )


def test_second_derivatives_are_those_of_the_loop():
  decay, initial = DECAY[0, 0], INITIAL
  options = {'reset': RESET, 'skip': SKIP, 'reverse': True}

  def curvature(run, *point):
    gradient = lambda *x: derivatives(run, *x, options)[1]
    forward_over_reverse = jax.jvp(gradient, point, point)[1]
    total = lambda *x: sum(jnp.sum(jnp.sin(g)) for g in gradient(*x))
    return forward_over_reverse, jax.grad(total, argnums=(0, 1, 2))(*point)

  chunked = functools.partial(linear_recurrence, method='chunked', chunk=C)
  with jax.enable_x64(True):
    actual, wanted = (
      jax.jit(functools.partial(curvature, run))(decay, INPUT, initial)
      for run in (chunked, looped)
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
    actual,
    wanted,
  )


def test_its_gradients_are_those_of_finite_differences():
  def function(decay):
    states, last = linear_recurrence(decay, INPUT, INITIAL)
    return jnp.sin(states), jnp.cos(last)

  with jax.enable_x64(True):
    # One gradient alone, with all else constant.
    check_grads(jax.jit(function), (DECAY,), 1, ('fwd', 'rev'), 1e-6, 1e-6)


def test_three_steps_by_hand():
  decay, input = jnp.full((1, 3), 0.5), jnp.array([[1.0, 2.0, 3.0]])

  def total(decay, input, initial):
    states = linear_recurrence(decay, input, initial).states
    return states.sum(), states

  gradient = jax.grad(total, argnums=(0, 1, 2), has_aux=True)
  gradients, states = gradient(decay, input, jnp.array([4.0]))
  assert states.tolist() == [[3.0, 3.5, 4.75]]
  wanted = [[[7.0, 4.5, 3.5]], [[1.75, 1.5, 1.0]], [0.875]]
  assert [g.tolist() for g in gradients] == wanted


def test_a_decay_of_one_sums_and_of_zero_forgets():
  input = jnp.asarray(INPUT, jnp.float32)
  states, last = linear_recurrence(jnp.float32(1), input)
  np.testing.assert_allclose(states, np.cumsum(INPUT, axis=1), rtol=1e-5)
  np.testing.assert_allclose(last, INPUT.sum(axis=1), rtol=1e-5)
  states, _ = linear_recurrence(jnp.zeros(S), input, jnp.ones((B, S)))
  np.testing.assert_array_equal(states, input)


def test_decays_of_any_shape_are_those_decays_at_every_step():
  shapes = (), (S,), (1, 1), (L, S), (L, 1), (B, L, 1), (B, 1, S), (1, L, S)
  decays = [rng.uniform(size=shape) for shape in shapes]

  def both(decay):
    def loss(decay):
      return jnp.sum(jnp.sin(linear_recurrence(decay, INPUT, INITIAL).states))

    full = lambda decay: loss(jnp.broadcast_to(decay, INPUT.shape))
    return jax.value_and_grad(loss)(decay), jax.value_and_grad(full)(decay)

  with jax.enable_x64(True):
    results = jax.jit(lambda decays: [both(d) for d in decays])(decays)
  for actual, wanted in results:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11), actual, wanted
    )


def test_segments_that_begin_by_reset_are_as_if_alone():
  reset = np.zeros((1, L), bool)
  reset[0, [2, 5]] = True
  decay, input = DECAY[:1], INPUT[:1]
  with jax.enable_x64(True):
    whole, _ = linear_recurrence(decay, input, INITIAL[:1], reset=reset)
    alone = [
      linear_recurrence(decay[:, a:b], input[:, a:b]).states
      for a, b in ((2, 5), (5, L))
    ]
  np.testing.assert_allclose(whole[:, 2:], np.concatenate(alone, axis=1))


@pytest.mark.parametrize('method', METHODS)
def test_what_is_skipped_may_hold_anything(method):
  skip = SKIP[..., None]
  garbage = [np.where(skip, np.nan, x) for x in (DECAY, INPUT)]

  def loss(decay, input):
    states, last = linear_recurrence(
      decay, input, INITIAL, skip=SKIP, method=method, chunk=METHODS[method]
    )
    return jnp.sum(jnp.sin(states)) + jnp.sum(last), last

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  with jax.enable_x64(True):
    gradients, last = gradient(*garbage)
  tokens = [np.flatnonzero(~row) for row in SKIP]
  for row, kept in enumerate(tokens):
    state = INITIAL[row]
    for t in kept:
      state = DECAY[row, t] * state + INPUT[row, t]
    np.testing.assert_allclose(last[row], state)
  for g in gradients:
    assert np.isfinite(g).all()
    assert (np.asarray(g)[SKIP] == 0).all()


def test_pieces_with_a_carried_state_give_the_whole():
  run = jax.jit(linear_recurrence)
  with jax.enable_x64(True):
    whole, end = run(DECAY, INPUT, INITIAL)
    state, parts, start = INITIAL, [], 0
    for length in 1, 4, 3:
      piece = slice(start, start + length)
      states, state = run(DECAY[:, piece], INPUT[:, piece], state)
      parts.append(states)
      start += length
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
  np.testing.assert_array_equal(state, end)


def test_complex_numbers_are_pairs_of_real_ones():
  decay = np.asarray(0.9 * np.exp(1j * np.arange(1, S + 1)), np.complex64)
  input = np.asarray(INPUT[::-1] + 1j * INPUT, np.complex64)
  states, _ = linear_recurrence(decay, input)
  re = im = np.zeros((B, S))
  for t in range(L):
    re, im = (
      decay.real * re - decay.imag * im + input[:, t].real,
      decay.real * im + decay.imag * re + input[:, t].imag,
    )
    np.testing.assert_allclose(states[:, t].real, re, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(states[:, t].imag, im, rtol=1e-4, atol=1e-5)
  # A real decay stays real beside complex inputs, and so does its gradient.
  total = lambda decay: linear_recurrence(decay, input).states.real.sum()
  assert jax.grad(total)(jnp.full(S, 0.5)).dtype == jnp.float32


LONG = 65536
LONG_DECAY = np.array([0.99, 0.9999, 1.0, 0.0, np.exp(-30)])
LONG_INPUT, LONG_BAR = rng.normal(size=(2, 1, LONG, 5))
# Largest errors in float32, over the largest value: of states and gradients of
# inputs at decays of 0.99, 0.9999, 1 and less, and of gradients of decays.
LONG_BOUNDS = {
  'sequential': (1e-6, 8e-6, 8e-6, 2e-7, 8e-6),
  'chunked': (2e-6, 4e-5, 8e-6, 2e-7, 4e-5),
  'associative': (2e-6, 4e-5, 8e-6, 2e-7, 4e-5),
}


@functools.cache
def long_loop(dtype):
  """States and gradients by loops in float64, of what `dtype` makes of them."""
  rounded = (LONG_DECAY, LONG_INPUT[0], LONG_BAR[0])
  decay, input, bar = (x.astype(dtype).astype(np.float64) for x in rounded)
  states, input_bar = np.zeros((2, LONG + 1, 5))
  for t in range(LONG):
    states[t] = decay * states[t - 1] + input[t]
  for t in range(LONG)[::-1]:
    input_bar[t] = decay * input_bar[t + 1] + bar[t]
  decay_bar = np.sum(input_bar[1:LONG] * states[: LONG - 1], axis=0)
  return states[:LONG], decay_bar, input_bar[:LONG]


@pytest.mark.parametrize('method', LONG_BOUNDS)
def test_long_sequences_keep_their_digits_and_so_do_gradients(method):
  @jax.jit
  def results(decay, input, bar):
    run = lambda *x: linear_recurrence(*x, method=method).states
    states, pull = jax.vjp(run, decay, input)
    return states, *pull(bar)

  def errors(dtype):
    point = (jnp.asarray(x, dtype) for x in (LONG_DECAY, LONG_INPUT, LONG_BAR))
    states, decay_bar, input_bar = results(*point)
    actual = states[0], decay_bar, input_bar[0]
    for ours, true in zip(actual, long_loop(dtype), strict=True):
      largest = lambda x: abs(x).max(axis=0) if x.ndim > 1 else abs(x)
      yield largest(ours - true) / largest(true)

  with jax.enable_x64(True):
    assert np.max(list(errors(np.float64))) < 1e-10
  near, far, one, less, of_decay = LONG_BOUNDS[method]
  states, decay_bar, input_bar = errors(np.float32)
  assert (np.maximum(states, input_bar) < (near, far, one, less, less)).all()
  assert decay_bar.max() < of_decay


def test_half_precision_is_for_inputs_only():
  input = jnp.asarray(INPUT, jnp.bfloat16)
  states, last = linear_recurrence(jnp.float32(0.999), input)
  assert states.dtype == last.dtype == jnp.float32
  wanted, _ = linear_recurrence(jnp.float32(0.999), input.astype(jnp.float32))
  np.testing.assert_array_equal(states, wanted)
  gradient = jax.grad(
    lambda x: linear_recurrence(jnp.float32(0.5), x).last.sum()
  )(input)
  assert gradient.dtype == jnp.bfloat16


def test_vmap_equals_a_loop():
  run = lambda decay, input: linear_recurrence(decay, input).states
  gradient = jax.grad(lambda *x: jnp.sum(run(*x) ** 2), argnums=(0, 1))
  decays, inputs = np.stack([DECAY, -DECAY]), np.stack([INPUT, INPUT + 1])
  with jax.enable_x64(True):
    mapped = jax.jit(jax.vmap(gradient))(decays, inputs)
    shared = jax.jit(jax.vmap(gradient, (None, 0)))(DECAY, inputs)
    single = jax.jit(gradient)
    for n in range(2):
      for got, want in (
        (mapped, single(decays[n], inputs[n])),
        (shared, single(DECAY, inputs[n])),
      ):
        jax.tree.map(
          lambda a, b: np.testing.assert_allclose(a[n], b, rtol=1e-12),  # noqa: B023
          got,
          want,
        )


def test_only_decays_and_states_are_kept_for_the_backward_pass():
  ones = jnp.ones((2, 64, 16))
  reset = jnp.zeros((2, 64), bool)

  @jax.jit
  def kept(decay):
    run = lambda *x: linear_recurrence(*x, reset=reset).states
    return jax.vjp(run, decay, ones)[1]

  for decay, arrays in (jnp.ones(16), 1), (ones, 2):
    sizes = [leaf.size for leaf in jax.tree.leaves(kept(decay))]
    assert sum(size > reset.size for size in sizes) == arrays


def test_the_method_suits_the_platform():
  assert fastest_method('cpu') == 'sequential'
  assert fastest_method('cuda') == fastest_method('tpu') == 'chunked'
  shape = jax.ShapeDtypeStruct((2, 300, 4), jnp.float32)

  def program(platform, method):
    run = jax.jit(lambda *x: linear_recurrence(*x, method=method))
    exported = jax.export.export(run, platforms=(platform,))(shape, shape)
    return exported.mlir_module()

  # What a loop updates has one step, or a chunk of steps.
  assert 'tensor<2x1x4xf32>' in program('cpu', 'auto')
  assert 'tensor<2x128x4xf32>' in program('tpu', 'auto')
  assert 'tpu_custom_call' in program('tpu', 'pallas')


def test_decays_that_grow_are_found():
  check_decay(jnp.array([0.0, -1.0, 1j]))
  with pytest.raises(ValueError, match=r'1 of 3 .* 1\.5 at \[2\]'):
    check_decay(jnp.array([1.0, 0.5, -1.5]))
  with pytest.raises(ValueError, match='not a number'):
    check_decay(jnp.array(jnp.nan))
  with pytest.raises(TypeError, match='call it outside'):
    jax.jit(check_decay)(jnp.ones(2))


def test_what_does_not_fit_is_refused():
  ok = jnp.ones((2, 4, 3))
  for arguments, options, message in (
    ((ok, ok), {'method': 'chunk'}, "did you mean 'chunked'"),
    ((ok, ok), {'chunk': 0}, 'at least 1 step'),
    ((ok, ok), {'method': 'associative', 'chunk': 2}, 'has no chunks'),
    ((ok[:, :0], ok[:, :0]), {}, 'at least one step'),
    ((ok[:, :2], ok), {}, r'must broadcast to the inputs \[2, 4, 3\]'),
    ((ok.astype(jnp.bfloat16), ok), {}, 'float32 or wider, got bfloat16'),
    ((ok, ok.astype(int)), {}, 'inputs must be floating-point'),
    ((ok, ok, ok), {}, r'must have shape \[2, 3\]'),
    ((ok, ok), {'reset': ok}, r'reset must be boolean of shape \[2, 4\]'),
  ):
    with pytest.raises(ValueError, match=message):
      linear_recurrence(*arguments, **options)
