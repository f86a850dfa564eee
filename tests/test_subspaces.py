"""The nearest-subspace classifier, as functions and as a scikit-learn estimator."""

import pickle

import numpy as np
import pytest
import reference
import torch
from conftest import random_labels, unit_rows
from sklearn.utils.estimator_checks import parametrize_with_checks

import vmcr2
from vmcr2.subspaces import class_subspaces, nearest_subspace


@pytest.mark.parametrize(("d", "k", "r"), [(12, 3, 4), (12, 3, 1), (5, 4, 2)])
def test_equals_equation_8(d, k, r):
    train, labels, test = unit_rows(80, d), random_labels(80, k), unit_rows(50, d, seed=1)
    expected = reference.nearest_subspace(train.numpy().T, labels.numpy(), test.numpy().T, k, r)
    bases = class_subspaces(train, labels, k, r)
    assert nearest_subspace(test, bases).tolist() == expected.tolist()
    estimator = vmcr2.NearestSubspaceClassifier(r).fit(train.numpy(), labels.numpy())
    assert estimator.predict(test.numpy()).tolist() == expected.tolist()
    assert estimator.predict(test.numpy().astype(np.float32)).tolist() == expected.tolist()
    assert estimator.decision_function(test.numpy()).shape == (50, k)


def test_default_is_the_papers_number_of_components():
    train, labels = unit_rows(80, 12), torch.arange(80) % 5
    assert class_subspaces(train, labels, 5).shape == (5, 12, 2)
    assert class_subspaces(train, torch.arange(80) % 20, 20).shape == (20, 12, 1)
    assert vmcr2.NearestSubspaceClassifier().fit(train.numpy(), labels.numpy()).n_components_ == 2


def test_a_class_of_low_rank_claims_only_what_it_spans():
    """One sample of class 1 spans one direction; the other two of its basis must not attract anything."""
    train = torch.eye(6, dtype=torch.float64)[[0, 1, 2, 3]]
    bases = class_subspaces(train, torch.tensor([0, 0, 0, 1]), 3, 3)
    torch.testing.assert_close(bases[1].square().sum(0), torch.tensor([1.0, 0, 0], dtype=torch.float64))
    assert (bases[2] == 0).all()
    mixed = torch.nn.functional.normalize(
        torch.tensor([[0.1, 0.1, 0.1, 0, 1, 1], [0, 0, 0, 0, 0, 1.0]]).double(), dim=1
    )
    assert nearest_subspace(mixed, bases).tolist()[0] == 0
    assert nearest_subspace(mixed, bases).tolist()[1] != 2  # a class without samples wins nothing, not even a tie


def test_soft_membership():
    train, labels = unit_rows(40, 8), random_labels(40, 3)
    rows = torch.nn.functional.one_hot(labels, 3).double()
    by_labels, by_rows = (class_subspaces(train, membership, 3, 2) for membership in (labels, rows))
    torch.testing.assert_close(by_labels @ by_labels.mT, by_rows @ by_rows.mT)


def test_any_labels_and_a_pickle():
    train, names = unit_rows(60, 8).numpy(), np.array(["ash", "elm", "oak"])[random_labels(60, 3).numpy()]
    estimator = vmcr2.NearestSubspaceClassifier(2).fit(train, names)
    again = pickle.loads(pickle.dumps(estimator))
    assert (again.predict(train) == estimator.predict(train)).all()
    assert set(estimator.predict(train)) <= {"ash", "elm", "oak"}


@parametrize_with_checks([vmcr2.NearestSubspaceClassifier()])
def test_scikit_learn_conventions(estimator, check):
    check(estimator)
