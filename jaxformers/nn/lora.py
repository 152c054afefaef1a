"""Low-rank fine-tuning of a model as it is: `x W0 + s (x A) B`.

The factors join a model without a change to its code: each of them is put beside
its matrix among the parameters, where scanning, rematerialising and splitting
carry it along, and the layer's call is intercepted to add what the factors give.
No whole matrix of changes, nor a gradient of one, is made, but for a table of
embeddings that the head shares.
"""

from collections.abc import Callable, Mapping
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from jaxformers.nn.depth import COLLECTIONS
from jaxformers.nn.embed import Embed
from jaxformers.nn.head import Head
from jaxformers.nn.linear import Linear
from jaxformers.ops.lora import LowRank
from jaxformers.ops.lora import lora_factors
from jaxformers.ops.lora import lora_init
from jaxformers.ops.lora import lora_merge
from jaxformers.ops.lora import lora_unmerge

_BESIDE = ':lora'


class Call(NamedTuple):
  """The call of a layer that has a low-rank change.

  Attributes:
    method: name of the method.
    args: its arguments.
    kwargs: its arguments by name.
    output: what it returned.
    lora_in: A.
    lora_out: B.
    scale: s.
    drop: applies dropout to what A is about to multiply.
  """

  method: str
  args: tuple[Any, ...]
  kwargs: Mapping[str, Any]
  output: Any
  lora_in: Float[Array, '...']
  lora_out: Float[Array, '...']
  scale: float
  drop: Callable[[Array], Array]

  @property
  def inputs(self) -> Array:
    """What it was given first."""
    return self.args[0] if self.args else next(iter(self.kwargs.values()))


@functools.singledispatch
def low_rank_layer(
  module: nn.Module,
) -> tuple[str, Callable[[Call], Any]] | None:
  """Says how a layer computes with a low-rank change of its matrix.

  Knows `jaxformers.nn.Linear`, `Embed` and `Head`, and Flax's `Dense`,
  `DenseGeneral`, `Einsum`, `Conv` and `Embed`. Teach it another by
  `@low_rank_layer.register`.

  Source: Hu et al., "LoRA", 2021, arXiv 2106.09685, equation 3.

  Args:
    module: the layer.

  Returns:
    The name of its matrix, and a function from a call to what that shall return;
    None for layers without a matrix of their own.
  """
  del module
  return None


def factored_apply(
  model: nn.Module, low_rank: LowRank, *, deterministic: bool = True
) -> Callable[..., Any]:
  """Makes `model.apply` a function of variables and adapters.

  Computes what `lora_apply(model.apply, ...)` does without merging. Differentiate
  it in the adapters alone: the model's own parameters then have no gradients.

  Source: Hu et al., "LoRA", 2021, arXiv 2106.09685, equation 3.

  Args:
    model: any Flax Linen module.
    low_rank: which of its matrices change.
    deterministic: False where `low_rank.dropout` shall act; then pass
      `rngs={'dropout': key}`.

  Returns:
    `(variables, adapters, *args, **kwargs)`, with what `model.apply` takes
    further.

  Raises:
    ValueError: on a call, if the adapters are not those of the parameters, or one
      belongs to a layer that cannot use it.
  """

  def apply(variables, adapters, *args, **kwargs):
    factors = lora_factors(variables['params'], adapters, low_rank)
    used: set[str] = set()
    rate = 0.0 if deterministic else low_rank.dropout
    interceptor = functools.partial(_intercept, low_rank.scale, rate, used)
    params = _beside(variables['params'], adapters)
    with nn.intercept_methods(interceptor):
      result = model.apply({**variables, 'params': params}, *args, **kwargs)
    if unused := sorted(factors.keys() - used):
      raise ValueError(
        f'no layer that ran can use the adapter of {unused[0]}: known are the '
        'layers that low_rank_layer lists. Register this one there, leave it '
        'out of the rules, or use lora_apply, which serves all.'
      )
    return result

  return apply


def _beside(params, adapters):
  """Puts the factors of each matrix beside it."""
  result = dict(params)
  for name, below in adapters.items():
    if isinstance(params[name], Mapping):
      result[name] = _beside(params[name], below)
    else:
      result[name + _BESIDE] = below
  return result


def _intercept(scale, rate, used, next_fun, args, kwargs, context):
  output = next_fun(*args, **kwargs)
  module = context.module
  if context.method_name not in ('__call__', 'attend') or module.scope is None:
    return output
  layer = low_rank_layer(module)
  if layer is None:
    return output
  name, change = layer
  factors = module.get_variable('params', name + _BESIDE)
  if factors is None:
    return output
  used.add('/'.join((*module.path, name)))
  # Sorted by name: lora_in_... comes before lora_out_....
  (_, lora_in), (_, lora_out) = sorted(factors.items())

  def drop(x):
    if not rate:
      return x
    key = module.make_rng('dropout')
    is_kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(is_kept, x / (1 - rate), 0).astype(x.dtype)

  call = context.method_name, args, kwargs, output
  return change(Call(*call, lora_in, lora_out, scale, drop))


def _projected(call, dtype, axes=(-1,), batch_axes=()):
  """Returns `s (x A) B`; A sums over axes of x, and is stacked along others."""
  x = call.inputs.astype(dtype)
  # In the order of x, whatever the order they are given in: so does Flax.
  axes, batch = (
    sorted(a % x.ndim for a in some) for some in (axes, batch_axes)
  )
  stacked = list(range(len(batch)))
  in_axes = [len(batch) + i for i in range(len(axes))]
  dims = (axes, in_axes), (batch, stacked)
  low = jax.lax.dot_general(call.drop(x), call.lora_in.astype(dtype), dims)
  dims = ([low.ndim - 1], [len(batch)]), (stacked, stacked)
  lora_out = (call.scale * call.lora_out).astype(dtype)
  return jax.lax.dot_general(low, lora_out, dims)


@low_rank_layer.register
def _linear(module: Linear):
  inputs = len(module.letters) - len(module.features)

  def change(call):
    dtype = call.inputs.dtype
    return call.output + _projected(call, dtype, range(-inputs, 0))

  return f'w_{module.letters}', change


@low_rank_layer.register
def _head(module: Head):
  del module

  def change(call):
    changed = _projected(call, call.inputs.dtype)
    return call.output + changed.astype(call.output.dtype)

  return 'w_DV', change


@low_rank_layer.register
def _embed(module: Embed):
  factor = lambda width: math.sqrt(width) if module.scale_by_width else 1

  def change(call):
    x_BLD, table_VD = call.output
    rows_BLD = _rows(call) * factor(table_VD.shape[1])
    # A head that shares the table needs the whole of it; no other computes it.
    whole_VD = call.scale * call.lora_in @ call.lora_out
    table_VD = (table_VD + whole_VD).astype(table_VD.dtype)
    return x_BLD + rows_BLD.astype(x_BLD.dtype), table_VD

  return 'table_VD', change


@low_rank_layer.register
def _flax_embed(module: nn.Embed):
  del module

  def change(call):
    y = call.output
    if call.method == '__call__':
      return y + _rows(call).astype(y.dtype)
    low = call.inputs.astype(y.dtype) @ call.lora_out.T.astype(y.dtype)
    return y + low @ (call.scale * call.lora_in.T).astype(y.dtype)

  return 'embedding', change


def _rows(call):
  rows = call.lora_in.at[call.inputs].get(mode='fill', fill_value=0)
  return call.scale * rows @ call.lora_out


@low_rank_layer.register
def _dense(module: nn.Dense):
  del module
  return 'kernel', lambda call: call.output + _projected(
    call, call.output.dtype
  )


@low_rank_layer.register
def _dense_general(module: nn.DenseGeneral):
  axes, batch = (
    (a,) if isinstance(a, int) else tuple(a)
    for a in (module.axis, module.batch_dims)
  )
  return 'kernel', lambda call: call.output + _projected(
    call, call.output.dtype, axes, batch
  )


@low_rank_layer.register
def _einsum(module: nn.Einsum):
  def change(call):
    given = *call.args[1:], call.kwargs.get('einsum_str'), module.einsum_str
    equation = next(filter(None, given)).replace(' ', '')
    x, kernel, out = equation.replace('->', ',').split(',')
    rank = next(c for c in 'rstuvwxyz' if c not in equation)
    inputs = ''.join(c for c in kernel if c in x and c not in out)
    stacked = ''.join(c for c in kernel if c in x and c in out)
    outputs = ''.join(c for c in kernel if c not in x)
    low = ''.join(c for c in x if c not in inputs) + rank
    dtype = call.output.dtype
    low_value = jnp.einsum(
      f'{x},{stacked}{inputs}{rank}->{low}',
      call.drop(call.inputs.astype(dtype)),
      call.lora_in.astype(dtype),
    )
    return call.output + jnp.einsum(
      f'{low},{stacked}{rank}{outputs}->{out}',
      low_value,
      (call.scale * call.lora_out).astype(dtype),
    )

  return 'kernel', change


@low_rank_layer.register
def _conv(module: nn.Conv):
  if module.feature_group_count != 1 or module.mask is not None:
    return None

  def change(call):
    rank = call.lora_in.shape[-1]
    window = module.clone(features=rank, use_bias=False, parent=None)
    low = window.apply(
      {'params': {'kernel': call.lora_in}}, call.drop(call.inputs)
    )
    lora_out = (call.scale * call.lora_out).astype(low.dtype)
    return call.output + (low @ lora_out).astype(call.output.dtype)

  return 'kernel', change


class LoRA(nn.Module):
  """A model whose parameters stand still while adapters of low rank learn.

  The collection `params` holds the adapters and nothing else, so gradients,
  moments and the decay of weights are theirs. The parameters of the model lie in
  the collection `frozen`, which the trainer saves once per run. In every other
  way it is the model:

  ```python
  model = LoRA(base.experiment.model, LowRank(rules=('mixer/(query|value)',)))
  Experiment(model, data, start=FromRun('runs/base'), optimizer=LoRAPlus())
  ```

  Source: Hu et al., "LoRA", 2021, arXiv 2106.09685, section 4.

  Attributes:
    model: any model. If it takes `deterministic`, that also switches the dropout
      of the adapters; otherwise they have none.
    low_rank: which of its matrices change, and how.
  """

  model: nn.Module
  low_rank: LowRank

  @property
  def vocab_size(self) -> int | None:
    """That of the model, None if it has none."""
    return getattr(self.model, 'vocab_size', None)

  @nn.compact
  def __call__(self, *args, **kwargs):
    """Calls the model."""
    if self.is_initializing():
      return self._begin(args, kwargs)
    held = dict(self.variables)
    adapters, frozen = held.pop('params'), held.pop('frozen', None)
    if frozen is None:
      raise ValueError(
        "LoRA needs the model's parameters in the collection 'frozen', got "
        f'{sorted(self.variables)}; make the variables by LoRA.init or adopt.'
      )
    names = {*held, *COLLECTIONS, 'intermediates'} - {'params'}
    mutable = [name for name in names if self.is_mutable_collection(name)]
    noise = {n: self.make_rng(n) for n in self.scope.rngs if n != 'params'}
    apply = factored_apply(
      self._model(),
      self.low_rank,
      deterministic=kwargs.get('deterministic', True),
    )
    result, changed = apply(
      {'params': frozen, **held},
      adapters,
      *args,
      rngs=noise,
      mutable=mutable,
      **kwargs,
    )
    self._put(changed)
    return result

  def initial_state(self, *args, **kwargs):
    """Returns the state of the model."""
    return self.model.initial_state(*args, **kwargs)

  def adopt(
    self, variables: Mapping[str, Any], base: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Returns variables that begin at those of a trained model.

    Args:
      variables: of this module.
      base: of the model; at first the result computes what they do.
    """
    frozen = base['params']
    if self.low_rank.start == 'symmetric':
      frozen = lora_unmerge(frozen, variables['params'], self.low_rank)
    return {
      **variables,
      **base,
      'params': variables['params'],
      'frozen': frozen,
    }

  def merge(self, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns variables of the model alone, the changes added to its matrices.

    Args:
      variables: of this module.
    """
    own = dict(variables)
    adapters, frozen = own.pop('params'), own.pop('frozen')
    return {**own, 'params': lora_merge(frozen, adapters, self.low_rank)}

  def _model(self):
    return self.model.clone(parent=None)

  def _begin(self, args, kwargs):
    rngs = {name: self.make_rng(name) for name in self.scope.rngs}
    result, base = self._model().init_with_output(rngs, *args, **kwargs)
    key = self.make_rng('params')
    adapters = lora_init(key, base['params'], self.low_rank)
    self._put(self.adopt({'params': adapters}, base))
    return result

  def _put(self, variables):
    for collection, tree in variables.items():
      for name, value in tree.items():
        self.put_variable(collection, name, value)
