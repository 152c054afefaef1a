"""Which parameters matter: Fisher information, and masks of its largest entries."""

from collections.abc import Callable, Iterable
import math
import os
import re
from typing import Any, Literal

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np
import optax

from jaxformers.ops.tree import top_fraction_threshold
from jaxformers.ops.tree import tree_norm


def fisher(
  loss_fn: Callable[..., Float[Array, '']],
  params: optax.Params,
  batches: Iterable[Any],
  *,
  mode: Literal['example', 'batch'] = 'example',
  chunk: int = 8,
  max_norm: float | None = None,
  key: Array | None = None,
) -> Any:
  """Estimates the diagonal of the Fisher information: mean squared gradients.

  By example, as the paper defines it: `F = mean_j (d log p(y_j | x_j) /
  d theta)^2`. By batch, as its code computes it: the mean over batches of the
  squared gradient of the batch's mean loss, each tensor's gradient first cut to
  a norm (`max_norm=1.0`), with dropout on (pass a key). The second is smaller by
  about the batch size where examples disagree.

  Source: Xu et al., "Raise a Child in Large Language Model", 2021, arXiv
  2109.05687, equation 5; code: github.com/alibaba/AliceMind, ChildTuningD.py.

  Args:
    loss_fn: `(params, batch) -> mean negative log-likelihood`; with a key,
      `(params, batch, key)`. By example it gets batches of one.
    params: where the gradients are taken.
    batches: trees of arrays with the batch as leading axis, any number.
    mode: `'example'` or `'batch'`.
    chunk: gradients that are held at a time, by example; the largest divisor of
      the batch that is no larger is taken.
    max_norm: gradients of each tensor are scaled down to this norm before they
      are squared; None for never.
    key: for the noise of the loss; None for a loss without.

  Returns:
    float32 scores, like the parameters.

  Raises:
    ValueError: for another mode, a chunk below 1, or no batches.
  """
  if mode not in ('example', 'batch'):
    raise ValueError(f"mode must be 'example' or 'batch', got {mode!r}.")
  if chunk < 1:
    raise ValueError(f'chunk must be at least 1, got {chunk}.')

  def squares(params, batch, key):
    noise = () if key is None else (key,)
    gradient = jax.grad(loss_fn)(params, batch, *noise)
    return jax.tree.map(lambda g: jnp.square(_clipped(g, max_norm)), gradient)

  add = _by_example(squares, chunk) if mode == 'example' else _by_batch(squares)
  add = jax.jit(add, donate_argnums=0)
  sums = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
  count = 0
  for number, batch in enumerate(batches):
    own = None if key is None else jax.random.fold_in(key, number)
    sums = add(sums, params, batch, own)
    count += 1 if mode == 'batch' else len(jax.tree.leaves(batch)[0])
  if not count:
    raise ValueError('there were no batches to compute the information of.')
  return jax.tree.map(lambda s: s / count, sums)


def _clipped(g, max_norm):
  g = g.astype(jnp.float32)
  if max_norm is None:
    return g
  # PyTorch's clip_grad_norm_, with its guard.
  return g * jnp.minimum(1, max_norm / (tree_norm(g) + 1e-6))


def _by_batch(squares):
  def add(sums, params, batch, key):
    return jax.tree.map(jnp.add, sums, squares(params, batch, key))

  return add


def _by_example(squares, chunk):
  """Adds the squares of each example, so many at a time."""

  def add(sums, params, batch, key):
    size = len(jax.tree.leaves(batch)[0])
    parts = size // max(n for n in range(1, chunk + 1) if size % n == 0)

    def deal(array):
      # In turn, so that a part of a batch that is split among devices has rows
      # on each of them.
      dealt = array.reshape(size // parts, parts, 1, *array.shape[1:])
      return dealt.swapaxes(0, 1)

    def one_part(sums, part_and_keys):
      found = jax.vmap(squares, (None, 0, 0))(params, *part_and_keys)
      return jax.tree.map(lambda s, f: s + f.sum(0), sums, found), None

    keys = None
    if key is not None:
      keys = jax.random.split(key, (parts, size // parts))
    return jax.lax.scan(one_part, sums, (jax.tree.map(deal, batch), keys))[0]

  return add


def top_fraction_mask(tree: Any, p: float, *, scored: str | None = None) -> Any:
  """Marks the largest entries of a tree, a fraction p of all of them jointly.

  As many as `numpy.percentile(all, 100 (1 - p))` leaves at or above it, and more
  where entries are equal. The threshold is found by counting, so nothing of a
  split leaf is gathered (`jaxformers.ops.top_fraction_threshold`).

  Source: Xu et al., "Raise a Child in Large Language Model", 2021, arXiv
  2109.05687, section 2.2.

  Args:
    tree: scores, such as `fisher` gives.
    p: fraction in (0, 1].
    scored: regular expression; only leaves whose path (`a/b/c`) it is found in
      take part, and the others get a single True. The official code scores what
      has `layer` in its name. None for all leaves.

  Returns:
    bool tree for `child_tuning_d`.

  Raises:
    ValueError: if p is not in (0, 1], or no leaf takes part.
  """
  check_fraction(p)

  def takes_part(path):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return scored is None or re.search(scored, name) is not None

  leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  part = [leaf for path, leaf in leaves if takes_part(path)]
  if not part:
    raise ValueError(f'no leaf has a path that {scored!r} is found in.')
  size = sum(leaf.size for leaf in part)
  count = 1 + math.floor((size - 1) * p)
  # Half an entry less: the count survives the rounding of the product.
  threshold = top_fraction_threshold(part, (count - 0.5) / size, 64)
  return structure.unflatten(
    leaf >= threshold if takes_part(path) else jnp.ones([], bool)
    for path, leaf in leaves
  )


def save_mask(path: str | os.PathLike[str], mask: Any) -> None:
  """Writes a mask to a file, eight entries to the byte.

  Source: none; a file format of this library.

  Args:
    path: ends in `.npz`.
    mask: bool tree of dictionaries.
  """
  arrays = {}
  for keys, m in jax.tree_util.tree_leaves_with_path(mask):
    name = jax.tree_util.keystr(keys, simple=True, separator='/')
    arrays[f'{name}:shape'] = np.array(np.shape(m), np.int64)
    arrays[f'{name}:bits'] = np.packbits(np.asarray(m))
  np.savez(path, **arrays)


def load_mask(path: str | os.PathLike[str], params: optax.Params) -> Any:
  """Reads what `save_mask` wrote.

  Source: none; a file format of this library.

  Args:
    path: of the file.
    params: give the structure.

  Raises:
    ValueError: if the file has no mask for one of the parameters.
  """
  with np.load(path) as arrays:

    def read(keys, leaf):
      del leaf
      name = jax.tree_util.keystr(keys, simple=True, separator='/')
      if f'{name}:bits' not in arrays:
        raise ValueError(f'{path} has no mask for {name}; make a new one.')
      shape = tuple(arrays[f'{name}:shape'])
      bits = np.unpackbits(arrays[f'{name}:bits'], count=math.prod(shape))
      return bits.astype(bool).reshape(shape)

    return jax.tree_util.tree_map_with_path(read, params)


def check_fraction(p: float) -> None:
  """Raises unless a fraction lies in (0, 1].

  Args:
    p: the fraction that is kept.
  """
  if not 0 < p <= 1:
    raise ValueError(f'p must lie in (0, 1], got {p}.')
