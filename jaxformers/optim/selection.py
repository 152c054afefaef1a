"""Parameters chosen by their paths."""

import re
from typing import Any

import jax


def matching(pattern: str, params: Any) -> Any:
  """Returns a tree of True for the parameters whose path matches.

  Args:
    pattern: regular expression, searched for in paths such as
      `embed/table_VD`; '' matches all.
    params: the parameters.

  Raises:
    ValueError: if none matches; lists the paths.
  """
  paths = []

  def matches(path, _):
    paths.append(jax.tree_util.keystr(path, simple=True, separator='/'))
    return re.search(pattern, paths[-1]) is not None

  found = jax.tree_util.tree_map_with_path(matches, params)
  if not any(jax.tree.leaves(found)):
    raise ValueError(
      f'no parameter matches {pattern!r}; there are: {", ".join(paths)}.'
    )
  return found
