"""The variational rates R^v, R_c^v, the residual (µ/2m) M of eq. (7), their ascent direction and step bounds.

Everything is in class-normalised form: codes hold Ã, the energy per sample of the class, so A = Ã Diag(n) and

    R^v   = ½ logdet(I + β Γ Diag(Ã γ) Γᵀ)
    R_c^v = Σ_j γ_j/2 Σ_l log(1 + β Ã_lj)
    (µ/2m) M = µ/2 Σ_j n_j ‖C_j − Γ Diag(Ã_j) Γᵀ‖²_F

With balanced classes these are eqs. (7), (17) and (19) term by term; with unbalanced batches a dictionary latched on
all data stays right without rescaling.

Codes come in two structures, told apart by their shape. Shared: (q, k), every class may use every atom. Block:
(s, k) with q = k s, class j uses atoms j s to (j+1) s − 1 only; a class absent from the batch is not touched.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vmcr2.linalg import half_logdet
from vmcr2.membership import ClassGroup, Membership


class VariationalRates(NamedTuple):
    """R^v, R_c^v in nats and the residual (µ/2m) M ≥ 0. R^v − R_c^v is not ΔR unless the residual vanishes."""

    expansion: Float[Tensor, ""]
    compression: Float[Tensor, ""]
    residual: Float[Tensor, ""]


def is_block(atoms: Float[Tensor, "d q"], codes: Float[Tensor, "c k"]) -> bool:
    """Whether the codes are in block structure; with a single class the two structures coincide."""
    return codes.shape[0] != atoms.shape[1]


def _atom_energies(
    atoms: Float[Tensor, "d q"], codes: Float[Tensor, "c k"], class_weights: Float[Tensor, " k"]
) -> Float[Tensor, " q"]:
    """Returns Ã γ, how much energy each atom carries over all classes."""
    if is_block(atoms, codes):
        return (codes * class_weights).T.reshape(-1)
    return codes @ class_weights


def _group_blocks(
    atoms: Float[Tensor, "d q"], codes: Float[Tensor, "s k"], group: ClassGroup
) -> tuple[Float[Tensor, "b d s"], Float[Tensor, "b s"]]:
    """Returns the atoms and codes of the group's classes."""
    s, k = codes.shape
    blocks = atoms.view(atoms.shape[0], k, s).index_select(1, group.classes).transpose(0, 1)
    return blocks, codes.index_select(1, group.classes).T


def variational_expansion(
    atoms: Float[Tensor, "d q"],
    codes: Float[Tensor, "c k"],
    class_weights: Float[Tensor, " k"],
    eps_sq: float,
) -> Float[Tensor, ""]:
    """Returns R^v(Γ, A) of eq. (7)."""
    energies = _atom_energies(atoms, codes, class_weights)
    return half_logdet((atoms * energies) @ atoms.T * (atoms.shape[0] / eps_sq))


def variational_compression(
    codes: Float[Tensor, "c k"], class_weights: Float[Tensor, " k"], feature_dim: int, eps_sq: float
) -> Float[Tensor, ""]:
    """Returns R_c^v(A) of eq. (7)."""
    return 0.5 * (class_weights * torch.log1p(codes * (feature_dim / eps_sq)).sum(0)).sum()


def moment_norms_sq(features: Float[Tensor, "m d"], membership: Membership) -> Float[Tensor, " k"]:
    """Returns ‖C_j‖²_F of every class, 0 for the absent ones, on the smaller side."""
    norms = features.new_zeros(membership.num_classes)
    for group in membership.groups(features.shape[1]):
        norms = norms.index_add(0, group.classes, _group_moment_norms_sq(group, group.take(features)))
    return norms


def _group_moment_norms_sq(group: ClassGroup, rows: Float[Tensor, "b n d"]) -> Float[Tensor, " b"]:
    weights = group.weights.to(rows.dtype)
    if rows.shape[1] < rows.shape[2]:
        squares = (rows @ rows.mT).square()
        return torch.einsum("bn,bnp,bp->b", weights, squares, weights) / group.counts**2
    return (rows.mT @ (rows * weights[..., None])).square().sum((1, 2)) / group.counts**2


def residual(
    features: Float[Tensor, "m d"],
    membership: Membership,
    atoms: Float[Tensor, "d q"],
    codes: Float[Tensor, "c k"],
    mu: float,
) -> Float[Tensor, ""]:
    """Returns (µ/2m) M = µ/2 Σ_j n_j ‖C_j − Γ Diag(Ã_j) Γᵀ‖²_F by the expansion of eq. (9); no d×d matrix is built.

    The three terms of eq. (9) cancel where the residual is small, so they are computed in float64 and the result is
    right to float32 precision relative to the residual itself, not to its terms.

    Args:
        features: Z, (m, d).
        membership: Π.
        atoms: Γ, (d, q), unit columns.
        codes: Ã, (q, k) shared or (s, k) block, ≥ 0.
        mu: the penalty weight µ > 0.

    Returns:
        A scalar ≥ 0 in the features' dtype. Differentiable in all tensors.
    """
    dtype = features.dtype
    z, gamma, a = features.double(), atoms.double(), codes.double()
    counts = membership.counts.double()
    if is_block(atoms, codes):
        value = z.new_zeros(())
        for group in membership.groups(z.shape[1]):
            rows = group.take(z)
            blocks, block_codes = _group_blocks(gamma, a, group)
            n = group.counts.double()
            cross = torch.einsum("bn,bns,bs->b", group.weights.double(), (rows @ blocks).square(), block_codes)
            overlap = (blocks.mT @ blocks).square()
            own = torch.einsum("bs,bst,bt->b", block_codes, overlap, block_codes)
            value = value + (n * _group_moment_norms_sq(group, rows) - 2 * cross + n * own).sum()
    else:
        moments = (counts * moment_norms_sq(z, membership)).sum()
        cross = ((z @ gamma).square() * membership.spread(a)).sum()
        own = (a * counts * ((gamma.T @ gamma).square() @ a)).sum()
        value = moments - 2 * cross + own
    return (0.5 * mu * value).clamp_min(0).to(dtype)


def ascent_direction(
    features: Float[Tensor, "m d"],
    membership: Membership,
    atoms: Float[Tensor, "d q"],
    codes: Float[Tensor, "c k"],
    mu: float,
    eps_sq: float,
) -> tuple[Float[Tensor, "d q"], Float[Tensor, "c k"]]:
    """Returns the gradients of R^v − R_c^v − (µ/2m) M in atoms and codes (eqs. 7, 10, 11), in closed form."""
    beta = atoms.shape[0] / eps_sq
    weights = membership.class_weights
    energies = _atom_energies(atoms, codes, weights)
    inverse_atoms = _solve_shifted((atoms * energies) @ atoms.T * beta, atoms)
    per_atom = 0.5 * beta * (atoms * inverse_atoms).sum(0)
    toward_atoms = beta * inverse_atoms * energies
    if is_block(atoms, codes):
        toward_codes = per_atom.view(codes.shape[1], codes.shape[0]).T * weights
        pull_atoms, pull_codes = _block_residual_gradients(features, membership, atoms, codes)
    else:
        toward_codes = per_atom[:, None] * weights
        pull_atoms, pull_codes = _shared_residual_gradients(features, membership, atoms, codes)
    toward_codes = toward_codes - 0.5 * beta * weights / (1 + beta * codes)
    return toward_atoms - mu * pull_atoms, toward_codes - mu * pull_codes


def _solve_shifted(matrix: Float[Tensor, "d d"], right: Float[Tensor, "d q"]) -> Float[Tensor, "d q"]:
    """Returns (I + A)⁻¹ B for A positive semi-definite, by Cholesky."""
    shifted = matrix.clone()
    shifted.diagonal().add_(1)
    return torch.cholesky_solve(right, torch.linalg.cholesky_ex(shifted, check_errors=True)[0])


def _shared_residual_gradients(
    features: Float[Tensor, "m d"], membership: Membership, atoms: Float[Tensor, "d q"], codes: Float[Tensor, "q k"]
) -> tuple[Float[Tensor, "d q"], Float[Tensor, "q k"]]:
    """Returns the gradients of M/2m in atoms and codes (eqs. 10 and 11, summed over classes by two products)."""
    projected = features @ atoms
    overlap = atoms.T @ atoms
    scaled = codes * membership.counts
    data = features.T @ (projected * membership.spread(codes))
    model = atoms @ (overlap * (scaled @ codes.T))
    return 2 * (model - data), overlap.square() @ scaled - membership.collect(projected.square())


def _block_residual_gradients(
    features: Float[Tensor, "m d"], membership: Membership, atoms: Float[Tensor, "d q"], codes: Float[Tensor, "s k"]
) -> tuple[Float[Tensor, "d q"], Float[Tensor, "s k"]]:
    """Returns the gradients of M/2m in atoms and codes, for the classes present; 0 for the others."""
    s, k = codes.shape
    grad_atoms = atoms.new_zeros(k, atoms.shape[0], s)
    grad_codes = codes.new_zeros(k, s)
    for group in membership.groups(features.shape[1]):
        rows = group.take(features)
        blocks, block_codes = _group_blocks(atoms, codes, group)
        projected = rows @ blocks
        overlap = blocks.mT @ blocks
        n = group.counts[:, None]
        data = rows.mT @ (projected * group.weights[..., None] * block_codes[:, None])
        model = blocks @ (overlap * (n[..., None] * block_codes[:, :, None] * block_codes[:, None]))
        grad_atoms[group.classes] = 2 * (model - data)
        spent = torch.einsum("bst,bt->bs", overlap.square(), block_codes) * n
        grad_codes[group.classes] = spent - torch.einsum("bns,bn->bs", projected.square(), group.weights)
    return grad_atoms.transpose(0, 1).reshape_as(atoms), grad_codes.T


def lipschitz_atoms(
    features: Float[Tensor, "m d"], membership: Membership, codes: Float[Tensor, "c k"], mu: float
) -> Float[Tensor, ""]:
    """Returns L_Γ = 2µ Σ_j n_j (‖C_j‖_F ‖Ã_j‖_∞ + ‖Ã_j‖²_∞), eq. (17); 0 where no class present has a code."""
    largest = codes.amax(0)
    norms = moment_norms_sq(features, membership).sqrt()
    return 2 * mu * (membership.counts * largest * (norms + largest)).sum()


def lipschitz_codes(
    atoms: Float[Tensor, "d q"], codes: Float[Tensor, "c k"], class_counts: Float[Tensor, " k"], mu: float
) -> Float[Tensor, " k"]:
    """Returns each class's L = µ n_j ‖(ΓᵀΓ)^⊙2‖_F, eq. (19); 0 for an absent class.

    In block structure the norm is taken over the blocks on the diagonal of ΓᵀΓ alone. That is the same number where
    the classes' subspaces are orthogonal, and costs q s d instead of q² d.
    """
    if is_block(atoms, codes):
        blocks = atoms.view(atoms.shape[0], codes.shape[1], codes.shape[0]).permute(1, 0, 2)
        overlap = blocks.mT @ blocks
    else:
        overlap = atoms.T @ atoms
    return mu * class_counts * overlap.square().square().sum().sqrt()
