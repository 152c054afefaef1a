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
from jaxformers.ops.recurrence.rg_lru import GatedRecurred
from jaxformers.ops.recurrence.rg_lru import rg_lru
from jaxformers.ops.recurrence.rg_lru import rg_lru_decay
from jaxformers.ops.recurrence.selective import Discretization
from jaxformers.ops.recurrence.selective import Selected
from jaxformers.ops.recurrence.selective import SelectiveMethod
from jaxformers.ops.recurrence.selective import selective_recurrence
from jaxformers.ops.recurrence.short import ShortConvolved
from jaxformers.ops.recurrence.short import sharded_short_convolution
from jaxformers.ops.recurrence.short import short_convolution
from jaxformers.ops.recurrence.wkv import WKV
from jaxformers.ops.recurrence.wkv import WKVMethod
from jaxformers.ops.recurrence.wkv import WKVState
from jaxformers.ops.recurrence.wkv import wkv
from jaxformers.ops.recurrence.wkv import wkv_state
