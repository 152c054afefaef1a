"""Absolute positions that are learned, and their hierarchical extension."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.models import LanguageModel
from jaxformers.nn import Block
from jaxformers.nn import Hierarchical
from jaxformers.nn import Learned
from jaxformers.nn import Normal
from jaxformers.nn import Stack
from jaxformers.nn.mixers import Attention
from jaxformers.train.record import from_record
from jaxformers.train.record import known_classes
from jaxformers.train.record import to_record

N, WIDTH = 4, 3
PLAIN = Learned(max_length=N, initializer=Normal(1.0))
EXTENDED = PLAIN.clone(extension=Hierarchical())
ALL = jnp.arange(N * N).reshape(2, -1)


def table():
  short = jnp.arange(N)[None]
  variables = PLAIN.init(jax.random.key(0), short, WIDTH)
  return variables, np.asarray(variables['params']['table_LD'], np.float64)


def test_hierarchical_codes_by_their_formula():
  variables, p_LD = table()
  assert Hierarchical().alpha == 0.4
  # Twice as many tokens as vectors in each row.
  y = EXTENDED.apply(variables, ALL, WIDTH).reshape(N * N, WIDTH)
  u_LD = (p_LD - 0.4 * p_LD[0]) / 0.6
  for p in range(N * N):
    expected = 0.4 * u_LD[p // N] + 0.6 * u_LD[p % N]
    np.testing.assert_allclose(y[p], expected, rtol=1e-5, atol=1e-6)


def test_hierarchical_code_of_a_hand_computed_table():
  table_LD = jnp.array([[1.0], [4.0]])
  codes = Hierarchical(0.25).codes(table_LD, jnp.arange(4)[None])
  # u = (P - 0.25) / 0.75 = [1, 5]; then 0.25 u_x + 0.75 u_y.
  np.testing.assert_allclose(codes[0, :, 0], [1, 4, 2, 5], rtol=1e-6)


def test_hierarchical_codes_of_the_trained_positions_do_not_change():
  variables, p_LD = table()
  y = EXTENDED.apply(variables, jnp.arange(N)[None], WIDTH)
  np.testing.assert_array_equal(y[0], p_LD.astype(np.float32))


def test_hierarchical_codes_need_no_new_parameters_and_differ():
  variables, _ = table()
  fresh = EXTENDED.init(jax.random.key(0), ALL, WIDTH)
  jax.tree.map(np.testing.assert_array_equal, fresh, variables)
  y = np.asarray(EXTENDED.apply(variables, ALL, WIDTH)).reshape(N * N, WIDTH)
  assert len(np.unique(y.round(4), axis=0)) == N * N


def test_positions_beyond_the_reach_give_nan():
  variables, _ = table()
  place = jnp.array([[N * N - 1, N * N, 3 * N * N]])
  y = EXTENDED.apply(variables, place, WIDTH)
  np.testing.assert_array_equal(np.isnan(y[0, :, 0]), [False, True, True])
  y = PLAIN.apply(variables, jnp.array([[N - 1, N]]), WIDTH)
  np.testing.assert_array_equal(np.isnan(y[0, :, 0]), [False, True])


def test_lengths_beyond_the_reach_are_refused():
  variables, _ = table()
  long = jnp.zeros((1, N * N + 1), jnp.int32)
  with pytest.raises(ValueError, match='17 tokens, but Learned has 16 posit'):
    EXTENDED.apply(variables, long, WIDTH)
  with pytest.raises(ValueError, match='5 tokens, but Learned has 4 positions'):
    PLAIN.apply(variables, long[:, :5], WIDTH)


def test_the_state_of_a_model_may_be_as_long_as_its_positions_reach():
  model = LanguageModel(
    vocab_size=5,
    width=8,
    stack=Stack(Block(Attention(num_heads=2)), depth=1),
    position=EXTENDED,
  )
  state = model.initial_state(1, N * N)
  assert any(N * N in x.shape for x in jax.tree.leaves(state))
  with pytest.raises(ValueError, match='17 tokens, but Learned has 16'):
    model.initial_state(1, N * N + 1)
  with pytest.raises(ValueError, match='5 tokens, but Learned has 4'):
    model.clone(position=PLAIN).initial_state(1, N + 1)


def test_an_extension_is_part_of_the_configuration():
  assert from_record(to_record(EXTENDED), known_classes()) == EXTENDED


@pytest.mark.parametrize('alpha', [0.0, 1.0, 0.5, -0.4])
def test_an_alpha_that_cannot_tell_digits_apart_is_refused(alpha):
  with pytest.raises(ValueError, match='0 < alpha < 1 and not 0.5'):
    Hierarchical(alpha)
