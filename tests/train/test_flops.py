"""Counts by hand against counts of the traced program."""

import functools
import types

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jax.sharding import AxisType
import pytest

from jaxformers.nn import LoRA
from jaxformers.ops import LowRank
from jaxformers.train import MeshShape
from jaxformers.train import loop
from jaxformers.train.flops import matmul_flops
from jaxformers.train.flops import model_flops
from jaxformers.train.flops import peak_flops
from jaxformers.train.program import abstract_batch
from jaxformers.train.program import abstract_state
from jaxformers.train.program import build
from jaxformers.train.step import evaluate_step_of
from jaxformers.train.step import train_step_of

x_BD = jnp.ones((4, 8))
w_DE = jnp.ones((8, 8))
PRODUCT = 2 * 4 * 8 * 8


def count(function, *args):
  return matmul_flops(jax.make_jaxpr(function)(*args).jaxpr)


def test_product_counts_twice_its_multiplications():
  assert count(jnp.dot, x_BD, jnp.ones((8, 3))) == 2 * 4 * 3 * 8


def test_batched_contraction_counts_each_batch_element():
  q_BLHK, k_BMHK = jnp.ones((2, 5, 3, 7)), jnp.ones((2, 6, 3, 7))
  scores = functools.partial(jnp.einsum, 'BLHK,BMHK->BHLM')
  assert count(scores, q_BLHK, k_BMHK) == 2 * (2 * 3 * 5 * 6) * 7


def test_elementwise_work_counts_nothing():
  assert count(lambda x: jnp.exp(x) + x**2, x_BD) == 0


def test_closed_programs_and_jit_are_looked_into():
  closed = jax.make_jaxpr(jax.jit(jnp.dot))(x_BD, w_DE)
  assert matmul_flops(closed) == matmul_flops(closed.jaxpr) == PRODUCT


def stack(x_BD, w_DE, remat):
  body = lambda x, _: (jnp.tanh(x @ w_DE), None)
  body = jax.checkpoint(body) if remat else body
  return jax.lax.scan(body, x_BD, length=5)[0].sum()


@pytest.mark.parametrize(('remat', 'products'), [(False, 15), (True, 20)])
def test_gradient_of_a_scan_counts_every_layer_and_recomputation(
  remat, products
):
  loss = functools.partial(stack, remat=remat)
  assert count(loss, x_BD, w_DE) == 5 * PRODUCT
  gradient = jax.grad(loss, argnums=(0, 1))
  assert count(gradient, x_BD, w_DE) == products * PRODUCT


def test_condition_counts_its_most_expensive_branch():
  def choose(x):
    one, two = lambda x: x @ w_DE, lambda x: x @ w_DE @ w_DE
    return jax.lax.switch(1, [one, two, one], x)

  traced = jax.make_jaxpr(lambda i, x: jax.lax.cond(i, choose, jnp.abs, x))
  assert matmul_flops(traced(True, x_BD)) == 2 * PRODUCT


def test_while_loop_counts_once():
  loop = lambda x: jax.lax.while_loop(
    lambda x: x.sum() < 9, lambda x: x @ w_DE, x
  )
  assert count(loop, x_BD) == PRODUCT


def test_custom_derivative_counts_once():
  product = jax.custom_vjp(lambda x: x @ w_DE)
  product.defvjp(lambda x: (x @ w_DE, None), lambda _, g: (g @ w_DE.T,))
  assert count(product, x_BD) == PRODUCT
  total = lambda x: product(x).sum()
  assert count(jax.value_and_grad(total), x_BD) == 2 * PRODUCT
  # The gradient alone does not depend on the product.
  assert count(jax.grad(total), x_BD) == PRODUCT


def test_convolution_counts_its_window():
  image, kernel = jnp.ones((2, 3, 10, 10)), jnp.ones((6, 3, 5, 5))
  convolve = functools.partial(
    jax.lax.conv, window_strides=(1, 1), padding='VALID'
  )
  assert count(convolve, image, kernel) == 2 * (2 * 6 * 6 * 6) * (3 * 5 * 5)


def test_shard_map_counts_all_devices():
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
  product = jax.shard_map(
    lambda x: x @ w_DE,
    mesh=mesh,
    in_specs=jax.P('data'),
    out_specs=jax.P('data'),
  )
  assert count(product, x_BD) == PRODUCT


def test_kernel_counts_its_grid():
  def kernel(x_ref, w_ref, out_ref):
    out_ref[...] = x_ref[...] @ w_ref[...]

  product = pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((4, 8), jnp.float32),
    grid=(2,),
    in_specs=[
      pl.BlockSpec((2, 8), lambda i: (i, 0)),
      pl.BlockSpec((8, 8), lambda i: (0, 0)),
    ],
    out_specs=pl.BlockSpec((2, 8), lambda i: (i, 0)),
    interpret=True,
  )
  assert count(product, x_BD, w_DE) == PRODUCT


@pytest.fixture
def count_steps(tiny):
  """Counts of an experiment: its model, a train step, a forward pass."""

  def counts(model):
    experiment = tiny(model=model, mesh=MeshShape())
    mesh = experiment.mesh.build(jax.devices()[:1])
    state = abstract_state(experiment, mesh)
    batch = abstract_batch(experiment, mesh)
    steps = train_step_of(experiment), evaluate_step_of(experiment)
    needed = model_flops(experiment, state, batch)
    return needed, *(count(step, state, batch) for step in steps)

  return counts


def test_recomputation_is_no_work_of_the_model(tiny, count_steps):
  model = tiny().model
  plain = count_steps(model)
  again = count_steps(
    model.clone(stack=model.stack.clone(remat='nothing_saveable'))
  )
  assert plain[0] == again[0] == 3 * plain[2]
  assert again[1] > plain[1] == plain[0]


def test_the_utilisation_of_a_run_counts_what_its_model_needs(
  tiny, count_steps, monkeypatch
):
  experiment = tiny()
  program = build(experiment, experiment.data.prepare())
  assert loop._meter(program)['flops_per_step'] is None  # Of no use on CPUs.
  monkeypatch.setattr(loop, 'peak_flops', lambda device: 1e12)
  meter = loop._meter(program)
  assert meter['flops_per_step'] == count_steps(experiment.model)[0]
  assert meter['peak_flops'] == 8e12


def test_gradients_that_are_not_taken_are_no_work_of_the_model(
  tiny, count_steps
):
  adapters = LoRA(tiny().model, LowRank(('query',), rank=1))
  needed, step, forward = count_steps(adapters)
  assert needed == step < 2.5 * forward


@pytest.mark.parametrize(
  ('kind', 'tera'),
  [
    ('TPU v4', 275),
    ('TPU v5 lite', 197),
    ('TPU v5', 459),
    ('TPU v6 lite', 918),
    ('TPU7x', 1153.5),
    ('NVIDIA A100-SXM4-80GB', 312),
    ('NVIDIA A10G', 70),
    ('NVIDIA L4', 121),
    ('NVIDIA L40S', 362),
    ('NVIDIA H100 80GB HBM3', 989),
    ('NVIDIA H100 PCIe', 756),
    ('NVIDIA H200', 989),
    ('NVIDIA B200', 2250),
  ],
)
def test_peak_is_found_by_the_kind_of_the_device(kind, tera):
  device = types.SimpleNamespace(device_kind=kind)
  assert peak_flops(device) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize('kind', ['NVIDIA L40', 'TPU v9', 'NVIDIA A1000', ''])
def test_peak_of_an_unknown_device_is_none(kind):
  assert peak_flops(types.SimpleNamespace(device_kind=kind)) is None


def test_peak_of_a_cpu_is_none():
  assert peak_flops(jax.devices('cpu')[0]) is None
