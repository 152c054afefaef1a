"""Sequence mixers: layers that move information between tokens."""

from jaxformers.nn.mixers.attention import Attention
from jaxformers.nn.mixers.attention import AttentionState
from jaxformers.nn.mixers.base import Mixer
