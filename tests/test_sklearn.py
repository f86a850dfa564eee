"""`NearestSubspaceClassifier` as scikit-learn expects an estimator to be."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from conftest import LargestTensor, random_labels, unit_rows
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
from sklearn.utils.estimator_checks import parametrize_with_checks
from test_subspaces import steep

import vmcr2
from vmcr2.sklearn import NearestSubspaceClassifier
from vmcr2.subspaces import nearest_subspace


@parametrize_with_checks([NearestSubspaceClassifier()])
def test_scikit_learn_conventions(estimator, check):
    check(estimator)


def test_the_package_gives_the_same_class():
    assert vmcr2.NearestSubspaceClassifier is NearestSubspaceClassifier
    assert "NearestSubspaceClassifier" in dir(vmcr2)


def test_tensors_may_have_a_gradient():
    rows, labels = unit_rows(40, 6).requires_grad_(), random_labels(40, 3)
    fitted = NearestSubspaceClassifier().fit(rows, labels)
    plain = NearestSubspaceClassifier().fit(rows.detach().numpy(), labels.numpy())
    assert (fitted.predict(rows) == plain.predict(rows.detach().numpy())).all()


def test_bfloat16_is_taken():
    z, labels = unit_rows(40, 8, dtype=torch.bfloat16), random_labels(40, 3)
    fitted = vmcr2.NearestSubspaceClassifier().fit(z, labels)
    expected = vmcr2.NearestSubspaceClassifier().fit(z.float(), labels)
    np.testing.assert_array_equal(fitted.predict(z), expected.predict(z.float()))


def test_a_class_of_fewer_samples_than_its_subspace_has_dimensions_is_warned_of():
    z, labels = unit_rows(60, 16), torch.arange(60) >= 5
    with pytest.warns(
        UserWarning, match="1 of 2 classes have fewer samples than the 8 dimensions .* such as 1"
    ) as said:
        vmcr2.NearestSubspaceClassifier().fit(z, labels)
    with pytest.warns(UserWarning, match="such as 1") as also:
        vmcr2.CodingRateClassifier(16, epochs=1, hidden=8).fit(z, labels)
    assert [each.filename for each in (*said, *also)] == [__file__] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vmcr2.NearestSubspaceClassifier(8).fit(z, labels)
        vmcr2.NearestSubspaceClassifier().fit(z[:13], torch.arange(13) < 6)  # nearly as many


def test_attributes_are_those_documented():
    train, labels = unit_rows(80, 12).numpy(), np.arange(80) % 5
    estimator = NearestSubspaceClassifier().fit(train, labels)
    assert estimator.n_components_ == 2
    assert estimator.n_features_in_ == 12
    assert estimator.components_.shape == (5, 12, 2)
    assert estimator.classes_.tolist() == [0, 1, 2, 3, 4]
    assert clone(estimator).get_params() == {"n_components": None}


@pytest.mark.parametrize("k", [2, 3])
def test_the_decision_is_minus_the_squared_distance_and_predict_takes_its_largest(k):
    train, labels, test = unit_rows(60, 8).numpy(), random_labels(60, k).numpy(), unit_rows(30, 8, seed=1).numpy()
    estimator = NearestSubspaceClassifier(2).fit(train, labels)
    distances = np.stack([np.square(test - test @ basis @ basis.T).sum(1) for basis in estimator.components_], 1)
    scores = estimator.decision_function(test)
    np.testing.assert_allclose(scores, -distances if k > 2 else distances[:, 0] - distances[:, 1], atol=1e-12)
    assert estimator.predict(test).tolist() == distances.argmin(1).tolist()
    assert estimator.predict(test.astype(np.float32)).tolist() == distances.argmin(1).tolist()


def test_the_nearest_class_is_found_without_the_table_of_all_samples_by_all_classes(monkeypatch):
    train, labels, test = unit_rows(60, 8).numpy(), np.arange(60) % 20, unit_rows(500, 8, seed=1)
    estimator = NearestSubspaceClassifier(2).fit(train, labels)
    expected, energies = estimator.predict(test), estimator.decision_function(test).max(1)
    monkeypatch.setattr("vmcr2.subspaces._ENERGIES", 600)
    monkeypatch.setattr("vmcr2.subspaces._CACHED", 2400)
    with LargestTensor() as largest:
        assert (estimator.predict(test) == expected).all()
        np.testing.assert_allclose(estimator.score_samples(test), -np.sqrt(-energies), atol=1e-12)
        assert nearest_subspace(test, torch.from_numpy(estimator.components_)).tolist() == expected.tolist()
    assert largest.numel < 500 * 20


def test_any_labels_and_a_pickle():
    train, names = unit_rows(60, 8).numpy(), np.array(["ash", "elm", "oak"])[random_labels(60, 3).numpy()]
    estimator = NearestSubspaceClassifier(2).fit(train, names)
    again = pickle.loads(pickle.dumps(estimator))
    assert (again.predict(train) == estimator.predict(train)).all()
    assert set(estimator.predict(train)) <= {"ash", "elm", "oak"}


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_a_fit_that_fails_changes_nothing(method):
    rows, names, others = unit_rows(60, 8).numpy(), np.array(["a", "b", "c"] * 20), np.array(["p", "q", "r"] * 20)
    classes = {"classes": ["a", "b", "c"]} if method == "partial_fit" else {}
    estimator = getattr(NearestSubspaceClassifier(), method)(rows, names, **classes)
    expected = estimator.predict(rows)
    for settings, X, y, message in (
        ({"n_components": 999}, rows, others, "n_components"),
        ({}, rows, ["z"] * 60, "2 classes"),
        ({"n_components": 999}, rows[:, :5], others, "n_components"),
    ):
        with pytest.raises(vmcr2.InputError, match=message):
            estimator.set_params(**settings).fit(X, y)
        estimator.set_params(n_components=None)
        assert estimator.predict(rows).tolist() == expected.tolist()
    getattr(estimator, method)(rows, names)
    assert estimator.predict(rows).tolist() == expected.tolist()


def test_a_first_partial_fit_that_fails_can_be_made_again():
    rows, labels = unit_rows(60, 8).numpy(), random_labels(60, 2).numpy()
    estimator = NearestSubspaceClassifier(999)
    with pytest.raises(vmcr2.InputError, match="n_components"):
        estimator.partial_fit(rows, labels, classes=[0, 1])
    estimator.set_params(n_components=2)
    with pytest.raises(vmcr2.InputError, match="2 classes"):
        estimator.partial_fit(rows, np.zeros(60, int), classes=[0])
    assert estimator.partial_fit(rows, labels, classes=[0, 1]).predict(rows).shape == (60,)


def test_a_pipeline_and_a_grid_search():
    train, labels = 5 * unit_rows(60, 8).numpy(), random_labels(60, 3).numpy()
    model = make_pipeline(Normalizer(), NearestSubspaceClassifier())
    search = GridSearchCV(model, {"nearestsubspaceclassifier__n_components": [1, 2, None]}, cv=3).fit(train, labels)
    assert search.predict(train).shape == (60,)


def test_fitted_on_float32_at_500_dimensions_it_keeps_all_directions():
    rows, labels = steep(1200, 500).float().numpy(), np.arange(1200) % 10
    assert rows.dtype == np.float32
    estimator = NearestSubspaceClassifier().fit(rows, labels)
    assert estimator.n_components_ == 50
    np.testing.assert_allclose(np.square(estimator.components_).sum(1), np.ones((10, 50)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e20])
def test_rows_of_any_scale_are_classified_as_at_scale_1(dtype, scale):
    train, labels, test = unit_rows(90, 12), random_labels(90, 3).numpy(), unit_rows(60, 12, seed=1)
    expected = NearestSubspaceClassifier(3).fit(train.numpy(), labels).predict(test.numpy())
    small, large = ((scale * each).numpy().astype(dtype) for each in (train, test))
    assert NearestSubspaceClassifier(3).fit(small, labels).predict(large).tolist() == expected.tolist()
    # And rows of all scales at once, to be classified by what was fitted at scale 1.
    mixed = (test.numpy() * np.where(np.arange(60) % 2, scale, 1.0)[:, None]).astype(dtype)
    assert NearestSubspaceClassifier(3).fit(train.numpy(), labels).predict(mixed).tolist() == expected.tolist()


def test_entries_whose_squares_float64_does_not_hold_are_refused():
    train, labels = unit_rows(60, 8).numpy(), random_labels(60, 3).numpy()
    estimator = NearestSubspaceClassifier(2).fit(train, labels)
    for call in (lambda X: NearestSubspaceClassifier(2).fit(X, labels), estimator.predict_proba):
        with pytest.raises(ValueError, match=r"X must have entries of at most 1e\+150 in size, got .*e\+15"):
            call(1e160 * train)


@pytest.mark.parametrize("classes", [2, 4])
def test_a_class_without_a_sample_is_never_predicted(classes):
    """Also where a sample is orthogonal to all subspaces, so that its distances to all are alike."""
    rows, last = np.eye(8)[[2, 3]], classes - 1
    estimator = vmcr2.NearestSubspaceClassifier().partial_fit(rows, [last, last], classes=np.arange(classes))
    assert estimator.predict(np.eye(8)).tolist() == [last] * 8
    assert estimator.predict_proba(np.eye(8))[:, 0].tolist() == [0.0] * 8


@pytest.mark.parametrize("kind", [vmcr2.NearestSubspaceClassifier, vmcr2.CodingRateClassifier])
def test_entries_whose_squares_vanish_are_refused(kind):
    with pytest.raises(vmcr2.InputError, match="X must have entries above 1e-150"):
        kind().fit(1e-200 * unit_rows(20, 4).numpy(), np.arange(20) % 2)
