"""RTF: a rational kernel for each channel."""

from typing import NamedTuple

import flax.linen as nn
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from jaxformers.nn.gated_output import GatedOutput
from jaxformers.nn.init import Initializer
from jaxformers.nn.init import Normal
from jaxformers.nn.mixers.base import locate
from jaxformers.nn.mixers.base import require_causal
from jaxformers.nn.mixers.state_space import prepared
from jaxformers.nn.mixers.state_space import reversed_places
from jaxformers.nn.mixers.state_space import widened
from jaxformers.nn.placement import CHANNEL_RULES
from jaxformers.nn.placement import on_shares
from jaxformers.ops import segments
from jaxformers.ops.rational import rtf_convolution
from jaxformers.ops.rational import rtf_kernel
from jaxformers.ops.rational import rtf_matrix
from jaxformers.ops.rational import rtf_readout
from jaxformers.ops.recurrence.convolution import kernel_convolution
from jaxformers.ops.state_spaces import double_readout


class RTFState(NamedTuple):
  """What has been read so far, in constant space.

  Attributes:
    register_BDS: the filtered shift register of each channel, newest first.
    cursor: where the rows stand.
  """

  register_BDS: Float[Array, 'B D S']
  cursor: segments.Cursor


class RTF(nn.Module):
  """A convolution with a rational kernel per channel, then a gate.

  `(b_1 + b_2 z + ...) / (1 + a_1 z + ... + a_S z^S)` is evaluated by Fourier
  transforms at no cost that grows with S. The parameter b belongs to `length`,
  and is converted for longer rows, for a state and for packing, exactly as the
  readout of `S4` is, and at the same price.

  Where the mesh of a run cuts sequences, devices exchange tokens for channels, and
  each convolves whole sequences of its share of the channels.

  a begins at 0, a register of the last S inputs. `sum |a_i| < 1` suffices for
  stability; nothing but the start enforces it, because training suffers if it is
  enforced. A pole near the circle makes the conversions ill-conditioned.

  Source: Parnichkun et al., "State-Free Inference of State-Space Models: The
  Transfer Function Approach", 2024, arXiv 2405.06147; the authors' code,
  https://github.com/ruke1ire/RTF, has `delay=True` and begins with b = 0.

  Attributes:
    length: longest row whose kernel needs no conversion; the training length.
    state_size: S, less than `length`.
    delay: whether the rational part sees what came before a token only. The
      token itself is multiplied by `skip_D` in any case.
    initializer: how b begins.
    causal: whether tokens see no later ones; otherwise a second b, with the same
      a, sees them.
    output: what follows.
  """

  length: int
  state_size: int = 64
  delay: bool = True
  initializer: Initializer = Normal()
  causal: bool = True
  output: nn.Module = GatedOutput()

  @nn.compact
  def __call__(
    self, x_BLD, state=None, *, segments_BL=None, deterministic=True
  ):
    if state is not None:
      require_causal(self)
    places, cursor = locate(
      x_BLD.shape[:2], state and state.cursor, segments_BL
    )
    u_BLD, shape = widened(x_BLD), (x_BLD.shape[-1], self.state_size)
    skip_D = self.param('skip_D', nn.initializers.normal(1.0), shape[:1])
    zeros, draw = nn.initializers.zeros, self.initializer(1, 0)
    denominator_DS = self.param('denominator_DS', zeros, shape)
    names = ('numerator_DS', 'backward_DS')[: 1 if self.causal else 2]
    numerators = [self.param(name, draw, shape) for name in names]
    recovered_DRS = None
    if places is not None:
      recover = on_shares(self._recover, 'DS DS', 'DRS', rules=CHANNEL_RULES)
      recovered_DRS = prepared(
        self, 'numerators_DRS', lambda: recover(numerators, denominator_DS)
      )
    convolve = on_shares(
      self._convolve, 'BLD DS DRS DS BDS', 'BLD BDS', rules=CHANNEL_RULES
    )
    y_BLD, register_BDS = convolve(
      u_BLD,
      numerators,
      recovered_DRS,
      denominator_DS,
      state and state.register_BDS,
      places=places,
    )
    y_BLD = (y_BLD + skip_D * u_BLD).astype(x_BLD.dtype)
    if state is not None:
      state = RTFState(register_BDS, cursor)
    return self.output(y_BLD, deterministic=deterministic), state

  def initial_state(self, batch_size, max_length, width, dtype):
    del max_length
    require_causal(self)
    dtype = jnp.promote_types(dtype, jnp.float32)
    register_BDS = jnp.zeros((batch_size, width, self.state_size), dtype)
    return RTFState(register_BDS, segments.start(batch_size))

  def _kernel(self, numerator_DS, denominator_DS, length):
    known = self.length
    if known < length:
      matrix_DST = rtf_matrix(denominator_DS)
      while known < length:
        numerator_DS = double_readout(numerator_DS, matrix_DST, known)
        known *= 2
    kernel_DL = rtf_kernel(numerator_DS, denominator_DS, known)[:, :length]
    if self.delay:
      kernel_DL = jnp.pad(kernel_DL, ((0, 0), (1, 0)))[:, :-1]
    return kernel_DL

  def _recover(self, numerators, denominator_DS):
    """Returns the numerators of a recurrence, for all directions."""
    recovered = [
      rtf_readout(b_DS, denominator_DS, self.length) for b_DS in numerators
    ]
    return jnp.stack(recovered, axis=1)

  def _convolve(
    self, u_BLD, numerators, recovered_DRS, denominator_DS, first_BDS, places
  ):
    """Convolves channels; returns the last register if it went step by step."""
    if places is not None:
      numerators = jnp.unstack(recovered_DRS, axis=1)
      return self._recur(u_BLD, numerators, denominator_DS, first_BDS, places)
    length = u_BLD.shape[1]
    kernels = [self._kernel(b, denominator_DS, length) for b in numerators]
    return kernel_convolution(u_BLD, *kernels), None

  def _recur(self, u_BLD, numerators, denominator_DS, first_BDS, places):
    """Goes step by step."""
    batch, _, width = u_BLD.shape
    if first_BDS is None:
      first_BDS = jnp.zeros((batch, *denominator_DS.shape), u_BLD.dtype)

    def run(numerator_DS, u_BLD, places):
      return rtf_convolution(
        u_BLD,
        numerator_DS,
        denominator_DS,
        first_BDS,
        feedthrough_D=jnp.zeros(width) if self.delay else None,
        places=places,
      )

    y_BLD, last_BDS = run(numerators[0], u_BLD, places)
    for numerator_DS in numerators[1:]:
      back_BLD, _ = run(numerator_DS, u_BLD[:, ::-1], reversed_places(places))
      y_BLD += back_BLD[:, ::-1]
    return y_BLD, last_BDS
