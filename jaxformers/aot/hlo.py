"""Reads compiled programs: what they hold, move and send, loops included.

XLA's own cost analysis counts the body of a loop once, and layers are loops. So
the text of the optimised program is read, whose instructions are those that
run, and each is counted as often as the loops around it run.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
import re

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-broadcast',
  'collective-permute',
)
"""The collectives."""

_INSTRUCTION = re.compile(
  r'\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)'
)
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\](?:\{([^}]*)\})?')
_ARRAY_TEXT = re.compile(r'\w+\[[\d,]*\](?:\{[^}]*\})?')
_TUPLE = re.compile(r'\((?:[^()]|\([^()]*\))*\)')
_BITS = re.compile(r'[a-z]+?(\d+)(?:[a-z]\w*)?$')
# These stand for values that other instructions made.
_NO_TRAFFIC = {
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'while',
  'conditional',
  'call',
  'after-all',
  'partition-id',
  'replica-id',
  'iota',
}


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction of a program.

  Attributes:
    name: its name.
    shape: its result, as written.
    opcode: what it does.
    rest: all that follows its opening bracket.
  """

  name: str
  shape: str
  opcode: str
  rest: str

  @functools.cached_property
  def operands(self) -> tuple[str, ...]:
    """Names of what it takes."""
    return tuple(re.findall(r'%([\w.\-]+)', self.rest.split(')')[0]))

  def attribute(self, name: str) -> str | None:
    """Returns the computation that an attribute names."""
    found = re.search(rf'\b{name}=%?([\w.\-]+)', self.rest)
    return found and found[1]

  @property
  def source(self) -> str:
    """Where in the program it comes from, as JAX named it."""
    found = re.search(r'op_name="([^"]*)"', self.rest)
    return found[1] if found else ''


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective that one device takes part in.

  Attributes:
    kind: one of `KINDS`.
    bytes: of its result, over all rounds of the loops around it.
    sent: bytes that each device sends, if the devices form a ring.
    group: how many devices take part.
    crosses: whether it leaves an island of fast links.
  """

  kind: str
  bytes: float
  sent: float
  group: int
  crosses: bool


@dataclasses.dataclass(frozen=True)
class Buffer:
  """An array that a program makes.

  Attributes:
    bytes: its size on one device.
    shape: as written.
    source: where in the program it comes from.
  """

  bytes: float
  shape: str
  source: str


def array_bytes(shape: str, *, memory_only: bool = False) -> list[float]:
  """Returns the size of each array in a shape, as written in a program.

  Args:
    shape: such as `f32[2,3]{1,0}` or a tuple of such.
    memory_only: whether arrays in on-chip memory count 0 (TPU programs mark
      them by `S(1)` and above).
  """
  sizes = []
  for dtype, dimensions, layout in _ARRAY.findall(shape):
    bits = 8 if dtype == 'pred' else _BITS.match(dtype)
    if bits is None:  # tokens and opaque things
      continue
    bits = bits if isinstance(bits, int) else int(bits[1])
    count = math.prod(int(n) for n in dimensions.split(',') if n)
    away = memory_only and re.search(r'S\([1-9]', layout)
    sizes.append(0 if away else count * bits / 8)
  return sizes


class Module:
  """An optimised program.

  Attributes:
    computations: instructions of each computation, by name.
    entry: name of the one that runs.
    replicas: how many copies of it run.
    partitions: how many devices share out each copy.
  """

  def __init__(self, text: str):
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.entry = ''
    name = None
    for line in text.splitlines():
      head = re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line)
      if head and not line.startswith(' '):
        name = head[2]
        self.computations[name] = {}
        self.entry = name if head[1] else self.entry
      elif line.startswith('}'):
        name = None
      elif name and (found := _INSTRUCTION.match(line)):
        self.computations[name][found[1]] = Instruction(*found.groups())
    if not self.entry:
      raise ValueError('the text is no HLO module: it has no ENTRY.')
    counts = [
      re.search(rf'\b{word}=(\d+)', text.partition('\n')[0])
      for word in ('replica_count', 'num_partitions')
    ]
    self.replicas, self.partitions = (int(c[1]) if c else 1 for c in counts)

  def walk(self) -> Iterator[tuple[str, Instruction, int]]:
    """Yields computation, instruction and how often it runs; not in fusions."""
    yield from self._walk(self.entry, 1, into_fusions=False)

  def _walk(self, name, times, *, into_fusions):
    for instruction in self.computations[name].values():
      yield name, instruction, times
      inner = times
      if instruction.opcode == 'while':
        inner = times * self.rounds(instruction)
        callees = [instruction.attribute('body')]
      elif instruction.opcode == 'fusion' and into_fusions:
        callees = [instruction.attribute('calls')]
      elif instruction.opcode in ('call', 'conditional', 'async-start'):
        callees = self._callees(instruction)
      else:
        continue
      for callee in callees:
        yield from self._walk(callee, inner, into_fusions=into_fusions)

  def _callees(self, instruction):
    """Returns computations that run by themselves: no fusions, no reducers."""
    if instruction.opcode == 'conditional':
      found = re.search(r'branch_computations=\{([^}]*)\}', instruction.rest)
      names = re.findall(r'%?([\w.\-]+)', found[1]) if found else []
      names += [
        name
        for word in ('true_computation', 'false_computation')
        if (name := instruction.attribute(word))
      ]
      # One branch runs; the longest stands for it.
      return sorted(names, key=lambda n: len(self.computations[n]))[-1:]
    name = instruction.attribute('to_apply') or instruction.attribute('calls')
    return [name] if name in self.computations else []

  def rounds(self, loop: Instruction) -> int:
    """Returns how often a loop runs; 1 where the text does not say."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
      return int(known[1])
    # TPU programs compare a counter with a constant in the condition.
    condition = self.computations[loop.attribute('condition')]
    instructions = list(condition.values())
    for instruction in condition.values():
      fused = self.computations.get(instruction.attribute('calls'), {})
      instructions += fused.values()
    bounds = [
      int(found[1])
      for instruction in instructions
      if instruction.opcode == 'constant'
      and re.match(r'[su]32\[\]', instruction.shape)
      and (found := re.match(r'(\d+)\)', instruction.rest))
    ]
    return max(bounds, default=1)

  def collectives(self, island: int, islands: int = 1) -> list[Collective]:
    """Returns all collectives of a program.

    Args:
      island: how many consecutive devices fast links join.
      islands: how many of them there are.
    """
    # One collective may be spread over several fusions, which share its
    # channel: of those the largest counts. Outside of fusions each counts:
    # all that `shard_map` makes have channel 1.
    found = {}
    fused = {
      instruction.attribute('calls')
      for body in self.computations.values()
      for instruction in body.values()
      if instruction.opcode == 'fusion'
    }
    everywhere = self._walk(self.entry, 1, into_fusions=True)
    for computation, instruction, times in everywhere:
      if found_far := self._far(instruction, times, islands):
        found[instruction.name] = found_far
      kind = instruction.opcode.removesuffix('-start')
      if kind not in KINDS:
        continue
      size = times * sum(array_bytes(_result(instruction)))
      channel = re.search(r'channel_id=(\d+)', instruction.rest)
      group, crosses = self._group(kind, instruction.rest, island)
      # TPUs fuse an all-reduce with the slice that is kept of it.
      if kind == 'all-reduce' and computation.startswith('all-reduce-scatter'):
        kind, size = 'reduce-scatter', size / max(group, 1)
      shared = channel and computation in fused
      key = kind, channel[1] if shared else instruction.name
      if key not in found or size > found[key].bytes:
        sent = size * _SENT[kind](group)
        found[key] = Collective(kind, size, sent, group, crosses)
    return [c for c in found.values() if c.group > 1]

  def _far(self, instruction, times, islands):
    """Returns the collective between slices that an instruction sends.

    Programs for several slices of TPUs hand such a one to the host.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
    if instruction.opcode != 'send' or kind is None or islands < 2:
      return None
    kind = kind[1].lower().replace('_', '-')
    size = times * array_bytes(instruction.shape)[0]
    sent = size * _SENT.get(kind, lambda n: 1)(islands)
    return Collective(kind, size, sent, islands, crosses=True)

  def _group(self, kind, text, island):
    """Returns how many devices take part, and whether they are apart."""
    if kind == 'collective-permute':
      pairs = re.search(r'source_target_pairs=\{([\d,{}]*)\}', text)
      pairs = re.findall(r'\{(\d+),(\d+)\}', pairs[0] if pairs else '')
      apart = any(int(a) // island != int(b) // island for a, b in pairs)
      return (2 if any(a != b for a, b in pairs) else 1), apart
    # Without a channel, the devices of each copy keep to themselves.
    shared = self.partitions if 'channel_id=' in text else 1
    members = _members(text, self.replicas * shared)
    return len(members), len({m // island for m in members}) > 1

  def memory_traffic(self) -> float:
    """Returns bytes that one device reads from and writes to its memory.

    An estimate: each instruction reads its operands and writes its result, and
    of arrays that it only takes slices of, the slices.
    """
    return sum(
      times * self._traffic(computation, instruction)
      for computation, instruction, times in self.walk()
    )

  def _traffic(self, computation, instruction):
    opcode = instruction.opcode
    if opcode in _NO_TRAFFIC or opcode.endswith(('-done', '-update')):
      return 0
    shapes = self.computations[computation]
    operands = [shapes[n].shape for n in instruction.operands if n in shapes]
    if opcode in ('dynamic-slice', 'gather', 'slice'):
      return 2 * sum(array_bytes(instruction.shape, memory_only=True))
    if opcode == 'dynamic-update-slice':
      return 2 * sum(array_bytes(operands[1], memory_only=True))
    if opcode == 'fusion':
      return self._fused_traffic(instruction, operands)
    shapes = [instruction.shape, *operands]
    return sum(sum(array_bytes(s, memory_only=True)) for s in shapes)

  def _fused_traffic(self, fusion, operands):
    body = self.computations[fusion.attribute('calls')]
    parameters = {
      int(found[1]): instruction.name
      for instruction in body.values()
      if instruction.opcode == 'parameter'
      and (found := re.match(r'(\d+)\)', instruction.rest))
    }
    total = 0
    written = sum(array_bytes(fusion.shape, memory_only=True))
    for index, shape in enumerate(operands):
      size = sum(array_bytes(shape, memory_only=True))
      users = [i for i in body.values() if parameters.get(index) in i.operands]
      if users and all(u.opcode == 'dynamic-slice' for u in users):
        size = min(size, sum(sum(array_bytes(u.shape)) for u in users))
      elif users and all(
        u.opcode == 'dynamic-update-slice'
        and u.operands[0] == parameters[index]
        for u in users
      ):
        # Only a slice of the result is written, and nothing is read.
        updates = [body[u.operands[1]].shape for u in users]
        written -= size - sum(sum(array_bytes(s)) for s in updates)
        size = 0
      total += size
    return total + max(written, 0)

  def largest_buffers(self, number: int) -> list[Buffer]:
    """Returns the largest arrays that the program makes, each shape once.

    Args:
      number: how many at most.
    """
    best = {}
    for _, instruction, _ in self.walk():
      if instruction.opcode in _NO_TRAFFIC:
        continue
      for shape in _ARRAY_TEXT.findall(instruction.shape):
        size = sum(array_bytes(shape, memory_only=True))
        plain = shape.partition('{')[0]
        if size and plain not in best:
          best[plain] = Buffer(size, plain, instruction.source)
    return sorted(best.values(), key=lambda b: -b.bytes)[:number]


def _result(collective: Instruction) -> str:
  """Returns the shape of what a collective gives, without what it takes."""
  shape = collective.shape
  if collective.opcode in ('all-gather-start', 'collective-permute-start'):
    # (operands, results, ...), where both may be tuples themselves.
    if shape.startswith('(('):
      return _TUPLE.findall(shape[1:])[1]
    return _ARRAY_TEXT.findall(shape)[1]
  return shape


# Bytes that each device of a ring sends, per byte of the result.
_SENT = {
  'all-gather': lambda n: (n - 1) / n,
  'all-reduce': lambda n: 2 * (n - 1) / n,
  'reduce-scatter': lambda n: n - 1,
  'all-to-all': lambda n: (n - 1) / n,
  'ragged-all-to-all': lambda n: (n - 1) / n,
  'collective-broadcast': lambda n: 1,
  'collective-permute': lambda n: 1,
}


def _members(text: str, everyone: int) -> list[int]:
  """Returns the devices of the first group of a collective."""
  groups = re.search(r'replica_groups=(\{\}|\{\{\}\})?', text)
  if groups is None or groups[1]:  # None are named.
    return list(range(everyone))
  if found := re.search(r'replica_groups=\{\{([\d,]*)\}', text):
    return [int(n) for n in found[1].split(',') if n]
  iota = r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?'
  if found := re.search(iota, text):
    groups, sizes = (
      tuple(map(int, part.split(','))) for part in found.groups()[:2]
    )
    return _iota(sizes, _order(found[3], len(sizes)))[: groups[-1]]
  mesh = (
    r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]'
    r'(?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}'
  )
  if found := re.search(mesh, text):
    axes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    sizes = tuple(map(int, axes.values()))
    wanted = [list(axes).index(a) for a in re.findall(r"'(\w+)'", found[4])]
    devices = list(range(math.prod(sizes)))
    if found[2]:
      own = tuple(map(int, found[2].split(',')))
      devices = _iota(own, _order(found[3], len(own)))
    rest = [axis for axis in range(len(sizes)) if axis not in wanted]
    places = _iota(sizes, (*rest, *wanted))
    return [devices[p] for p in places[: math.prod(sizes[a] for a in wanted)]]
  raise ValueError(f'cannot read the groups of a collective: {text[:200]}')


def _order(text: str | None, axes: int) -> tuple[int, ...]:
  """Reads the order of axes of a transposition; None for none."""
  return tuple(map(int, text.split(','))) if text else tuple(range(axes))


def _iota(sizes: tuple[int, ...], order: tuple[int, ...]) -> list[int]:
  """Returns 0, 1, ... in an array of these sizes, its axes in another order."""
  strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
  places = [0]
  for axis in order:
    places = [p + i * strides[axis] for p in places for i in range(sizes[axis])]
  return places
