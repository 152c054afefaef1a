"""Runs the command line: `python -m jaxformers COMMAND ...`."""

import sys

from jaxformers.cli import main

if __name__ == '__main__':
  sys.exit(main())
