"""Measures under the names that they have in other code."""

from jaxformers.ops.hippo.fourier import FouD
from jaxformers.ops.hippo.fourier import FouT
from jaxformers.ops.hippo.laguerre import GeneralLagT
from jaxformers.ops.hippo.laguerre import LagT
from jaxformers.ops.hippo.legendre import ExponentialLegS
from jaxformers.ops.hippo.legendre import LegT
from jaxformers.ops.hippo.measures import Measure

S4_MEASURES: dict[str, Measure] = {
  'legs': ExponentialLegS(),
  'legt': LegT(window=2.0),
  'lagt': LagT(),
  'glagt': GeneralLagT(),
  'fourier': FouT(window=2.0),
  'fourier2': FouT(window=1.0),
  'fourier_decay': FouT(window=2.0, kappa=1.0),
  'fourier_diag': FouD(),
}
"""What the names in the `transition` function of S4's code stand for."""
