"""The conformance table of the sequence mixers: one row per mixer."""

from jaxformers.nn import LearnedCosineScale
from jaxformers.nn import LearnedRelativeBias
from jaxformers.nn import LearnedSSMax
from jaxformers.nn import LearnedT5Bias
from jaxformers.nn import Normal
from jaxformers.nn import RMSNorm
from jaxformers.nn import UnitNorm
from jaxformers.nn.mixers import LRU
from jaxformers.nn.mixers import RGLRU
from jaxformers.nn.mixers import RTF
from jaxformers.nn.mixers import RWKV4
from jaxformers.nn.mixers import RWKV6
from jaxformers.nn.mixers import S4
from jaxformers.nn.mixers import S4D
from jaxformers.nn.mixers import S5
from jaxformers.nn.mixers import Attention
from jaxformers.nn.mixers import HippoMemory
from jaxformers.nn.mixers import HippoRNN
from jaxformers.nn.mixers import LinearAttention
from jaxformers.nn.mixers import Mamba
from jaxformers.nn.mixers import Mamba2
from jaxformers.nn.mixers import RecurrentBlock
from jaxformers.nn.mixers import Retention
from jaxformers.nn.mixers import RWKV4ChannelMixing
from jaxformers.ops import ALiBi
from jaxformers.ops import Causal
from jaxformers.ops import EntropyNormalizedSoftmax
from jaxformers.ops import InverseSqrt
from jaxformers.ops import LeakyReRoPE
from jaxformers.ops import LegT
from jaxformers.ops import LogLength
from jaxformers.ops import NoMask
from jaxformers.ops import ReRoPE
from jaxformers.ops import Rotary
from jaxformers.ops import Window
from jaxformers.testing import MixerCase
from jaxformers.testing import MixerConformance


class TestMixers(MixerConformance):
  cases = (
    MixerCase('attention', Attention(num_heads=4)),
    MixerCase(
      'attention_encoder', Attention(num_heads=4, mask=NoMask()), variant=True
    ),
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
      variant=True,
    ),
    MixerCase(
      'attention_window',
      Attention(num_heads=2, mask=Window(3), position=Rotary()),
      variant=True,
    ),
    MixerCase(
      'attention_rerope_log_length_t5',
      Attention(
        num_heads=4,
        num_kv_heads=2,
        position=ReRoPE(window=3),
        scale=InverseSqrt() * LogLength(base_length=8, least=2),
        bias=LearnedT5Bias(num_buckets=6, max_distance=5),
      ),
      variant=True,
    ),
    MixerCase(
      'attention_rerope_encoder',
      Attention(
        num_heads=2,
        mask=NoMask(),
        position=ReRoPE(window=3, bidirectional=True),
      ),
      variant=True,
    ),
    MixerCase(
      'attention_leaky_rerope_relative_blockwise',
      Attention(
        num_heads=2,
        position=LeakyReRoPE(window=3, slope=2.5, pairing='interleaved'),
        bias=LearnedRelativeBias(max_distance=2),
        implementation='blockwise',
      ),
      gathers=True,
    ),
    MixerCase(
      'attention_causal_and_window_qk_norm_ssmax_alibi',
      Attention(
        num_heads=2,
        mask=Causal() & Window(4),
        qk_norm=RMSNorm(),
        initializer=Normal(0.3),
        scale=LearnedSSMax(train_length=8),
        bias=ALiBi(),
      ),
      gathers=True,
    ),
    MixerCase(
      'linear_attention_rotary',
      LinearAttention(num_heads=2, position=Rotary(), chunk=5),
    ),
    MixerCase(
      'linear_attention_unnormalised',
      LinearAttention(
        num_heads=2,
        feature='identity',
        normalize=False,
        out_norm=RMSNorm(),
        chunk=5,
      ),
      variant=True,
    ),
    MixerCase(
      'linear_attention_encoder',
      LinearAttention(num_heads=2, causal=False, position=Rotary(), chunk=5),
      variant=True,
    ),
    MixerCase('retention', Retention(num_heads=2, chunk=5)),
    MixerCase(
      'retention_stabilised_recurrent',
      Retention(
        num_heads=2, value_dim=6, stabilise=True, method='recurrent', chunk=5
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
      variant=True,
    ),
    MixerCase(
      'attention_entropy_normalized',
      Attention(num_heads=2, kind=EntropyNormalizedSoftmax(0.6, relative=True)),
      variant=True,
    ),
    MixerCase('hippo_memory', HippoMemory(size=4, chunk=5)),
    MixerCase(
      'hippo_memory_window',
      HippoMemory(size=4, measure=LegT(window=6.0), channels=5, chunk=5),
      variant=True,
    ),
    MixerCase(
      'hippo_rnn', HippoRNN(size=3, memories=2, hidden=6), gathers=True
    ),
    MixerCase(
      'hippo_rnn_window', HippoRNN(size=3, measure=LegT(6.0)), variant=True
    ),
    MixerCase('mamba', Mamba(state_size=2, chunk=5)),
    MixerCase(
      'mamba_constant_zoh_chunked',
      Mamba(
        expand=1,
        state_size=2,
        taps=1,
        selective=False,
        use_bias=True,
        conv_bias=False,
        discretization='zoh',
        method='chunked',
        chunk=5,
      ),
      variant=True,
    ),
    MixerCase('rg_lru', RGLRU(num_heads=2, chunk=5), variant=True),
    MixerCase(
      'recurrent_block',
      RecurrentBlock(width=8, recurrence=RGLRU(num_heads=2, chunk=5)),
    ),
    MixerCase('rwkv4', RWKV4(layer=1, layers=3, chunk=5)),
    MixerCase('rwkv4_chunked', RWKV4(method='chunked', chunk=5), variant=True),
    MixerCase('rwkv4_channel_mixing', RWKV4ChannelMixing(hidden=8)),
    MixerCase('lru', LRU(state_size=6, r_min=0.5)),
    MixerCase(
      'slru_chunked',
      LRU(state_size=6, is_real=True, method='chunked', chunk=5),
      variant=True,
    ),
    MixerCase(
      'lru_encoder', LRU(state_size=6, bidirectional=True), variant=True
    ),
    MixerCase('s5', S5(state_size=8, blocks=2, step_min=0.1, step_max=0.5)),
    MixerCase(
      's5_encoder',
      S5(
        state_size=6,
        blocks=2,
        conj_sym=False,
        bidirectional=True,
        clip_eigs=True,
        discretization='bilinear',
        readout='complex_normal',
        step_min=0.1,
        step_max=0.5,
      ),
      variant=True,
    ),
    MixerCase('s4d', S4D(state_size=6, chunk=5)),
    MixerCase(
      's4d_legs_bilinear_untied_fft',
      S4D(
        state_size=4,
        start='legs',
        discretization='bilinear',
        step_per_mode=True,
        bandlimit=1.0,
        method='fft',
        chunk=5,
      ),
      leak=1e-5,
      variant=True,
    ),
    MixerCase(
      's4d_encoder', S4D(state_size=4, causal=False, chunk=5), variant=True
    ),
    MixerCase('s4', S4(length=16, state_size=6), tolerance=1e-4, leak=1e-5),
    MixerCase(
      's4_longer_legt_shared_encoder',
      S4(length=5, state_size=4, measure='legt', shared=True, causal=False),
      tolerance=1e-4,
      variant=True,
    ),
    MixerCase('rtf', RTF(length=16, state_size=4), tolerance=1e-4, leak=1e-5),
    MixerCase(
      'rtf_longer_encoder',
      RTF(length=5, state_size=3, delay=False, causal=False),
      tolerance=1e-4,
      variant=True,
    ),
    MixerCase(
      'mamba2',
      Mamba2(head_dim=8, state_size=4, groups=2, taps=3, chunk=4),
    ),
    MixerCase(
      'mamba2_norm_first_parallel_chunks',
      Mamba2(
        expand=1,
        head_dim=8,
        state_size=4,
        taps=2,
        step_limit=(0.0, 0.1),
        skip_channels=True,
        norm_first=True,
        conv_bias=False,
        use_bias=True,
        method='parallel_chunks',
        chunk=4,
      ),
      variant=True,
    ),
    MixerCase('rwkv6', RWKV6(num_heads=2, mix_rank=3, decay_rank=5, chunk=4)),
    MixerCase(
      'rwkv5_recurrent',
      RWKV6(
        num_heads=2,
        mix_rank=None,
        decay_rank=None,
        method='recurrent',
        chunk=5,
      ),
      variant=True,
    ),
  )
