"""S5: one state-space model with many inputs, computed by a recurrence."""

from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.nn.gated_output import GatedOutput
from jaxformers.nn.mixers.base import require_causal
from jaxformers.nn.mixers.diagonal import follows
from jaxformers.nn.mixers.diagonal import fresh
from jaxformers.nn.mixers.diagonal import read
from jaxformers.nn.mixers.diagonal import run
from jaxformers.nn.mixers.diagonal import sow_decay
from jaxformers.ops.diagonal import Discretization
from jaxformers.ops.diagonal import discretize
from jaxformers.ops.diagonal import normal_legs
from jaxformers.ops.recurrence import LinearMethod

Readout = Literal['trunc_standard_normal', 'lecun_normal', 'complex_normal']


class S5(nn.Module):
  """Simplified state-space layer.

  `h' = a h + B x`, `y = 2 Re(C h) + d x`, discretised with one trained time step
  per state, and then `output`. All channels share the states. The first
  eigenvalues a and the basis are those of the normal part of HiPPO-LegS, in
  `blocks` equal blocks.

  Complex parameters are two real ones, along the axis N of their names. The
  authors train `a_re_S`, `a_im_S`, `step_S`, `in_NDS` and norms by Adam with
  learning rate 1e-3 and without weight decay, all else by AdamW: of the mixer
  the names that match `(a_re_S|a_im_S|step_S|in_NDS)$`.

  Source: Smith et al., "Simplified State Space Layers for Sequence Modeling",
  2022, arXiv 2208.04933, section 3 and appendix B; initialisation as in their
  code, https://github.com/lindermanlab/S5.

  Attributes:
    state_size: number of real dimensions of the state; with `conj_sym` half as
      many complex numbers are kept.
    blocks: number of blocks, which must divide the state size.
    discretization: how time becomes discrete.
    conj_sym: whether states come in conjugate pairs of which one is kept;
      without, all are kept and y is the real part, not twice.
    clip_eigs: whether real parts of eigenvalues are kept at or below -1e-4, so
      that states stay bounded at any length. Without, as the authors have it,
      training may push decays beyond 1: `jaxformers.diagnostics.decay_report`
      shows the largest, and so do the metrics of `jaxformers.train.NextToken`.
    bidirectional: whether to add a recurrence from the end, with another C.
    step_min: smallest first time step.
    step_max: largest; the logarithm of steps is uniform in between.
    step_rescale: factor of all steps, for inputs of another resolution.
    readout: how C begins. `'trunc_standard_normal'` has variance 1 / state_size
      per part, and `'lecun_normal'`, as the authors' code computes it, 1 /
      (state_size * D), both in the basis of HiPPO; `'complex_normal'` has 1/2 in
      the basis of the eigenvectors.
    output: what follows.
    method: see `jaxformers.ops.linear_recurrence`, like `chunk`.
    chunk: steps per chunk.
  """

  state_size: int = 256
  blocks: int = 8
  discretization: Discretization = 'zoh'
  conj_sym: bool = True
  clip_eigs: bool = False
  bidirectional: bool = False
  step_min: float = 1e-3
  step_max: float = 1e-1
  step_rescale: float = 1.0
  readout: Readout = 'trunc_standard_normal'
  output: nn.Module = GatedOutput(gate='half_glu1', activation='gelu_tanh')
  method: LinearMethod = 'auto'
  chunk: int | None = None

  @property
  def causal(self) -> bool:
    return not self.bidirectional

  @nn.compact
  def __call__(
    self, x_BLD, state=None, *, segments_BL=None, deterministic=True
  ):
    self._check()
    if state is not None:
      require_causal(self)
    reading = read(x_BLD, state and state.cursor, segments_BL)
    width = x_BLD.shape[-1]
    decay_S, in_DS = self._system(width)
    if not self.clip_eigs:
      sow_decay(self, decay_S)
    names = ('out', 'back') if self.bidirectional else ('out',)
    outs = [self._out(name, width) for name in names]
    skip_D = self.param('skip_D', nn.initializers.normal(1.0), (width,))
    options = {'method': self.method, 'chunk': self.chunk}
    y_BLD, last_BS = run(
      reading, decay_S, in_DS, outs, state, segments_BL, **options
    )
    y_BLD += skip_D.astype(x_BLD.dtype) * reading.x_BLD
    y_BLD = self.output(y_BLD, deterministic=deterministic)
    return y_BLD, follows(state, last_BS, reading.cursor)

  def initial_state(self, batch_size, max_length, width, dtype):
    del max_length, width
    require_causal(self)
    return fresh(batch_size, self._kept(), dtype)

  def _kept(self):
    """Returns the number of complex states."""
    return self.state_size // 2 if self.conj_sym else self.state_size

  def _system(self, width):
    """Returns decays and B, discretised."""
    eigenvalues_S, vectors_RS = self._basis()
    tiled = lambda x: jnp.tile(jnp.asarray(x), self.blocks)
    a_re_S = self.param('a_re_S', lambda _: tiled(eigenvalues_S.real))
    a_im_S = self.param('a_im_S', lambda _: tiled(eigenvalues_S.imag))

    def first_in(key):
      # The authors' rule takes the state size for the fan: shape (N, D).
      shape = self.state_size, width
      b = nn.initializers.lecun_normal()(key, shape)
      b = b.reshape(self.blocks, -1, width)
      b = jnp.einsum('RS,XRD->DXS', vectors_RS.conj(), b).reshape(width, -1)
      return jnp.stack([b.real, b.imag])

    in_NDS = self.param('in_NDS', first_in)
    low, high = np.log(self.step_min), np.log(self.step_max)
    step_S = self.param(
      'step_S',
      lambda key: jax.random.uniform(
        key, (self._kept(),), minval=low, maxval=high
      ),
    )
    if self.clip_eigs:
      a_re_S = jnp.minimum(a_re_S, -1e-4)
    decay_S, gain_S = discretize(
      jax.lax.complex(a_re_S, a_im_S),
      self.step_rescale * jnp.exp(step_S),
      self.discretization,
    )
    return decay_S, gain_S * jax.lax.complex(*in_NDS)

  def _out(self, name, width):
    """Returns C of one direction, twice itself if it stands for pairs."""
    _, vectors_RS = self._basis()

    def first(key):
      if self.readout == 'complex_normal':
        return jax.random.normal(key, (2, self._kept(), width)) * 0.5**0.5
      fan = self.state_size
      if self.readout == 'lecun_normal':
        fan *= width
      # The standard deviation of a normal distribution cut at 2 is 0.88.
      c = jax.random.truncated_normal(key, -2, 2, (2, self.state_size, width))
      c *= fan**-0.5 / 0.87962566103423978
      c = c.reshape(2, self.blocks, -1, width)
      c = jnp.einsum('XRD,RS->XSD', jax.lax.complex(*c), vectors_RS)
      return jnp.stack([c.real, c.imag]).reshape(2, -1, width)

    out_NSD = self.param(f'{name}_NSD', first)
    return (2 if self.conj_sym else 1) * jax.lax.complex(*out_NSD)

  def _basis(self):
    """Returns eigenvalues and eigenvectors that one block keeps."""
    size = self.state_size // self.blocks
    legs = normal_legs(size)
    kept = size // 2 if self.conj_sym else size
    return (
      legs.eigenvalues_S[:kept].astype(np.complex64),
      legs.vectors_NS[:, :kept].astype(np.complex64),
    )

  def _check(self):
    parts = self.blocks * (2 if self.conj_sym else 1)
    if self.blocks < 1 or self.state_size < 1 or self.state_size % parts:
      raise ValueError(
        f'a state of size {self.state_size} does not divide into '
        f'{self.blocks} blocks{" of pairs" if self.conj_sym else ""}; choose '
        f'a multiple of {max(parts, 1)}.'
      )
    if not 0 < self.step_min < self.step_max:
      raise ValueError(
        'time steps begin between step_min and step_max, with 0 < step_min < '
        f'step_max; got {self.step_min} and {self.step_max}.'
      )
    if self.readout not in get_args(Readout):
      raise ValueError(
        f'unknown readout {self.readout!r}; known: '
        f'{", ".join(get_args(Readout))}.'
      )
