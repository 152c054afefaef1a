"""What is minimised: pure functions."""

from jaxformers.losses.adversarial import fgm_loss
from jaxformers.losses.adversarial import pgd_loss
from jaxformers.losses.adversarial import vat_loss
from jaxformers.losses.cross_entropy import TokenLosses
from jaxformers.losses.cross_entropy import cross_entropy
from jaxformers.losses.flooding import flooding
from jaxformers.losses.gradient_norms import GradientNorms
from jaxformers.losses.gradient_norms import gradient_norm_inequality
from jaxformers.losses.input_gradients import input_gradient_penalty
from jaxformers.losses.input_gradients import noise_penalty
