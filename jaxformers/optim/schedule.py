"""Learning rates over the steps of a run."""

import dataclasses
from typing import Literal, Protocol

import optax

from jaxformers.optim import learning_rates


class Schedule(Protocol):
  """A learning rate over the steps of a run."""

  def schedule(self, steps: int) -> optax.Schedule:
    """Returns the function from step (0 is the first) to learning rate."""
    ...


@dataclasses.dataclass(frozen=True)
class Constant:
  """The same learning rate at every step.

  Attributes:
    value: the learning rate.
  """

  value: float

  def schedule(self, steps: int) -> optax.Schedule:
    del steps
    return optax.constant_schedule(self.value)


@dataclasses.dataclass(frozen=True)
class WarmupCosine:
  """Rises linearly to a peak, then falls along a half cosine.

  Source: Loshchilov and Hutter, "SGDR", 2016, arXiv 1608.03983, equation 5,
  without restarts.

  Attributes:
    peak: the largest learning rate.
    warmup_steps: steps until the peak; cut to the length of the run.
    final_fraction: of the peak, at the last step.
  """

  peak: float
  warmup_steps: int = 100
  final_fraction: float = 0.1

  def schedule(self, steps: int) -> optax.Schedule:
    warmup = min(self.warmup_steps, steps - 1)
    # The first step already moves: at a learning rate of 0 it would be lost.
    return optax.warmup_cosine_decay_schedule(
      init_value=self.peak / (warmup + 1),
      peak_value=self.peak,
      warmup_steps=warmup,
      decay_steps=steps,
      end_value=self.peak * self.final_fraction,
    )


@dataclasses.dataclass(frozen=True)
class WarmupLinear:
  """Rises linearly to a peak, then falls linearly.

  Source: Devlin et al., "BERT", 2018, arXiv 1810.04805, appendix A.2.

  Attributes:
    peak: the largest learning rate.
    warmup_steps: steps until the peak; cut to the length of the run.
    final_fraction: of the peak, at the last step.
  """

  peak: float
  warmup_steps: int = 100
  final_fraction: float = 0.0

  def schedule(self, steps: int) -> optax.Schedule:
    warmup = min(self.warmup_steps, steps - 1)
    rise = optax.linear_schedule(self.peak / (warmup + 1), self.peak, warmup)
    final = self.peak * self.final_fraction
    fall = optax.linear_schedule(self.peak, final, steps - warmup)
    return optax.join_schedules([rise, fall], [warmup])


@dataclasses.dataclass(frozen=True)
class LinearDecay:
  """Falls linearly from the first step, to 0 one step after the last.

  The best schedule for the loss of the last iterate of gradient descent, as far
  as worst cases go.

  Source: Defazio et al., "Optimal Linear Decay Learning Rate Schedules and
  Further Refinements", 2023, arXiv 2310.07831.

  Attributes:
    peak: what it falls from.
  """

  peak: float

  def schedule(self, steps: int) -> optax.Schedule:
    return learning_rates.linear_decay(self.peak, steps)


@dataclasses.dataclass(frozen=True)
class InverseSqrtDecay:
  """Falls as `peak / sqrt t`, whatever the length of the run.

  Source: Zinkevich, "Online Convex Programming and Generalized Infinitesimal
  Gradient Ascent", 2003, theorem 1.

  Attributes:
    peak: the first learning rate.
  """

  peak: float

  def schedule(self, steps: int) -> optax.Schedule:
    del steps
    return learning_rates.inv_sqrt(self.peak)


@dataclasses.dataclass(frozen=True)
class RefinedDecay:
  """Warms up and decays as the gradient norms of an earlier run suggest.

  Source: Defazio et al., 2023, arXiv 2310.07831.

  Attributes:
    peak: the largest learning rate.
    gradient_norms: positive, evenly spaced over the earlier run: its metric
      `gradient_norm`, thinned out.
    kind: see `jaxformers.optim.refined_from_grad_norms`.
    smoothing: part of the norms over which their running median is taken.
  """

  peak: float
  gradient_norms: tuple[float, ...]
  kind: Literal['average', 'last', 'anytime'] = 'last'
  smoothing: float = 0.1

  def schedule(self, steps: int) -> optax.Schedule:
    reach = round(self.smoothing * len(self.gradient_norms) / 2)
    norms = learning_rates.smoothed(self.gradient_norms, 2 * reach + 1)
    rates = learning_rates.refined_rates(norms, self.kind)
    scale = self.peak / rates.max()
    return learning_rates.from_rates(scale * rates, steps)
