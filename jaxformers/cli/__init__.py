"""The `jaxformers` command. Importing it loads nothing heavy."""

from jaxformers.cli.program import main as main
