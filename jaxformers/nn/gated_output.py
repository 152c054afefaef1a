"""What follows the recurrence in the layers of the S4 family."""

import difflib
from typing import Literal, get_args

import flax.linen as nn
import jax
from jax import Array
from jaxtyping import Float

from jaxformers.nn.init import Initializer
from jaxformers.nn.init import VarianceScaling
from jaxformers.nn.linear import Linear
from jaxformers.ops.activations import activation

Gate = Literal['full_glu', 'half_glu1', 'half_glu2', 'none']


class GatedOutput(nn.Module):
  """Activation, dropout and a gate, which mix the channels of each token.

  With `x = dropout(f(y))` and s the logistic function

  | gate          | result                             |
  | ------------- | ---------------------------------- |
  | `'full_glu'`  | `dropout((x W_1) * s(x W_2))`      |
  | `'half_glu1'` | `dropout(x * s(x W))`              |
  | `'half_glu2'` | `dropout(y * s(x W))`              |
  | `'none'`      | `x`                                |

  The first is the GLU of S4 and LRU, whose map to 2 D channels has `W_1` and
  `W_2` side by side. S4 takes the exact `'gelu'`; the published code of S5 and
  LRU takes `'gelu_tanh'`, the default of Flax.

  Source: Gu et al., "Efficiently Modeling Long Sequences with Structured State
  Spaces", 2021, arXiv 2111.00396, appendix D.2 (the first); Smith et al.,
  "Simplified State Space Layers for Sequence Modeling", 2022, arXiv 2208.04933,
  and its code https://github.com/lindermanlab/S5, `s5/layers.py` (all).

  Attributes:
    gate: see above.
    activation: name of f, see `jaxformers.ops.activations`.
    dropout: probability of dropping a number, both times.
    tied: whether all tokens of a row drop the same channels, as in the published
      code of all three.
    use_bias: whether the maps have biases.
    initializer: how the maps begin.
  """

  gate: Gate = 'full_glu'
  activation: str = 'gelu'
  dropout: float = 0.0
  tied: bool = False
  use_bias: bool = True
  initializer: Initializer = VarianceScaling()

  @nn.compact
  def __call__(
    self, y_BLD: Float[Array, 'B L D'], *, deterministic: bool = True
  ) -> Float[Array, 'B L D']:
    if self.gate not in get_args(Gate):
      near = difflib.get_close_matches(self.gate, get_args(Gate), 1, 0)
      raise ValueError(
        f'unknown gate {self.gate!r}; did you mean {near[0]!r}? '
        f'Known: {", ".join(get_args(Gate))}.'
      )
    # One layer called twice draws two masks.
    dropout = nn.Dropout(self.dropout, (1,) if self.tied else ())
    x_BLD = dropout(activation(self.activation)(y_BLD), deterministic)
    match self.gate:
      case 'none':
        return x_BLD
      case 'full_glu':
        x_BLD, gate_BLD = self._maps(2, x_BLD)
      case 'half_glu1':
        (gate_BLD,) = self._maps(1, x_BLD)
      case 'half_glu2':
        (gate_BLD,) = self._maps(1, x_BLD)
        x_BLD = y_BLD
    return dropout(x_BLD * jax.nn.sigmoid(gate_BLD), deterministic)

  def _maps(self, number, x_BLD):
    """Maps to as many outputs of equal width by one product."""
    y_BLNE = Linear(
      'DNE',
      (number, x_BLD.shape[-1]),
      self.use_bias,
      self.initializer,
      name='gate_map',
    )(x_BLD)
    return [y_BLNE[..., n, :] for n in range(number)]
