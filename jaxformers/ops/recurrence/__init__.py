"""The operators under every model whose memory has a constant size."""

from jaxformers.ops.recurrence.decay import decay_weights
from jaxformers.ops.recurrence.outer import Method
from jaxformers.ops.recurrence.outer import Recurred
from jaxformers.ops.recurrence.outer import outer_recurrence
from jaxformers.ops.recurrence.outer import sharded_outer_recurrence
