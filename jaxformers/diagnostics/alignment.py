"""How updates and gradients lie to each other, block by block and as a whole.

The cosine of two trees is not a mean of the cosines of their blocks: it is
`kappa` times one, and `kappa` can be near 0. A bound on the cosine of every block
does not bound that of the whole.
"""

from collections.abc import Callable
import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float
import optax


class CosineReport(NamedTuple):
  """The cosine of two trees, in parts; `cosine = kappa sum w_i c_i`.

  Source: see `tree_cosine_report`.

  Attributes:
    cosine: float `[]`, of the trees as wholes.
    kappa: float `[]`, cosine between the norms of the blocks of one tree and
      those of the other, from 0 to 1.
    block_cosines: c, by block: a dictionary of float `[]`, or with blocks of
      single entries a tree like the arguments.
    block_weights: w, likewise; they sum to 1.
  """

  cosine: Float[Array, '']
  kappa: Float[Array, '']
  block_cosines: Any
  block_weights: Any


def tree_cosine_report(x: Any, y: Any, blocks: str = 'leaf') -> CosineReport:
  """Computes the cosine of two trees, of their blocks, and what is between.

  If no block has a negative cosine, `kappa min c <= cosine <= max c`; there is
  no lower bound without kappa. Blocks or trees of norm 0 have cosine 0, and such
  blocks weight 0. Sums are in at least float32, and no leaf is flattened.

  Source: Su Jianlin, "Local and global cosine similarity", 2024,
  kexue.fm/archives/9931; the identity with kappa is derived from it.

  Args:
    x: tree of real arrays.
    y: another of the same structure.
    blocks: `'leaf'` for each leaf, `'element'` for each entry (then c is the
      agreement of signs), or a regular expression: leaves in whose paths, such
      as `stack/scanned_0/mixer/w_DHK`, it matches the same text are one block;
      those without a match are the block `rest`.
  """
  if blocks == 'element':
    return _by_element(x, y)
  sums = _sums_by_block(x, y, blocks)
  names = [*sums]
  dot_N, x_N, y_N = jnp.stack([*sums.values()], axis=1)
  # Roots before products: their squares might overflow.
  a_N, b_N = jnp.sqrt(x_N), jnp.sqrt(y_N)
  product_N = a_N * b_N
  a, b = jnp.sqrt(x_N.sum()), jnp.sqrt(y_N.sum())
  cosine_N = _ratio(dot_N, product_N)
  weight_N = _ratio(product_N, product_N.sum())
  return CosineReport(
    _ratio(dot_N.sum(), a * b),
    _ratio(product_N.sum(), a * b),
    dict(zip(names, cosine_N, strict=True)),
    dict(zip(names, weight_N, strict=True)),
  )


def _by_element(x, y):
  products = jax.tree.map(lambda u, v: _wide(u) * _wide(v), x, y)
  sums = _sums_by_block(x, y, 'leaf').values()
  dot, xx, yy = jnp.stack([*sums]).sum(axis=0)
  magnitude = sum(jnp.abs(p).sum() for p in jax.tree.leaves(products))
  norms = jnp.sqrt(xx) * jnp.sqrt(yy)
  return CosineReport(
    _ratio(dot, norms),
    _ratio(magnitude, norms),
    jax.tree.map(jnp.sign, products),
    jax.tree.map(lambda p: _ratio(jnp.abs(p), magnitude), products),
  )


class UpdateReport(NamedTuple):
  """Sizes of updates, parameters and gradients, by block.

  Source: see `update_report`.

  Attributes:
    update_to_weight: norm of the update over that of the parameters, 0 where
      there are none.
    update_norm: norm of the update.
    weight_norm: norm of the parameters.
    gradient_norm: norm of the gradient.
  """

  update_to_weight: dict[str, Float[Array, '']]
  update_norm: dict[str, Float[Array, '']]
  weight_norm: dict[str, Float[Array, '']]
  gradient_norm: dict[str, Float[Array, '']]


def update_report(
  updates: Any, params: Any, gradients: Any, blocks: str = 'leaf'
) -> UpdateReport:
  """Measures how large an update is beside the parameters that it changes.

  Updates of about a thousandth of the weights are a common rule of thumb.

  Source: You et al., "Large Batch Training of Convolutional Networks", 2017,
  arXiv 1708.03888, who look at these ratios per layer.

  Args:
    updates: what is added to the parameters.
    params: the parameters.
    gradients: their gradients.
    blocks: `'leaf'` or a regular expression; see `tree_cosine_report`.
  """
  update = _sums_by_block(updates, params, blocks)
  gradient = _sums_by_block(gradients, gradients, blocks)
  update_norm = {name: jnp.sqrt(s[1]) for name, s in update.items()}
  weight_norm = {name: jnp.sqrt(s[2]) for name, s in update.items()}
  return UpdateReport(
    {name: _ratio(n, weight_norm[name]) for name, n in update_norm.items()},
    update_norm,
    weight_norm,
    {name: jnp.sqrt(s[1]) for name, s in gradient.items()},
  )


class AlignmentState(NamedTuple):
  """State of `monitor_alignment`.

  Source: see there.

  Attributes:
    inner: state of the inner transformation.
    measurements: float32 `[]` by name, of the last update.
  """

  inner: optax.OptState
  measurements: dict[str, Float[Array, '']]


def monitor_alignment(
  inner: optax.GradientTransformation, blocks: str = 'leaf'
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimiser; records how its updates lie to the gradients.

  Its updates are those of the inner optimiser. The state keeps, of the last
  update u for gradient g:

  - `update_cosine`: the cosine of -u and g, `update_kappa` its kappa, and
    `update_smallest_cosine` the smallest of a block;
  - `predicted_change`: `<u, g>`, the change of the loss to first order;
  - `update_to_weight/NAME` and `block_gradient_norm/NAME` of each block.

  `measurements_of` reads them, and so does the trainer.

  Source: Su Jianlin, "Local and global cosine similarity", 2024,
  kexue.fm/archives/9931.

  Args:
    inner: the optimiser, around which this stands as outermost.
    blocks: `'leaf'` or a regular expression; see `tree_cosine_report`.

  Raises:
    ValueError: of `update` without parameters.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params):
    measure = functools.partial(_measure, blocks=blocks)
    measured = jax.eval_shape(measure, params, params, params)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), measured)
    return AlignmentState(inner.init(params), zeros)

  def update(gradients, state, params=None, **extra):
    if params is None:
      raise ValueError('monitor_alignment needs update(..., params).')
    updates, inner_state = inner.update(gradients, state.inner, params, **extra)
    measured = _measure(updates, params, gradients, blocks=blocks)
    return updates, AlignmentState(inner_state, measured)

  return optax.GradientTransformationExtraArgs(init, update)


def _measure(updates, params, gradients, *, blocks):
  cosines = tree_cosine_report(
    jax.tree.map(jnp.negative, updates), gradients, blocks
  )
  sizes = update_report(updates, params, gradients, blocks)
  dots = _sums_by_block(updates, gradients, blocks).values()
  measured = {
    'update_cosine': cosines.cosine,
    'update_kappa': cosines.kappa,
    'update_smallest_cosine': jnp.stack(
      [*cosines.block_cosines.values()]
    ).min(),
    'predicted_change': sum(s[0] for s in dots),
  }
  for name, ratio in sizes.update_to_weight.items():
    measured[f'update_to_weight/{name}'] = ratio
  for name, norm in sizes.gradient_norm.items():
    measured[f'block_gradient_norm/{name}'] = norm
  return {name: jnp.float32(value) for name, value in measured.items()}


def measurements_of(optimizer_state: Any) -> dict[str, Array]:
  """Collects what the links of an optimiser have measured.

  Source: none; reads every field called `measurements` of a state, such as
  those of `monitor_alignment` and of `optax.monitor`.

  Args:
    optimizer_state: state of any optax transformation.

  Returns:
    The scalars among the measurements, by name.
  """
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(optimizer_state):
    names = [getattr(key, 'name', None) for key in path]
    if 'measurements' in names and jnp.ndim(leaf) == 0:
      rest = path[names.index('measurements') + 1 :]
      name = jax.tree_util.keystr(rest, simple=True, separator='/')
      found[name] = leaf
  return found


@dataclasses.dataclass(frozen=True)
class Monitored:
  """Any optimiser, with its updates measured; see `monitor_alignment`.

  Source: see there.

  Attributes:
    optimizer: what moves the parameters; see `jaxformers.optim`.
    blocks: see `tree_cosine_report`.
  """

  optimizer: Any
  blocks: str = 'leaf'

  @property
  def learning_rate(self) -> Any:
    """That of the optimiser."""
    return self.optimizer.learning_rate

  def build(self, steps: int) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation for a run of so many steps.

    Args:
      steps: of the run.
    """
    return monitor_alignment(self.optimizer.build(steps), self.blocks)


def _sums_by_block(x, y, blocks):
  """Returns `x . y`, `x . x`, `y . y` of each block: at least float32 `[3]`."""
  name_of = _naming(blocks)
  sums = {}
  paired = jax.tree.map(lambda u, v: (_wide(u), _wide(v)), x, y)
  pairs = jax.tree_util.tree_leaves_with_path(
    paired, is_leaf=lambda node: type(node) is tuple
  )
  for path, (u, v) in pairs:
    path = jax.tree_util.keystr(path, simple=True, separator='/')
    name = name_of(path)
    own = jnp.stack([jnp.sum(u * v), jnp.sum(u * u), jnp.sum(v * v)])
    sums[name] = sums[name] + own if name in sums else own
  return sums


def _naming(blocks: str) -> Callable[[str], str]:
  """Returns the function from the path of a leaf to the name of its block."""
  if blocks == 'leaf':
    return lambda path: path or 'whole'
  if blocks == 'element':
    raise ValueError(
      "blocks='element' is for tree_cosine_report alone; use 'leaf' or a regular "
      'expression.'
    )
  pattern = re.compile(blocks)

  def name_of(path):
    match = pattern.search(path)
    return match[0] if match and match[0] else 'rest'

  return name_of


def _wide(x):
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _ratio(numerator, denominator):
  """Divides; nothing over nothing is 0."""
  return jnp.where(
    denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0
  )
