"""Low-rank changes of trained matrices, for any tree of parameters.

`W = W0 + s A B`: what is learned is A, `lora_in`, on the side of the input, and B,
`lora_out`, on the side of the output, both of rank R. Papers that multiply
columns write `W0 + B A` with transposed factors; A and B are the same sides.

```python
low_rank = LowRank(rules=('mixer/(query|value)',), rank=8, alpha=16)
adapters = lora_init(key, params, low_rank)
loss = lambda adapters: loss_fn(lora_merge(params, adapters, low_rank), batch)
gradient = jax.grad(loss)(adapters)  # None for params, and no moments either
```

Adapters are a tree of the same paths, with two leaves where a matrix was. Their
names end in letters like all parameters, `lora_in_DR` and `lora_out_RHK` beside
`w_DHK`, so the same table says how they are split among devices.

Merging computes whole matrices; to train without them, see `jaxformers.nn.LoRA`.
"""

from collections.abc import Callable, Mapping
import dataclasses
import difflib
import math
import re
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

Start = Literal['uniform', 'gaussian', 'he_uniform', 'output', 'symmetric']


@dataclasses.dataclass(frozen=True)
class LowRank:
  """Which matrices change, by how large a rank, and how that begins.

  A rule is a regular expression that is searched in paths (`stack/layer_0/mixer/
  query/w_DHK`). What is no matrix is passed over. Which axes of a matrix are its
  inputs follows from the letters of its name: the model width D alone on one
  side, all else on the other; a leading X counts experts, and further axes in
  front count layers. A `kernel` or `embedding` of two axes maps the first to the
  second. Other matrices need a rule with a layout, such as `('out/kernel',
  'iio')`: per axis `i` for input, `o` for output, `s` for axes along which
  matrices are stacked. A convolution of an image is `'iiio'`.

  Starts, for n inputs, of `lora_in` and `lora_out`:

  - `'uniform'`: uniform within 1 / sqrt(n), and 0 (the authors' code; peft);
  - `'gaussian'`: normal with deviation 1 / R, and 0;
  - `'he_uniform'`: uniform within sqrt(6 / n), and 0 (Flax NNX, qwix);
  - `'output'`: 0, and normal with variance 1 / R;
  - `'symmetric'`: normal with variances 1 / n and 1 / R. Then `s A B` is not 0:
    take it from the matrices by `lora_unmerge`, as `jaxformers.nn.LoRA` does.

  Embeddings begin with 0 and normal numbers of variance 1, but for the last: 1
  and 1 / R, as each row is an input of its own.

  Source: Hu et al., "LoRA", 2021, arXiv 2106.09685, equation 3; rank-stabilised:
  Kalajdzievski, 2023, arXiv 2312.03732; symmetric start: Su Jianlin, 2023,
  kexue.fm/archives/9590; defaults: github.com/huggingface/peft.

  Attributes:
    rules: regular expressions, or pairs of one and a layout; the first that is
      found in a path decides.
    rank: R.
    alpha: `s = alpha / R`.
    rank_stabilized: whether `s = alpha / sqrt(R)` instead.
    start: how the factors begin.
    dropout: probability of dropping a number of the input before `lora_in`; the
      matrix itself gets the whole input. Acts in `jaxformers.nn.LoRA` only.
  """

  rules: tuple[str | tuple[str, str], ...]
  rank: int = 8
  alpha: float = 8.0
  rank_stabilized: bool = False
  start: Start = 'uniform'
  dropout: float = 0.0

  def __post_init__(self):
    if self.rank < 1:
      raise ValueError(f'rank must be at least 1, got {self.rank}.')
    if self.start not in get_args(Start):
      raise ValueError(
        f'start must be one of {get_args(Start)}, got {self.start!r}.'
      )
    if not 0 <= self.dropout < 1:
      raise ValueError(f'dropout must lie in [0, 1), got {self.dropout}.')
    if isinstance(self.rules, str) or not self.rules:
      raise ValueError(
        f"rules must be a tuple such as ('mixer/query',), got {self.rules!r}."
      )
    for _, layout in map(_rule, self.rules):
      if layout is not None and not re.fullmatch('[sio]*', layout):
        raise ValueError(f"a layout consists of 's', 'i', 'o'; got {layout!r}.")

  @property
  def scale(self) -> float:
    """The factor s."""
    rank = math.sqrt(self.rank) if self.rank_stabilized else self.rank
    return self.alpha / rank


class Factors(NamedTuple):
  """The two factors of a low-rank change.

  Source: Hu et al., "LoRA", 2021, arXiv 2106.09685, section 4.1.

  Attributes:
    lora_in: `[stacked..., inputs..., R]`.
    lora_out: `[stacked..., R, outputs...]`.
  """

  lora_in: Float[Array, '...']
  lora_out: Float[Array, '...']


def lora_init(key: Array, params: Any, low_rank: LowRank) -> Any:
  """Returns the first adapters, one pair for each matrix that a rule finds.

  Together they hold `R (n_in + n_out)` numbers per matrix, at least float32.

  Source: Hu et al., "LoRA", 2021, arXiv 2106.09685, section 4.1.

  Args:
    key: decides random factors.
    params: tree of parameters, or of anything with shapes and dtypes.
    low_rank: which matrices, and how they begin.

  Returns:
    Nested dictionaries: `{'query': {'w_DHK': {'lora_in_DR': ...,
    'lora_out_RHK': ...}}}`.

  Raises:
    ValueError: if a rule finds no matrix, or one whose layout is not known.
  """
  adapters: dict[str, Any] = {}
  leaves = _by_path(params)
  for number, (path, layout) in enumerate(_layouts(leaves, low_rank).items()):
    *parents, name = path.split('/')
    place = adapters
    for parent in parents:
      place = place.setdefault(parent, {})
    own = jax.random.fold_in(key, number)
    factors = _first(own, leaves[path], layout, low_rank, _is_table(name))
    place[name] = dict(zip(_names(name, layout), factors, strict=True))
  return adapters


def lora_merge(params: Any, adapters: Any, low_rank: LowRank) -> Any:
  """Adds the changes to their matrices: `W0 + s A B`.

  In at least float32, then rounded to the dtype of the matrix.

  Source: Hu et al., "LoRA", 2021, arXiv 2106.09685, equation 3.

  Args:
    params: tree of parameters.
    adapters: what `lora_init` returned, or what became of it.
    low_rank: as for `lora_init`.

  Raises:
    ValueError: if the adapters are not those of the parameters.
  """
  return _add(params, adapters, low_rank, low_rank.scale)


def lora_unmerge(params: Any, adapters: Any, low_rank: LowRank) -> Any:
  """Takes the changes out of merged matrices: `W - s A B`.

  Exact to rounding, which in bfloat16 is coarse: better keep the matrices from
  before the merge than rely on this.

  Source: Hu et al., "LoRA", 2021, arXiv 2106.09685, section 4.1.

  Args:
    params: what `lora_merge` returned.
    adapters: those that were merged.
    low_rank: as for `lora_merge`.

  Raises:
    ValueError: if the adapters are not those of the parameters.
  """
  return _add(params, adapters, low_rank, -low_rank.scale)


def lora_apply(
  apply_fn: Callable[..., Any], low_rank: LowRank
) -> Callable[..., Any]:
  """Makes a function of parameters one of parameters and adapters.

  It merges on every call, so it serves any model unchanged; differentiate it in
  the adapters. Each gradient of a whole matrix is computed on the way, which
  takes twice the arithmetic of the factored form, see `jaxformers.nn.LoRA`.

  Source: Hu et al., "LoRA", 2021, arXiv 2106.09685, equation 3.

  Args:
    apply_fn: `(params, *args, **kwargs) -> anything`.
    low_rank: as for `lora_init`.

  Returns:
    `(params, adapters, *args, **kwargs) -> anything`.
  """

  def apply(params, adapters, *args, **kwargs):
    merged = lora_merge(params, adapters, low_rank)
    return apply_fn(merged, *args, **kwargs)

  return apply


def lora_factors(
  params: Any, adapters: Any, low_rank: LowRank
) -> dict[str, Factors]:
  """Returns the factors by the path of their matrix, after checking them.

  Source: none; a property of this library.

  Args:
    params: tree of parameters.
    adapters: those that belong to it.
    low_rank: as for `lora_init`.

  Raises:
    ValueError: if the adapters are not those of the parameters.
  """
  leaves = _by_path(params)
  layouts = _layouts(leaves, low_rank)
  found: dict[str, dict[str, Array]] = {}
  for path, leaf in _by_path(adapters).items():
    parent, _, name = path.rpartition('/')
    if parent not in layouts:
      raise ValueError(
        f'there is no matrix {parent!r} for the adapter {path!r}; '
        f'{_nearest(parent, layouts)}'
      )
    found.setdefault(parent, {})[name] = leaf
  for path, layout in layouts.items():
    names = _names(path.split('/')[-1], layout)
    given = {name: leaf.shape for name, leaf in found.get(path, {}).items()}
    shapes = _shapes(leaves[path].shape, layout, low_rank.rank)
    if given != dict(zip(names, shapes, strict=True)):
      raise ValueError(
        f'the adapter of {path} must have {names[0]} of shape {shapes[0]} and '
        f'{names[1]} of shape {shapes[1]}, got {given or "none"}; make it by '
        'lora_init with the same rules and rank.'
      )
    found[path] = Factors(*(found[path][name] for name in names))
  return found


def _add(params, adapters, low_rank, scale):
  factors = lora_factors(params, adapters, low_rank)
  layouts = _layouts(_by_path(params), low_rank)

  def change(path, w):
    name = _name(path)
    if name not in factors:
      return w
    dtype = jnp.promote_types(w.dtype, jnp.float32)
    change = _product(*factors[name], layouts[name])
    return (w.astype(dtype) + scale * change.astype(dtype)).astype(w.dtype)

  return jax.tree_util.tree_map_with_path(change, params)


def _product(lora_in, lora_out, layout):
  """Returns A B, with its axes in the order of the layout."""
  letters = [chr(ord('a') + i) for i in range(len(layout))]
  stacked, inputs, outputs = (
    ''.join(a for a, kind in zip(letters, layout, strict=True) if kind == which)
    for which in 'sio'
  )
  equation = f'{stacked}{inputs}R,{stacked}R{outputs}->{"".join(letters)}'
  return jnp.einsum(equation, lora_in, lora_out, precision='highest')


def _shapes(shape, layout, rank):
  """Returns the shapes of both factors."""
  stacked, inputs, outputs = (
    tuple(n for n, kind in zip(shape, layout, strict=True) if kind == which)
    for which in 'sio'
  )
  return (*stacked, *inputs, rank), (*stacked, rank, *outputs)


def _names(name, layout):
  """Returns the names of both factors, ending in the letters of their axes."""
  letters = _letters(name)
  if not letters:
    return 'lora_in', 'lora_out'
  kinds = layout[len(layout) - len(letters) :]
  stacked, inputs, outputs = (
    ''.join(a for a, kind in zip(letters, kinds, strict=True) if kind == which)
    for which in 'sio'
  )
  rank = 'N' if 'R' in letters else 'R'
  return (
    f'lora_in_{stacked}{inputs}{rank}',
    f'lora_out_{stacked}{rank}{outputs}',
  )


def _first(key, leaf, layout, low_rank, is_table):
  """Returns the factors that training begins with."""
  in_shape, out_shape = _shapes(leaf.shape, layout, low_rank.rank)
  dtype = jnp.promote_types(leaf.dtype, jnp.float32)
  in_key, out_key = jax.random.split(key)
  inputs = math.prod(
    n for n, kind in zip(leaf.shape, layout, strict=True) if kind == 'i'
  )
  rank, start = low_rank.rank, low_rank.start

  def normal(key, shape, variance):
    return math.sqrt(variance) * jax.random.normal(key, shape, dtype)

  def uniform(limit):
    return jax.random.uniform(in_key, in_shape, dtype, -limit, limit)

  if start == 'symmetric':
    variance = 1 if is_table else 1 / inputs
    return normal(in_key, in_shape, variance), normal(
      out_key, out_shape, 1 / rank
    )
  if is_table or start == 'output':
    variance = 1 if is_table else 1 / rank
    return jnp.zeros(in_shape, dtype), normal(out_key, out_shape, variance)
  lora_in = {
    'uniform': lambda: uniform(1 / math.sqrt(inputs)),
    'he_uniform': lambda: uniform(math.sqrt(6 / inputs)),
    'gaussian': lambda: normal(in_key, in_shape, 1 / rank**2),
  }[start]()
  return lora_in, jnp.zeros(out_shape, dtype)


def _layouts(leaves: Mapping[str, Any], low_rank: LowRank) -> dict[str, str]:
  """Returns the layout of each matrix that a rule finds, by path."""
  layouts = {}
  for path, leaf in leaves.items():
    for pattern, layout in map(_rule, low_rank.rules):
      if re.search(pattern, path):
        found = _layout(path, leaf.ndim, layout)
        if found is not None:
          layouts[path] = found
        break
  for pattern, _ in map(_rule, low_rank.rules):
    if not any(re.search(pattern, path) for path in layouts):
      raise ValueError(
        f'the rule {pattern!r} finds no matrix; {_nearest(pattern, leaves)}'
      )
  return layouts


def _rule(rule):
  return (rule, None) if isinstance(rule, str) else rule


def _layout(path, ndim, layout):
  """Returns the layout of an array, None if it is no matrix."""
  name = path.split('/')[-1]
  letters = _letters(name)
  if layout is not None:
    if len(layout) != ndim or not {'i', 'o'} <= set(layout):
      raise ValueError(
        f'{path} has {ndim} axes, which the layout {layout!r} does not '
        "describe: it needs one of 's', 'i', 'o' for each, and an 'i' and an "
        "'o'."
      )
    return layout
  if letters:
    own = _layout_of_letters(letters)
    if own is None and len(letters) < 2:
      return None
    if own is not None and ndim >= len(letters):
      return 's' * (ndim - len(letters)) + own
  elif ndim < 2 or name in ('bias', 'scale'):
    return None
  elif ndim == 2 and name in ('kernel', 'embedding'):
    return 'io'
  raise ValueError(
    f'{path} has {ndim} axes, and its name does not say which are inputs; give '
    f"a rule with a layout, such as ({path!r}, '{'i' * (ndim - 1)}o'), or a "
    'narrower one that does not find it.'
  )


def _layout_of_letters(letters):
  if letters[0] == 'X' and len(letters) > 2:
    own = _layout_of_letters(letters[1:])
    return own and 's' + own
  rest = len(letters) - 1
  if not rest:
    return None
  if letters[0] == 'D':
    return 'i' + rest * 'o'
  if letters[-1] == 'D':
    return rest * 'i' + 'o'
  return 'io' if rest == 1 else None


def _letters(name):
  match = re.search(r'_([A-Z]+)$', name)
  return match[1] if match else ''


def _is_table(name):
  """Whether the inputs of a matrix are ids."""
  return name == 'embedding' or name.startswith('table_')


def _by_path(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {_name(path): leaf for path, leaf in leaves}


def _name(path):
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _nearest(path, known):
  near = difflib.get_close_matches(path, list(known), 3, 0)
  return f'the nearest are {", ".join(near) or "none"}.'
