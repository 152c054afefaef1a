"""Types of command-line values: text in, checked value or a message out."""

import argparse
from collections.abc import Callable
import math


def whole_number(lowest: int) -> Callable[[str], int]:
  """Makes a type for integers with a lower bound.

  Args:
    lowest: The smallest allowed one.

  Returns:
    A function for the `type` of an argument.
  """

  def read(text: str) -> int:
    try:
      value = int(text)
    except ValueError:
      value = lowest - 1
    if value < lowest:
      raise argparse.ArgumentTypeError(
        f'expected a whole number of at least {lowest}, got {text!r}'
      )
    return value

  return read


def number(
  is_allowed: Callable[[float], bool], expected: str
) -> Callable[[str], float]:
  """Makes a type for finite numbers with a condition.

  Args:
    is_allowed: The condition.
    expected: The condition in words.

  Returns:
    A function for the `type` of an argument.
  """

  def read(text: str) -> float:
    try:
      value = float(text)
    except ValueError:
      value = math.nan
    if not (math.isfinite(value) and is_allowed(value)):
      raise argparse.ArgumentTypeError(f'expected {expected}, got {text!r}')
    return value

  return read


def checkpoint(text: str) -> str | int:
  """Reads which checkpoint is meant.

  Args:
    text: `latest`, `best` or a step.

  Returns:
    The word, or the step as a number.
  """
  if text in ('latest', 'best'):
    return text
  try:
    return whole_number(0)(text)
  except argparse.ArgumentTypeError as error:
    raise argparse.ArgumentTypeError(
      f'expected latest, best or the number of a step, got {text!r}'
    ) from error
