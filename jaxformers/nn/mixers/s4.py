"""S4: a state-space model per channel, with the matrix of a HiPPO measure."""

import flax.linen as nn
import jax.numpy as jnp

from jaxformers.nn.gated_output import GatedOutput
from jaxformers.nn.mixers.base import locate
from jaxformers.nn.mixers.base import require_causal
from jaxformers.nn.mixers.state_space import ModesState
from jaxformers.nn.mixers.state_space import input_param
from jaxformers.nn.mixers.state_space import prepared
from jaxformers.nn.mixers.state_space import readout_param
from jaxformers.nn.mixers.state_space import reversed_places
from jaxformers.nn.mixers.state_space import stable_param
from jaxformers.nn.mixers.state_space import step_param
from jaxformers.nn.mixers.state_space import widened
from jaxformers.nn.placement import CHANNEL_RULES
from jaxformers.nn.placement import on_shares
from jaxformers.ops.recurrence.convolution import kernel_convolution
from jaxformers.ops.state_spaces import LowRankMeasure
from jaxformers.ops.state_spaces import LowRankSystem
from jaxformers.ops.state_spaces import complex_readout
from jaxformers.ops.state_spaces import double_readout
from jaxformers.ops.state_spaces import normal_form
from jaxformers.ops.state_spaces import real_readout
from jaxformers.ops.state_spaces import recover_readout
from jaxformers.ops.state_spaces import s4_convolution
from jaxformers.ops.state_spaces import s4_kernel
from jaxformers.ops.state_spaces import s4_matrix


class S4(nn.Module):
  """A state-space model per channel, then a gate that mixes them.

  `x' = (diag(a) - P P^*) x + B u` with S = `state_size / 2` complex states, in
  bilinear steps of dt, read as `y = 2 Re(C x) + d u`. The parameter `readout` is
  not C but `C~ = C (I - Abar^length)`, so that no power of Abar is needed in
  training. It belongs to that `length`, which is therefore no option to change
  after training; what the layer computes is the same for all lengths:

  - whole rows of up to `length` tokens, and nothing packed: a convolution with
    the kernel from `C~`;
  - longer rows: likewise, after C~ has been converted to the next of twice,
    four times, ... the length, which takes `O(N^3 log length)` per channel;
  - with a state, or with packing: a recurrence in steps of `O(N)`, after C has
    been recovered from C~ at the same price: in every call, or once for many, as
    in decoding, with the collection `'prepared'`
    (`jaxformers.nn.mixers.state_space.prepared`). So packed training is slow; `S4D` has neither restriction.

  Where the mesh of a run cuts sequences, devices exchange tokens for channels, and
  each convolves whole sequences of its share of the channels.

  The authors train the parameters that `jaxformers.optim.selection.matching(
  '(rate|frequency|low_rank_..|input_..|step)_', params)` finds without weight
  decay, and with a learning rate of at most 1e-3.

  Source: Gu, Goel and Ré, "Efficiently Modeling Long Sequences with Structured
  State Spaces", 2021, arXiv 2111.00396; defaults as in the authors' code,
  https://github.com/state-spaces/s4.

  Attributes:
    length: longest row whose kernel needs no conversion; the training length.
    state_size: N, counted in real numbers.
    measure: whose matrix it begins with, see `jaxformers.ops.normal_form`.
    window: of that measure.
    steps: shortest and longest dt at first, drawn with uniform logarithm.
    shared: whether all channels share A and B, and differ in dt and C only.
    clip_input: imaginary parts of B are clipped to this at first; None for
      never.
    causal: whether tokens see no later ones; otherwise a second readout sees
      them.
    output: what follows.
  """

  length: int
  state_size: int = 64
  measure: LowRankMeasure = 'legs'
  window: float = 1.0
  steps: tuple[float, float] = (1e-3, 1e-1)
  shared: bool = False
  clip_input: float | None = 2.0
  causal: bool = True
  output: nn.Module = GatedOutput()

  @nn.compact
  def __call__(
    self, x_BLD, state=None, *, segments_BL=None, deterministic=True
  ):
    if state is not None:
      require_causal(self)
    if self.length < 1:
      raise ValueError(f'S4 needs length >= 1, got {self.length}.')
    places, cursor = locate(
      x_BLD.shape[:2], state and state.cursor, segments_BL
    )
    u_BLD, width = widened(x_BLD), x_BLD.shape[-1]
    skip_D = self.param('skip_D', nn.initializers.normal(1.0), (width,))
    step_D = step_param(self, 'D', self.steps, (width,))
    names = ('readout',) if self.causal else ('readout', 'backward')
    systems = self._systems(width, names)
    readouts_DRN = None
    if places is not None:
      recover = on_shares(self._recover, 'D D', 'DRN', rules=CHANNEL_RULES)
      readouts_DRN = prepared(
        self, 'readouts_DRN', lambda: recover(systems, step_D)
      )
    convolve = on_shares(
      self._convolve, 'BLD D DRN D BDS', 'BLD BDS', rules=CHANNEL_RULES
    )
    y_BLD, last_BDS = convolve(
      u_BLD,
      systems,
      readouts_DRN,
      step_D,
      state and state.modes_BDS,
      places=places,
    )
    y_BLD = (y_BLD + skip_D * u_BLD).astype(x_BLD.dtype)
    if state is not None:
      state = ModesState(last_BDS.real, last_BDS.imag, cursor)
    return self.output(y_BLD, deterministic=deterministic), state

  def initial_state(self, batch_size, max_length, width, dtype):
    del max_length
    require_causal(self)
    return ModesState.zeros(batch_size, width, self.state_size // 2, dtype)

  def _systems(self, width, names):
    """Returns the system once with each readout."""
    form = normal_form(self.measure, self.state_size, window=self.window)
    states, rank = form.low_rank_SR.shape
    channels, letter = ((), '') if self.shared else ((width,), 'D')
    eigenvalues = stable_param(
      self, f'{letter}S', form.eigenvalues_S, (*channels, states)
    )
    low_rank = input_param(
      self,
      f'{letter}SR',
      form.low_rank_SR,
      (*channels, states, rank),
      name='low_rank',
    )
    input_ = input_param(
      self, f'{letter}S', form.input_S, (*channels, states), self.clip_input
    )
    readouts = [readout_param(self, name, (width, states)) for name in names]
    return [
      LowRankSystem(
        jnp.broadcast_to(eigenvalues, (width, states)),
        jnp.broadcast_to(low_rank, (width, states, rank)),
        jnp.broadcast_to(input_, (width, states)),
        readout_DS,
      )
      for readout_DS in readouts
    ]

  def _kernel(self, system, step_D, length):
    known = self.length
    if length > known:
      matrix_DNM = s4_matrix(system, step_D)
      readout_DN = real_readout(system.readout_S)
      while known < length:
        readout_DN = double_readout(readout_DN, matrix_DNM, known)
        known *= 2
      system = system._replace(readout_S=complex_readout(readout_DN))
    return s4_kernel(system, step_D, known)[:, :length]

  def _recover(self, systems, step_D):
    """Returns the readouts of a recurrence, for all directions."""
    matrix_DNM = s4_matrix(systems[0], step_D)
    recovered = [
      recover_readout(real_readout(s.readout_S), matrix_DNM, self.length)
      for s in systems
    ]
    return jnp.stack(recovered, axis=1)

  def _convolve(self, u_BLD, systems, readouts_DRN, step_D, first_BDS, places):
    """Convolves channels; returns the last modes if it went step by step."""
    if places is not None:
      systems = [
        system._replace(readout_S=complex_readout(readouts_DRN[:, i]))
        for i, system in enumerate(systems)
      ]
      return self._recur(u_BLD, systems, step_D, first_BDS, places)
    kernels = [self._kernel(s, step_D, u_BLD.shape[1]) for s in systems]
    return kernel_convolution(u_BLD, *kernels), None

  def _recur(self, u_BLD, systems, step_D, first_BDS, places):
    """Goes step by step."""
    if first_BDS is None:
      batch, _, width = u_BLD.shape
      fresh = ModesState.zeros(batch, width, self.state_size // 2, u_BLD.dtype)
      first_BDS = fresh.modes_BDS
    y_BLD, last_BDS = s4_convolution(
      u_BLD, systems[0], step_D, first_BDS, places=places
    )
    for system in systems[1:]:
      back_BLD, _ = s4_convolution(
        u_BLD[:, ::-1],
        system,
        step_D,
        first_BDS,
        places=reversed_places(places),
      )
      y_BLD += back_BLD[:, ::-1]
    return y_BLD, last_BDS
