"""The closed-form classifier: its interface, and scikit-learn's as a peer."""

import jax
import numpy as np
import pytest

from jaxformers.models import ClosedFormClassifier


def make_data(seed=0, size=80, classes=3):
  rng = np.random.default_rng(seed)
  labels = rng.integers(classes, size=size)
  means = 2 * rng.normal(size=(classes, 4))
  x = means[labels] + rng.normal(size=(size, 4)) @ rng.normal(size=(4, 4))
  return x, np.array(['ape', 'bee', 'cat'])[labels]


def test_it_learns_and_predicts_labels_of_any_type():
  x, y = make_data()
  probe = ClosedFormClassifier().fit(x, y)
  assert list(probe.classes_) == ['ape', 'bee', 'cat']
  assert probe.n_features_in_ == 4
  assert probe.score(x, y) > 0.6
  np.testing.assert_allclose(probe.predict_proba(x).sum(1), 1, rtol=1e-5)
  np.testing.assert_allclose(
    np.exp(probe.predict_log_proba(x)), probe.predict_proba(x), rtol=1e-6
  )
  logits = probe.decision_function(x)
  np.testing.assert_allclose(
    logits, x @ probe.coef_.T + probe.intercept_, rtol=1e-3, atol=1e-3
  )
  np.testing.assert_array_equal(
    probe.classes_[logits.argmax(axis=1)], probe.predict(x)
  )


def test_two_classes_have_one_decision():
  x, y = make_data(classes=2)
  probe = ClosedFormClassifier().fit(x, y)
  decision = probe.decision_function(x)
  assert decision.shape == (80,)
  assert probe.coef_.shape == (1, 4)
  np.testing.assert_allclose(
    decision, (x @ probe.coef_.T + probe.intercept_)[:, 0], rtol=1e-3, atol=1e-3
  )
  np.testing.assert_array_equal(decision > 0, probe.predict(x) == 'bee')
  np.testing.assert_allclose(
    probe.predict_proba(x)[:, 1], 1 / (1 + np.exp(-decision)), rtol=1e-4
  )


def test_parts_in_any_order_give_the_same_as_all_at_once():
  x, y = make_data()
  whole = ClosedFormClassifier(shrinkage=0.1).fit(x, y)
  parts = ClosedFormClassifier(shrinkage=0.1, batch_size=16)
  for rows in (slice(50, 80), slice(0, 50)):
    parts.partial_fit(x[rows], y[rows], classes=['cat', 'ape', 'bee', 'ape'])
  np.testing.assert_allclose(
    parts.decision_function(x), whole.decision_function(x), rtol=1e-4, atol=1e-4
  )


def test_priors_replace_the_shares_of_the_data():
  x, y = make_data()
  plain = ClosedFormClassifier().fit(x, y)
  even = ClosedFormClassifier(priors='uniform').fit(x, y)
  chosen = ClosedFormClassifier(priors=(0.2, 0.5, 0.3)).fit(x, y)
  np.testing.assert_allclose(even.coef_, plain.coef_, rtol=1e-6)
  np.testing.assert_allclose(
    chosen.intercept_ - even.intercept_, np.log([0.6, 1.5, 0.9]), atol=1e-4
  )


def test_options_are_read_and_set_by_name():
  probe = ClosedFormClassifier(shrinkage=0.3)
  assert probe.get_params() == {
    'shrinkage': 0.3,
    'priors': None,
    'batch_size': 4096,
  }
  assert probe.set_params(batch_size=8) is probe
  assert probe.batch_size == 8
  with pytest.raises(ValueError, match="no option 'rho'; there are shrinkage"):
    probe.set_params(rho=1)


def test_shrinkage_may_be_estimated():
  x, y = make_data(size=12)
  heads = [
    ClosedFormClassifier(shrinkage=s).fit(x, y).coef_
    for s in ('auto', 'oas', 'ledoit_wolf', 0.5)
  ]
  assert all(np.isfinite(h).all() for h in heads)
  with pytest.raises(ValueError, match='at the data twice: use fit'):
    ClosedFormClassifier('ledoit_wolf').partial_fit(x, y, y)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda p, x, y: p.fit(x[0], y), r'features of shape \[examples'),
    (lambda p, x, y: p.fit(x, y[:3]), 'expected 80 labels, one per row'),
    (lambda p, x, y: p.fit(np.full_like(x, np.nan), y), 'must be finite'),
    (lambda p, x, y: p.fit(x, np.zeros(80)), 'at least two classes'),
    (lambda p, x, y: p.predict(x), 'call fit first'),
    (lambda p, x, y: p.fit(x, y).predict(x[:, 1:]), 'expected 4 features, got 3'),
    (lambda p, x, y: p.partial_fit(x, y), 'first partial_fit needs classes'),
    (lambda p, x, y: p.partial_fit(x, y, ['ape', 'cat']), "'bee'.* none of the"),
    (lambda p, x, y: p.set_params(shrinkage=2.0).fit(x, y), r'in \[0, 1\], got 2'),
    (
      lambda p, x, y: p.set_params(shrinkage=0.0).fit(x[:5], y[:5]),
      '5 examples do not determine a covariance of 4 features',
    ),
    (
      lambda p, x, y: p.set_params(priors=(0.5, 0.5)).fit(x, y),
      'priors must be 3 probabilities',
    ),
    (
      lambda p, x, y: p.set_params(priors='even').fit(x, y),
      "numbers or 'uniform', got 'even'",
    ),
  ],
)  # fmt: skip
def test_what_does_not_fit_is_said(call, message):
  with pytest.raises(ValueError, match=message):
    call(ClosedFormClassifier(), *make_data())


@pytest.mark.parametrize(
  ('solver', 'shrinkage'),
  [('svd', 0.0), ('lsqr', 0.0), ('eigen', 0.0), ('lsqr', 0.3), ('eigen', 0.3)],
)
def test_it_is_the_discriminant_analysis_of_scikit_learn(solver, shrinkage):
  peers = pytest.importorskip('sklearn.discriminant_analysis')
  x, y = make_data()
  peer = peers.LinearDiscriminantAnalysis(
    solver=solver, shrinkage=shrinkage or None
  ).fit(x, y)
  with jax.enable_x64(True):
    ours = ClosedFormClassifier(shrinkage=shrinkage).fit(x, y)
    found, expected = ours.decision_function(x), peer.decision_function(x)
    np.testing.assert_allclose(
      found - found[:, :1], expected - expected[:, :1], rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose(
      ours.predict_proba(x), peer.predict_proba(x), rtol=1e-9, atol=1e-12
    )


def test_scikit_learn_takes_it_for_one_of_its_own():
  base = pytest.importorskip('sklearn.base')
  from sklearn.model_selection import GridSearchCV
  from sklearn.pipeline import make_pipeline
  from sklearn.preprocessing import StandardScaler

  x, y = make_data()
  probe = ClosedFormClassifier(priors='uniform')
  assert base.clone(probe).get_params() == probe.get_params()
  assert base.is_classifier(probe)
  search = GridSearchCV(
    make_pipeline(StandardScaler(), probe),
    {'closedformclassifier__shrinkage': [0.01, 0.5]},
    cv=3,
  ).fit(x, y)
  assert search.best_score_ > 0.5
