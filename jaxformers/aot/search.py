"""Which meshes and recomputation policies are worth trying."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
import types

from jaxformers.aot.hardware import Topology
from jaxformers.aot.report import Report
from jaxformers.train.experiment import Experiment
from jaxformers.train.sharding import MeshShape

REMAT = 'nothing_saveable', 'dots_with_no_batch_dims_saveable', None
"""Policies, from least memory and most work to the opposite."""


def candidates(
  experiment: Experiment,
  topology: Topology,
  *,
  most_tensor: int = 16,
  fixed: Mapping[str, int] = types.MappingProxyType({}),
) -> Iterator[Experiment]:
  """Yields the experiment with other meshes and recomputation.

  Meshes share the devices of a slice out between `data`, `fsdp` and `tensor`,
  and the first two cut the batch, which must divide. Sequences are cut only
  where that is fixed.

  Args:
    experiment: what is to fit.
    topology: the machine.
    most_tensor: how far heads and hidden units are cut at most.
    fixed: sizes of axes that are not searched.
  """
  sequence = fixed.get('sequence', 1)
  per_slice, rest = divmod(topology.devices, topology.slices * sequence)
  if rest:
    return
  for tensor in _powers(min(most_tensor, per_slice)):
    left = per_slice // tensor
    if per_slice % tensor:
      continue
    for data in _powers(left):
      rows = left * topology.slices * experiment.accumulate
      if left % data or experiment.batch_size % rows:
        continue
      mesh = MeshShape(
        data=data,
        fsdp=left // data,
        tensor=tensor,
        sequence=sequence,
        dcn=topology.slices,
      )
      if any(getattr(mesh, axis) != size for axis, size in fixed.items()):
        continue
      for remat in REMAT if has_remat(experiment) else (None,):
        yield _with(experiment, mesh, remat)


def has_remat(experiment: Experiment) -> bool:
  """Returns whether a model says what its backward pass keeps.

  Args:
    experiment: the run.
  """
  return hasattr(getattr(experiment.model, 'stack', None), 'remat')


def remat_of(experiment: Experiment) -> str | None:
  """Returns the policy of recomputation of a model; None without.

  Args:
    experiment: the run.
  """
  return experiment.model.stack.remat if has_remat(experiment) else None


def _with(experiment, mesh, remat):
  model = experiment.model
  if has_remat(experiment):
    model = model.clone(stack=model.stack.clone(remat=remat))
  return dataclasses.replace(experiment, mesh=mesh, model=model)


def _powers(most: int) -> list[int]:
  return [2**i for i in range(most.bit_length()) if 2**i <= most]


def ranking(reports: Sequence[Report]) -> list[Report]:
  """Orders reports: those that fit, fastest first; then by what is too much.

  Args:
    reports: of the same step on the same machine.
  """

  def order(report):
    if report.fits:
      estimate = report.estimate()
      return 0, estimate['step_seconds_without_overlap']
    return 1, math.inf if report.peak_bytes is None else report.peak_bytes

  return sorted(reports, key=order)
