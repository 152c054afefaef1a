"""Experiments: one file, one claim or one recipe."""
