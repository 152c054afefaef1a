"""Parameters that are multiplied instead of moved.

An optax update is added to the parameters. Here it is added to their logarithms:
what is positive stays positive, what sums to 1 still does, and what is small
moves little, so that sparse solutions are found from few examples.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from jaxformers.optim.decay import decoupled_decay
from jaxformers.optim.optimizer import FromOptax
from jaxformers.optim.optimizer import Optimizer
from jaxformers.optim.schedule import Constant
from jaxformers.optim.schedule import Schedule

Mode = Literal['egu', 'simplex', 'signed']
Axis = int | tuple[int, ...] | None

# The exponential of more is no step that anyone wants, and soon not finite.
LARGEST_EXPONENT = 20.0


def exponentiate_updates(
  mode: Mode = 'egu', axis: Axis = -1, floor: float = 0.0
) -> optax.GradientTransformationExtraArgs:
  r"""Turns updates of parameters into updates of their logarithms.

  The last link of a chain: `optax.chain(optax.adam(0.1), exponentiate_updates())`
  multiplies by the exponential of Adam's updates. Parameters :math:`\theta` and
  an update :math:`u` of them give

  - `'egu'`, for positive parameters: :math:`\theta e^u`;
  - `'simplex'`, for positive ones that sum to 1 along the axis:
    :math:`\mathrm{softmax}(\log\theta + u)`;
  - `'signed'`, for any; they keep their signs:
    :math:`\theta e^{u\,\mathrm{sign}(\theta)}`.

  The exponents of `'egu'` and `'signed'` are cut at 20 and -20. A parameter that
  is 0 stays 0. One that is negative is refused by `init` if its value is known;
  under `jax.jit` it becomes nan (not in mode `'signed'`).

  Source: Kivinen and Warmuth, "Exponentiated Gradient versus Gradient Descent
  for Linear Predictors", 1997, Information and Computation 132, section 3
  (`'egu'`, `'simplex'`); Cornford et al., "Brain-like learning with
  exponentiated gradients", 2024, bioRxiv 2024.10.25.620272 (`'signed'`).

  Args:
    mode: what is kept.
    axis: along which slices sum to 1 in mode `'simplex'`; None for all axes.
    floor: smaller magnitudes count as this one, so that parameters that have
      all but vanished can return.

  Raises:
    ValueError: if there is no such mode or the floor is negative; in `init`, if
      parameters are negative or do not sum to 1; in `update`, without `params`.
  """
  if mode not in get_args(Mode):
    raise ValueError(
      f"mode must be 'egu', 'simplex' or 'signed', got {mode!r}."
    )
  _check_not_negative('floor', floor)

  def init(params):
    if mode != 'signed':
      _check_positive(params, mode, axis)
    return optax.EmptyState()

  def update(updates, state, params=None):
    _check_given(params, 'exponentiate_updates')

    def leaf(u, theta):
      dtype, theta, u = u.dtype, _wide(theta), _wide(u)
      if mode != 'signed':
        theta = jnp.where(theta < 0, jnp.nan, theta)
      sign = jnp.sign(theta) if mode == 'signed' else 1
      start = sign * jnp.maximum(jnp.abs(theta), floor)
      if mode == 'simplex':
        change = jax.nn.softmax(jnp.log(start) + u, axis=axis) - theta
      else:
        exponent = jnp.clip(sign * u, -LARGEST_EXPONENT, LARGEST_EXPONENT)
        change = start * jnp.expm1(exponent) + (start - theta)
      return change.astype(dtype)

    return jax.tree.map(leaf, updates, params), state

  return optax.with_extra_args_support(
    optax.GradientTransformation(init, update)
  )


def exponentiated_gradient(
  learning_rate: optax.ScalarOrSchedule,
  mode: Mode = 'egu',
  axis: Axis = -1,
  *,
  floor: float = 0.0,
  l1_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
  r"""Descends by multiplying parameters with exponentials of gradients.

  :math:`\theta \leftarrow \theta e^{-\eta g}` for positive parameters, and so on
  as in `exponentiate_updates`: mirror descent with the entropy, which finds
  sparse solutions in about as many examples as the logarithm of their number.
  It needs `params`, and is the last link of a chain.

  Source: Kivinen and Warmuth, "Exponentiated Gradient versus Gradient Descent
  for Linear Predictors", 1997, Information and Computation 132, section 3;
  Su Jianlin, "Exponentiated gradient descent + meta-learning = adaptive learning
  rate", 2022, kexue.fm/archives/8968.

  Args:
    learning_rate: eta, or a schedule of it.
    mode: what is kept, see `exponentiate_updates`.
    axis: along which slices sum to 1 in mode `'simplex'`; None for all axes.
    floor: smaller magnitudes count as this one.
    l1_decay: lambda of a penalty `lambda |theta|`: each step also shrinks all
      parameters by `exp(-eta lambda)`.

  Raises:
    ValueError: as `exponentiate_updates`; if a number is negative; or if
      parameters that sum to 1 shall also shrink.
  """
  _check_not_negative('learning_rate', learning_rate)
  _check_not_negative('l1_decay', l1_decay)
  if mode == 'simplex' and isinstance(l1_decay, (int, float)) and l1_decay:
    raise ValueError(
      f'l1_decay={l1_decay} changes nothing where parameters sum to 1; leave it '
      '0 or choose another mode.'
    )
  return optax.chain(
    optax.scale_by_learning_rate(learning_rate),
    decoupled_decay(learning_rate, l1_decay, jnp.sign),
    exponentiate_updates(mode, axis, floor),
  )


class PlusMinusState(NamedTuple):
  """The two halves of the parameters.

  Attributes:
    log_plus: logarithms of w+, like the parameters, at least float32.
    log_minus: logarithms of w-, likewise.
  """

  log_plus: Any
  log_minus: Any


def eg_plus_minus(
  learning_rate: optax.ScalarOrSchedule,
  total_mass: float = 1.0,
  axis: Axis = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Descends by exponentiated gradients on parameters of both signs.

  :math:`w = U (w^+ - w^-)`, where all entries of both halves together sum to 1
  and :math:`w^\pm \propto w^\pm e^{\mp\eta U g}`, so that
  :math:`\sum |w| \le U`. Parameters start where they are: with
  :math:`c = (1 - \sum |w| / U) / 2n`, :math:`w^\pm = c + \max(\pm w, 0) / U`,
  which is :math:`1/2n` for zeros. The halves are the state, from which each
  update sets the parameters anew. It needs `params`, and is the last link.

  Source: Kivinen and Warmuth, "Exponentiated Gradient versus Gradient Descent
  for Linear Predictors", 1997, Information and Computation 132, section 3,
  algorithm EG+-.

  Args:
    learning_rate: eta, or a schedule of it.
    total_mass: U, the largest sum of magnitudes.
    axis: the sums are taken along; None for each parameter's whole array.

  Raises:
    ValueError: if a number is negative; in `init`, if magnitudes sum to U or
      more; in `update`, without `params`.
  """
  _check_not_negative('learning_rate', learning_rate)
  if isinstance(total_mass, (int, float)) and not total_mass > 0:
    raise ValueError(f'total_mass must be positive, got {total_mass}.')

  def init(params):
    _check_mass(params, total_mass, axis)
    halves = jax.tree.map(lambda w: _halves(w, total_mass, axis), params)
    return PlusMinusState(*_unzip(params, halves))

  def update(updates, state, params=None):
    _check_given(params, 'eg_plus_minus')

    def leaf(u, log_plus, log_minus, w):
      step = total_mass * _wide(u)
      log_plus, log_minus = _normalised(log_plus + step, log_minus - step, axis)
      value = total_mass * (jnp.exp(log_plus) - jnp.exp(log_minus))
      return (value - w).astype(u.dtype), log_plus, log_minus

    new = jax.tree.map(leaf, updates, *state, params)
    updates, *halves = _unzip(params, new)
    return updates, PlusMinusState(*halves)

  return optax.chain(
    optax.scale_by_learning_rate(learning_rate),
    optax.GradientTransformation(init, update),
  )


@dataclasses.dataclass(frozen=True)
class ExponentiatedGradient:
  """Any optimiser, with updates that multiply the parameters.

  Its weight decay must be 0, since that would be multiplied as well; `l1_decay`
  is the decay of this geometry.

  Source: Cornford et al., "Brain-like learning with exponentiated gradients",
  2024, bioRxiv 2024.10.25.620272.

  Attributes:
    optimizer: gives the updates, of gradients, momentum or Adam.
    mode: what is kept, see `exponentiate_updates`.
    axis: along which slices sum to 1 in mode `'simplex'`; None for all axes.
    floor: smaller magnitudes count as this one.
    l1_decay: times the learning rate, what all logarithms fall by.
  """

  optimizer: Optimizer = FromOptax('sgd', Constant(0.1))
  mode: Mode = 'signed'
  axis: Axis = -1
  floor: float = 0.0
  l1_decay: float = 0.0

  @property
  def learning_rate(self) -> Schedule:
    """That of the optimiser."""
    return self.optimizer.learning_rate

  def build(self, steps: int) -> optax.GradientTransformationExtraArgs:
    if getattr(self.optimizer, 'weight_decay', 0):
      raise ValueError(
        'weight_decay of the optimiser in ExponentiatedGradient must be 0, got '
        f'{self.optimizer.weight_decay}; set l1_decay instead.'
      )
    return optax.chain(
      self.optimizer.build(steps),
      decoupled_decay(
        self.learning_rate.schedule(steps), self.l1_decay, jnp.sign
      ),
      exponentiate_updates(self.mode, self.axis, self.floor),
    )


@dataclasses.dataclass(frozen=True)
class EGPlusMinus:
  """Exponentiated gradients on parameters of both signs, see `eg_plus_minus`.

  Source: Kivinen and Warmuth, "Exponentiated Gradient versus Gradient Descent
  for Linear Predictors", 1997, Information and Computation 132, section 3,
  algorithm EG+-.

  Attributes:
    learning_rate: schedule.
    total_mass: largest sum of magnitudes.
    axis: the sums are taken along; None for each parameter's whole array.
  """

  learning_rate: Schedule = Constant(0.01)
  total_mass: float = 100.0
  axis: Axis = None

  def build(self, steps: int) -> optax.GradientTransformationExtraArgs:
    rate = self.learning_rate.schedule(steps)
    return eg_plus_minus(rate, self.total_mass, self.axis)


def _halves(w, total_mass, axis):
  """Returns the logarithms of w+ and w- whose difference is the parameter."""
  share = _wide(w) / total_mass
  mass = jnp.sum(jnp.abs(share), axis=axis, keepdims=True)
  spare = (1 - mass) / (2 * (w.size // mass.size))
  plus, minus = jnp.maximum(share, 0), jnp.maximum(-share, 0)
  return jnp.log(spare + plus), jnp.log(spare + minus)


def _normalised(log_plus, log_minus, axis):
  """Returns both, shifted so that all their exponentials sum to 1."""
  plus, minus = (
    jax.nn.logsumexp(half, axis=axis, keepdims=True)
    for half in (log_plus, log_minus)
  )
  total = jnp.logaddexp(plus, minus)
  return log_plus - total, log_minus - total


def _wide(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _unzip(tree, tuples):
  """Returns a tuple of trees from a tree of tuples."""
  return jax.tree.transpose(jax.tree.structure(tree), None, tuples)


def _check_not_negative(name, value):
  """Raises for a number below 0; a schedule or a traced number passes."""
  if isinstance(value, (int, float)) and not value >= 0:
    raise ValueError(f'{name} must not be negative, got {value}.')


def _check_given(params, name):
  if params is None:
    raise ValueError(
      f'{name} multiplies the parameters: call update(updates, state, params).'
    )


def _known(params):
  """Returns the path and value of each leaf whose value can be looked at."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if not isinstance(leaf, jax.core.Tracer):
      yield jax.tree_util.keystr(path) or 'the parameter', _wide(leaf)


def _check_positive(params, mode, axis):
  for name, leaf in _known(params):
    if leaf.min() < 0:
      raise ValueError(
        f'{name} has negative entries, down to {leaf.min():.3g}, which mode '
        f"{mode!r} cannot multiply; start at positive values or use 'signed'."
      )
    if mode == 'simplex':
      total = jnp.sum(leaf, axis=axis)
      if jnp.any(jnp.abs(total - 1) > 0.01):
        raise ValueError(
          f'{name} must sum to 1 along axis {axis}, but sums lie between '
          f'{total.min():.3g} and {total.max():.3g}; start at a softmax.'
        )


def _check_mass(params, total_mass, axis):
  for name, leaf in _known(params):
    mass = jnp.sum(jnp.abs(leaf), axis=axis).max()
    if not mass < total_mass:
      raise ValueError(
        f'the magnitudes of {name} sum to {mass:.3g}, which must be less than '
        f'total_mass {total_mass:.3g}; start at smaller values or raise it.'
      )
