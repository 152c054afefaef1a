"""Conformance suites, for this library's parts and for your own."""

from jaxformers.testing.mixers import MixerCase
from jaxformers.testing.mixers import MixerConformance
from jaxformers.testing.names import check_parameter_names
from jaxformers.testing.transforms import TransformCase
from jaxformers.testing.transforms import TransformConformance
