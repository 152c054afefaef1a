"""Optimisers and learning rates, on optax."""

from jaxformers.optim.exponentiated_gradient import EGPlusMinus
from jaxformers.optim.exponentiated_gradient import ExponentiatedGradient
from jaxformers.optim.exponentiated_gradient import PlusMinusState
from jaxformers.optim.exponentiated_gradient import eg_plus_minus
from jaxformers.optim.exponentiated_gradient import exponentiate_updates
from jaxformers.optim.exponentiated_gradient import exponentiated_gradient
from jaxformers.optim.optimizer import AdamW
from jaxformers.optim.optimizer import FromOptax
from jaxformers.optim.schedule import Constant
from jaxformers.optim.schedule import WarmupCosine
from jaxformers.optim.schedule import WarmupLinear
from jaxformers.optim.step_size import AdaptStepSize
from jaxformers.optim.step_size import GainState
from jaxformers.optim.step_size import ScaleState
from jaxformers.optim.step_size import adapt_gains
from jaxformers.optim.step_size import adapt_scale
from jaxformers.optim.step_size import adapt_step_size
