"""Sequence mixers: layers that move information between tokens."""

from jaxformers.nn.mixers.attention import Attention
from jaxformers.nn.mixers.attention import AttentionState
from jaxformers.nn.mixers.base import Mixer
from jaxformers.nn.mixers.diagonal import DiagonalState
from jaxformers.nn.mixers.griffin import RGLRU
from jaxformers.nn.mixers.griffin import RecurrentBlock
from jaxformers.nn.mixers.griffin import RecurrentBlockState
from jaxformers.nn.mixers.griffin import RGLRUState
from jaxformers.nn.mixers.hippo_memory import HippoMemory
from jaxformers.nn.mixers.hippo_memory import HippoMemoryState
from jaxformers.nn.mixers.hippo_rnn import HippoRNN
from jaxformers.nn.mixers.hippo_rnn import HippoRNNState
from jaxformers.nn.mixers.linear_attention import LinearAttention
from jaxformers.nn.mixers.linear_attention import LinearAttentionState
from jaxformers.nn.mixers.lru import LRU
from jaxformers.nn.mixers.mamba import Mamba
from jaxformers.nn.mixers.mamba import MambaState
from jaxformers.nn.mixers.retention import Retention
from jaxformers.nn.mixers.retention import RetentionState
from jaxformers.nn.mixers.rwkv4 import RWKV4
from jaxformers.nn.mixers.rwkv4 import RWKV4ChannelMixing
from jaxformers.nn.mixers.rwkv4 import RWKV4State
from jaxformers.nn.mixers.rwkv4 import TokenShiftState
from jaxformers.nn.mixers.s5 import S5
from jaxformers.nn.mixers.short import ShortConvolution
