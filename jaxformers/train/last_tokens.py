"""Measuring a model on the last tokens of rows, of whatever length."""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxformers.data import RowSource
from jaxformers.data import heldout_batches
from jaxformers.losses.cross_entropy import cross_entropy
from jaxformers.train.objective import Variables


class LastTokens(NamedTuple):
  """How well a model predicts the last tokens of rows.

  Attributes:
    bits: mean negative binary logarithm of a target's probability.
    accuracy: share of targets that were the likeliest token.
    targets: how many there were.
  """

  bits: float
  accuracy: float
  targets: int


def evaluate_last_tokens(
  model: nn.Module,
  variables: Variables,
  rows: RowSource,
  last: int,
  *,
  batch_size: int = 32,
) -> LastTokens:
  """Measures a language model on the last targets of each row.

  What comes before them is context only. Rows that end alike and begin earlier
  or later show what a model makes of more or less context; the model need not
  be the one that was trained, but may read positions in another way.

  Args:
    model: maps tokens to logits, as `LanguageModel` does.
    variables: its variables.
    rows: with `tokens` and `targets`, as `Prepared.heldout` has them.
    last: how many targets of each row count, from the end; fewer if a row has
      fewer, or if some are -1.
    batch_size: rows per call of the model.

  Raises:
    ValueError: if `last` is not positive, or there is nothing to predict.
  """
  if last < 1:
    raise ValueError(f'last must be at least 1 target per row, got {last}.')
  sums = [
    _sums(model, variables, batch['tokens'], batch['targets'], last)
    for batch in heldout_batches(rows, batch_size)
  ]
  nats, right, targets = (
    sum(map(float, parts)) for parts in zip(*sums, strict=True)
  )
  if not targets:
    raise ValueError('there is nothing to predict among the last targets.')
  bits = nats / math.log(2) / targets
  return LastTokens(bits, right / targets, int(targets))


@functools.partial(jax.jit, static_argnames=('model', 'last'))
def _sums(model, variables, tokens_BL, targets_BL, last):
  """Returns the sums of nats, of right answers and of targets."""
  logits_BLV, _ = model.apply(variables, tokens_BL)
  logits_BLV, targets_BL = logits_BLV[:, -last:], targets_BL[:, -last:]
  losses = cross_entropy(logits_BLV, targets_BL)
  # No token is -1, so what is not to be predicted is never right.
  is_right_BL = jnp.argmax(logits_BLV, axis=-1) == targets_BL
  counted = losses.cross_entropy_BL, is_right_BL, losses.is_target_BL
  return tuple(array.sum(dtype=jnp.float32) for array in counted)
