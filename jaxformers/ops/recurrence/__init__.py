"""The operators under every model whose memory has a constant size."""

from jaxformers.ops.recurrence.decay import decay_weights
from jaxformers.ops.recurrence.decay import decays_in_segments
from jaxformers.ops.recurrence.linear import LinearMethod
from jaxformers.ops.recurrence.linear import Recurrence
from jaxformers.ops.recurrence.linear import check_decay
from jaxformers.ops.recurrence.linear import fastest_method
from jaxformers.ops.recurrence.linear import linear_recurrence
from jaxformers.ops.recurrence.linear import sharded_linear_recurrence
from jaxformers.ops.recurrence.outer import Method
from jaxformers.ops.recurrence.outer import Recurred
from jaxformers.ops.recurrence.outer import outer_recurrence
from jaxformers.ops.recurrence.outer import sharded_outer_recurrence
from jaxformers.ops.recurrence.short import ShortConvolved
from jaxformers.ops.recurrence.short import sharded_short_convolution
from jaxformers.ops.recurrence.short import short_convolution
from jaxformers.ops.recurrence.ssd import ssd
