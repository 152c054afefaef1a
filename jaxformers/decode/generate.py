"""Continues prompts with a language model: prefill, then one compiled loop.

**Prompts are padded on the right** to a common length, a multiple of 64 so that
few shapes are compiled, and padding carries segment 0. A causal model then
gives every real token what it would get alone: its position still counts from
the start of its own row, and the padding lies in the future that it cannot see.
The state skips segment 0, so each row goes on from its own length. (Padding on
the left would need positions shifted by a different amount in each row.)

**The loop is a `while` loop** because its length is known only at run time: it
ends as soon as every row has produced a stop token, and its bound is an
ordinary argument. So one compilation serves every `max_new_tokens` up to the
next multiple of 64, and `stream`, which runs the same loop a few tokens at a
time. The state is donated to it and updated in place.

**Randomness**: the n-th new token of row b is drawn with
`fold_in(fold_in(key, b), n)`. No draw depends on the other rows, on the
padding, or on how the loop is cut into pieces.

Complexity: one pass over the padded prompts, whose logits `[B, L, V]` are the
largest array, then one pass over `[B, 1]` tokens for each further new token,
plus the sampler. Compiled functions are kept for each pair of model and sampler
(which must hash and compare by value, as Linen modules with hashable fields do)
and each set of shapes; a model that is built a second time reuses them.
"""

from collections.abc import Collection, Iterable, Iterator
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import Array
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Bool, Int, Key
import numpy as np

from jaxformers.decode.sampling import Sampler

# Lengths of prompts, outputs and states are rounded up to multiples of this, so
# that a few compiled programs serve all.
_MULTIPLE = 64
_STOP_MULTIPLE = 8
_PLAIN = Sampler()


class Generated(NamedTuple):
  """New tokens, without the prompts.

  Attributes:
    tokens_BL: int32, the new tokens of each row in order, with the stop token
      that ended it if one did, and `pad_token` after that. L is
      `max_new_tokens`.
    length_B: int32, how many of them are not padding; a stop token counts.
  """

  tokens_BL: Int[Array, 'B L']
  length_B: Int[Array, ' B']


class _Program(NamedTuple):
  """What is compiled for: static, so both must hash and compare by value."""

  model: nn.Module
  sampler: Sampler


class _Sizes(NamedTuple):
  """Lengths of what is allocated; static."""

  prompt: int
  output: int
  state: int


class _Prompts(NamedTuple):
  """Prompts, padded on the right with token 0, which every model knows."""

  token_BL: Int[np.ndarray, 'B L']
  length_B: Int[np.ndarray, ' B']


class _Rules(NamedTuple):
  """What every step reads and none changes."""

  key_B: Key[Array, ' B']
  stop_token_S: Int[np.ndarray, ' S']  # some are -1, which no token equals
  pad_token: Int[np.ndarray, '']


class _Rows(NamedTuple):
  """What was produced so far."""

  token_BL: Int[Array, 'B L']  # pad_token where there is nothing yet
  length_B: Int[Array, ' B']
  is_done_B: Bool[Array, ' B']
  count: Int[Array, '']  # how many were drawn in the rows that are not done


def generate(
  model: nn.Module,
  variables: Any,
  prompts: Iterable[ArrayLike | Collection[int]],
  *,
  max_new_tokens: int,
  key: Key[Array, '*B'],
  sampler: Sampler = _PLAIN,
  stop_tokens: Collection[int] = (),
  pad_token: int = 0,
  max_length: int | None = None,
) -> Generated:
  """Continues each prompt until a stop token or for `max_new_tokens`.

  Args:
    model: a causal language model with `initial_state(batch_size, max_length)`
      and `apply(variables, tokens_BL, state, segments_BL=...) -> (logits_BLV,
      state)`. If it has a `vocab_size`, token ids are checked against it.
    variables: what `model.apply` takes.
    prompts: token ids, one sequence of at least one token per row; lengths may
      differ.
    max_new_tokens: at least 1.
    key: one key, which row b folds with b; or an array of one key per row, used
      as they are. So `fold_in(key, b)[None]` repeats row b by itself.
    sampler: how a token is drawn from logits.
    stop_tokens: a row ends after producing any of these.
    pad_token: fills the output after the end of a row. Any integer: the model
      never sees it.
    max_length: how many tokens, prompt and new ones, the state holds; None for
      what is needed, rounded up. A fixed one lets prompts of very different
      lengths share one compiled loop.

  Returns:
    The new tokens of each row and their number.

  Raises:
    TypeError: if tokens are not integers, or `key` is not from
      `jax.random.key`.
    ValueError: if there is no prompt, a prompt is empty, a token lies outside
      the vocabulary, a prompt and its new tokens exceed `max_length`,
      `max_new_tokens` is below 1, or the number of keys is not that of rows.
  """
  program = _Program(model, sampler)
  prompts, sizes = _padded(model, prompts, max_new_tokens, max_length)
  rules = _rules(model, len(prompts.length_B), key, stop_tokens, pad_token)
  state, rows, variables = _prefilled(program, sizes, variables, prompts, rules)
  _, rows = _advance(program, variables, rules, state, rows, max_new_tokens)
  return Generated(rows.token_BL[:, :max_new_tokens], rows.length_B)


def stream(
  model: nn.Module,
  variables: Any,
  prompts: Iterable[ArrayLike | Collection[int]],
  *,
  max_new_tokens: int,
  key: Key[Array, '*B'],
  sampler: Sampler = _PLAIN,
  stop_tokens: Collection[int] = (),
  pad_token: int = 0,
  max_length: int | None = None,
  every: int = 8,
) -> Iterator[list[Int[np.ndarray, ' L']]]:
  """Yields the tokens of `generate` while they are produced.

  The same compiled functions run, so that a call of either compiles for both.
  Arguments are checked at the call, before the first piece is asked for.

  Args:
    model: as for `generate`, like all arguments but the last.
    variables: see `generate`.
    prompts: see `generate`.
    max_new_tokens: see `generate`.
    key: see `generate`.
    sampler: see `generate`.
    stop_tokens: see `generate`.
    pad_token: see `generate`; pieces hold no padding.
    max_length: see `generate`.
    every: tokens per row in a piece. The device is waited for once per piece.

  Returns:
    An iterator of pieces. A piece is a list with the new tokens of each row, at
    most `every`, none for a row that has ended. The pieces of a row, joined,
    are its `tokens_BL[b, :length_B[b]]`.

  Raises:
    TypeError: as `generate`.
    ValueError: as `generate`, or if `every` is below 1.
  """
  if every < 1:
    raise ValueError(f'every must be at least 1 token, got {every}.')
  program = _Program(model, sampler)
  prompts, sizes = _padded(model, prompts, max_new_tokens, max_length)
  rules = _rules(model, len(prompts.length_B), key, stop_tokens, pad_token)
  bounds = [*range(every, max_new_tokens, every), max_new_tokens]
  return _pieces(program, sizes, variables, prompts, rules, bounds)


def _pieces(program, sizes, variables, prompts, rules, bounds):
  """Runs the loop up to each bound in turn and yields what is new."""
  state, rows, variables = _prefilled(program, sizes, variables, prompts, rules)
  shown = 0
  for until in bounds:
    state, rows = _advance(program, variables, rules, state, rows, until)
    # Only the state was donated, so these views of `rows` stay valid.
    token_BL, length_B, is_done_B, _ = jax.device_get(rows)
    yield [row[shown:n] for row, n in zip(token_BL, length_B, strict=True)]
    if is_done_B.all():
      return
    shown = until


def _prefilled(program, sizes, variables, prompts, rules):
  """Feeds the prompts; adds to the variables what layers make of them once."""
  state, rows, made = _prefill(program, sizes, variables, prompts, rules)
  return state, rows, {**variables, **made}


@functools.partial(jax.jit, static_argnames=('program', 'sizes'))
def _prefill(program, sizes, variables, prompts, rules):
  """Feeds the prompts to a new state and draws the first new tokens."""
  batch_size, length = prompts.token_BL.shape
  is_real_BL = jnp.arange(length)[None] < prompts.length_B[:, None]
  (logits_BLV, state), made = program.model.apply(
    variables,
    prompts.token_BL,
    program.model.initial_state(batch_size, sizes.state),
    segments_BL=is_real_BL.astype(jnp.int32),
    mutable=['prepared'],
  )
  last_B11 = prompts.length_B[:, None, None] - 1
  logits_BV = jnp.take_along_axis(logits_BLV, last_B11, axis=1)[:, 0]
  rows = _Rows(
    token_BL=jnp.full((batch_size, sizes.output), rules.pad_token),
    length_B=jnp.zeros(batch_size, jnp.int32),
    is_done_B=jnp.zeros(batch_size, bool),
    count=jnp.zeros((), jnp.int32),
  )
  return state, _draw(program.sampler, rules, rows, logits_BV), made


@functools.partial(jax.jit, static_argnames='program', donate_argnames='state')
def _advance(program, variables, rules, state, rows, until):
  """Draws tokens until `until` of them are there or every row is done."""

  def goes_on(carry):
    _, rows = carry
    return (rows.count < until) & ~rows.is_done_B.all()

  def step(carry):
    state, rows = carry
    is_real_B1 = ~rows.is_done_B[:, None]
    last_B1 = jax.lax.dynamic_slice_in_dim(rows.token_BL, rows.count - 1, 1, 1)
    logits_B1V, state = program.model.apply(
      variables,
      # A row that is done may end in a `pad_token` outside the vocabulary.
      jnp.where(is_real_B1, last_B1, 0),
      state,
      segments_BL=is_real_B1.astype(jnp.int32),
    )
    return state, _draw(program.sampler, rules, rows, logits_B1V[:, 0])

  return jax.lax.while_loop(goes_on, step, (state, rows))


def _draw(sampler, rules, rows, logits_BV):
  """Appends a token to each row that is not done."""
  key_B = jax.vmap(jax.random.fold_in, (0, None))(rules.key_B, rows.count)
  token_B = jax.vmap(sampler)(key_B, logits_BV)
  is_stop_B = (token_B[:, None] == rules.stop_token_S[None]).any(axis=-1)
  token_B = jnp.where(rows.is_done_B, rules.pad_token, token_B)
  return _Rows(
    token_BL=rows.token_BL.at[:, rows.count].set(token_B),
    length_B=jnp.where(rows.is_done_B, rows.length_B, rows.count + 1),
    is_done_B=rows.is_done_B | is_stop_B,
    count=rows.count + 1,
  )


def _padded(model, prompts, max_new_tokens, max_length):
  """Checks prompts and lengths; returns the prompts padded, and the sizes."""
  prompts = [_prompt(model, i, prompt) for i, prompt in enumerate(prompts)]
  if not prompts:
    raise ValueError('expected at least one prompt, got an empty sequence.')
  length_B = np.array([prompt.size for prompt in prompts], np.int32)
  sizes = _sizes(model, length_B, max_new_tokens, max_length)
  token_BL = np.zeros((len(prompts), sizes.prompt), np.int32)
  for row, prompt in zip(token_BL, prompts, strict=True):
    row[: prompt.size] = prompt
  return _Prompts(token_BL, length_B), sizes


def _sizes(model, length_B, max_new_tokens, max_length):
  if max_new_tokens < 1:
    raise ValueError(
      f'max_new_tokens must be at least 1, got {max_new_tokens}.'
    )
  longest = int(length_B.max())
  needed = longest + max_new_tokens
  capacity = max_length
  if max_length is None:
    capacity = _capacity(model, len(length_B), needed)
  if needed > capacity:
    raise ValueError(
      f'prompt longer than the state: prompt {length_B.argmax()} has {longest} '
      f'tokens, with max_new_tokens={max_new_tokens} that makes {needed}, but '
      f'the state holds max_length={max_length}; shorten the prompt, ask for '
      'fewer tokens or raise max_length.'
    )
  return _Sizes(
    prompt=min(_rounded_up(longest), capacity),
    output=_rounded_up(max_new_tokens),
    state=capacity,
  )


def _capacity(model, batch_size, needed):
  """Rounds up, unless the model has fewer positions than that."""
  rounded = _rounded_up(needed)
  try:
    jax.eval_shape(lambda: model.initial_state(batch_size, rounded))
  except ValueError:
    return needed
  return rounded


def _rounded_up(length, multiple=_MULTIPLE):
  return -(-length // multiple) * multiple


def _rules(model, batch_size, key, stop_tokens, pad_token):
  """Checks and converts what every step reads."""
  stop_tokens = list(stop_tokens)
  if stop_tokens:
    _check_tokens(model, 'stop_tokens', np.array(stop_tokens))
  size = _rounded_up(max(len(stop_tokens), 1), _STOP_MULTIPLE)
  unused = size - len(stop_tokens)
  return _Rules(
    key_B=_row_keys(key, batch_size),
    stop_token_S=np.array(stop_tokens + [-1] * unused, np.int32),
    pad_token=np.int32(pad_token),
  )


def _row_keys(key, batch_size):
  dtype = getattr(key, 'dtype', None)
  if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
    raise TypeError(
      f'key must come from jax.random.key(seed), got {type(key).__name__} of '
      f'dtype {dtype}; jax.random.wrap_key_data converts an old-style key.'
    )
  if key.ndim == 0:
    row_B = jnp.arange(batch_size)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, row_B)
  if key.shape != (batch_size,):
    raise ValueError(
      f'expected one key, or one for each of {batch_size} prompts, got keys of '
      f'shape {key.shape}.'
    )
  return key


def _prompt(model, index, prompt):
  prompt = np.asarray(prompt)
  if prompt.ndim != 1:
    raise ValueError(
      f'prompt {index} has shape {prompt.shape}, expected one axis of token '
      'ids; pass a single prompt as [prompt].'
    )
  if not prompt.size:
    raise ValueError(
      f'prompt {index} is empty; give at least one token, such as the one that '
      'starts a text or a newline.'
    )
  _check_tokens(model, f'prompt {index}', prompt)
  return prompt


def _check_tokens(model, name, token_L):
  """Raises unless tokens are integers in the vocabulary."""
  if not np.issubdtype(token_L.dtype, np.integer):
    raise TypeError(
      f'{name} has dtype {token_L.dtype}, expected integer token ids; encode '
      'text with the tokenizer first.'
    )
  vocab_size = getattr(model, 'vocab_size', None) or 2**31
  outside = token_L[(token_L < 0) | (token_L >= vocab_size)]
  if outside.size:
    raise ValueError(
      f'{name} contains token {outside[0]}, outside the vocabulary of '
      f'{vocab_size} (0 to {vocab_size - 1}); was it encoded with the tokenizer '
      'of another model?'
    )
