"""Elementwise nonlinearities by the names the literature uses."""

from collections.abc import Callable
import difflib

import jax
from jax import Array
import jax.numpy as jnp


def squared_relu(x: Array) -> Array:
  """Returns `max(x, 0)^2`.

  Source: So et al., "Primer: Searching for Efficient Transformers for Language
  Modeling", 2021, arXiv 2109.08668, section 4.
  """
  return jnp.square(jax.nn.relu(x))


def gelu(x: Array) -> Array:
  """Returns `x Phi(x)` with the exact normal distribution function Phi.

  Source: Hendrycks and Gimpel, "Gaussian Error Linear Units (GELUs)", 2016,
  arXiv 1606.08415, section 2.
  """
  return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Array) -> Array:
  """Returns the tanh approximation of `gelu`, as in BERT and GPT-2.

  Source: Hendrycks and Gimpel, 2016, arXiv 1606.08415, section 2.
  """
  return jax.nn.gelu(x, approximate=True)


def elu_plus_one(x: Array) -> Array:
  """Returns `x + 1` for positive x and `exp(x)` otherwise; always positive.

  Source: Katharopoulos et al., "Transformers are RNNs", 2020, arXiv 2006.16236,
  equation 7.
  """
  # Not elu(x) + 1, which cancels to 0 where exp(x) is small.
  return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


ACTIVATIONS = {
  'elu_plus_one': elu_plus_one,
  'gelu': gelu,
  'gelu_tanh': gelu_tanh,
  'identity': lambda x: x,
  'relu': jax.nn.relu,
  'sigmoid': jax.nn.sigmoid,
  'silu': jax.nn.silu,
  'squared_relu': squared_relu,
  'tanh': jnp.tanh,
}


def activation(name: str) -> Callable[[Array], Array]:
  """Returns the nonlinearity of that name.

  Raises:
    ValueError: if there is none; the message names the nearest.
  """
  if name not in ACTIVATIONS:
    near = difflib.get_close_matches(name, ACTIVATIONS, 1, 0)
    raise ValueError(
      f'unknown activation {name!r}; did you mean {near[0]!r}? '
      f'Known: {", ".join(ACTIVATIONS)}.'
    )
  return ACTIVATIONS[name]
