"""A softmax head in closed form: linear discriminant analysis, streaming.

If features of each class are normal with a covariance that all classes share, the
posterior is exactly a softmax of linear functions, and their coefficients follow
from counts, means and the scatter within classes. These are gathered batch by
batch and shard by shard, in any order.

Letters: features `[B, D]`, D wide; V classes; `scatter_DE` has features along
both axes.

Source: Fisher, "The Use of Multiple Measurements in Taxonomic Problems", 1936; Su
Jianlin, "Linear models from a probability view: does logistic regression have an
analytic solution?", 2021, kexue.fm/archives/8578; merging: Chan, Golub and
LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
Variances", 1979.
"""

from typing import Literal, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor
from jax.scipy.linalg import cho_solve
from jaxtyping import Float, Int

Shrinkage = float | Array | Literal['auto', 'oas']


class ClassStatistics(NamedTuple):
  """All that the closed form needs to know of the data, at least float32.

  Source: see the module.

  Attributes:
    count_V: number (or weight) of examples of each class.
    mean_VD: mean features of each class; 0 for an empty one.
    scatter_DE: sum of `(x - mean)(x - mean)'` about the mean of each x's class.
  """

  count_V: Float[Array, ' V']
  mean_VD: Float[Array, 'V D']
  scatter_DE: Float[Array, 'D E']


class SoftmaxHead(NamedTuple):
  """A linear map to logits; kernel and bias of a dense layer.

  Source: see the module.

  Attributes:
    kernel_DV: weights.
    bias_V: offsets; -inf for a class without examples, whose weights are 0.
  """

  kernel_DV: Float[Array, 'D V']
  bias_V: Float[Array, ' V']

  def logits(self, x_BD: Float[Array, 'B D']) -> Float[Array, 'B V']:
    """Returns unnormalised log-probabilities."""
    return x_BD @ self.kernel_DV + self.bias_V


def lda_init(
  width: int, classes: int, dtype: jnp.dtype = jnp.float32
) -> ClassStatistics:
  """Returns the statistics of no data.

  Source: see the module.

  Args:
    width: D, number of features.
    classes: V.
    dtype: of the statistics, float32 or float64.
  """
  return ClassStatistics(
    jnp.zeros(classes, dtype),
    jnp.zeros((classes, width), dtype),
    jnp.zeros((width, width), dtype),
  )


def lda_update(
  state: ClassStatistics,
  x_BD: Float[Array, 'B D'],
  labels_B: Int[Array, ' B'],
) -> ClassStatistics:
  """Adds a batch: two matrix products, `O(B D (D + V))`.

  Source: see the module.

  Args:
    state: of the data so far.
    x_BD: features.
    labels_B: classes from 0; rows with a negative label are padding.
  """
  return lda_merge(state, _of_batch(state, x_BD, labels_B))


def _of_batch(state, x_BD, labels_B):
  dtype, classes = state.mean_VD.dtype, state.count_V.size
  y_BV = jax.nn.one_hot(labels_B, classes, dtype=dtype)
  is_row_B1 = y_BV.any(axis=1, keepdims=True)
  x_BD = jnp.where(is_row_B1, x_BD.astype(dtype), 0)
  count_V = y_BV.sum(axis=0)
  # Sums of what is left over a row of the class lose no digits to a far mean.
  reference_D = x_BD.sum(axis=0) / jnp.maximum(count_V.sum(), 1)
  x_BD = jnp.where(is_row_B1, x_BD - reference_D, 0)
  precise = jax.lax.Precision.HIGHEST
  sum_VD = jnp.einsum('BV,BD->VD', y_BV, x_BD, precision=precise)
  mean_VD = sum_VD / jnp.maximum(count_V, 1)[:, None]
  rest_BD = x_BD - jnp.einsum('BV,VD->BD', y_BV, mean_VD, precision=precise)
  scatter_DE = jnp.einsum('BD,BE->DE', rest_BD, rest_BD, precision=precise)
  mean_VD = jnp.where(count_V[:, None] > 0, mean_VD + reference_D, 0)
  return ClassStatistics(count_V, mean_VD, scatter_DE)


def lda_merge(a: ClassStatistics, b: ClassStatistics) -> ClassStatistics:
  """Returns the statistics of two sets of data together.

  Associative and commutative up to rounding, so it serves `scan` over batches
  and trees over hosts.

  Source: Chan, Golub and LeVeque, 1979, per class.

  Args:
    a: statistics of some data.
    b: those of other data.
  """
  count_V = a.count_V + b.count_V
  share_V = b.count_V / jnp.where(count_V > 0, count_V, 1)
  gap_VD = b.mean_VD - a.mean_VD
  mean_VD = a.mean_VD + gap_VD * share_V[:, None]
  between_DE = _weighted_scatter(a.count_V * share_V, gap_VD)
  return ClassStatistics(
    count_V, mean_VD, a.scatter_DE + b.scatter_DE + between_DE
  )


def lda_psum(state: ClassStatistics, axis_name: str) -> ClassStatistics:
  """Merges the statistics of all devices along a mesh axis, by three sums.

  For use within `jax.shard_map`; `lda_update` under `jax.jit` needs it not.

  Source: Chan, Golub and LeVeque, 1979, about a common mean.

  Args:
    state: of the device's own data.
    axis_name: of the mesh axis, or a tuple of several.
  """
  count_V = jax.lax.psum(state.count_V, axis_name)
  share_V = state.count_V / jnp.where(count_V > 0, count_V, 1)
  mean_VD = jax.lax.psum(state.mean_VD * share_V[:, None], axis_name)
  between_DE = _weighted_scatter(state.count_V, state.mean_VD - mean_VD)
  scatter_DE = jax.lax.psum(state.scatter_DE + between_DE, axis_name)
  return ClassStatistics(count_V, mean_VD, scatter_DE)


def _weighted_scatter(weight_V, gap_VD):
  return jnp.einsum(
    'V,VD,VE->DE', weight_V, gap_VD, gap_VD, precision=jax.lax.Precision.HIGHEST
  )


def lda_covariance(
  state: ClassStatistics, shrinkage: Shrinkage = 0.0
) -> Float[Array, 'D E']:
  """Computes the covariance within classes, shrunk towards a sphere.

  `(1 - rho) S / N + rho tr(S / N) / D I`. Without any scatter, as with one
  example per class, it is the identity.

  Source: Ledoit and Wolf, "A Well-Conditioned Estimator for Large-Dimensional
  Covariance Matrices", 2004, equation 14.

  Args:
    state: of the data.
    shrinkage: rho, see `lda_solve`.
  """
  width = state.mean_VD.shape[1]
  covariance_DE = state.scatter_DE / jnp.maximum(state.count_V.sum(), 1)
  rho = _rho(state, shrinkage)
  mean = jnp.trace(covariance_DE) / width
  eye_DE = jnp.eye(width, dtype=covariance_DE.dtype)
  shrunk_DE = (1 - rho) * covariance_DE + rho * mean * eye_DE
  return jnp.where(mean > 0, shrunk_DE, eye_DE)


def _rho(state, shrinkage):
  if not isinstance(shrinkage, str):
    return jnp.asarray(shrinkage, state.mean_VD.dtype)
  if shrinkage == 'oas':
    return oas_shrinkage(state)
  if shrinkage != 'auto':
    raise ValueError(
      f"shrinkage must be a number, 'auto' or 'oas', got {shrinkage!r}."
    )
  # Float32 cannot solve with a covariance that is singular to 1e-4.
  least = 1e-4 if state.mean_VD.dtype == jnp.float32 else 0.0
  few = state.count_V.sum() < 10 * state.mean_VD.shape[1]
  return jnp.where(few, 0.1, least).astype(state.mean_VD.dtype)


def oas_shrinkage(state: ClassStatistics) -> Float[Array, '']:
  """Computes the shrinkage of least expected error for normal features.

  It needs the statistics alone, so it streams; the features within classes are
  normal in the model of this head anyway. scikit-learn leaves out the terms of
  order 1 / D.

  Source: Chen, Wiesel, Eldar and Hero, "Shrinkage Algorithms for MMSE Covariance
  Estimation", 2010, arXiv 0907.4698.

  Args:
    state: of the data.
  """
  examples, width = jnp.maximum(state.count_V.sum(), 1), state.mean_VD.shape[1]
  covariance_DE = state.scatter_DE / examples
  square_of_trace = jnp.trace(covariance_DE) ** 2
  trace_of_square = jnp.sum(covariance_DE**2)
  numerator = (1 - 2 / width) * trace_of_square + square_of_trace
  denominator = (examples + 1 - 2 / width) * (
    trace_of_square - square_of_trace / width
  )
  is_regular = denominator > 0
  rho = numerator / jnp.where(is_regular, denominator, 1)
  return jnp.where(is_regular, jnp.minimum(rho, 1), 1)


def ledoit_wolf_shrinkage(
  state: ClassStatistics,
  x_BD: Float[Array, 'B D'],
  labels_B: Int[Array, ' B'],
) -> Float[Array, '']:
  """Estimates the shrinkage of least expected error for any distribution.

  A second look at the data, all of which `state` must hold. It differs from
  scikit-learn's `'auto'`, which shrinks the covariance of each class, with
  standardised features.

  Source: Ledoit and Wolf, 2004, lemmas 3.2 to 3.5, of deviations from the means
  of classes.

  Args:
    state: of the data.
    x_BD: all features.
    labels_B: their classes; rows with a negative label are padding.
  """
  dtype, examples = state.mean_VD.dtype, jnp.maximum(state.count_V.sum(), 1)
  width = state.mean_VD.shape[1]
  x_BD = x_BD.astype(dtype) - state.mean_VD[jnp.maximum(labels_B, 0)]
  fourth = jnp.where(labels_B >= 0, jnp.sum(x_BD**2, axis=1) ** 2, 0).sum()
  covariance_DE = state.scatter_DE / examples
  square = jnp.sum(covariance_DE**2)
  # Squared distances: of the covariance to the sphere, and its own error.
  spread = square - jnp.trace(covariance_DE) ** 2 / width
  error = (fourth / examples - square) / examples
  is_regular = spread > 0
  rho = error / jnp.where(is_regular, spread, 1)
  return jnp.where(is_regular, jnp.clip(rho, 0, 1), 1)


def lda_solve(
  state: ClassStatistics,
  shrinkage: Shrinkage = 'auto',
  priors_V: Float[Array, ' V'] | None = None,
) -> SoftmaxHead:
  """Solves for the softmax head.

  `w_i = C^-1 mu_i`, `b_i = log p_i - mu_i' C^-1 mu_i / 2`, with C from
  `lda_covariance`, up to one linear function of x that all logits share: means
  are taken relative to their weighted mean, which keeps digits. Only differences
  between logits mean anything. By Cholesky, `O(D^3 + D^2 V)`.

  Source: Su Jianlin, 2021, kexue.fm/archives/8578. Its script divides by N - 1
  where the formula needs N, which adds the identity over N to the covariance.

  Args:
    state: of the data.
    shrinkage: rho of `lda_covariance`, from 0 to 1; `'auto'` is 0.1 for fewer
      than 10 D examples, otherwise 1e-4 in float32 and 0 in float64; `'oas'`
      see `oas_shrinkage`. With no more than D + V examples 0 has no solution.
    priors_V: probabilities p of the classes, which enter the bias alone; None
      for their shares of the data.

  Returns:
    The head. Classes without examples have probability 0.
  """
  count_V = state.count_V
  has_V = count_V > 0
  share_V = count_V / jnp.maximum(count_V.sum(), 1)
  centre_D = share_V @ state.mean_VD
  mean_VD = jnp.where(has_V[:, None], state.mean_VD - centre_D, 0)
  factor = cho_factor(lda_covariance(state, shrinkage))
  kernel_DV = cho_solve(factor, mean_VD.T)
  prior_V = (
    share_V if priors_V is None else jnp.asarray(priors_V, share_V.dtype)
  )
  log_prior_V = jnp.where(
    has_V, jnp.log(jnp.where(has_V, prior_V, 1)), -jnp.inf
  )
  # (x - centre)' w - mu' w / 2, with mu relative to the centre.
  offset_V = jnp.einsum('DV,VD->V', kernel_DV, mean_VD) / 2
  return SoftmaxHead(kernel_DV, log_prior_V - offset_V - centre_D @ kernel_DV)
