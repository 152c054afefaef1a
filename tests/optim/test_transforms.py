"""The conformance table of the optimisers: one row per transformation."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxformers.optim import AdamW
from jaxformers.optim import Constant
from jaxformers.optim import FromOptax
from jaxformers.optim import child_tuning_d
from jaxformers.optim import child_tuning_f
from jaxformers.optim import lora_plus
from jaxformers.optim import transformers_adamw
from jaxformers.testing import TransformCase
from jaxformers.testing import TransformConformance
from jaxformers.testing.transforms import Bench


def adamw(learning_rate, b1):
  optimizer = AdamW(Constant(learning_rate), b1=b1, weight_decay=0.0)
  return optimizer.build(200)


def lion(learning_rate):
  return FromOptax('lion', Constant(learning_rate)).build(200)


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


class TestTransforms(TransformConformance):
  cases = (
    TransformCase('adamw', adamw, (('learning_rate', 0.05), ('b1', 0.9))),
    TransformCase('lion', lion, (('learning_rate', 0.02),)),
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
