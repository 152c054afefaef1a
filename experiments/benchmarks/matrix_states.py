"""Recurrences with a matrix for a state: chunks, peers, and the cost of a token.

First the recurrence in chunks, forward and backward, beside the loop that stores
all states (bar: 5 times as fast at 2048 tokens) and beside all scores at once,
with one decay per head (Mamba-2, RetNet) and one per channel (RWKV-6). Then both
beside PyTorch programs of the same mathematics, if it is installed: the listing
that the paper of Mamba-2 prints, and a loop. At last the time of one more token
after contexts of several lengths, for each mixer with a state of constant size,
and for attention.

Run: python -m experiments.benchmarks.matrix_states --save
Peer: pip install torch
Time: about 6 minutes on 2 CPU cores.
"""

import argparse
from collections.abc import Callable
import functools
import importlib.util
import statistics
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import timing
from jaxformers.nn import mixers
from jaxformers.ops import outer_recurrence

HEADS, WIDTH = 4, 64
CHUNKS = 16, 32, 64, 128, 256
MIXERS: dict[str, nn.Module] = {
  'linear_attention': mixers.LinearAttention(num_heads=HEADS),
  'retention': mixers.Retention(num_heads=HEADS),
  'mamba2': mixers.Mamba2(state_size=WIDTH),
  'mamba': mixers.Mamba(),
  'rwkv4': mixers.RWKV4(),
  'rwkv6': mixers.RWKV6(num_heads=HEADS),
  'griffin': mixers.RecurrentBlock(),
  'lru': mixers.LRU(state_size=WIDTH),
  's5': mixers.S5(state_size=WIDTH),
  's4d': mixers.S4D(state_size=WIDTH),
  's4': mixers.S4(length=1024, state_size=WIDTH),
  'rtf': mixers.RTF(length=1024, state_size=WIDTH),
  'hippo_memory': mixers.HippoMemory(size=WIDTH),
  'hippo_rnn': mixers.HippoRNN(size=WIDTH),
  'attention': mixers.Attention(num_heads=HEADS),
}
"""Whose next token is timed; the last has a state that grows."""

Arrays = list[jax.Array]
Recurrence = Callable[..., jax.Array]


def arrays(length: int, kind: str) -> Arrays:
  """Returns queries, keys, values, logarithms of decays, and bonus or None.

  Args:
    length: L.
    kind: `'head'` for one decay per head, `'channel'` for one per channel, with
      a bonus.
  """
  keys = jax.random.split(jax.random.key(0), 5)
  shape = 1, length, HEADS, WIDTH
  query, key, value = (jax.random.normal(k, shape) / 8 for k in keys[:3])
  decays = shape if kind == 'channel' else shape[:3]
  log_decay = -jnp.exp(jax.random.normal(keys[3], decays) - 3)
  bonus = jax.random.normal(keys[4], shape[2:]) if kind == 'channel' else None
  return [query, key, value, log_decay, bonus]


def ours(**options: Any) -> Recurrence:
  """Returns the output of our recurrence."""
  return lambda query, key, value, log_decay, bonus: outer_recurrence(
    query, key, value, log_decay, bonus_HK=bonus, **options
  ).out


def storing(query, key, value, log_decay, bonus):
  """A loop of which the backward pass stores all states."""

  def step(state, inputs):
    query, key, value, log_decay = inputs
    written = key[..., :, None] * value[..., None, :]
    decays = jnp.exp(log_decay).reshape(*log_decay.shape[:2], -1, 1)
    new_state = decays * state + written
    read = new_state if bonus is None else state + bonus[..., None] * written
    return new_state, jnp.einsum('bhk,bhkv->bhv', query, read)

  steps = [jnp.moveaxis(x, 1, 0) for x in (query, key, value, log_decay)]
  batch, _, heads, width = key.shape
  state = jnp.zeros((batch, heads, width, value.shape[-1]))
  return jnp.moveaxis(jax.lax.scan(step, state, steps)[1], 0, 1)


def both_ways(function: Recurrence, inputs: Arrays) -> dict[str, Callable]:
  """Returns programs that go forward, and forward and backward."""
  given = [x for x in inputs if x is not None]
  fill = lambda *x: function(*x, *[None] * (len(inputs) - len(x)))
  gradient = jax.grad(lambda *x: fill(*x).sum(), argnums=range(len(given)))
  return {
    'forward': functools.partial(jax.jit(fill), *given),
    'both': functools.partial(jax.jit(gradient), *given),
  }


def by_chunk(length: int, kind: str, rounds: int) -> dict[str, Any]:
  """Compares sizes of chunks with each other, the loop, and all scores."""
  inputs = arrays(length, kind)
  functions = {f'chunk_{c}': ours(chunk=c) for c in CHUNKS if c <= length}
  functions |= {
    'ours': ours(),
    'parallel_chunks': ours(method='parallel_chunks'),
    'recurrent': ours(method='recurrent'),
    'parallel': ours(method='parallel'),
    'storing': storing,
  }
  programs = {
    f'{name} {way}': program
    for name, function in functions.items()
    for way, program in both_ways(function, inputs).items()
  }
  expected = programs['storing forward']()
  error = jnp.abs(programs['ours forward']() - expected).max()
  seconds = timing.seconds_in_turns(programs, rounds)
  relative = {
    way: {
      name: timing.ratio(seconds[f'{name} {way}'], seconds[f'ours {way}'])
      for name in functions
      if name != 'ours'
    }
    for way in ('forward', 'both')
  }
  return {
    'forward_ms': 1e3 * statistics.median(seconds['ours forward']),
    'forward_backward_ms': 1e3 * statistics.median(seconds['ours both']),
    'forward_time_relative_to_ours': relative['forward'],
    'forward_backward_time_relative_to_ours': relative['both'],
    'largest_difference': float(error),
    'largest_output': float(jnp.abs(expected).max()),
  }


def minimal_ssd(torch, query, key, value, log_decay, chunk=64):
  """The listing of Mamba-2, with decays per head: chunks, all at once."""
  batch, length, heads, width = key.shape
  cut = lambda x: x.reshape(batch, -1, chunk, *x.shape[2:])
  query, key, value = map(cut, (query, key, value))
  log_decay = cut(log_decay).permute(0, 3, 1, 2)
  total = log_decay.cumsum(-1)
  weights = torch.exp(segment_sums(torch, log_decay))
  out = torch.einsum(
    'bclhn,bcshn,bhcls,bcshp->bclhp', query, key, weights, value
  )
  left = torch.exp(total[..., -1:] - total)
  states = torch.einsum('bclhn,bhcl,bclhp->bchpn', key, left, value)
  states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
  ends = torch.nn.functional.pad(total[..., -1], (1, 0))
  decays = torch.exp(segment_sums(torch, ends))
  states = torch.einsum('bhzc,bchpn->bzhpn', decays, states)[:, :-1]
  out = out + torch.einsum(
    'bclhn,bchpn,bhcl->bclhp', query, states, torch.exp(total)
  )
  return out.reshape(batch, length, heads, width)


def segment_sums(torch, x):
  """Returns sums of all stretches, `[..., C, C]`."""
  length = x.shape[-1]
  full = torch.ones(length, length, dtype=torch.bool)
  x = x[..., None].expand(*x.shape, length)
  sums = x.masked_fill(~full.tril(-1), 0).cumsum(-2)
  return sums.masked_fill(~full.tril(), -torch.inf)


def torch_loop(torch, query, key, value, log_decay, bonus=None):
  """The definition, step by step."""
  batch, length, heads, width = key.shape
  state = torch.zeros(batch, heads, width, value.shape[-1])
  decays = torch.exp(log_decay).reshape(batch, length, heads, -1, 1)
  outputs = []
  for i in range(length):
    written = key[:, i, :, :, None] * value[:, i, :, None, :]
    new_state = decays[:, i] * state + written
    read = new_state if bonus is None else state + bonus[..., None] * written
    outputs.append(torch.einsum('bhk,bhkv->bhv', query[:, i], read))
    state = new_state
  return torch.stack(outputs, dim=1)


def against_torch(length: int, kind: str, rounds: int) -> dict[str, float]:
  """Compares with PyTorch, if it is installed."""
  if not importlib.util.find_spec('torch'):
    return {}
  import torch

  inputs = arrays(length, kind)
  tensors = [
    torch.tensor(np.asarray(x)).requires_grad_()
    for x in inputs
    if x is not None
  ]
  peers = {'torch_loop': torch_loop}
  if kind == 'head':
    peers['torch_minimal_ssd'] = minimal_ssd

  def forward(peer):
    with torch.no_grad():
      peer(torch, *tensors)

  def both(peer):
    torch.autograd.grad(peer(torch, *tensors).sum(), tensors)

  mine = both_ways(ours(), inputs)
  expected = np.asarray(mine['forward']())
  for peer in peers.values():
    actual = peer(torch, *tensors).detach().numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)
  programs = {f'ours {way}': program for way, program in mine.items()}
  for name, peer in peers.items():
    programs[f'{name} forward'] = functools.partial(forward, peer)
    programs[f'{name} both'] = functools.partial(both, peer)
  seconds = timing.seconds_in_turns(programs, rounds)
  return {
    f'{key}_speed_relative_to_{name}': timing.ratio(
      seconds[f'{name} {way}'], seconds[f'ours {way}']
    )
    for way, key in (('forward', 'forward'), ('both', 'forward_backward'))
    for name in peers
  }


def next_token(contexts: tuple[int, ...], rounds: int) -> dict[str, Any]:
  """Times one more token after contexts of several lengths, per mixer.

  Args:
    contexts: lengths, from short to long.
    rounds: how often each is timed.

  Returns:
    Milliseconds per context, and the largest relative to the first.
  """
  width, results = HEADS * WIDTH, {}
  for name, mixer in MIXERS.items():
    x_BLD = jax.random.normal(jax.random.key(0), (1, 1, width))
    variables = jax.jit(mixer.init)(jax.random.key(1), x_BLD)
    state = mixer.initial_state(1, 1, width, jnp.float32)
    _, made = mixer.apply(variables, x_BLD, state, mutable=['prepared'])
    variables = {**variables, **made}
    step = jax.jit(mixer.apply)
    programs = {}
    for context in contexts:
      state = _read(mixer, variables, context, width)
      programs[str(context)] = functools.partial(step, variables, x_BLD, state)
    seconds = timing.seconds_in_turns(programs, rounds)
    middle = {n: 1e3 * statistics.median(s) for n, s in seconds.items()}
    ratios = [
      timing.ratio(seconds[str(n)], seconds[str(contexts[0])])
      for n in contexts[1:]
    ]
    results[name] = {'ms': middle, 'largest_ratio': max(ratios)}
  return results


def _read(mixer, variables, context, width, piece=1024):
  """Returns the state after a context of random inputs."""
  state = mixer.initial_state(1, context + 1, width, jnp.float32)
  feed = jax.jit(lambda x, state: mixer.apply(variables, x, state)[1])
  piece = min(piece, context)
  for i in range(context // piece):
    shape = 1, piece, width
    state = feed(jax.random.normal(jax.random.key(i), shape), state)
  return state


def measure(
  length: int,
  contexts: tuple[int, ...],
  rounds: int,
  kinds: tuple[str, ...] = ('head', 'channel'),
) -> dict[str, Any]:
  """Measures everything.

  Args:
    length: of the sequences.
    contexts: after which one more token is timed.
    rounds: how often each thing is timed.
    kinds: of decays.
  """
  return {
    'length_heads_width': [length, HEADS, WIDTH],
    **{
      f'decay_per_{kind}': by_chunk(length, kind, rounds)
      | against_torch(length, kind, max(rounds // 2, 1))
      for kind in kinds
    },
    'next_token': next_token(contexts, 10 * rounds),
  }


def main() -> None:
  """Measures and reports."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--save', action='store_true', help='keep the results')
  arguments = parser.parse_args()
  contexts = tuple(1024 * 4**i for i in range(4))
  results = measure(2048, contexts, rounds=5)
  timing.report('matrix_states', results, arguments.save)


if __name__ == '__main__':
  main()
