"""Normalisation of feature vectors, computed in at least float32."""

from typing import Literal

from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

EpsOn = Literal['variance', 'deviation']


def rms_norm(
  x_BLD: Float[Array, '*B D'],
  scale_D: Float[Array, ' D'] | None = None,
  *,
  eps: float = 1e-6,
  eps_on: EpsOn = 'variance',
) -> Float[Array, '*B D']:
  """Scales each feature vector to unit root mean square.

  `x / sqrt(mean(x^2) + eps) * scale`.

  Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019,
  arXiv 1910.07467, equation 4; eps as in Llama.

  Args:
    x_BLD: any leading axes.
    scale_D: gain per feature; None for no gain.
    eps: what keeps the division finite.
    eps_on: see `layer_norm`.

  Returns:
    An array like `x_BLD`, of its dtype.
  """
  x = x_BLD.astype(jnp.promote_types(x_BLD.dtype, jnp.float32))
  power = jnp.mean(x * x, axis=-1, keepdims=True)
  y = x / _deviation(power, eps, eps_on)
  return _affine(y, scale_D, None).astype(x_BLD.dtype)


def layer_norm(
  x_BLD: Float[Array, '*B D'],
  scale_D: Float[Array, ' D'] | None = None,
  offset_D: Float[Array, ' D'] | None = None,
  *,
  eps: float = 1e-6,
  eps_on: EpsOn = 'variance',
  variance: Literal['biased', 'unbiased'] = 'biased',
) -> Float[Array, '*B D']:
  """Shifts each feature vector to mean zero and scales it to unit variance.

  `(x - mean) / sqrt(var + eps) * scale + offset`. The variance is the mean of
  squared differences from the mean, in two passes: the one-pass form
  `mean(x^2) - mean(x)^2` loses all digits where the mean is large.

  Source: Ba et al., "Layer Normalization", 2016, arXiv 1607.06450, equation 4.

  Args:
    x_BLD: any leading axes.
    scale_D: gain per feature; None for no gain.
    offset_D: offset per feature; None for no offset.
    eps: what keeps the division finite; implementations differ (1e-5 in
      PyTorch, 1e-6 in Flax, 1e-12 in BERT), so published weights need theirs.
    eps_on: whether eps is added to the `'variance'` under the root, as nearly
      everywhere, or to the standard `'deviation'` after it (tensor2tensor's
      predecessors, The Annotated Transformer).
    variance: `'biased'` divides the sum of squares by D, `'unbiased'` by D - 1
      (The Annotated Transformer).

  Returns:
    An array like `x_BLD`, of its dtype.
  """
  x = x_BLD.astype(jnp.promote_types(x_BLD.dtype, jnp.float32))
  centred = x - jnp.mean(x, axis=-1, keepdims=True)
  degrees = x.shape[-1] - (variance == 'unbiased')
  power = jnp.sum(centred * centred, axis=-1, keepdims=True) / degrees
  y = centred / _deviation(power, eps, eps_on)
  return _affine(y, scale_D, offset_D).astype(x_BLD.dtype)


def _deviation(power, eps, eps_on):
  if eps_on == 'variance':
    return jnp.sqrt(power + eps)
  # The root has no gradient at zero, where eps must decide alone.
  root = jnp.sqrt(jnp.where(power > 0, power, 1))
  return jnp.where(power > 0, root, 0) + eps


def _affine(y, scale_D, offset_D):
  if scale_D is not None:
    y = y * scale_D.astype(y.dtype)
  if offset_D is not None:
    y = y + offset_D.astype(y.dtype)
  return y
