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
from jax import Array
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.aot.hlo import Module
from jaxformers.nn.block import Block
from jaxformers.nn.depth import Stack
from jaxformers.nn.depth import unroll
from jaxformers.testing.names import check_parameter_names
from jaxformers.train.record import from_record
from jaxformers.train.record import known_classes
from jaxformers.train.record import to_record
from jaxformers.train.sharding import MeshShape
from jaxformers.train.sharding import batch_sharding
from jaxformers.train.sharding import on_mesh
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
    leak: largest change by a later input that counts as none: Fourier
      transforms add up numbers of all places, and leave their rounding errors.
    gathers: whether each device reads whole sequences where a mesh cuts them, as
      steps that depend on all before do, unless they are linear.
    variant: whether it differs from another row in parts only that know nothing
      of transformations. It is then spared scan and remat, vmap, gradients through
      states, several devices and lowering, which the other row shows and which
      take most of the time.
  """

  name: str
  mixer: nn.Module
  width: int = 16
  tolerance: float = 2e-5
  leak: float = 0.0
  gathers: bool = False
  variant: bool = False


# What a variant of another row is spared.
TRANSFORMATIONS = (
  'test_scan_equals_loop_and_remat_equals_plain',
  'test_vmap_equals_loop',
  'test_state_takes_gradients_to_the_pieces_before',
  'test_eight_devices_equal_one',
  'test_sequences_that_are_cut_are_not_gathered',
  'test_it_lowers_for_cpu_cuda_and_tpu',
)
# Nearly all of the time is compiling, once per length: tests share the lengths 1,
# 6 and 12. A batch of 4 suits 2 x 2 devices.
BATCH, LENGTH, HALF = 4, 12, 6
# Long beside the states and parameters that devices exchange.
LONG = 256
CUTS = ((1,) * LENGTH, (HALF, HALF), (1, 1, 1, HALF, 1, 1, 1))
PACKED = np.array(
  [
    [1] * HALF + [2] * HALF,
    [0] + [5] * HALF + [0] * 5,
    [0] * 4 + [3] * HALF + [0] * 2,
    [8] * HALF + [0] * HALF,
  ],
  np.int32,
)
ONES = np.ones((BATCH, LENGTH), np.int32)


def floats(tree: Any) -> list[Array]:
  """Returns the leaves that have gradients."""
  leaves = jax.tree.leaves(tree)
  return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]


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
    self.backward = jax.jit(self._backward)

  def _run(self, variables, x_BLD, state=None, segments_BL=None):
    return self.mixer.apply(variables, x_BLD, state, segments_BL=segments_BL)

  def _backward(self, variables, x_BLD, state, bars):
    """Takes gradients back through a piece, from its last state to its first.

    Args:
      variables: of the mixer.
      x_BLD: the piece.
      state: before it.
      bars: gradients for the floating-point leaves of the state after it.

    Returns:
      Gradients for variables, piece and the same leaves of the state before.
    """

    def loss(variables, x_BLD, state):
      y_BLD, state = self._run(variables, x_BLD, state)
      later = map(jnp.vdot, bars, floats(state))
      return jnp.sum(jnp.sin(y_BLD)) + sum(later)

    gradient = jax.grad(loss, argnums=(0, 1, 2), allow_int=True)
    *rest, state_bar = gradient(variables, x_BLD, state)
    return *rest, floats(state_bar)

  def gradient_on(self, mesh):
    """Returns `gradient`, compiled for a mesh."""
    function = jax.value_and_grad(self.loss, argnums=(0, 1))
    return jax.jit(on_mesh(function, mesh))

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

  def loss(self, variables, x_BLD, segments_BL=None, weight_BL1=1.0):
    """Returns a number that depends on every output of some weight."""
    y_BLD, _ = self.mixer.apply(variables, x_BLD, segments_BL=segments_BL)
    return jnp.sum(jnp.sin(y_BLD) * weight_BL1)


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
    before_BLD, _ = lab.run(lab.variables, lab.x_BLD)
    depends_LM = np.zeros((LENGTH, LENGTH), bool)
    for place in range(LENGTH):
      changed_BLD = lab.x_BLD.at[:, place].multiply(-1)
      after_BLD, _ = lab.run(lab.variables, changed_BLD)
      felt_BL = jnp.abs(after_BLD - before_BLD).max(axis=-1) > lab.case.leak
      depends_LM[:, place] = felt_BL.any(axis=0)
    is_later_LM = np.triu(np.ones((LENGTH, LENGTH), bool), k=1)
    assert depends_LM[is_later_LM].any() == (not lab.mixer.causal)
    assert depends_LM.diagonal().all()

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
    x_BLD = lab.x_BLD[:, :HALF]
    plain_BLD, plain_state = lab.feed(x_BLD, (HALF,))
    places = np.array([1, 2, 3, 5, 8, 10])
    segments_BL = np.zeros((BATCH, LENGTH), np.int32)
    segments_BL[:, places] = 1
    spread_BLD = jnp.full_like(lab.x_BLD, jnp.nan).at[:, places].set(x_BLD)
    for cuts in CUTS:
      y_BLD, state = lab.feed(spread_BLD, cuts, segments_BL)
      lab.near(y_BLD[:, places], plain_BLD)
      lab.near(state, plain_state)

  def test_state_lets_rows_differ_in_length(self, lab):
    segments_BL = ONES.copy()
    segments_BL[0, 4:10] = 0
    y_BLD, _ = lab.feed(lab.x_BLD, (HALF, HALF), segments_BL)
    whole_BLD, _ = lab.run(lab.variables, lab.x_BLD)
    lab.near(y_BLD[1:], whole_BLD[1:])
    kept = segments_BL[0] == 1
    short_BLD, _ = lab.run(lab.variables, lab.x_BLD[:, kept])
    lab.near(y_BLD[0, kept], short_BLD[0])

  def test_state_takes_gradients_to_the_pieces_before(self, lab):
    ones_BL1 = np.ones((BATCH, LENGTH, 1), np.float32)
    _, whole = lab.gradient(lab.variables, lab.x_BLD, ONES, ones_BL1)
    pieces = lab.x_BLD[:, :HALF], lab.x_BLD[:, HALF:]
    _, middle = lab.run(lab.variables, pieces[0], lab.state())
    nothing = [jnp.zeros_like(x) for x in floats(middle)]
    last, late_BLD, bars = lab.backward(
      lab.variables, pieces[1], middle, nothing
    )
    first, early_BLD, _ = lab.backward(
      lab.variables, pieces[0], lab.state(), bars
    )
    x_bar_BLD = jnp.concatenate([early_BLD, late_BLD], axis=1)
    parts = jax.tree.map(jnp.add, first, last), x_bar_BLD
    lab.near(parts, whole, 5 * lab.case.tolerance)

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
    is_token = (PACKED != 0)[..., None].astype(np.float32)
    packed = lab.x_BLD, PACKED, is_token
    expected = lab.gradient(lab.variables, *packed)
    mesh = MeshShape(data=1, fsdp=2, tensor=2, sequence=2).build()
    placed = jax.device_put(lab.variables, shardings(lab.variables, mesh))
    packed = jax.device_put(packed, batch_sharding(mesh))
    actual = lab.gradient_on(mesh)(placed, *packed)
    lab.near(actual, expected, 5 * lab.case.tolerance)

  def test_sequences_that_are_cut_are_not_gathered(self, lab):
    mesh = MeshShape(data=2, sequence=4).build()
    there = batch_sharding(mesh)
    x_BLD, segments_BL = (
      jax.ShapeDtypeStruct(shape, dtype, sharding=there)
      for shape, dtype in (
        ((BATCH, LONG, lab.case.width), jnp.float32),
        ((BATCH, LONG), jnp.int32),
      )
    )
    variables = jax.tree.map(
      lambda x, there: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there),
      lab.variables,
      shardings(lab.variables, mesh),
    )
    lowered = lab.gradient_on(mesh).lower(variables, x_BLD, segments_BL)
    found = Module(lowered.compile().as_text()).collectives(island=8)
    # An exchange with one other device gives a device no more than it had.
    found = [c for c in found if c.kind != 'collective-permute']
    whole = x_BLD.size * x_BLD.dtype.itemsize / 2  # rows are cut in two
    largest = max(found, key=lambda c: c.bytes)
    assert (largest.bytes >= whole) == lab.case.gathers, largest

  def test_gradients_are_finite_at_length_one_and_where_nothing_is_seen(
    self, lab
  ):
    ones_BL1 = np.ones((BATCH, LENGTH, 1), np.float32)
    for result in (
      lab.gradient(lab.variables, lab.x_BLD[:, :1]),
      lab.gradient(lab.variables, lab.x_BLD, np.zeros_like(ONES), ones_BL1),
      lab.gradient(lab.variables, jnp.zeros_like(lab.x_BLD), ONES, ones_BL1),
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
