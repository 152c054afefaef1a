"""Text of a prepared TensorFlow Datasets data set, without TensorFlow."""

from collections.abc import Iterator
import dataclasses
import importlib
from typing import Any

from jaxformers.data.document import Corpus
from jaxformers.data.document import Document


@dataclasses.dataclass(frozen=True)
class TfdsText:
  """The text feature of a data set that is already prepared on disk.

  Prepare it with `file_format='array_record'`; the other formats need
  TensorFlow, and `parquet` loses examples silently (tensorflow-datasets
  4.9.10), which is why the counts are checked here. Needs the extra `tfds`.

  Args:
    name: Name as for `tfds.builder`, for example 'lm1b' or 'lm1b/1.0.0'.
    data_dir: The folder below which it was prepared.
    feature: Name of its text feature.
    train_split: Split to learn from; 'train[:95%]' works too.
    heldout_split: Split never learned from.
  """

  name: str
  data_dir: str
  feature: str = 'text'
  train_split: str = 'train'
  heldout_split: str = 'test'

  def load(self) -> Corpus:
    """Reads both splits, a document per example, in stored order.

    Returns:
      The corpus.

    Raises:
      ImportError: If the extra is not installed.
      FileNotFoundError: If the data set is not prepared there.
      ValueError: If a split or the feature does not exist, or a split holds
        fewer examples than it claims.
    """
    builder = self._builder()
    if self.feature not in builder.info.features:
      raise ValueError(
        f'the data set {self.name} has no feature {self.feature!r}; it has: '
        f'{", ".join(builder.info.features)}.'
      )
    train, heldout = (
      tuple(document for document in self._documents(builder, split))
      for split in (self.train_split, self.heldout_split)
    )
    return Corpus(self.name, train, heldout)

  def _builder(self) -> Any:
    try:
      importlib.import_module('array_record')  # else tfds wants TensorFlow
      import tensorflow_datasets as tfds
      from tensorflow_datasets.core import read_only_builder
    except ImportError as error:
      raise ImportError(
        'TfdsText needs tensorflow-datasets and array-record: '
        "pip install 'jaxformers[tfds]'"
      ) from error
    try:
      # Unlike `tfds.builder` it runs no data set's code and asks no network.
      return read_only_builder.builder_from_files(
        self.name, data_dir=self.data_dir
      )
    except tfds.core.DatasetNotFoundError as error:
      raise FileNotFoundError(
        f'no data set {self.name} is prepared in {self.data_dir}; prepare it '
        "there with file_format='array_record', or pass its data_dir."
      ) from error

  def _documents(self, builder: Any, split: str) -> Iterator[Document]:
    source = _open(builder, split)
    expected = builder.info.splits[split].num_examples
    if len(source) != expected:
      raise ValueError(
        f'split {split} of {self.name} should have {expected} examples but '
        f'{len(source)} are stored; prepare it again with '
        "file_format='array_record'."
      )
    for i in range(len(source)):
      if text := _as_bytes(source[i][self.feature], self.feature):
        yield Document(f'{split} {i}', text)


def _open(builder: Any, split: str) -> Any:
  try:
    return builder.as_data_source(split)
  except (KeyError, ValueError, NotImplementedError) as error:
    raise ValueError(
      f'cannot read split {split!r} of {builder.info.full_name} '
      f'({builder.info.file_format}): {error}. Its splits are: '
      f'{", ".join(builder.info.splits)}; file_format must be array_record.'
    ) from error


def _as_bytes(text: Any, feature: str) -> bytes:
  if isinstance(text, str):
    return text.encode()
  if not isinstance(text, bytes):
    raise ValueError(
      f'feature {feature!r} holds {type(text).__name__}, not text; pass the '
      'name of a text feature.'
    )
  return text
