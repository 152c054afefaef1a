"""Which layers have states that grow: those with decays larger than 1.

States of a recurrence whose decay is larger than 1 grow without bound. Most mixers
rule that out by how they are parameterised; those that do not, such as
`jaxformers.nn.mixers.S5` without `clip_eigs`, sow the size of their largest decay
into the collection `decays` if it is mutable.

```python
for layer, size in decay_report(model, variables, tokens_BL).items():
  print(layer, float(size))  # more than 1: states grow
```

`jaxformers.train.NextToken` reports them at each step, and a run that stops at a
loss that is not finite names the layers that are to blame.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from jax import Array
from jaxtyping import Float

from jaxformers.diagnostics.layers import by_layer
from jaxformers.diagnostics.layers import sown_by

NAME = 'largest_decay'
# What rounding may add to a decay of 1.
_TOLERANCE = 1e-6


def decay_report(
  model: nn.Module, variables: Any, *inputs: Any, **options: Any
) -> dict[str, Float[Array, '']]:
  """Runs a model and returns the largest `|decay|` of each layer that may grow.

  Source: none; sums of geometric series.

  Args:
    model: the model; compiled once for each, so it must hash.
    variables: its variables.
    *inputs: what the model takes, such as tokens `[B, L]`: a few are enough.
    **options: further arrays that it takes by name.

  Returns:
    Numbers by layer, named as by `attention_report`; nothing of layers whose
    decays are at most 1 whatever their parameters are.
  """
  sown = sown_by(model, 'decays', variables, inputs, options)
  return by_layer(sown, variables.get('params', {}), NAME)


def decay_metrics(
  decays: Mapping[str, Any], params: Mapping[str, Any]
) -> dict[str, Float[Array, '']]:
  """Names what layers have sown for logs: `<layer>/largest_decay`.

  Source: none; a property of this library.

  Args:
    decays: the collection `decays` after a call in which it was mutable.
    params: the parameters, which tell how many layers there are.
  """
  report = by_layer(decays, params, NAME)
  return {f'{layer}/{NAME}': size for layer, size in report.items()}


def growing_layers(metrics: Mapping[str, float]) -> str:
  """Returns a sentence on the layers whose decays are above 1, or nothing.

  Source: none; for messages.

  Args:
    metrics: of a step, some of them by `decay_metrics`.
  """
  sizes = {
    name.removesuffix(f'/{NAME}'): size
    for name, size in metrics.items()
    if name.endswith(f'/{NAME}') and not size <= 1 + _TOLERANCE
  }
  if not sizes:
    return ''
  shown = ', '.join(f'{layer} ({size:.6g})' for layer, size in sizes.items())
  return (
    f' Decays are larger than 1 in {shown}: states grow there with the length.'
    ' S5 keeps them below with clip_eigs=True.'
  )
