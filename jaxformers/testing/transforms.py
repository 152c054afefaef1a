"""The conformance suite of optax transformations: one table row, all the tests.

```python
class TestMyTransforms(TransformConformance):
  cases = (TransformCase('plain', my_transform, (('learning_rate', 0.1),)),)
```

runs under pytest everything that an optimiser of this library promises.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import optax
import pytest

from jaxformers.optim.optimizer import dimension_letters
from jaxformers.train.checkpoint import Checkpoints
from jaxformers.train.sharding import shardings


@dataclasses.dataclass(frozen=True)
class TransformCase:
  """A row of the conformance table.

  Attributes:
    name: of the row.
    factory: takes the hyper-parameters by name, which may be traced arrays (so
      it checks the values of plain numbers only), and returns an optimiser
      that descends. A link that only rewrites gradients needs a step after it:
      `lambda: optax.chain(my_link(), optax.sgd(0.1))`.
    hyperparams: numbers by name, such as `(('learning_rate', 0.1),)`; all of
      them work in `optax.inject_hyperparams`.
    feasible: maps any array to parameters that the transform may have, such as
      `jnp.exp` where they must be positive.
    tasks: the transform combines gradients of so many tasks, stacked along a
      leading axis; None for one gradient.
    steps: until it has converged.
    remains: the largest part of the loss of a quadratic that may remain then.
    tolerance: largest difference between two ways to compute the same.
  """

  name: str
  factory: Callable[..., optax.GradientTransformationExtraArgs]
  hyperparams: tuple[tuple[str, float], ...] = ()
  feasible: Callable[[Array], Array] = lambda x: x
  tasks: int | None = None
  steps: int = 200
  remains: float = 0.01
  tolerance: float = 2e-5

  def transform(self) -> optax.GradientTransformationExtraArgs:
    """Returns the transform with its hyper-parameters."""
    return self.factory(**dict(self.hyperparams))


NETWORK_REMAINS = 0.5
STEPS = 3
SHAPES = {'offset': (), 'inner': {'b_F': (6,), 'w_DF': (4, 6)}}


def _normal(seed: int) -> Any:
  """Returns a parameter tree of normal numbers."""
  leaves, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda x: type(x) is tuple)
  rng = np.random.default_rng(seed)
  arrays = [np.array(rng.normal(size=s), np.float32) for s in leaves]
  return jax.tree.unflatten(treedef, arrays)


def _network(params: Any, x_BD: Array) -> Array:
  inner = params['inner']
  return params['offset'] + jnp.tanh(x_BD @ inner['w_DF'] + inner['b_F'])


def _bias_of(tree: Any) -> Any:
  return {'inner': {'b_F': tree['inner']['b_F']}}


def _kinds(tree: Any) -> Any:
  return jax.tree.map(lambda a: (a.shape, a.dtype), tree)


class Bench:
  """A transform, where it starts, gradients to feed it, and what it does."""

  def __init__(self, case: TransformCase):
    self.case = case
    self.transform = case.transform()
    self.params = self.feasible(_normal(0))
    self.target = self.feasible(_normal(1))
    self.traces: list[Any] = []
    self.gradients = [self.stacked(_normal(2 + i)) for i in range(STEPS)]

  def feasible(self, tree: Any) -> Any:
    """Returns parameters that the transform may have."""
    return jax.tree.map(lambda a: jnp.asarray(self.case.feasible(a)), tree)

  def stacked(self, gradients: Any) -> Any:
    """Returns what the transform takes for these gradients."""
    if self.case.tasks is None:
      return gradients
    return jax.tree.map(
      lambda g: jnp.stack([(1 + task) * g for task in range(self.case.tasks)]),
      gradients,
    )

  @functools.cached_property
  def expected(self) -> tuple[list[Any], Any]:
    """The updates for the gradients one after the other, and the last state."""

    def update(*arguments):
      self.traces.append(arguments)
      return self.transform.update(*arguments)

    return self.run(self.transform._replace(update=update))

  def run(self, transform, gradients=None):
    """Returns the updates for each gradient, and the last state."""

    @jax.jit
    def step(gradient, state, params):
      update, state = transform.update(gradient, state, params)
      return update, state, optax.apply_updates(params, update)

    params, state, updates = self.params, transform.init(self.params), []
    for gradient in self.gradients if gradients is None else gradients:
      update, state, params = step(gradient, state, params)
      updates.append(update)
    return updates, state

  def first(self, transform, gradient, params):
    """Returns the first update."""
    state = transform.init(params)
    return jax.jit(transform.update)(gradient, state, params)[0]

  def near(self, actual: Any, expected: Any) -> None:
    """Asserts that two trees agree up to reordered sums."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    tolerance = self.case.tolerance
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
        a, b, rtol=tolerance, atol=tolerance
      ),
      actual,
      expected,
    )

  def remaining(self, loss: Callable[[Any], Array]) -> float:
    """Returns the loss after training over the loss before."""

    def step(carry, _):
      params, state = carry
      value, gradient = jax.value_and_grad(loss)(params)
      updates, state = self.transform.update(
        self.stacked(gradient), state, params, value=value
      )
      return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(params, state):
      (last, _), _ = jax.lax.scan(step, (params, state), length=self.case.steps)
      return loss(last) / loss(params)

    return float(train(self.params, self.transform.init(self.params)))


@functools.cache
def bench_of(case: TransformCase) -> Bench:
  """Returns the bench of a case; all tests of a process share it."""
  return Bench(case)


class TransformConformance:
  """Everything that an optimiser of this library promises, as tests.

  Attributes:
    cases: the table; subclasses set it.
  """

  cases: tuple[TransformCase, ...] = ()

  def pytest_generate_tests(self, metafunc):
    """Runs each test once per row that it concerns."""
    if 'case' not in metafunc.fixturenames:
      return
    name = metafunc.function.__name__
    rows = [
      # One worker takes all of a row, so that nothing is compiled twice.
      pytest.param(c, id=c.name, marks=pytest.mark.xdist_group(c.name))
      for c in self.cases
      if (c.hyperparams or not name.startswith('test_injected_'))
      and (c.tasks is None or not name.startswith('test_accumulated_'))
    ]
    metafunc.parametrize('case', rows)

  @pytest.fixture
  def bench(self, case: TransformCase) -> Bench:
    """Returns the bench of the row."""
    return bench_of(case)

  def test_it_converges_on_a_quadratic(self, bench):
    def loss(params):
      def of_leaf(p, target):
        curvature = jnp.linspace(0.5, 1.5, p.size).reshape(p.shape)
        return 0.5 * jnp.sum(curvature * (p - target) ** 2)

      return sum(
        jax.tree.leaves(jax.tree.map(of_leaf, params, bench.target)),
        start=jnp.zeros([]),
      )

    assert bench.remaining(loss) <= bench.case.remains

  def test_it_converges_on_a_network(self, bench):
    x_BD = np.random.default_rng(9).normal(size=(32, 4)).astype(np.float32)
    y_BD = _network(bench.target, x_BD)

    def loss(params):
      return jnp.mean((_network(params, x_BD) - y_BD) ** 2)

    assert bench.remaining(loss) <= NETWORK_REMAINS

  def test_it_ignores_unknown_extra_arguments(self, bench):
    state = bench.transform.init(bench.params)
    arguments = bench.gradients[0], state, bench.params
    plain = jax.make_jaxpr(bench.transform.update)(*arguments)
    given = functools.partial(bench.transform.update, unknown='anything')
    assert str(jax.make_jaxpr(given)(*arguments)) == str(plain)

  def test_it_compiles_once(self, bench):
    assert len(bench.expected[0]) == STEPS
    assert len(bench.traces) == 1

  def test_it_keeps_dtypes(self, bench):
    params, gradient = jax.tree.map(
      lambda a: a.astype(jnp.bfloat16), (bench.params, bench.gradients[0])
    )
    before = bench.transform.init(params)
    after = jax.eval_shape(bench.transform.update, gradient, before, params)
    assert _kinds((params, before)) == _kinds(after)

  def test_injected_hyperparams_are_those_of_the_factory(self, bench):
    given = dict(bench.case.hyperparams)
    injected = optax.inject_hyperparams(bench.case.factory)(**given)
    updates, state = bench.run(injected)
    assert given.keys() <= state.hyperparams.keys()
    bench.near(updates, bench.expected[0])

  def test_accumulated_gradients_are_one_step_of_a_chain(self, bench):
    chain = optax.chain(optax.scale(0.5), bench.transform)
    parts = [
      jax.tree.map(lambda g, scale=scale: scale * g, gradient)
      for gradient in bench.gradients
      for scale in (3.0, 1.0)
    ]
    updates, _ = bench.run(optax.MultiSteps(chain, every_k_schedule=2), parts)
    bench.near(updates[1::2], bench.expected[0])
    assert not any(np.any(u) for u in jax.tree.leaves(updates[::2]))

  def test_masked_leaves_are_as_if_absent(self, bench):
    mask = {'offset': False, 'inner': {'b_F': True, 'w_DF': False}}
    masked = optax.masked(bench.transform, mask)
    gradient = bench.gradients[0]
    updates = bench.first(masked, gradient, bench.params)
    expected = bench.first(
      bench.transform, _bias_of(gradient), _bias_of(bench.params)
    )
    bench.near(_bias_of(updates), expected)
    np.testing.assert_array_equal(
      updates['inner']['w_DF'], gradient['inner']['w_DF']
    )

  def test_it_goes_on_from_a_checkpoint(self, bench, tmp_path):
    _, state = bench.expected
    abstract = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
      state,
    )
    with Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(1, state, progress={}, record={})
      restored = checkpoints.restore('latest', abstract).state
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)

  def test_sharded_it_does_the_same_and_gathers_nothing(self, bench):
    mesh = jax.make_mesh(
      (2, 2),
      ('fsdp', 'tensor'),
      (AxisType.Auto,) * 2,
      devices=jax.devices()[:4],
    )
    state = bench.transform.init(bench.params)
    arguments = bench.gradients[0], state, bench.params
    places = tuple(shardings(tree, mesh) for tree in arguments)
    update = jax.jit(
      bench.transform.update, in_shardings=places, out_shardings=places[:0:-1]
    )
    compiled = update.lower(*arguments).compile()
    assert 'all-gather' not in compiled.as_text()
    params, updates = bench.params, []
    for gradient in bench.gradients:
      update, state = compiled(
        *jax.device_put((gradient, state, params), places)
      )
      updates.append(update)
      params = jax.tree.map(np.add, params, update)
    bench.near(updates, bench.expected[0])

  def test_its_state_is_sharded_like_the_parameters(self, bench):
    state = jax.eval_shape(bench.transform.init, bench.params)
    smallest = 24  # of the matrices
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
      letters = dimension_letters(path)
      assert leaf.size < smallest or len(letters) >= 2, (
        f'{jax.tree_util.keystr(path)} of shape {leaf.shape} does not bear the '
        'name of a parameter, so it would be copied to all devices'
      )
