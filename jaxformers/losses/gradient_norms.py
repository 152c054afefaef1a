"""An inequality between gradients by parameters and by inputs."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float


class GradientNorms(NamedTuple):
  """Both sides of `gradient_norm_inequality`.

  Source: see there.

  Attributes:
    lhs: float `[]`, never more than `rhs`.
    rhs: float `[]`, squared norm of the gradient by all parameters.
    per_layer: float `[layers]`, the summands of `lhs`.
  """

  lhs: Float[Array, '']
  rhs: Float[Array, '']
  per_layer: Float[Array, ' N']


def gradient_norm_inequality(
  params: Sequence[tuple[Float[Array, 'F D'], Float[Array, ' F']]],
  x_D: Float[Array, ' D'],
  activations: Sequence[Callable[[Array], Array]],
  f: Callable[[Array], Float[Array, '']],
) -> GradientNorms:
  """Computes both sides: flat in parameters is smooth in inputs.

  For a perceptron `h_(t+1) = g_t(W_t h_t + b_t)`, `h_1 = x`, and a function f
  of its last h,

  `|df/dx|^2 sum_t (1 + |h_t|^2) / (|W_t|^2 |dh_t/dx|^2) <= |df/d params|^2`

  with spectral norms on the left. It follows layer by layer from
  `h_t (df/dx)' = (df/dW_t)' W_t dh_t/dx`. Summands whose denominator is 0 are
  left out: f does not depend on x through such a layer.

  Source: Dherin et al., "The Geometric Occam's Razor Implicit in Deep
  Learning", 2021, arXiv 2111.15090; in this form: Su Jianlin, 2021,
  kexue.fm/archives/8796.

  Args:
    params: weights (rows are outputs) and offsets of each layer.
    x_D: one example.
    activations: g of each layer.
    f: scalar function of the last layer, such as a loss.

  Raises:
    ValueError: if there are not as many activations as layers.
  """
  if len(params) != len(activations):
    raise ValueError(
      f'expected one activation per layer, got {len(activations)} for '
      f'{len(params)} layers; use lambda z: z for a linear one.'
    )

  def run(params, x, depth):
    for (w, b), activation in zip(params[:depth], activations, strict=False):
      x = activation(w @ x + b)
    return x

  value = lambda params, x: f(run(params, x, len(params)))
  by_params, by_x = jax.grad(value, argnums=(0, 1))(params, x_D)
  per_layer = []
  for depth, (w, _) in enumerate(params):
    h = run(params, x_D, depth)
    jacobian = jax.jacfwd(lambda x, depth=depth: run(params, x, depth))(x_D)
    denominator = (_spectral(w) * _spectral(jacobian)) ** 2
    summand = jnp.sum(by_x**2) * (1 + jnp.sum(h**2))
    is_positive = denominator > 0
    per_layer.append(
      jnp.where(
        is_positive, summand / jnp.where(is_positive, denominator, 1), 0
      )
    )
  rhs = sum(jnp.sum(g**2) for g in jax.tree.leaves(by_params))
  summands = jnp.stack(per_layer)
  return GradientNorms(summands.sum(), rhs, summands)


def _spectral(matrix):
  return jnp.linalg.norm(matrix, ord=2)
