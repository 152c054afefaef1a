"""Perturbed parameters against steps by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformers.losses import pgd_loss
from jaxformers.ops import L2Ball
from jaxformers.optim import FGM
from jaxformers.optim import PGD
from jaxformers.optim import Flooding
from jaxformers.optim import flood

PARAMS = {
  'embed': {'table_VD': jax.random.normal(jax.random.key(0), (4, 3))},
  'w_DF': jax.random.normal(jax.random.key(1), (3, 2)),
}


def loss(params, ids):
  h = jnp.tanh(params['embed']['table_VD'][ids] @ params['w_DF'])
  return jnp.sum(h**2), h


IDS = jnp.array([0, 2, 3])


def at_table(table):
  return lambda params: loss({**params, 'embed': {'table_VD': table}}, IDS)[0]


def test_fgm_differentiates_at_a_moved_table():
  table = PARAMS['embed']['table_VD']
  gradient = jax.grad(lambda t: at_table(t)(PARAMS))(table)
  moved = table + 0.3 * gradient / jnp.linalg.norm(gradient)
  there = {**PARAMS, 'embed': {'table_VD': moved}}
  (value, aux), found = jax.jit(FGM(0.3).value_and_grad(loss))(PARAMS, IDS)
  np.testing.assert_allclose(value, loss(there, IDS)[0], rtol=1e-6)
  np.testing.assert_allclose(aux, loss(PARAMS, IDS)[1], rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    found,
    jax.grad(lambda p: loss(p, IDS)[0])(there),
  )


def test_pgd_is_that_of_the_table_as_inputs():
  expected = pgd_loss(
    lambda params, table: at_table(table)(params),
    PARAMS,
    PARAMS['embed']['table_VD'],
    L2Ball(0.4, per_example=False),
    steps=3,
    stride=0.6,
  )
  attack = PGD(epsilon=0.4, steps=3, stride=0.6)
  (value, _), _ = attack.value_and_grad(loss)(PARAMS, IDS)
  np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_a_share_of_the_loss_itself_stays():
  plain = jax.value_and_grad(loss, has_aux=True)(PARAMS, IDS)
  worse = FGM(0.3).value_and_grad(loss)(PARAMS, IDS)
  mixed = FGM(0.3, clean=0.25).value_and_grad(loss)(PARAMS, IDS)
  jax.tree.map(
    lambda m, a, b: np.testing.assert_allclose(
      m, 0.25 * a + 0.75 * b, rtol=1e-5, atol=1e-6
    ),
    (mixed[0][0], mixed[1]),
    (plain[0][0], plain[1]),
    (worse[0][0], worse[1]),
  )


def test_parameters_are_chosen_by_their_path():
  every = FGM(0.3, parameters='').value_and_grad(loss)(PARAMS, IDS)[0][0]
  table = FGM(0.3).value_and_grad(loss)(PARAMS, IDS)[0][0]
  assert every > table
  with pytest.raises(ValueError, match="no parameter matches 'head'.*w_DF"):
    FGM(0.3, parameters='head').value_and_grad(loss)(PARAMS, IDS)
  with pytest.raises(ValueError, match='steps must be at least 1, got 0'):
    PGD(steps=0)
  with pytest.raises(ValueError, match=r'clean must lie in \[0, 1\), got 2'):
    PGD(clean=2)


@pytest.mark.parametrize('level', [0.1, 5.0])
def test_flooding_turns_descent_round_below_the_level(level):
  (plain, _), gradient = jax.value_and_grad(loss, has_aux=True)(PARAMS, IDS)
  (value, _), flooded = Flooding(level).value_and_grad(loss)(PARAMS, IDS)
  sign = 1 if plain > level else -1
  np.testing.assert_allclose(value, abs(plain - level) + level, rtol=1e-6)
  chain = optax.chain(flood(level), optax.scale(2.0))
  turned, _ = chain.update(gradient, chain.init(PARAMS), PARAMS, value=plain)
  jax.tree.map(
    lambda f, t, g: (
      np.testing.assert_allclose(f, sign * g, rtol=1e-6),
      np.testing.assert_allclose(t, 2 * sign * g, rtol=1e-6),
    ),
    flooded,
    turned,
    gradient,
  )
