"""Optimisers and learning rates, on optax, and gradients of penalised losses."""

from jaxformers.optim.adversarial import FGM
from jaxformers.optim.adversarial import PGD
from jaxformers.optim.flood import Flooding
from jaxformers.optim.flood import flood
from jaxformers.optim.gradient_penalty import GradientPenalty
from jaxformers.optim.gradient_penalty import ImplicitRegularization
from jaxformers.optim.gradient_penalty import implicit_regularization
from jaxformers.optim.gradient_penalty import with_gradient_penalty
from jaxformers.optim.gradient_penalty import with_input_gradient_penalty
from jaxformers.optim.optimizer import AdamW
from jaxformers.optim.optimizer import FromOptax
from jaxformers.optim.schedule import Constant
from jaxformers.optim.schedule import WarmupCosine
from jaxformers.optim.schedule import WarmupLinear
