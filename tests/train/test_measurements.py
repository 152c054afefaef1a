"""What optimisers measure of themselves, in the metrics of a step."""

import jax
import numpy as np

from jaxformers.data import batch_at
from jaxformers.diagnostics import Monitored
from jaxformers.optim import Constant
from jaxformers.optim import FromOptax
from jaxformers.train.step import init_state
from jaxformers.train.step import train_step_of


def test_a_step_reports_what_its_optimiser_measures(tiny):
  optimizer = Monitored(FromOptax('sgd', Constant(0.1), (), None), r'^[a-z]+')
  experiment = tiny(optimizer=optimizer)
  batch = batch_at(experiment.data.prepare().train, 0, batch_size=8, seed=0)
  state = jax.jit(lambda: init_state(experiment, batch))()
  _, metrics = jax.jit(train_step_of(experiment))(state, batch)
  # Plain descent goes along the gradient, all blocks alike.
  np.testing.assert_allclose(metrics['update_cosine'], 1, rtol=1e-5)
  np.testing.assert_allclose(
    metrics['predicted_change'], -0.1 * metrics['gradient_norm'] ** 2, rtol=1e-4
  )
  blocks = [n for n in metrics if n.startswith('block_gradient_norm/')]
  assert 'block_gradient_norm/embed' in blocks
  squares = sum(metrics[name] ** 2 for name in blocks)
  np.testing.assert_allclose(squares, metrics['gradient_norm'] ** 2, rtol=1e-4)
