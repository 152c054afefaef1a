"""Sequence mixers: layers that move information between tokens."""

from jaxformers.nn.mixers.attention import Attention
from jaxformers.nn.mixers.attention import AttentionState
from jaxformers.nn.mixers.base import Mixer
from jaxformers.nn.mixers.linear_attention import LinearAttention
from jaxformers.nn.mixers.linear_attention import LinearAttentionState
from jaxformers.nn.mixers.retention import Retention
from jaxformers.nn.mixers.retention import RetentionState
from jaxformers.nn.mixers.rtf import RTF
from jaxformers.nn.mixers.rtf import RTFState
from jaxformers.nn.mixers.s4 import S4
from jaxformers.nn.mixers.s4d import S4D
from jaxformers.nn.mixers.state_space import ModesState
