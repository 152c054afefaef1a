"""Compiling ahead of time for machines that are not here."""

from jaxformers.aot.compile import compile_step
from jaxformers.aot.compile import environment
from jaxformers.aot.hardware import CHIPS
from jaxformers.aot.hardware import Chip
from jaxformers.aot.hardware import Topology
from jaxformers.aot.report import Report
from jaxformers.aot.report import table
from jaxformers.aot.search import candidates
from jaxformers.aot.search import ranking
