"""The HiPPO-RNN, against a loop in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.ops import ApproximateLegS
from jaxformers.ops import ExactLegS
from jaxformers.ops import HippoRNNWeights
from jaxformers.ops import hippo_rnn
from jaxformers.ops import legs_transition
from jaxformers.ops.segments import advance
from jaxformers.ops.segments import start

B, L, M, E, S = 2, 7, 2, 3, 4
rng = np.random.default_rng(0)
WRITE, GATE = rng.normal(size=(B, L, M)), rng.normal(size=(B, L, E))
CANDIDATE = rng.normal(size=(B, L, E))
WEIGHTS = HippoRNNWeights(
  rng.normal(size=(E, M)), *rng.normal(size=(2, S, M, E))
)
run = jax.jit(hippo_rnn, static_argnums=4)


def looped(write, gate, candidate):
  """The cell of the authors' code, for one row."""
  h, m, outputs = np.zeros(E), np.zeros((S, M)), []
  for k in range(len(write)):
    u = write[k] + h @ WEIGHTS.write_EM
    step = legs_transition(S, k / (k + 1))
    m = step.a_ST @ m + np.outer(step.b_S, u)
    read = lambda w, m=m: np.tensordot(m, w, 2)
    g = 1 / (1 + np.exp(-gate[k] - read(WEIGHTS.gate_SME)))
    fresh = np.tanh(candidate[k] + read(WEIGHTS.candidate_SME))
    h = (1 - g) * h + g * fresh
    outputs.append(h)
  return np.stack(outputs)


def near(actual, expected, tolerance=1e-12):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def test_it_is_the_cell_of_the_authors_in_any_pieces():
  inputs = WRITE, GATE, CANDIDATE
  expected = np.stack([looped(*(x[b] for x in inputs)) for b in range(B)])
  with jax.enable_x64(True):
    near(run(*inputs, WEIGHTS, ExactLegS(S)).out, expected)
    state, outputs = None, []
    for cut in (slice(0, 2), slice(2, L)):
      piece = (x[:, cut] for x in inputs)
      out, state = run(*piece, WEIGHTS, ExactLegS(S), state)
      outputs.append(out)
    near(np.concatenate(outputs, axis=1), expected)
    near(state.h_BE, expected[:, -1])


def test_packed_segments_are_as_if_alone():
  segments = np.array([[1, 1, 0, 1, 2, 2, 0], [3] * L])
  places, _ = advance(start(B), jnp.asarray(segments))
  is_token = segments[..., None] > 0
  inputs = [np.where(is_token, x, np.nan) for x in (WRITE, GATE, CANDIDATE)]
  with jax.enable_x64(True):
    out, last = run(*inputs, WEIGHTS, ExactLegS(S), places=places)
  for segment in (1, 2):
    place = segments[0] == segment
    near(out[0, place], looped(*(x[0, place] for x in inputs)))
  assert last.memory.elapsed_B.tolist() == [2, L]


def test_what_does_not_fit_is_refused():
  for dynamics in (ExactLegS(S + 1), ApproximateLegS(S + 1)):
    with pytest.raises(ValueError, match='for 5 states, inputs'):
      hippo_rnn(WRITE, GATE, CANDIDATE, WEIGHTS, dynamics)
