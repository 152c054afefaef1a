"""Gradients of several losses at once, combined into one.

```python
def losses(params, batch):
  return jnp.stack([loss_a(params, batch), loss_b(params, batch)])


gradient = multitask_value_and_grad(losses, MGDA())
value, gradients = gradient(params, batch)
updates, opt_state = optimizer.update(gradients, opt_state, params)
```
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from jaxformers.ops.gram import combine
from jaxformers.ops.gram import gram
from jaxformers.optim.tasks.combination import Combined
from jaxformers.optim.tasks.combination import SharedMask
from jaxformers.optim.tasks.combination import check_combination
from jaxformers.optim.tasks.combination import combine_stacked
from jaxformers.optim.tasks.combination import merge
from jaxformers.optim.tasks.combination import split
from jaxformers.optim.tasks.combination import start
from jaxformers.optim.tasks.contract import Combination
from jaxformers.optim.tasks.contract import Scalarizer
from jaxformers.optim.tasks.contract import StackedCombination
from jaxformers.optim.tasks.contract import Weighting
from jaxformers.optim.tasks.contract import weigh

Mode = Literal['gram_then_backward', 'stacked', 'sequential']


class Multitask(NamedTuple):
  """Losses of several tasks, and how they were weighed.

  Attributes:
    losses_T: the losses.
    weights_T: weights of the gradients of shared parameters; nan if a loss or
      gradient of a present task is not finite.
    gram_TT: inner products of these gradients, nan in the row of a task whose
      gradient is not finite; None where they were not computed.
    state: of the weighting, for the next call.
    aux: what the loss function returned besides, or None.
  """

  losses_T: Float[Array, ' T']
  weights_T: Float[Array, ' T']
  gram_TT: Float[Array, 'T T'] | None
  state: Any
  aux: Any


def multitask_value_and_grad(
  loss_vec_fn: Callable[..., Any],
  weighting: Combination,
  mode: Mode = 'gram_then_backward',
  *,
  shared_mask: SharedMask = None,
  has_aux: bool = False,
) -> Callable[..., tuple[Multitask, Any]]:
  """Differentiates a vector of losses and combines its gradients.

  The forward pass runs once and each task costs a backward pass. By
  `'gram_then_backward'` the gradients of the tasks serve for inner products
  only, so that the compiler can drop those of a layer as soon as it has
  them, and one more backward pass gives the combined gradient. By `'stacked'`
  they are kept and combined: one pass less, for the memory of all of them.
  `'sequential'` does the same, but runs the passes one after the other, so that
  what a pass holds of activations is held for one task at a time: best where
  activations are larger than parameters. A `Scalarizer` needs none of this by
  the first mode, just one backward pass of the weighted sum; by the others it
  reports inner products too. A `StackedCombination` needs one of the others.

  Weights are those of shared parameters; parameters of single tasks get the
  plain gradients of their own losses. A `Scalarizer` weighs losses, and with
  them the gradients of all parameters.

  Source: as the weighting; backward passes from one forward pass: Baydin et
  al., "Automatic Differentiation in Machine Learning: a Survey", 2018, arXiv
  1502.05767, section 3.2.

  Args:
    loss_vec_fn: `(params, *arguments) -> losses`, `[T]`; of absent tasks any
      finite number with finite derivatives.
    weighting: what weighs or combines.
    mode: see above.
    shared_mask: True for parameters that tasks share, or a function from
      parameters to that; None: all are.
    has_aux: whether `loss_vec_fn` returns `(losses, aux)`.

  Returns:
    `(params, *arguments, state=None, mask=None, metric=None) -> (Multitask,
    gradients)`. `state`: of the weighting, None before the first call; `mask`:
    bool `[T]`, False for absent tasks, or a function from aux to that; `metric`: positive multipliers of inner
    products in the structure of the parameters, such as those of an
    `AdamMetric`.
  """
  check_combination(weighting)
  check_mode(weighting, mode)

  def value_and_grad(params, *arguments, state=None, mask=None, metric=None):
    function = lambda p: loss_vec_fn(p, *arguments)
    losses_T, pull, aux = _vjp(function, params, has_aux)
    tasks = len(losses_T)
    if state is None:
      state = start(weighting, tasks, split(params, shared_mask)[0])
    mask_T = mask(aux) if callable(mask) else mask
    mask_T = jnp.ones(tasks, bool) if mask is None else mask_T
    pull_one = lambda cotangent_T: pull(cotangent_T)[0]
    if mode == 'gram_then_backward':
      combined = _gram_then_backward(
        weighting, pull_one, losses_T, mask_T, state, shared_mask, metric
      )
    else:
      stacked = backward_passes(pull_one, losses_T, mode)
      combined = combine_stacked(
        weighting,
        stacked,
        losses_T,
        mask_T,
        state,
        shared_mask=shared_mask,
        metric=metric,
      )
    gradients, weights_T, gram_TT, state = combined
    return Multitask(losses_T, weights_T, gram_TT, state, aux), gradients

  return value_and_grad


def representation_value_and_grad(
  encode_fn: Callable[..., Any],
  loss_vec_fn: Callable[..., Float[Array, ' T']],
  weighting: Weighting,
) -> Callable[..., tuple[Multitask, Any]]:
  """Weighs tasks by their gradients at a shared representation.

  With H the representation, the norm of a combination of gradients is at most
  that of the combination of dL_i / dH times that of dH / dtheta. Inner products
  of the dL_i / dH cost no pass through the encoder, which then runs backward
  once. A heuristic: for examples that have labels of different tasks the
  dL_i / dH are orthogonal and conflicts are not seen, and its stationary points
  need not be those of the tasks.

  Source: Sener and Koltun, "Multi-Task Learning as Multi-Objective
  Optimization", 2018, arXiv 1810.04650, section 3.3; its limits: Su Jianlin,
  2022, kexue.fm/archives/8896.

  Args:
    encode_fn: `(encoder_params, *arguments) -> H`, any tree of arrays.
    loss_vec_fn: `(head_params, H, *arguments) -> losses`, `[T]`.
    weighting: what weighs.

  Returns:
    `((encoder_params, head_params), *arguments, state=None, mask=None) ->
    (Multitask, gradients)`; the `gram_TT` is that of the dL_i / dH.
  """
  check_combination(weighting)
  if isinstance(weighting, StackedCombination):
    raise ValueError(
      f'{type(weighting).__name__} needs gradients of the parameters; use '
      "multitask_value_and_grad with mode='stacked'."
    )

  def value_and_grad(params, *arguments, state=None, mask=None):
    encoder, heads = params
    hidden, pull_encoder = jax.vjp(lambda p: encode_fn(p, *arguments), encoder)
    losses_T, pull_heads = jax.vjp(
      lambda p, h: loss_vec_fn(p, h, *arguments), heads, hidden
    )
    tasks = len(losses_T)
    state = weighting.init(tasks) if state is None else state
    mask_T = jnp.ones(tasks, bool) if mask is None else mask
    eye_TT = jnp.eye(tasks, dtype=losses_T.dtype)
    stacked_heads, stacked_hidden = jax.vmap(pull_heads)(eye_TT)
    gram_TT = gram(stacked_hidden)
    weights_T, state = weigh(weighting, gram_TT, losses_T, mask_T, state)
    (encoder_gradients,) = pull_encoder(combine(stacked_hidden, weights_T))
    head_gradients = combine(stacked_heads, mask_T.astype(losses_T.dtype))
    value = Multitask(losses_T, weights_T, gram_TT, state, None)
    return value, (encoder_gradients, head_gradients)

  return value_and_grad


def task_gram(
  loss_vec_fn: Callable[..., Any],
  params: Any,
  *arguments: Any,
  shared_mask: SharedMask = None,
  metric: Any = None,
) -> tuple[Float[Array, ' T'], Float[Array, 'T T']]:
  """Computes losses of tasks and the inner products of their gradients.

  Source: as `jaxformers.ops.gram`.

  Args:
    loss_vec_fn: `(params, *arguments) -> losses`, `[T]`.
    params: where.
    *arguments: of the function.
    shared_mask: as in `multitask_value_and_grad`.
    metric: as in `multitask_value_and_grad`.
  """
  losses_T, pull = jax.vjp(lambda p: loss_vec_fn(p, *arguments), params)
  stacked = backward_passes(lambda e: pull(e)[0], losses_T, 'stacked')
  shared, _ = split(stacked, shared_mask)
  if metric is not None:
    metric, _ = split(metric, shared_mask)
  return losses_T, gram(shared, metric)


def backward_passes(
  pull: Callable[[Array], Any], losses_T: Float[Array, ' T'], mode: Mode
) -> Any:
  """Runs one backward pass per task.

  Source: as `multitask_value_and_grad`.

  Args:
    pull: from cotangents of the losses to gradients.
    losses_T: gives number and dtype of the cotangents.
    mode: `'sequential'` for one after the other, else together.

  Returns:
    Gradients stacked along a leading axis of tasks.
  """
  eye_TT = jnp.eye(len(losses_T), dtype=losses_T.dtype)
  if mode == 'sequential':
    return jax.lax.map(pull, eye_TT)
  return jax.vmap(pull)(eye_TT)


def check_mode(weighting: Combination, mode: str) -> None:
  """Raises unless a combination can work in a mode.

  Source: none; bookkeeping.

  Args:
    weighting: the combination.
    mode: the mode.
  """
  if mode not in get_args(Mode):
    raise ValueError(f'mode must be one of {get_args(Mode)}, got {mode!r}.')
  keeps = mode in ('stacked', 'sequential')
  if not keeps and isinstance(weighting, StackedCombination):
    raise ValueError(
      f'{type(weighting).__name__} combines the gradients themselves, not by '
      "weights; set mode='stacked'."
    )


def _vjp(function, params, has_aux):
  if has_aux:
    losses_T, pull, aux = jax.vjp(function, params, has_aux=True)
  else:
    (losses_T, pull), aux = jax.vjp(function, params), None
  if losses_T.ndim != 1:
    raise ValueError(
      f'the losses have shape {losses_T.shape}, expected [T], one number per '
      'task; stack them by jnp.stack.'
    )
  return losses_T, pull, aux


def _gram_then_backward(
  weighting, pull, losses_T, mask_T, state, shared_mask, metric
):
  """Combines gradients of which no more than a layer need exist at once."""
  if isinstance(weighting, Scalarizer):
    weights_T, state = weigh(weighting, None, losses_T, mask_T, state)
    gradients = pull(weights_T.astype(losses_T.dtype))
    return Combined(gradients, weights_T, None, state)
  stacked = backward_passes(pull, losses_T, 'gram_then_backward')
  shared, own = split(stacked, shared_mask)
  if metric is not None:
    metric, _ = split(metric, shared_mask)
  gram_TT = gram(shared, metric)
  weights_T, state = weigh(weighting, gram_TT, losses_T, mask_T, state)
  update, _ = split(pull(weights_T.astype(losses_T.dtype)), shared_mask)
  rest = combine(own, mask_T.astype(losses_T.dtype))
  return Combined(merge(update, rest), weights_T, gram_TT, state)
