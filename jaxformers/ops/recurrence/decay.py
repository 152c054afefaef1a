"""How much is left of each step at each other, when states decay.

Between steps j < i decays multiply to `a_(j+1) ... a_i`. Ratios of products from
a common start would say so, but overflow or vanish, and differences of sums of
logarithms lose digits. Here blocks of steps double: what a step in the second
half of a block sees of one in the first is what is left of it at the middle,
times what the other sees of the middle. Both are sums of logarithms that never
grow positive, so that nothing is subtracted and nothing overflows, and -inf
(which forgets all before) needs no care.
"""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from jaxformers.ops.segments import Places


class Decays(NamedTuple):
  """What decays do within a chunk of C steps, in logarithms.

  Attributes:
    seen_BHCK: of the state before the chunk, how much each step reads.
    left_BHCK: of what each step writes, how much the chunk leaves.
    total_BH1K: of the state before the chunk, how much the chunk leaves.
  """

  seen_BHCK: Float[Array, 'B H C K']
  left_BHCK: Float[Array, 'B H C K']
  total_BH1K: Float[Array, 'B H 1 K']


def decay_weights(
  log_decay_BHC: Float[Array, '*B C'],
) -> tuple[Float[Array, '*B C C'], Float[Array, '*B C']]:
  """Returns how much of each step, and of the state before, a step still sees.

  Entry (i, j) is `a_(j+1) ... a_i` for j <= i and 0 otherwise; the second
  result is `a_0 ... a_i`.

  Source: Dao and Gu, "Transformers are SSMs", 2024, arXiv 2405.21060, section
  3 (1-semiseparable matrices).

  Args:
    log_decay_BHC: logarithms of a, at most 0; -inf forgets all before.
  """
  *batch, chunk = log_decay_BHC.shape
  padded = power_of_two(chunk)
  x_B1C1 = log_decay_BHC.reshape(-1, 1, chunk, 1)
  x_B1C1 = jnp.pad(x_B1C1, ((0, 0), (0, 0), (0, padded - chunk), (0, 0)))
  weights, decays = weigh(x_B1C1)
  weights = weights[..., :chunk, :chunk].reshape(*batch, chunk, chunk)
  seen = decays.seen_BHCK[..., :chunk, :].reshape(*batch, chunk)
  return weights, jnp.exp(seen)


def decays_in_segments(
  log_decay: Float[Array, '...'], places: Places | None
) -> Float[Array, '...']:
  """Lets segments forget those before them, and padding leave states alone.

  Source: none; the decay of a step that forgets is 0, of one that is skipped 1.

  Args:
    log_decay: `[H]`, `[H, K]`, `[B, L, H]` or `[B, L, H, K]`.
    places: where the tokens stand; None for one segment without padding.

  Returns:
    `log_decay`, with -inf where segments begin and 0 at padding.
  """
  if places is None:
    return log_decay
  heads = 1 if jnp.ndim(log_decay) in (1, 3) else 2
  position, number = (
    x.reshape(x.shape + (1,) * heads)
    for x in (places.position_BL, places.number_BL)
  )
  log_decay = jnp.where(position == 0, -jnp.inf, log_decay)
  return jnp.where(number == 0, 0, log_decay)


def weigh(
  log_decay_BHC1: Float[Array, 'B H C 1'], *, before: bool = False
) -> tuple[Float[Array, 'B H C C'], Decays]:
  """Returns how much of each step each step reads, for one decay per head.

  Args:
    log_decay_BHC1: logarithms of a, at most 0; C is a power of 2.
    before: whether a step reads before its own decay and write, which it
      then does not see; -inf still clears the state before it is read.
  """
  own = jnp.full_like(log_decay_BHC1, not before)
  return _double(log_decay_BHC1, before, own, lambda seen, left: seen * left.mT)


def score(
  query_BHCK: Float[Array, 'B H C K'],
  key_BHCK: Float[Array, 'B H C K'],
  log_decay_BHCK: Float[Array, '#B H C K'],
  dot: Callable[[Array, Array], Array],
  *,
  before: bool = False,
) -> tuple[Float[Array, 'B H C C'], Decays]:
  """Returns `sum_k q_ik k_jk w_ijk` for the weights w of each channel k.

  Source: Yang et al., "Gated Linear Attention Transformers", 2023, arXiv
  2312.06635, section 4.3 (blocks within chunks), here with as many levels of
  blocks as there are.

  Args:
    query_BHCK: q.
    key_BHCK: k.
    log_decay_BHCK: as for `weigh`, for each channel of the keys.
    dot: multiplies matrices.
    before: as for `weigh`.
  """

  def meet(seen, left):
    _, query = _halves(_blocks(query_BHCK, seen.shape[2]))
    key, _ = _halves(_blocks(key_BHCK, seen.shape[2]))
    return dot(query * seen, (key * left).mT)

  own = jnp.sum(query_BHCK * key_BHCK, axis=-1, keepdims=True)
  own = jnp.zeros_like(own) if before else own
  return _double(log_decay_BHCK, before, own, meet)


def power_of_two(length: int) -> int:
  """Returns the least power of 2 that is not below a length."""
  return 1 << (length - 1).bit_length()


def _double(
  log_decay: Array, before: bool, own: Array, meet: Callable[..., Array]
) -> tuple[Array, Decays]:
  """Doubles blocks until there is one.

  Args:
    log_decay: `[B, H, C, K]`.
    before: see `weigh`.
    own: `[B, H, C, 1]`, what each step has of itself.
    meet: makes `[B, N, m, m]`, what steps of the second half have of those of
      the first, from how much of the middle the former see and how much of the
      latter the middle has left, both `[B, N, m, K]`.
  """
  heads = log_decay.shape[1]
  total = _blocks(log_decay, 1)
  seen = jnp.where(total == -jnp.inf, -jnp.inf, 0) if before else total
  left = jnp.zeros_like(total)
  scores = _blocks(own, 1)
  while total.shape[1] > heads:
    (seen_0, seen_1), (left_0, left_1) = _halves(seen), _halves(left)
    total_0, total_1 = _halves(total)
    below = meet(jnp.exp(seen_1), jnp.exp(left_0))
    scores_0, scores_1 = _halves(scores)
    scores = _joined(
      _joined(scores_0, jnp.zeros_like(below), -1),
      _joined(below, scores_1, -1),
      -2,
    )
    seen = _joined(seen_0, seen_1 + total_0, -2)
    left = _joined(left_0 + total_1, left_1, -2)
    total = total_0 + total_1
  return scores, Decays(seen, left, total)


def _blocks(x_BHCK, size):
  """Cuts `[B, H, C, K]` into blocks `[B, H C / size, size, K]`."""
  batch, _, _, width = x_BHCK.shape
  return x_BHCK.reshape(batch, -1, size, width)


def _halves(x_BNCK):
  """Splits blocks `[B, N, m, K]` into first and second ones of pairs."""
  batch, _, *block = x_BNCK.shape
  x = x_BNCK.reshape(batch, -1, 2, *block)
  return x[:, :, 0], x[:, :, 1]


def _joined(first, second, axis):
  return jnp.concatenate([first, second], axis=axis)
