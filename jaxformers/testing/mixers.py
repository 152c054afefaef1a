"""The conformance suite of sequence mixers: one table row, all the tests.

```python
class TestMyMixers(MixerConformance):
  cases = (MixerCase('plain', MyMixer(num_heads=2)),)
```

runs under pytest everything that `jaxformers.nn.mixers.Mixer` promises.
"""

import dataclasses
import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.nn.block import Block
from jaxformers.nn.depth import Stack
from jaxformers.nn.depth import unroll
from jaxformers.testing.names import check_parameter_names
from jaxformers.train.record import from_record
from jaxformers.train.record import known_classes
from jaxformers.train.record import to_record
from jaxformers.train.sharding import MeshShape
from jaxformers.train.sharding import batch_sharding
from jaxformers.train.sharding import shardings


@dataclasses.dataclass(frozen=True)
class MixerCase:
  """A row of the conformance table.

  Attributes:
    name: of the row.
    mixer: what is tested.
    width: D of its input.
    tolerance: largest difference between two ways to compute the same in
      float32, for values of unit scale: what reordering sums may change.
    leak: largest derivative by a later input that counts as none: Fourier
      transforms add up numbers of all places, and leave their rounding errors.
    variant: whether it differs from another row in parts only that know nothing
      of transformations. It is then spared scan and remat, vmap, several devices
      and lowering, which the other row shows and which take most of the time.
  """

  name: str
  mixer: nn.Module
  width: int = 16
  tolerance: float = 2e-5
  leak: float = 0.0
  variant: bool = False


# What a variant of another row is spared.
TRANSFORMATIONS = (
  'test_scan_equals_loop_and_remat_equals_plain',
  'test_vmap_equals_loop',
  'test_eight_devices_equal_one',
  'test_it_lowers_for_cpu_cuda_and_tpu',
)
# Nearly all of the time is compiling, once per length: tests share their lengths.
# Lengths of 4 and 8 cut and pack the whole of 12, a batch of 4 suits 2 x 2 devices.
BATCH, LENGTH = 4, 12
CUTS = ((1,) * LENGTH, (4, 8), (8, 4))
PACKED = np.array(
  [
    [1] * 4 + [2] * 8,
    [7] * 8 + [3] * 4,
    [0] + [5] * 8 + [0] * 3,
    [4] * 4 + [0] * 2 + [6] * 4 + [0] * 2,
  ],
  np.int32,
)


class Lab:
  """A mixer with parameters, an input, and compiled ways to run it."""

  def __init__(self, case: MixerCase):
    self.case = case
    self.mixer = case.mixer
    self.key = jax.random.key(0)
    shape = BATCH, LENGTH, case.width
    self.x_BLD = jax.random.normal(jax.random.fold_in(self.key, 1), shape)
    self.variables = jax.jit(self.mixer.init)(self.key, self.x_BLD)
    self.run = jax.jit(self._run)
    self.gradient = jax.jit(jax.value_and_grad(self.loss, argnums=(0, 1)))

  def _run(self, variables, x_BLD, state=None, segments_BL=None):
    return self.mixer.apply(variables, x_BLD, state, segments_BL=segments_BL)

  def state(self, batch=BATCH, length=LENGTH, dtype=jnp.float32):
    """Returns a fresh state."""
    return self.mixer.initial_state(batch, length, self.case.width, dtype)

  def feed(self, x_BLD, cuts, segments_BL=None):
    """Feeds the input in pieces; returns the joined outputs and the state."""
    state, outputs = self.state(), []
    edges = list(itertools.accumulate(cuts, initial=0))
    for start, end in itertools.pairwise(edges):
      piece = None if segments_BL is None else segments_BL[:, start:end]
      y_BLD, state = self.run(self.variables, x_BLD[:, start:end], state, piece)
      outputs.append(y_BLD)
    return jnp.concatenate(outputs, axis=1), state

  def near(self, actual: Any, expected: Any, tolerance: float | None = None):
    """Asserts that two trees agree up to reordered sums."""
    tolerance = self.case.tolerance if tolerance is None else tolerance
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
        np.asarray(a, np.float64),
        np.asarray(b, np.float64),
        rtol=tolerance,
        atol=tolerance,
      ),
      actual,
      expected,
    )

  def loss(self, variables, x_BLD, segments_BL=None):
    """Returns a number that depends on every output."""
    y_BLD, _ = self.mixer.apply(variables, x_BLD, segments_BL=segments_BL)
    return jnp.sum(jnp.sin(y_BLD))


@functools.cache
def lab_of(case: MixerCase) -> Lab:
  """Returns the lab of a case; all tests of a process share it."""
  return Lab(case)


class MixerConformance:
  """Everything that the mixer contract promises, as tests.

  Attributes:
    cases: the table; subclasses set it.
  """

  cases: tuple[MixerCase, ...] = ()

  def pytest_generate_tests(self, metafunc):
    """Runs each test once per row that it concerns."""
    if 'case' not in metafunc.fixturenames:
      return
    name = metafunc.function.__name__
    causal = name.startswith('test_state_')
    transforms = name in TRANSFORMATIONS
    # With `pytest-xdist --dist loadgroup` one worker takes all of a row, so
    # that nothing is compiled twice.
    rows = [
      pytest.param(c, id=c.name, marks=pytest.mark.xdist_group(c.name))
      for c in self.cases
      if (c.mixer.causal or not causal) and not (c.variant and transforms)
    ]
    metafunc.parametrize('case', rows)

  @pytest.fixture
  def lab(self, case: MixerCase) -> Lab:
    """Returns the lab of the row."""
    return lab_of(case)

  def test_outputs_depend_on_later_inputs_only_if_not_causal(self, lab):
    def outputs(x_LD):
      return lab._run(lab.variables, x_LD[None])[0][0].sum(axis=-1)

    jacobian_LMD = jax.jit(jax.jacrev(outputs))(lab.x_BLD[0])
    is_later_LM = np.triu(np.ones((LENGTH, LENGTH), bool), k=1)
    is_felt_LMD = np.abs(np.asarray(jacobian_LMD)) > lab.case.leak
    depends_LM = np.any(is_felt_LMD, axis=-1)
    assert depends_LM[is_later_LM].any() == (not lab.mixer.causal)
    assert depends_LM[~is_later_LM].any()

  def test_state_given_in_any_pieces_gives_the_whole(self, lab):
    whole_BLD, _ = lab.run(lab.variables, lab.x_BLD)
    fed = [lab.feed(lab.x_BLD, cuts) for cuts in CUTS]
    for y_BLD, state in fed:
      lab.near(y_BLD, whole_BLD)
      lab.near(state, fed[0][1])

  def test_state_keeps_its_shapes_and_dtypes(self, lab):
    before = lab.state()
    _, after = lab.run(lab.variables, lab.x_BLD[:, :1], before)
    kinds = [jax.tree.map(jax.typeof, state) for state in (before, after)]
    assert kinds[0] == kinds[1]

  def test_state_is_left_alone_by_padding(self, lab):
    length = LENGTH - 4
    x_BLD = lab.x_BLD[:, :length]
    plain_BLD, plain_state = lab.feed(x_BLD, (length,))
    places = np.array([1, 2, 3, 5, 6, 8, 9, 10])
    segments_BL = np.zeros((BATCH, LENGTH), np.int32)
    segments_BL[:, places] = 1
    spread_BLD = jnp.full_like(lab.x_BLD, jnp.nan).at[:, places].set(x_BLD)
    for cuts in CUTS:
      y_BLD, state = lab.feed(spread_BLD, cuts, segments_BL)
      lab.near(y_BLD[:, places], plain_BLD)
      lab.near(state, plain_state)

  def test_state_lets_rows_differ_in_length(self, lab):
    segments_BL = np.ones((BATCH, LENGTH), np.int32)
    segments_BL[0, 5:9] = 0
    y_BLD, _ = lab.feed(lab.x_BLD, (8, 4), segments_BL)
    whole_BLD, _ = lab.run(lab.variables, lab.x_BLD)
    lab.near(y_BLD[1:], whole_BLD[1:])
    kept = segments_BL[0] == 1
    short_BLD, _ = lab.run(lab.variables, lab.x_BLD[:, kept])
    lab.near(y_BLD[0, kept], short_BLD[0])

  def test_packed_segments_are_as_if_alone(self, lab):
    packed_BLD, _ = lab.run(lab.variables, lab.x_BLD, None, PACKED)
    for row, segments_L in enumerate(PACKED):
      for segment in set(segments_L) - {0}:
        place = segments_L == segment
        alone_BLD, _ = lab.run(lab.variables, lab.x_BLD[:, place])
        lab.near(packed_BLD[row, place], alone_BLD[row])

  def test_state_given_packed_segments_in_pieces_gives_the_whole(self, lab):
    whole_BLD, _ = lab.run(lab.variables, lab.x_BLD, None, PACKED)
    is_token = PACKED != 0
    for cuts in CUTS:
      y_BLD, _ = lab.feed(lab.x_BLD, cuts, PACKED)
      lab.near(y_BLD[is_token], whole_BLD[is_token])

  def test_padding_does_not_leak_whatever_it_holds(self, lab):
    garbage_BLD = jnp.where(PACKED[..., None] == 0, jnp.nan, lab.x_BLD)
    is_token = PACKED != 0
    actual_BLD, _ = lab.run(lab.variables, garbage_BLD, None, PACKED)
    whole_BLD, _ = lab.run(lab.variables, lab.x_BLD, None, PACKED)
    lab.near(actual_BLD[is_token], whole_BLD[is_token])

  def test_bfloat16_is_near_float32(self, lab):
    whole_BLD, _ = lab.run(lab.variables, lab.x_BLD)
    half_BLD, _ = lab.run(lab.variables, lab.x_BLD.astype(jnp.bfloat16))
    assert half_BLD.dtype == jnp.bfloat16
    scale = float(jnp.abs(whole_BLD).max())
    # 8 bits of mantissa, a few products deep.
    lab.near(half_BLD / scale, whole_BLD / scale, 0.04)

  def test_scan_equals_loop_and_remat_equals_plain(self, lab):
    scanned = Stack(Block(lab.mixer), depth=2)
    variables = jax.jit(scanned.init)(lab.key, lab.x_BLD)
    loop = scanned.clone(scan=False)

    def result(stack, params):
      def loss(params):
        y_BLD, _ = stack.apply({'params': params}, lab.x_BLD)
        return jnp.sum(jnp.sin(y_BLD)), y_BLD

      (_, y_BLD), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        params
      )
      return y_BLD, gradient

    params = variables['params']
    y_BLD, gradient = result(scanned, params)
    remat = scanned.clone(remat='nothing_saveable')
    lab.near(result(remat, params), (y_BLD, gradient))
    apply = jax.jit(lambda params: loop.apply({'params': params}, lab.x_BLD)[0])
    lab.near(apply(unroll(params)), y_BLD)

  def test_vmap_equals_loop(self, lab):
    x_ABLD = jnp.stack([lab.x_BLD, lab.x_BLD[:, ::-1]])
    mapped = jax.jit(jax.vmap(lambda x: lab._run(lab.variables, x)[0]))(x_ABLD)
    single = jnp.stack([lab.run(lab.variables, x)[0] for x in x_ABLD])
    lab.near(mapped, single)

  def test_eight_devices_equal_one(self, lab):
    mesh = MeshShape(data=2, fsdp=2, tensor=2).build()
    expected = lab.gradient(lab.variables, lab.x_BLD)
    placed = jax.device_put(lab.variables, shardings(lab.variables, mesh))
    x_BLD = jax.device_put(lab.x_BLD, batch_sharding(mesh, 2))
    lab.near(lab.gradient(placed, x_BLD), expected, 5 * lab.case.tolerance)

  def test_gradients_are_finite_at_length_one_and_where_nothing_is_seen(
    self, lab
  ):
    padding_BL = np.zeros((BATCH, LENGTH), np.int32)
    for result in (
      lab.gradient(lab.variables, lab.x_BLD[:, :1]),
      lab.gradient(lab.variables, lab.x_BLD, padding_BL),
      lab.gradient(lab.variables, jnp.zeros_like(lab.x_BLD)),
    ):
      assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))

  def test_it_lowers_for_cpu_cuda_and_tpu(self, lab):
    function = jax.jit(jax.grad(lab.loss))
    exported = jax.export.export(function, platforms=('cpu', 'cuda', 'tpu'))(
      lab.variables, lab.x_BLD
    )
    assert exported.platforms == ('cpu', 'cuda', 'tpu')

  def test_it_is_its_own_configuration(self, lab):
    assert lab.mixer.clone() == lab.mixer
    assert hash(lab.mixer.clone()) == hash(lab.mixer)
    own = type(lab.mixer)
    classes = {**known_classes(), own.__name__: own}
    assert from_record(to_record(lab.mixer), classes) == lab.mixer

  def test_parameter_names_end_in_dimension_letters(self, lab):
    check_parameter_names(lab.variables['params'])

  def test_a_state_needs_causality(self, lab):
    if not lab.mixer.causal:
      with pytest.raises(ValueError, match='has no state'):
        lab.state()
