import dataclasses
import json
import math
import types

from flax import linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.train import record as records


@dataclasses.dataclass(frozen=True)
class Rotary:
  base: float = 1e4


@dataclasses.dataclass(frozen=True)
class Named:
  name: str
  note: str | None = None


class Mixer(nn.Module):
  num_heads: int
  position: Rotary | None = None
  kind: Rotary = Rotary()  # a field may bear this name
  dtype: object = jnp.float32


@dataclasses.dataclass(frozen=True)
class Run:
  blocks: tuple[Mixer, ...]
  source: Named = Named('kjv')
  rates: tuple[float, ...] = ()
  limit: float = math.inf


CLASSES = {cls.__name__: cls for cls in (Rotary, Named, Mixer, Run)}
RUN = Run(
  blocks=(
    Mixer(4, position=Rotary(5e5), dtype=jnp.bfloat16),
    Mixer(num_heads=2, kind=Rotary(1.0), name='ignored'),
  ),
  rates=(0.1, 1.0, -math.inf),
)


def through_json(record):
  return json.loads(json.dumps(record, allow_nan=False))


def test_a_record_names_classes_and_leaves_out_what_linen_adds():
  assert records.to_record(Mixer(4, name='x')) == {
    'class': 'Mixer',
    'num_heads': 4,
    'position': None,
    'kind': {'class': 'Rotary', 'base': 1e4},
    'dtype': {'dtype': 'float32'},
  }


def test_a_field_called_name_of_a_plain_dataclass_is_recorded():
  assert records.to_record(Named('kjv'))['name'] == 'kjv'


def test_loading_gives_an_equal_object_after_json():
  record = through_json(records.to_record(RUN))
  loaded = records.from_record(record, CLASSES)
  # `name` of a module is Linen's, not configuration.
  expected = dataclasses.replace(
    RUN, blocks=(RUN.blocks[0], RUN.blocks[1].clone(name=None))
  )
  assert loaded == expected
  assert loaded.blocks[0].dtype is jnp.bfloat16
  assert records.to_record(loaded) == record


@pytest.mark.parametrize('number', [math.inf, -math.inf, 0.1, 1e300, 3.0, 3])
def test_numbers_keep_value_and_type_through_json(number):
  loaded = records.from_record(through_json(records.to_record(number)), {})
  assert loaded == number
  assert type(loaded) is type(number)


def test_nan_survives_json():
  loaded = records.from_record(through_json(records.to_record(math.nan)), {})
  assert math.isnan(loaded)


@pytest.mark.parametrize(
  'dtype', [jnp.bfloat16, np.float16, np.dtype('int8'), jnp.dtype('float32')]
)
def test_every_way_to_write_a_dtype_is_recorded_by_its_name(dtype):
  record = records.to_record(dtype)
  assert record == {'dtype': np.dtype(dtype).name}
  assert records.from_record(record, {}) == dtype


def test_loading_builds_only_given_classes():
  record = {'class': 'os.system', 'command': 'false'}
  with pytest.raises(ValueError, match=r"unknown class 'os.system'\. .*--code"):
    records.from_record(record, CLASSES)


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    (len, 'blocks.0: cannot record a <builtin_function_or_method>'),
    ([1], 'blocks.0: cannot record a <list> .*; use a tuple'),
    (np.float64(1), 'cannot record a <numpy.float64> .*plain Python number'),
    (b'x', 'cannot record a <bytes>'),
    (Named, 'cannot record a <type>'),
    (types.SimpleNamespace(), 'use a frozen dataclass'),
  ],
)
def test_what_cannot_be_recorded_is_refused_with_its_path(value, message):
  with pytest.raises(ValueError, match=message):
    records.to_record(Run(blocks=(value,)))


def test_a_dataclass_that_can_change_is_refused():
  @dataclasses.dataclass
  class Loose:
    x: int = 0

  with pytest.raises(ValueError, match='use a frozen dataclass'):
    records.to_record(Loose())


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {'class': 'Mixr'},
      r"blocks.0: unknown class 'Mixr'; did you mean 'Mixer'",
    ),
    ({'class': ['Mixer']}, 'unknown class'),
    (
      {'num_head': 3},
      r"blocks.0.num_head: Mixer has no field .*'num_heads'\?.*position",
    ),
    ({'dtype': {'dtype': 'float31'}}, "unknown dtype 'float31'; did you mean"),
    ({'dtype': {'dtype': []}}, 'unknown dtype'),
    ({'dtype': {}}, 'blocks.0.dtype: expected a value'),
    ({'parent': None}, "no field 'parent'"),
  ],
)
def test_a_wrong_record_is_refused_with_its_path(change, message):
  record = records.to_record(RUN)
  record['blocks'][0].update(change)
  with pytest.raises(ValueError, match=message):
    records.from_record(record, CLASSES)


def test_a_missing_field_takes_the_default_of_its_class():
  record = {'class': 'Mixer', 'num_heads': 4}
  assert records.from_record(record, CLASSES) == Mixer(4)


def test_a_missing_field_without_default_is_refused():
  with pytest.raises(ValueError, match='^num_heads: the record lacks this fie'):
    records.from_record({'class': 'Mixer'}, CLASSES)


def test_what_a_constructor_raises_gets_the_path():
  @dataclasses.dataclass(frozen=True)
  class Even:
    x: int

    def __post_init__(self):
      if self.x % 2:
        raise ValueError(f'x must be even, got {self.x}.')

  record = [{'class': 'Even', 'x': 2}, {'class': 'Even', 'x': 3}]
  with pytest.raises(ValueError, match=r'^1: x must be even, got 3\.$'):
    records.from_record(record, {'Even': Even})


def test_equal_records_have_no_differences():
  record = records.to_record(RUN)
  assert records.differences(record, through_json(record)) == []


def test_differences_name_path_and_both_values():
  old = records.to_record(RUN)
  other = Run(
    blocks=(RUN.blocks[0].clone(num_heads=8), Mixer(2, kind=Named('a'))),
    source=Named('kjv', note='x'),
    rates=(0.1,),
  )
  assert records.differences(old, records.to_record(other)) == [
    'blocks.0.num_heads: 4 -> 8',
    "blocks.1.kind: Rotary(base=1.0) -> Named(name='a', note=None)",
    "source.note: None -> 'x'",
    'rates: (0.1, 1.0, -inf) -> (0.1,)',
  ]


def test_differences_tell_types_and_absence():
  assert records.differences(1, 1.0) == ['experiment: 1 -> 1.0']
  assert records.differences(True, 1) == ['experiment: True -> 1']
  old, new = {'class': 'A'}, {'class': 'A', 'x': 1}
  assert records.differences(old, new) == ['x: (absent) -> 1']


def test_several_records_are_compared_place_by_place():
  first = {'class': 'A', 'x': 1, 'y': {'class': 'B', 'z': 2}}
  second = {'class': 'A', 'x': 1, 'y': {'class': 'B', 'z': 3}}
  third = {'class': 'A', 'x': 1, 'y': {'class': 'C'}, 'w': None}
  assert records.differing([first, second, first]) == [('y.z', ['2', '3', '2'])]
  assert records.differing([first, second, third]) == [
    ('y', ['B(z=2)', 'B(z=3)', 'C()']),
    ('w', ['(absent)', '(absent)', 'None']),
  ]


def test_the_tree_has_one_pasteable_line_per_value():
  assert list(records.tree(records.to_record(RUN))) == [
    'blocks: tuple',
    '  blocks.0: Mixer',
    '    blocks.0.num_heads=4',
    '    blocks.0.position: Rotary',
    '      blocks.0.position.base=500000.0',
    '    blocks.0.kind: Rotary',
    '      blocks.0.kind.base=10000.0',
    '    blocks.0.dtype=bfloat16',
    '  blocks.1: Mixer',
    '    blocks.1.num_heads=2',
    '    blocks.1.position=None',
    '    blocks.1.kind: Rotary',
    '      blocks.1.kind.base=1.0',
    '    blocks.1.dtype=float32',
    'source: Named',
    '  source.name=kjv',
    '  source.note=None',
    "'rates=(0.1, 1.0, -inf)'",
    'limit=inf',
  ]


def test_the_tree_quotes_what_the_shell_would_take_apart():
  assert list(
    records.tree(records.to_record(Named('And ', note="it's $1")))
  ) == [
    '''"name='And '"''',
    """'note="it'"'"'s $1"'""",
  ]


def test_classes_of_a_module_are_its_public_dataclasses():
  module = types.ModuleType('mine')
  module.Mixer, module.Rotary, module._Hidden = Mixer, Rotary, Named
  module.number, module.Plain = 3, type('Plain', (), {})
  assert records.classes_of(module) == {'Mixer': Mixer, 'Rotary': Rotary}


def test_two_classes_of_one_name_are_refused():
  other = dataclasses.make_dataclass('Rotary', ['x'], frozen=True)
  with pytest.raises(
    ValueError, match='two classes are called Rotary: .*renam'
  ):
    records.merge_classes({'Rotary': Rotary}, {'Rotary': other})
  assert records.merge_classes(CLASSES, {'Rotary': Rotary}) == CLASSES


def test_known_classes_hold_the_library_under_its_names():
  classes = records.known_classes()
  assert {'LanguageModel', 'Attention', 'Rotary', 'Experiment'} <= set(classes)
  assert all(name == cls.__name__ for name, cls in classes.items())
  assert all(c.__module__.startswith('jaxformers.') for c in classes.values())
