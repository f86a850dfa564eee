"""R, R_c and ΔR of eq. (1): derivatives of all kinds, properties, precision. Its values are in test_paper.py."""

import numpy as np
import pytest
import reference
import torch
from conftest import (
    LargestTensor,
    normal,
    random_labels,
    random_membership,
    random_rotation,
    random_rows,
    rows_of,
    unit_rows,
)
from hypothesis import given
from hypothesis import strategies as st

import vmcr2

SIZES = [(40, 12, 4), (10, 30, 3), (60, 5, 7), (1, 6, 1), (33, 33, 2)]
PARTS = ["expansion", "compression", "reduction"]


@pytest.mark.parametrize(("m", "d", "k"), SIZES)
def test_float32_agrees_with_float64(m, d, k):
    z, labels = unit_rows(m, d), random_labels(m, k)
    wide = vmcr2.rate_reduction(z, labels, num_classes=k)
    narrow = vmcr2.rate_reduction(z.float(), labels, num_classes=k)
    assert narrow.expansion.dtype == torch.float32
    assert [float(rate) for rate in narrow] == pytest.approx([float(rate) for rate in wide], rel=1e-5)


@pytest.mark.parametrize(("m", "d", "k"), [(8, 3, 2), (4, 6, 2)])
@pytest.mark.parametrize("part", PARTS)
def test_first_and_second_derivatives_in_features_and_membership(m, d, k, part):
    z, labels = unit_rows(m, d).requires_grad_(), random_labels(m, k)
    logits = normal(m, k, seed=1).requires_grad_()

    def by_labels(features):
        return getattr(vmcr2.rate_reduction(features, labels, num_classes=k), part)

    def by_rows(features, weights):
        return getattr(vmcr2.rate_reduction(features, weights.softmax(1)), part)

    assert torch.autograd.gradcheck(by_labels, (z,), check_forward_ad=True)
    assert torch.autograd.gradcheck(by_rows, (z, logits), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(by_labels, (z,))
    assert torch.autograd.gradgradcheck(by_rows, (z, logits))


@pytest.mark.parametrize("kind", ["labels", "soft"])
@pytest.mark.parametrize(("m", "d"), [(8, 4), (4, 8)])
def test_torch_func_grad_and_hessian_equal_autograd(kind, m, d):
    z, membership = unit_rows(m, d), random_membership(m, 3, kind)

    def reduction(features):
        return vmcr2.rate_reduction(features, membership, num_classes=3).reduction

    free = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(reduction(free), free)
    torch.testing.assert_close(torch.func.grad(reduction)(z), expected)
    torch.testing.assert_close(torch.func.hessian(reduction)(z), torch.autograd.functional.hessian(reduction, z))
    coded = torch.autograd.functional.hessian(vmcr2.coding_rate, z)
    torch.testing.assert_close(torch.func.hessian(vmcr2.coding_rate)(z), coded)


def test_torch_func_grad_in_the_membership_reaches_entries_of_0():
    z, rows = unit_rows(8, 4), rows_of(random_labels(8, 3), 3)

    def reduction(weights):
        return vmcr2.rate_reduction(z, weights).reduction

    free = rows.clone().requires_grad_()
    (expected,) = torch.autograd.grad(reduction(free), free)
    assert (expected[rows == 0] != 0).any()
    torch.testing.assert_close(torch.func.grad(reduction)(rows), expected)


@pytest.mark.parametrize(("m", "d", "k"), [(6, 10, 12), (24, 4, 12), (20, 4, 3), (6, 10, 3)])
def test_jvp_in_the_membership_reaches_entries_of_0(m, d, k):
    z, along = unit_rows(m, d), normal(m, k, seed=2)
    rows = rows_of(torch.arange(m) % k, k)
    if k == 3:
        rows = 0.7 * rows + 0.3 * rows_of(torch.zeros(m, dtype=torch.long), k)
    free = rows.clone().requires_grad_()
    (expected,) = torch.autograd.grad(vmcr2.rate_reduction(z, free).compression, free)
    _, got = torch.func.jvp(lambda weights: vmcr2.rate_reduction(z, weights).compression, (rows,), (along,))
    torch.testing.assert_close(got, (expected * along).sum())


@pytest.mark.parametrize("norm", [1e-3, 1e4])
def test_vmap_over_float32_features_of_other_norms_is_as_exact_as_a_loop(norm):
    z = torch.stack([unit_rows(40, 3, seed=seed) @ normal(3, 128, seed=seed) for seed in range(2)])
    z = (norm * torch.nn.functional.normalize(z, dim=2)).float()
    labels = torch.arange(40) % 4
    expected = torch.stack([vmcr2.rate_reduction(one, labels).reduction for one in z])
    got = torch.vmap(lambda one: vmcr2.rate_reduction(one, labels, num_classes=4).reduction)(z)
    assert (expected > 0).all()
    torch.testing.assert_close(got, expected)


def test_derivatives_around_vmap_reach_entries_of_0():
    z, rows = unit_rows(6, 10), torch.stack([rows_of(random_labels(6, 3, seed=seed), 3) for seed in range(2)])

    def compression(weights):
        return vmcr2.rate_reduction(z, weights).compression

    expected = torch.stack([torch.func.grad(compression)(one) for one in rows])
    assert expected.isfinite().all()
    free = rows.clone().requires_grad_()
    torch.vmap(compression)(free).sum().backward()
    torch.testing.assert_close(free.grad, expected)
    torch.testing.assert_close(torch.func.grad(lambda each: torch.vmap(compression)(each).sum())(rows), expected)


def test_second_derivatives_keep_their_precision_under_autocast():
    z, labels, along = unit_rows(20, 4), random_labels(20, 3), normal(20, 4, seed=1)

    def along_the_gradient(features):
        rate = vmcr2.rate_reduction(features, labels).reduction
        (gradient,) = torch.autograd.grad(rate, features, create_graph=True)
        return torch.autograd.grad((gradient * along.to(features.dtype)).sum(), features)[0]

    expected = along_the_gradient(z.clone().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        got = along_the_gradient(z.float().requires_grad_())
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def reduction_of(features, membership):
    return vmcr2.rate_reduction(features, membership, num_classes=3).reduction


@pytest.mark.parametrize("transform", [lambda f: f, torch.func.grad], ids=["value", "gradient"])
@pytest.mark.parametrize(("m", "d"), [(9, 4), (4, 9)])
def test_vmap_over_features_and_membership_is_a_loop(transform, m, d):
    z = torch.stack([unit_rows(m, d, seed=seed) for seed in range(3)])
    labels = random_labels(m, 3)
    rows = torch.stack([random_rows(m, 3, seed=seed) for seed in range(3)])
    # One of the batch lacks a class that others have.
    rows[1] = rows_of(random_labels(m, 2), 3)
    run = transform(reduction_of)
    for membership, dims in ((labels, (0, None)), (rows[0], (0, None)), (rows, (0, 0))):
        each = [membership] * 3 if dims[1] is None else membership
        expected = torch.stack([run(one, pi) for one, pi in zip(z, each, strict=True)])
        torch.testing.assert_close(torch.vmap(run, in_dims=dims)(z, membership), expected)
    coded = torch.stack([vmcr2.coding_rate(one) for one in z])
    torch.testing.assert_close(torch.vmap(vmcr2.coding_rate)(z), coded)


def test_vmap_over_labels_that_differ_says_that_it_cannot():
    labels = torch.stack([random_labels(9, 3, seed=seed) for seed in range(2)])
    with pytest.raises(vmcr2.InputError, match="the same across the batch of torch.vmap"):
        torch.vmap(reduction_of, in_dims=(None, 0))(unit_rows(9, 4), labels)


def test_one_hot_rows_equal_labels():
    z, labels = unit_rows(50, 8), random_labels(50, 6)
    by_labels = vmcr2.rate_reduction(z, labels, num_classes=6)
    for rows in (torch.nn.functional.one_hot(labels, 6), torch.nn.functional.one_hot(labels, 6).half()):
        assert [float(r) for r in vmcr2.rate_reduction(z, rows)] == pytest.approx([float(r) for r in by_labels])


def test_absent_and_single_sample_classes():
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


@given(samples, st.booleans(), st.sampled_from([0.01, 0.5, 2.0]))
def test_reduction_is_not_negative(size, soft, eps_sq):
    m, d, k, seed = size
    pi = random_rows(m, k, seed=seed) if soft else random_labels(m, k, seed=seed)
    rates = vmcr2.rate_reduction(unit_rows(m, d, seed=seed), pi, num_classes=k, eps_sq=eps_sq)
    assert float(rates.compression) >= 0
    assert float(rates.reduction) >= -1e-10


@given(samples, st.booleans())
def test_rotating_reordering_and_relabelling_change_nothing(size, soft):
    m, d, k, seed = size
    z, pi = unit_rows(m, d, seed=seed), random_labels(m, k, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    order, names = torch.randperm(m, generator=generator), torch.randperm(k, generator=generator)
    renamed = names[pi]
    if soft:
        pi = random_rows(m, k, seed=seed)
        renamed = pi[:, names]
    expected = [float(r) for r in vmcr2.rate_reduction(z, pi, num_classes=k)]
    for features, membership in ((z @ random_rotation(d, seed=seed), pi), (z[order], pi[order]), (z, renamed)):
        got = vmcr2.rate_reduction(features, membership, num_classes=k)
        assert [float(r) for r in got] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(samples)
def test_copying_every_sample_changes_nothing(size):
    """The rates are of the distribution: n_j and m enter as shares alone."""
    m, d, k, seed = size
    z, labels = unit_rows(m, d, seed=seed), random_labels(m, k, seed=seed)
    expected = [float(r) for r in vmcr2.rate_reduction(z, labels, num_classes=k)]
    got = vmcr2.rate_reduction(z.repeat(3, 1), labels.repeat(3), num_classes=k)
    assert [float(r) for r in got] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def partly_collapsed():
    """Returns features on which bf16 log-determinants fail: Cholesky gives NaN, logdet a wrong number."""
    low = normal(512, 20) @ normal(20, 256, seed=1)
    return torch.nn.functional.normalize(low + 0.02 * normal(512, 256, seed=2), dim=1).float(), random_labels(512, 4)


def test_autocast_and_half_precision_compute_in_float32():
    z, labels = partly_collapsed()
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


@pytest.mark.parametrize("kind", ["labels", "soft"])
@pytest.mark.parametrize(("m", "d"), [(60, 12), (10, 30)])
def test_gradients_keep_their_precision_where_backward_is_called_under_autocast(kind, m, d):
    z, membership = unit_rows(m, d, dtype=torch.float32), random_membership(m, 3, kind)
    exact = z.double().requires_grad_()
    vmcr2.rate_reduction(exact, membership, num_classes=3).reduction.backward()
    features = z.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        vmcr2.rate_reduction(features, membership, num_classes=3).reduction.backward()
    torch.testing.assert_close(features.grad.double(), exact.grad, rtol=1e-4, atol=1e-5 * float(exact.grad.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps_sq", [1e-12, 1e-8, 1e-5, 1e-3, 1.0, 1e3, 1e5, 1e7, 1e12])
@pytest.mark.parametrize("features", ["spread", "collapsed", "coincident"])
def test_tiny_and_huge_eps_sq_are_right_or_an_error(features, eps_sq, dtype):
    """Against float64 determinants on the samples' side, and singular values by log1p where those would lose digits."""
    z = unit_rows(40, 16)
    if features != "spread":
        width = 1e-4 if features == "collapsed" else 0.0
        z = torch.nn.functional.normalize(unit_rows(1, 16, seed=7) + width * z, dim=1)
    z = z.to(dtype).double()
    labels = torch.arange(40) % 3

    def exact(points):
        scale = 16 / (len(points) * eps_sq)
        if features == "spread":
            return 0.5 * torch.log1p(scale * torch.linalg.svdvals(points).square()).sum()
        # Of coinciding singular values there is no gradient, of determinants there is.
        return 0.5 * torch.logdet(torch.eye(len(points)).double() + scale * points @ points.T)

    def reduction(points):
        return exact(points) - sum(float((labels == j).double().mean()) * exact(points[labels == j]) for j in range(3))

    free = z.to(dtype).requires_grad_()
    if not 1e-8 <= 16 / eps_sq <= 1e10:
        with pytest.raises(vmcr2.InputError, match="eps_sq must be from"):
            vmcr2.rate_reduction(free, labels, eps_sq=eps_sq)
        return
    rates = vmcr2.rate_reduction(free, labels, eps_sq=eps_sq)
    assert float(rates.expansion.detach()) == pytest.approx(float(exact(z.detach())), rel=2e-5)
    wide, alone = z.clone().requires_grad_(), z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(rates.reduction, free)
    (expected,) = torch.autograd.grad(reduction(wide), wide)
    (of_expansion,) = torch.autograd.grad(exact(alone), alone)  # of which ΔR's gradient is a difference
    allowed = 1e-4 * float(of_expansion.abs().max())
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=allowed)


def test_a_class_of_hardly_any_weight_is_absent():
    """A confident softmax leaves columns of 1e-38 and less: no overflow, no NaN, and the rates of the others."""
    z, k = unit_rows(20, 6).float(), 3
    logits = torch.zeros(20, k)
    logits[:, 2] = -86.0
    rows = logits.softmax(1)
    assert 0 < float(rows[:, 2].sum()) < 1e-36
    for tiny in (rows, rows.double().index_fill(1, torch.tensor(2), 1e-170)):
        features = z.to(tiny.dtype, copy=True).requires_grad_()
        learned = tiny.clone().requires_grad_()
        rates = vmcr2.rate_reduction(features, learned)
        expected = vmcr2.rate_reduction(features, tiny[:, :2])
        assert rates.reduction.item() == pytest.approx(expected.reduction.item(), rel=1e-5)
        rates.reduction.backward()
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


def test_many_classes_make_no_array_of_classes_times_dimensions_squared():
    m, d, k = 300, 40, 150
    z, labels = unit_rows(m, d), torch.arange(m) % k
    with LargestTensor() as largest:
        vmcr2.rate_reduction(z, labels)
    assert largest.numel <= 2 * m * d, largest.shape


def test_a_failed_factorisation_is_a_numerical_error():
    with pytest.raises(vmcr2.NumericalError, match="logdet"):
        vmcr2.coding_rate(torch.full((3, 3), 1e30))
    with pytest.raises(vmcr2.NumericalError, match="logdet"):
        vmcr2.rate_reduction(torch.full((3, 3), 1e30), torch.tensor([0, 0, 1]))


@pytest.mark.parametrize("length", [1e-4, 1e-2, 30.0, 200.0, 3000.0])
def test_float32_rates_of_features_of_any_norm_are_those_of_float64(length):
    """What counts is d/ε² times the squared norm, not d/ε² alone."""
    base = normal(10, 128)[torch.arange(200) % 10]
    z = length * torch.nn.functional.normalize(base + 0.1 * normal(200, 128, seed=1), dim=1)
    narrow = vmcr2.rate_reduction(z.float(), torch.arange(200) % 10)
    wide = vmcr2.rate_reduction(z, torch.arange(200) % 10)
    for ours, exact in zip((*narrow, vmcr2.coding_rate(z.float())), (*wide, wide.expansion), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-12)


def test_features_too_long_for_float64_are_refused():
    z, labels = 1e7 * unit_rows(20, 4), torch.arange(20) % 2
    for call in (
        lambda: vmcr2.coding_rate(z),
        lambda: vmcr2.rate_reduction(z, labels),
        lambda: vmcr2.transrate(z, labels),
    ):
        with pytest.raises(vmcr2.NumericalError, match="norms of at most .* scale the features down"):
            call()


@pytest.mark.parametrize(
    "function", [vmcr2.coding_rate, vmcr2.rate_reduction, vmcr2.transrate, vmcr2.variational_logdet]
)
def test_within_a_compiled_function_a_rate_is_computed_as_it_is(function):
    """A graph before it and one after it, not one between any two of its checks."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    z, given = unit_rows(20, 6), (random_labels(20, 3),) if function in (vmcr2.rate_reduction, vmcr2.transrate) else ()

    def scaled(features):
        found = function(2 * features, *given)
        return 3 * (found.reduction if function is vmcr2.rate_reduction else found)

    values = []
    for run in (scaled, torch.compile(scaled, backend=backend)):
        features = z.clone().requires_grad_()
        value = run(features)
        values.append((value.detach(), *torch.autograd.grad(value, features)))
    torch.compiler.reset()
    torch.testing.assert_close(values[1], values[0], rtol=1e-12, atol=0)
    assert len(graphs) == 2
