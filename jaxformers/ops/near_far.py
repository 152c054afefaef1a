"""ReRoPE as two ordinary attentions, to near and to far keys, merged.

`attend(position=ReRoPE(w))` computes two scores for a pair of query and key and
selects one. Here the keys within the window and those beyond it are attended to
apart, each with plain products, and the parts are merged by their normalisers.
The result is the same to rounding, and so are its gradients, because the
merging differentiates the normalisers too. Any kernel that returns a normaliser
could compute the parts, and a decoding step rotates the keys of the window
alone, not the whole cache.
"""

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Int, Real

from jaxformers.ops.attention import BLOCK
from jaxformers.ops.attention import Implementation
from jaxformers.ops.attention import attend_partial
from jaxformers.ops.blockwise import Places
from jaxformers.ops.blockwise import count_visible
from jaxformers.ops.masks import Causal
from jaxformers.ops.masks import Lengths
from jaxformers.ops.masks import Mask
from jaxformers.ops.masks import Window
from jaxformers.ops.partial import Partial
from jaxformers.ops.partial import merge
from jaxformers.ops.rerope import LeakyReRoPE
from jaxformers.ops.rerope import ReRoPE
from jaxformers.ops.scales import ConstantScale
from jaxformers.ops.scales import InverseSqrt
from jaxformers.ops.scales import Scale
from jaxformers.ops.tile import Tile


def attend_near_and_far(
  query_BLHK: Float[Array, 'B L H K'],
  key_BMGK: Float[Array, 'B M G K'],
  value_BMGV: Float[Array, 'B M G V'],
  *,
  position: ReRoPE | LeakyReRoPE,
  mask: Mask = Causal(),
  scale: Scale = InverseSqrt(),
  query_position: Real[Array, '... L'] | None = None,
  key_position: Real[Array, '... M'] | None = None,
  implementation: Implementation = 'auto',
  block: int | None = None,
) -> Float[Array, 'B L H V']:
  """Attends as `attend` does with the same arguments, in two parts.

  Near: plain rotations under `Window(w)`. Far: the rotations beyond the window,
  under `Causal(-w)`. Where no positions are given, the queries before w have no
  far part, and the last w keys are in none; the rest is causal attention again.

  Source: Su Jianlin, "ReRoPE: infinite extrapolation?", 2023,
  https://kexue.fm/archives/9708; merging: Milakov and Gimelshein, "Online
  normalizer calculation for softmax", 2018, arXiv 1805.02867, equation 4.

  Args:
    query_BLHK: as for `attend`.
    key_BMGK: raw keys.
    value_BMGV: as for `attend`.
    position: the scheme.
    mask: who sees whom; must be causal.
    scale: as for `attend`; it counts the keys of both parts.
    query_position: as for `attend`.
    key_position: as for `attend`.
    implementation: as for `attend`, of each part.
    block: as for `attend`.

  Returns:
    As `attend`.

  Raises:
    ValueError: as `attend`, or if the mask is not causal.
  """
  if not mask.causal:
    raise ValueError(
      f'attend_near_and_far needs a causal mask, got {mask}; use attend with '
      'position=ReRoPE(..., bidirectional=True) for keys on both sides.'
    )
  length, keys = query_BLHK.shape[1], key_BMGK.shape[1]
  # Then what is near in position is near in place, too.
  is_plain = query_position is None and key_position is None
  places = _places(mask, query_position, key_position, (length, keys))
  multiplier = scale.multiplier(
    lambda: count_visible(places, length, keys, block or BLOCK),
    query_BLHK.shape[-1],
  )

  def part(scheme, region, skipped):
    rows, older = slice(skipped, None), slice(0, keys - skipped)
    _, query_position, key_position = places
    cut = mask.block(
      Tile(None, (skipped, length - skipped), (0, keys - skipped))
    )
    return attend_partial(
      query_BLHK[:, rows],
      key_BMGK[:, older],
      value_BMGV[:, older],
      position=scheme,
      scale=ConstantScale(_of_rows(multiplier, rows)),
      mask=cut & region,
      query_position=query_position[:, rows],
      key_position=key_position[:, older],
      implementation=implementation,
      block=block,
    )

  window = position.window
  skipped = window if is_plain else 0
  out = None
  if window:
    out = part(position.near(), Window(window), 0)
  if skipped < length:
    far = part(position.far(), Causal(-window), skipped)
    out = far if out is None else _merge_last(out, far)
  return out.out.astype(value_BMGV.dtype)


def decode_near_and_far(
  query_BLHK: Float[Array, 'B L H K'],
  key_BMGK: Float[Array, 'B M G K'],
  value_BMGV: Float[Array, 'B M G V'],
  length_B: Int[Array, ' B'],
  *,
  position: ReRoPE | LeakyReRoPE,
  scale: Scale = InverseSqrt(),
) -> Float[Array, 'B L H V']:
  """Attends from the newest tokens to a cache, rotating few of its keys.

  The cache holds far keys: `position.far().store(key, place)`, which for
  `ReRoPE` are the raw ones. The far part reads them as they are. The near part
  turns the newest w + L - 1 of them the rest of their way, since rotations add
  up. So a step costs what it does with `Rotary`, and one cache is enough.

  Source: Su Jianlin, "ReRoPE: infinite extrapolation?", 2023,
  https://kexue.fm/archives/9708; that one cache is enough is ours.

  Args:
    query_BLHK: raw queries of the last L tokens.
    key_BMGK: far keys of the tokens at positions 0, 1, ... in M slots.
    value_BMGV: their values.
    length_B: how many slots of each row are in use, the L new ones included.
      The others may hold anything.
    position: the scheme.
    scale: as for `attend`.

  Returns:
    What `attend` gives for these tokens under a causal mask.

  Raises:
    ValueError: as `attend`.
  """
  (length, width), slots = query_BLHK.shape[1::2], key_BMGK.shape[1]
  query_BL = length_B[:, None] - length + jnp.arange(length)
  visible_keys = lambda: query_BL[:, None] + 1
  used = Lengths(length_B)
  options = {
    'scale': ConstantScale(scale.multiplier(visible_keys, width)),
    'query_position': query_BL,
    'keys_stored': True,
  }
  far = attend_partial(
    query_BLHK,
    key_BMGK,
    value_BMGV,
    position=position.far(),
    mask=used & Causal(-position.window),
    key_position=jnp.arange(slots),
    **options,
  )
  if not position.window:
    return far.out.astype(value_BMGV.dtype)
  newest = min(position.window + length - 1, slots)
  first_B = jnp.maximum(length_B - newest, 0)
  cut = jax.vmap(
    lambda x, first: jax.lax.dynamic_slice_in_dim(x, first, newest)
  )
  near_BM = first_B[:, None] + jnp.arange(newest)
  rest_BM = near_BM * (1 - position.step)
  near = attend_partial(
    query_BLHK,
    position.near().store(cut(key_BMGK, first_B), rest_BM),
    cut(value_BMGV, first_B),
    position=position.near(),
    mask=used & Window(position.window),
    key_position=near_BM,
    **options,
  )
  return merge([near, far]).out.astype(value_BMGV.dtype)


def _places(mask, query_position, key_position, lengths):
  if query_position is None and lengths[0] != lengths[1]:
    raise ValueError(
      f'{lengths[0]} queries against {lengths[1]} keys: pass query_position, '
      'because only you know whether the queries are the first or the last '
      'tokens.'
    )
  given = query_position, key_position
  return Places(
    mask,
    *(
      jnp.atleast_2d(jnp.arange(length) if place is None else place)
      for place, length in zip(given, lengths, strict=True)
    ),
  )


def _of_rows(multiplier, rows):
  """Takes the rows of a multiplier `[B, H, L]`, if it has any."""
  if jnp.ndim(multiplier) and multiplier.shape[-1] > 1:
    return multiplier[..., rows]
  return multiplier


def _merge_last(near: Partial, far: Partial) -> Partial:
  """Merges the far part of the last rows into them."""
  early = near.denominator.shape[1] - far.denominator.shape[1]
  head = jax.tree.map(lambda x: x[:, :early], near)
  tail = merge([jax.tree.map(lambda x: x[:, early:], near), far])
  return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), head, tail)
