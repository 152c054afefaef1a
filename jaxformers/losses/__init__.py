"""What is minimised: pure functions."""

from jaxformers.losses.cross_entropy import TokenLosses
from jaxformers.losses.cross_entropy import cross_entropy
