"""How scores become the weights of values: softmax and others."""

import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int


class Weights(NamedTuple):
  """Weights of the keys of each query, and what normalised them.

  Attributes:
    weights: `[..., L, M]`.
    log_normalizer: `[..., L]`.
  """

  weights: Float[Array, '*B L M']
  log_normalizer: Float[Array, '*B L']


@runtime_checkable
class Kind(Protocol):
  """How scores become the weights of values."""

  def weights(
    self, logits: Float[Array, '*B L M'], is_visible: Bool[Array, '*B L M']
  ) -> Weights:
    """Returns weights, zero wherever `is_visible` is False."""
    ...


@dataclasses.dataclass(frozen=True)
class Softmax:
  """Weights proportional to the exponentials of the visible scores.

  A query that sees nothing has weights 0 and gradients 0, not the mean of all
  values that a softmax over equal large negative numbers gives.

  Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762,
  equation 1.
  """

  def weights(self, logits, is_visible):
    # Finite, so that no branch ever holds inf - inf, whose gradient would be nan
    # even where it is discarded.
    logits = jnp.where(is_visible, logits, jnp.finfo(logits.dtype).min)
    weights = jnp.where(is_visible, jax.nn.softmax(logits, axis=-1), 0)
    log_normalizer = jnp.where(
      is_visible.any(axis=-1), jax.nn.logsumexp(logits, axis=-1), -jnp.inf
    )
    return Weights(weights, log_normalizer)


class Additive:
  """Weights that are each a function of one score, with a common divisor.

  No score affects the weight of another, so nothing needs to be known of all
  of them first.
  """

  def weight(self, logits: Float[Array, '*B']) -> Float[Array, '*B']:
    """Returns the undivided weight of each score."""
    raise NotImplementedError

  def divisor(
    self, visible_keys: Int[Array, 'B H L']
  ) -> Float[Array, 'B H L'] | Int[Array, 'B H L']:
    """Returns what weights are divided by; positive.

    Args:
      visible_keys: number of keys that each query sees; axes may have size 1.
    """
    return jnp.maximum(visible_keys, 1)

  def weights(self, logits, is_visible):
    shape = jnp.broadcast_shapes(is_visible.shape, (1, 1, 1, logits.shape[-1]))
    visible_keys = jnp.broadcast_to(is_visible, shape).sum(axis=-1)
    divisor = self.divisor(visible_keys).astype(logits.dtype)
    weights = jnp.where(is_visible, self.weight(logits), 0) / divisor[..., None]
    log_divisor = jnp.where(visible_keys > 0, jnp.log(divisor), -jnp.inf)
    return Weights(weights, jnp.broadcast_to(log_divisor, logits.shape[:-1]))


@dataclasses.dataclass(frozen=True)
class SquaredReLU(Additive):
  """Weights `relu(score)^2 / n`, n the number of visible keys.

  Source: Hua et al., "Transformer Quality in Linear Time", 2022, arXiv
  2202.10447, equation 5, where n is the length of the sequence.
  """

  def weight(self, logits):
    return jnp.square(jax.nn.relu(logits))


@dataclasses.dataclass(frozen=True)
class Identity(Additive):
  """Weights `score / n`, n the number of visible keys: linear attention.

  Weights may be negative. Computed pair by pair; where there are more keys than
  dimensions, a sum of outer products of keys and values gives the same at less
  cost.

  Source: Su Jianlin, "Can attention really concentrate?", 2023,
  kexue.fm/archives/9889, section on linear attention.
  """

  def weight(self, logits):
    return logits
