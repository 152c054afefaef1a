"""A run small enough to train many times."""

import dataclasses

import pytest

from jaxformers.data import TextData
from jaxformers.models import LanguageModel
from jaxformers.nn import Block
from jaxformers.nn import FeedForward
from jaxformers.nn import Stack
from jaxformers.nn.mixers import Attention
from jaxformers.ops import Rotary
from jaxformers.optim import AdamW
from jaxformers.optim import WarmupCosine
from jaxformers.train import Experiment
from jaxformers.train import MeshShape
from jaxformers.train import Preview


def make_model(**changes):
  block = Block(
    Attention(num_heads=2, position=Rotary()), FeedForward(hidden=16)
  )
  model = LanguageModel(256, 8, Stack(block, 2))
  return model.clone(**changes)


@pytest.fixture
def tiny_model():
  """Returns a maker of tiny language models."""
  return make_model


@pytest.fixture(scope='session')
def text_file(tmp_path_factory):
  """Returns the path of a small text."""
  path = tmp_path_factory.mktemp('text') / 'text.txt'
  lines = [f'{i}: the cat sat on mat number {i % 7}.\n' for i in range(300)]
  path.write_text(''.join(lines))
  return path


@pytest.fixture(scope='session')
def tiny(text_file):
  """Returns a maker of tiny experiments."""

  def make(**changes):
    experiment = Experiment(
      model=make_model(),
      data=TextData(path=str(text_file), length=16),
      optimizer=AdamW(WarmupCosine(peak=1e-2, warmup_steps=2)),
      steps=6,
      batch_size=8,
      mesh=MeshShape(data=8),
      evaluate_every=3,
      checkpoint_every=2,
      preview=Preview(prompt='1: ', tokens=5),
    )
    return dataclasses.replace(experiment, **changes)

  return make
