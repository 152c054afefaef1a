"""Mathematics: pure functions and descriptions over arrays."""

from jaxformers.ops.attention import Attended
from jaxformers.ops.attention import Softmax
from jaxformers.ops.attention import attend
from jaxformers.ops.attention import attend_partial
from jaxformers.ops.masks import Both
from jaxformers.ops.masks import Causal
from jaxformers.ops.masks import Either
from jaxformers.ops.masks import Lengths
from jaxformers.ops.masks import Mask
from jaxformers.ops.masks import NoMask
from jaxformers.ops.masks import Segments
from jaxformers.ops.masks import Window
from jaxformers.ops.norms import layer_norm
from jaxformers.ops.norms import rms_norm
from jaxformers.ops.partial import Partial
from jaxformers.ops.partial import merge
from jaxformers.ops.positions import NoPosition
from jaxformers.ops.positions import Rotary
from jaxformers.ops.positions import rope_frequencies
from jaxformers.ops.positions import rotate
from jaxformers.ops.positions import sinusoidal
from jaxformers.ops.scales import InverseSqrt
