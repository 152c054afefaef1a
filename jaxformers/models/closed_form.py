"""A classifier of fixed features that needs no gradient descent.

```python
probe = ClosedFormClassifier().fit(features, labels)
probe.predict_log_proba(others)
for features, labels in batches:
  probe.partial_fit(features, labels, classes=range(10))
head = {'kernel': probe.head_.kernel_DV, 'bias': probe.head_.bias_V}  # a Dense
```
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.ops.closed_form import Shrinkage
from jaxformers.ops.closed_form import lda_init
from jaxformers.ops.closed_form import lda_solve
from jaxformers.ops.closed_form import lda_update
from jaxformers.ops.closed_form import ledoit_wolf_shrinkage

_update = jax.jit(lda_update, donate_argnums=0)
_ledoit_wolf = jax.jit(ledoit_wolf_shrinkage)
_solve = jax.jit(lda_solve)
_solve_by_rule = jax.jit(lda_solve, static_argnames='shrinkage')
_logits = jax.jit(lambda head, x: head.logits(x))


class ClosedFormClassifier:
  """Logistic regression in closed form, with scikit-learn's interface.

  Linear discriminant analysis from statistics that stream and merge, so unlike
  scikit-learn's it has `partial_fit`. With `shrinkage=0.0` both agree.

  Source: Su Jianlin, "Linear models from a probability view: does logistic
  regression have an analytic solution?", 2021, kexue.fm/archives/8578.

  Attributes:
    classes_: the labels, sorted; the columns of all outputs.
    n_features_in_: width of the features.
    coef_: `[V, D]`, weights of the logits; of two classes `[1, D]`, those of
      their difference.
    intercept_: offsets, likewise.
    head_: the logits as a `jaxformers.ops.SoftmaxHead`.
    statistics_: what was gathered, `jaxformers.ops.ClassStatistics`, which
      `jaxformers.ops.lda_merge` merges with those of other data.

  Args:
    shrinkage: see `jaxformers.ops.lda_solve`; also `'ledoit_wolf'`, which `fit`
      alone can do.
    priors: probabilities of the classes; `'uniform'` for equal ones, None for
      their shares of the data.
    batch_size: rows that are taken at a time.
  """

  _estimator_type = 'classifier'

  def __init__(
    self,
    shrinkage: Shrinkage = 'auto',
    priors: Sequence[float] | str | None = None,
    batch_size: int = 4096,
  ):
    self.shrinkage = shrinkage
    self.priors = priors
    self.batch_size = batch_size

  def get_params(self, deep: bool = True) -> dict[str, Any]:
    """Returns the options by name.

    Args:
      deep: without effect, as there are no parts.
    """
    del deep
    return {k: getattr(self, k) for k in ('shrinkage', 'priors', 'batch_size')}

  def set_params(self, **params: Any) -> 'ClosedFormClassifier':
    """Sets options by name.

    Args:
      **params: some of the options.

    Raises:
      ValueError: if there is no such option.
    """
    for name, value in params.items():
      if name not in self.get_params():
        raise ValueError(
          f'no option {name!r}; there are {", ".join(self.get_params())}.'
        )
      setattr(self, name, value)
    return self

  def fit(self, X: Any, y: Any) -> 'ClosedFormClassifier':
    """Forgets what it knew and learns features and labels.

    Args:
      X: features `[N, D]`.
      y: labels `[N]`, of any type that sorts.

    Raises:
      ValueError: if they do not fit, or need shrinkage.
    """
    features, labels = _checked(X), np.asarray(y)
    self._begin(features, np.unique(labels))
    indices = self._add(features, labels)
    shrinkage = self.shrinkage
    if shrinkage == 'ledoit_wolf':
      shrinkage = _ledoit_wolf(self.statistics_, features, indices)
    return self._finish(shrinkage)

  def partial_fit(
    self, X: Any, y: Any, classes: Any = None
  ) -> 'ClosedFormClassifier':
    """Learns further features and labels; their order does not matter.

    Args:
      X: features `[N, D]`.
      y: labels `[N]`.
      classes: all labels that will come; needed by the first call.

    Raises:
      ValueError: if they do not fit, or need another look at all data.
    """
    if self.shrinkage == 'ledoit_wolf':
      raise ValueError(
        "shrinkage='ledoit_wolf' looks at the data twice: use fit, or 'oas'."
      )
    features, labels = _checked(X), np.asarray(y)
    if not self.__sklearn_is_fitted__():
      if classes is None:
        raise ValueError('the first partial_fit needs classes, all labels.')
      self._begin(features, np.unique(np.asarray(classes)))
    self._add(features, labels)
    return self._finish(self.shrinkage)

  def decision_function(self, X: Any) -> np.ndarray:
    """Returns logits `[N, V]`; of two classes their difference `[N]`.

    Args:
      X: features `[N, D]`.
    """
    logits = self._logits(X)
    return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

  def predict(self, X: Any) -> np.ndarray:
    """Returns the likeliest labels `[N]`.

    Args:
      X: features `[N, D]`.
    """
    likeliest = self._logits(X).argmax(axis=1)
    return self.classes_[likeliest]

  def predict_log_proba(self, X: Any) -> np.ndarray:
    """Returns logarithms of posterior probabilities, `[N, V]`.

    Args:
      X: features `[N, D]`.
    """
    return np.asarray(jax.nn.log_softmax(self._logits(X)))

  def predict_proba(self, X: Any) -> np.ndarray:
    """Returns posterior probabilities, `[N, V]`.

    Args:
      X: features `[N, D]`.
    """
    return np.exp(self.predict_log_proba(X))

  def score(self, X: Any, y: Any) -> float:
    """Returns the share of labels that are predicted.

    Args:
      X: features `[N, D]`.
      y: labels `[N]`.
    """
    return float(np.mean(self.predict(X) == np.asarray(y)))

  def __sklearn_is_fitted__(self):
    return hasattr(self, 'statistics_')

  def __sklearn_tags__(self):
    from sklearn import utils  # only scikit-learn asks

    return utils.Tags(
      estimator_type='classifier',
      target_tags=utils.TargetTags(required=True),
      classifier_tags=utils.ClassifierTags(),
      input_tags=utils.InputTags(),
    )

  def _begin(self, features, classes):
    if len(classes) < 2:
      raise ValueError(f'expected at least two classes, got {classes}.')
    self.classes_ = classes
    self.n_features_in_ = features.shape[1]
    self.statistics_ = lda_init(features.shape[1], len(classes), features.dtype)

  def _add(self, features, labels):
    """Adds data to the statistics; returns the indices of the labels."""
    self._check_width(features)
    if labels.shape != features.shape[:1]:
      raise ValueError(
        f'expected {len(features)} labels, one per row, got {labels.shape}.'
      )
    indices = np.searchsorted(self.classes_, labels)
    indices = np.minimum(indices, len(self.classes_) - 1)
    unknown = self.classes_[indices] != labels
    if unknown.any():
      raise ValueError(
        f'label {labels[unknown][0]!r} is none of the classes {self.classes_}.'
      )
    for batch, batch_labels in self._batches(features, indices):
      self.statistics_ = _update(self.statistics_, batch, batch_labels)
    return indices

  def _batches(self, features, indices) -> Iterator[tuple[Any, Any]]:
    """Cuts rows to batches of few sizes, so that few programs are compiled."""
    for start in range(0, len(features), self.batch_size):
      rows = features[start : start + self.batch_size]
      size = min(self.batch_size, 1 << (len(rows) - 1).bit_length())
      gap = size - len(rows)
      labels = indices[start : start + self.batch_size]
      yield (
        np.pad(rows, ((0, gap), (0, 0))),
        np.pad(labels, (0, gap), constant_values=-1),
      )

  def _finish(self, shrinkage):
    examples = float(self.statistics_.count_V.sum())
    least = self.n_features_in_ + len(self.classes_)
    if isinstance(shrinkage, (int, float)):
      if not 0 <= shrinkage <= 1:
        raise ValueError(f'shrinkage must lie in [0, 1], got {shrinkage}.')
      if shrinkage == 0 and examples <= least:
        raise ValueError(
          f'{examples:g} examples do not determine a covariance of '
          f'{self.n_features_in_} features: use shrinkage, such as 0.1.'
        )
    solve = _solve_by_rule if isinstance(shrinkage, str) else _solve
    self.head_ = solve(
      self.statistics_, shrinkage=shrinkage, priors_V=self._priors()
    )
    kernel, bias = (
      np.asarray(self.head_.kernel_DV).T,
      np.asarray(self.head_.bias_V),
    )
    if len(self.classes_) == 2:
      kernel, bias = np.diff(kernel, axis=0), np.diff(bias)
    self.coef_, self.intercept_ = kernel, bias
    return self

  def _priors(self):
    if self.priors is None:
      return None
    classes = len(self.classes_)
    if isinstance(self.priors, str):
      if self.priors != 'uniform':
        raise ValueError(
          f"priors must be numbers or 'uniform', got {self.priors!r}."
        )
      return jnp.full(classes, 1 / classes)
    priors = np.asarray(self.priors, np.float64)
    if (
      priors.shape != (classes,)
      or abs(priors.sum() - 1) > 1e-6
      or (priors < 0).any()
    ):
      raise ValueError(
        f'priors must be {classes} probabilities that sum to 1, got {self.priors}.'
      )
    return jnp.asarray(priors)

  def _logits(self, X):
    if not self.__sklearn_is_fitted__():
      raise ValueError('the classifier has learnt nothing: call fit first.')
    features = _checked(X)
    self._check_width(features)
    return np.asarray(_logits(self.head_, features))

  def _check_width(self, features):
    if features.shape[1] != self.n_features_in_:
      raise ValueError(
        f'expected {self.n_features_in_} features, got {features.shape[1]}.'
      )


def _checked(X):
  """Returns features as finite float32, or float64 if JAX may use that."""
  X = np.asarray(X)
  if X.ndim != 2 or X.shape[0] == 0:
    raise ValueError(
      f'expected features of shape [examples, features], got {X.shape}.'
    )
  wide = X.dtype == np.float64 and jax.config.jax_enable_x64
  X = X.astype(np.float64 if wide else np.float32)
  if not np.isfinite(X).all():
    raise ValueError('features must be finite; fill or drop what is missing.')
  return X
