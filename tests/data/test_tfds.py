import sys

import numpy as np
import pytest

from jaxformers.data import TfdsText

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  tfds = pytest.importorskip('tensorflow_datasets')
  pytest.importorskip('array_record')

  class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.0.0')
    code_path = None  # pytest's modules have none that tfds understands

    def _info(self):
      features = tfds.features.FeaturesDict(
        {
          'text': tfds.features.Text(),
          'n': tfds.features.Scalar(dtype=np.int64),
        }
      )
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, _):
      counts = {'train': 6, 'test': 2}
      return {s: self._generate_examples(n) for s, n in counts.items()}

    def _generate_examples(self, n):
      for i in range(n):
        yield i, {'text': f'tëxt {i}' if i else '', 'n': i}

  path = str(tmp_path_factory.mktemp('tfds'))
  Tiny(data_dir=path, file_format='array_record').download_and_prepare()
  return path


def test_text_arrives_as_bytes_without_tensorflow(data_dir):
  corpus = TfdsText('tiny', data_dir).load()
  assert {d.text for d in corpus.train} == {
    f'tëxt {i}'.encode() for i in range(1, 6)
  }
  assert [d.text for d in corpus.heldout] == ['tëxt 1'.encode()]
  assert 'tensorflow' not in sys.modules


def test_parts_of_a_split_work(data_dir):
  part = TfdsText('tiny', data_dir, train_split='train[:50%]').load().train
  rest = TfdsText('tiny', data_dir, train_split='train[50%:]').load().train
  assert len(part) + len(rest) == 5
  assert not {d.text for d in part} & {d.text for d in rest}


def test_an_unknown_split_lists_those_there_are(data_dir):
  with pytest.raises(ValueError, match="split 'nope'.*train, test"):
    TfdsText('tiny', data_dir, train_split='nope').load()


def test_an_unknown_feature_lists_those_there_are(data_dir):
  with pytest.raises(ValueError, match="no feature 'body'.*text"):
    TfdsText('tiny', data_dir, feature='body').load()


def test_a_feature_that_is_no_text_is_refused(data_dir):
  with pytest.raises(ValueError, match="feature 'n' holds int, not text"):
    TfdsText('tiny', data_dir, feature='n').load()


def test_a_data_set_that_is_not_there_is_named(tmp_path):
  pytest.importorskip('tensorflow_datasets')
  with pytest.raises(FileNotFoundError, match='no data set tiny.*array_record'):
    TfdsText('tiny', str(tmp_path)).load()


def test_a_split_that_lost_examples_is_refused(data_dir, monkeypatch):
  from jaxformers.data import tfds as module

  whole = module._open
  monkeypatch.setattr(
    module, '_open', lambda builder, split: [whole(builder, split)[0]]
  )
  with pytest.raises(ValueError, match='should have 6 examples but 1'):
    TfdsText('tiny', data_dir).load()


def test_a_missing_package_names_the_extra(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  with pytest.raises(ImportError, match=r"pip install 'jaxformers\[tfds\]'"):
    TfdsText('tiny', str(tmp_path)).load()
