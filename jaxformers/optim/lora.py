"""LoRA+: a larger learning rate for the output side of low-rank adapters."""

from collections.abc import Callable, Mapping
import dataclasses
import re
from typing import Any

import jax
from jax import Array
import optax

from jaxformers.optim.optimizer import AdamW
from jaxformers.optim.optimizer import Optimizer
from jaxformers.optim.optimizer import clipped
from jaxformers.optim.optimizer import split_clipping
from jaxformers.optim.schedule import Constant
from jaxformers.optim.schedule import Schedule

Rate = float | Array | Callable[[Any], Any]
MakeTransform = Callable[[Rate], optax.GradientTransformation]

GROUPS = 'in', 'out', 'embed'


def lora_labels(
  adapters: Any, *, embeddings: str = r'(^|/)(table_[A-Z]+|embedding)/'
) -> Any:
  """Sorts adapters into the groups `'in'`, `'out'` and `'embed'`.

  By the name of the factor; both factors of an embedding are `'embed'`. Biases
  and other leaves of one axis that train along are `'out'`, further leaves are
  `'in'`, as in the official code.

  Source: Hayou et al., "LoRA+", 2024, arXiv 2402.12354; groups:
  github.com/nikhil-ghosh-berkeley/loraplus.

  Args:
    adapters: tree that `jaxformers.ops.lora_init` made.
    embeddings: regular expression that is found in the paths of their factors.
  """

  def label(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if re.search(embeddings, name):
      return 'embed'
    is_out = name.split('/')[-1].startswith('lora_out')
    return 'out' if is_out or leaf.ndim <= 1 else 'in'

  return jax.tree_util.tree_map_with_path(label, adapters)


def lora_plus(
  base_tx_fn: MakeTransform | Mapping[str, MakeTransform],
  lr: Rate,
  ratio: float | Array = 16.0,
  embed_lr: Rate = 1e-6,
) -> optax.GradientTransformationExtraArgs:
  """Trains each side of low-rank adapters with a learning rate of its own.

  `lora_in` gets `lr`, `lora_out` gets `ratio * lr` at every step, embeddings get
  `embed_lr`. A ratio of 1 is plain LoRA, but for embeddings. Clip the norm of
  the gradient in a link before this one: inside, it would be that of a group.

  The ratio matters most where `lora_in` begins at 0. With the usual start, the
  other way round, a well-chosen `lr` does nearly as well at ratios up to 30, and
  100 is too large (`experiments/lora_plus_starts.py`).

  Source: Hayou et al., "LoRA+", 2024, arXiv 2402.12354, section 4; the ratio of
  16 and the rate of embeddings: github.com/nikhil-ghosh-berkeley/loraplus.

  Args:
    base_tx_fn: makes the optimiser of a learning rate, such as `optax.adam`; or
      one such function for each of `'in'`, `'out'` and `'embed'`, where groups
      shall differ, as in their weight decay.
    lr: a number or an optax schedule.
    ratio: of the rates of output and input side; positive.
    embed_lr: a number or an optax schedule.

  Raises:
    ValueError: if the ratio is not positive, or a group has no optimiser.
  """
  if isinstance(ratio, int | float) and not ratio > 0:
    raise ValueError(f'ratio must be positive, got {ratio}.')
  make = base_tx_fn
  if not isinstance(make, Mapping):
    make = dict.fromkeys(GROUPS, base_tx_fn)
  if set(make) != set(GROUPS):
    raise ValueError(f'expected optimisers of {GROUPS}, got {tuple(make)}.')
  out_lr = (lambda step: ratio * lr(step)) if callable(lr) else ratio * lr
  rates = {'in': lr, 'out': out_lr, 'embed': embed_lr}
  return optax.partition(
    {name: make[name](rate) for name, rate in rates.items()}, lora_labels
  )


@dataclasses.dataclass(frozen=True)
class LoRAPlus:
  """An optimiser for each side of low-rank adapters, as `lora_plus` has them.

  Source: Hayou et al., "LoRA+", 2024, arXiv 2402.12354, section 4; the ratio of
  16 and the rate of embeddings: github.com/nikhil-ghosh-berkeley/loraplus.

  Attributes:
    inner: the optimiser; its learning rate is that of `lora_in`. Its clipping
      comes first, by the norm of all gradients.
    ratio: the learning rate of `lora_out` over that of `lora_in`.
    embed_learning_rate: of adapters of embeddings.
  """

  inner: Optimizer = AdamW()
  ratio: float = 16.0
  embed_learning_rate: Schedule = Constant(1e-6)

  def __post_init__(self):
    names = {field.name for field in dataclasses.fields(self.inner)}
    if 'learning_rate' not in names:
      raise ValueError(
        f'{type(self.inner).__name__} has no learning_rate of its own to '
        'multiply; put LoRAPlus inside it instead.'
      )

  @property
  def learning_rate(self) -> Schedule:
    """That of `lora_in`."""
    return self.inner.learning_rate

  def build(self, steps: int) -> optax.GradientTransformationExtraArgs:
    max_norm, inner = split_clipping(self.inner)

    def make(rate):
      own = dataclasses.replace(inner, learning_rate=_Given(rate))
      return own.build(steps)

    rate = self.learning_rate.schedule(steps)
    embed_rate = self.embed_learning_rate.schedule(steps)
    return clipped(max_norm, lora_plus(make, rate, self.ratio, embed_rate))


@dataclasses.dataclass(frozen=True)
class _Given:
  """A schedule that is known already."""

  rate: Callable[[Any], Any]

  def schedule(self, steps):
    del steps
    return self.rate
