"""One layer of a Transformer: a mixer, then a feed-forward part."""

import flax.linen as nn

from jaxformers.nn.placement import place
from jaxformers.nn.residual import PreNorm


class Block(nn.Module):
  """A mixer and, if given, a feed-forward part, each inside its own residual.

  Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762,
  figure 1.

  Attributes:
    mixer: moves information between tokens, see `jaxformers.nn.mixers.Mixer`.
    feedforward: works on each token alone; None for none.
    residual: how each of the two joins its input.
    dropout: probability of dropping a number that either of them returns.
  """

  mixer: nn.Module
  feedforward: nn.Module | None = None
  residual: nn.Module = PreNorm()
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self, x_BLD, state=None, *, segments_BL=None, deterministic=True
  ):
    drop = nn.Dropout(self.dropout, deterministic=deterministic)

    def mix(x_BLD):
      y_BLD, new_state = self.mixer(
        x_BLD, state, segments_BL=segments_BL, deterministic=deterministic
      )
      return drop(place(y_BLD, 'BLD')), new_state

    def work(x_BLD):
      return drop(place(self.feedforward(x_BLD), 'BLD')), None

    residual = self.residual.copy(name='mixer_residual')
    x_BLD, state = residual(x_BLD, mix)
    if self.feedforward is not None:
      residual = self.residual.copy(name='feedforward_residual')
      x_BLD, _ = residual(x_BLD, work)
    return x_BLD, state

  def initial_state(self, batch_size, max_length, width, dtype):
    return self.mixer.initial_state(batch_size, max_length, width, dtype)
