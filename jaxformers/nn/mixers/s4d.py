"""S4D: a diagonal state-space model for each channel."""

import flax.linen as nn

from jaxformers.nn.gated_output import GatedOutput
from jaxformers.nn.mixers.base import locate
from jaxformers.nn.mixers.base import require_causal
from jaxformers.nn.mixers.state_space import ModesState
from jaxformers.nn.mixers.state_space import input_param
from jaxformers.nn.mixers.state_space import readout_param
from jaxformers.nn.mixers.state_space import reversed_places
from jaxformers.nn.mixers.state_space import stable_param
from jaxformers.nn.mixers.state_space import step_param
from jaxformers.nn.mixers.state_space import widened
from jaxformers.nn.placement import on_shares
from jaxformers.ops.diagonal import Discretization
from jaxformers.ops.diagonal import discretize
from jaxformers.ops.recurrence.convolution import ConvolutionMethod
from jaxformers.ops.recurrence.convolution import Modes
from jaxformers.ops.recurrence.convolution import lti_convolution
from jaxformers.ops.state_spaces import DiagonalInit
from jaxformers.ops.state_spaces import bandlimited
from jaxformers.ops.state_spaces import diagonal_form


class S4D(nn.Module):
  """A diagonal state-space model per channel, then a gate that mixes them.

  Each channel u drives S = `state_size / 2` complex modes, `x' = a x + b u`,
  which are sampled in steps of dt and read as `y = 2 Re(C x) + d u`.

  The authors train the parameters that
  `jaxformers.optim.selection.matching('(rate|frequency|input_..|step)_', params)`
  finds without weight decay, and with a learning rate of at most 1e-3.

  Source: Gu et al., "On the Parameterization and Initialization of Diagonal
  State Space Models", 2022, arXiv 2206.11893; defaults as in the authors' code,
  https://github.com/state-spaces/s4.

  Attributes:
    state_size: N, counted in real numbers.
    start: how a and b begin, see `jaxformers.ops.diagonal_form`. Very long
      dependencies are known to fail with `'lin'`.
    discretization: see `jaxformers.ops.discretize`.
    steps: shortest and longest dt at first, drawn with uniform logarithm.
    step_per_mode: whether modes have steps of their own, rather than channels.
    rate: multiplies dt, for inputs sampled at another rate than in training.
    bandlimit: see `jaxformers.ops.bandlimited`; None for none.
    clip_input: imaginary parts of b are clipped to this at first; None for
      never.
    causal: whether tokens see no later ones; otherwise a second readout sees
      them.
    output: what follows.
    method: see `jaxformers.ops.lti_convolution`, like `chunk`.
    chunk: tokens per chunk.
  """

  state_size: int = 64
  start: DiagonalInit = 'lin'
  discretization: Discretization = 'zoh'
  steps: tuple[float, float] = (1e-3, 1e-1)
  step_per_mode: bool = False
  rate: float = 1.0
  bandlimit: float | None = None
  clip_input: float | None = 2.0
  causal: bool = True
  output: nn.Module = GatedOutput()
  method: ConvolutionMethod = 'auto'
  chunk: int | None = None

  @nn.compact
  def __call__(
    self, x_BLD, state=None, *, segments_BL=None, deterministic=True
  ):
    if state is not None:
      require_causal(self)
    places, cursor = locate(
      x_BLD.shape[:2], state and state.cursor, segments_BL
    )
    u_BLD, width = widened(x_BLD), x_BLD.shape[-1]
    skip_D = self.param('skip_D', nn.initializers.normal(1.0), (width,))
    system = self._system(width)
    y_BLD, last_BDS = self._convolve(
      u_BLD, self._modes(system, 'readout'), state, places
    )
    if not self.causal:
      modes = self._modes(system, 'backward')
      places = reversed_places(places)
      back_BLD, _ = self._convolve(u_BLD[:, ::-1], modes, None, places)
      y_BLD += back_BLD[:, ::-1]
    y_BLD = (y_BLD + skip_D * u_BLD).astype(x_BLD.dtype)
    if state is not None:
      state = ModesState(last_BDS.real, last_BDS.imag, cursor)
    return self.output(y_BLD, deterministic=deterministic), state

  def initial_state(self, batch_size, max_length, width, dtype):
    del max_length
    require_causal(self)
    return ModesState.zeros(batch_size, width, self.state_size // 2, dtype)

  def _convolve(self, u_BLD, modes, state, places):
    packed = self.method == 'fft' and places is not None
    return on_shares(lti_convolution, 'BLD DS BDS', 'BLD BDS')(
      u_BLD,
      modes,
      state and state.modes_BDS,
      places=places,
      method='chunked' if packed else self.method,
      chunk=self.chunk,
    )

  def _system(self, width):
    """Returns eigenvalues, inputs and steps of all channels."""
    eigenvalues_S, input_S = diagonal_form(self.start, self.state_size)
    shape = width, self.state_size // 2
    eigenvalues_DS = stable_param(self, 'DS', eigenvalues_S, shape)
    input_DS = input_param(self, 'DS', input_S, shape, self.clip_input)
    if self.step_per_mode:
      step = step_param(self, 'DS', self.steps, shape)
    else:
      step = step_param(self, 'D', self.steps, shape[:1])[:, None]
    return eigenvalues_DS, input_DS, self.rate * step

  def _modes(self, system, readout):
    """Returns the sampled system with the readout of that name."""
    eigenvalues_DS, input_DS, step = system
    decay_DS, gain_DS = discretize(eigenvalues_DS, step, self.discretization)
    readout_DS = readout_param(self, readout, input_DS.shape)
    modes = Modes(decay_DS, gain_DS * input_DS, 2 * readout_DS)
    if self.bandlimit is None:
      return modes
    return bandlimited(modes, eigenvalues_DS, step, self.bandlimit)
