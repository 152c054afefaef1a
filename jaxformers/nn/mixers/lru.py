"""The linear recurrent unit: stable by its parameters alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxformers.nn.gated_output import GatedOutput
from jaxformers.nn.mixers.base import require_causal
from jaxformers.nn.mixers.diagonal import follows
from jaxformers.nn.mixers.diagonal import fresh
from jaxformers.nn.mixers.diagonal import read
from jaxformers.nn.mixers.diagonal import run
from jaxformers.ops.recurrence import LinearMethod


class LRU(nn.Module):
  """Linear recurrent unit.

  `h_t = a h_(t-1) + g (x_t B)`, `y_t = Re(h_t C) + d x_t` with `a = exp(-exp(nu)
  + i exp(theta))`, which is less than 1 in size whatever the parameters, and a
  factor g that begins so that white noise gives states of equal size whatever
  a is: `g^2 = 1 - |a|^2`. Then comes `output`.

  The decays begin uniformly on a ring of the complex plane. How long the layer
  remembers is decided there: with `r_max = 0.5` it learns nothing that needs
  more than a few steps, and `r_min = 0.9`, `r_max = 0.999` suit most tasks.

  Complex parameters are two real ones, along the axis N of their names. The
  authors train `nu_S`, `theta_S`, `gamma_S` and B by Adam without weight decay
  and with half or a quarter of the learning rate: the names that match
  `(nu_S|theta_S|gamma_S|in_N?DS)$`.

  Source: Orvieto et al., "Resurrecting Recurrent Neural Networks for Long
  Sequences", 2023, arXiv 2303.06349, section 3.4 and appendix A; `is_real` is
  SLRU of Su Jianlin, 2023, kexue.fm/archives/9554.

  Attributes:
    state_size: S, number of complex states (of real ones if `is_real`).
    r_min: smallest size of the first decays.
    r_max: largest.
    max_phase: largest angle of the first decays.
    is_real: whether all is real: decays are positive, B and C have no imaginary
      part.
    bidirectional: whether to add a recurrence from the end, with another C.
    output: what follows.
    method: see `jaxformers.ops.linear_recurrence`, like `chunk`.
    chunk: steps per chunk.
  """

  state_size: int
  r_min: float = 0.0
  r_max: float = 1.0
  max_phase: float = 6.28
  is_real: bool = False
  bidirectional: bool = False
  output: nn.Module = GatedOutput()
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
    width, size = x_BLD.shape[-1], self.state_size
    decay_S, gain_S = self._decays()
    # B has variance 1 / D; of a complex one each part has half.
    fan = width if self.is_real else 2 * width
    in_DS = self._matrix('in', fan, (width, size))
    names = ('out', 'back') if self.bidirectional else ('out',)
    outs = [self._matrix(name, size, (size, width)) for name in names]
    skip_D = self.param('skip_D', nn.initializers.normal(1.0), (width,))
    options = {'method': self.method, 'chunk': self.chunk}
    y_BLD, last_BS = run(
      reading, decay_S, in_DS * gain_S, outs, state, segments_BL, **options
    )
    y_BLD += skip_D.astype(x_BLD.dtype) * reading.x_BLD
    y_BLD = self.output(y_BLD, deterministic=deterministic)
    return y_BLD, follows(state, last_BS, reading.cursor)

  def initial_state(self, batch_size, max_length, width, dtype):
    del max_length, width
    require_causal(self)
    return fresh(batch_size, self.state_size, dtype, is_real=self.is_real)

  def _check(self):
    if self.state_size < 1:
      raise ValueError(f'an LRU needs state_size >= 1, got {self.state_size}.')
    if not 0 <= self.r_min < self.r_max <= 1:
      raise ValueError(
        'decays begin between r_min and r_max, with 0 <= r_min < r_max <= 1; '
        f'got r_min={self.r_min}, r_max={self.r_max}.'
      )

  def _decays(self):
    """Returns decays and the gains that belong to them at the beginning."""
    shape = (self.state_size,)
    nu_S = self.param('nu_S', self._first_nu, shape)
    first_gamma = lambda _: 0.5 * jnp.log(-jnp.expm1(-2 * jnp.exp(nu_S)))
    gamma_S = self.param('gamma_S', first_gamma)
    log_decay_S = -jnp.exp(nu_S)
    if not self.is_real:
      theta_S = self.param('theta_S', self._first_theta, shape)
      log_decay_S = jax.lax.complex(log_decay_S, jnp.exp(theta_S))
    return jnp.exp(log_decay_S), jnp.exp(gamma_S)

  def _first_nu(self, key, shape):
    """Draws so that decays are uniform on the ring."""
    low, high = self.r_min**2, self.r_max**2
    square = jax.random.uniform(key, shape) * (high - low) + low
    return jnp.log(-0.5 * jnp.log(square + 1e-8))

  def _first_theta(self, key, shape):
    return jnp.log(self.max_phase * jax.random.uniform(key, shape, minval=1e-8))

  def _matrix(self, name, fan, shape):
    """Returns a real matrix, or a complex one."""
    letters = 'DS' if name == 'in' else 'SD'
    normal = nn.initializers.normal(fan**-0.5)
    if self.is_real:
      return self.param(f'{name}_{letters}', normal, shape)
    return jax.lax.complex(
      *self.param(f'{name}_N{letters}', normal, (2, *shape))
    )
