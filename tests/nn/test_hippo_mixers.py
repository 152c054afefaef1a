"""Memories as layers: what they refuse."""

import jax
import jax.numpy as jnp
import pytest

from jaxformers.nn.mixers import HippoMemory
from jaxformers.nn.mixers import HippoRNN
from jaxformers.ops import FouS
from jaxformers.ops import FouT
from jaxformers.ops import LegT


@pytest.mark.parametrize('mixer', [HippoMemory, HippoRNN])
@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'measure': LegT()}, r'remembers 1 samples .* as LegT\(window=128.0\)'),
    ({'measure': FouT(0.5), 'step': 0.5}, r'remembers 1 samples of length 0.5'),
    ({'measure': FouS(), 'size': 3}, r'complex states.* FouT\(form='),
    ({'measure': FouT(8.0, form='complex'), 'size': 3}, 'complex states'),
  ],
)
def test_memories_that_a_layer_cannot_use_are_refused(mixer, options, message):
  with pytest.raises(ValueError, match=message):
    mixer(**options).init(jax.random.key(0), jnp.zeros((1, 2, 4)))
