"""The mismatch M between the classes' second moments and the dictionary's model of them, eqs. (7), (9), (10), (11).

In class-normalised form, with C_j = Zᵀ Diag(Π_j) Z / n_j, B_j = Γ Diag(Ã_j) Γᵀ and A = Ã Diag(n),

    (µ/2m) M = µ/2 Σ_j n_j ‖C_j − B_j‖²_F
             = µ/2 Σ_j n_j ‖C_j‖²_F − µ ⟨Ã, (ΓᵀZ)^⊙2 Π⟩ + µ/2 ⟨Ã, (ΓᵀΓ)^⊙2 Ã Diag(n)⟩           (eq. 9)

so no d×d matrix is built. A dictionary has one of two structures, chosen once: `SharedCodes`, in which every class may
use every atom, and `BlockCodes`, in which each class has atoms of its own. Both keep atoms as rows and codes by class,
(k, c), so that whatever acts on single codes is written once for both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vmcr2.distributed import Shards
from vmcr2.linalg import gram, one_for_zero, product
from vmcr2.membership import Membership, moments

_PAIRS = 2**25  # inner products of samples held at once
_FEW_PAIRS = 2**16  # up to this many, it is faster to include pairs of samples from different classes


class Attraction(NamedTuple):
    """Samples and the classes that weight them: shapes that broadcast to (m,), (m, k) or (b, n, c).

    Attributes:
        own: z_iᵀ B_j z_i; (m,) for labels, (m, k) for soft rows, (b, n, c) for a class group.
        largest: the largest of Ã_j, which z_iᵀ B_j z_i attains if z_i is an atom with no other near it; (m,), (k,),
            (b, 1, c).
        weights: Π_ij, shaped like `own`.
    """

    own: Tensor
    largest: Tensor
    weights: Tensor


@dataclass(frozen=True)
class SharedCodes:
    """Every class may use every atom.

    Attributes:
        atoms: Γ as rows, (q, d), norm 1.
        codes: Ãᵀ ≥ 0, (k, q).
        shards: None, as all classes are held here.
    """

    atoms: Float[Tensor, "q d"]
    codes: Float[Tensor, "k q"]
    shards = None

    def moved(
        self, atoms: Float[Tensor, "q d"] | None = None, codes: Float[Tensor, "k q"] | None = None
    ) -> SharedCodes:
        """Returns the dictionary with other atoms, or other codes."""
        return replace(self, atoms=self.atoms if atoms is None else atoms, codes=self.codes if codes is None else codes)

    def total(self, part: Tensor, *of: Tensor) -> Tensor:
        """Returns `part`, a sum over the classes held here, which are all classes."""
        return part

    def by_atom(self, values: Float[Tensor, "k q"]) -> Float[Tensor, " q"]:
        """Returns the sum over classes of a value by class and atom."""
        return values.sum(0)

    def by_class(self, values: Float[Tensor, " q"]) -> Float[Tensor, "1 q"]:
        """Returns a value by atom in a shape that broadcasts with the codes."""
        return values[None]

    def overlap(self) -> Float[Tensor, "q q"]:
        """Returns ΓᵀΓ."""
        return gram(self.atoms)

    def respond(self, overlap: Float[Tensor, "q q"], values: Float[Tensor, "k q"]) -> Float[Tensor, "k q"]:
        """Returns (ΓᵀΓ)^⊙2 applied to each class's values."""
        return product(values, overlap.square())

    def overlap_norms(self, overlap: Float[Tensor, "q q"], num_classes: int) -> Float[Tensor, " k"]:
        """Returns ‖(ΓᵀΓ)^⊙2‖_F, for every class; `num_classes` is not used."""
        return torch.linalg.vector_norm(overlap.square()).expand(len(self.codes))

    def project(self, features: Float[Tensor, "m d"], membership: Membership) -> list[Tensor]:
        """Returns ΓᵀZ, with samples as rows: [(m, q)]. Differentiable in the features."""
        return [product(features, self.atoms.mT)]

    def energies(self, projections: list[Tensor], membership: Membership) -> Float[Tensor, "k q"]:
        """Returns (ΓᵀZ)^⊙2 Π, each class's energy along each atom. Differentiable in projections and Π."""
        return membership.collect(projections[0].square())

    def attractions(self, projections: list[Tensor], membership: Membership) -> list[Attraction]:
        """Returns z_iᵀ B_j z_i for each sample and its class. Differentiable in projections and Π."""
        largest, squares = self.codes.amax(1), projections[0].square()
        if membership.soft is None:
            assert membership.labels is not None
            own = (squares * membership.spread(self.codes)).sum(1)
            return [Attraction(own, largest[membership.labels], torch.ones_like(own))]
        return [Attraction(product(squares, self.codes.mT), largest, membership.soft)]

    def atom_gradient(
        self, features: Float[Tensor, "m d"], projections: list[Tensor], overlap: Tensor, membership: Membership
    ) -> Float[Tensor, "q d"]:
        """Returns the gradient of M/2m in the atoms: −2 [Z (Π Ãᵀ ⊙ ZᵀΓ) − Γ (ΓᵀΓ ⊙ Ã Diag(n) Ãᵀ)], eq. (10)."""
        data = (projections[0] * membership.spread(self.codes)).mT @ features
        model = (overlap * ((self.codes * membership.counts[:, None]).mT @ self.codes)) @ self.atoms
        return 2 * (model - data)


@dataclass(frozen=True)
class BlockCodes:
    """Each class has atoms of its own.

    Attributes:
        atoms: Γ as rows, (k s, d), norm 1, class after class.
        codes: the classes' own codes ≥ 0, (k, s).
        shards: which ranks hold the other classes; None if all are held here.
    """

    atoms: Float[Tensor, "q d"]
    codes: Float[Tensor, "k s"]
    shards: Shards | None = None

    def moved(self, atoms: Float[Tensor, "q d"] | None = None, codes: Float[Tensor, "k s"] | None = None) -> BlockCodes:
        """Returns the dictionary with other atoms, or other codes."""
        return replace(self, atoms=self.atoms if atoms is None else atoms, codes=self.codes if codes is None else codes)

    @property
    def blocks(self) -> Float[Tensor, "k s d"]:
        """The atoms of each class."""
        return self.atoms.view(*self.codes.shape, self.atoms.shape[1])

    def total(self, part: Tensor, *of: Tensor) -> Tensor:
        """Returns the sum over all classes, given `part`, the sum over those held here. Differentiable.

        All communication between ranks within a formula is here: sums over classes are small matrices or scalars.

        Args:
            part: of any shape.
            of: the tensors it depends on, so that a rank without a sample of its classes joins the backward pass too.
        """
        if self.shards is None:
            return part
        for each in of:
            part = part + 0 * each.sum()
        return self.shards.total(part)

    def by_atom(self, values: Float[Tensor, "k s"]) -> Float[Tensor, " q"]:
        """Returns the sum over classes of a value by class and atom."""
        return values.flatten()

    def by_class(self, values: Float[Tensor, " q"]) -> Float[Tensor, "k s"]:
        """Returns a value by atom in the shape of the codes."""
        return values.view_as(self.codes)

    def overlap(self) -> Float[Tensor, "k s s"]:
        """Returns the diagonal blocks of ΓᵀΓ, all that is needed if each class has atoms of its own."""
        return gram(self.blocks)

    def respond(self, overlap: Float[Tensor, "k s s"], values: Float[Tensor, "k s"]) -> Float[Tensor, "k s"]:
        """Returns (ΓᵀΓ)^⊙2 applied to each class's values."""
        return product(overlap.square(), values[..., None])[..., 0]

    def overlap_norms(self, overlap: Float[Tensor, "k s s"], num_classes: int) -> Float[Tensor, " k"]:
        """Returns √k times the norm of each class's own block of (ΓᵀΓ)^⊙2, where k includes absent classes.

        It is ‖(ΓᵀΓ)^⊙2‖_F if the classes' subspaces are orthogonal and alike, at a cost of s² d per class.
        """
        return torch.linalg.vector_norm(overlap.square(), dim=(1, 2)) * num_classes**0.5

    def project(self, features: Float[Tensor, "m d"], membership: Membership) -> list[Tensor]:
        """Returns the part of ΓᵀZ with samples and atoms of the same class: [(b, n, c, s)], one per class group."""
        projections = []
        for group in membership.groups(features.shape[1], merged=True):
            chosen = self.blocks.index_select(0, group.classes.flatten()).view(
                len(group.classes), -1, features.shape[1]
            )
            projections.append(product(group.take(features), chosen.mT).unflatten(2, (-1, self.codes.shape[1])))
        return projections

    def energies(self, projections: list[Tensor], membership: Membership) -> Float[Tensor, "k s"]:
        """Returns (ΓᵀZ)^⊙2 Π, each class's energy along each of its own atoms. Differentiable in projections and Π."""
        total = torch.zeros_like(self.codes)
        for projected, group in zip(projections, membership.groups(self.atoms.shape[1], merged=True), strict=True):
            energies = (projected.square() * group.weights[..., None]).sum(1)
            total = total.index_add(0, group.classes.flatten(), energies.flatten(0, 1))
        return total

    def attractions(self, projections: list[Tensor], membership: Membership) -> list[Attraction]:
        """Returns z_iᵀ B_j z_i for each sample and its class. Differentiable in projections and Π."""
        attractions, largest = [], self.codes.amax(1)
        for projected, group in zip(projections, membership.groups(self.atoms.shape[1], merged=True), strict=True):
            own = (projected.square() * self.codes[group.classes][:, None]).sum(3)
            attractions.append(Attraction(own, largest[group.classes][:, None], group.weights))
        return attractions

    def atom_gradient(
        self, features: Float[Tensor, "m d"], projections: list[Tensor], overlap: Tensor, membership: Membership
    ) -> Float[Tensor, "q d"]:
        """Returns the gradient of M/2m in the atoms: −2 [Z (Π Ãᵀ ⊙ ZᵀΓ) − Γ (ΓᵀΓ ⊙ Ã Diag(n) Ãᵀ)], eq. (10)."""
        spent = self.codes * membership.counts[:, None]
        model = (overlap * (spent[..., None] * self.codes[:, None])) @ self.blocks
        data = torch.zeros_like(model)
        for projected, group in zip(projections, membership.groups(features.shape[1], merged=True), strict=True):
            weighted = projected * group.weights[..., None] * self.codes[group.classes][:, None]
            part = weighted.flatten(2).mT @ group.take(features)
            data.index_copy_(0, group.classes.flatten(), part.view(-1, *model.shape[1:]))
        return (2 * (model - data)).flatten(0, 1)


Codes = SharedCodes | BlockCodes


def squared_moment_norms(features: Float[Tensor, "m d"], membership: Membership) -> Float[Tensor, " k"]:
    """Returns ‖C_j‖²_F for every class, 0 for an absent one; on the smaller side of each, except in a small batch.

    Differentiable.

    Args:
        features: Z, (m, d).
        membership: Π.
    """
    norms = features.new_zeros(membership.num_classes)
    labels = membership.labels
    if labels is not None and len(features) ** 2 <= _FEW_PAIRS:
        squared = (gram(features).square() * (labels[:, None] == labels)).sum(1)
        return norms.index_add(0, labels, squared) / one_for_zero(membership.counts).square()
    for group in membership.groups(features.shape[1], merged=True):
        rows, shares = group.take(features), group.shares
        b, n, c = shares.shape
        if c == 1 and n > rows.shape[2]:
            squared = moments(rows, shares).square().sum((2, 3))
        else:
            squared = torch.zeros_like(group.counts)
            at_once = max(1, _PAIRS // (b * n))
            for part, part_shares in zip(rows.split(at_once, 1), shares.split(at_once, 1), strict=True):
                squares = product(part, rows.mT).square()
                squared = squared + (product(squares, shares) * part_shares).sum(1)
        norms = norms.index_add(0, group.classes.flatten(), squared.flatten())
    return norms


def code_gradient(
    dictionary: Codes, energies: Float[Tensor, "k c"], overlap: Tensor, membership: Membership
) -> Float[Tensor, "k c"]:
    """Returns the gradient of M/2m in the codes Ã: (ΓᵀΓ)^⊙2 Ã Diag(n) − (ΓᵀZ)^⊙2 Π, by class, eq. (11).

    Args:
        dictionary: Γ and Ã.
        energies: (ΓᵀZ)^⊙2 Π, `dictionary.energies`.
        overlap: `dictionary.overlap()`.
        membership: Π.
    """
    return dictionary.respond(overlap, dictionary.codes * membership.counts[:, None]) - energies


def mismatch(
    features: Float[Tensor, "m d"],
    membership: Membership,
    dictionary: Codes,
    pull: float = 1.0,
    *,
    projections: list[Tensor] | None = None,
    energies: Float[Tensor, "k c"] | None = None,
    overlap: Tensor | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Returns M/2m = ½ Σ_j n_j ‖C_j − B_j‖²_F by eq. (9), and the size of the terms of which it is the difference.

    Times µ it is the residual (µ/2m) M; its gradient in a feature is 2 Σ_j π_ij (C_j − B_j) z_i (Alg. 1, line 12).
    For `pull` < 1, `_shortfall` is added.

    Args:
        features: Z, (m, d).
        membership: Π, among the dictionary's classes.
        dictionary: Γ and Ã.
        pull: p of `_shortfall`, in (0, 1].
        projections: `dictionary.project` of the features, if already known.
        energies: `dictionary.energies` of the projections, likewise.
        overlap: `dictionary.overlap()`, likewise.

    Returns:
        Two float64 scalars ≥ 0. The first is wrong by about the dtype's precision times the second. Differentiable.
    """
    if projections is None:
        projections = dictionary.project(features, membership)
    if energies is None:
        energies = dictionary.energies(projections, membership)
    if overlap is None:
        overlap = dictionary.overlap()
    codes, counts = dictionary.codes, membership.counts
    whole = (counts.double() * squared_moment_norms(features, membership).double()).sum()
    cross = (codes.double() * energies.double()).sum()
    own = (codes.double() * dictionary.respond(overlap, codes * counts[:, None]).double()).sum()
    short = _shortfall(projections, membership, dictionary, pull)
    terms = torch.stack([whole, cross, own, short])
    whole, cross, own, short = dictionary.total(terms, features, membership.rows_or_labels).unbind()
    return (0.5 * (whole + own) - cross).clamp_min(0) + short, (0.5 * (whole + own)).detach()


def _shortfall(projections: list[Tensor], membership: Membership, dictionary: Codes, pull: float) -> Float[Tensor, ""]:
    """Returns Σ_ij π_ij b_j [(1 − uᵖ)/p − (1 − u)] ≥ 0, u_ij = z_iᵀ B_j z_i / b_j + 1/d; p is `pull`, b_j max_l Ã_lj.

    In eq. (9) a sample is pulled into its class by b_j times the gradient of u, which vanishes for a feature orthogonal
    to the class: samples with wrong labels are left alone, but so are features that have yet to find their class. With
    this term the pull is b_j u^(p−1) times that gradient: the same at u = 1, and at p = ½ about equally strong however
    far away the feature is. The term is to eq. (9) what the generalised cross-entropy (Zhang and Sabuncu, 2018) is to 1
    minus a probability. Adding 1/d, the value for a random direction, bounds it.
    """
    total = dictionary.atoms.new_zeros((), dtype=torch.float64)
    if pull == 1:
        return total
    for own, largest, weights in dictionary.attractions(projections, membership):
        # In float64, since a small `pull` would underflow in float32.
        share = own.double() / one_for_zero(largest) + 1 / dictionary.atoms.shape[1]
        short = -torch.expm1(pull * share.log()) / pull - (1 - share)  # 1 − uᵖ would cancel for small p
        total = total + (weights.double() * largest.double() * short).sum()
    return total


def precise_mismatch(
    features: Float[Tensor, "m d"], membership: Membership, dictionary: Codes, pull: float = 1.0
) -> Float[Tensor, ""]:
    """Returns `mismatch`, computed in float64: relatively precise however small it is."""
    wide = dictionary.moved(dictionary.atoms.double(), dictionary.codes.double())
    return mismatch(features.double(), membership.to(torch.float64), wide, pull)[0]
