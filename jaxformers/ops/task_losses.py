"""Weights of the losses of several tasks, from the losses alone.

Losses are `[T]`, in at least float32, each a mean over the whole batch. A mask
is False for tasks of which the batch has nothing: their weight is 0, and means
are over the others. Weights are constants: where an objective is differentiated
with respect to parameters, put `jax.lax.stop_gradient` around them.
"""

import math

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float


def power_mean(
  losses_T: Float[Array, ' T'],
  gamma: float,
  mask_T: Bool[Array, ' T'] | None = None,
) -> Float[Array, '']:
  r"""Computes $(\frac1m \sum_i L_i^\gamma)^{1/\gamma}$ of positive losses.

  The arithmetic mean at 1, the geometric at 0, the harmonic at -1, the largest
  and the smallest loss at plus and minus infinity.

  Source: Su Jianlin, "Multi-task learning (1): in the name of loss", 2022,
  kexue.fm/archives/8870; the geometric mean also in Chennupati et al., 2019,
  arXiv 1904.08492.

  Args:
    losses_T: positive.
    gamma: the exponent.
    mask_T: False for absent tasks; None for none.

  Returns:
    The mean over the tasks that are present; 0 if none is.
  """
  mask_T = _mask(losses_T, mask_T)
  if math.isinf(gamma):
    best = jnp.max if gamma > 0 else jnp.min
    found = best(jnp.where(mask_T, losses_T, -gamma))
    return jnp.where(mask_T.any(), found, 0)
  return jnp.where(
    mask_T.any(), jnp.exp(_log_power_mean(losses_T, gamma, mask_T)), 0
  )


def power_mean_weights(
  losses_T: Float[Array, ' T'],
  gamma: float,
  mask_T: Bool[Array, ' T'] | None = None,
) -> Float[Array, ' T']:
  r"""Computes the gradient of the power mean, $(L_i / M)^{\gamma - 1} / m$.

  By Euler's theorem $\sum_i w_i L_i = M$.

  Source: as `power_mean`.

  Args:
    losses_T: positive.
    gamma: the exponent; if infinite, the extreme losses share the weight.
    mask_T: False for absent tasks; None for none.
  """
  mask_T = _mask(losses_T, mask_T)
  if math.isinf(gamma):
    chosen_T = mask_T & (losses_T == power_mean(losses_T, gamma, mask_T))
    return chosen_T / jnp.maximum(chosen_T.sum(), 1)
  ratio_T = _log(losses_T, mask_T) - _log_power_mean(losses_T, gamma, mask_T)
  weights_T = jnp.exp((gamma - 1) * ratio_T) / jnp.maximum(mask_T.sum(), 1)
  return jnp.where(mask_T, weights_T, 0)


def initial_cross_entropy(classes: int) -> float:
  """Computes the cross entropy of a classifier that knows nothing, log K.

  Source: Su Jianlin, "Multi-task learning (1): in the name of loss", 2022,
  kexue.fm/archives/8870.

  Args:
    classes: K.
  """
  return math.log(classes)


def prior_cross_entropy(frequencies_V: Float[Array, ' V']) -> Float[Array, '']:
  r"""Computes the least cross entropy without input, $-\sum p \log p$.

  Source: as `initial_cross_entropy`.

  Args:
    frequencies_V: of the classes; divided by their sum.
  """
  p_V = frequencies_V / frequencies_V.sum()
  return -jax.scipy.special.xlogy(p_V, p_V).sum()


def initial_squared_error(y_BD: Float[Array, 'B D']) -> Float[Array, '']:
  r"""Computes the squared error of the prediction 0, $E \|y\|^2$.

  Source: as `initial_cross_entropy`.

  Args:
    y_BD: targets.
  """
  return jnp.mean(jnp.sum(jnp.square(y_BD), axis=-1))


def prior_squared_error(y_BD: Float[Array, 'B D']) -> Float[Array, '']:
  r"""Computes the least squared error without input, $E \|y - E y\|^2$.

  Source: as `initial_cross_entropy`.

  Args:
    y_BD: targets.
  """
  return initial_squared_error(y_BD - y_BD.mean(axis=0))


def uncertainty_loss(
  losses_T: Float[Array, ' T'],
  log_variance_T: Float[Array, ' T'],
  mask_T: Bool[Array, ' T'] | None = None,
) -> Float[Array, '']:
  r"""Weighs losses by learned variances, $\sum_i (e^{-s_i} L_i + s_i) / 2$.

  At its minimum over s, where $s_i = \log L_i$, it is
  $\frac12 \sum_i (1 + \log L_i)$: a slow form of weights 1 / L.

  Source: Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to
  Weigh Losses", 2018, arXiv 1705.07115, section 3.2, with s the log-variance.

  Args:
    losses_T: the losses.
    log_variance_T: s, learned together with the model.
    mask_T: False for absent tasks; None for none.
  """
  terms_T = jnp.exp(-log_variance_T) * losses_T + log_variance_T
  return jnp.sum(terms_T / 2, where=_mask(losses_T, mask_T))


def imtl_l_loss(
  losses_T: Float[Array, ' T'],
  scale_T: Float[Array, ' T'],
  mask_T: Bool[Array, ' T'] | None = None,
) -> Float[Array, '']:
  r"""Weighs losses by learned scales, $\sum_i (e^{s_i} L_i - s_i)$.

  Twice `uncertainty_loss` of -s.

  Source: Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021,
  openreview IMPnRXEWpvr (IMTL-L).

  Args:
    losses_T: the losses.
    scale_T: s, learned together with the model.
    mask_T: False for absent tasks; None for none.
  """
  terms_T = jnp.exp(scale_T) * losses_T - scale_T
  return jnp.sum(terms_T, where=_mask(losses_T, mask_T))


def dwa_weights(
  latest_T: Float[Array, ' T'],
  earlier_T: Float[Array, ' T'],
  temperature: float = 2.0,
  mask_T: Bool[Array, ' T'] | None = None,
) -> Float[Array, ' T']:
  r"""Weighs tasks by how slowly their losses fall.

  $w_i = m\, \mathrm{softmax}_i(L_i(t-1) / (L_i(t-2)\, \tau))$.

  Source: Liu, Johns and Davison, "End-to-End Multi-Task Learning with
  Attention", 2019, arXiv 1803.10704 (dynamic weight average).

  Args:
    latest_T: mean losses of the epoch before.
    earlier_T: mean losses of the one before that, positive.
    temperature: evens out the weights.
    mask_T: False for absent tasks; None for none.
  """
  mask_T = _mask(latest_T, mask_T)
  rate_T = jnp.where(mask_T, latest_T / earlier_T, 0) / temperature
  return _shares(rate_T, mask_T)


def gradnorm_loss(
  logits_T: Float[Array, ' T'],
  norms_T: Float[Array, ' T'],
  losses_T: Float[Array, ' T'],
  first_T: Float[Array, ' T'],
  alpha: float = 1.5,
  mask_T: Bool[Array, ' T'] | None = None,
) -> Float[Array, '']:
  r"""Measures how far weighted gradients are from the norms they should have.

  $\sum_i |w_i \|g_i\| - \bar G r_i^\alpha|$ with $w = m\,\mathrm{softmax}(z)$,
  $\bar G$ the mean of $w_j \|g_j\|$ and $r_i = \tilde L_i / \bar{\tilde L}$ the
  relative part of its first loss that a task still has. Everything but the
  first term is constant: differentiate with respect to z.

  Source: Chen et al., "GradNorm", 2018, arXiv 1711.02257, section 3.2; the
  softmax keeps the sum of weights without renormalising after each step.

  Args:
    logits_T: z, learned by its own optimiser.
    norms_T: of the gradients of the tasks.
    losses_T: the losses.
    first_T: the losses at the first step, positive.
    alpha: how strongly slow tasks are favoured.
    mask_T: False for absent tasks; None for none.
  """
  mask_T = _mask(losses_T, mask_T)
  count = jnp.maximum(mask_T.sum(), 1)
  weighted_T = gradnorm_weights(logits_T, mask_T) * norms_T
  left_T = jnp.where(mask_T, losses_T / first_T, 0)
  mean = jnp.sum(left_T) / count
  rate_T = left_T / jnp.where(mean > 0, mean, 1)
  goal_T = jnp.sum(weighted_T, where=mask_T) / count * rate_T**alpha
  gaps_T = jnp.abs(weighted_T - jax.lax.stop_gradient(goal_T))
  return jnp.sum(gaps_T, where=mask_T)


def gradnorm_weights(
  logits_T: Float[Array, ' T'], mask_T: Bool[Array, ' T'] | None = None
) -> Float[Array, ' T']:
  r"""Computes $m\,\mathrm{softmax}(z)$ over the tasks that are present.

  Source: as `gradnorm_loss`.

  Args:
    logits_T: z.
    mask_T: False for absent tasks; None for none.
  """
  return _shares(logits_T, _mask(logits_T, mask_T))


def famo_weights(
  losses_T: Float[Array, ' T'],
  logits_T: Float[Array, ' T'],
  mask_T: Bool[Array, ' T'] | None = None,
) -> Float[Array, ' T']:
  r"""Computes $w_i = c z_i / L_i$ with $z = \mathrm{softmax}(\xi)$, of sum 1.

  The same as $\mathrm{softmax}(\xi - \log L)$, as which it is computed.

  Source: Liu et al., "FAMO: Fast Adaptive Multitask Optimization", 2023, arXiv
  2306.03792, algorithm 1.

  Args:
    losses_T: positive.
    logits_T: xi, learned by the slopes of `famo_loss`.
    mask_T: False for absent tasks; None for none.
  """
  mask_T = _mask(losses_T, mask_T)
  shares_T = _shares(logits_T - _log(losses_T, mask_T), mask_T)
  return shares_T / jnp.maximum(mask_T.sum(), 1)


def famo_loss(
  logits_T: Float[Array, ' T'],
  before_T: Float[Array, ' T'],
  after_T: Float[Array, ' T'],
  mask_T: Bool[Array, ' T'] | None = None,
) -> Float[Array, '']:
  r"""Measures what a step did, $\sum_i z_i (\log L_i - \log L_i')$.

  Descent on it takes shares $z = \mathrm{softmax}(\xi)$ from the tasks whose
  losses fell fast, until all fall at one rate.

  Source: Liu et al., "FAMO: Fast Adaptive Multitask Optimization", 2023, arXiv
  2306.03792, algorithm 1.

  Args:
    logits_T: xi.
    before_T: positive losses L of a batch before the step.
    after_T: positive losses L' of the same batch after it.
    mask_T: False for absent tasks; None for none.
  """
  mask_T = _mask(before_T, mask_T)
  fall_T = _log(before_T, mask_T) - _log(after_T, mask_T)
  shares_T = _shares(logits_T, mask_T) / jnp.maximum(mask_T.sum(), 1)
  return jnp.sum(shares_T * fall_T)


def _shares(logits_T, mask_T):
  lowest = jnp.finfo(logits_T.dtype).min
  shares_T = jax.nn.softmax(jnp.where(mask_T, logits_T, lowest))
  return jnp.where(mask_T, mask_T.sum() * shares_T, 0)


def _mask(losses_T, mask_T):
  return jnp.ones(losses_T.shape, bool) if mask_T is None else mask_T


def _log(losses_T, mask_T):
  return jnp.log(jnp.where(mask_T, losses_T, 1))


def _log_power_mean(losses_T, gamma, mask_T):
  log_T = _log(losses_T, mask_T)
  count = jnp.maximum(mask_T.sum(), 1)
  if abs(gamma) < 1e-6:
    return log_T.sum() / count
  total = jax.nn.logsumexp(gamma * log_T, where=mask_T)
  return (total - jnp.log(count)) / gamma
