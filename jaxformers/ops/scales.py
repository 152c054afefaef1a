"""What attention scores are multiplied with before the softmax."""

from collections.abc import Callable
import dataclasses
import math
from typing import Protocol, runtime_checkable

from jax import Array
from jaxtyping import Float


@runtime_checkable
class Scale(Protocol):
  """A multiplier of the attention scores, one number or one per query."""

  def multiplier(
    self, visible_keys: Callable[[], Array], head_dim: int
  ) -> float | Float[Array, 'B H L']:
    """Returns the multiplier.

    Args:
      visible_keys: gives, when called, int `[B, H, L]` (axes may have size 1),
        the number of keys that each query sees.
      head_dim: width K of queries and keys.
    """
    ...


@dataclasses.dataclass(frozen=True)
class InverseSqrt:
  """Divides scores by the square root of the head width.

  Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762,
  equation 1.
  """

  def multiplier(self, visible_keys, head_dim):
    del visible_keys
    return 1 / math.sqrt(head_dim)
