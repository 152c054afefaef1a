"""The operators under every model whose memory has a constant size."""

from jaxformers.ops.recurrence.linear import LinearMethod
from jaxformers.ops.recurrence.linear import Recurrence
from jaxformers.ops.recurrence.linear import check_decay
from jaxformers.ops.recurrence.linear import fastest_method
from jaxformers.ops.recurrence.linear import linear_recurrence
from jaxformers.ops.recurrence.linear import sharded_linear_recurrence
from jaxformers.ops.recurrence.outer import Method
from jaxformers.ops.recurrence.outer import Recurred
from jaxformers.ops.recurrence.outer import decay_weights
from jaxformers.ops.recurrence.outer import outer_recurrence
