"""R of batches of matrices, the total coding rate as a loss, TransRate: each against the formula in float64 NumPy."""

import numpy as np
import pytest
import reference
import torch
from conftest import random_labels, random_rows, unit_rows

import vmcr2


def rate(z, scale):
    """½ logdet(I + scale ZᵀZ) of rows z."""
    return 0.5 * reference.logdet_plus_identity(scale * z.T @ z)


@pytest.mark.parametrize("shape", [(5, 7, 4), (5, 4, 7), (2, 3, 9, 6), (1, 2, 2)])
def test_coding_rate_of_a_batch_is_that_of_each_matrix(shape):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = vmcr2.coding_rate(z, eps_sq=0.3)
    m, d = shape[-2:]
    expected = [rate(matrix, d / (m * 0.3)) for matrix in z.reshape(-1, m, d).numpy()]
    np.testing.assert_allclose(got.flatten(), expected)
    assert got.shape == shape[:-2]


def test_coding_rate_of_a_batch_has_the_right_gradient():
    z = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(vmcr2.coding_rate, z)


def test_coding_rate_of_an_empty_batch_is_refused():
    with pytest.raises(vmcr2.InputError, match="features"):
        vmcr2.coding_rate(torch.zeros(0, 4, 3))


@pytest.mark.parametrize("views", [1, 3])
def test_total_coding_rate_loss(views):
    z = unit_rows(views * 10, 6).view(views, 10, 6)
    expected = -np.mean([rate(view, 6 / (10 * 0.2)) for view in z.numpy()])
    loss = vmcr2.TotalCodingRateLoss()
    np.testing.assert_allclose(loss(z), expected)
    np.testing.assert_allclose(loss(list(z)), expected)
    if views == 1:
        np.testing.assert_allclose(loss(z[0]), expected)


def test_views_may_differ_in_size():
    views = [unit_rows(10, 6), unit_rows(4, 6, seed=1)]
    expected = -np.mean([rate(view.numpy(), 6 / (len(view) * 0.2)) for view in views])
    np.testing.assert_allclose(vmcr2.TotalCodingRateLoss()(views), expected)


def test_minimising_expands():
    """Collapsed features score worst, orthogonal ones best; some implementations have it the other way round."""
    loss = vmcr2.TotalCodingRateLoss()
    collapsed, spread = unit_rows(1, 8).repeat(8, 1), torch.eye(8, dtype=torch.float64)
    assert loss(spread) < loss(unit_rows(8, 8)) < loss(collapsed) < 0
    weights = unit_rows(8, 8).requires_grad_()
    optimizer = torch.optim.SGD([weights], 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss(torch.nn.functional.normalize(weights, dim=1)).backward()
        optimizer.step()
    final = torch.nn.functional.normalize(weights, dim=1).detach()
    np.testing.assert_allclose(final @ final.T, np.eye(8), atol=1e-3)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.randn(4, 5), "norm 1 at most"),
        ([], "empty"),
        (None, "features must be .*a sequence of views.*got NoneType"),
        (3, "features must be .*a sequence of views.*got int"),
        ([None], "features must be a torch.Tensor"),
        (torch.zeros(5), "shape"),
        (torch.full((2, 3, 4), torch.nan), "finite"),
    ],
)
def test_total_coding_rate_refuses(features, message):
    with pytest.raises(vmcr2.InputError, match=message):
        vmcr2.TotalCodingRateLoss()(features)
    with pytest.raises(vmcr2.InputError, match="eps_sq"):
        vmcr2.TotalCodingRateLoss(0)


def gradients(model, inputs):
    """The loss, and the gradients, of three views: stacked and as a list of unequal ones."""
    found = []
    for views in ([inputs, inputs.flip(1), inputs**2], [inputs, inputs[1:].flip(1)]):
        model.zero_grad()
        z = [torch.nn.functional.normalize(model(view), dim=1) for view in views]
        value = vmcr2.TotalCodingRateLoss()(torch.stack(z) if len(z) == 3 else z)
        value.backward()
        found += [value.detach(), *(p.grad.clone() for p in model.parameters())]
    return found


@pytest.mark.parametrize("norm", [1e-2, 1e-4])
def test_the_rate_of_short_float32_rows_is_not_lost(norm):
    z = (norm * unit_rows(30, 8)).float()
    expected = rate(z.double().numpy(), 8 / (30 * 0.2))
    assert float(vmcr2.TotalCodingRateLoss()(z)) == pytest.approx(-expected, rel=1e-6)


def network():
    torch.manual_seed(0)
    return torch.nn.Linear(6, 8).double()


def worker(rank):
    mine = slice(0, 12) if rank == 0 else slice(12, 19)  # unequal shares
    wrapped = torch.nn.parallel.DistributedDataParallel(network())
    inputs = unit_rows(19, 6)[mine]
    if rank == 1:  # so that both ranks' second views together lack the first sample alone
        inputs = torch.cat([inputs[:1], inputs])
    return gradients(wrapped, inputs)


def test_two_ranks_equal_one(ranks):
    inputs = unit_rows(19, 6)
    whole = torch.cat([inputs[:12], inputs[12:13], inputs[12:]])
    model = network()
    expected = gradients(model, whole)[:3]
    model.zero_grad()
    second = torch.cat([whole[1:12], whole[13:]])
    value = vmcr2.TotalCodingRateLoss()(
        [torch.nn.functional.normalize(model(view), dim=1) for view in (whole, second.flip(1))]
    )
    value.backward()
    expected += [value.detach(), *(p.grad for p in model.parameters())]
    for got in ranks(2, worker):
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_transrate(scale):
    z, labels = scale * unit_rows(60, 7) + 3, random_labels(60, 4)
    centred = z.numpy() - z.numpy().mean(0)
    expected = rate(centred, 1 / (60 * 1e-4))
    for j in range(4):
        rows = centred[labels.numpy() == j]
        expected -= len(rows) / 60 * rate(rows, 1 / (len(rows) * 1e-4))
    np.testing.assert_allclose(vmcr2.transrate(z, labels), expected)
    np.testing.assert_allclose(vmcr2.transrate(z, labels, eps_sq=0.1) >= 0, True)


def test_transrate_takes_soft_labels_and_has_the_right_gradient():
    z = unit_rows(12, 4).requires_grad_()
    soft = random_rows(12, 3)
    hard = torch.nn.functional.one_hot(random_labels(12, 3), 3).double()
    torch.testing.assert_close(vmcr2.transrate(z, hard), vmcr2.transrate(z, random_labels(12, 3)))
    assert torch.autograd.gradcheck(lambda x: vmcr2.transrate(x, soft, eps_sq=0.1), z)


def test_transrate_refuses():
    for features, labels, eps_sq, message in (
        (unit_rows(4, 3), random_labels(5, 2), 1e-4, "labels must have shape"),
        (unit_rows(4, 3), None, 1e-4, "labels must be a torch.Tensor"),
        (unit_rows(4, 3), random_labels(4, 2).double(), 1e-4, "labels must be of an integer dtype"),
        (unit_rows(4, 3), random_labels(4, 2) - 1, 1e-4, r"labels must lie in \[0"),
        (unit_rows(4, 3), torch.ones(4, 2), 1e-4, "labels rows must sum to 1"),
        (unit_rows(4, 3), random_labels(4, 2), -1.0, "eps_sq"),
        (unit_rows(4, 64), random_labels(4, 2), 1e-15, "eps_sq must be from 1e-10 to 1e.08 .*, got 1e-15$"),
        (torch.zeros(4), random_labels(4, 2), 1e-4, "features"),
    ):
        with pytest.raises(vmcr2.InputError, match=f"^{message}"):
            vmcr2.transrate(features, labels, eps_sq=eps_sq)


def test_views_of_different_dimensions_are_refused():
    with pytest.raises(vmcr2.InputError, match="features must be views of one dimension, got 4, 5"):
        vmcr2.TotalCodingRateLoss()([unit_rows(8, 4), unit_rows(8, 5)])
