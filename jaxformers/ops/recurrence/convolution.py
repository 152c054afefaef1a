"""Convolutions with kernels that linear time-invariant systems make."""

from collections.abc import Callable
import math
from typing import Literal, NamedTuple, get_args

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Complex, Float

from jaxformers.ops.recurrence.devices import entering
from jaxformers.ops.recurrence.devices import last_of_all
from jaxformers.ops.recurrence.stepwise import step_through
from jaxformers.ops.recurrence.varying import varying_alike
from jaxformers.ops.segments import Places

CHUNK = 64
"""Tokens per chunk, where nothing else is said."""
PACKED_CHUNK = 16
"""The same, where rows are packed or padded."""
FEW = 4
"""Up to so many tokens are taken step by step, where nothing else is said."""

ConvolutionMethod = Literal['auto', 'chunked', 'fft', 'sequential']


class Modes(NamedTuple):
  """A diagonal linear system per channel, in discrete time.

  `x_k = decay x_(k-1) + input u_k`, `y_k = Re(sum_s readout x_k)`. Of modes that
  come in conjugate pairs one each is kept, with twice its readout.

  Attributes:
    decay: complex `[D, S]`, what a step leaves of each mode.
    input: complex `[D, S]`, what it writes.
    readout: complex `[D, S]`, what it reads.
  """

  decay: Complex[Array, 'D S']
  input: Complex[Array, 'D S']
  readout: Complex[Array, 'D S']


class Convolved(NamedTuple):
  """What a convolution with a state returns.

  Attributes:
    out: `[B, L, D]`, in the dtype of the input.
    last: complex `[B, D, S]`, the modes after the last token.
  """

  out: Float[Array, 'B L D']
  last: Complex[Array, 'B D S']


def kernel_convolution(
  input_BLD: Float[Array, 'B L D'],
  kernel_DM: Float[Array, 'D M'],
  backward_DM: Float[Array, 'D M'] | None = None,
) -> Float[Array, 'B L D']:
  """Convolves each channel with a kernel of its own, by Fourier transforms.

  `y_i = sum_(j <= i) kernel_(i-j) u_j + sum_(j >= i) backward_(j-i) u_j`. Zeros
  are appended, so nothing wraps around. Runs in float32 or float64. Rows are
  one segment each: a transform knows no places where it should begin anew.

  Source: Gu, Goel and Ré, "Efficiently Modeling Long Sequences with Structured
  State Spaces", 2021, arXiv 2111.00396, section 2.4. The authors' code begins
  the second kernel at j = i + 1, which differs by a multiple of u_i.

  Args:
    input_BLD: u.
    kernel_DM: weights of inputs 0, 1, ... steps ago; what is missing is 0.
    backward_DM: weights of inputs 0, 1, ... steps ahead; None for none.
  """
  length, dtype = input_BLD.shape[1], _wide(input_BLD)
  # Twice the length: an even number, and a power of two if the length is one.
  size = 2 * length
  transform = lambda x: jnp.fft.rfft(x.astype(dtype)[..., :length], n=size)
  spectrum_DN = transform(kernel_DM)
  if backward_DM is not None:
    # Reversed in time, a real signal has the conjugate spectrum.
    spectrum_DN += jnp.conj(transform(backward_DM))
  input_BDN = transform(jnp.moveaxis(input_BLD, 1, 2))
  out_BDL = jnp.fft.irfft(input_BDN * spectrum_DN, n=size)[..., :length]
  return jnp.moveaxis(out_BDL, 1, 2).astype(input_BLD.dtype)


def mode_kernel(modes: Modes, length: int) -> Float[Array, 'D L']:
  """Returns `Re(sum_s readout input decay^k)` for k = 0, 1, ..., length - 1.

  Powers are split, `decay^(i m + j) = decay^(i m) decay^j`, so that the kernel
  is a matrix product with an inner dimension of 2 S. The direct way evaluates a
  matrix of powers `[D, S, L]`: ten times slower, with S times the memory.

  Source: Gu et al., "On the Parameterization and Initialization of Diagonal
  State Space Models", 2022, arXiv 2206.11893, equation 5; the splitting is ours.

  Args:
    modes: the system.
    length: L.
  """
  return _weigh_powers(modes.readout * modes.input, modes.decay, length)


def lti_convolution(
  input_BLD: Float[Array, 'B L D'],
  modes: Modes,
  initial_BDS: Complex[Array, 'B D S'] | None = None,
  *,
  places: Places | None = None,
  method: ConvolutionMethod = 'auto',
  chunk: int | None = None,
  axis_name: str | None = None,
) -> Convolved:
  """Runs a diagonal linear system per channel over a sequence.

  All methods compute the same. `'chunked'` does all within a chunk of C tokens
  by products with Toeplitz matrices, and carries the modes from chunk to chunk:
  `O(L (C + 4 S))` multiply-adds per channel, in matrix products. `'fft'` convolves
  with `mode_kernel`; rounding errors of distant tokens reach every output.
  `'sequential'` goes step by step and is for few tokens; it keeps one state per
  chunk for the backward pass. `'auto'` is sequential for up to `FEW` tokens and
  chunked for more, on all platforms: no slower forward than `'fft'` on CPUs, and
  exactly causal, though with backward it takes up to 1.8 times as long at 1024
  tokens (`experiments/benchmarks/state_spaces.py`), and less from 16384.

  Where rows are packed or padded, tokens of a chunk are moved together, which
  leaves padding out of the lags, and the Toeplitz products become sums over lags
  with masks, in shorter chunks. What comes out at padding is of no meaning.

  Modes are complex, in float32 or, for float64 inputs, in float64.

  Source: Gu et al., 2022, arXiv 2206.11893 (diagonal state spaces); chunks: Dao
  and Gu, "Transformers are SSMs", 2024, arXiv 2405.21060, section 6.

  Args:
    input_BLD: u.
    modes: the system.
    initial_BDS: modes before the first token; None for 0.
    places: where tokens stand; None if each row continues its segment
      throughout. Modes begin at 0 where a position is 0, and padding, number 0,
      leaves them alone, whatever it holds.
    method: see above.
    chunk: C; None for `CHUNK`, or `PACKED_CHUNK` with places.
    axis_name: see `outer_recurrence`.

  Returns:
    Output and last modes.

  Raises:
    ValueError: if shapes do not fit, or the method is unknown or cannot do what
      is asked.
  """
  _check(input_BLD, modes, initial_BDS, places, method, chunk)
  batch, length, _ = input_BLD.shape
  dtype = _wide(input_BLD)
  modes = Modes(
    *(x.astype(jnp.result_type(dtype, jnp.complex64)) for x in modes)
  )
  is_fresh = initial_BDS is None and axis_name is None
  if initial_BDS is None:
    initial_BDS = jnp.zeros((batch, *modes.decay.shape))
  initial_BDS = initial_BDS.astype(modes.decay.dtype)
  if chunk is None:
    chunk = CHUNK if places is None else PACKED_CHUNK
  if method == 'auto':
    method = 'sequential' if length <= FEW else 'chunked'
  run: Callable[..., tuple[Array, Array]] = {
    'fft': _by_transforms,
    'sequential': _by_steps,
    'chunked': _by_chunks if places is None else _by_packed_chunks,
  }[method]
  x_BLD = input_BLD.astype(dtype)
  if places is not None:
    x_BLD = jnp.where(places.number_BL[..., None] == 0, 0, x_BLD)
  x_BLD, initial_BDS, modes = varying_alike((x_BLD, initial_BDS, modes))
  options = places, min(chunk, length)
  if axis_name is not None:
    nothing_BDS = jnp.zeros_like(initial_BDS)
    _, written_BDS = run(x_BLD, modes, nothing_BDS, *options)
    kept = _kept(modes.decay, places, length)
    initial_BDS = entering(axis_name, kept, written_BDS, initial_BDS)
  out_BLD, last_BDS = run(x_BLD, modes, initial_BDS, *options)
  if method == 'fft' and not is_fresh:
    out_BLD += _read_before(modes, initial_BDS, length)
  last_BDS = last_of_all(axis_name, last_BDS)
  return Convolved(out_BLD.astype(input_BLD.dtype), last_BDS)


def _kept(decay_DS, places, length):
  """Returns what is left of each mode after all tokens, `[B or 1, D, S]`."""
  if places is None:
    return decay_DS[None] ** length
  is_token_BL = places.number_BL != 0
  begins_B = jnp.any(is_token_BL & (places.position_BL == 0), axis=1)
  count_B11 = is_token_BL.sum(axis=1)[:, None, None]
  kept_BDS = jnp.where(begins_B[:, None, None], 0, jnp.ones_like(decay_DS))
  for bit in range(length.bit_length()):
    has_bit_B11 = (count_B11 >> bit) & 1 == 1
    kept_BDS = jnp.where(has_bit_B11, kept_BDS * decay_DS, kept_BDS)
    decay_DS = decay_DS * decay_DS
  return kept_BDS


class _Tables(NamedTuple):
  """What a chunk of C tokens needs; modes as 2 S real parts.

  Attributes:
    kernel_DC: `[D, C]`, weights of inputs 0, 1, ... steps ago.
    write_DSC: `[D, 2 S, C]`, what each token leaves in the modes at the end.
    read_DSC: `[D, 2 S, C]`, what each token reads from the modes before.
    powers_DSC: complex `[D, S, C + 1]`, what 0, 1, ..., C tokens leave of modes.
  """

  kernel_DC: Array
  write_DSC: Array
  read_DSC: Array
  powers_DSC: Array


def _tables(modes, chunk):
  powers_DSC, decay_DS = _powers(modes.decay, chunk)
  write_DSC = (modes.input[..., None] * powers_DSC)[..., ::-1]
  read_DSC = (modes.readout * modes.decay)[..., None] * powers_DSC
  return _Tables(
    mode_kernel(modes, chunk),
    _split(write_DSC, axis=1),
    # Re(a b) = Re a Re b - Im a Im b.
    _split(jnp.conj(read_DSC), axis=1),
    jnp.concatenate([powers_DSC, decay_DS[..., None]], axis=-1),
  )


def _by_transforms(x_BLD, modes, initial_BDS, places, chunk):
  """Convolves by Fourier transforms; the modes go from chunk to chunk."""
  del places
  length = x_BLD.shape[1]
  out_BLD = kernel_convolution(x_BLD, mode_kernel(modes, length))
  x_DNBC = _channels_first(_chunks(x_BLD, chunk))
  _, last_BDS = _carry(x_DNBC, length, initial_BDS, _tables(modes, chunk))
  return out_BLD, last_BDS


def _read_before(modes, initial_BDS, length):
  """Returns what each token reads from the modes before the first one."""
  weight_BDS = modes.readout * modes.decay * initial_BDS
  return jnp.moveaxis(_weigh_powers(weight_BDS, modes.decay, length), 1, 2)


def _by_chunks(x_BLD, modes, initial_BDS, places, chunk):
  """Goes from chunk to chunk by matrix products."""
  del places
  batch, length, width = x_BLD.shape
  tables = _tables(modes, chunk)
  x_DNBC = _channels_first(_chunks(x_BLD, chunk))
  states_NDBS, last_BDS = _carry(x_DNBC, length, initial_BDS, tables)
  weights_DCM = _toeplitz(tables.kernel_DC)
  out_DNBC = _dot('DNBM,DCM->DNBC', x_DNBC, weights_DCM)
  out_DNBC += _dot('NDBS,DSC->DNBC', states_NDBS, tables.read_DSC)
  out_BNCD = out_DNBC.transpose(2, 1, 3, 0)
  return out_BNCD.reshape(batch, -1, width)[:, :length], last_BDS


def _channels_first(x_BNCD):
  """Returns `[D, N, B, C]`: each channel has matrix products of its own."""
  return x_BNCD.transpose(3, 1, 0, 2)


def _carry(x_DNBC, length, initial_BDS, tables):
  """Returns the modes, as 2 S real parts, before each chunk; and the last."""
  chunk = x_DNBC.shape[-1]
  rest = length - (x_DNBC.shape[1] - 1) * chunk  # tokens of the last chunk
  writes_DNBS = _dot('DNBC,DSC->DNBS', x_DNBC[:, :-1], tables.write_DSC)

  def decay(state_DBS, count):
    return tables.powers_DSC[:, None, :, count] * state_DBS

  def step(state_DBS, write_DBS):
    return decay(state_DBS, chunk) + _join(write_DBS), _split(state_DBS)

  state_DBS, states_NDBS = jax.lax.scan(
    step, jnp.moveaxis(initial_BDS, 0, 1), jnp.moveaxis(writes_DNBS, 1, 0)
  )
  states_NDBS = jnp.concatenate([states_NDBS, _split(state_DBS)[None]])
  write_DBS = _dot(
    'DBC,DSC->DBS',
    x_DNBC[:, -1, :, :rest],
    tables.write_DSC[..., chunk - rest :],
  )
  last_DBS = decay(state_DBS, rest) + _join(write_DBS)
  return states_NDBS, jnp.moveaxis(last_DBS, 0, 1)


def _by_packed_chunks(x_BLD, modes, initial_BDS, places, chunk):
  """Goes from chunk to chunk, apart where segments begin and past padding."""
  batch, length, width = x_BLD.shape
  tables = _tables(modes, chunk)
  number_BNC = _chunks(places.number_BL, chunk)
  before_BN, after_BN = _segments_around(places, number_BNC)
  is_token_BNC = number_BNC != 0
  x_BNCD = _chunks(x_BLD, chunk)
  # What the last segment of each chunk writes; its end is at the chunk's end.
  back_BNC = jnp.argsort(is_token_BNC, axis=2, stable=True)
  writes_BNC = _move(number_BNC, back_BNC) == after_BN[..., None]
  written_BNCD = jnp.where(writes_BNC[..., None], _move(x_BNCD, back_BNC), 0)
  writes_NBDS = _dot('DSC,BNCD->NBDS', tables.write_DSC, written_BNCD)
  powers_CDS = jnp.moveaxis(tables.powers_DSC, 2, 0)

  def step(state_BDS, inputs):
    write_BDS, count_B, goes_on_B = inputs
    kept_BDS = powers_CDS[count_B] * state_BDS
    kept_BDS = jnp.where(goes_on_B[:, None, None], kept_BDS, 0)
    return kept_BDS + _join(write_BDS), _split(state_BDS)

  counts_NB = jnp.sum(is_token_BNC, axis=2).T
  last_BDS, states_NBDS = jax.lax.scan(
    step, initial_BDS, (writes_NBDS, counts_NB, (before_BN == after_BN).T)
  )
  # What tokens read; the first of them is at the chunk's beginning.
  front_BNC = jnp.argsort(~is_token_BNC, axis=2, stable=True)
  number_BNC = _move(number_BNC, front_BNC)
  out_BNCD = _dot('DSC,NBDS->BNCD', tables.read_DSC, states_NBDS)
  reads_BNC = number_BNC == before_BN[..., None]
  out_BNCD = jnp.where(reads_BNC[..., None], out_BNCD, 0)
  out_BNCD += _sum_over_lags(
    _move(x_BNCD, front_BNC), number_BNC, tables.kernel_DC
  )
  out_BNCD = _move(out_BNCD, jnp.argsort(front_BNC, axis=2))
  return out_BNCD.reshape(batch, -1, width)[:, :length], last_BDS


def _move(x_BNC, order_BNC):
  """Reorders the tokens of each chunk of `[B, N, C, ...]`."""
  index = jnp.expand_dims(order_BNC, range(3, x_BNC.ndim))
  return jnp.take_along_axis(x_BNC, index, axis=2)


def _segments_around(places, number_BNC):
  """Returns the segments of the tokens before and at the end of each chunk."""
  # The number of the segment that the modes at the start belong to, or one that
  # no token has. Numbers never fall, so that the first token decides.
  begins_BL = places.position_BL == 0
  number_BL = jnp.where(
    places.number_BL == 0,
    jnp.iinfo(jnp.int32).max,
    places.number_BL - begins_BL,
  )
  first_B1 = jnp.min(number_BL, axis=1, keepdims=True)
  numbers_BN = jnp.concatenate([first_B1, jnp.max(number_BNC, axis=2)], axis=1)
  numbers_BN = jax.lax.cummax(numbers_BN, axis=1)
  return numbers_BN[:, :-1], numbers_BN[:, 1:]


def _sum_over_lags(x_BNCD, number_BNC, kernel_DC):
  """Sums what each token gets from those of its chunk and segment."""
  chunk = kernel_DC.shape[1]
  out_BNCD = kernel_DC[:, 0] * x_BNCD
  for lag in range(1, chunk):
    same_BNC = number_BNC[..., lag:] == number_BNC[..., :-lag]
    seen_BNCD = jnp.where(same_BNC[..., None], x_BNCD[..., :-lag, :], 0)
    seen_BNCD = jnp.pad(seen_BNCD, ((0, 0), (0, 0), (lag, 0), (0, 0)))
    out_BNCD += kernel_DC[:, lag] * seen_BNCD
  return out_BNCD


def _by_steps(x_BLD, modes, initial_BDS, places, chunk):
  """Goes step by step, in real numbers."""
  decay, write, read = (x.T[:, None] for x in modes)  # [S, 1, D]

  def step(state, x_BD):
    real, imag = state  # [S, B, D]
    real, imag = (
      decay.real * real - decay.imag * imag + write.real * x_BD,
      decay.real * imag + decay.imag * real + write.imag * x_BD,
    )
    out_BD = jnp.sum(read.real * real - read.imag * imag, axis=0)
    return (real, imag), out_BD

  initial = tuple(jnp.moveaxis(x, 2, 0) for x in _parts(initial_BDS))
  out_BLD, last = step_through(step, initial, x_BLD, places=places, chunk=chunk)
  return out_BLD, jnp.moveaxis(jax.lax.complex(*last), 0, 2)


def _powers(decay_DS, count):
  """Returns powers 0, 1, ..., count - 1 as `[D, S, count]`; and power count."""
  inner = math.isqrt(count - 1) + 1
  outer = -(-count // inner)
  fine_DSC, step_DS = _products(decay_DS, inner)
  coarse_DSN, _ = _products(step_DS, outer)
  powers = coarse_DSN[..., :, None] * fine_DSC[..., None, :]
  powers_DSC = powers.reshape(*decay_DS.shape, -1)[..., :count]
  return powers_DSC, powers_DSC[..., -1] * decay_DS


def _products(decay_DS, count):
  powers = [jnp.ones_like(decay_DS)]
  for _ in range(count):
    powers.append(powers[-1] * decay_DS)
  return jnp.stack(powers[:-1], axis=-1), powers[-1]


def _toeplitz(kernel_DC):
  """Returns `[D, C, C]` with entry (i, j) `kernel_(i-j)`, 0 above the diagonal.

  Copies and cuts, without a gather, which costs more than the product.
  """
  width, chunk = kernel_DC.shape
  row = jnp.concatenate([kernel_DC[:, ::-1], jnp.zeros_like(kernel_DC)], axis=1)
  rows = jnp.tile(row, (1, chunk))[:, : chunk * (2 * chunk - 1)]
  return rows.reshape(width, chunk, 2 * chunk - 1)[..., chunk - 1 :]


def _weigh_powers(weight_DS, decay_DS, length):
  """Returns `[..., D, L]`, `Re(sum_s weight decay^k)` for k = 0, 1, ..."""
  inner = math.isqrt(length - 1) + 1  # the root of the length, rounded up
  outer = -(-length // inner)
  fine_DSC, decay_DS = _powers(decay_DS, inner)
  coarse_DSN, _ = _powers(decay_DS, outer)
  coarse_DSN = weight_DS[..., None] * coarse_DSN
  out_DNC = _dot(
    '...DSN,DSC->...DNC',
    _split(coarse_DSN, axis=-2),
    _split(jnp.conj(fine_DSC), axis=-2),
  )
  return out_DNC.reshape(*out_DNC.shape[:-2], -1)[..., :length]


def _dot(spec, *arrays):
  # TPUs would round the factors of states and kernels to 8 bits.
  return jnp.einsum(spec, *arrays, precision='highest')


def _parts(z):
  return jnp.real(z), jnp.imag(z)


def _split(z, axis=-1):
  """Stacks real and imaginary parts along an axis."""
  return jnp.concatenate(_parts(z), axis=axis)


def _join(x_BDS):
  """Undoes `_split` along the last axis."""
  return jax.lax.complex(*jnp.split(x_BDS, 2, axis=-1))


def _chunks(x_BLD, chunk):
  """Cuts `[B, L, ...]` into `[B, N, C, ...]`, zeros at the end."""
  batch, length, *rest = x_BLD.shape
  padding = [(0, 0), (0, -length % chunk)] + [(0, 0)] * len(rest)
  return jnp.pad(x_BLD, padding).reshape(batch, -1, chunk, *rest)


def _wide(x):
  return jnp.result_type(x, jnp.float32)


def _check(input_BLD, modes, initial_BDS, places, method, chunk):
  """Raises unless everything fits together."""
  if method not in get_args(ConvolutionMethod):
    known = ', '.join(get_args(ConvolutionMethod))
    raise ValueError(f'unknown method {method!r}; choose one of {known}.')
  if method == 'fft' and places is not None:
    raise ValueError(
      "method 'fft' cannot stop at the ends of segments or pass over padding; "
      "with places choose 'chunked', 'sequential' or 'auto'."
    )
  if chunk is not None and chunk < 1:
    raise ValueError(f'chunks need at least 1 token, got chunk={chunk}.')
  if input_BLD.ndim != 3 or input_BLD.shape[1] < 1:
    raise ValueError(
      'the input must have shape [B, L, D] with at least one token, got '
      f'{list(input_BLD.shape)}.'
    )
  batch, _, width = input_BLD.shape
  shapes = {name: x.shape for name, x in modes._asdict().items()}
  fits = all(len(shape) == 2 for shape in shapes.values())
  if not fits or len(set(shapes.values())) > 1 or modes.decay.shape[0] != width:
    raise ValueError(
      f'modes must have equal shapes [{width}, S], one row per channel of the '
      f'input, got {shapes}.'
    )
  state = batch, *modes.decay.shape
  if initial_BDS is not None and initial_BDS.shape != state:
    raise ValueError(
      f'the initial modes must have shape {list(state)}, got '
      f'{list(initial_BDS.shape)}.'
    )
