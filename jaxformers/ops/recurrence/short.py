"""Causal convolutions over a few tokens."""

from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Int

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
) -> ShortConvolved:
  """Mixes each token with the W - 1 tokens before it, channel by channel.

  `y_i = b + sum_j w_(W-1-j) x_(i-j)`: the last row of the weights is that of the
  token itself, as in PyTorch. Tokens see their own segment only. Padding may
  stand anywhere and hold anything: tokens around it are neighbours. One fused
  pass of W multiply-adds, in at least float32.

  Source: Gu and Dao, "Mamba", 2023, arXiv 2312.00752, section 3.4; as in the
  authors' code, https://github.com/Dao-AILab/causal-conv1d, but the buffer
  holds W - 1 tokens instead of W.

  Args:
    x_BLD: the tokens.
    weight_WD: one row per distance, the farthest first; W = 1 is a gain.
    bias_D: what is added; None for nothing.
    buffer_BND: what an earlier call returned; None for zeros.
    places: where the tokens stand, see `jaxformers.ops.segments`; None if all
      belong to one segment, which began where the buffer did.

  Returns:
    Output, and the buffer for the next tokens.

  Raises:
    ValueError: if shapes do not fit.
  """
  buffer_BND = _checked_buffer(x_BLD, weight_WD, bias_D, buffer_BND)
  length, width = x_BLD.shape[1], weight_WD.shape[0]
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


def sharded_short_convolution(
  x_BLD: Float[Array, 'B L D'],
  weight_WD: Float[Array, 'W D'],
  bias_D: Float[Array, ' D'] | None = None,
  *,
  axis_name: str,
  position_BL: Int[Array, 'B L'] | None = None,
) -> Float[Array, 'B L D']:
  """Does what `short_convolution` does, on a sequence split among devices.

  To be called inside `jax.shard_map`, with equal, consecutive shares of the
  length on the devices of one mesh axis. Each device sends its last W - 1
  tokens to the next, in one `ppermute`; nothing else is communicated.

  Source: none; a halo exchange, of `short_convolution`.

  Args:
    x_BLD: this device's tokens, at least W - 1.
    weight_WD: as for `short_convolution`, the same on all devices.
    bias_D: likewise.
    axis_name: the mesh axis.
    position_BL: position of each token in its segment; None for one segment.
      Padding, which holds finite numbers, may stand at the end of rows only.

  Raises:
    ValueError: if shapes do not fit or a share is shorter than W - 1.
  """
  _checked_buffer(x_BLD, weight_WD, bias_D, None)
  reach = weight_WD.shape[0] - 1
  if x_BLD.shape[1] < reach:
    raise ValueError(
      f'each device must hold at least {reach} tokens, as many as a token looks '
      f'back on, got {x_BLD.shape[1]}; use fewer devices or a shorter weight.'
    )
  devices = jax.lax.axis_size(axis_name)
  # The first device receives from none, and is given zeros.
  halo_BND = jax.lax.ppermute(
    x_BLD[:, x_BLD.shape[1] - reach :],
    axis_name,
    [(i, i + 1) for i in range(devices - 1)],
  )
  line_BMD = jnp.concatenate([halo_BND, x_BLD], axis=1)
  out_BLD = _slide(line_BMD, weight_WD, bias_D, position_BL)
  return out_BLD.astype(x_BLD.dtype)


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
