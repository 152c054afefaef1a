"""How strongly losses and outputs depend on inputs.

These are functions to minimise or to look at; gradients with respect to
parameters go through them in reverse over reverse, which blockwise attention
cannot do. For a penalty in forward over reverse see
`jaxformers.optim.with_input_gradient_penalty`.
"""

from collections.abc import Callable
from typing import Literal

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float


def input_gradient_penalty(
  losses_fn: Callable[[Array], Float[Array, ' B']],
  inputs: Float[Array, 'B ...'],
) -> Float[Array, ' B']:
  """Computes the squared gradient of each example's loss by its inputs.

  `L + (eps / 2) mean |dl_i/dx_i|^2` is to first order the loss after a step of
  `eps dl_i/dx_i` (an adversarial step that is not normalised).

  One backward pass gives all of them, because example i has no part in the loss
  of example j; normalisation over the batch breaks this.

  Source: Drucker and Le Cun, "Improving Generalization Performance Using Double
  Backpropagation", 1992; as a form of adversarial training: Su Jianlin, 2020,
  kexue.fm/archives/7234.

  Args:
    losses_fn: one loss per example.
    inputs: arrays that gradients can reach, such as embedded tokens.

  Returns:
    `sum_x (dl_i/dx)^2`, at least float32.
  """
  gradient = jax.grad(lambda x: losses_fn(x).sum())(inputs)
  return _squares(gradient)


def noise_penalty(
  function: Callable[[Array], Float[Array, 'B V']],
  inputs: Float[Array, 'B ...'],
  key: Array,
  *,
  divergence: Literal['mse', 'kl'] = 'mse',
) -> Float[Array, ' B']:
  """Estimates what noise in the inputs costs, with one backward pass.

  Normal noise of standard deviation sigma moves the outputs f, on average and to
  lowest order, by `(sigma^2 / 2) sum_i lambda_i |df_i/dx|^2`, where lambda is 2
  for squared differences and `1 / f_i` for the Kullback-Leibler divergence of
  probabilities. The sum is the mean of `|d(sum_i s_i sqrt(lambda_i) f_i)/dx|^2`
  over random signs s, of which this draws one per output; lambda counts as
  constant.

  Source: Bishop, "Training with Noise is Equivalent to Tikhonov
  Regularization", 1995; Su Jianlin, 2020, kexue.fm/archives/7466.

  Args:
    function: V outputs per example; probabilities, all positive, for `'kl'`.
    inputs: see `input_gradient_penalty`.
    key: of the random signs.
    divergence: how a move of the outputs is measured.

  Returns:
    An unbiased estimate of the sum, at least float32.

  Raises:
    ValueError: if the divergence has another name.
  """
  if divergence not in ('mse', 'kl'):
    raise ValueError(f"divergence must be 'mse' or 'kl', got {divergence!r}.")

  def mixed(x):
    f_BV = function(x)
    constant_BV = jax.lax.stop_gradient(f_BV)
    signs_BV = jax.random.rademacher(key, f_BV.shape, f_BV.dtype)
    lambda_BV = 2.0 if divergence == 'mse' else 1 / constant_BV
    return jnp.sum(signs_BV * jnp.sqrt(lambda_BV) * f_BV)

  return _squares(jax.grad(mixed)(inputs))


def _squares(gradient):
  gradient = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
  return jnp.sum(gradient**2, axis=tuple(range(1, gradient.ndim)))
