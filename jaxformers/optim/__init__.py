"""Optimisers and learning rates, on optax."""

from jaxformers.optim.optimizer import AdamW
from jaxformers.optim.optimizer import FromOptax
from jaxformers.optim.schedule import Constant
from jaxformers.optim.schedule import WarmupCosine
from jaxformers.optim.schedule import WarmupLinear
from jaxformers.optim.tuning_free_l2 import TuningFreeL2
from jaxformers.optim.tuning_free_l2 import tuning_free_l2
