import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.train import evaluate_last_tokens


class Repeats(nn.Module):
  """Expects of three tokens the same again with 3/5, each other with 1/5."""

  def __call__(self, tokens_BL):
    return jax.nn.one_hot(tokens_BL, 3) * jnp.log(3.0), None


def row(tokens, targets):
  return {'tokens': np.array(tokens), 'targets': np.array(targets)}


ROWS = [row([0, 1, 2, 0], [0, 1, 1, -1]), row([2, 2, 1, 0], [0, 2, 1, 2])]


def test_bits_and_accuracy_are_those_computed_by_hand():
  found = evaluate_last_tokens(Repeats(), {}, ROWS[:1], 3)
  # Targets 1 and 1 after the tokens 1 and 2.
  assert found.bits == pytest.approx(-(math.log2(3 / 5) + math.log2(1 / 5)) / 2)
  assert found.accuracy == 0.5
  assert found.targets == 2


def test_all_targets_count_where_there_are_no_more():
  found = evaluate_last_tokens(Repeats(), {}, ROWS, 4)
  # Right, right, wrong; wrong, right, right, wrong.
  assert found == evaluate_last_tokens(Repeats(), {}, ROWS, 9)
  assert found.targets == 7
  assert found.accuracy == pytest.approx(4 / 7)
  bits = -(4 * math.log2(3 / 5) + 3 * math.log2(1 / 5)) / 7
  assert found.bits == pytest.approx(bits)


@pytest.mark.parametrize('batch_size', [1, 2, 3])
def test_batches_change_nothing(batch_size):
  rows = ROWS + ROWS[:1]
  found = evaluate_last_tokens(Repeats(), {}, rows, 2, batch_size=batch_size)
  # Wrong, none; right, wrong; wrong, none.
  assert found.targets == 4
  assert found.accuracy == 0.25


def test_what_cannot_be_measured_is_refused():
  with pytest.raises(ValueError, match='at least 1 target per row, got 0'):
    evaluate_last_tokens(Repeats(), {}, ROWS, 0)
  with pytest.raises(ValueError, match='nothing to predict'):
    evaluate_last_tokens(Repeats(), {}, ROWS[:1], 1)
