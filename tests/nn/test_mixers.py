"""The conformance table of the sequence mixers: one row per mixer."""

from jaxformers.nn import LearnedCosineScale
from jaxformers.nn import Normal
from jaxformers.nn import RMSNorm
from jaxformers.nn import UnitNorm
from jaxformers.nn.mixers import Attention
from jaxformers.ops import Causal
from jaxformers.ops import EntropyNormalizedSoftmax
from jaxformers.ops import LeakyReRoPE
from jaxformers.ops import NoMask
from jaxformers.ops import ReRoPE
from jaxformers.ops import Rotary
from jaxformers.ops import Window
from jaxformers.testing import MixerCase
from jaxformers.testing import MixerConformance


class TestMixers(MixerConformance):
  cases = (
    MixerCase('attention', Attention(num_heads=4)),
    MixerCase('attention_encoder', Attention(num_heads=4, mask=NoMask())),
    MixerCase(
      'attention_grouped_rotary',
      Attention(num_heads=4, num_kv_heads=2, position=Rotary()),
    ),
    MixerCase(
      'attention_multi_query_interleaved_partial',
      Attention(
        num_heads=4,
        num_kv_heads=1,
        head_dim=6,
        position=Rotary(pairing='interleaved', rotary_dim=4, base=100.0),
        use_bias=True,
      ),
    ),
    MixerCase(
      'attention_window',
      Attention(num_heads=2, mask=Window(3), position=Rotary()),
    ),
    MixerCase(
      'attention_rerope',
      Attention(num_heads=4, num_kv_heads=2, position=ReRoPE(window=3)),
    ),
    MixerCase(
      'attention_rerope_encoder',
      Attention(
        num_heads=2,
        mask=NoMask(),
        position=ReRoPE(window=3, bidirectional=True),
      ),
    ),
    MixerCase(
      'attention_leaky_rerope_blockwise',
      Attention(
        num_heads=2,
        position=LeakyReRoPE(window=3, slope=2.5, pairing='interleaved'),
        implementation='blockwise',
      ),
    ),
    MixerCase(
      'attention_causal_and_window_qk_norm',
      Attention(
        num_heads=2,
        mask=Causal() & Window(4),
        qk_norm=RMSNorm(),
        initializer=Normal(0.3),
      ),
    ),
    MixerCase(
      'attention_cosine',
      Attention(
        num_heads=4,
        num_kv_heads=2,
        position=Rotary(),
        qk_norm=UnitNorm(),
        scale=LearnedCosineScale(start=3.0),
      ),
    ),
    MixerCase(
      'attention_entropy_normalized',
      Attention(num_heads=2, kind=EntropyNormalizedSoftmax(0.6, relative=True)),
    ),
  )
