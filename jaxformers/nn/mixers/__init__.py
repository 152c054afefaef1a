"""Sequence mixers: layers that move information between tokens."""

from jaxformers.nn.mixers.attention import Attention
from jaxformers.nn.mixers.attention import AttentionState
from jaxformers.nn.mixers.base import Mixer
from jaxformers.nn.mixers.linear_attention import LinearAttention
from jaxformers.nn.mixers.linear_attention import LinearAttentionState
from jaxformers.nn.mixers.mamba2 import Mamba2
from jaxformers.nn.mixers.mamba2 import Mamba2State
from jaxformers.nn.mixers.retention import Retention
from jaxformers.nn.mixers.retention import RetentionState
from jaxformers.nn.mixers.rwkv6 import RWKV6
from jaxformers.nn.mixers.rwkv6 import RWKV6State
