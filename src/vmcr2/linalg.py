"""Log-determinants and products of positive semi-definite matrices, in a sufficiently wide dtype."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function, forward_ad

from vmcr2.errors import InputError, NumericalError

# β = d/ε² scales every matrix C of which I + βC is factorised. While β ‖z‖² is in the first range, float32 is exact to
# about 1e-7 β relative to R even if all features of a class coincide: 1e-5 at some hundreds, 1e-3 at its end. Outside
# it float64 is used, which fails outside the second range.
_FLOAT32_RANGE = (1.0, 1e4)
FLOAT64_RANGE = (1e-8, 1e10)
# Of β ‖z‖² for features that are not of norm 1. At this value R is still exact to 1e-7; at a few thousand times it, ΔR
# of low-rank features, being a difference, is off by several per cent.
_LARGEST_SCALE = 1e12

_LOGDET_FAILED = (
    "logdet(I + A) failed: A has overflowed, or its precision is too low for its scale; lower the learning rate, "
    "raise eps_sq or pass float64 features"
)


_P = ParamSpec("_P")
_T = TypeVar("_T")


def untraced(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Runs a function as it is within torch.compile, which would cut it at each of its checks into dozens of graphs."""

    @wraps(function)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        # Only then, since torch.compiler.disable takes two seconds to import what it needs.
        run = torch.compiler.disable(function) if torch.compiler.is_compiling() else function
        return run(*args, **kwargs)

    return called


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """Returns the dtype that rates are computed in: the widest of the tensors' dtypes, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def check_eps_sq(feature_dim: int, eps_sq: float) -> None:
    """Raises InputError if β = d/ε² is so small or large that float64 would lose the rates."""
    lowest, highest = FLOAT64_RANGE
    if not lowest <= feature_dim / eps_sq <= highest:
        raise InputError(
            f"eps_sq must be from {feature_dim / highest:.3g} to {feature_dim / lowest:.3g} for features of dimension "
            f"{feature_dim} (beyond that float64 loses log(1 + d/eps_sq)), got {eps_sq!r}"
        )


def rate_dtype(feature_dim: int, eps_sq: float, *tensors: Tensor, largest: float = 1.0) -> torch.dtype:
    """Returns `wide_dtype`, or float64 if d/ε² or the norm of features requires it.

    Args:
        feature_dim: d.
        eps_sq: ε².
        tensors: the result is at least as wide as their dtypes.
        largest: the norm of the longest feature; NaN if unknown, which selects float64.

    Raises:
        InputError: ε² is so small or large that float64 would not do either (a ValueError).
        NumericalError: the norm of features is too large for float64.
    """
    check_eps_sq(feature_dim, eps_sq)
    beta = feature_dim / eps_sq
    if beta * largest * largest > _LARGEST_SCALE:
        raise NumericalError(
            f"logdet(I + A) fails for features of norms up to {largest:.3g}: at this eps_sq float64 allows norms of at "
            f"most {(_LARGEST_SCALE / beta) ** 0.5:.3g}; scale the features down, or raise eps_sq"
        )
    lowest, highest = _FLOAT32_RANGE
    enough = all(lowest <= scale <= highest for scale in (beta, beta * largest * largest))
    return wide_dtype(*tensors) if enough else torch.float64


def is_batched(tensor: Tensor) -> bool:
    """Whether the tensor stands for many under `torch.vmap`, so that its values cannot be read."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def is_tracked(tensor: Tensor) -> bool:
    """Whether derivatives in the tensor may be needed: by autograd, `torch.func`, forward mode, or around vmap."""
    return (
        is_batched(tensor)
        or tensor.requires_grad
        or torch._C._functorch.is_gradtrackingtensor(tensor)
        or forward_ad.unpack_dual(tensor).tangent is not None
    )


def unit_rows(features: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
    """Returns every row scaled to norm 1, in float32 or wider: the constraint Z ∈ S of eq. (1). Differentiable.

    A row of zeros stays, and one of norm below 1e-12 remains shorter than 1. A row whose norm overflows has no
    direction left: it becomes NaN, to be noticed later.
    """
    features = features.to(wide_dtype(features))
    norms = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / norms.where(norms.isfinite(), torch.nan).clamp_min(1e-12)


def _plain_product(left: Tensor, right: Tensor) -> Tensor:
    device = left.device.type
    if not torch.is_autocast_enabled(device):  # entering the context costs as much as a small product
        return left @ right
    with torch.autocast(device, enabled=False):
        return left @ right


class _Product(Function):
    """A B, whose derivatives keep their precision even if they are taken under autocast."""

    generate_vmap_rule = True

    @staticmethod
    def forward(left: Tensor, right: Tensor) -> Tensor:
        return _plain_product(left, right)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        return (
            product(grad_outputs[0], right.mT) if ctx.needs_input_grad[0] else None,
            product(left.mT, grad_outputs[0]) if ctx.needs_input_grad[1] else None,
        )

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Tensor | None) -> Tensor:
        left, right = ctx.saved_tensors
        moved, turned = grad_inputs
        parts = ([] if moved is None else [product(moved, right)]) + ([] if turned is None else [product(left, turned)])
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def product(left: Float[Tensor, "*b n i"], right: Float[Tensor, "*b i p"]) -> Float[Tensor, "*b n p"]:
    """Returns A B for equal leading dimensions, never under autocast, neither forward nor backward. Differentiable."""
    if not (torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)):
        return _plain_product(left, right)
    result = _Product.apply(left, right)
    assert isinstance(result, Tensor)
    return result


class _Gram(Function):
    """X Xᵀ, whose symmetry lets its gradient take one product, where autograd takes two."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor) -> Tensor:
        return _plain_product(rows, rows.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        return product(grad_outputs[0] + grad_outputs[0].mT, rows)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        half = product(grad_inputs[0], rows.mT)
        return half + half.mT


def gram(rows: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n n"]:
    """Returns X Xᵀ, the inner products of rows. Differentiable."""
    if not (torch.is_grad_enabled() and rows.requires_grad):
        return product(rows, rows.mT)
    result = _Gram.apply(rows)
    assert isinstance(result, Tensor)
    return result


def one_for_zero(values: Tensor) -> Tensor:
    """Returns values ≥ 0 with 1 in place of 0, to divide by where 0 / 0 means 0."""
    return torch.where(values > 0, values, 1)


def _shifted(matrix: Float[Tensor, "*b n n"]) -> Float[Tensor, "*b n n"]:
    return matrix + torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def factor_shifted(matrix: Float[Tensor, "*b n n"]) -> Float[Tensor, "*b n n"]:
    """Returns the Cholesky factor of I + A for A positive semi-definite, or NaN if there is none."""
    factor, info = torch.linalg.cholesky_ex(_shifted(matrix))
    # An infinite entry may be reported as a success, so the diagonal is checked too.
    factorised = (info == 0) & factor.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    return torch.where(factorised[..., None, None], factor, torch.nan)


class _Inverse(Function):
    """A⁻¹ for symmetric A, whose derivatives keep their precision even if they are taken under autocast."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> Tensor:
        return torch.linalg.inv(matrix)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -product(product(inverse.mT, grad_outputs[0]), inverse.mT)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -product(product(inverse, grad_inputs[0]), inverse)


class _HalfLogdet(Function):
    """½ logdet(I + A) with the closed-form gradient ½ (I + A)⁻¹, cheaper than the Cholesky factor's own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor]:
        factor = factor_shifted(matrix)
        return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1), factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])
        ctx.save_for_forward(inputs[0], output[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        matrix, factor = ctx.saved_tensors
        # Second derivatives need a graph of the gradient, and the factor carries none.
        inverse = _Inverse.apply(_shifted(matrix)) if torch.is_grad_enabled() else torch.cholesky_inverse(factor)
        assert isinstance(inverse, Tensor)
        return 0.5 * grad_outputs[0][..., None, None] * inverse

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Tensor) -> tuple[Tensor, None]:
        matrix, _ = ctx.saved_tensors
        solved = torch.linalg.solve(_shifted(matrix), grad_inputs[0])
        return 0.5 * solved.diagonal(dim1=-2, dim2=-1).sum(-1), None


def half_logdet(matrix: Float[Tensor, "*b n n"]) -> Float[Tensor, "*b"]:
    """Returns ½ logdet(I + A) for symmetric positive semi-definite matrices A.

    Args:
        matrix: A, float32 or float64, any number of leading batch dimensions.

    Returns:
        One value per matrix, in nats, ≥ 0; NaN if the factorisation failed, for `require_finite` to find.
        Differentiable.
    """
    value, _ = _HalfLogdet.apply(matrix)  # pyrefly: ignore[not-iterable]
    assert isinstance(value, Tensor)
    return value


def inverse_shifted(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Returns (I + A)⁻¹ for A positive semi-definite, by Cholesky; NaN if that fails.

    I + A is so well conditioned that the inverse serves as well as a solve, and a product with it is far cheaper.
    """
    return torch.cholesky_inverse(factor_shifted(matrix))


def require_finite(*values: Tensor, otherwise: str = _LOGDET_FAILED) -> None:
    """Reads from the device whether all values are finite; the default message is about rates.

    Raises:
        NumericalError: some are not; `otherwise` is the message.
    """
    finite = [value.detach().isfinite().all() for value in values if not is_batched(value)]
    if finite and not bool(torch.stack(finite).all()):
        raise NumericalError(otherwise)


def bisected(beyond: Callable[[Any], Any], low: Any, high: Any, rounds: int) -> tuple[Any, Any]:
    """Returns the ends of the interval in which a condition turns from false to true, by bisection.

    Args:
        beyond: the condition, on a number or elementwise on an array.
        low: where it is false, a number or an array.
        high: where it is true, likewise.
        rounds: how often to halve the distance between them.
    """
    for _ in range(rounds):
        middle = 0.5 * (low + high)
        over = beyond(middle)
        low, high = np.where(over, low, middle)[()], np.where(over, middle, high)[()]  # numbers stay numbers
    return low, high
