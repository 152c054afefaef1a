"""How much the attention of a model concentrates, layer by layer.

```python
report = attention_report(model, variables, tokens_BL)
print(attention_table(report))
report['stack/layer_3/mixer'].entropy  # nats, one number per head
```

Mixers measure themselves while the model runs, and sow the numbers into the
collection `diagnostics`, but only if it is mutable: outputs, parameters and the
cost of training stay what they are.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax import Array
from jaxtyping import Float
import numpy as np

from jaxformers.diagnostics.layers import by_layer
from jaxformers.diagnostics.layers import sown_by
from jaxformers.ops.attention_diagnostics import TOP_K
from jaxformers.ops.attention_diagnostics import AttentionDiagnostics

Report = dict[str, AttentionDiagnostics]

_HEADINGS = AttentionDiagnostics(
  visible_keys='n',
  entropy='H',
  relative_entropy='H/log n',
  concentration='S',
  effective_support='N_eff',
  max_weight='max',
  top_k_mass=f'top {TOP_K}',
  beta='beta',
  gamma='gamma',
  softmax_concentration='S(gamma)',
  jacobian_l1='|dp/ds|',
)


def attention_report(
  model: nn.Module, variables: Any, *inputs: Any, **options: Any
) -> Report:
  """Runs a model and measures the attention of each of its layers and heads.

  Works for every module that contains mixers which measure themselves, such as
  `jaxformers.nn.mixers.Attention`, in scanned and unrolled stacks alike; also
  inside `jit`. Each call looks at 64 queries per sequence
  (`jaxformers.ops.attention_diagnostics`).

  Source: Su Jianlin, "Can attention really concentrate?", 2023,
  kexue.fm/archives/9889.

  Args:
    model: the model; compiled once for each, so it must hash.
    variables: its variables.
    *inputs: what the model takes, such as tokens `[B, L]` and a state: arrays.
    **options: further arrays that it takes by name, such as `segments_BL`.

  Returns:
    The measures of each layer, in order, named by the path of its mixer; layers
    of a `Stack` are called `layer_0`, `layer_1`, ... whether it is scanned or
    not. A mixer that is called several times has `#0`, `#1`, ... after its
    name.

  Raises:
    ValueError: if nothing in the model measures attention.
  """
  sown = sown_by(model, 'diagnostics', variables, inputs, options)
  return attention_by_layer(sown, variables.get('params', {}))


def attention_by_layer(
  diagnostics: Mapping[str, Any], params: Mapping[str, Any]
) -> Report:
  """Sorts what mixers have sown by layer, for those who run the model.

  Source: none; a property of this library.

  Args:
    diagnostics: the collection `diagnostics` after a call with
      `mutable=['diagnostics']`.
    params: the parameters, which tell how many layers there are.

  Returns:
    As `attention_report`.

  Raises:
    ValueError: if nothing in the model measures attention.
  """
  report = by_layer(diagnostics, params, 'attention')
  if not report:
    raise ValueError(
      'no layer measured its attention: expected a model with mixers that sow '
      "'attention' into the collection 'diagnostics', as "
      'jaxformers.nn.mixers.Attention does.'
    )
  return report


def attention_metrics(report: Report) -> dict[str, Float[Array, '']]:
  """Averages each measure of each layer over heads, for logs.

  Source: none; a property of this library.

  Args:
    report: see `attention_report`.

  Returns:
    Scalars named `<layer>/<measure>`.
  """
  return {
    f'{layer}/{name}': value.mean()
    for layer, measures in report.items()
    for name, value in measures._asdict().items()
  }


def attention_table(report: Report) -> str:
  """Writes a report as text, one line per layer and head.

  Source: none; a property of this library.

  Args:
    report: see `attention_report`.

  Returns:
    A table without a line break at its end. n is the mean number of visible
    keys, H the entropy, S the concentration.
  """
  rows = [('layer', 'head', *_HEADINGS)]
  for layer, measures in jax.device_get(report).items():
    for head, numbers in enumerate(np.stack(measures, axis=-1)):
      rows.append((layer, str(head), *(f'{x:.3g}' for x in numbers)))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join(_line(row, widths) for row in rows)


def _line(row, widths):
  first, *rest = row
  cells = [
    cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)
  ]
  return '  '.join([first.ljust(widths[0]), *cells])
