import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.decode import Sampler
from jaxformers.decode import generate
from jaxformers.decode import stream
from jaxformers.models import LanguageModel
from jaxformers.nn import Block
from jaxformers.nn import FeedForward
from jaxformers.nn import Learned
from jaxformers.nn import Stack
from jaxformers.nn.mixers import LRU
from jaxformers.nn.mixers import RTF
from jaxformers.nn.mixers import S4
from jaxformers.nn.mixers import Attention
from jaxformers.nn.mixers import Mamba
from jaxformers.ops import Rotary

KEY = jax.random.key(0)
GREEDY = Sampler(temperature=0)
TRUNCATED = Sampler(temperature=0.9, top_k=12, top_p=0.95)
traces = []  # one entry for each trace of a Recurrent model
runs = []  # one entry for each time that one runs, in any order


class Recurrent(nn.Module):
  """The smallest model whose logits depend on all tokens and on position."""

  vocab_size: int = 23
  width: int = 16
  dtype: type = jnp.float32

  @nn.compact
  def __call__(self, tokens_BL, state=None, *, segments_BL):
    traces.append(tokens_BL.shape)
    jax.debug.callback(lambda: runs.append(1))
    scale = nn.initializers.normal(1.0)
    table_VD = self.param('table_VD', scale, (self.vocab_size, self.width))
    w_DE = self.param('w_DE', scale, (self.width, self.width))
    if state is None:
      state = self.initial_state(tokens_BL.shape[0], tokens_BL.shape[1])

    def step(state, inputs):
      hidden_BD, length_B = state
      input_BD, segment_B = inputs
      is_token_B = segment_B != 0
      clock_B = jnp.cos(length_B).astype(self.dtype)
      new_BD = jnp.tanh(input_BD + hidden_BD @ w_DE.astype(self.dtype) / 4)
      new_BD = new_BD + clock_B[:, None] / 2
      hidden_BD = jnp.where(is_token_B[:, None], new_BD, hidden_BD)
      return (hidden_BD, length_B + is_token_B.astype(jnp.int32)), new_BD

    inputs = table_VD.astype(self.dtype)[tokens_BL], segments_BL
    inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs)
    state, hidden_LBD = jax.lax.scan(step, state, inputs)
    # Rolled, lest the likeliest token always be the one just read.
    out_VD = jnp.roll(table_VD, 5, axis=0).astype(self.dtype)
    logits_LBV = hidden_LBD @ out_VD.T
    return jnp.moveaxis(logits_LBV, 0, 1).astype(jnp.float32), state

  def initial_state(self, batch_size, max_length):
    del max_length
    hidden_BD = jnp.zeros((batch_size, self.width), self.dtype)
    return hidden_BD, jnp.zeros(batch_size, jnp.int32)


def attention_model():
  mixer = Attention(num_heads=2, position=Rotary())
  return LanguageModel(
    vocab_size=23,
    width=16,
    stack=Stack(Block(mixer, FeedForward(32)), 2),
    position=Learned(100),
  )


def hybrid_model():
  mixers = (
    LRU(state_size=8, r_min=0.8),
    Mamba(state_size=4),
    Attention(num_heads=2, position=Rotary()),
  )
  stack = Stack(tuple(map(Block, mixers)), 3)
  return LanguageModel(vocab_size=23, width=16, stack=stack)


@functools.cache
def initialised(model):
  tokens_BL = jnp.zeros((1, 4), jnp.int32)
  segments_BL = jnp.ones_like(tokens_BL)
  variables = jax.jit(model.init)(KEY, tokens_BL, segments_BL=segments_BL)

  # First weights give nearly flat logits that hardly depend on position, where
  # greedy choice tests little.
  def widened(path, leaf):
    is_position = 'position' in jax.tree_util.keystr(path)
    return leaf * (50 if is_position else 2 if leaf.ndim > 2 else 1)

  return jax.tree.map_with_path(widened, variables)


MODELS = {
  'recurrent': Recurrent(),
  'attention': attention_model(),
}


@pytest.fixture(params=MODELS, scope='module')
def model_and_variables(request):
  model = MODELS[request.param]
  return model, initialised(model)


@pytest.fixture(scope='module')
def recurrent():
  return Recurrent(), initialised(Recurrent())


def prompts_of(*lengths):
  rng = np.random.default_rng(len(lengths))
  return [rng.integers(0, 23, length).astype(np.int32) for length in lengths]


def rows_of(generated):
  tokens_BL, length_B = jax.device_get(generated)
  return [row[:n].tolist() for row, n in zip(tokens_BL, length_B, strict=True)]


@functools.cache
def without_state(model):
  return jax.jit(model.apply)


def greedy_without_state(model, variables, prompt, count):
  """Runs the whole sequence again for each token."""
  padded_1L = np.zeros((1, 100), np.int32)
  padded_1L[0, : len(prompt)] = prompt
  for n in range(len(prompt), len(prompt) + count):
    segments_1L = (np.arange(100) < n)[None].astype(np.int32)
    logits_1LV, _ = without_state(model)(
      variables, padded_1L, segments_BL=segments_1L
    )
    padded_1L[0, n] = np.argmax(logits_1LV[0, n - 1])
  return padded_1L[0, len(prompt) : len(prompt) + count].tolist()


def test_greedy_equals_running_the_whole_sequence_for_each_token(
  model_and_variables,
):
  prompts = prompts_of(93, 11, 1)
  out = generate(
    *model_and_variables,
    prompts,
    max_new_tokens=7,
    max_length=100,  # filled by the first row to the last slot
    sampler=GREEDY,
    key=KEY,
  )
  expected = [greedy_without_state(*model_and_variables, p, 7) for p in prompts]
  assert rows_of(out) == expected
  assert len({tuple(row) for row in expected}) == 3
  assert max(len(set(row)) for row in expected) > 3


def test_greedy_equals_whole_sequences_where_layers_are_recurrent():
  model = hybrid_model()
  prompts = prompts_of(11, 1)
  out = generate(
    model,
    initialised(model),
    prompts,
    max_new_tokens=7,
    max_length=100,
    sampler=GREEDY,
    key=KEY,
  )
  expected = [
    greedy_without_state(model, initialised(model), p, 7) for p in prompts
  ]
  assert rows_of(out) == expected
  assert max(len(set(row)) for row in expected) > 3


def test_a_row_does_not_depend_on_the_other_rows():
  model = MODELS['attention']
  variables = initialised(model)
  prompts = prompts_of(5, 70, 2)
  options = dict(max_new_tokens=16, max_length=100, sampler=TRUNCATED)
  together = rows_of(generate(model, variables, prompts, key=KEY, **options))
  first = generate(model, variables, prompts[:1], key=KEY, **options)
  assert rows_of(first) == together[:1]
  for b in (0, 2):  # padded to 64 here, and to 100 beside the long one
    row_key = jax.random.fold_in(KEY, b)[None]
    alone = generate(model, variables, [prompts[b]], key=row_key, **options)
    assert rows_of(alone) == [together[b]]


def test_keys_decide_what_is_drawn(recurrent):
  prompts = prompts_of(4, 4)
  prompts[1] = prompts[0]
  options = dict(max_new_tokens=30)
  first = rows_of(generate(*recurrent, prompts, key=KEY, **options))
  again = rows_of(generate(*recurrent, prompts, key=KEY, **options))
  other = jax.random.key(1)
  other = rows_of(generate(*recurrent, prompts, key=other, **options))
  assert first == again
  assert first[0] != first[1]
  assert first[0] != other[0]


def test_each_new_token_is_drawn_with_a_key_of_its_own(recurrent):
  model, variables = recurrent
  flat = jax.tree.map(jnp.zeros_like, variables)  # all tokens equally likely
  [row] = rows_of(generate(model, flat, [[1]], max_new_tokens=5, key=KEY))
  row_key = jax.random.fold_in(KEY, 0)
  expected = [
    int(jax.random.categorical(jax.random.fold_in(row_key, n), jnp.zeros(23)))
    for n in range(5)
  ]
  assert row == expected


def test_a_stop_token_ends_only_its_row_and_is_counted(recurrent):
  prompts = prompts_of(6, 3)
  options = dict(max_new_tokens=16, key=KEY)
  free = rows_of(generate(*recurrent, prompts, **options))
  stop = free[0][4]
  out = generate(
    *recurrent, prompts, stop_tokens=[stop], pad_token=-1, **options
  )
  expected = [
    row[: row.index(stop) + 1] if stop in row else row for row in free
  ]
  assert rows_of(out) == expected
  assert len(set(map(len, expected))) > 1
  tokens_BL, length_B = jax.device_get(out)
  assert tokens_BL.shape == (2, 16)
  assert tokens_BL.dtype == length_B.dtype == np.int32
  is_padding_BL = np.arange(16) >= length_B[:, None]
  np.testing.assert_array_equal(tokens_BL == -1, is_padding_BL)


def test_any_of_several_stop_tokens_ends_a_row(recurrent):
  options = dict(max_new_tokens=16, key=KEY)
  [free] = rows_of(generate(*recurrent, [[1, 2]], **options))
  stops = {free[9], free[5]}
  first = min(free.index(stop) for stop in stops)
  out = generate(*recurrent, [[1, 2]], stop_tokens=stops, **options)
  assert rows_of(out) == [free[: first + 1]]


def test_the_loop_ends_when_every_row_has_stopped(recurrent):
  model, variables = recurrent

  def count_runs(**options):
    runs.clear()
    out = generate(model, variables, [[1], [2, 3]], key=KEY, **options)
    jax.block_until_ready(out)
    jax.effects_barrier()
    return len(runs), out

  # Prefill gives the first token, so n tokens take n runs of the model.
  assert count_runs(max_new_tokens=1)[0] == 1
  count, out = count_runs(max_new_tokens=40)
  assert count == 40
  free = rows_of(out)
  stops = [free[0][4], free[1][7]]
  count, out = count_runs(max_new_tokens=40, stop_tokens=stops)
  assert count == out.length_B.max() <= 8
  count, out = count_runs(max_new_tokens=40, stop_tokens=range(23))
  assert count == 1
  np.testing.assert_array_equal(out.length_B, [1, 1])


def check_stream(model_and_variables, prompts, every, **options):
  options = dict(max_new_tokens=16, key=KEY) | options
  free = rows_of(generate(*model_and_variables, prompts, **options))
  options['stop_tokens'] = [free[0][9]]
  expected = rows_of(generate(*model_and_variables, prompts, **options))
  assert len(set(map(len, expected))) > 1
  joined = [[] for _ in prompts]
  for piece in stream(*model_and_variables, prompts, every=every, **options):
    assert 0 < max(map(len, piece)) <= every
    for row, new in zip(joined, piece, strict=True):
      row.extend(new.tolist())
  assert joined == expected


@pytest.mark.parametrize('every', [1, 4, 16, 100])
def test_stream_gives_the_tokens_of_generate(recurrent, every):
  check_stream(recurrent, prompts_of(6, 3), every)


def test_stream_gives_the_tokens_of_generate_with_attention():
  model = MODELS['attention']
  check_stream(
    (model, initialised(model)),
    prompts_of(5, 70, 2),
    every=5,
    max_length=100,
    sampler=TRUNCATED,
  )


def test_pieces_stay_as_they_were_when_the_next_is_made(recurrent):
  pieces, copies = [], []
  for [piece] in stream(*recurrent, [[1]], max_new_tokens=20, key=KEY, every=3):
    pieces.append(piece)
    copies.append(piece.copy())
  assert len(pieces) == 7
  for piece, copy in zip(pieces, copies, strict=True):
    np.testing.assert_array_equal(piece, copy)


def test_stream_checks_its_arguments_before_the_first_piece(recurrent):
  with pytest.raises(ValueError, match='expected at least one prompt'):
    stream(*recurrent, [], max_new_tokens=5, key=KEY)
  with pytest.raises(ValueError, match='every must be at least 1 token, got 0'):
    stream(*recurrent, [[1]], max_new_tokens=5, key=KEY, every=0)


def test_nothing_is_compiled_twice():
  variables = initialised(Recurrent(width=8))
  options = dict(sampler=Sampler(0.8, 5), stop_tokens=[22])

  def new_traces(run, prompts, **changes):
    traces.clear()
    # A model and a sampler built anew each time, equal by value.
    arguments = options | dict(key=KEY, max_new_tokens=10) | changes
    jax.block_until_ready(
      list(run(Recurrent(width=8), variables, prompts, **arguments))
    )
    return len(traces)

  assert new_traces(generate, [[1, 2], [3]]) > 0
  assert new_traces(generate, [[4], [5, 6]]) == 0
  assert new_traces(generate, prompts_of(40, 2), max_new_tokens=20) == 0
  assert new_traces(generate, [[1], [2]], key=jax.random.key(7)) == 0
  assert new_traces(generate, [[1], [2]], sampler=Sampler(0.8, 5)) == 0
  assert new_traces(generate, [[1], [2]], stop_tokens=[0], pad_token=3) == 0
  for every in (1, 3, 8):
    assert new_traces(stream, [[1, 2], [3]], every=every) == 0
  assert new_traces(generate, [[1], [2]], sampler=Sampler(0.7, 5)) > 0


def test_prompts_of_any_length_share_the_loop_of_a_fixed_state(recurrent):
  options = dict(max_new_tokens=5, key=KEY, max_length=300)
  generate(*recurrent, [[1]], **options)
  traces.clear()
  generate(*recurrent, prompts_of(200), **options)
  assert set(traces) == {(1, 256)}  # prefill alone


def test_attention_models_of_two_constructions_are_one_to_the_cache():
  first, second = attention_model(), attention_model()
  assert first is not second
  assert first == second
  assert hash(first) == hash(second)


def test_the_state_is_donated(recurrent):
  model, variables = recurrent
  # Compiled, the loop keeps its state in the buffers that it was given.
  generator = stream(
    model, variables, [[1]], max_new_tokens=9, key=KEY, every=2
  )
  next(generator)
  before = generator.gi_frame.f_locals['state']
  next(generator)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))


def test_the_state_is_no_longer_than_the_model_allows():
  model = MODELS['attention']  # 100 positions, fewer than a multiple of 64
  variables = initialised(model)
  options = dict(max_new_tokens=7, sampler=GREEDY, key=KEY)
  prompts = prompts_of(93, 11, 1)
  chosen = generate(model, variables, prompts, **options)
  fixed = generate(model, variables, prompts, max_length=100, **options)
  assert rows_of(chosen) == rows_of(fixed)


def test_more_tokens_than_positions_are_refused():
  model = MODELS['attention']
  variables = initialised(model)
  with pytest.raises(ValueError, match='101 tokens, but Learned has 100'):
    generate(model, variables, prompts_of(94), max_new_tokens=7, key=KEY)


def test_bfloat16_model():
  model = Recurrent(dtype=jnp.bfloat16)
  prompts = prompts_of(4, 7)
  out = generate(
    model,
    initialised(model),
    prompts,
    max_new_tokens=6,
    sampler=GREEDY,
    key=KEY,
  )
  assert rows_of(out) == [
    greedy_without_state(model, initialised(model), prompt, 6)
    for prompt in prompts
  ]


def test_prompts_may_be_lists_or_arrays_of_any_integer_type(recurrent):
  options = dict(max_new_tokens=4, key=KEY)
  kinds = [1, 2], (1, 2), np.array([1, 2], np.uint8), jnp.array([1, 2])
  outputs = [rows_of(generate(*recurrent, [p], **options)) for p in kinds]
  assert outputs == outputs[:1] * 4


REFUSED = {
  'expected at least one prompt, got an empty': dict(prompts=[]),
  'prompt 1 is empty; give at least one token': dict(prompts=[[1], []]),
  r'prompt 0 has shape \(\), expected one axis .* pass a single prompt as \[': dict(
    prompts=[1, 2]
  ),
  r'prompt 1 contains token 23, outside the vocabulary of 23 \(0 to 22\)': dict(
    prompts=[[1], [2, 23]]
  ),
  'prompt 0 contains token -1, outside': dict(prompts=[[-1]]),
  'stop_tokens contains token 99, outside': dict(stop_tokens=[3, 99]),
  'max_new_tokens must be at least 1, got 0': dict(max_new_tokens=0),
  'prompt longer than the state: prompt 1 has 3 tokens, with max_new_tokens=8 '
  'that makes 11, but the state holds max_length=10; shorten the prompt': dict(
    prompts=[[1], [1, 2, 3]], max_length=10
  ),
  r'expected one key, or one for each of 1 prompts, got keys of shape \(2,\)': dict(
    key=jax.random.split(KEY)
  ),
}


@pytest.mark.parametrize('run', [generate, stream])
@pytest.mark.parametrize('message', REFUSED)
def test_bad_arguments_are_refused(recurrent, run, message):
  arguments = dict(prompts=[[1]], max_new_tokens=8, key=KEY) | REFUSED[message]
  with pytest.raises(ValueError, match=message):
    run(*recurrent, **arguments)


MISTYPED = {
  'prompt 0 has dtype float64, expected integer': dict(prompts=[[1.0]]),
  'encode text with the tokenizer first': dict(prompts=[['a', 'b']]),
  'stop_tokens has dtype': dict(stop_tokens=['\n']),
  r'key must come from jax.random.key\(seed\), got int': dict(key=0),
  'of dtype uint32; jax.random.wrap_key_data': dict(key=np.zeros(2, np.uint32)),
}


@pytest.mark.parametrize('message', MISTYPED)
def test_arguments_of_a_wrong_type_are_refused(recurrent, message):
  arguments = dict(prompts=[[1]], max_new_tokens=8, key=KEY) | MISTYPED[message]
  with pytest.raises(TypeError, match=message):
    generate(*recurrent, **arguments)


def test_what_layers_make_of_parameters_is_made_once():
  blocks = [
    Block(mixer, FeedForward(16))
    for mixer in (S4(length=4, state_size=4), RTF(length=4, state_size=3))
  ]
  model = LanguageModel(vocab_size=23, width=8, stack=Stack(tuple(blocks), 4))
  tokens_BL = jnp.array([[3, 1, 4, 1, 5, 9]])
  variables = jax.jit(model.init)(KEY, tokens_BL)
  assert list(variables) == ['params']
  new = generate(
    model, variables, tokens_BL, max_new_tokens=4, key=KEY, sampler=GREEDY
  ).tokens_BL
  whole_BL = jnp.concatenate([tokens_BL, new], axis=1)
  logits_BLV, _ = jax.jit(model.apply)(variables, whole_BL)
  expected = jnp.argmax(logits_BLV[:, tokens_BL.shape[1] - 1 : -1], axis=-1)
  np.testing.assert_array_equal(new, expected)

  state = model.initial_state(1, 16)
  (plain, _), made = jax.jit(
    functools.partial(model.apply, mutable=['prepared'])
  )(variables, tokens_BL, state)
  step = lambda variables: model.apply(variables, tokens_BL, state)
  prepared = {**variables, **made}
  np.testing.assert_allclose(jax.jit(step)(prepared)[0], plain, rtol=1e-5)
  solves = lambda given: str(jax.make_jaxpr(step)(given)).count(
    '= triangular_solve'
  )
  assert solves(prepared) < solves(variables)
