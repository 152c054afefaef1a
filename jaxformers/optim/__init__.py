"""Optimisers and learning rates, on optax."""

from jaxformers.optim.child_tuning import ChildTuningD
from jaxformers.optim.child_tuning import ChildTuningF
from jaxformers.optim.child_tuning import child_tuning_d
from jaxformers.optim.child_tuning import child_tuning_f
from jaxformers.optim.fisher import fisher
from jaxformers.optim.fisher import load_mask
from jaxformers.optim.fisher import save_mask
from jaxformers.optim.fisher import top_fraction_mask
from jaxformers.optim.lora import LoRAPlus
from jaxformers.optim.lora import lora_labels
from jaxformers.optim.lora import lora_plus
from jaxformers.optim.optimizer import AdamW
from jaxformers.optim.optimizer import FromOptax
from jaxformers.optim.schedule import Constant
from jaxformers.optim.schedule import WarmupCosine
from jaxformers.optim.schedule import WarmupLinear
from jaxformers.optim.transformers_adamw import TransformersAdamW
from jaxformers.optim.transformers_adamw import transformers_adamw
