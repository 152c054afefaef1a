from collections.abc import Callable
import dataclasses
import math
from typing import Any, Literal, Protocol

from flax import linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxformers.train.override import override
from jaxformers.train.override import override_all


class Position(Protocol):
  def rotate(self, x): ...


@dataclasses.dataclass(frozen=True)
class Rotary:
  base: float = 1e4

  def rotate(self, x):
    return x


@dataclasses.dataclass(frozen=True)
class Learned:
  length: int = 8

  def rotate(self, x):
    return x


@dataclasses.dataclass(frozen=True)
class Square:
  def __call__(self, x):
    return x**2


class Mixer(nn.Module):
  num_heads: int
  position: Position | None = Rotary()
  activation: Callable[[Any], Any] = Square()
  mode: Literal['auto', 'fast'] = 'auto'


class Block(nn.Module):
  mixer: nn.Module
  feedforward: nn.Module | None = None
  dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class Model:
  width: int
  block: Block | tuple[Block, ...]
  tied: bool = True
  dtype: Any = jnp.float32
  storage: jax.typing.DTypeLike | None = None
  free: Any = None
  rate: Any = 0.5
  shape: tuple[int, int] = (1, 2)
  betas: tuple[float, ...] = (0.9,)

  def __post_init__(self):
    blocks = self.block if isinstance(self.block, tuple) else (self.block,)
    for block in blocks:
      heads = block.mixer.num_heads
      if self.width % heads:
        raise ValueError(f'width {self.width} is not a multiple of {heads}.')


@dataclasses.dataclass(frozen=True)
class Run:
  model: Model
  path: str | None = None
  title: str = 'first'
  steps: int = 10
  lines: str | int = 'all'


CLASSES = {
  cls.__name__: cls for cls in (Rotary, Learned, Square, Mixer, Block, Model)
}
RUN = Run(Model(32, Block(Mixer(4))))
DEEP = Run(Model(32, (Block(Mixer(4)), Block(Mixer(2)))))


def changed(path, text, obj=RUN):
  """Returns the new value at a path, and checks that nothing else changed."""
  new = override(obj, path, text, CLASSES)
  value, old = new, obj
  for name in path.split('.'):
    value, old = (
      (x[int(name)] if isinstance(x, tuple) else getattr(x, name))
      for x in (value, old)
    )
  assert put(new, path.split('.'), old) == obj
  return value


def put(obj, names, value):
  if not names:
    return value
  head, *rest = names
  if isinstance(obj, tuple):
    i = int(head)
    return (*obj[:i], put(obj[i], rest, value), *obj[i + 1 :])
  inner = put(getattr(obj, head), rest, value)
  if isinstance(obj, nn.Module):
    return obj.clone(**{head: inner})
  return dataclasses.replace(obj, **{head: inner})


@pytest.mark.parametrize(
  ('path', 'text', 'expected'),
  [
    ('steps', '20', 20),
    ('steps', '1e3', 1000),
    ('steps', '-3', -3),
    ('model.block.dropout', '1', 1.0),
    ('model.block.dropout', 'inf', math.inf),
    ('model.block.dropout', '-inf', -math.inf),
    ('model.block.mixer.position.base', '5e5', 5e5),
    ('model.tied', 'False', False),
    ('model.dtype', 'bfloat16', jnp.bfloat16),
    ('model.storage', 'bfloat16', jnp.bfloat16),
    ('model.rate', '2', 2.0),
    ('model.free', '7', 7),
    ('model.shape', '(3, 4)', (3, 4)),
    ('model.shape', '[3, 4]', (3, 4)),
    ('model.betas', '(1, 0.5, 0)', (1.0, 0.5, 0.0)),
    ('model.betas', '()', ()),
    ('model.betas.0', '1', 1.0),
    ('path', 'my file.txt', 'my file.txt'),
    ('path', '/data/a-b/c.txt', '/data/a-b/c.txt'),
    ('path', r'C:\new\data.txt', r'C:\new\data.txt'),
    ('path', "'quoted = text'", 'quoted = text'),
    ('path', '2024', '2024'),
    ('path', 'a=b', 'a=b'),
    ('path', 'bfloat16', 'bfloat16'),
    ('title', '', ''),
    ('lines', '3', 3),
    ('lines', 'few', 'few'),
    ('model.block.mixer.mode', 'fast', 'fast'),
    ('model.block.mixer.position', 'None', None),
    ('model.block.mixer.position', 'Learned(length=3)', Learned(3)),
    ('model.block.mixer.activation', 'Square()', Square()),
    (
      'model.block.mixer',
      'Mixer(num_heads=8, position=Rotary(base=2), mode=fast)',
      Mixer(8, Rotary(2.0), mode='fast'),
    ),
    ('model.block', '(Block(mixer=Mixer(num_heads=2)),)', (Block(Mixer(2)),)),
  ],
)
def test_text_is_read_as_its_field_wants_it(path, text, expected):
  value = changed(path, text)
  assert value == expected
  assert type(value) is type(expected)


def test_an_optional_string_can_be_none_again():
  assert changed('path', 'None', Run(RUN.model, path='x')) is None


def test_tuple_indices_lead_into_tuples():
  assert changed('model.block.1.mixer.num_heads', '8', DEEP) == 8


def test_the_old_object_stays_as_it_was():
  before = repr(RUN)
  override(RUN, 'model.block.mixer.num_heads', '8', CLASSES)
  assert repr(RUN) == before


@pytest.mark.parametrize(
  ('setting', 'message'),
  [
    ('steps=2.5', r'^steps: expected int, got 2.5 \(float\)$'),
    ('steps=1e30', 'expected int'),
    ('steps=True', r'^steps: expected int, got True \(bool\)$'),
    ('steps=None', '^steps: expected int, got None$'),
    ("steps='3'", r"expected int, got '3' \(str\)"),
    ('steps=', "^steps: cannot read ''; expected int"),
    ('model.tied=1', r'^model.tied: expected bool, got 1 \(int\)$'),
    ('model.tied=true', "unknown name 'true'; did you mean 'True'"),
    ('model.block.dropout=True', 'expected float, got True'),
    ('model.dtype=3', r'^model.dtype: expected a dtype, got 3 \(int\)$'),
    ('model.dtype=float31', "unknown name 'float31'; did you mean 'float32'"),
    (
      'model.storage=bflot16',
      "unknown name 'bflot16'; did you mean 'bfloat16'",
    ),
    ('model.rate=word', "model.rate: unknown name 'word'"),
    ('model.shape=(1, 2, 3)', r'expected tuple\[int, int\], got \(1, 2, 3\)'),
    ('model.shape=(1, 0.5)', r'expected tuple\[int, int\]'),
    ('title=None', '^title: expected str, got None'),
    ('title=Rotary()', '^title: expected str, got Rotary$'),
    ('path=True', r'^path: expected str or None, got True \(bool\)$'),
    (
      'model.block.mixer.mode=slow',
      "mode: expected one of 'auto', 'fast', got 'slow'",
    ),
    ('model.block.mixer=None', 'model.block.mixer: expected Module, got None'),
    ('model.block.mixer=Rotary()', 'expected Module, got Rotary'),
    (
      'model.block.mixer.position=Square()',
      'expected Position or None, got Squ',
    ),
    (
      'model.block.mixer.position=3',
      r'expected Position or None, got 3 \(int\)',
    ),
    (
      'model.block.mixer.activation=Rotary()',
      'expected .*Callable.*got Rotary',
    ),
    ('model.block.mixer.position=Rotary', r'is a class; write Rotary\(\)'),
    ('model.block.mixer=Mixr()', "unknown class 'Mixr'; did you mean 'Mixer'"),
    (
      'model.block.mixer=Mixer(head=2)',
      "mixer: Mixer has no field 'head'.*num_heads, position, activation, mode",
    ),
    ('model.block.mixer=Mixer(4)', r'by name: Mixer\(num_heads=..., position'),
    ('model.block.mixer=Mixer(**{})', 'by name'),
    (
      'model.block.mixer=Mixer(num_heads=2, num_heads=3)',
      'twice|repeated|cannot',
    ),
    ("model.block.mixer=Mixer(num_heads='a')", 'Mixer.num_heads: expected int'),
    (
      'model.block.mixer=Mixer(num_heads=4, position=Rotary(base=True))',
      'Mixer.position: Rotary.base: expected float, got True',
    ),
    ('model.block.mixer=Mixer()', r"mixer: .*missing.*'num_heads'"),
    ('steps=2**10', r'only literals.*no computations'),
    ('steps=__import__("os")', "unknown class '__import__'"),
    ('steps=Rotary.base', 'only literals'),
    ('steps=-None', 'expected a number'),
    (
      'model.block.mixer.num_heads=5',
      '^model.block.mixer.num_heads: width 32 is',
    ),
    (
      'model.widht=3',
      r"^model.widht: Model has no field .*'width'\?.*: width, bl",
    ),
    ('num_heads=3', r'did you mean model.block.mixer.num_heads\?'),
    ('model.dropout=0.1', r'did you mean model.block.dropout\?'),
    ('model.block.mixer.parent=None', "no field 'parent'"),
    ('model.block.mixer.name=x', "no field 'name'"),
    (
      'model.block.feedforward.x=1',
      r'is None, .*model.block.feedforward=Class',
    ),
    ('steps.x=1', 'steps is 10, which has no fields'),
    (
      'model.shape.2=1',
      'model.shape is a tuple of 2; expected an index below 2',
    ),
    ('model.shape.-1=1', "got '-1'"),
    ('steps', 'is not a setting; write path=value'),
    ('=3', 'is not a setting'),
    ('model..width=3', "has no field ''"),
    ('steps=' + '(' * 5000, 'cannot read'),
  ],
)
def test_a_wrong_setting_is_refused(setting, message):
  with pytest.raises(ValueError, match=message):
    override_all(RUN, [setting], CLASSES)


def test_settings_that_are_valid_only_together_are_applied_together():
  settings = ['model.block.mixer.num_heads=5', 'model.width = 10']
  for given in (settings, settings[::-1]):
    new = override_all(RUN, given, CLASSES)
    assert (new.model.width, new.model.block.mixer.num_heads) == (10, 5)


def test_settings_of_a_tuple_are_applied_together():
  settings = ['model.block.0.mixer.num_heads=8', 'model.block.1.dropout=0.5']
  new = override_all(DEEP, settings, CLASSES)
  assert new.model.block == (Block(Mixer(8)), Block(Mixer(2), dropout=0.5))


def test_a_replaced_slot_takes_the_settings_that_lead_into_it():
  settings = [
    'model.block.mixer.position.length=5',
    'model.block.mixer.position=Learned()',
  ]
  new = override_all(RUN, settings, CLASSES)
  assert new.model.block.mixer.position == Learned(5)


def test_a_path_given_twice_is_refused():
  with pytest.raises(ValueError, match='^steps: set twice'):
    override_all(RUN, ['steps=1', 'steps=2'], CLASSES)


def test_no_settings_change_nothing():
  assert override_all(RUN, [], CLASSES) is RUN


def test_choosing_an_object_does_not_evaluate_its_properties():
  class Sized(Protocol):
    size: int

  @dataclasses.dataclass(frozen=True)
  class File:
    path: str

    @property
    def size(self):
      raise FileNotFoundError(self.path)

  @dataclasses.dataclass(frozen=True)
  class Data:
    file: Sized | None = None

  new = override(Data(), 'file', 'File(path="no such")', {'File': File})
  assert new == Data(File('no such'))
