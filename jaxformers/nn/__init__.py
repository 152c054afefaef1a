"""Parameters: thin Linen modules over `jaxformers.ops`."""

from jaxformers.nn.block import Block
from jaxformers.nn.depth import Stack
from jaxformers.nn.embed import Embed
from jaxformers.nn.feedforward import FeedForward
from jaxformers.nn.feedforward import GatedFeedForward
from jaxformers.nn.gated_output import GatedOutput
from jaxformers.nn.head import Head
from jaxformers.nn.head import TiedHead
from jaxformers.nn.init import Normal
from jaxformers.nn.init import VarianceScaling
from jaxformers.nn.linear import Linear
from jaxformers.nn.lora import LoRA
from jaxformers.nn.lora import factored_apply
from jaxformers.nn.lora import low_rank_layer
from jaxformers.nn.norm import LayerNorm
from jaxformers.nn.norm import RMSNorm
from jaxformers.nn.norm import UnitNorm
from jaxformers.nn.position import Hierarchical
from jaxformers.nn.position import Learned
from jaxformers.nn.position import Sinusoidal
from jaxformers.nn.residual import PostNorm
from jaxformers.nn.residual import PreNorm
from jaxformers.nn.score import LearnedCosineScale
from jaxformers.nn.score import LearnedRelativeBias
from jaxformers.nn.score import LearnedSSMax
from jaxformers.nn.score import LearnedT5Bias
