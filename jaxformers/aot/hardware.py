"""The machines that programs can be compiled for, and what they can do."""

from collections.abc import Mapping
import dataclasses
import difflib
import math
import re

GIB = 2**30
_H100 = """\
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one device of a generation can do, as JAX counts devices.

  Sources: cloud.google.com/tpu/docs/v4 to /tpu7x, "system architecture" (v4's
  links from its all-reduce bandwidth per pod); NVIDIA's H100 data sheet. What
  a compiler may use of the memory was read from its error messages.

  Attributes:
    name: of the generation.
    platform: `'tpu'` or `'cuda'`.
    memory: bytes that a program may use; of GPUs all, of which programs get
      `memory_fraction`.
    flops: dense bfloat16 operations per second.
    memory_bandwidth: bytes per second.
    link_bandwidth: bytes per second that leave a device over all links to its
      neighbours together.
    axes: dimensions of the torus of links; 1 for a switch.
    network_bandwidth: bytes per second that leave a device for other slices,
      or other hosts of GPUs.
    cores: devices per chip.
    host: devices per host and dimension.
    description: what a GPU compiler must be told.
  """

  name: str
  platform: str
  memory: float
  flops: float
  memory_bandwidth: float
  link_bandwidth: float
  axes: int
  network_bandwidth: float
  cores: int = 1
  host: tuple[int, ...] = (2, 2, 1)
  description: str | None = None

  @property
  def axis_bandwidth(self) -> float:
    """Bytes per second that leave a device along one axis, both ways."""
    return self.link_bandwidth / self.axes


CHIPS = {
  chip.name: chip
  for chip in (
    Chip('v4', 'tpu', 30.75 * GIB, 275e12, 1.23e12, 268e9, 3, 6.25e9),
    Chip('v5e', 'tpu', 15.75 * GIB, 197e12, 0.82e12, 200e9, 2, 3.125e9),
    Chip('v5p', 'tpu', 95.7 * GIB, 459e12, 2.77e12, 600e9, 3, 6.25e9),
    Chip('v6e', 'tpu', 31.2 * GIB, 918e12, 1.64e12, 400e9, 2, 12.5e9),
    Chip(
      'tpu7x', 'tpu', 94.7 * GIB, 1153.5e12, 3.7e12, 300e9, 3, 6.25e9, cores=2
    ),
    Chip(
      'h100',
      'cuda',
      84929347584,
      989e12,
      3.35e12,
      450e9,
      1,
      50e9,
      description=_H100,
    ),
  )
}
"""Generations by name. Network bandwidths of v4, v6e and tpu7x are those of the
network cards of their hosts, shared out, as far as they are published."""


def memory_fraction(chip: Chip, environment: Mapping[str, str]) -> float:
  """Returns how much of the memory of a device JAX gives to programs.

  Of GPUs three quarters, unless XLA_CLIENT_MEM_FRACTION (formerly
  XLA_PYTHON_CLIENT_MEM_FRACTION) says otherwise.

  Args:
    chip: the device.
    environment: variables, as the program will have them.

  Raises:
    ValueError: if what the environment says is no fraction.
  """
  if chip.platform == 'tpu':
    return 1.0
  for name in ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'):
    if text := environment.get(name):
      if not re.fullmatch(r'0?\.\d+|1(\.0*)?', text) or not float(text):
        raise ValueError(f'{name} must be above 0 and at most 1, got {text!r}.')
      return float(text)
  return 0.75


@dataclasses.dataclass(frozen=True)
class Topology:
  """A number of devices of one generation, joined in a certain way.

  Attributes:
    chip: the generation.
    shape: for TPUs chips along each axis of a slice; for GPUs slices, hosts
      per slice and devices per host.
    slices: how many slices only the network joins. TPUs only.
  """

  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1

  @classmethod
  def parse(cls, text: str) -> 'Topology':
    """Reads `v5e:16x16`, `2*v5p:8x8x8` (two slices) or `h100:1x1x8`.

    Raises:
      ValueError: if the text does not name a topology.
    """
    form = r'(?:(\d+)\*)?([a-z]\w*):(\d+(?:x\d+)*)'
    found = re.fullmatch(form, text.strip())
    if not found:
      raise ValueError(
        f'{text!r} is no topology: write GENERATION:SHAPE, such as v5e:16x16 '
        'or v5p:8x8x8, 2*v5e:16x16 for two slices, or h100:1x1x8 (slices x '
        'hosts x devices).'
      )
    chip = CHIPS.get(found[2])
    if chip is None:
      near = difflib.get_close_matches(found[2], CHIPS, 1, 0)[0]
      raise ValueError(
        f'unknown generation {found[2]!r}; did you mean {near!r}? Known are '
        f'{", ".join(CHIPS)}.'
      )
    shape = tuple(map(int, found[3].split('x')))
    dimensions = chip.axes if chip.platform == 'tpu' else 3
    if len(shape) != dimensions or min(shape) < 1:
      raise ValueError(
        f'{chip.name} needs a shape of {dimensions} positive numbers, got '
        f'{found[3]}.'
      )
    slices = int(found[1] or 1)
    if slices < 1 or (slices > 1 and chip.platform != 'tpu'):
      raise ValueError(
        f'{text!r}: only TPUs come in slices, at least one; the first number '
        'of the shape of GPUs counts theirs.'
      )
    return cls(chip, shape, slices)

  @property
  def name(self) -> str:
    """What `parse` reads."""
    text = f'{self.chip.name}:{"x".join(map(str, self.shape))}'
    return text if self.slices == 1 else f'{self.slices}*{text}'

  @property
  def chips(self) -> int:
    """How many chips there are."""
    return math.prod(self.shape) * self.slices

  @property
  def devices(self) -> int:
    """How many devices there are, as JAX counts them."""
    return self.chips * self.chip.cores

  @property
  def island(self) -> int:
    """How many devices fast links join: a slice, or a host of GPUs."""
    if self.chip.platform == 'tpu':
      return self.devices // self.slices
    return self.shape[-1]
