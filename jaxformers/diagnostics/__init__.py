"""Measurements on running models."""

from jaxformers.diagnostics.attention import attention_by_layer
from jaxformers.diagnostics.attention import attention_metrics
from jaxformers.diagnostics.attention import attention_report
from jaxformers.diagnostics.attention import attention_table
