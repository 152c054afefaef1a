"""Language models: heads, positions, states, packing, dtypes, export."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.models import LanguageModel
from jaxformers.nn import Block
from jaxformers.nn import Embed
from jaxformers.nn import FeedForward
from jaxformers.nn import Head
from jaxformers.nn import Learned
from jaxformers.nn import PostNorm
from jaxformers.nn import Sinusoidal
from jaxformers.nn import Stack
from jaxformers.nn import TiedHead
from jaxformers.nn.mixers import Attention
from jaxformers.ops import NoMask
from jaxformers.ops import Rotary
from jaxformers.testing import check_parameter_names

VOCABULARY, WIDTH, BATCH, LENGTH = 11, 8, 2, 10
BLOCK = Block(Attention(num_heads=2), FeedForward(hidden=16))
ROTARY = Block(
  Attention(num_heads=2, num_kv_heads=1, position=Rotary()),
  FeedForward(hidden=16),
)
MODELS = {
  'tied_rotary': LanguageModel(VOCABULARY, WIDTH, Stack(ROTARY, 2)),
  'learned_post_norm': LanguageModel(
    VOCABULARY,
    WIDTH,
    Stack(BLOCK.clone(residual=PostNorm()), 2),
    position=Learned(max_length=LENGTH),
    norm=None,
    head=Head(use_bias=True),
  ),
  'sinusoidal_scaled': LanguageModel(
    VOCABULARY,
    WIDTH,
    Stack(BLOCK, 2),
    embed=Embed(scale_by_width=True),
    position=Sinusoidal(),
    head=TiedHead(use_bias=True),
  ),
}
TOKENS = jax.random.randint(jax.random.key(0), (BATCH, LENGTH), 0, VOCABULARY)


@pytest.fixture(params=MODELS, scope='module')
def trained(request):
  model = MODELS[request.param]
  variables = jax.jit(model.init)(jax.random.key(1), TOKENS)
  # Large enough that positions and biases matter.
  noise = jax.random.key(2)
  variables = jax.tree.map(
    lambda a: a + 0.3 * jax.random.normal(noise, a.shape), variables
  )
  run = jax.jit(
    lambda tokens, state=None, segments=None: model.apply(
      variables, tokens, state, segments_BL=segments
    )
  )
  return model, variables, run


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_pieces_give_the_whole(trained):
  model, _, run = trained
  whole, none = run(TOKENS)
  assert none is None
  for cuts in ((4, 6), (1,) * LENGTH):
    state, outputs, start = model.initial_state(BATCH, LENGTH), [], 0
    for size in cuts:
      logits, state = run(TOKENS[:, start : start + size], state)
      outputs.append(logits)
      start += size
    close(jnp.concatenate(outputs, axis=1), whole)


def test_packed_documents_are_as_if_alone(trained):
  _, _, run = trained
  segments = jnp.array([[1] * 4 + [2] * 6, [3] * 6 + [0] * 4], jnp.int32)
  packed, _ = run(TOKENS, None, segments)
  close(packed[0, 4:], run(TOKENS[:, 4:])[0][0])
  close(packed[1, :6], run(TOKENS[:, :6])[0][1])


def test_logits_are_float32_and_bfloat16_models_are_near(trained):
  model, variables, run = trained
  half = model.clone(dtype=jnp.bfloat16)
  logits, _ = half.apply(variables, TOKENS)
  assert logits.dtype == jnp.float32
  expected, _ = run(TOKENS)
  scale = float(jnp.abs(expected).max())
  np.testing.assert_allclose(logits / scale, expected / scale, atol=0.05)


def test_parameters_are_float32_and_named_by_their_letters(trained):
  model, variables, _ = trained
  params = dict(variables['params'])
  assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  check_parameter_names(params.pop('stack'), stacked=1)
  check_parameter_names(params)


def test_loss_and_gradient_lower_for_cpu_cuda_and_tpu(trained):
  model, variables, _ = trained
  gradient = jax.jit(
    jax.grad(lambda v: jax.nn.logsumexp(model.apply(v, TOKENS)[0]))
  )
  exported = jax.export.export(gradient, platforms=('cpu', 'cuda', 'tpu'))(
    variables
  )
  assert exported.platforms == ('cpu', 'cuda', 'tpu')


def test_a_tied_head_scores_by_the_embedding():
  head = TiedHead()
  table = jax.random.normal(jax.random.key(0), (VOCABULARY, WIDTH))
  x = jax.random.normal(jax.random.key(1), (3, WIDTH))
  np.testing.assert_allclose(head.apply({}, x, table), x @ table.T, rtol=1e-5)


def test_a_scaled_embedding_is_root_width_larger():
  tokens = jnp.array([[1, 2]])
  variables = Embed().init(jax.random.key(0), tokens, VOCABULARY, WIDTH)
  plain, _ = Embed().apply(variables, tokens, VOCABULARY, WIDTH)
  large, _ = Embed(scale_by_width=True).apply(
    variables, tokens, VOCABULARY, WIDTH
  )
  np.testing.assert_allclose(large, plain * np.sqrt(WIDTH), rtol=1e-6)


def test_an_unknown_token_is_nan_rather_than_a_neighbour():
  model = MODELS['tied_rotary']
  variables = model.init(jax.random.key(0), TOKENS)
  logits, _ = model.apply(variables, jnp.array([[1, 2], [1, VOCABULARY]]))
  assert np.isfinite(logits[0]).all()
  assert np.isnan(logits[1, 1]).all()


def test_learned_positions_end():
  model = MODELS['learned_post_norm']
  longer = jnp.zeros((1, LENGTH + 1), jnp.int32)
  with pytest.raises(ValueError, match='11 tokens, but Learned has 10 posit'):
    model.init(jax.random.key(0), longer)
  with pytest.raises(ValueError, match='raise its max_length'):
    model.initial_state(1, LENGTH + 1)


def test_an_encoder_has_no_state():
  block = BLOCK.clone(mixer=Attention(num_heads=2, mask=NoMask()))
  model = LanguageModel(VOCABULARY, WIDTH, Stack(block, 1))
  with pytest.raises(ValueError, match='sees tokens that come later'):
    model.initial_state(1, 4)


def test_equal_models_are_equal_and_hash_alike():
  model = MODELS['tied_rotary']
  assert model == model.clone()
  assert hash(model) == hash(model.clone())
  assert model != model.clone(width=16)
