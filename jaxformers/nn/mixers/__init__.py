"""Sequence mixers: layers that move information between tokens."""

from jaxformers.nn.mixers.attention import Attention
from jaxformers.nn.mixers.attention import AttentionState
from jaxformers.nn.mixers.base import Mixer
from jaxformers.nn.mixers.diagonal import DiagonalState
from jaxformers.nn.mixers.linear_attention import LinearAttention
from jaxformers.nn.mixers.linear_attention import LinearAttentionState
from jaxformers.nn.mixers.lru import LRU
from jaxformers.nn.mixers.retention import Retention
from jaxformers.nn.mixers.retention import RetentionState
from jaxformers.nn.mixers.s5 import S5
