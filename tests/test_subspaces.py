"""Subspaces of classes, eq. (8), as functions on tensors. Against the paper: test_paper.py."""

import pytest
import torch
from conftest import LargestTensor, loss_at, normal, random_labels, random_rotation, rows_of, unit_rows

from vmcr2.subspaces import (
    class_subspaces,
    default_components,
    held_out_energies,
    nearest,
    nearest_in_dictionary,
    nearest_subspace,
    places_in_class,
    subspace_energies,
)


@pytest.mark.parametrize(("d", "k", "r"), [(12, 5, 2), (12, 20, 1), (12, 12, 1), (12, 1, 12)])
def test_the_default_is_the_papers_number_of_components_and_1_at_least(d, k, r):
    assert default_components(d, k) == r
    assert class_subspaces(unit_rows(80, d), torch.arange(80) % k, k).shape == (k, d, r)


def test_bases_are_orthonormal_and_energies_are_squared_projections():
    train, labels = unit_rows(60, 8), random_labels(60, 3)
    bases = class_subspaces(train, labels, 3, 2)
    torch.testing.assert_close(bases.mT @ bases, torch.eye(2).double().expand(3, 2, 2))
    test = unit_rows(10, 8, seed=1)
    expected = torch.stack([(test @ basis).square().sum(1) for basis in bases], 1)
    torch.testing.assert_close(subspace_energies(test, bases), expected)


def test_many_samples_come_in_parts(monkeypatch):
    bases, test = class_subspaces(unit_rows(60, 8), random_labels(60, 3), 3, 2), unit_rows(1000, 8, seed=1)
    expected = subspace_energies(test, bases)
    monkeypatch.setattr("vmcr2.subspaces._CACHED", 600)
    torch.testing.assert_close(subspace_energies(test, bases), expected)


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


def test_copies_of_a_sample_span_one_direction_however_they_are_rounded():
    for m in (8, 40):  # fewer samples than dimensions in a class, and more
        labels = torch.arange(m) % 2
        train = torch.linspace(0.1, 3, m)[:, None] * unit_rows(2, 6)[labels]
        bases = class_subspaces(train, labels, 2, 3)
        assert (bases != 0).any(1).sum(1).tolist() == [1, 1]


def test_a_class_without_samples_wins_no_tie():
    bases = class_subspaces(torch.eye(4).double()[[0, 1]], torch.tensor([1, 2]), 3, 1)
    orthogonal_to_all = torch.eye(4).double()[[3]]
    assert nearest_subspace(orthogonal_to_all, bases).tolist() == [1]


def test_a_class_of_which_too_little_is_left_is_described_by_all_there_is():
    """For subspaces of two dimensions: two samples left of class 0 describe any two samples, three of class 1 less."""
    z, labels = unit_rows(40, 8), torch.arange(40) % 2
    places = places_in_class(labels)
    for left in (2, 3):
        learnt_from = (labels == 1) | ((places % 5 > 0) & (places < left + 1))
        rows, energies = next(held_out_energies(z, labels, 2, 2, learnt_from))
        assert torch.equal(rows, (places % 5 == 0).nonzero()[:, 0])
        chosen = (places % 5 > 0) & (learnt_from if left == 3 else torch.ones_like(learnt_from))
        expected = subspace_energies(z[rows], class_subspaces(z[chosen], labels[chosen], 2, 2))
        torch.testing.assert_close(energies, expected)


def test_one_hot_rows_equal_labels():
    train, labels = unit_rows(40, 8), random_labels(40, 3)
    by_labels, by_rows = (class_subspaces(train, membership, 3, 2) for membership in (labels, rows_of(labels, 3)))
    torch.testing.assert_close(by_labels @ by_labels.mT, by_rows @ by_rows.mT)


def test_predictions_do_not_depend_on_rotation_or_scale():
    train, labels, test = unit_rows(60, 8), random_labels(60, 3), unit_rows(30, 8, seed=1)
    expected = nearest_subspace(test, class_subspaces(train, labels, 3, 2))
    turn = random_rotation(8)
    assert torch.equal(nearest_subspace(test @ turn, class_subspaces(train @ turn, labels, 3, 2)), expected)
    for scale in (1e-310, 1e-170, 1e-150, 1e-30, 1e20, 1e140, 1e300):
        assert torch.equal(nearest_subspace(scale * test, class_subspaces(scale * train, labels, 3, 2)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_small_features_have_a_nearest_subspace_in_bases_of_any_dtype(dtype):
    train, labels, test = unit_rows(60, 8), random_labels(60, 3), unit_rows(30, 8, seed=1)
    bases = class_subspaces(train, labels, 3, 2).to(dtype)
    expected, _ = nearest(test, bases)
    assert expected.min() > 0
    for scale in (1e-300, 1e-30, 1e300):
        torch.testing.assert_close(nearest(scale * test, bases)[0], expected, rtol=1e-12, atol=0)


def test_wide_features_are_read_a_few_at_a_time(monkeypatch):
    train, test = unit_rows(60, 64), unit_rows(500, 64, seed=1)
    bases = class_subspaces(train, torch.arange(60) % 3, 3, 2)
    dictionary = loss_at(train, torch.arange(60) % 3, 3, 2, structure="block").dictionary.whole()
    monkeypatch.setattr("vmcr2.subspaces._CACHED", 640)
    for features in (test, 1e-200 * test):
        with LargestTensor() as largest:
            nearest(features, bases)
            nearest_in_dictionary(features, dictionary)
        assert largest.numel <= 640


def test_a_dictionary_predicts_alike_at_any_scale():
    loss = loss_at(unit_rows(60, 8), torch.arange(60) % 3, 3, 2, structure="block")
    test = unit_rows(30, 8, seed=1)
    expected = loss.nearest_class(test)
    for scale in (1e-310, 1e-170, 1e-30, 1e160, 1e300):
        assert torch.equal(loss.nearest_class(scale * test), expected)


def steep(m, d, *, seed=0):
    """Returns rows whose directions have energies over ten orders of magnitude."""
    return normal(m, d, seed=seed) * torch.logspace(0, -5, d, dtype=torch.float64)


def test_small_directions_of_float32_features_count():
    """Their energies lie below float32's eps times the largest, and still decide where the classes differ in them."""
    d = 500
    rows = steep(1200, d)
    bases = class_subspaces(rows.float(), torch.zeros(1200, dtype=torch.long), 1, 50)
    assert bases.dtype == torch.float64
    torch.testing.assert_close(bases[0].square().sum(0), torch.ones(50, dtype=torch.float64))
    one, two = torch.zeros(40, d), torch.zeros(40, d)
    for each, own in ((one, 1), (two, 2)):
        each[:, 0] = 1
        each[:, own] = 1e-5 * torch.where(torch.arange(40) % 2 == 0, 1, -1)
    labels = torch.arange(80) // 40
    bases = class_subspaces(torch.cat([one, two]), labels, 2, 2)
    torch.testing.assert_close(bases.square().sum(1), torch.ones(2, 2, dtype=torch.float64))
    assert torch.equal(nearest_subspace(torch.cat([one, two]), bases), labels)


def test_many_classes_are_searched_for_the_nearest_a_few_at_a_time(monkeypatch):
    z, labels = unit_rows(60, 6), torch.arange(60) % 12
    loss = loss_at(z, labels, 12, 2, structure="block")
    loss.dictionary.codes[:, 0] = 0  # a class without a subspace, and the first
    whole = loss.nearest_class(unit_rows(30, 6, seed=1))
    monkeypatch.setattr("vmcr2.subspaces._BASES", 24)  # two classes
    assert torch.equal(loss.nearest_class(unit_rows(30, 6, seed=1)), whole)
    assert (whole > 1).any()
