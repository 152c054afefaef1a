"""LegS in time: exact transitions, closed form, and A in O(S).

The dynamics `x' = (A x + B u) / t` know no unit of time: from time m to time n
the state goes by E(m / n) and b(m / n) alone, whatever lies between, so products
of transitions are never needed. After the first sample the state is that sample
times e_0, whatever came before: E(0) = 0, b(0) = e_0.

All states are those of the paper's normalisation.

Source: Gu et al., "HiPPO", 2020, arXiv 2008.07669; Su Jianlin, "Revisiting SSM
(2)", 2024, kexue.fm/archives/10137.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Real
import numpy as np

from jaxformers.ops.hippo.measures import LinearSystem
from jaxformers.ops.hippo.measures import check_size
from jaxformers.ops.hippo.polynomials import legendre
from jaxformers.ops.recurrence.linear import linear_recurrence


def legs_transition(size: int, ratio: Any) -> LinearSystem:
  r"""Returns the exact step from time m to n = m / ratio, in float64.

  `x+ = E x + b u` with $E(r) = e^{-A \ln r}$ and $b = A^{-1}(E - I) B$, without
  an exponential: with Gauss-Legendre nodes $x_q$ and weights $w_q$,

  $E_{nj} = \frac r2 d_n d_j \sum_q w_q P_n(r (x_q + 1) - 1) P_j(x_q)$ and
  $b_n = (P_{n-1}(2 r - 1) - P_{n+1}(2 r - 1)) / (2 d_n)$, $b_0 = 1 - r$,

  where $d_n = \sqrt{2 n + 1}$. Lower triangular, diagonal $r^{n+1}$, and
  $\|E\|_2 \le \sqrt r$: nothing ever grows. Computed like this in float32 a
  recursion errs by 1e-3; `legs_change` is as exact there as rounding allows.

  Source: Gu et al., 2020, arXiv 2008.07669, proposition 3 (equivariance); Su
  Jianlin, 2024, kexue.fm/archives/10137 (exponential).

  Args:
    size: S.
    ratio: r, from 0 to 1, of any shape.

  Returns:
    E `[*, S, S]` and b `[*, S]`.

  Raises:
    ValueError: if a ratio is not between 0 and 1.
  """
  check_size(size)
  ratio = np.asarray(ratio, np.float64)
  if not ((ratio >= 0) & (ratio <= 1)).all():
    raise ValueError(
      f'ratios m / n must lie between 0 and 1, got {ratio!r:.60}.'
    )
  node_Q, weight_Q = np.polynomial.legendre.leggauss(size)
  root_S = np.sqrt(2 * np.arange(size) + 1.0)
  r = ratio[..., None]
  moved = legendre(r * (node_Q + 1) - 1, size) * (r * weight_Q / 2)[..., None]
  read = legendre(node_Q, size)
  e = np.swapaxes(moved * root_S, -1, -2) @ (read * root_S)
  # Integrals of P_n over the newest sample; that of P_0 has no neighbour below.
  p = legendre(2 * ratio - 1, size + 1)
  b = np.concatenate([1 - r, (p[..., :-2] - p[..., 2:]) / 2 / root_S[1:]], -1)
  return LinearSystem(np.tril(e), b)


class LegsChange(NamedTuple):
  """What one step adds to the state: `x+ = x + change x + gain u`.

  Source: none; see `legs_change`.

  Attributes:
    change_ST: `[*, S, S]`, E - I.
    gain_S: `[*, S]`, b.
  """

  change_ST: Float[Array, '*N S T']
  gain_S: Float[Array, '*N S']


def legs_change(
  since: Real[Array, '*N'],
  until: Real[Array, '*N'],
  size: int,
  dtype: Any = jnp.float32,
) -> LegsChange:
  """Returns the exact step from one time to another, to the last digit.

  The same as `legs_transition`, on the device and for times that are traced.
  Every part is computed as a difference from the identity, in numbers whose
  rounding errors are relative: the age of Gauss nodes as shares of the history
  from whichever end is nearer, Legendre polynomials by their increments. So a
  float32 recursion over 4096 samples errs by some 1e-6, like one with steps that
  were built in float64; steps built as E itself drift by 1e-4.

  Source: the step: see `legs_transition`; increments: Reinsch's form of
  Clenshaw's recurrence, Gentleman, "An error analysis of Goertzel's (Watt's)
  method for computing Fourier coefficients", 1969; for E - I none, our own.

  Args:
    since: times m before the step, not negative; 0 for none before.
    until: times n after it, n >= m.
    size: S.
    dtype: of the result.
  """
  shrink = shrinkage(jnp.asarray(since), jnp.asarray(until), dtype)
  analysis_QT = jnp.asarray(_gauss(size).analysis_QS, shrink.dtype)
  change_ST = jnp.matmul(
    change_at_nodes(shrink, size), analysis_QT, precision='highest'
  )
  powers_S = np.arange(1, size + 1, dtype=shrink.dtype)
  diagonal_S = jnp.expm1(powers_S * jnp.log1p(-shrink)[..., None])
  eye_ST = jnp.eye(size, dtype=bool)
  change_ST = jnp.where(eye_ST, diagonal_S[..., None], jnp.tril(change_ST, -1))
  gain_S = -integrals(shrink, 1 - shrink, size)
  return LegsChange(
    change_ST, jnp.concatenate([shrink[..., None], gain_S], axis=-1)
  )


def legs_projection(
  u_BLD: Float[Array, 'B L D'], size: int
) -> Float[Array, 'B S D']:
  """Projects whole sequences: the exact state after the last sample.

  One product with `[S, L]` integrals of the basis over each sample: the cheapest
  way if no other state is wanted, and what all recursions are tested against.

  Source: Su Jianlin, 2024, kexue.fm/archives/10114, definition of the
  coefficients; integrals: Abramowitz and Stegun, 1964, 22.13.9.

  Args:
    u_BLD: samples of equal length.
    size: S.
  """
  length = u_BLD.shape[1]
  dtype = jnp.result_type(u_BLD, jnp.float32)
  edge = np.arange(length + 1) / length
  at_edges = integrals(
    jnp.asarray(1 - edge, dtype), jnp.asarray(edge, dtype), size
  )
  weights_LS = jnp.diff(at_edges, axis=0)
  mean_L1 = jnp.full((length, 1), 1 / length, dtype)
  weights_LS = jnp.concatenate([mean_L1, weights_LS], axis=1)
  return jnp.einsum(
    'LS,BLD->BSD', weights_LS, u_BLD.astype(dtype), precision='highest'
  )


def legs_multiply(v_BSD: Float[Array, 'B S D']) -> Float[Array, 'B S D']:
  """Multiplies by A of LegS in O(S): `n v_n - d_n sum_(k<=n) d_k v_k`.

  Source: Su Jianlin, 2024, kexue.fm/archives/10137.

  Args:
    v_BSD: vectors along axis 1.
  """
  n_S1, root_S1 = _column(v_BSD)
  return n_S1 * v_BSD - root_S1 * jnp.cumsum(root_S1 * v_BSD, axis=1)


def legs_solve(
  v_BSD: Float[Array, 'B S D'], mu_B: Float[Array, ' B'] | float
) -> Float[Array, 'B S D']:
  """Solves `(I - mu A) z = v` with A of LegS in O(S).

  The sums `sum_(k<=n) d_k z_k` obey a linear recurrence over n with
  decays of at most 1. On accelerators a dense inverse is faster for S <= 256.

  Source: Su Jianlin, 2024, kexue.fm/archives/10137.

  Args:
    v_BSD: vectors along axis 1.
    mu_B: at least 0; one for each row, or one for all.
  """
  n_S1, root_S1 = _column(v_BSD)
  mu = jnp.asarray(mu_B, v_BSD.dtype).reshape(-1, 1, 1)
  scale = 1 + mu * (n_S1 + 1)
  decay = (1 - mu * n_S1) / scale
  sums_BSD = linear_recurrence(decay, root_S1 * v_BSD * (1 / scale)).states
  # z_n = (S_n - S_(n-1)) / d_n, with the difference taken by hand.
  before_BSD = jnp.pad(sums_BSD, ((0, 0), (1, 0), (0, 0)))[:, :-1]
  rise = -mu * (2 * n_S1 + 1) / scale
  return v_BSD / scale + rise * before_BSD / root_S1


def legs_forgetting(size: int, ratio: Any) -> Float[np.ndarray, '*N S']:
  """Returns the eigenvalues of the transition: `ratio^1 ... ratio^S`.

  Polynomial in time, where a system that does not vary forgets exponentially.
  No linear memory of finite size has both resolution and unbounded reach: the
  size is the only lever.

  Source: Su Jianlin, 2024, kexue.fm/archives/10137.

  Args:
    size: S.
    ratio: m / n, from 0 to 1; with e^-age it is `ExponentialLegS`.
  """
  ratio = np.asarray(ratio, np.float64)
  return ratio[..., None] ** np.arange(1, size + 1)


def shrinkage(
  since: Real[Array, '*N'], until: Real[Array, '*N'], dtype: Any
) -> Float[Array, '*N']:
  """Returns 1 - since / until, and 0 where nothing has passed.

  Source: none; `1 - r`.

  Args:
    since: times before, not negative.
    until: times after.
    dtype: of the result.
  """
  passed = (until - since).astype(dtype)
  return passed / jnp.where(until > 0, until, 1).astype(dtype)


class _Gauss(NamedTuple):
  """Gauss-Legendre nodes x, as the shares of [-1, 1] on either side of them.

  Attributes:
    near_Q: the smaller share.
    past_Q: the share before the node, (1 + x) / 2.
    is_old_Q: whether that is the smaller one.
    values_SQ: P_n(|x|).
    signs_SQ: P_n(x) / P_n(|x|).
    analysis_QS: from values at the nodes to coefficients.
  """

  near_Q: np.ndarray
  past_Q: np.ndarray
  is_old_Q: np.ndarray
  values_SQ: np.ndarray
  signs_SQ: np.ndarray
  analysis_QS: np.ndarray


@functools.cache
def _gauss(size):
  node_Q, weight_Q = np.polynomial.legendre.leggauss(size)
  is_old_Q = node_Q < 0
  n = np.arange(size)
  values_SQ = legendre(np.abs(node_Q), size).T
  signs_SQ = np.where(is_old_Q & (n[:, None] % 2 == 1), -1.0, 1.0)
  analysis_SQ = (
    signs_SQ * values_SQ * np.sqrt(2 * n[:, None] + 1) * weight_Q / 2
  )
  past_Q = (1 + node_Q) / 2
  near_Q = np.where(is_old_Q, past_Q, (1 - node_Q) / 2)
  return _Gauss(near_Q, past_Q, is_old_Q, values_SQ, signs_SQ, analysis_SQ.T)


def at_nodes(x_BSD: Float[Array, 'B S D']) -> Float[Array, 'B Q D']:
  """Returns the values of histories at the Gauss nodes, times weights.

  Source: none; quadrature.

  Args:
    x_BSD: coefficients.
  """
  analysis_QS = jnp.asarray(_gauss(x_BSD.shape[1]).analysis_QS, x_BSD.dtype)
  return jnp.matmul(analysis_QS, x_BSD, precision='highest')


def change_at_nodes(
  shrink: Float[Array, '*N'], size: int
) -> Float[Array, '*N S Q']:
  """Returns E - I as a map from values at the Gauss nodes.

  `d_n (r P_n(y_q) - P_n(x_q))`, with `y = x - shrink (1 + x)`.

  Source: see `legs_change`.

  Args:
    shrink: 1 - r.
    size: S.
  """
  gauss = _Gauss(*(jnp.asarray(x, shrink.dtype) for x in _gauss(size)))
  shrink = shrink[..., None]
  move_Q = (1 - 2 * gauss.is_old_Q) * shrink * gauss.past_Q
  near_Q = gauss.near_Q + move_Q

  def degree(carry, inputs):
    # Of the polynomials at the moved nodes less those at the nodes: increment
    # and value. 1 - |y| = 2 near.
    increment, value = carry
    n, value_Q = inputs
    source = near_Q * value + move_Q * value_Q
    increment = (n * increment - 2 * (2 * n + 1) * source) / (n + 1)
    return (increment, value + increment), value

  n_S = jnp.arange(size, dtype=shrink.dtype)
  zero = jnp.zeros_like(near_Q)
  _, moved = jax.lax.scan(degree, (zero, zero), (n_S, gauss.values_SQ))
  moved = jnp.moveaxis(moved, 0, -2) * gauss.signs_SQ
  shrink = shrink[..., None]
  change = moved - shrink * (moved + gauss.signs_SQ * gauss.values_SQ)
  return change * jnp.sqrt(2 * n_S[:, None] + 1)


def integrals(
  old: Float[Array, '*N'], new: Float[Array, '*N'], size: int
) -> Float[Array, '*N S']:
  """Returns integrals of the basis of degree 1 and more, up to an edge.

  `d_n / 2` times the integral of P_n from -1 to s, for n from 1 to S - 1.

  Source: Abramowitz and Stegun, 1964, 22.13.9; increments: see `legs_change`.

  Args:
    old: (1 - s) / 2, with a small relative error.
    new: (1 + s) / 2, likewise.
    size: S.

  Returns:
    `[*, S - 1]`.
  """
  near = jnp.minimum(old, new)

  def degree(carry, n):
    increment, value = carry
    after = (n * increment - 2 * (2 * n + 1) * near * value) / (n + 1)
    return (after, value + after), increment + after

  n_S = jnp.arange(size, dtype=near.dtype)
  start = jnp.zeros_like(near), jnp.ones_like(near)
  _, sums = jax.lax.scan(degree, start, n_S)
  sums = jnp.moveaxis(sums, 0, -1)[..., 1:]
  is_mirrored = (new < old)[..., None] & (np.arange(1, size) % 2 == 0)
  return jnp.where(is_mirrored, -sums, sums) / (2 * jnp.sqrt(2 * n_S[1:] + 1))


def _column(v_BSD):
  """Returns n and sqrt(2n + 1) along axis 1."""
  n_S1 = np.arange(v_BSD.shape[1], dtype=v_BSD.dtype)[:, None]
  return n_S1, np.sqrt(2 * n_S1 + 1)
