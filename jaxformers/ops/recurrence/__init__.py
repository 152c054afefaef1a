"""The operators under every model whose memory has a constant size."""

from jaxformers.ops.recurrence.convolution import ConvolutionMethod
from jaxformers.ops.recurrence.convolution import Convolved
from jaxformers.ops.recurrence.convolution import Modes
from jaxformers.ops.recurrence.convolution import kernel_convolution
from jaxformers.ops.recurrence.convolution import lti_convolution
from jaxformers.ops.recurrence.convolution import mode_kernel
from jaxformers.ops.recurrence.outer import Method
from jaxformers.ops.recurrence.outer import Recurred
from jaxformers.ops.recurrence.outer import decay_weights
from jaxformers.ops.recurrence.outer import outer_recurrence
from jaxformers.ops.recurrence.stepwise import step_through
