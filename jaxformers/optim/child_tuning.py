"""ChildTuning: fine-tuning that updates a part of a network, the child.

Task-free, a fresh random part at each step; task-driven, the part with the
largest Fisher information:

```python
scores = fisher(loss_fn, params, batches)
mask = top_fraction_mask(scores, 0.3)
optimizer = optax.chain(
  optax.clip_by_global_norm(1.0), child_tuning_d(mask), optax.adamw(4e-5)
)
```

Both are links that may stand anywhere in a chain. Before the moments they are
the published method. After them, kexue's update dropout, they keep the mean of
the steps. Under Adam the two differ in effect, not only in noise: gradients that
are masked with probability `1 - p` and divided by p have the same mean and a
second moment 1 / p times as large, so Adam's mean step shrinks by `sqrt(p)`, as
if the learning rate were smaller. What is masked at one step still moves by its
moments.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Int
import optax

from jaxformers.ops.tree import leaf_keys
from jaxformers.optim.fisher import check_fraction
from jaxformers.optim.fisher import load_mask
from jaxformers.optim.optimizer import AdamW
from jaxformers.optim.optimizer import Optimizer
from jaxformers.optim.optimizer import clipped
from jaxformers.optim.optimizer import split_clipping
from jaxformers.optim.schedule import Schedule


class ChildTuningFState(NamedTuple):
  """State of `child_tuning_f`.

  Attributes:
    count: int32 `[]`, number of updates so far; with the key it gives the masks.
  """

  count: Int[Array, '']


def child_tuning_f(
  p: float | Array,
  key: Array,
  *,
  rescale: bool = True,
  coarse: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Masks each entry with probability 1 - p, anew at each step.

  `g <- m g / p` with `m ~ Bernoulli(p)`, which keeps the mean of g and gives it
  the variance `sigma^2 + (1 - p) / p (mu^2 + sigma^2)`. The masks are drawn where
  they are used, the same however leaves are split among devices, and never kept.

  Source: Xu et al., "Raise a Child in Large Language Model", 2021, arXiv
  2109.05687, algorithm 1; placement after the moments: Su Jianlin, 2021,
  kexue.fm/archives/8764.

  Args:
    p: probability of being kept, in (0, 1]; may be traced.
    key: decides all masks, together with the number of the step.
    rescale: whether what is kept is divided by p.
    coarse: whether an entry costs 8 random bits instead of 32, a quarter of the
      time; p is then rounded to a multiple of 1 / 256.

  Raises:
    ValueError: if p is not in (0, 1], or is rounded to 0.
  """
  is_number = isinstance(p, int | float)
  if is_number:
    check_fraction(p)
  if coarse:
    # How many of the 256 values of a byte keep.
    kept = round(256 * p) if is_number else jnp.round(256 * p)
    if is_number and not kept:
      raise ValueError(f'p={p} is less than 8 bits can draw; set coarse=False.')
    p = kept / 256

  def draw(key, shape):
    if coarse:
      return _bytes(key, shape) <= kept - 1
    return jax.random.bernoulli(key, p, shape)

  def mask(key, g):
    scaled = (g / p).astype(g.dtype) if rescale else g
    return jnp.where(draw(key, g.shape), scaled, jnp.zeros_like(g))

  def init(params):
    del params
    return ChildTuningFState(jnp.zeros([], jnp.int32))

  def update(updates, state, params=None, **extra_args):
    del params, extra_args
    keys = leaf_keys(key, state.count, updates)
    updates = jax.tree.map(mask, keys, updates)
    return updates, ChildTuningFState(optax.safe_increment(state.count))

  return optax.GradientTransformationExtraArgs(init, update)


def _bytes(key, shape):
  """Draws a random byte per entry, four from each word where the shape allows.

  JAX's own draws of 8 bits cost as much as those of 32.
  """
  if not shape or shape[-1] % 4:
    return jax.random.bits(key, shape, jnp.uint8)
  words = jax.random.bits(key, (*shape[:-1], shape[-1] // 4), jnp.uint32)
  return jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(shape)


class ChildTuningDState(NamedTuple):
  """State of `child_tuning_d`.

  Attributes:
    mask: bool, like the parameters, so that a resumed run finds it; `[]` for a
      leaf that is masked as a whole or not at all.
    scale: float32 `[]`, what kept entries of the masked leaves are multiplied by.
    inner: state of the inner transformation.
  """

  mask: Any
  scale: Float[Array, '']
  inner: Any


def child_tuning_d(
  mask: Any | Callable[[optax.Params], Any],
  inner: optax.GradientTransformation | None = None,
  *,
  rescale: bool = False,
  mask_decay: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Keeps the gradients of a fixed part of the network, and no others.

  Without `inner` it is a link for a chain. With an inner optimiser, it masks
  gradients on their way in, and with `mask_decay` updates on their way out: what
  lies outside the child then stays where it is. Without, as in the official
  code, weight decay goes on shrinking it by `1 - lr * wd` per step.

  Source: Xu et al., "Raise a Child in Large Language Model", 2021, arXiv
  2109.05687, section 2.2; dividing by p: Su Jianlin, 2021,
  kexue.fm/archives/8764.

  Args:
    mask: tree of bool arrays, True where gradients pass; such as
      `top_fraction_mask` gives. A single bool may stand for a leaf or a whole
      subtree. Or a function from parameters to such a tree, called by `init`.
    inner: the optimiser that the masked gradients go to; None for none.
    rescale: whether kept gradients of masked leaves are divided by the fraction
      that is kept of all those leaves. Adam does not notice but by its eps.
    mask_decay: whether the updates of `inner` are masked too.

  Raises:
    ValueError: if the mask does not fit the parameters; raised by `init`.
  """
  if mask_decay and inner is None:
    raise ValueError(
      'mask_decay masks what the inner optimiser returns; pass it as inner.'
    )
  inner = optax.with_extra_args_support(inner or optax.identity())

  def init(params):
    given = mask(params) if callable(mask) else mask
    masks = _spread(given, params)
    scale = _inverse_fraction(masks) if rescale else jnp.ones([], jnp.float32)
    return ChildTuningDState(masks, scale, inner.init(params))

  def masked(g, m, scale=None):
    if scale is not None and m.ndim:
      g = (g * scale).astype(g.dtype)
    return jnp.where(m, g, jnp.zeros_like(g))

  def update(updates, state, params=None, **extra_args):
    scale = state.scale if rescale else None
    updates = jax.tree.map(
      lambda g, m: masked(g, m, scale), updates, state.mask
    )
    updates, new = inner.update(updates, state.inner, params, **extra_args)
    if mask_decay:
      updates = jax.tree.map(masked, updates, state.mask)
    return updates, state._replace(inner=new)

  return optax.GradientTransformationExtraArgs(init, update)


def _spread(mask, params):
  """Returns a bool array for each parameter, of its shape or a single one."""
  try:
    whole = jax.tree.broadcast(mask, params)
  except ValueError as error:
    raise ValueError(
      'the mask must have the structure of the parameters, or bools in the '
      f'place of subtrees: {error}'
    ) from error

  def check(path, p, m):
    m = jnp.asarray(m)
    if m.dtype != bool or m.shape not in ((), p.shape):
      name = jax.tree_util.keystr(path)
      raise ValueError(
        f'the mask of {name} must be bool of shape {p.shape} or a single bool, '
        f'got {m.dtype}{list(m.shape)}.'
      )
    return m

  return jax.tree_util.tree_map_with_path(check, params, whole)


def _inverse_fraction(masks):
  """Returns 1 / p, p being the fraction kept of all masked entries."""
  scored = [m for m in jax.tree.leaves(masks) if m.ndim]
  kept = sum(m.sum(dtype=jnp.float32) for m in scored)
  size = sum(m.size for m in scored)
  return jnp.asarray(size / jnp.maximum(kept, 1) if scored else 1, jnp.float32)


@dataclasses.dataclass(frozen=True)
class ChildTuningF:
  """Trains a random part of the network at each step.

  Source: Xu et al., "Raise a Child in Large Language Model", 2021, arXiv
  2109.05687, algorithm 1; update dropout: Su Jianlin, 2021,
  kexue.fm/archives/8764.

  Attributes:
    p: probability that an entry of the gradient is kept, in (0, 1].
    inner: the optimiser of the gradients that are kept. Its clipping comes
      first, as in the official code.
    place: `'gradient'` masks what goes into the inner optimiser, `'update'`
      what comes out of it, weight decay included.
    coarse: whether masks cost 8 random bits per entry, see `child_tuning_f`.
    seed: decides the masks.
  """

  p: float = 0.3
  inner: Optimizer = AdamW()
  place: Literal['gradient', 'update'] = 'gradient'
  coarse: bool = False
  seed: int = 0

  def __post_init__(self):
    check_fraction(self.p)
    if self.place not in ('gradient', 'update'):
      raise ValueError(
        f"place must be 'gradient' or 'update', got {self.place!r}."
      )

  @property
  def learning_rate(self) -> Schedule:
    """That of the inner optimiser."""
    return self.inner.learning_rate

  def build(self, steps: int) -> optax.GradientTransformationExtraArgs:
    link = child_tuning_f(self.p, jax.random.key(self.seed), coarse=self.coarse)
    if self.place == 'update':
      return optax.chain(self.inner.build(steps), link)
    max_norm, inner = split_clipping(self.inner)
    return clipped(max_norm, optax.chain(link, inner.build(steps)))


@dataclasses.dataclass(frozen=True)
class ChildTuningD:
  """Trains the part of the network that a mask marks.

  Source: Xu et al., "Raise a Child in Large Language Model", 2021, arXiv
  2109.05687, section 2.2.

  Attributes:
    mask: path of a file from `save_mask`, read when training begins.
    inner: the optimiser of the gradients that pass. Its clipping comes first,
      as in the official code.
    rescale: see `child_tuning_d`.
    mask_decay: whether what lies outside the mask is kept from decaying too;
      the official code lets it decay.
  """

  mask: str
  inner: Optimizer = AdamW()
  rescale: bool = False
  mask_decay: bool = False

  @property
  def learning_rate(self) -> Schedule:
    """That of the inner optimiser."""
    return self.inner.learning_rate

  def build(self, steps: int) -> optax.GradientTransformationExtraArgs:
    max_norm, inner = split_clipping(self.inner)
    child = child_tuning_d(
      lambda params: load_mask(self.mask, params),
      inner.build(steps),
      rescale=self.rescale,
      mask_decay=self.mask_decay,
    )
    return clipped(max_norm, child)
