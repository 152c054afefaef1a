"""Attention of running models, measured and laid out."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.diagnostics import attention_by_layer
from jaxformers.diagnostics import attention_metrics
from jaxformers.diagnostics import attention_report
from jaxformers.diagnostics import attention_table
from jaxformers.models import LanguageModel
from jaxformers.nn import Block
from jaxformers.nn import FeedForward
from jaxformers.nn import Stack
from jaxformers.nn.depth import unroll
from jaxformers.nn.mixers import Attention
from jaxformers.ops import AttentionDiagnostics
from jaxformers.ops import InverseSqrt
from jaxformers.ops import LogLength
from jaxformers.ops import Rotary
from jaxformers.ops import Window
from jaxformers.train import NextToken

H, G, K, D = 4, 2, 4, 8
PACKED = np.array([[1] * 4 + [2] * 5, [3] * 7 + [0] * 2], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 11, PACKED.shape)
FULL = Block(Attention(num_heads=2, position=Rotary()))
NEAR = Block(Attention(num_heads=2, mask=Window(3)), FeedForward(hidden=4))


@pytest.fixture(scope='module')
def trained():
  model = LanguageModel(11, D, Stack((FULL, NEAR), depth=4))
  return model, jax.jit(model.init)(jax.random.key(1), TOKENS)


@pytest.fixture(scope='module')
def report(trained):
  model, variables = trained
  return attention_report(model, variables, TOKENS)


def expected_of(params, x_BLD, segments_BL):
  """Entropy, support and deviation of scores per head, by loops in float64.

  Rotary positions as complex numbers; scores grow with log(n) / log(8).
  """
  x = np.asarray(x_BLD, np.float64)
  query = np.einsum('bld,dhk->blhk', x, params['query']['w_DHK'])
  key = np.einsum('bld,dgk->blgk', x, params['key']['w_DGK'])
  theta = 10000.0 ** (-np.arange(K // 2) * 2 / K)
  rows = [[] for _ in range(H)]
  for b, i, h in itertools.product(*map(range, query.shape[:3])):
    seen = [
      j for j in range(i + 1) if segments_BL[b, i] == segments_BL[b, j] != 0
    ]
    if len(seen) < 2:
      continue
    q = query[b, i, h, : K // 2] + 1j * query[b, i, h, K // 2 :]
    scores = []
    for j in seen:
      k = key[b, j, h // (H // G)]
      k = k[: K // 2] + 1j * k[K // 2 :]
      turned = (q * k.conj() * np.exp(1j * theta * (i - j))).real.sum()
      scores.append(turned / np.sqrt(K) * np.log(len(seen)) / np.log(8))
    p = np.exp(scores) / np.exp(scores).sum()
    rows[h].append((-(p @ np.log(p)), 1 / (p @ p), np.std(scores)))
  return np.array([np.mean(row, axis=0) for row in rows]).T


def test_a_report_equals_loops_over_the_projections_of_the_model():
  mixer = Attention(
    num_heads=H,
    head_dim=K,
    num_kv_heads=G,
    position=Rotary(),
    scale=InverseSqrt() * LogLength(8, 1),
    implementation='blockwise',
  )
  x_BLD = jax.random.normal(jax.random.key(0), (*PACKED.shape, D)) * 3
  variables = jax.jit(mixer.init)(jax.random.key(1), x_BLD)
  assert set(variables) == {'params'}
  report = attention_report(mixer, variables, x_BLD, segments_BL=PACKED)
  assert list(report) == ['attention']
  found = report['attention']
  expected = expected_of(variables['params'], x_BLD, PACKED)
  actual = found.entropy, found.effective_support, found.gamma
  np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_scanned_and_unrolled_stacks_give_the_same_report(trained, report):
  model, variables = trained
  assert list(report) == [f'stack/layer_{i}/mixer' for i in range(4)]
  assert {m.shape for row in report.values() for m in row} == {(2,)}
  loop = model.clone(stack=model.stack.clone(scan=False, remat='dots_saveable'))
  params = dict(variables['params'])
  params['stack'] = unroll(params['stack'])
  again = attention_report(loop, {'params': params}, TOKENS)
  assert list(again) == list(report)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    again,
    report,
  )
  # The windows of the odd layers are filled to 3 keys from the third row on.
  np.testing.assert_allclose(
    [measures.visible_keys[0] for measures in report.values()],
    [5.5, 23 / 8] * 2,
    rtol=1e-6,
  )


def test_measuring_changes_no_output_and_costs_nothing_if_not_asked(trained):
  model, variables = trained

  def out(variables, mutable):
    result = model.apply(variables, TOKENS, mutable=mutable)
    return result[0][0], result[1]

  run = jax.jit(out, static_argnames='mutable')
  plain, changed = run(variables, ('losses', 'statistics'))
  assert changed == {}
  measured, changed = run(variables, ('diagnostics',))
  np.testing.assert_array_equal(measured, plain)
  assert len(attention_by_layer(changed['diagnostics'], variables['params']))
  asked, silent = (
    str(jax.make_jaxpr(lambda v, m=m: out(v, m))(variables))
    for m in (('diagnostics',), ('losses',))
  )
  assert 'top_k' in asked
  assert 'top_k' not in silent


def test_blocks_without_attention_keep_their_number():
  block = Block(Silent(), FeedForward(hidden=4))
  model = LanguageModel(11, D, Stack((block, FULL), depth=4))
  variables = jax.jit(model.init)(jax.random.key(1), TOKENS)
  report = attention_report(model, variables, TOKENS)
  assert list(report) == ['stack/layer_1/mixer', 'stack/layer_3/mixer']


class Silent(nn.Module):
  def __call__(self, x_BLD, state=None, *, segments_BL=None, deterministic):
    return x_BLD, state


class Twice(nn.Module):
  @nn.compact
  def __call__(self, x_BLD):
    mixer = Attention(num_heads=1, name='shared')
    return mixer(mixer(x_BLD)[0])


def test_calls_of_one_mixer_are_numbered():
  x_BLD = jnp.ones((1, 2, 2))
  variables = jax.jit(Twice().init)(jax.random.key(0), x_BLD)
  report = attention_report(Twice(), variables, x_BLD)
  assert list(report) == ['shared#0', 'shared#1']


def test_layers_beyond_nine_stay_in_order():
  measures = AttentionDiagnostics(*[jnp.ones(2)] * 11)
  sown = {'attention': (measures,)}
  names = [f'layer_{i}' for i in range(12)]
  report = attention_by_layer(dict.fromkeys(sorted(names), sown), {})
  assert list(report) == names


def test_a_report_of_decoding_sees_the_keys_of_the_state(trained):
  model, variables = trained
  state = model.initial_state(2, 20)
  report = attention_report(model, variables, TOKENS, state)
  seen = [float(m.visible_keys[0]) for m in report.values()]
  assert seen == [5.5, 23 / 8] * 2


def test_evaluation_reports_layer_means_and_training_does_not(trained, report):
  model, variables = trained
  objective = NextToken(diagnostics=True)
  batch = {'tokens': TOKENS, 'segments': PACKED, 'targets': TOKENS}

  def losses(deterministic):
    key = jax.random.key(0)
    return objective.loss(model, variables, batch, key, deterministic)

  assert jax.eval_shape(lambda: losses(False)).metrics == {}
  found = jax.jit(losses, static_argnums=0)(True)
  assert found.variables == {}
  assert set(found.metrics) == set(attention_metrics(report))
  np.testing.assert_allclose(
    found.metrics['stack/layer_2/mixer/entropy'],
    report['stack/layer_2/mixer'].entropy.mean(),
    rtol=1e-5,
  )
  assert all(value.shape == () for value in found.metrics.values())


def test_a_table_has_a_line_per_layer_and_head():
  numbers = np.arange(1, 12) / 8
  both_heads = [np.array([x, 1000 * x], 'f4') for x in numbers]
  table = attention_table({'layer_0': AttentionDiagnostics(*both_heads)})
  names, first, second = (line.split() for line in table.split('\n'))
  assert names[:5] == ['layer', 'head', 'n', 'H', 'H/log']
  assert first == ['layer_0', '0', *(f'{x:.3g}' for x in numbers)]
  assert second == ['layer_0', '1', *(f'{1000 * x:.3g}' for x in numbers)]
  assert len({len(line) for line in table.split('\n')}) == 1


def test_a_model_without_attention_is_refused():
  with pytest.raises(ValueError, match='no layer measured its attention'):
    attention_report(nn.Dense(3), {'params': {
      'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3),
    }}, jnp.ones((1, 2)))  # fmt: skip
