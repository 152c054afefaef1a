"""Transformer research techniques in JAX, as interchangeable parts."""

__version__ = '0.1.0'
