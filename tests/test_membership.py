"""Π: one form inside the package, classes in groups of like size, and no matrix of k×m×m anywhere."""

import pytest
import torch
from conftest import LargestTensor, checked, normal, random_labels, random_membership, random_rows, rows_of, unit_rows
from hypothesis import given
from hypothesis import strategies as st

import vmcr2
from vmcr2.membership import Membership, read_membership

KINDS = ["balanced", "labels", "soft", "confident"]


def membership_of(kind, m, k, *, seed=0):
    if kind == "confident":  # soft rows of which few entries are above 0
        rows = random_rows(m, k, seed=seed)
        rows = torch.where(rows >= rows.topk(min(2, k), 1).values[:, -1:], rows, 0)
        return rows / rows.sum(1, keepdim=True)
    return random_membership(m, k, kind, seed=seed)


@given(st.integers(1, 40), st.integers(1, 30), st.sampled_from(KINDS), st.booleans(), st.integers(0, 10**6))
def test_groups_hold_every_weight_of_every_class_that_has_a_sample_once(m, k, kind, merged, seed):
    membership = membership_of(kind, m, k, seed=seed)
    pi = checked(unit_rows(m, 4), membership, k)
    found = torch.zeros(m, k, dtype=torch.float64)
    seen = []
    for group in pi.groups(4, merged=merged):
        seen += group.classes.flatten().tolist()
        rows = torch.arange(m).expand(1, m) if group.rows is None else group.rows
        b, n, c = group.weights.shape
        places = (rows[:, :, None].expand(b, n, c), group.classes[:, None].expand(b, n, c))
        found.index_put_(places, group.weights, accumulate=True)
        torch.testing.assert_close(group.weights.sum(1), group.counts)
        torch.testing.assert_close(group.shares.sum(1), torch.ones_like(group.counts))
    torch.testing.assert_close(found, rows_of(membership, k))
    assert sorted(seen) == pi.present.tolist() == rows_of(membership, k).any(0).nonzero()[:, 0].tolist()


def test_padding_at_most_doubles_a_group_however_unbalanced_the_classes():
    labels = torch.repeat_interleave(torch.arange(6), torch.tensor([1, 2, 3, 100, 1000, 60]))
    for group in checked(unit_rows(len(labels), 4), labels, 9).groups(4):
        assert group.rows is not None
        assert group.rows.shape[1] < 2 * int(group.counts.min())


def test_the_classes_of_a_small_batch_may_be_merged_into_one_group():
    labels = torch.repeat_interleave(torch.arange(6), torch.tensor([1, 2, 3, 100, 300, 60]))
    membership = checked(unit_rows(len(labels), 4), labels, 9)
    (group,) = membership.groups(4, merged=True)
    assert group.rows is not None
    assert group.rows.shape == (6, 300)
    for row, weights, j in zip(group.rows, group.weights[..., 0], group.classes[:, 0], strict=True):
        assert sorted(row[weights > 0].tolist()) == (labels == j).nonzero()[:, 0].tolist()
    # Not where a large class would make small ones cost as much as itself.
    assert len(membership.groups(40, merged=True)) == len(membership.groups(40)) > 1


def test_dense_rows_are_one_set_of_all_samples():
    (group,) = checked(unit_rows(50, 4), random_rows(50, 20), 20).groups(4)
    assert group.rows is None
    assert group.weights.shape == (1, 50, 20)
    assert torch.equal(group.take(unit_rows(50, 4))[0], unit_rows(50, 4))


def test_a_learned_membership_keeps_entries_of_0_since_they_have_a_gradient():
    rows = rows_of(random_labels(20, 30), 30)
    assert all(group.rows is not None for group in checked(unit_rows(20, 4), rows, 30).groups(4))
    (group,) = checked(unit_rows(20, 4), rows.requires_grad_(), 30).groups(4)
    assert group.rows is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_that_16_bits_hold_may_sum_to_1_as_nearly_as_those_can(dtype):
    rows = torch.softmax(3 * normal(50, 10), dim=1).to(dtype)
    off = (rows.double().sum(1) - 1).abs().max()
    assert off > 1e-4
    assert float(checked(unit_rows(50, 4), rows, 10).counts.sum()) == pytest.approx(50, rel=1e-6)
    with pytest.raises(vmcr2.InputError, match="divide the rows by their sums"):
        checked(unit_rows(50, 4), rows.double(), 10)


def test_rows_rounded_to_16_bits_give_no_negative_rate_reduction():
    z, rows = unit_rows(300, 6).float(), torch.full((300, 3), 1 / 3, dtype=torch.bfloat16)
    assert rows.double().sum(1).max() > 1.001
    assert vmcr2.rate_reduction(z, rows).reduction == pytest.approx(0, abs=1e-5)
    assert vmcr2.MCR2Loss(3)(z, rows) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", ["labels", "confident"])
def test_sparse_membership_of_many_classes_stays_small(kind):
    m, d, k = 200, 16, 5000
    z, membership = unit_rows(m, d), membership_of(kind, m, k)
    with LargestTensor() as largest:
        pi = checked(z, membership, k)
        for group in pi.groups(d):
            group.take(z)
    assert largest.numel <= max(membership.numel(), 4 * m * d, k), largest.shape


@pytest.mark.parametrize("kind", KINDS)
def test_spread_and_collect_are_products_with_pi(kind):
    membership = membership_of(kind, 30, 4)
    pi, rows = checked(unit_rows(30, 4), membership, 4), rows_of(membership, 4)
    by_class, by_sample = normal(4, 3), normal(30, 3, seed=1)
    torch.testing.assert_close(pi.spread(by_class), rows @ by_class)
    torch.testing.assert_close(pi.collect(by_sample), rows.T @ by_sample)
    torch.testing.assert_close(pi.class_weights, rows.mean(0))
    assert pi.num_samples == 30
    assert pi.num_classes == 4


@pytest.mark.parametrize("kind", KINDS)
def test_among_present_renumbers_the_classes_that_have_a_sample(kind):
    z = unit_rows(30, 4)
    membership = membership_of(kind, 30, 4)
    gap = torch.tensor([1, 4, 5, 7])
    if membership.ndim == 1:
        membership = gap[membership]
    else:
        wide = torch.zeros(30, 9, dtype=torch.float64)
        wide[:, gap] = membership
        membership = wide
    pi = checked(z, membership, 9)
    few = pi.among_present()
    values = normal(9, 3)
    torch.testing.assert_close(few.spread(values[gap]), pi.spread(values))
    torch.testing.assert_close(few.counts, pi.counts[pi.present])
    assert few.sizes.tolist() == pi.sizes[pi.sizes > 0].tolist()
    assert few.among_present() is few


def test_sizes_count_the_samples_with_a_share_and_counts_their_weight():
    rows = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).double()
    pi = checked(unit_rows(2, 3), rows, 3)
    assert pi.sizes.tolist() == [2, 1, 0]
    assert pi.counts.tolist() == [1.5, 0.5, 0.0]


def test_a_class_of_hardly_any_weight_is_absent():
    rows = torch.tensor([[1.0, 1e-30], [1.0, 1e-38]]).double()
    pi = checked(unit_rows(2, 3), rows, 2)
    assert pi.counts.tolist() == [2.0, 0.0]
    assert pi.present.tolist() == [0]
    little = torch.tensor([[1.0, 1e-12], [1.0, 1e-12]]).double()  # which float64 still tells from nothing
    assert checked(unit_rows(2, 3), little, 2).present.tolist() == [0, 1]


def test_detach_and_to_keep_the_rest():
    rows = random_rows(10, 3).requires_grad_()
    pi = checked(unit_rows(10, 4), rows, 3)
    fixed = pi.detach()
    assert not fixed.counts.requires_grad
    assert fixed.detach() is fixed
    assert pi.to(torch.float64) is pi
    narrow = fixed.to(torch.float32)
    assert narrow.soft is not None
    assert narrow.soft.dtype == narrow.counts.dtype == torch.float32
    assert torch.equal(narrow.sizes, pi.sizes)


def test_what_is_read_beside_the_sizes_comes_back_as_it_was():
    beside = torch.tensor([0.25, 1e-3])
    for membership in (random_labels(10, 3), random_rows(10, 3)):
        pi, read = read_membership(unit_rows(10, 4), membership, 3, beside=beside)
        assert isinstance(pi, Membership)
        assert read is not None
        torch.testing.assert_close(read, beside.double())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type(dtype):
    labels = random_labels(20, 5)
    narrow = checked(unit_rows(20, 4), labels.to(dtype), 5)
    assert torch.equal(narrow.spread(torch.eye(5, dtype=torch.float64)), rows_of(labels, 5))
