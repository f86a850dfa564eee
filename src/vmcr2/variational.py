"""The variational objective R^v − R_c^v − (µ/2m) M of eq. (7): its rates, their gradients, bounds for step sizes.

In class-normalised form (codes are Ã, the energy per sample of the class, so A = Ã Diag(n); β = d/ε², γ_j = n_j/m):

    R^v   = ½ logdet(I + β Γ Diag(Ã γ) Γᵀ)
    R_c^v = Σ_j γ_j/2 Σ_l log(1 + β Ã_lj)

and M as in `mismatch`. With balanced classes these are eqs. (7), (17) and (19) term by term; with unbalanced batches a
dictionary latched on all data remains correct without rescaling.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vmcr2.checks import Condition, check_number, check_tensor, read_conditions
from vmcr2.errors import InputError
from vmcr2.linalg import half_logdet, inverse_shifted, require_finite, untraced, wide_dtype
from vmcr2.membership import Membership
from vmcr2.mismatch import Codes, precise_mismatch

_LEAST_ENERGY = 1e-20  # added to β Ã γ of an atom before dividing by it; too small to affect any rate


class VariationalRates(NamedTuple):
    """R^v, R_c^v in nats and the residual (µ/2m) M ≥ 0. R^v − R_c^v is not ΔR, see `objective`."""

    expansion: Float[Tensor, ""]
    compression: Float[Tensor, ""]
    residual: Float[Tensor, ""]


def objective(
    features: Float[Tensor, "m d"], membership: Membership, dictionary: Codes, *, mu: float, eps_sq: float
) -> VariationalRates:
    """Returns the three terms of eq. (7), R^v − R_c^v − (µ/2m) M.

    R^v − R_c^v equals ΔR if the residual is 0 and the atoms that a class uses are orthogonal (Proposition 3.1).

    Args:
        features: Z, (m, d), rows of norm 1.
        membership: Π, among the dictionary's classes.
        dictionary: Γ and Ã.
        mu: µ > 0.
        eps_sq: ε² > 0.
    """
    weights = membership.class_weights
    return VariationalRates(
        variational_expansion(dictionary, weights, eps_sq),
        variational_compression(dictionary, weights, eps_sq),
        (mu * precise_mismatch(features, membership, dictionary)).to(features.dtype),
    )


def atom_energies(dictionary: Codes, class_weights: Float[Tensor, " k"]) -> Float[Tensor, " q"]:
    """Returns Ã γ, each atom's energy per sample of the batch."""
    return dictionary.by_atom(dictionary.codes * class_weights[:, None])


def model_moment(dictionary: Codes, class_weights: Float[Tensor, " k"], eps_sq: float) -> Float[Tensor, "d d"]:
    """Returns β Γ Diag(Ã γ) Γᵀ, of which R^v is ½ logdet(I + ·)."""
    beta = dictionary.atoms.shape[1] / eps_sq
    energies = atom_energies(dictionary, class_weights)[:, None]
    return dictionary.total((dictionary.atoms * (beta * energies)).mT @ dictionary.atoms)


def variational_expansion(dictionary: Codes, class_weights: Float[Tensor, " k"], eps_sq: float) -> Float[Tensor, ""]:
    """Returns R^v(Γ, A) of eq. (7)."""
    return half_logdet(model_moment(dictionary, class_weights, eps_sq))


def variational_compression(dictionary: Codes, class_weights: Float[Tensor, " k"], eps_sq: float) -> Float[Tensor, ""]:
    """Returns R_c^v(A) of eq. (7)."""
    beta = dictionary.atoms.shape[1] / eps_sq
    return dictionary.total(0.5 * (class_weights * torch.log1p(beta * dictionary.codes).sum(1)).sum())


def solved_atoms(dictionary: Codes, class_weights: Float[Tensor, " k"], eps_sq: float) -> Float[Tensor, "q d"]:
    """Returns S⁻¹ Γ as rows, S = I + β Γ Diag(Ã γ) Γᵀ, from which both gradients of R^v are formed.

    For up to d/2 atoms it is D^-½ (I + U Uᵀ)⁻¹ U with U = D^½ Γᵀ, D = β Diag(Ã γ): the push-through identity, with a
    q×q matrix in place of a d×d one. This is in float64, since atoms that nearly coincide would otherwise lose more
    digits than with the d×d matrix; for so few atoms it is still faster.
    """
    atoms = dictionary.atoms
    q, d = atoms.shape
    if 2 * q > d or dictionary.shards is not None:  # only d×d matrices can be summed over ranks
        return atoms @ inverse_shifted(model_moment(dictionary, class_weights, eps_sq))
    beta = d / eps_sq
    scales = (beta * atom_energies(dictionary, class_weights).double() + _LEAST_ENERGY).sqrt()[:, None]
    scaled = atoms * scales
    return (inverse_shifted(scaled @ scaled.mT) @ scaled / scales).to(atoms.dtype)


def expansion_atom_gradient(
    dictionary: Codes, solved: Float[Tensor, "q d"], class_weights: Float[Tensor, " k"], eps_sq: float
) -> Float[Tensor, "q d"]:
    """Returns ∂R^v/∂Γ = β S⁻¹ Γ Diag(Ã γ), as rows."""
    beta = dictionary.atoms.shape[1] / eps_sq
    return beta * atom_energies(dictionary, class_weights)[:, None] * solved


def exposures(dictionary: Codes, solved: Float[Tensor, "q d"]) -> Float[Tensor, " q"]:
    """Returns Γ_lᵀ S⁻¹ Γ_l for each atom: at most 1, and less the more energy lies along it."""
    return (dictionary.atoms * solved).sum(1)


def coverages(
    dictionary: Codes,
    solved: Float[Tensor, "q d"],
    others: Float[Tensor, "r d"],
    class_weights: Float[Tensor, " k"],
    eps_sq: float,
) -> Float[Tensor, " r"]:
    """Returns 1 − Γ_lᵀ S⁻¹ Γ_l for other atoms, of which S has none, as Γ_lᵀ (S⁻¹ (S − I)) Γ_l: exact near 0 too."""
    covered = expansion_atom_gradient(dictionary, solved, class_weights, eps_sq).mT @ dictionary.atoms
    return (others @ covered * others).sum(1)


def expansion_code_gradient(
    dictionary: Codes, exposed: Float[Tensor, " q"], class_weights: Float[Tensor, " k"], eps_sq: float
) -> Float[Tensor, "k c"]:
    """Returns ∂R^v/∂Ã_lj = ½ β γ_j Γ_lᵀ S⁻¹ Γ_l, by class."""
    beta = dictionary.atoms.shape[1] / eps_sq
    return 0.5 * beta * class_weights[:, None] * dictionary.by_class(exposed)


def compression_code_gradient(
    dictionary: Codes, class_weights: Float[Tensor, " k"], eps_sq: float
) -> Float[Tensor, "k c"]:
    """Returns ∂R_c^v/∂Ã_lj = ½ β γ_j / (1 + β Ã_lj), by class."""
    beta = dictionary.atoms.shape[1] / eps_sq
    return 0.5 * beta * class_weights[:, None] / (1 + beta * dictionary.codes)


def lipschitz_atoms(
    squared_moment_norms: Float[Tensor, " k"], class_counts: Float[Tensor, " k"], codes: Float[Tensor, "k c"], mu: float
) -> Float[Tensor, ""]:
    """Returns L_Γ = 2µ Σ_j n_j (‖C_j‖_F ‖Ã_j‖_∞ + ‖Ã_j‖²_∞), eq. (17), from ‖C_j‖²_F.

    It bounds only the mismatch's part of the gradient, and only for nearly orthogonal atoms (eqs. 12 to 16).
    """
    largest = codes.amax(1)
    return 2 * mu * (class_counts * largest * (squared_moment_norms.sqrt() + largest)).sum()


def lipschitz_codes(
    overlap_norms: Float[Tensor, " k"], class_counts: Float[Tensor, " k"], mu: float
) -> Float[Tensor, " k"]:
    """Returns each class's L_A = µ n_j ‖(ΓᵀΓ)^⊙2‖_F, eqs. (18) and (19). It bounds only the mismatch's part."""
    return mu * class_counts * overlap_norms


@untraced
def variational_logdet(factor: Float[Tensor, "*b d r"], *, scale: float = 1.0) -> Float[Tensor, "*b"]:
    """Returns Σ_i log(1 + c ‖U_i‖²), which is at least logdet(I + c U Uᵀ): the bound of Proposition 3.1.

    It is exact if the columns of U are orthogonal, as those of Ū S^½ from the SVD of M = U Uᵀ are, so that minimising
    over U subject to U Uᵀ = M gives logdet(I + c M) without a determinant. This can replace a log-determinant that is
    to be minimised (as a heuristic for low rank, or for compression), but not one that is to be maximised.

    Args:
        factor: U, (..., d, r), finite; M = U Uᵀ.
        scale: c > 0.

    Returns:
        One value per matrix, in nats, ≥ 0, float32 or wider even under autocast. Differentiable.

    Raises:
        InputError: a wrong argument (a ValueError).
        NumericalError: c ‖U_i‖² overflowed.
    """
    check_tensor("factor", factor, "of shape (..., d, r)")
    if factor.ndim < 2:
        raise InputError(f"factor must be floating point of shape (..., d, r), got shape {tuple(factor.shape)}")
    scale = check_number("scale", scale)
    read_conditions(
        [Condition(~factor.detach().isfinite().all(), "factor must be finite", lambda: "NaN or infinite entries")]
    )
    value = torch.log1p(scale * factor.to(wide_dtype(factor)).square().sum(-2)).sum(-1)
    require_finite(value, otherwise="scale * ‖U_i‖² overflowed; lower scale, or the entries of factor, or pass float64")
    return value
