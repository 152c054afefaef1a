"""Arithmetic over trees of parameters, wherever their leaves lie.

Nothing here flattens a leaf: a flattened copy of a leaf that is split along
another axis than its first would be gathered on every device. Sums of products
reduce to one scalar per leaf and device instead.
"""

from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float


def tree_dot(a: Any, b: Any) -> Float[Array, '']:
  """Computes the inner product of two trees, in at least float32.

  Source: none; sums of products, without the flattening of `jnp.vdot`.

  Args:
    a: tree of real arrays.
    b: another with the same structure and shapes.
  """

  def dot(x, y):
    dtype = jnp.promote_types(jnp.result_type(x, y), jnp.float32)
    return jnp.sum(jnp.asarray(x, dtype) * jnp.asarray(y, dtype))

  products = jax.tree.leaves(jax.tree.map(dot, a, b))
  return sum(products, jnp.zeros([], jnp.float32))


def tree_norm(a: Any) -> Float[Array, '']:
  """Computes the Euclidean norm of all entries of a tree, at least float32.

  Source: none; the root of `tree_dot` of a tree with itself.

  Args:
    a: tree of real arrays.
  """
  return jnp.sqrt(tree_dot(a, a))


def leaf_keys(key: Array, step: Any, tree: Any) -> Any:
  """Returns a random key for each leaf, a function of key, step and position.

  Draws by them are the same however the leaves are split among devices.

  Source: none; `jax.random.fold_in` of the step, then of the leaf's number.

  Args:
    key: of the run.
    step: int `[]`.
    tree: gives the structure.
  """
  key = jax.random.fold_in(key, step)
  leaves, structure = jax.tree.flatten(tree)
  keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
  return structure.unflatten(keys)


def top_fraction_threshold(
  tree: Any, fraction: Any, iterations: int = 40
) -> Float[Array, '']:
  """Finds the value that a fraction of all entries of a tree reaches.

  By bisection: each iteration counts the entries that reach a value, which needs
  one scalar per device, where sorting would gather all of them on each. What is
  halved is a set of consecutive floating-point numbers rather than an interval:
  32 halvings single out one float32, also among entries of very different
  size, such as squared gradients.

  Source: none; bisection of the empirical distribution function.

  Args:
    tree: arrays of real, finite numbers.
    fraction: of all entries, from 0 to 1.
    iterations: halvings; the result is exact from 32 on in float32, from 64 on
      in float64.

  Returns:
    The largest value that at least the fraction of entries reaches (`entry >=
    value`), at least float32: an entry, unless `iterations` are too few. The
    largest entry if the fraction is 0.
  """
  leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
  dtype = jnp.promote_types(jnp.result_type(*leaves), jnp.float32)
  leaves = [x.astype(dtype) for x in leaves]
  wanted = fraction * sum(x.size for x in leaves)

  def enough(value):
    # Integers: float32 cannot count beyond 2^24.
    counts = [jnp.sum(x >= value, dtype=jnp.int32) for x in leaves]
    return sum(count.astype(dtype) for count in counts) >= wanted

  def halve(_, ranks):
    low, high = ranks
    middle = (low >> 1) + (high >> 1) + (low & high & 1)
    reached = enough(_of_rank(middle, dtype))
    return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

  low = jnp.stack([x.min() for x in leaves]).min()
  high = jnp.stack([x.max() for x in leaves]).max()
  low = jnp.where(enough(high), high, low)
  ranks = _rank(low), _rank(high)
  return _of_rank(jax.lax.fori_loop(0, iterations, halve, ranks)[0], dtype)


def _rank(x):
  """Numbers floating-point numbers in their order, by reading their bits."""
  integer = jnp.int32 if x.dtype == jnp.float32 else jnp.int64
  return _flip(jax.lax.bitcast_convert_type(x, integer))


def _of_rank(rank, dtype):
  return jax.lax.bitcast_convert_type(_flip(rank), dtype)


def _flip(bits):
  """Negative numbers count down in their bits; the sign stays."""
  return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)
