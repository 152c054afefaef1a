"""Causal convolutions over a few tokens."""

from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from jaxformers.ops.recurrence.devices import entering
from jaxformers.ops.recurrence.devices import last_of_all
from jaxformers.ops.segments import Places


class ShortConvolved(NamedTuple):
  """What a short convolution returns.

  Attributes:
    out_BLD: one vector per token, in the dtype of the input; finite at padding.
    buffer_BND: in at least float32, the last N = W - 1 tokens, the youngest at
      the end, as they were before the convolution.
  """

  out_BLD: Float[Array, 'B L D']
  buffer_BND: Float[Array, 'B N D']


def short_convolution(
  x_BLD: Float[Array, 'B L D'],
  weight_WD: Float[Array, 'W D'],
  bias_D: Float[Array, ' D'] | None = None,
  buffer_BND: Float[Array, 'B N D'] | None = None,
  *,
  places: Places | None = None,
  axis_name: str | None = None,
) -> ShortConvolved:
  """Mixes each token with the W - 1 tokens before it, channel by channel.

  `y_i = b + sum_j w_(W-1-j) x_(i-j)`: the last row of the weights is that of the
  token itself, as in PyTorch. Tokens see their own segment only. Padding may
  stand anywhere and hold anything: tokens around it are neighbours. One fused
  pass of W multiply-adds, in at least float32.

  Source: Gu and Dao, "Mamba", 2023, arXiv 2312.00752, section 3.4; as in the
  authors' code, https://github.com/Dao-AILab/causal-conv1d, but the buffer
  holds W - 1 tokens instead of W. Between devices: none, a halo exchange.

  Args:
    x_BLD: the tokens.
    weight_WD: one row per distance, the farthest first; W = 1 is a gain.
    bias_D: what is added; None for nothing.
    buffer_BND: what an earlier call returned; None for zeros.
    places: where the tokens stand, see `jaxformers.ops.segments`; None if all
      belong to one segment, which began where the buffer did.
    axis_name: of the mesh axis along which tokens are split, in equal,
      consecutive shares, within `jax.shard_map`; the buffer is the same on all
      devices. Each sends its last W - 1 tokens to the next, or with places to
      all. None if they are not split.

  Returns:
    Output, and the buffer for the next tokens.

  Raises:
    ValueError: if shapes do not fit.
  """
  buffer_BND = _checked_buffer(x_BLD, weight_WD, bias_D, buffer_BND)
  length, width = x_BLD.shape[1], weight_WD.shape[0]
  if axis_name is not None:
    buffer_BND = _arriving(axis_name, buffer_BND, x_BLD, weight_WD, places)
    out_BLD, buffer_BND = short_convolution(
      x_BLD, weight_WD, bias_D, buffer_BND, places=places
    )
    return ShortConvolved(out_BLD, last_of_all(axis_name, buffer_BND))
  if places is None:
    line_BMD = jnp.concatenate([buffer_BND, x_BLD], axis=1)
    out_BLD = _slide(line_BMD, weight_WD, bias_D)
    return ShortConvolved(out_BLD.astype(x_BLD.dtype), line_BMD[:, length:])
  is_token_BL = places.number_BL != 0
  order_BL, rank_BL = _tokens_first(is_token_BL)
  tokens_BLD = jnp.where(is_token_BL[..., None], x_BLD, 0)
  tokens_BLD = _pick(tokens_BLD, order_BL)
  line_BMD = jnp.concatenate([buffer_BND, tokens_BLD], axis=1)
  position_BL = _pick(places.position_BL, order_BL)
  out_BLD = _slide(line_BMD, weight_WD, bias_D, position_BL)
  last_BN = is_token_BL.sum(axis=1)[:, None] + jnp.arange(width - 1)
  return ShortConvolved(
    _pick(out_BLD.astype(x_BLD.dtype), rank_BL), _pick(line_BMD, last_BN)
  )


def _arriving(axis_name, buffer_BND, x_BLD, weight_WD, places):
  """Returns the tokens before the share of this device."""
  reach, length = buffer_BND.shape[1], x_BLD.shape[1]
  if reach == 0:
    return buffer_BND
  if places is None and reach <= length:
    # The device before has them all.
    devices = range(jax.lax.axis_size(axis_name))
    pairs = list(zip(devices[:-1], devices[1:], strict=True))
    sent_BND = jax.lax.ppermute(x_BLD[:, length - reach :], axis_name, pairs)
    is_first = jax.lax.axis_index(axis_name) == 0
    return jnp.where(is_first, buffer_BND, sent_BND.astype(buffer_BND.dtype))
  count_B1 = jnp.full((len(x_BLD), 1), length)
  if places is not None:
    count_B1 = jnp.sum(places.number_BL != 0, axis=1, keepdims=True)
  _, written_BND = short_convolution(x_BLD, weight_WD, places=places)

  def after(count_B1, written_BND, buffer_BND):
    """Moves the buffer on by as many tokens as are written at its end."""
    from_BN1 = (count_B1 + jnp.arange(reach))[..., None]
    moved_BND = jnp.take_along_axis(
      buffer_BND, jnp.minimum(from_BN1, reach - 1), axis=1
    )
    return jnp.where(from_BN1 < reach, moved_BND, written_BND)

  return entering(axis_name, count_B1, written_BND, buffer_BND, after=after)


def _slide(line_BMD, weight_WD, bias_D, position_BL=None):
  """Convolves a line of tokens of which the first W - 1 are the buffer."""
  width = weight_WD.shape[0]
  length = line_BMD.shape[1] - width + 1
  dtype = jnp.result_type(line_BMD, jnp.float32)
  out_BLD = jnp.zeros((), dtype) if bias_D is None else bias_D.astype(dtype)
  for tap, weight_D in enumerate(weight_WD.astype(dtype)):
    term_BLD = weight_D * line_BMD[:, tap : tap + length].astype(dtype)
    if position_BL is not None:
      # A token at position p has p tokens of its segment before it.
      sees_BL = position_BL >= width - 1 - tap
      term_BLD = jnp.where(sees_BL[..., None], term_BLD, 0)
    out_BLD += term_BLD
  return out_BLD


def _tokens_first(is_token_BL):
  """Returns the order that puts padding last, and the way back."""
  order_BL = jnp.argsort(~is_token_BL, axis=1, stable=True)
  count_B1 = is_token_BL.sum(axis=1, keepdims=True)
  token_BL = jnp.cumsum(is_token_BL, axis=1) - 1
  padding_BL = count_B1 + jnp.cumsum(~is_token_BL, axis=1) - 1
  return order_BL, jnp.where(is_token_BL, token_BL, padding_BL)


def _pick(x_BL, index_BN):
  """Returns, row by row, what stands at distinct places of `[B, L, ...]`."""
  return jax.vmap(
    lambda x_L, index_N: x_L.at[index_N].get(
      mode='promise_in_bounds', unique_indices=True
    )
  )(x_BL, index_BN)


def _checked_buffer(x_BLD, weight_WD, bias_D, buffer_BND):
  """Returns the buffer, zeros for None; raises unless the arrays fit."""
  if (
    x_BLD.ndim != 3
    or weight_WD.ndim != 2
    or 0
    in (
      x_BLD.shape[1],
      weight_WD.shape[0],
    )
  ):
    raise ValueError(
      'a short convolution needs an input [B, length, channels] and weights '
      '[taps, channels], at least one token and one tap: got '
      f'{list(x_BLD.shape)} and {list(weight_WD.shape)}.'
    )
  batch, _, channels = x_BLD.shape
  expected = {
    'weight': (weight_WD, (weight_WD.shape[0], channels)),
    'bias': (bias_D, (channels,)),
    'buffer': (buffer_BND, (batch, weight_WD.shape[0] - 1, channels)),
  }
  for name, (array, shape) in expected.items():
    if array is not None and array.shape != shape:
      raise ValueError(
        f'the {name} must have shape {list(shape)} for an input of shape '
        f'{list(x_BLD.shape)}, got {list(array.shape)}.'
      )
  dtype = jnp.result_type(x_BLD, jnp.float32)
  if buffer_BND is None:
    return jnp.zeros(expected['buffer'][1], dtype)
  return buffer_BND.astype(dtype)
