"""Optimisers and learning rates, on optax."""

from jaxformers.optim.optimizer import AdamW
from jaxformers.optim.optimizer import FromOptax
from jaxformers.optim.schedule import Constant
from jaxformers.optim.schedule import WarmupCosine
from jaxformers.optim.schedule import WarmupLinear
