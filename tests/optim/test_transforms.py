"""The conformance table of the optimisers: one row per transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformers.diagnostics import monitor_alignment
from jaxformers.optim import AdamW
from jaxformers.optim import AdaptStepSize
from jaxformers.optim import Averaged
from jaxformers.optim import Constant
from jaxformers.optim import ExponentiatedGradient
from jaxformers.optim import FromOptax
from jaxformers.optim import TuningFreeL2
from jaxformers.optim import adagrad_norm
from jaxformers.optim import adapt_step_size
from jaxformers.optim import child_tuning_d
from jaxformers.optim import child_tuning_f
from jaxformers.optim import eg_plus_minus
from jaxformers.optim import exponentiated_gradient
from jaxformers.optim import flood
from jaxformers.optim import lora_plus
from jaxformers.optim import project_l2_ball
from jaxformers.optim import transformers_adamw
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


def momentum(learning_rate):
  options = (('momentum', 0.9),)
  return FromOptax('sgd', Constant(learning_rate), options).build(200)


def adapted_momentum(learning_rate, gain_lr, scale_lr, beta):
  sgd = optax.sgd(learning_rate, momentum=0.9)
  return adapt_step_size(sgd, gain_lr, scale_lr, beta=beta)


def adapted_adamw(learning_rate):
  optimizer = AdamW(Constant(learning_rate), weight_decay=0.0)
  return AdaptStepSize(optimizer, scope='global').build(200)


def signed_adam(learning_rate, l1_decay):
  optimizer = AdamW(Constant(learning_rate), weight_decay=0.0)
  return ExponentiatedGradient(optimizer, l1_decay=l1_decay).build(200)


def momentum_in_a_ball(learning_rate, radius):
  return optax.chain(
    optax.sgd(learning_rate, momentum=0.9), project_l2_ball(radius)
  )


def monitored_adam(learning_rate):
  return monitor_alignment(optax.adam(learning_rate))


def flooded(level):
  """Well above the level, where nothing turns round."""
  inner = optax.chain(flood(level), optax.sgd(0.1, momentum=0.9))

  def update(updates, state, params=None, **extra):
    return inner.update(updates, state, params, **{**extra, 'value': 1e9})

  return optax.GradientTransformationExtraArgs(inner.init, update)


def with_fixed_signs(x):
  signs = (-1.0) ** np.arange(x.size).reshape(x.shape)
  return jnp.exp(x) * signs


def child_tuning(p, learning_rate):
  link = child_tuning_f(p, jax.random.key(0))
  return optax.chain(link, optax.adam(learning_rate))


def update_dropout(p, learning_rate):
  link = child_tuning_f(p, jax.random.key(0), coarse=True)
  return optax.chain(optax.adam(learning_rate), link)


def first_rows(params):
  return jax.tree.map(
    lambda p: jnp.arange(p.size).reshape(p.shape) < 0.9 * p.size, params
  )


def fixed_child(learning_rate):
  return child_tuning_d(
    first_rows, optax.adamw(learning_rate), rescale=True, mask_decay=True
  )


def two_rates(lr, ratio):
  return lora_plus(optax.adam, lr, ratio)


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
    TransformCase('momentum_from_optax', momentum, (('learning_rate', 0.1),)),
    TransformCase(
      'exponentiated_gradient',
      exponentiated_gradient,
      (('learning_rate', 0.1),),
      feasible=jnp.exp,
    ),
    TransformCase(
      'exponentiated_gradient_simplex',
      functools.partial(
        exponentiated_gradient, mode='simplex', axis=None, floor=1e-8
      ),
      (('learning_rate', 1.0),),
      feasible=lambda x: jax.nn.softmax(x, axis=None),
    ),
    TransformCase(
      'exponentiated_adam_signed',
      signed_adam,
      (('learning_rate', 0.05), ('l1_decay', 1e-3)),
      feasible=with_fixed_signs,
    ),
    TransformCase(
      'eg_plus_minus',
      eg_plus_minus,
      (('learning_rate', 0.01), ('total_mass', 8.0)),
      feasible=lambda x: x / 4,
    ),
    TransformCase(
      'adapted_momentum',
      adapted_momentum,
      (
        ('learning_rate', 0.03),
        ('gain_lr', 0.01),
        ('scale_lr', 0.01),
        ('beta', 0.9),
      ),
    ),
    TransformCase(
      'adapted_adamw_global', adapted_adamw, (('learning_rate', 0.05),)
    ),
    TransformCase('adagrad_norm', adagrad_norm, (('learning_rate', 4.0),)),
    TransformCase(
      'momentum_in_a_ball',
      momentum_in_a_ball,
      (('learning_rate', 0.1), ('radius', 8.0)),
    ),
    TransformCase(
      'averaged_momentum',
      lambda learning_rate: Averaged(
        FromOptax('sgd', Constant(learning_rate), (('momentum', 0.9),))
      ).build(200),
      (('learning_rate', 0.1),),
    ),
    TransformCase('monitored_adam', monitored_adam, (('learning_rate', 0.05),)),
    TransformCase('flooded', flooded, (('level', 0.1),)),
    TransformCase(
      'transformers_adamw',
      transformers_adamw,
      (('learning_rate', 0.05), ('b2', 0.95), ('weight_decay', 1e-3)),
    ),
    TransformCase(
      'child_tuning_f', child_tuning, (('p', 0.5), ('learning_rate', 0.05))
    ),
    TransformCase(
      'update_dropout', update_dropout, (('p', 0.5), ('learning_rate', 0.05))
    ),
    TransformCase(
      'child_tuning_d', fixed_child, (('learning_rate', 0.05),), remains=0.5
    ),
    TransformCase('lora_plus', two_rates, (('lr', 0.05), ('ratio', 2.0))),
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
