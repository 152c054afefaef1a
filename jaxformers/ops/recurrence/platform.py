"""Which way a recurrence goes, by the platform that it is compiled for."""

from collections.abc import Callable
from typing import Any

import jax


def by_platform(
  method: str,
  run: Callable[[str], Callable[..., Any]],
  *arrays: Any,
  cpu: str,
  elsewhere: str,
) -> Any:
  """Runs by a method, `'auto'` being that of the platform.

  A program is compiled for one platform, and has the operations of its method
  alone; a program that is exported for several has those of all.

  Source: none; `jax.lax.platform_dependent`.

  Args:
    method: what is asked for.
    run: from a method to the function of the arrays that goes by it.
    *arrays: trees of them.
    cpu: the method that `'auto'` stands for on CPUs.
    elsewhere: what it stands for on accelerators.
  """
  if method != 'auto':
    return run(method)(*arrays)
  return jax.lax.platform_dependent(
    *arrays, cpu=run(cpu), default=run(elsewhere)
  )
