"""What a program will ask of a machine, and whether it fits."""

import dataclasses
from typing import Any

from jaxformers.aot.hardware import Topology
from jaxformers.train.holdings import readable


@dataclasses.dataclass(frozen=True)
class Part:
  """An array, or several that belong together, on one device.

  Attributes:
    name: what it is.
    bytes: its size.
  """

  name: str
  bytes: float


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What one device sends by collectives of one kind in a step.

  Attributes:
    kind: `all-gather`, `all-reduce`, ...
    bytes: of results.
    sent: that leave the device over fast links, on a ring.
    sent_far: that leave it over the network between slices or hosts.
    count: collectives in the program; those in loops count once.
  """

  kind: str
  bytes: float
  sent: float
  sent_far: float
  count: int


@dataclasses.dataclass(frozen=True)
class Report:
  """What compiling a step for a machine has shown.

  All bytes and operations are those of one device and one step.

  Attributes:
    program: what was compiled, such as `train` or `decode`.
    topology: the machine, as `Topology.parse` reads it.
    mesh: size of each axis.
    versions: of JAX and of the compiler.
    fits: whether it fits the memory.
    peak_bytes: largest amount of memory in use; None where it does not fit and
      the compiler does not say what it needs.
    parts: what lies in memory from step to step, largest first.
    buffers: the largest arrays that the program makes; where it does not fit,
      the largest allocations that the compiler names.
    flops: operations of matrix products, recomputation included.
    model_flops: those that the model needs, see `train.flops.model_flops`.
    memory_traffic: bytes read and written, an estimate.
    traffic: collectives by kind.
    tokens: tokens per step, over all devices.
    seconds_to_compile: on the machine that compiled it.
    copied_whole: how often the compiler said that it had to copy an array to
      all devices because it knew no way from one placement to another.
    remat: what the stack keeps for the backward pass, see `nn.Stack`; None for
      all, or where there is no stack.
    memory_fraction: how much of the memory programs get, see
      `hardware.memory_fraction`.
  """

  program: str
  topology: str
  mesh: dict[str, int]
  versions: dict[str, str]
  fits: bool
  peak_bytes: float | None
  parts: tuple[Part, ...]
  buffers: tuple[Part, ...]
  flops: float
  model_flops: float
  memory_traffic: float
  traffic: tuple[Traffic, ...]
  tokens: int
  seconds_to_compile: float
  copied_whole: int = 0
  remat: str | None = None
  memory_fraction: float = 1.0

  @classmethod
  def from_json(cls, tree: dict[str, Any]) -> 'Report':
    """Builds a report from what `to_json` gave."""
    tree = {k: v for k, v in tree.items() if k != 'estimate'}
    tree['parts'] = tuple(Part(**p) for p in tree['parts'])
    tree['buffers'] = tuple(Part(**p) for p in tree['buffers'])
    tree['traffic'] = tuple(Traffic(**t) for t in tree['traffic'])
    return cls(**tree)

  def to_json(self) -> dict[str, Any]:
    """Returns plain values, with the estimate of the step beside them."""
    tree = dataclasses.asdict(self)
    return {**tree, 'estimate': self.estimate() if self.fits else None}

  @property
  def machine(self) -> Topology:
    """The machine."""
    return Topology.parse(self.topology)

  @property
  def memory(self) -> float:
    """Bytes of memory that a device has for programs."""
    return self.memory_fraction * self.machine.chip.memory

  def seconds(self) -> dict[str, float]:
    """Returns how long each resource is busy in a step, at its peak rate."""
    chip = self.machine.chip
    return {
      'compute': self.flops / chip.flops,
      'memory': self.memory_traffic / chip.memory_bandwidth,
      'links': sum(t.sent for t in self.traffic) / chip.axis_bandwidth,
      'network': sum(t.sent_far for t in self.traffic) / chip.network_bandwidth,
    }

  def estimate(self) -> dict[str, float]:
    """Returns the roofline of a step.

    `step_seconds` is the time of the busiest resource, as if all overlapped;
    `step_seconds_without_overlap` the sum. Utilisation is that of the peak by
    `model_flops`, in the first case. Collectives are taken to use one axis of
    the torus at a time, in both directions.
    """
    seconds = self.seconds()
    least, most = max(seconds.values()), sum(seconds.values())
    return {
      **{f'{name}_seconds': value for name, value in seconds.items()},
      'step_seconds': least,
      'step_seconds_without_overlap': most,
      'utilisation': self.model_flops / self.machine.chip.flops / least,
      'tokens_per_second': self.tokens / least,
    }

  def verdict(self) -> str:
    """Says whether it fits, and if not by how much and what to change."""
    if self.fits:
      room = self.memory - self.peak_bytes
      return (
        f'fits: {readable(self.peak_bytes)} of {readable(self.memory)} per device, '
        f'{readable(room)} to spare'
      )
    kept = sum(part.bytes for part in self.parts)
    if kept > self.memory / 2:
      advice = (
        f'parameters and optimiser alone take {readable(kept)}: share them out '
        'among more devices (--mesh fsdp=..., tensor=...)'
      )
    else:
      advice = (
        'most is activations: recompute them (--set model.stack.remat='
        "'nothing_saveable'), cut the batch (--set accumulate=..., "
        'batch_size=...) or share it out (--mesh)'
      )
    too_much = 'the compiler does not say by how much'
    if self.peak_bytes is not None:
      over = self.peak_bytes - self.memory
      too_much = f'{readable(over)} too much per device'
    return f'does not fit: {too_much}; {advice}'


def table(report: Report) -> str:
  """Returns a report as text for people.

  Args:
    report: the report.
  """
  machine, mesh = report.machine, report.mesh
  axes = ' '.join(f'{k}={n}' for k, n in mesh.items() if n > 1) or 'one device'
  versions = ', '.join(f'{k} {v}' for k, v in report.versions.items())
  remat = f', remat={report.remat}' if report.remat else ''
  lines = [
    f'{report.program} step on {report.topology} ({machine.devices} devices, '
    f'{axes}{remat})',
    f'compiled in {report.seconds_to_compile:.1f} s by {versions}',
    '',
    report.verdict(),
    *_warned(report),
    *_listed('kept from step to step', report.parts),
    *_listed('largest arrays of the program', report.buffers),
  ]
  if report.fits:
    lines += ['', *_resources(report)]
  return '\n'.join(lines)


def _warned(report):
  lines = []
  if report.memory_fraction < 1:
    lines.append(
      f'JAX gives programs {report.memory_fraction:.0%} of the memory of a GPU; '
      'XLA_CLIENT_MEM_FRACTION changes that, here and there.'
    )
  if report.copied_whole:
    lines.append(
      f'the compiler copied {report.copied_whole} arrays to all devices for want '
      'of a better way ("involuntary full rematerialization"): try another '
      'mesh.'
    )
  return lines


def _listed(title, parts):
  if not parts:
    return []
  return ['', f'{title}:'] + [
    f'{readable(p.bytes):>12}  {p.name}' for p in parts
  ]


def _resources(report):
  estimate, seconds = report.estimate(), report.seconds()
  amounts = {
    'compute': f'{report.flops / 1e12:.3f} TFLOP',
    'memory': f'{readable(report.memory_traffic)} read and written',
    'links': f'{readable(sum(t.sent for t in report.traffic))} sent',
    'network': f'{readable(sum(t.sent_far for t in report.traffic))} sent',
  }
  lines = ['per device and step, at peak rates:']
  for name, amount in amounts.items():
    lines.append(f'{1e3 * seconds[name]:>9.3f} ms  {name:<8} {amount}')
  for t in report.traffic:
    lines.append(
      f'{readable(t.bytes):>12}  {t.kind} ({t.count} in the program)'
    )
  least, most = (
    1e3 * estimate[name]
    for name in ('step_seconds', 'step_seconds_without_overlap')
  )
  return lines + [
    '',
    f'a step takes {least:.3f} ms if all of this overlaps, {most:.3f} ms if '
    'nothing does;',
    f'then {estimate["tokens_per_second"]:,.0f} tokens/s at most, '
    f'{estimate["utilisation"]:.0%} of the peak. An estimate: collectives use '
    'one',
    'axis of the torus at a time, and kernels run at the peak of the busiest '
    'resource.',
  ]
