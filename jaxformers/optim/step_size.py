"""Step sizes that learn themselves: a scale per tensor, a gain per entry.

Both are positive, so they are learnt by exponentiated gradients: the loss after a
step is differentiated with respect to the scale and the gains of that step.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from jaxformers.ops import tree_dot
from jaxformers.ops import tree_norm
from jaxformers.optim.decay import decoupled_decay
from jaxformers.optim.optimizer import AdamW
from jaxformers.optim.optimizer import Optimizer
from jaxformers.optim.optimizer import weight_decay_mask
from jaxformers.optim.schedule import Schedule

Form = Literal['normalised', 'raw']
Scope = Literal['tensor', 'global']
Placement = Literal['pre', 'post']
Bounds = tuple[float, float]

# Keeps the cosine between a gradient and no update at 0, as in EGDD.
EPS = 1e-10


class ScaleState(NamedTuple):
  """State of `adapt_scale`.

  Attributes:
    log_scale: logarithms of the scales, `[]`, at least float32: a tree like the
      parameters with scope `'tensor'`, one number with `'global'`.
    previous: the last update, like the parameters. It is kept as it was scaled,
      so that it need not be computed twice, and divided by the scale when used.
    inner: state of the inner optimiser.
  """

  log_scale: Any
  previous: Any
  inner: Any


class GainState(NamedTuple):
  """State of `adapt_gains`.

  Attributes:
    count: int32 `[]`, number of updates so far.
    log_gain: logarithms of the gains, like the parameters, at least float32.
    average: running average of what the gains multiply, like the parameters.
    inner: state of the inner optimiser.
  """

  count: Any
  log_gain: Any
  average: Any
  inner: Any


def adapt_scale(
  inner: optax.GradientTransformation,
  scale_lr: float = 1e-3,
  *,
  bounds: Bounds = (0.1, 10.0),
  mode: Form = 'normalised',
  scope: Scope = 'tensor',
  accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Multiplies the updates of an optimiser by scales that it learns.

  Let g be the gradient and h the last update before scaling, negated. The loss
  falls by :math:`A = \langle g, h\rangle` per unit of the last scale, so
  :math:`s \leftarrow s\,e^{\gamma A}`: a step after which the gradient still
  points the same way was too short. Costs one tree of memory and a pass over it.

  Weight decay belongs after this, since it is no step along the gradient, and
  clipping before it. A schedule of the inner optimiser stays in force.

  Source: Amid, Anil, Fifty and Warmuth, "Step-size Adaptation Using
  Exponentiated Gradient Updates", 2022, arXiv 2202.00145; defaults of EGDD,
  github.com/tensorflow/lingvo, lingvo/core/egdd.py.

  Args:
    inner: any optimiser; it gets all extra arguments.
    scale_lr: gamma.
    bounds: smallest and largest scale.
    mode: `'normalised'` divides A by the norms of g and h, `'raw'` does not.
    scope: a scale for each `'tensor'`, or one `'global'` scale for all.
    accumulator_dtype: of the kept update; None for that of the parameters.

  Raises:
    ValueError: if an option is none of those described.
  """
  inner = optax.with_extra_args_support(inner)
  _check_choice('mode', mode, Form)
  _check_choice('scope', scope, Scope)
  _check_range('scale_lr', scale_lr)
  _check_bounds(bounds)
  map_scales = jax.tree.map if scope == 'tensor' else _call

  def init(params):
    previous = optax.tree.zeros_like(params, dtype=accumulator_dtype)
    log_scale = map_scales(lambda p: jnp.zeros([], _dtype(p)), params)
    return ScaleState(log_scale, previous, inner.init(params))

  def adapted(log_scale, gradients, previous):
    scale = jnp.exp(log_scale)
    alignment = -tree_dot(gradients, previous) / scale
    if mode == 'normalised':
      alignment /= tree_norm(gradients) + EPS
      alignment /= tree_norm(previous) / scale + EPS
    return _clipped(log_scale + scale_lr * alignment, bounds)

  def update(updates, state, params=None, **extra_args):
    # Or XLA shares the squares of gradients with inner optimisers that take them
    # too, by writing them to memory.
    gradients = jax.lax.optimization_barrier(updates)
    log_scale = map_scales(adapted, state.log_scale, gradients, state.previous)
    updates, inner_state = inner.update(
      updates, state.inner, params, **extra_args
    )
    updates = map_scales(
      lambda s, tree: _multiplied(tree, jnp.exp(s)), log_scale, updates
    )
    previous = jax.tree.map(
      lambda u, old: u.astype(old.dtype), updates, state.previous
    )
    return updates, ScaleState(log_scale, previous, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def adapt_gains(
  inner: optax.GradientTransformation,
  gain_lr: float = 1e-2,
  *,
  beta: float = 0.9,
  bounds: Bounds = (0.01, 100.0),
  mode: Form = 'normalised',
  decay: float = 0.0,
  placement: Placement = 'pre',
  accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Multiplies each entry of the gradient by a gain that it learns.

  With the running average m of past gradients,
  :math:`p \leftarrow p\,e^{\gamma A}` where :math:`A = g\,m / (1 - \beta^t)`, or
  `sign(g) sign(m)` in the normalised form; then the inner optimiser gets
  :math:`p\,g`, and only then does g enter m. An entry whose gradient keeps its
  sign takes longer steps. Costs two trees of memory.

  Optimisers that divide by the size of past gradients, such as Adam, undo such
  gains; for them `placement='post'` multiplies their updates instead, and m
  averages the negated updates.

  Source: Amid, Anil, Fifty and Warmuth, "Step-size Adaptation Using
  Exponentiated Gradient Updates", 2022, arXiv 2202.00145; Su Jianlin,
  "Exponentiated gradient descent + meta-learning = adaptive learning rate",
  2022, kexue.fm/archives/8968 (`mode='raw'`, `beta=0`, no bounds); defaults of
  EGDD, github.com/tensorflow/lingvo, lingvo/core/egdd.py. The decay and
  `'post'` are this library's.

  Args:
    inner: any optimiser; it gets all extra arguments.
    gain_lr: gamma.
    beta: of the running average.
    bounds: smallest and largest gain.
    mode: `'normalised'` takes signs for A, `'raw'` the product.
    decay: part that the logarithms of gains lose in each step.
    placement: gains multiply gradients (`'pre'`) or updates (`'post'`).
    accumulator_dtype: of the average; None for that of the parameters.

  Raises:
    ValueError: if an option is none of those described.
  """
  inner = optax.with_extra_args_support(inner)
  _check_choice('mode', mode, Form)
  _check_choice('placement', placement, Placement)
  _check_range('gain_lr', gain_lr)
  _check_range('beta', beta, 1)
  _check_range('decay', decay, 1)
  _check_bounds(bounds)

  def init(params):
    return GainState(
      jnp.zeros([], jnp.int32),
      jax.tree.map(lambda p: jnp.zeros_like(p, _dtype(p)), params),
      optax.tree.zeros_like(params, dtype=accumulator_dtype),
      inner.init(params),
    )

  def update(updates, state, params=None, **extra_args):
    correction = 1 - beta ** jnp.maximum(state.count, 1)

    def adapted(log_gain, g, m):
      g, m = g.astype(log_gain.dtype), m.astype(log_gain.dtype)
      if mode == 'raw':
        alignment = g * m / correction
      else:
        alignment = jnp.sign(g) * jnp.sign(m)
      return _clipped((1 - decay) * log_gain + gain_lr * alignment, bounds)

    def averaged(log_gain, m, g):
      wide_m, g = m.astype(log_gain.dtype), g.astype(log_gain.dtype)
      return (beta * wide_m + (1 - beta) * g).astype(m.dtype)

    log_gain = jax.tree.map(adapted, state.log_gain, updates, state.average)
    gain = jax.tree.map(jnp.exp, log_gain)
    descent = updates
    if placement == 'pre':
      updates = jax.tree.map(_multiplied, updates, gain)
    updates, inner_state = inner.update(
      updates, state.inner, params, **extra_args
    )
    if placement == 'post':
      descent = jax.tree.map(jnp.negative, updates)
      updates = jax.tree.map(_multiplied, updates, gain)
    average = jax.tree.map(averaged, log_gain, state.average, descent)
    count = optax.safe_increment(state.count)
    return updates, GainState(count, log_gain, average, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def adapt_step_size(
  inner: optax.GradientTransformation,
  gain_lr: float | None = 1e-2,
  scale_lr: float | None = 1e-3,
  *,
  beta: float = 0.9,
  gain_bounds: Bounds = (0.01, 100.0),
  scale_bounds: Bounds = (0.1, 10.0),
  gain_mode: Form = 'normalised',
  scale_mode: Form = 'normalised',
  scope: Scope = 'tensor',
  gain_placement: Placement = 'pre',
  gain_decay: float = 0.0,
  accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Lets an optimiser learn its step sizes: gains per entry, scales per tensor.

  `adapt_scale(adapt_gains(inner))`. Around SGD with momentum mu and learning
  rate eta this is the published recursion, where s and p are updated first:
  :math:`h \leftarrow \mu h + \eta p g`, :math:`\theta \leftarrow \theta - s h`.

  Source: Amid, Anil, Fifty and Warmuth, "Step-size Adaptation Using
  Exponentiated Gradient Updates", 2022, arXiv 2202.00145; defaults of EGDD,
  github.com/tensorflow/lingvo, lingvo/core/egdd.py.

  Args:
    inner: any optimiser without weight decay; it gets all extra arguments.
    gain_lr: see `adapt_gains`; None for no gains, which saves two trees.
    scale_lr: see `adapt_scale`; None for no scales, which saves a tree.
    beta: see `adapt_gains`.
    gain_bounds: smallest and largest gain.
    scale_bounds: smallest and largest scale.
    gain_mode: see `adapt_gains`.
    scale_mode: see `adapt_scale`.
    scope: see `adapt_scale`.
    gain_placement: `'post'` for inner optimisers such as Adam.
    gain_decay: part that the logarithms of gains lose in each step.
    accumulator_dtype: of averages and kept updates; None for that of the
      parameters.

  Raises:
    ValueError: if an option is none of those described.
  """
  if gain_lr is not None:
    inner = adapt_gains(
      inner,
      gain_lr,
      beta=beta,
      bounds=gain_bounds,
      mode=gain_mode,
      decay=gain_decay,
      placement=gain_placement,
      accumulator_dtype=accumulator_dtype,
    )
  if scale_lr is not None:
    inner = adapt_scale(
      inner,
      scale_lr,
      bounds=scale_bounds,
      mode=scale_mode,
      scope=scope,
      accumulator_dtype=accumulator_dtype,
    )
  return optax.with_extra_args_support(inner)


@dataclasses.dataclass(frozen=True)
class AdaptStepSize:
  """Any optimiser, with step sizes that it learns; see `adapt_step_size`.

  The optimiser's `max_gradient_norm` is applied before, and its `weight_decay`,
  if it has these fields, after the adaptation, which neither shall disturb.

  Source: Amid, Anil, Fifty and Warmuth, "Step-size Adaptation Using
  Exponentiated Gradient Updates", 2022, arXiv 2202.00145.

  Attributes:
    optimizer: what is adapted.
    gain_lr: learning rate of the gains; None for no gains.
    scale_lr: learning rate of the scales; None for no scales.
    beta: of the running average that gains follow.
    gain_bounds: smallest and largest gain.
    scale_bounds: smallest and largest scale.
    gain_mode: `'normalised'` or `'raw'`.
    scale_mode: `'normalised'` or `'raw'`.
    scope: a scale for each `'tensor'`, or one `'global'` scale.
    gain_placement: `'post'` for optimisers such as Adam that undo gains of
      their gradients, `'pre'` for those such as SGD.
    gain_decay: part that the logarithms of gains lose in each step.
    accumulator_dtype: of averages and kept updates; None for that of the
      parameters.
  """

  optimizer: Optimizer = AdamW()
  gain_lr: float | None = 1e-2
  scale_lr: float | None = 1e-3
  beta: float = 0.9
  gain_bounds: Bounds = (0.01, 100.0)
  scale_bounds: Bounds = (0.1, 10.0)
  gain_mode: Form = 'normalised'
  scale_mode: Form = 'normalised'
  scope: Scope = 'tensor'
  gain_placement: Placement = 'post'
  gain_decay: float = 0.0
  accumulator_dtype: Any = None

  @property
  def learning_rate(self) -> Schedule:
    """That of the optimiser."""
    return self.optimizer.learning_rate

  def build(self, steps: int) -> optax.GradientTransformationExtraArgs:
    options = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name != 'optimizer'
    }
    outside = {'max_gradient_norm': None, 'weight_decay': 0.0}
    own = {n: v for n, v in outside.items() if hasattr(self.optimizer, n)}
    inner = dataclasses.replace(self.optimizer, **own).build(steps)
    max_norm, decay = (getattr(self.optimizer, n, outside[n]) for n in outside)
    shrink = decoupled_decay(
      self.learning_rate.schedule(steps), decay, lambda theta: theta
    )
    return optax.chain(
      _clip(max_norm),
      adapt_step_size(inner, **options),
      optax.masked(shrink, weight_decay_mask),
    )


def _clip(max_norm):
  if max_norm is None:
    return optax.identity()
  return optax.clip_by_global_norm(max_norm)


def _call(function, *trees):
  return function(*trees)


def _dtype(tree):
  """Returns the dtype to compute in for these leaves."""
  dtypes = [leaf.dtype for leaf in jax.tree.leaves(tree)]
  return jnp.result_type(jnp.float32, *dtypes)


def _multiplied(tree, factor):
  return jax.tree.map(lambda u: (u * factor).astype(u.dtype), tree)


def _clipped(logarithm, bounds):
  return jnp.clip(logarithm, *(jnp.log(bound) for bound in bounds))


def _check_choice(name, value, choices):
  known = get_args(choices)
  if value not in known:
    raise ValueError(f'{name} must be one of {known}, got {value!r}.')


def _check_range(name, value, end=None):
  """Raises for a number below 0 or not below the end; traced ones pass."""
  if not isinstance(value, (int, float)):
    return
  if not 0 <= value or (end is not None and value >= end):
    wanted = 'not be negative' if end is None else f'lie in [0, {end})'
    raise ValueError(f'{name} must {wanted}, got {value}.')


def _check_bounds(bounds):
  low, high = bounds
  if not 0 < low <= 1 <= high:
    raise ValueError(
      f'bounds must satisfy 0 < low <= 1 <= high, got {bounds}: scales and '
      'gains start at 1.'
    )
