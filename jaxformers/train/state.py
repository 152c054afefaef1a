"""What a training run carries from step to step."""

from typing import Any, NamedTuple

from jax import Array
from jaxtyping import Int
import optax

from jaxformers.optim.descent import averaged_params
from jaxformers.optim.descent import keeps_average


class TrainState(NamedTuple):
  """Everything that a training step reads and writes.

  There is no random key: the randomness of a step is a function of the seed and
  the step number, and so is its batch.

  Attributes:
    step: int32 `[]`, number of finished steps.
    params: the parameters.
    statistics: the other collections of variables, such as running averages.
    optimizer_state: state of the optax transformation.
    skipped: int32 `[]`, steps whose update was skipped as not finite.
    frozen: the collection of variables that no step changes, such as the
      parameters of a model whose adapters are trained; None if there is none.
      It is saved once per run.
    tasks: state of what combines tasks; empty where nothing does.
  """

  step: Int[Array, '']
  params: Any
  statistics: Any
  optimizer_state: optax.OptState
  skipped: Int[Array, '']
  frozen: Any = None
  tasks: Any = ()

  @property
  def variables(self) -> dict[str, Any]:
    """The variables of the model that is trained."""
    frozen = {} if self.frozen is None else {'frozen': self.frozen}
    return {'params': self.params, **self.statistics, **frozen}

  @property
  def result(self) -> dict[str, Any]:
    """The variables of the model that training gives.

    Its parameters are the mean of those so far where the optimiser keeps it, as
    `jaxformers.optim.Averaged` does.
    """
    if not keeps_average(self.optimizer_state):
      return self.variables
    mean = averaged_params(self.optimizer_state, self.params)
    return {**self.variables, 'params': mean}
