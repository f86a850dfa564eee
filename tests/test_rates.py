"""R, R_c and ΔR of eq. (1) against the paper's formulas, their gradients and their properties."""

import numpy as np
import pytest
import reference
import torch
from conftest import random_labels, random_rows, unit_rows
from hypothesis import given
from hypothesis import strategies as st

import vmcr2
from vmcr2 import linalg
from vmcr2.linalg import half_logdet

SIZES = [(40, 12, 4), (10, 30, 3), (60, 5, 7), (1, 6, 1), (33, 33, 2)]


@pytest.mark.parametrize(("m", "d", "k"), SIZES)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("eps_sq", [0.5, 0.05])
def test_rates_equal_the_paper(m, d, k, soft, eps_sq):
    z, pi = unit_rows(m, d), random_rows(m, k)
    labels = random_labels(m, k)
    rows = pi.numpy() if soft else reference.one_hot(labels.numpy(), k)
    expected = reference.rates(z.numpy().T, rows, eps_sq)
    got = vmcr2.rate_reduction(z, pi if soft else labels, num_classes=k, eps_sq=eps_sq)
    assert [float(rate) for rate in got] == pytest.approx(expected, rel=1e-12)
    assert float(vmcr2.coding_rate(z, eps_sq=eps_sq)) == pytest.approx(expected[0], rel=1e-12)
    assert float(got.reduction) == pytest.approx(expected[0] - expected[1], rel=1e-10, abs=1e-12)


@pytest.mark.parametrize(("m", "d", "k"), SIZES)
def test_float32_agrees_with_float64(m, d, k):
    z, labels = unit_rows(m, d), random_labels(m, k)
    wide = vmcr2.rate_reduction(z, labels, num_classes=k)
    narrow = vmcr2.rate_reduction(z.float(), labels, num_classes=k)
    assert narrow.expansion.dtype == torch.float32
    assert [float(rate) for rate in narrow] == pytest.approx([float(rate) for rate in wide], rel=1e-5)


@pytest.mark.parametrize(("m", "d", "k"), [(8, 3, 2), (4, 6, 2)])
@pytest.mark.parametrize("part", ["expansion", "compression"])
def test_gradients(m, d, k, part):
    z, labels = unit_rows(m, d).requires_grad_(), random_labels(m, k)
    logits = torch.randn(m, k, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def by_labels(features):
        return getattr(vmcr2.rate_reduction(features, labels, num_classes=k), part)

    def by_rows(features, weights):
        return getattr(vmcr2.rate_reduction(features, weights.softmax(1)), part)

    assert torch.autograd.gradcheck(by_labels, (z,))
    assert torch.autograd.gradcheck(by_rows, (z, logits))


def test_one_hot_rows_equal_labels():
    z, labels = unit_rows(50, 8), random_labels(50, 6)
    by_labels = vmcr2.rate_reduction(z, labels, num_classes=6)
    for rows in (torch.nn.functional.one_hot(labels, 6), torch.nn.functional.one_hot(labels, 6).half()):
        assert [float(r) for r in vmcr2.rate_reduction(z, rows)] == pytest.approx([float(r) for r in by_labels])


def test_absent_and_single_classes():
    z = unit_rows(9, 5)
    labels = torch.tensor([0, 0, 0, 0, 2, 2, 2, 2, 5])
    got = vmcr2.rate_reduction(z, labels, num_classes=8)
    dense = vmcr2.rate_reduction(z, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2]))
    assert [float(r) for r in got] == pytest.approx([float(r) for r in dense])
    # One sample of norm 1: its second moment has the single eigenvalue 1.
    alone = vmcr2.rate_reduction(z[:1], torch.tensor([3]), num_classes=8)
    assert float(alone.compression) == pytest.approx(0.5 * np.log(1 + 5 / 0.5))
    assert float(alone.reduction) == pytest.approx(0, abs=1e-12)


def test_unbalanced_classes():
    labels = torch.cat([torch.zeros(300, dtype=torch.long), torch.ones(3, dtype=torch.long), torch.full((1,), 2)])
    z = unit_rows(304, 20)
    expected = reference.rates(z.numpy().T, reference.one_hot(labels.numpy(), 3), 0.5)
    assert [float(r) for r in vmcr2.rate_reduction(z, labels)] == pytest.approx(expected)


samples = st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(1, 6), st.integers(0, 10**6))


@given(samples, st.booleans())
def test_reduction_is_not_negative(size, soft):
    m, d, k, seed = size
    pi = random_rows(m, k, seed=seed) if soft else random_labels(m, k, seed=seed)
    rates = vmcr2.rate_reduction(unit_rows(m, d, seed=seed), pi, num_classes=k)
    assert float(rates.compression) >= 0
    assert float(rates.reduction) >= -1e-10


@given(samples)
def test_invariances(size):
    m, d, k, seed = size
    z, labels = unit_rows(m, d, seed=seed), random_labels(m, k, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    order = torch.randperm(m, generator=generator)
    names = torch.randperm(k, generator=generator)
    expected = [float(r) for r in vmcr2.rate_reduction(z, labels, num_classes=k)]
    for features, membership in ((z @ rotation, labels), (z[order], labels[order]), (z, names[labels])):
        got = vmcr2.rate_reduction(features, membership, num_classes=k)
        assert [float(r) for r in got] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_autocast_and_half_precision_compute_in_float32():
    """Partly collapsed features, on which bf16 log-determinants fail: Cholesky gives NaN, logdet a wrong number."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(512, 20, generator=generator) @ torch.randn(20, 256, generator=generator)
    z = torch.nn.functional.normalize(low + 0.02 * torch.randn(512, 256, generator=generator), dim=1)
    labels = random_labels(512, 4)
    expected = [float(r) for r in vmcr2.rate_reduction(z.double(), labels, eps_sq=0.05)]
    with torch.autocast("cpu", torch.bfloat16):
        got = vmcr2.rate_reduction(z, labels, eps_sq=0.05)
        coded = vmcr2.coding_rate(z, eps_sq=0.05)
    assert got.expansion.dtype == coded.dtype == torch.float32
    assert [float(r) for r in got] == pytest.approx(expected, rel=1e-5)
    assert float(coded) == pytest.approx(expected[0], rel=1e-5)
    for half in (z.bfloat16(), z.half()):
        of_half = vmcr2.rate_reduction(half, labels, eps_sq=0.05)
        assert of_half == vmcr2.rate_reduction(half.float(), labels, eps_sq=0.05)


def test_a_class_of_hardly_any_weight_is_absent():
    """A confident softmax leaves columns of 1e-38 and less: no overflow, no NaN, and the rates of the others."""
    z, k = unit_rows(20, 6).float(), 3
    logits = torch.zeros(20, k)
    logits[:, 2] = -86.0
    rows = logits.softmax(1)
    assert 0 < float(rows[:, 2].sum()) < 1e-36
    for tiny in (rows, rows.double().index_fill(1, torch.tensor(2), 1e-170)):
        features = z.to(tiny.dtype, copy=True).requires_grad_()
        soft = tiny.clone().requires_grad_()
        vmcr2.VMCR2Loss(k, 6, atoms_per_class=2).to(tiny.dtype)(features, soft).backward()
        assert soft.grad.isfinite().all()
        learned = tiny.clone().requires_grad_()
        rates = vmcr2.rate_reduction(features, learned)
        expected = vmcr2.rate_reduction(features, tiny[:, :2])
        assert rates.reduction.item() == pytest.approx(expected.reduction.item(), rel=1e-5)
        loss = vmcr2.VMCR2Loss(k, 6, atoms_per_class=2).to(tiny.dtype)
        (rates.reduction + loss(features, tiny)).backward()
        assert features.grad.isfinite().all()
        assert learned.grad.isfinite().all()


def test_learned_rows_may_lack_a_class():
    z, rows = unit_rows(10, 4), torch.zeros(10, 3, dtype=torch.float64)
    rows[:, :2] = 0.5
    learned = rows.clone().requires_grad_()
    got, expected = vmcr2.rate_reduction(z, learned), vmcr2.rate_reduction(z, rows)
    assert got.reduction.item() == pytest.approx(expected.reduction.item())
    got.reduction.backward()
    assert learned.grad.isfinite().all()


def test_second_derivatives():
    z, labels = unit_rows(6, 4).requires_grad_(), random_labels(6, 2)
    assert torch.autograd.gradgradcheck(lambda features: vmcr2.rate_reduction(features, labels).reduction, (z,))
    loss = vmcr2.VMCR2Loss(2, 4, atoms_per_class=2).double()
    loss.latch(unit_rows(12, 4, seed=1), random_labels(12, 2))
    loss.eval()
    assert torch.autograd.gradgradcheck(lambda features: loss(features, labels), (z,))


def test_half_logdet_says_why_it_failed():
    with pytest.raises(vmcr2.NumericalError, match="NaN or infinite"):
        half_logdet(torch.full((2, 2), torch.nan))
    with pytest.raises(vmcr2.NumericalError, match="NaN or infinite"):
        half_logdet(torch.tensor([[torch.inf]]))
    with pytest.raises(vmcr2.NumericalError, match="smallest eigenvalue is -3"):
        half_logdet(torch.diag(torch.tensor([1.0, -3.0])))


@pytest.mark.parametrize("n", [1, 255, 256, 600, 1025])
@pytest.mark.parametrize("d", [1, 40])
def test_products_by_halves_are_products(n, d):
    rows = torch.randn(d, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).T
    torch.testing.assert_close(linalg.symmetric_product(rows), rows @ rows.T)
