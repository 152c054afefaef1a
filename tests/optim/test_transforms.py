"""The conformance table of the optimisers: one row per transformation."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxformers.optim import AdamW
from jaxformers.optim import Constant
from jaxformers.optim import FromOptax
from jaxformers.optim import TuningFreeL2
from jaxformers.optim.tasks import MGDA
from jaxformers.optim.tasks import GradDrop
from jaxformers.optim.tasks import PCGrad
from jaxformers.optim.tasks import aggregate_tasks
from jaxformers.optim.tasks import normalize_task_gradients
from jaxformers.testing import TransformCase
from jaxformers.testing import TransformConformance
from jaxformers.testing.transforms import Bench


def adamw(learning_rate, b1):
  optimizer = AdamW(Constant(learning_rate), b1=b1, weight_decay=0.0)
  return optimizer.build(200)


def lion(learning_rate):
  return FromOptax('lion', Constant(learning_rate)).build(200)


def combined(combination, learning_rate):
  return optax.chain(
    aggregate_tasks(combination, tasks=2), optax.sgd(learning_rate)
  )


def normalized(learning_rate, eps):
  return optax.chain(normalize_task_gradients(eps), optax.adam(learning_rate))


def shrinking(learning_rate, scope='global'):
  optimizer = AdamW(Constant(learning_rate), weight_decay=0.0)
  decoupled = scope == 'tensor'
  return TuningFreeL2(optimizer, scope, decoupled).build(200)


class TestTransforms(TransformConformance):
  cases = (
    TransformCase('adamw', adamw, (('learning_rate', 0.05), ('b1', 0.9))),
    TransformCase('lion', lion, (('learning_rate', 0.02),)),
    *(
      TransformCase(
        f'tasks_by_{type(combination).__name__}',
        functools.partial(combined, combination),
        (('learning_rate', rate),),
        tasks=2,
      )
      for combination, rate in (
        (MGDA(), 0.2),
        (PCGrad(), 0.06),
        (GradDrop(), 0.06),
      )
    ),
    TransformCase(
      'normalized_tasks',
      normalized,
      (('learning_rate', 0.05), ('eps', 1e-8)),
      tasks=3,
    ),
    # What must not grow longer does not come near every target.
    TransformCase(
      'tuning_free_l2', shrinking, (('learning_rate', 0.05),), remains=0.5
    ),
    TransformCase(
      'tuning_free_l2_decoupled',
      functools.partial(shrinking, scope='tensor'),
      (('learning_rate', 0.05),),
      remains=0.5,
    ),
  )


@pytest.mark.parametrize(
  ('name', 'rewrite'),
  [
    (
      'sharded_it_does_the_same_and_gathers_nothing',
      lambda g: g * jnp.vdot(g, g),
    ),
    ('it_keeps_dtypes', lambda g: g.astype(jnp.float32)),
    ('it_converges_on_a_quadratic', lambda g: -g),
  ],
)
def test_the_suite_notices_what_breaks_the_contract(name, rewrite):
  link = optax.stateless(lambda updates, _: jax.tree.map(rewrite, updates))
  bench = Bench(TransformCase('bad', lambda: optax.chain(link, optax.sgd(0.1))))
  with pytest.raises(AssertionError):
    getattr(TransformConformance(), f'test_{name}')(bench)
