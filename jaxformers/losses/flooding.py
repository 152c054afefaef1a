"""A floor under the training loss."""

from jax import Array
import jax.numpy as jnp
from jaxtyping import Float


def flooding(loss: Float[Array, ''], level: float) -> Float[Array, '']:
  """Computes `|loss - level| + level`: below the level, descent turns round.

  A step down and a step up around the level act like one step of half the
  squared learning rate on the squared norm of the gradient. At the level itself
  the derivative is 1.

  The loss must be the mean over the whole batch. Flooding the parts of a batch
  one by one, on devices or in accumulation, minimises something larger;
  `jaxformers.optim.flood` sees the whole.

  Source: Ishida et al., "Do We Need Zero Training Loss After Achieving Zero
  Training Error?", 2020, arXiv 2002.08709; the squared gradient: Su
  Jianlin, 2020, kexue.fm/archives/7643.

  Args:
    loss: mean loss of a batch.
    level: of the floor; 0 changes no loss that is not negative.
  """
  return jnp.abs(loss - level) + level
