"""Depth: how one declared block becomes many layers."""

import difflib
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

COLLECTIONS = (
  'params',
  'statistics',
  'losses',
  'diagnostics',
  'decays',
  'prepared',
)


class Stack(nn.Module):
  """Runs `depth` layers made from one block, or from a tuple that repeats.

  Scanned, the layers' parameters lie stacked in one array each and XLA compiles
  one layer whatever the depth; unrolled, every layer has its own. Both compute
  the same; `unroll` and `stack` convert the parameters.

  Attributes:
    block: the layer, or a tuple of layers: `(a, b)` at depth 4 gives a b a b.
    depth: number of layers, a multiple of the length of the tuple.
    scan: whether layers are scanned rather than unrolled.
    remat: what the backward pass keeps of each group of layers: None keeps all;
      `'nothing_saveable'` keeps inputs only and computes the rest again; other
      names are those of `jax.checkpoint_policies`.
  """

  block: nn.Module | tuple[nn.Module, ...]
  depth: int
  scan: bool = True
  remat: str | None = None

  @nn.compact
  def __call__(
    self, x_BLD, states=None, *, segments_BL=None, deterministic=True
  ):
    """Returns the output, and the states stacked by layer (None without).

    Args:
      x_BLD: `[B, L, D]`.
      states: a tuple with one entry per block of the pattern, each stacked
        along a new first axis by repetition; what `initial_state` gives.
      segments_BL: packing ids.
      deterministic: False where dropout shall act.
    """
    pattern = self._pattern()
    repeats = self._repeats()
    if states is None:
      states = (None,) * len(pattern)

    def group(stack, x_BLD, states, index):
      del stack  # The scope is what counts; names tell layouts apart.
      new_states = []
      for i, (block, state) in enumerate(zip(pattern, states, strict=True)):
        name = (
          f'scanned_{i}' if self.scan else f'layer_{index * len(pattern) + i}'
        )
        x_BLD, state = block.copy(name=name)(
          x_BLD, state, segments_BL=segments_BL, deterministic=deterministic
        )
        new_states.append(state)
      return x_BLD, tuple(new_states)

    if self.scan:
      return self._scanned(group, x_BLD, states)
    return self._unrolled(group, x_BLD, states, repeats)

  def _scanned(self, group, x_BLD, states):
    run = nn.scan(
      lambda stack, x_BLD, states: self._remat(group)(stack, x_BLD, states, 0),
      variable_axes=dict.fromkeys(COLLECTIONS, 0),
      split_rngs={'params': True, 'dropout': True},
      length=self._repeats(),
    )
    return run(self, x_BLD, states)

  def _unrolled(self, group, x_BLD, states, repeats):
    group = self._remat(group)
    outputs = []
    for index in range(repeats):
      own = jax.tree.map(lambda leaf, i=index: leaf[i], states)
      x_BLD, own = group(self, x_BLD, own, index)
      outputs.append(own)
    return x_BLD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

  def _remat(self, group):
    if self.remat is None:
      return group
    policies = vars(jax.checkpoint_policies)
    if self.remat not in policies:
      near = difflib.get_close_matches(self.remat, policies, 1, 0)
      raise ValueError(
        f'unknown remat policy {self.remat!r}; did you mean {near[0]!r}? '
        'Known are None and the names in jax.checkpoint_policies.'
      )
    # Inside a scan nothing can be merged across layers, so the barrier that
    # prevents it would only cost time.
    return nn.remat(
      group,
      policy=policies[self.remat],
      prevent_cse=not self.scan,
      static_argnums=(3,),
    )

  def initial_state(self, batch_size, max_length, width, dtype):
    def stacked(block):
      state = block.initial_state(batch_size, max_length, width, dtype)
      repeat = self._repeats()
      return jax.tree.map(lambda a: jnp.repeat(a[None], repeat, axis=0), state)

    return tuple(stacked(block) for block in self._pattern())

  def _pattern(self) -> tuple[nn.Module, ...]:
    return self.block if isinstance(self.block, tuple) else (self.block,)

  def _repeats(self) -> int:
    size = len(self._pattern())
    if self.depth < 1 or size < 1 or self.depth % size:
      raise ValueError(
        f'depth {self.depth} is not a positive multiple of the {size} blocks '
        'that repeat.'
      )
    return self.depth // size


def unroll(params: dict[str, Any]) -> dict[str, Any]:
  """Converts parameters of a scanned `Stack` to those of an unrolled one.

  Args:
    params: `{'scanned_0': ..., 'scanned_1': ...}` with leaves stacked by
      repetition, as under the name of a `Stack(scan=True)`.

  Returns:
    `{'layer_0': ..., 'layer_1': ..., ...}`.
  """
  names = sorted(params, key=_number)
  if not names or any(not re.fullmatch(r'scanned_\d+', name) for name in names):
    raise ValueError(
      f"expected the names 'scanned_0', 'scanned_1', ..., got {sorted(params)}; "
      'pass the parameters of a Stack with scan=True, not of its parent.'
    )
  repeats = jax.tree.leaves(params)[0].shape[0]
  return {
    f'layer_{index * len(names) + i}': jax.tree.map(
      lambda leaf, n=index: leaf[n], params[name]
    )
    for index in range(repeats)
    for i, name in enumerate(names)
  }


def stack(params: dict[str, Any], pattern: int = 1) -> dict[str, Any]:
  """Converts parameters of an unrolled `Stack` to those of a scanned one.

  Args:
    params: `{'layer_0': ..., 'layer_1': ..., ...}`.
    pattern: number of blocks that repeat.

  Returns:
    `{'scanned_0': ..., ...}` with leaves stacked by repetition.
  """
  names = sorted(params, key=_number)
  if names != [f'layer_{i}' for i in range(len(names))] or not names:
    raise ValueError(
      f"expected the names 'layer_0', 'layer_1', ..., got {sorted(params)}; "
      'pass the parameters of a Stack with scan=False, not of its parent.'
    )
  if len(names) % pattern:
    raise ValueError(f'{len(names)} layers do not repeat {pattern} blocks.')
  return {
    f'scanned_{i}': jax.tree.map(
      lambda *leaves: jnp.stack(leaves),
      *(params[name] for name in names[i::pattern]),
    )
    for i in range(pattern)
  }


def _number(name):
  return int(re.sub(r'\D', '', name) or -1)
