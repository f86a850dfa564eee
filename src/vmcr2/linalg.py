"""Log-determinants of positive semi-definite matrices, by Cholesky and with their failures reported."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vmcr2.errors import NumericalError


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """Returns the dtype that rates are computed in: the widest of the tensors', and float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def may_read(tensor: Tensor) -> bool:
    """Whether reading a value in mid-step is free. On an accelerator the host would wait for all that is queued."""
    return tensor.device.type == "cpu"


_BLOCK = 128  # below about this many rows a plain product is as fast


def symmetric_product(rows: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n n"]:
    """Returns X Xᵀ, for many rows on a CPU by halves, since what lies above the diagonal need not be found again."""
    n = rows.shape[-2]
    if rows.ndim != 2 or n < 2 * _BLOCK or not may_read(rows):
        return rows @ rows.mT
    half = n // 2
    product = rows.new_empty(n, n)
    product[:half, :half] = symmetric_product(rows[:half])
    product[half:, half:] = symmetric_product(rows[half:])
    product[half:, :half] = rows[half:] @ rows[:half].mT
    product[:half, half:] = product[half:, :half].mT
    return product


class _Gram(torch.autograd.Function):
    """X Xᵀ with the one product that its symmetry leaves in the gradient; autograd would take two."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return symmetric_product(rows)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        with torch.autocast(rows.device.type, enabled=False):  # for a backward pass called under autocast
            return (grad_outputs[0] + grad_outputs[0].mT) @ rows


def gram(rows: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n n"]:
    """Returns X Xᵀ, the inner products of rows. Differentiable."""
    result = _Gram.apply(rows)
    assert isinstance(result, Tensor)
    return result


def factor_shifted(matrix: Float[Tensor, "*b n n"]) -> Float[Tensor, "*b n n"]:
    """Returns the Cholesky factor of I + A for A positive semi-definite.

    On an accelerator a failure is not waited for: the factor is then NaN, which `require_finite` finds.

    Raises:
        NumericalError: I + A is not positive definite, or not finite.
    """
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(1)
    factor, info = torch.linalg.cholesky_ex(shifted)
    # An infinite entry may pass as a success, so the diagonal is looked at too.
    failed = info.any() | ~factor.diagonal(dim1=-2, dim2=-1).isfinite().all()
    if not may_read(matrix):
        return torch.where(failed, torch.nan, factor)
    if bool(failed):
        raise NumericalError(_why_cholesky_failed(matrix))
    return factor


def require_finite(rate: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Returns a rate found on an accelerator, once it is known that no factorisation failed on the way.

    Raises:
        NumericalError: one did.
    """
    if not may_read(rate) and not bool(rate.isfinite().all()):
        raise NumericalError(
            "logdet(I + A) failed: A overflowed or its precision is too low for its scale; lower the learning rate, "
            "raise eps_sq or pass float64 features"
        )
    return rate


class _HalfLogdet(torch.autograd.Function):
    """½ logdet(I + A) with the closed-form gradient ½ (I + A)⁻¹, cheaper than the Cholesky factor's own."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        factor = factor_shifted(matrix)
        ctx.save_for_backward(matrix, factor)
        return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        matrix, factor = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the gradient is wanted, for second derivatives
            inverse = torch.linalg.inv(matrix + torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device))
        else:
            inverse = torch.cholesky_inverse(factor)
        return 0.5 * grad_outputs[0][..., None, None] * inverse


def _why_cholesky_failed(matrix: Tensor) -> str:
    if not bool(matrix.isfinite().all()):
        return (
            "logdet(I + A) failed: A holds NaN or infinite entries. The features or the dictionary overflowed; "
            "lower the learning rate or mu."
        )
    lowest = float(torch.linalg.eigvalsh(matrix.double()).min())
    return (
        f"logdet(I + A) failed: A must be positive semi-definite, and its smallest eigenvalue is {lowest:.3g}. "
        f"Its precision ({matrix.dtype}) is too low for its scale: raise eps_sq or pass float64 features."
    )


def half_logdet(matrix: Float[Tensor, "*b n n"]) -> Float[Tensor, "*b"]:
    """Returns ½ logdet(I + A) of symmetric positive semi-definite matrices A.

    Args:
        matrix: A, float32 or float64, any number of leading batch dimensions.

    Returns:
        One value a matrix, in nats, ≥ 0. Differentiable.

    Raises:
        NumericalError: I + A is not positive definite, or not finite (on an accelerator the result is NaN instead).
    """
    result = _HalfLogdet.apply(matrix)
    assert isinstance(result, Tensor)
    return result
