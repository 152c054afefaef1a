"""Measurements on running models."""

from jaxformers.diagnostics.alignment import CosineReport
from jaxformers.diagnostics.alignment import Monitored
from jaxformers.diagnostics.alignment import UpdateReport
from jaxformers.diagnostics.alignment import measurements_of
from jaxformers.diagnostics.alignment import monitor_alignment
from jaxformers.diagnostics.alignment import tree_cosine_report
from jaxformers.diagnostics.alignment import update_report
from jaxformers.diagnostics.attention import attention_by_layer
from jaxformers.diagnostics.attention import attention_metrics
from jaxformers.diagnostics.attention import attention_report
from jaxformers.diagnostics.attention import attention_table
from jaxformers.diagnostics.decays import decay_metrics
from jaxformers.diagnostics.decays import decay_report
from jaxformers.diagnostics.decays import growing_layers
