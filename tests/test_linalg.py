"""Log-determinants and products: right in precision and derivatives, also under autocast, and failing in the open."""

import pytest
import torch
from conftest import normal, random_rotation
from hypothesis import given
from hypothesis import strategies as st

import vmcr2
from vmcr2.linalg import (
    factor_shifted,
    gram,
    half_logdet,
    inverse_shifted,
    is_batched,
    product,
    rate_dtype,
    require_finite,
    unit_rows,
    wide_dtype,
)


def positive(n, rank, *, scale=1.0, seed=0):
    rows = normal(n, rank, seed=seed)
    return scale * rows @ rows.T


@given(st.integers(1, 12), st.integers(1, 12), st.floats(-6, 6), st.integers(0, 10**6))
def test_half_logdet_equals_the_sum_over_eigenvalues(n, rank, log_scale, seed):
    matrix = positive(n, rank, scale=10**log_scale, seed=seed)
    expected = 0.5 * torch.log1p(torch.linalg.eigvalsh(matrix).clamp_min(0)).sum()
    torch.testing.assert_close(half_logdet(matrix), expected, rtol=1e-9, atol=1e-9)


def test_unit_rows_are_those_of_torch_and_nan_where_norms_overflow():
    rows = normal(5, 7).float().requires_grad_()
    same = rows.detach().clone().requires_grad_()
    with torch.no_grad():
        rows[1] = same[1] = 0
    weights = normal(5, 7).float()
    made, expected = unit_rows(rows), torch.nn.functional.normalize(same, dim=1)
    (made * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.equal(made, expected)
    assert torch.equal(rows.grad, same.grad)
    assert unit_rows(rows.half()).dtype == torch.float32
    assert unit_rows(torch.full((1, 4), 1e20)).isnan().all()


def test_half_logdet_takes_batches():
    matrices = torch.stack([positive(4, 3, seed=seed) for seed in range(6)]).view(2, 3, 4, 4)
    expected = [float(half_logdet(matrix)) for matrix in matrices.view(6, 4, 4)]
    assert half_logdet(matrices).flatten().tolist() == pytest.approx(expected)


def test_half_logdet_has_first_and_second_derivatives():
    # As a function of any matrix, and of the rows whose Gram matrix it is given.
    rows = normal(2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: half_logdet(gram(x)), (rows,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: half_logdet(gram(x)), (rows,))


def test_product_has_first_and_second_derivatives():
    left, right = normal(2, 3, 4).requires_grad_(), normal(2, 4, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(product, (left, right), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(product, (left, right))


def test_products_keep_their_precision_under_autocast_forward_and_backward():
    left, right = normal(20, 30).float().requires_grad_(), normal(30, 10, seed=1).float().requires_grad_()
    expected = left @ right
    given = torch.autograd.grad(expected.square().sum(), (left, right))
    with torch.autocast("cpu", torch.bfloat16):
        got = product(left, right)
        assert torch.equal(got, expected)
        for ours, theirs in zip(torch.autograd.grad(got.square().sum(), (left, right)), given, strict=True):
            assert torch.equal(ours, theirs)


def test_inverse_shifted_is_the_inverse():
    matrix = positive(5, 3, scale=100.0)
    torch.testing.assert_close((torch.eye(5).double() + matrix) @ inverse_shifted(matrix), torch.eye(5).double())


@pytest.mark.parametrize(
    "matrix",
    [
        torch.full((2, 2), torch.nan),
        torch.tensor([[torch.inf]]),
        torch.diag(torch.tensor([1.0, -3.0])),
        torch.tensor([[1.0, torch.inf], [torch.inf, 1.0]]),
    ],
)
def test_a_failed_factorisation_is_nan_and_a_numerical_error(matrix):
    assert factor_shifted(matrix).isnan().all()
    value = half_logdet(matrix)
    assert value.isnan()
    with pytest.raises(vmcr2.NumericalError, match="raise eps_sq or pass float64"):
        require_finite(torch.ones(()), value)
    require_finite(half_logdet(torch.eye(2)))


def test_one_failure_in_a_batch_does_not_spoil_the_others():
    matrices = torch.stack([positive(3, 3), torch.full((3, 3), torch.nan).double(), positive(3, 2, seed=1)])
    values = half_logdet(matrices)
    assert values.isnan().tolist() == [False, True, False]
    assert float(values[2]) == pytest.approx(float(half_logdet(matrices[2])))


def test_wide_dtype_is_float32_at_least_and_the_widest_given():
    half, single, double = (torch.zeros(1, dtype=t) for t in (torch.bfloat16, torch.float32, torch.float64))
    assert wide_dtype(half) == wide_dtype(half, single) == torch.float32
    assert wide_dtype(half, double) == torch.float64


@pytest.mark.parametrize("d", [1, 10, 128, 4096])
def test_rate_dtype_is_float64_where_float32_would_lose_digits_and_an_error_where_float64_would(d):
    single = torch.zeros(1)
    for beta, expected in ((1.0, torch.float32), (1e4, torch.float32), (0.9, torch.float64), (1.1e4, torch.float64)):
        assert rate_dtype(d, d / beta, single) == expected
    for beta in (1e11, 1e-9):
        with pytest.raises(vmcr2.InputError, match=rf"eps_sq must be from .* for features of dimension {d} "):
            rate_dtype(d, d / beta, single)


def test_is_batched_knows_vmap_within_grad_and_grad_within_vmap():
    seen = []

    def look(x):
        seen.append(is_batched(x))
        return x.sum()

    z = normal(3, 2)
    look(z)
    torch.func.grad(look)(z)
    torch.vmap(look)(z)
    torch.vmap(torch.func.grad(look))(z)
    torch.func.grad(lambda x: torch.vmap(look)(x).sum())(z)
    assert seen == [False, False, True, True, True]


def test_half_logdet_does_not_change_under_rotation():
    matrix, turn = positive(6, 4), random_rotation(6)
    torch.testing.assert_close(half_logdet(turn @ matrix @ turn.T), half_logdet(matrix))
