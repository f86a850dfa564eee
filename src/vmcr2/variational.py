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

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vmcr2.checks import check_number
from vmcr2.errors import InputError
from vmcr2.linalg import factor_shifted, half_logdet, may_read, symmetric_product, wide_dtype
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


def variational_logdet(factor: Float[Tensor, "*b d r"], *, scale: float = 1.0) -> Float[Tensor, "*b"]:
    """Returns Σ_i log(1 + c ‖U_i‖²), which is at least logdet(I + c U Uᵀ): the bound of Proposition 3.1.

    It is exact where the columns of U are orthogonal, as those of Ū S^½ from the SVD of M = U Uᵀ are, so that
    minimising over U subject to U Uᵀ = M gives logdet(I + c M) without a determinant. Where a log-determinant is to be
    made small (low rank as a heuristic, compression), this can stand in for it; where it is to be made large, not.

    Args:
        factor: U, (..., d, r), finite; M = U Uᵀ.
        scale: c > 0.

    Returns:
        One value a matrix, in nats, ≥ 0, float32 or wider also under autocast. Differentiable.

    Raises:
        InputError: a wrong argument (a ValueError).
    """
    if not isinstance(factor, Tensor):
        raise InputError(f"factor must be a torch.Tensor of shape (..., d, r), got {type(factor).__name__}")
    if factor.ndim < 2 or not factor.is_floating_point():
        raise InputError(
            f"factor must be floating point of shape (..., d, r), got {factor.dtype} {tuple(factor.shape)}"
        )
    check_number("scale", scale)
    if not bool(factor.detach().isfinite().all()):
        raise InputError("factor must be finite, got NaN or infinite entries")
    with torch.autocast(factor.device.type, enabled=False):
        return torch.log1p(scale * factor.to(wide_dtype(factor)).square().sum(-2)).sum(-1)


class ClassMoments(NamedTuple):
    """What the residual needs of a batch alone, whatever the dictionary: found once a step, used by both halves.

    Attributes:
        norms_sq: ‖C_j‖²_F of every class, float64, 0 for the absent ones.
        pull: Σ_j π_ij C_j z_i for every sample, half of the data's part of the gradient.
    """

    norms_sq: Float[Tensor, " k"]
    pull: Float[Tensor, "m d"]


@torch.no_grad()
def class_moments(features: Float[Tensor, "m d"], membership: Membership) -> ClassMoments:
    """Returns ‖C_j‖²_F and Σ_j π_ij C_j z_i: class by class on the smaller side, or by all pairs on an accelerator."""
    if not may_read(features):
        return _moments_by_pairs(features, membership)
    norms_sq = features.new_zeros(membership.num_classes, dtype=torch.float64)
    pull = torch.zeros_like(features)
    for group in membership.groups(features.shape[1]):
        rows = group.take(features)
        # Divided in the rows' own precision: in float64 a float32 quotient would show where the residual is small.
        shares = group.weights.to(rows.dtype) / group.counts.to(rows.dtype)[:, None]
        weighted = rows * shares[..., None]
        if rows.shape[1] < rows.shape[2]:
            gram = rows @ weighted.mT
            squares = (gram.double() * gram.mT.double()).sum((1, 2))
            pulled = gram @ rows
        else:
            moments = rows.mT @ weighted
            squares = moments.double().square().sum((1, 2))
            pulled = rows @ moments
        norms_sq.index_add_(0, group.classes, squares)
        pulled = pulled * group.weights.to(rows.dtype)[..., None]
        group.give(pulled, to=pull)
    return ClassMoments(norms_sq, pull)


_PAIRS = 2**24  # inner products held at once


def _moments_by_pairs(features: Float[Tensor, "m d"], membership: Membership) -> ClassMoments:
    """Returns the same from all inner products, in float64: no shape depends on the sizes of the classes."""
    z, counts, labels = features.double(), membership.counts.double(), membership.labels
    inverse = torch.where(counts > 0, 1 / torch.where(counts > 0, counts, 1), 0)
    norms_sq, pull = torch.zeros_like(counts), []
    rows = None if labels is not None else membership.rows().double()
    at_once = max(1, _PAIRS // len(z))
    for start in range(0, len(z), at_once):
        part = slice(start, start + at_once)
        gram = z[part] @ z.T
        if labels is not None:
            shares = (labels[part, None] == labels) * inverse[labels]
            by_sample = (gram.square() * shares).sum(1) * inverse[labels[part]]
            norms_sq.index_add_(0, labels[part], by_sample)
        else:
            assert rows is not None
            shares = (rows[part] * inverse) @ rows.T
            norms_sq += ((gram.square() @ rows) * rows[part]).sum(0) * inverse.square()
        pull.append((gram * shares) @ z)
    return ClassMoments(norms_sq, torch.cat(pull))


def residual(
    features: Float[Tensor, "m d"],
    membership: Membership,
    atoms: Float[Tensor, "d q"],
    codes: Float[Tensor, "c k"],
    mu: float,
    moments: ClassMoments | None = None,
) -> Float[Tensor, ""]:
    """Returns (µ/2m) M = µ/2 Σ_j n_j ‖C_j − Γ Diag(Ã_j) Γᵀ‖²_F by the expansion of eq. (9); no d×d matrix is built.

    The three terms of eq. (9) cancel where the residual is small; there they are computed again in float64, so that
    the result is right relative to the residual itself, not to its terms.

    Args:
        features: Z, (m, d).
        membership: Π.
        atoms: Γ, (d, q), unit columns.
        codes: Ã, (q, k) shared or (s, k) block, ≥ 0.
        mu: the penalty weight µ > 0.
        moments: those of the batch, where they are known already.

    Returns:
        A scalar ≥ 0 in the features' dtype. Differentiable in all tensors; fastest in the features alone.
    """
    learned = membership.soft is not None and membership.soft.requires_grad
    if learned or atoms.requires_grad or codes.requires_grad:
        return _residual_by_autograd(features, membership, atoms, codes, mu)
    if moments is None:
        moments = class_moments(features.detach(), membership)
    value = _Residual.apply(features, membership, atoms, codes, mu, moments)
    assert isinstance(value, Tensor)
    return value


class _Residual(torch.autograd.Function):
    """The residual with its gradient in the features, 2µ Σ_j π_ij (C_j − Γ Diag(Ã_j) Γᵀ) z_i, in closed form."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        membership: Membership,
        atoms: Tensor,
        codes: Tensor,
        mu: float,
        moments: ClassMoments,
    ) -> Tensor:
        counts = membership.counts.double()
        # In float32 each term is known to about 1e-7; a residual far below them would be noise, and so its gradient.
        # Whether it is cannot be asked on an accelerator without waiting, so there it is float64 from the start.
        narrow = [features.dtype] if features.dtype != torch.float64 and may_read(features) else []
        for dtype in (*narrow, torch.float64):
            fit = _model_fit(features.to(dtype), membership, atoms.to(dtype), codes.to(dtype))
            if dtype == torch.float64 and moments.pull.dtype != dtype:
                moments = class_moments(features.double(), membership)
            whole = (counts * moments.norms_sq).sum()
            value = whole - 2 * fit.cross + fit.own
            pull = (moments.pull - fit.pull).to(features.dtype)
            if dtype != torch.float64 and bool(value >= _CANCELLED * (whole + fit.own)):
                break
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(features, pull.mul_(2 * mu), atoms, codes)
            ctx.membership = Membership(membership.labels, membership.soft, membership.counts)
            ctx.mu = mu
        return (0.5 * mu * value).clamp_min(0).to(features.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        features, gradient, atoms, codes = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the gradient is wanted, for second derivatives
            value = _residual_by_autograd(features, ctx.membership, atoms, codes, ctx.mu)
            (gradient,) = torch.autograd.grad(value, features, create_graph=True)
        return grad_outputs[0] * gradient, None, None, None, None, None


_CANCELLED = 0.05


class _ModelFit(NamedTuple):
    """The dictionary's part of eq. (9): ⟨C, B⟩ and ‖B‖² summed over samples in float64, and B_j z_i of every sample."""

    cross: Float[Tensor, ""]
    own: Float[Tensor, ""]
    pull: Float[Tensor, "m d"]


def _model_fit(
    features: Float[Tensor, "m d"], membership: Membership, atoms: Float[Tensor, "d q"], codes: Float[Tensor, "c k"]
) -> _ModelFit:
    if is_block(atoms, codes) and not may_read(features):
        blocks = atoms.T.reshape(codes.shape[1], codes.shape[0], -1)
        overlap, energies = (blocks @ blocks.mT).double().square(), codes.T.double()
        own = torch.einsum("b,bs,bst,bt->", membership.counts.double(), energies, overlap, energies)
        chosen = _by_sample(features, membership, atoms, codes)
        cross = (chosen.projected.double() * chosen.scaled.double()).sum()
        return _ModelFit(cross, own, chosen.back(atoms))
    supports = _supports(atoms, codes)
    if supports is None:
        projected = features @ atoms
        scaled = projected * membership.spread(codes)
        overlap = (atoms.T @ atoms).square()
        own = (codes.double() * membership.counts.double() * (overlap @ codes).double()).sum()
        return _ModelFit((projected.double() * scaled.double()).sum(), own, scaled @ atoms.T)
    cross = own = features.new_zeros((), dtype=torch.float64)
    pull = torch.zeros_like(features)
    for group in membership.groups(features.shape[1]):
        rows = group.take(features)
        blocks, block_codes = supports.take(atoms, group)
        projected = rows @ blocks.mT
        scaled = projected * group.weights.to(rows.dtype)[..., None] * block_codes[:, None]
        cross = cross + (projected.double() * scaled.double()).sum()
        energies = block_codes.double()
        overlap = (blocks @ blocks.mT).double().square()
        own = own + torch.einsum("b,bs,bst,bt->", group.counts.double(), energies, overlap, energies)
        group.give(scaled @ blocks, to=pull)
    return _ModelFit(cross, own, pull)


class _BySample(NamedTuple):
    """Samples against block atoms, without asking how large the classes are.

    With labels and more classes than dimensions each sample meets the atoms of its own class alone, which are gathered
    (`mine`); else all atoms, which then is less memory.
    """

    projected: Float[Tensor, "m *r s"]
    weights: Float[Tensor, "m ..."]
    scaled: Float[Tensor, "m *r s"]
    mine: Float[Tensor, "m s d"] | None

    def back(self, atoms: Float[Tensor, "d q"]) -> Float[Tensor, "m d"]:
        """Returns Σ_j π_ij Γ_j Diag(Ã_j) Γ_jᵀ z_i."""
        return self.scaled.flatten(1) @ atoms.T if self.mine is None else (self.scaled[:, None] @ self.mine)[:, 0]


def _by_sample(
    features: Float[Tensor, "m d"], membership: Membership, atoms: Float[Tensor, "d q"], codes: Float[Tensor, "s k"]
) -> _BySample:
    s, k = codes.shape
    labels = membership.labels
    if labels is not None and k > features.shape[1]:
        mine = atoms.T.reshape(k, s, -1)[labels]
        projected = (mine @ features[..., None])[..., 0]
        return _BySample(projected, projected.new_ones(len(labels)), projected * codes.T[labels], mine)
    projected = (features @ atoms).view(-1, k, s)
    weights = membership.rows().to(features.dtype)
    return _BySample(projected, weights, projected * weights[..., None] * codes.T, None)


class _Supports(NamedTuple):
    """Which atoms each class uses, padded with atoms of code 0, and whether no atom is used by two classes."""

    places: Int[Tensor, "k t"]
    codes: Float[Tensor, "k t"]
    disjoint: bool

    def take(
        self, atoms: Float[Tensor, "d q"], group: ClassGroup
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b t"]]:
        """Returns the atoms, as rows, and the codes of the group's classes."""
        places = self.places.index_select(0, group.classes)
        rows = atoms.T.index_select(0, places.flatten()).view(*places.shape, atoms.shape[0])
        return rows, self.codes.index_select(0, group.classes)

    def give(self, values: Float[Tensor, "b t d"], group: ClassGroup, to: Float[Tensor, "q d"]) -> None:
        """Adds the classes' rows to their atoms, in place; values for atoms of code 0 must be 0, and are left out."""
        places = self.places.index_select(0, group.classes).flatten()
        rows = values.flatten(0, 1)
        if self.disjoint:
            used = self.codes.index_select(0, group.classes).flatten().nonzero()[:, 0]
            to.index_copy_(0, places.index_select(0, used), rows.index_select(0, used))
        else:
            to.index_add_(0, places, rows)


def _supports(atoms: Float[Tensor, "d q"], codes: Float[Tensor, "c k"]) -> _Supports | None:
    """Returns the classes' supports where they are small beside the dictionary, else None.

    After latching only a class's own atoms carry energy, and it stays so for long. On the CPU shared codes are
    therefore read as the sparse matrix they are. On an accelerator that would be a wait for the device.
    """
    q = atoms.shape[1]
    if is_block(atoms, codes):
        s, k = codes.shape
        return _Supports(torch.arange(q, device=atoms.device).view(k, s), codes.T, disjoint=True)
    if not may_read(codes):
        return None
    used = codes.T > 0
    widest = int(used.sum(1).max())
    if 4 * widest > q:
        return None
    values, places = torch.topk(codes.T, max(1, widest), dim=1)
    return _Supports(places, values, disjoint=int(used.sum(0).max()) <= 1)


def _residual_by_autograd(
    features: Float[Tensor, "m d"],
    membership: Membership,
    atoms: Float[Tensor, "d q"],
    codes: Float[Tensor, "c k"],
    mu: float,
) -> Float[Tensor, ""]:
    """Returns the residual as plain operations in float64, for gradients in the dictionary or in a learned Π."""
    # Copies, since the dictionary's buffers may be overwritten before the backward pass.
    z, gamma = features.double(), atoms.to(torch.float64, copy=True)
    a = as_shared(atoms, codes).to(torch.float64, copy=True)
    rows = membership.rows().double()
    present = membership.counts > 0  # without the classes whose weight is below rounding
    counts = torch.where(present, rows.sum(0), 0)
    inverse = torch.where(present, 1 / torch.where(present, counts, 1), 0)
    moments = torch.einsum("ij,ip,pj,j->", rows, (z @ z.T).square(), rows, inverse)
    cross = ((z @ gamma).square() * (rows @ a.T)).sum()
    own = (a * counts * ((gamma.T @ gamma).square() @ a)).sum()
    return (0.5 * mu * (moments - 2 * cross + own)).to(features.dtype)


def as_shared(atoms: Float[Tensor, "d q"], codes: Float[Tensor, "c k"]) -> Float[Tensor, "q k"]:
    """Returns codes of either structure as (q, k)."""
    if not is_block(atoms, codes):
        return codes
    return torch.block_diag(*codes.T[:, :, None])


def atom_overlap(atoms: Float[Tensor, "d q"], codes: Float[Tensor, "c k"]) -> Float[Tensor, "*b r r"]:
    """Returns ΓᵀΓ, (q, q); in block structure only its blocks on the diagonal, (k, s, s)."""
    if is_block(atoms, codes):
        blocks = atoms.T.reshape(codes.shape[1], codes.shape[0], -1)
        return blocks @ blocks.mT
    return symmetric_product(atoms.T)


def ascent_direction(
    features: Float[Tensor, "m d"],
    membership: Membership,
    atoms: Float[Tensor, "d q"],
    codes: Float[Tensor, "c k"],
    mu: float,
    eps_sq: float,
    overlap: Float[Tensor, "*b r r"] | None = None,
) -> tuple[Float[Tensor, "d q"], Float[Tensor, "c k"]]:
    """Returns the gradients of R^v − R_c^v − (µ/2m) M in atoms and codes (eqs. 7, 10, 11), in closed form.

    Args:
        features: Z, (m, d).
        membership: Π.
        atoms: Γ, (d, q), unit columns.
        codes: Ã, (q, k) shared or (s, k) block, ≥ 0.
        mu: µ > 0.
        eps_sq: ε² > 0.
        overlap: `atom_overlap` of the dictionary, where it is known already.
    """
    if overlap is None:
        overlap = atom_overlap(atoms, codes)
    beta = atoms.shape[0] / eps_sq
    weights = membership.class_weights
    energies = _atom_energies(atoms, codes, weights)
    inverse_atoms = _solve_shifted((atoms * energies) @ atoms.T * beta, atoms)
    per_atom = 0.5 * beta * (atoms * inverse_atoms).sum(0)
    if is_block(atoms, codes):
        toward_codes = per_atom.view(codes.shape[1], codes.shape[0]).T * weights
    else:
        toward_codes = per_atom[:, None] * weights
    toward_codes = toward_codes - 0.5 * beta * weights / (1 + beta * codes)
    grad_atoms, grad_codes = _residual_gradients(features, membership, atoms, codes, overlap)
    toward_atoms = inverse_atoms.mul_(beta * energies)
    return toward_atoms.sub_(grad_atoms, alpha=mu), toward_codes.sub_(grad_codes, alpha=mu)


def _solve_shifted(matrix: Float[Tensor, "d d"], right: Float[Tensor, "d q"]) -> Float[Tensor, "d q"]:
    """Returns (I + A)⁻¹ B for A positive semi-definite, by Cholesky."""
    return torch.cholesky_solve(right, factor_shifted(matrix))


def _residual_gradients(
    features: Float[Tensor, "m d"],
    membership: Membership,
    atoms: Float[Tensor, "d q"],
    codes: Float[Tensor, "c k"],
    overlap: Float[Tensor, "*b r r"],
) -> tuple[Float[Tensor, "d q"], Float[Tensor, "c k"]]:
    """Returns the gradients of M/2m in atoms and codes (eqs. 10 and 11, the sum over classes in closed form)."""
    if is_block(atoms, codes) and not may_read(features):
        return _block_gradients(features, membership, atoms, codes, overlap)
    supports = _supports(atoms, codes)
    if supports is None:
        projected = features @ atoms
        scaled = codes * membership.counts
        data = features.T @ (projected * membership.spread(codes))
        model = atoms @ (overlap * (scaled @ codes.T))
        return 2 * (model - data), overlap.square() @ scaled - membership.collect(projected.square())
    block = is_block(atoms, codes)
    grad_atoms = torch.zeros_like(atoms.T)
    if block:
        grad_codes = torch.zeros_like(codes)
    else:
        # Every atom against every class: this part is never sparse.
        fit = membership.collect((features @ atoms).square_())
        grad_codes = (overlap.square() @ (codes * membership.counts)).sub_(fit)
    for group in membership.groups(features.shape[1]):
        rows = group.take(features)
        blocks, block_codes = supports.take(atoms, group)
        projected = rows @ blocks.mT
        own = blocks @ blocks.mT
        weights = group.weights.to(rows.dtype)[..., None]
        n = group.counts.to(rows.dtype)[:, None]
        data = (projected * weights * block_codes[:, None]).mT @ rows
        model = (own * (n[..., None] * block_codes[:, :, None] * block_codes[:, None])) @ blocks
        supports.give((model - data).mul_(2), group, to=grad_atoms)
        if block:
            spent = (own.square() @ (n * block_codes)[..., None])[..., 0]
            grad_codes[:, group.classes] = (spent - (projected.square().mul_(weights)).sum(1)).T
    return grad_atoms.T, grad_codes


def _block_gradients(
    features: Float[Tensor, "m d"],
    membership: Membership,
    atoms: Float[Tensor, "d q"],
    codes: Float[Tensor, "s k"],
    overlap: Float[Tensor, "k s s"],
) -> tuple[Float[Tensor, "d q"], Float[Tensor, "s k"]]:
    """Returns the same for block codes, sample by sample: no shape depends on the sizes of the classes."""
    s, k = codes.shape
    energies = codes.T
    chosen = _by_sample(features, membership, atoms, codes)
    squares = chosen.projected.square() * chosen.weights[..., None]
    if chosen.mine is None:
        data = (chosen.scaled.flatten(1).T @ features).view(k, s, -1)
        fit = squares.sum(0)
    else:
        assert membership.labels is not None
        outer = chosen.scaled[..., None] * features[:, None]
        data = outer.new_zeros(k, *outer.shape[1:]).index_add_(0, membership.labels, outer)
        fit = torch.zeros_like(energies).index_add_(0, membership.labels, squares)
    spent = energies * membership.counts[:, None]
    model = (overlap * (spent[..., None] * energies[:, None])) @ atoms.T.reshape(k, s, -1)
    grad_codes = (overlap.square() @ spent[..., None])[..., 0] - fit
    return 2 * (model - data).flatten(0, 1).T, grad_codes.T


def lipschitz_atoms(
    norms_sq: Float[Tensor, " k"], class_counts: Float[Tensor, " k"], codes: Float[Tensor, "c k"], mu: float
) -> Float[Tensor, ""]:
    """Returns L_Γ = 2µ Σ_j n_j (‖C_j‖_F ‖Ã_j‖_∞ + ‖Ã_j‖²_∞), eq. (17); 0 where no class present has a code."""
    largest = codes.amax(0)
    return 2 * mu * (class_counts * largest * (norms_sq.sqrt().to(codes.dtype) + largest)).sum()


def lipschitz_codes(
    overlap: Float[Tensor, "*b r r"], class_counts: Float[Tensor, " k"], mu: float, num_classes: int
) -> Float[Tensor, " k"]:
    """Returns each class's L = µ n_j ‖(ΓᵀΓ)^⊙2‖_F, eq. (19); 0 for an absent class.

    In block structure the norm is √k times that of the class's own block: the same number where the classes'
    subspaces are orthogonal and alike, at the cost of s² d a class instead of q² d.

    Args:
        overlap: `atom_overlap` of the dictionary.
        class_counts: n_j of the classes the codes are of.
        mu: µ > 0.
        num_classes: k of the whole dictionary, which in block structure may be more than the classes given.
    """
    norms = torch.linalg.vector_norm(overlap.square(), dim=(-2, -1))
    # A single class in block structure looks like a shared dictionary of one class, hence the second case.
    alike = num_classes if overlap.ndim == 3 else num_classes / len(class_counts)
    return mu * class_counts * norms * alike**0.5
