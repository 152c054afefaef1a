"""The first state of a run, taken from another if it says so."""

from typing import Any

import jax

from jaxformers.train.checkpoint import kinds_of
from jaxformers.train.program import Program
from jaxformers.train.state import TrainState


def starting_variables(program: Program) -> dict[str, Any] | None:
  """Reads what a run begins with, None if that is for the seed to say.

  Args:
    program: of the run.

  Raises:
    ValueError: if the variables do not fit the model.
  """
  start = program.experiment.start
  if start is None:
    return None
  base, own = start.variables(), program.abstract_state.variables
  _check(jax.eval_shape(_adopt(program), own, base), own, start)
  return base


def first_state(program: Program, base: dict[str, Any] | None) -> TrainState:
  """Returns the state before the first step.

  Args:
    program: of the run.
    base: what `starting_variables` gave.
  """
  state = program.init()
  if base is None:
    return state
  adopt = _adopt(program)
  optimizer = program.experiment.optimizer.build(program.experiment.steps)

  def begin(state, base):
    variables = dict(adopt(state.variables, base))
    params = variables.pop('params')
    return state._replace(
      params=params,
      frozen=variables.pop('frozen', None),
      statistics=variables,
      optimizer_state=optimizer.init(params),
    )

  places = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
  return jax.jit(begin, out_shardings=places)(state, base)


def _adopt(program):
  take_over = lambda variables, base: {**variables, **base}
  return getattr(program.experiment.model, 'adopt', take_over)


def _check(found: Any, wanted: Any, start: Any) -> None:
  """Raises unless two trees have the same names, shapes and dtypes."""
  there, here = kinds_of(found), kinds_of(wanted)
  for name in sorted(there | here):
    if there.get(name) != here.get(name):
      raise ValueError(
        f'the model cannot begin with {start}: {name} is '
        f'{there.get(name, "absent")} there and {here.get(name, "absent")} '
        'here. Use the model of that run, or wrap it as it is.'
      )
