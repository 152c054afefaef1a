"""Meshes of machines that are not here: their devices, in which order."""

import dataclasses

import numpy as np
import pytest

from jaxformers.train import MeshShape


@dataclasses.dataclass(frozen=True)
class Device:
  """As much of a device as arranging it needs."""

  id: int
  slice_index: int
  process_index: int
  platform: str = 'gpu'
  device_kind: str = 'NVIDIA H100 80GB HBM3'
  coords: tuple[int, ...] = (0, 0, 0)
  core_on_chip: int = 0


def gpus():
  """Three hosts of two GPUs, in no order; XLA gives each host a slice."""
  hosts = [1, 0, 2, 0, 1, 2]
  ids = [3, 0, 5, 1, 2, 4]
  return [Device(i, host, host) for i, host in zip(ids, hosts, strict=True)]


def tpus():
  """Two slices of two chips."""
  kind = {'platform': 'tpu', 'device_kind': 'TPU v5 lite'}
  return [
    Device(2 * s + x, s, s, coords=(x, 0, 0), **kind)
    for s in range(2)
    for x in range(2)
  ]


def ids(shape, devices):
  mesh = shape.build(devices)
  numbers = [device.id for device in mesh.devices.flat]
  return np.reshape(numbers, mesh.devices.shape).squeeze().tolist()


def test_any_axis_may_pass_from_one_host_of_gpus_to_the_next():
  assert ids(MeshShape(), gpus()) == [0, 1, 2, 3, 4, 5]
  assert ids(MeshShape(fsdp=6), gpus()) == [0, 1, 2, 3, 4, 5]
  across = MeshShape(fsdp=2, tensor=3)
  assert ids(across, gpus()) == [[0, 1, 2], [3, 4, 5]]


def test_hosts_of_gpus_may_be_groups_of_their_own():
  hosts = MeshShape(dcn=3, data=1, fsdp=2)
  assert ids(hosts, gpus()) == [[0, 1], [2, 3], [4, 5]]
  halves = MeshShape(dcn=2, fsdp=3)
  assert ids(halves, gpus()) == [[0, 1, 2], [3, 4, 5]]


def test_slices_of_tpus_must_be_groups():
  assert ids(MeshShape(dcn=2, fsdp=2), tpus()) == [[0, 1], [2, 3]]
  with pytest.raises(
    ValueError, match='in 2 slices, so the mesh needs dcn=2, got dcn=1'
  ):
    MeshShape(fsdp=4).build(tpus())
  assert ids(MeshShape(fsdp=2), tpus()[:2]) == [0, 1]
