"""The rule that parameter names carry their dimension letters."""

from typing import Any

import jax

from jaxformers.optim.optimizer import dimension_letters


def check_parameter_names(params: Any, stacked: int = 0) -> None:
  """Asserts that names end in one letter per axis, none of them twice.

  Args:
    params: parameters or their shapes.
    stacked: leading axes that scanning layers put in front of each.

  Raises:
    AssertionError: naming each parameter that breaks the rule.
  """
  wrong = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    letters = dimension_letters(path)
    if len(letters) != leaf.ndim - stacked or len(set(letters)) < len(letters):
      wrong.append(f'{jax.tree_util.keystr(path)} of shape {leaf.shape}')
  assert not wrong, (
    'parameter names must end in one letter per axis, none twice: '
    + '; '.join(wrong)
  )
