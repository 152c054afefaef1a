"""Plain softmax attention by the kernels of hardware vendors.

They know few masks and neither biases nor more than one product per pair, but
are as fast as their hardware allows. Whatever the library's own parts put into
the queries and keys, rotations and scales of all kinds, reaches them unchanged.
"""

from collections.abc import Callable

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from jaxformers.ops.masks import Both
from jaxformers.ops.masks import Causal
from jaxformers.ops.masks import Lengths
from jaxformers.ops.masks import Mask
from jaxformers.ops.masks import NoMask
from jaxformers.ops.masks import Segments
from jaxformers.ops.masks import Window

LANES = 128
"""The TPU kernel cuts queries and keys into blocks of multiples of this."""


def conjuncts(mask: Mask) -> list[Mask]:
  """Returns the masks that all must agree, `a & b & c` taken apart.

  Source: none; a property of this library.

  Args:
    mask: any mask.
  """
  if isinstance(mask, Both):
    return conjuncts(mask.left) + conjuncts(mask.right)
  return [] if isinstance(mask, NoMask) else [mask]


def refuses_mask(implementation: str, mask: Mask) -> str | None:
  """Says which part of a mask a kernel does not know; None if it knows all.

  Source: none; a property of the kernels.

  Args:
    implementation: `'cudnn'` or `'tpu'`.
    mask: any mask.
  """
  known = {
    'cudnn': (Causal, Window, Lengths),
    'tpu': (Causal, Window, Segments),
  }
  names = ', '.join(cls.__name__ for cls in known[implementation])
  for part in conjuncts(mask):
    if not isinstance(part, known[implementation]):
      return f'it knows the masks {names} only, not {type(part).__name__}'
    if isinstance(part, Causal) and part.offset:
      return 'it knows Causal without an offset only'
  kinds = [type(part) for part in conjuncts(mask)]
  if len(set(kinds)) < len(kinds):
    return 'it takes one mask of a class only'
  return None


def attend_cudnn(
  query_BLHK: Float[Array, 'B L H K'],
  key_BMGK: Float[Array, 'B M G K'],
  value_BMGV: Float[Array, 'B M G V'],
  mask: Mask,
) -> Float[Array, 'B L H V']:
  """Attends by cuDNN's fused kernel, through `jax.nn.dot_product_attention`.

  Source: Dao et al., "FlashAttention", 2022, arXiv 2205.14135.

  Args:
    query_BLHK: queries, scaled; float16 or bfloat16.
    key_BMGK: keys.
    value_BMGV: values.
    mask: one for which `refuses_mask` gives None.
  """
  parts = {type(part): part for part in conjuncts(mask)}
  options = {}
  if Window in parts:
    # Inclusive at both ends: the query itself and so many before it.
    options['local_window_size'] = parts[Window].size - 1, 0
  if Lengths in parts:
    options['key_value_seq_lengths'] = parts[Lengths].length_B
  out_BLHV = jax.nn.dot_product_attention(
    query_BLHK,
    key_BMGK,
    value_BMGV,
    scale=1.0,
    is_causal=Causal in parts or Window in parts,
    implementation='cudnn',
    **options,
  )
  if Lengths in parts:  # The kernel gives a mean of padding where all is.
    is_any_B111 = (parts[Lengths].length_B > 0)[:, None, None, None]
    out_BLHV = jnp.where(is_any_B111, out_BLHV, 0)
  return out_BLHV


def attend_tpu(
  query_BLHK: Float[Array, 'B L H K'],
  key_BMGK: Float[Array, 'B M G K'],
  value_BMGV: Float[Array, 'B M G V'],
  mask: Mask,
  *,
  interpret: bool = False,
) -> Float[Array, 'B L H V']:
  """Attends by JAX's Pallas kernel for TPUs (splash attention).

  Source: Dao et al., "FlashAttention", 2022, arXiv 2205.14135; the kernel:
  `jax.experimental.pallas.ops.tpu.splash_attention`.

  Args:
    query_BLHK: queries, scaled; L a multiple of 128.
    key_BMGK: keys; M a multiple of 128.
    value_BMGV: values.
    mask: one for which `refuses_mask` gives None.
    interpret: whether to run without a TPU, slowly.
  """
  # Slow to import, and no use to most.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  parts = {type(part): part for part in conjuncts(mask)}
  heads = query_BLHK.shape[2]
  shape = query_BLHK.shape[1], key_BMGK.shape[1]
  pattern = splash.FullMask(shape)
  if Window in parts:
    pattern = splash.LocalMask(shape, (parts[Window].size - 1, 0), offset=0)
  elif Causal in parts:
    pattern = splash.CausalMask(shape)
  kernel = splash.make_splash_mha_single_device(
    splash.MultiHeadMask([pattern] * heads), interpret=interpret
  )
  ids, axes = None, None
  if Segments in parts:
    ids = splash.SegmentIds(parts[Segments].query_BL, parts[Segments].key_BM)
    axes = splash.SegmentIds(0, 0)
  heads_first = lambda x: x.swapaxes(1, 2)
  out_BHLV = jax.vmap(kernel, in_axes=(0, 0, 0, axes))(
    heads_first(query_BLHK), heads_first(key_BMGK), heads_first(value_BMGV), ids
  )
  out_BLHV = heads_first(out_BHLV)
  if Segments in parts:  # To the kernel padding is a segment like others.
    is_token = (parts[Segments].query_BL != 0)[..., None, None]
    out_BLHV = jnp.where(is_token, out_BLHV, 0)
  return out_BLHV


KERNELS: dict[str, Callable[..., Array]] = {
  'cudnn': attend_cudnn,
  'tpu': attend_tpu,
}
