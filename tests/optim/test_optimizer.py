"""Schedules and optimisers against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformers.optim import AdamW
from jaxformers.optim import Constant
from jaxformers.optim import FromOptax
from jaxformers.optim import WarmupCosine
from jaxformers.optim import WarmupLinear
from jaxformers.optim.optimizer import weight_decay_mask


def test_warmup_cosine_by_its_formula():
  rate = WarmupCosine(peak=2.0, warmup_steps=4, final_fraction=0.1).schedule(14)
  np.testing.assert_allclose(
    [rate(i) for i in range(5)], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6
  )
  half = 0.2 + 1.8 * (1 + np.cos(np.pi * 5 / 10)) / 2
  np.testing.assert_allclose(rate(9), half, rtol=1e-6)
  np.testing.assert_allclose(rate(14), 0.2, rtol=1e-6)


def test_warmup_linear_by_its_formula():
  rate = WarmupLinear(peak=1.0, warmup_steps=3, final_fraction=0.5).schedule(13)
  np.testing.assert_allclose(
    [rate(i) for i in (0, 3, 8, 13)], [0.25, 1.0, 0.75, 0.5], rtol=1e-6
  )


@pytest.mark.parametrize('schedule', [WarmupCosine(1.0), WarmupLinear(1.0)])
@pytest.mark.parametrize('steps', [1, 2, 50])
def test_short_runs_shorten_the_warmup(schedule, steps):
  rates = np.array([schedule.schedule(steps)(i) for i in range(steps)])
  assert (rates > 0).all()
  assert rates.max() == 1.0


def test_only_matrices_decay():
  params = {
    'layers': {'w_DF': jnp.ones((2, 3, 4)), 'scale_D': jnp.ones((2, 3))},
    'b_F': jnp.ones(4),
    'table_VD': jnp.ones((5, 3)),
  }
  assert weight_decay_mask(params) == {
    'layers': {'w_DF': True, 'scale_D': False},
    'b_F': False,
    'table_VD': True,
  }


def test_adamw_first_step_by_hand():
  params = {'w_DF': jnp.array([[2.0]]), 'b_F': jnp.array([2.0])}
  grads = {'w_DF': jnp.array([[3.0]]), 'b_F': jnp.array([4.0])}
  optimizer = AdamW(
    Constant(0.1), weight_decay=0.5, max_gradient_norm=None
  ).build(10)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  # Bias-corrected, the first Adam step is the sign; the matrix also decays.
  np.testing.assert_allclose(updates['w_DF'], -0.1 * (1 + 0.5 * 2), rtol=1e-5)
  np.testing.assert_allclose(updates['b_F'], -0.1, rtol=1e-5)


def test_gradients_are_clipped_before_the_optimiser():
  optimizer = FromOptax('sgd', Constant(1.0), max_gradient_norm=1.0).build(1)
  params = {'w_DF': jnp.array([[0.0, 0.0]])}
  grads = {'w_DF': jnp.array([[30.0, 40.0]])}
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  np.testing.assert_allclose(updates['w_DF'], [[-0.6, -0.8]], rtol=1e-6)


def test_any_optax_optimiser_serves_by_name_and_options():
  ours = FromOptax('lion', Constant(0.1), (('b1', 0.5),), None).build(3)
  theirs = optax.lion(0.1, b1=0.5)
  params = {'w_DF': jnp.ones((2, 2))}
  grads = jax.tree.map(lambda a: a * 3, params)
  jax.tree.map(
    np.testing.assert_array_equal,
    ours.update(grads, ours.init(params), params, value=1.0)[0],
    theirs.update(grads, theirs.init(params), params)[0],
  )


def test_an_unknown_optimiser_names_the_nearest():
  with pytest.raises(ValueError, match="'lyon'; did you mean 'lion'"):
    FromOptax('lyon').build(1)
