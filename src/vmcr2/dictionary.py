"""The dictionary (Γ, Ã): latching onto the classes' singular vectors (Algorithm 2) and the proximal step (Algorithm 1).

`latched_blocks` and `proximal_step` are the mathematics; `Dictionary` holds the buffers and `MomentStream` gathers
what latching needs from batches, in memory bounded by k d² however many samples there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vmcr2.errors import NumericalError
from vmcr2.membership import Membership
from vmcr2.variational import (
    ClassMoments,
    ascent_direction,
    atom_overlap,
    class_moments,
    lipschitz_atoms,
    lipschitz_codes,
)

_EIGH_ELEMENTS = 2**24  # entries of the d×d matrices decomposed at once


def latched_blocks(
    features: Float[Tensor, "m d"], membership: Membership, atoms_per_class: int
) -> tuple[Float[Tensor, "k d s"], Float[Tensor, "k s"]]:
    """Returns every class's top s eigenvectors and eigenvalues of C_j, largest first (Alg. 2).

    A class of rank below s gets orthonormal directions with eigenvalue 0 for the rest; an absent class gets zeros.

    Args:
        features: Z, (m, d), finite.
        membership: Π.
        atoms_per_class: s, at most d.
    """
    d, s = features.shape[1], atoms_per_class
    blocks = features.new_zeros(membership.num_classes, d, s)
    energies = features.new_zeros(membership.num_classes, s)
    for group in membership.groups(d):
        rows = group.take(features)
        n = rows.shape[1]
        if n < d:
            weighted = rows * (group.weights / group.counts[:, None]).sqrt()[..., None]
            # Rows of zeros let the SVD complete a class of fewer than s samples to s orthonormal directions.
            weighted = nn.functional.pad(weighted, (0, 0, 0, max(0, s - n)))
            _, values, vectors = _decomposed(torch.linalg.svd, weighted, full_matrices=False)
            blocks[group.classes] = vectors[:, :s].mT
            energies[group.classes] = values[:, :s].square()
        else:
            moments = rows.mT @ (rows * group.weights[..., None]) / group.counts[:, None, None]
            blocks[group.classes], energies[group.classes] = _top_eigen(moments, s)
    return blocks, energies


def _top_eigen(moments: Float[Tensor, "b d d"], s: int) -> tuple[Float[Tensor, "b d s"], Float[Tensor, "b s"]]:
    values, vectors = _decomposed(torch.linalg.eigh, moments)
    return vectors[..., -s:].flip(-1), values[..., -s:].flip(-1).clamp_min(0)


def _decomposed(decompose: Callable[..., Any], matrices: Tensor, **options: Any) -> Any:
    try:
        return decompose(matrices, **options)
    except torch.linalg.LinAlgError as error:
        raise NumericalError(f"latching failed: the classes' singular vectors could not be found ({error})") from error


class MomentStream:
    """Gathers features batch by batch until latching, in at most about k d² numbers.

    Rows are kept as they come while there are fewer than k d of them, since then they are the smaller side. Beyond
    that they are folded into the second moments C_j, and forgotten.
    """

    def __init__(self, num_classes: int, feature_dim: int) -> None:
        self.num_classes = num_classes
        self.feature_dim = feature_dim
        self.rows: list[tuple[Tensor, Membership]] = []
        self.kept = 0
        self.sums: Tensor | None = None
        self.counts: Tensor | None = None

    def add(self, features: Float[Tensor, "m d"], membership: Membership) -> None:
        """Adds a batch."""
        self.rows.append((features, membership))
        self.kept += features.shape[0]
        limit = self.num_classes * self.feature_dim
        if self.kept > (limit if self.sums is None else min(limit, 8192)):
            self._fold()

    def _gathered(self) -> tuple[Tensor, Membership]:
        features = torch.cat([z for z, _ in self.rows])
        counts = torch.stack([held.counts for _, held in self.rows]).sum(0)
        labels = [held.labels for _, held in self.rows if held.labels is not None]
        if len(labels) == len(self.rows):
            return features, Membership(torch.cat(labels), None, counts)
        return features, Membership(None, torch.cat([held.rows() for _, held in self.rows]), counts)

    def _fold(self) -> None:
        features, membership = self._gathered()
        if self.sums is None or self.counts is None:
            self.sums = features.new_zeros(self.num_classes, self.feature_dim, self.feature_dim)
            self.counts = torch.zeros_like(membership.counts)
        self.counts += membership.counts
        for group in membership.groups(self.feature_dim):
            rows = group.take(features)
            self.sums.index_add_(0, group.classes, rows.mT @ (rows * group.weights[..., None]))
        self.rows, self.kept = [], 0

    def blocks(self, atoms_per_class: int) -> tuple[Float[Tensor, "k d s"], Float[Tensor, "k s"], Float[Tensor, " k"]]:
        """Returns each class's top eigenvectors, eigenvalues (as `latched_blocks`) and the class counts."""
        if self.sums is None:
            features, membership = self._gathered()
            return *latched_blocks(features, membership, atoms_per_class), membership.counts
        if self.rows:
            self._fold()
        assert self.counts is not None
        at_once = max(1, _EIGH_ELEMENTS // self.feature_dim**2)
        scale = self.counts.clamp_min(torch.finfo(self.counts.dtype).tiny)
        parts = [
            _top_eigen(sums / n[:, None, None], atoms_per_class)
            for sums, n in zip(self.sums.split(at_once), scale.split(at_once), strict=True)
        ]
        return torch.cat([vectors for vectors, _ in parts]), torch.cat([values for _, values in parts]), self.counts


def proximal_step(
    features: Float[Tensor, "m d"],
    membership: Membership,
    atoms: Float[Tensor, "d q"],
    codes: Float[Tensor, "c k"],
    *,
    mu: float,
    eps_sq: float,
    step_atoms: float,
    step_codes: float,
    energy: float | None = None,
    moments: ClassMoments | None = None,
    num_classes: int | None = None,
) -> tuple[Float[Tensor, "d q"], Float[Tensor, "c k"]]:
    """Returns Γ and Ã after one proximal gradient ascent step on eq. (7) (Alg. 1, lines 6 to 10).

    Both gradients are taken at the old point, both steps scaled by the inverse Lipschitz bounds (eqs. 17 and 19); then
    the columns of Γ are scaled to norm 1 and the negative codes set to 0. What has no sample, or no energy, stays.

    Args:
        features: Z, (m, d), unit rows, without gradient.
        membership: Π.
        atoms: Γ, (d, q), unit columns.
        codes: Ã, (q, k) shared or (s, k) block, ≥ 0.
        mu: µ > 0.
        eps_sq: ε² > 0.
        step_atoms: ν_Γ, in units of 1/L_Γ.
        step_codes: ν_A, in units of 1/L_A, each class by its own.
        energy: what each class's codes are scaled to sum to at last; 1 is the trace of C_j for features of norm 1.
        moments: those of the batch, where they are known already.
        num_classes: k of the whole dictionary, where only the classes present were passed.
    """
    if moments is None:
        moments = class_moments(features, membership)
    overlap = atom_overlap(atoms, codes)
    grad_atoms, grad_codes = ascent_direction(features, membership, atoms, codes, mu, eps_sq, overlap)
    bound_atoms = lipschitz_atoms(moments.norms_sq, membership.counts, codes, mu)
    bound_codes = lipschitz_codes(overlap, membership.counts, mu, num_classes or membership.num_classes)
    moved = atoms + step_atoms * _divide(grad_atoms, bound_atoms)
    new_codes = (codes + step_codes * _divide(grad_codes, bound_codes)).clamp_min(0)
    if energy is not None:
        sums = new_codes.sum(0)
        new_codes = torch.where((sums > 0) & (membership.counts > 0), new_codes * (energy / sums), new_codes)
    return nn.functional.normalize(moved, dim=0), new_codes


def _divide(gradient: Tensor, bound: Tensor) -> Tensor:
    """Returns gradient / bound, and 0 where the bound is 0: nothing of that class or dictionary is in the batch."""
    return torch.where(bound > 0, gradient / torch.where(bound > 0, bound, 1), 0)


class Dictionary(nn.Module):
    """Γ and Ã as buffers: in `state_dict`, moved by `.to`, never changed in eval mode.

    Attributes:
        atoms: Γ, (d, q), unit columns; class j was latched into columns j s to (j+1) s − 1.
        codes: Ã ≥ 0, (q, k) in shared structure, (s, k) in block structure.
        latched: (k,), which classes have been latched.
    """

    atoms: Float[Tensor, "d q"]
    codes: Float[Tensor, "c k"]
    latched: Bool[Tensor, " k"]

    def __init__(self, num_classes: int, feature_dim: int, atoms_per_class: int, structure: str) -> None:
        super().__init__()
        self.atoms_per_class = atoms_per_class
        q = num_classes * atoms_per_class
        # Unit columns from the start, so that a class never seen cannot spoil Γ; they carry no energy.
        start = torch.zeros(q, feature_dim)
        start[torch.arange(q), torch.arange(q) % feature_dim] = 1
        self.register_buffer("atoms", start.T)  # each atom lies in one piece of memory
        self.register_buffer("codes", torch.zeros(atoms_per_class if structure == "block" else q, num_classes))
        self.register_buffer("latched", torch.zeros(num_classes, dtype=torch.bool))
        self._num_latched = 0

    def is_latched(self) -> Bool[Tensor, " k"]:
        """Returns which classes have been latched, or given codes by hand."""
        return self.latched | (self.codes > 0).any(0)

    def num_latched(self) -> int:
        """Returns how many classes are latched; once all are that is remembered: asking a GPU means to wait for it."""
        if self._num_latched < len(self.latched):
            self._num_latched = int(self.is_latched().sum())
        return self._num_latched

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}atoms"] = destination[f"{prefix}atoms"].contiguous()  # as safetensors takes it

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if f"{prefix}latched" not in state_dict and f"{prefix}codes" in state_dict:
            state_dict[f"{prefix}latched"] = (state_dict[f"{prefix}codes"] > 0).any(0)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._num_latched = 0
        self.num_latched()

    @torch.no_grad()
    def write(self, blocks: Float[Tensor, "k d s"], energies: Float[Tensor, "k s"], chosen: Bool[Tensor, " k"]) -> None:
        """Latches the chosen classes onto their blocks (Alg. 2); the others keep their atoms and codes."""
        k, _, s = blocks.shape
        self._blocks()[chosen] = blocks.mT[chosen].to(self.atoms.dtype)
        values = energies.T.to(self.codes.dtype)
        if self.codes.shape[0] == s and k > 1:
            self.codes[:, chosen] = values[:, chosen]
        else:
            places = torch.arange(k * s, device=values.device).view(k, s).T
            fresh = torch.zeros_like(self.codes).scatter_(0, places, values)
            self.codes[:, chosen] = fresh[:, chosen]
        self.latched |= chosen
        self.num_latched()  # asked now, so that no step has to

    def read(
        self, membership: Membership, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "d r"], Float[Tensor, "c p"], Membership, Int[Tensor, " p"] | None]:
        """Returns Γ, Ã and the membership as far as a batch concerns them, and which classes these are.

        In block structure a class without a sample takes no part, so only the others are read; in shared structure it
        is everything, and the last is None.
        """
        if self.codes.shape[0] == self.atoms.shape[1]:
            return self.atoms.to(dtype), self.codes.to(dtype), membership, None
        compact, classes = membership.present()
        blocks = self._blocks().index_select(0, classes)
        atoms = blocks.flatten(0, 1).to(dtype).T
        return atoms, self.codes.index_select(1, classes).to(dtype), compact, classes

    @torch.no_grad()
    def replace(
        self, atoms: Float[Tensor, "d r"], codes: Float[Tensor, "c p"], classes: Int[Tensor, " p"] | None
    ) -> None:
        """Writes back what `read` gave, after a step."""
        if classes is None:
            self.atoms.copy_(atoms)
            self.codes.copy_(codes)
            return
        blocks = atoms.T.reshape(len(classes), self.atoms_per_class, -1).to(self.atoms.dtype)
        self._blocks().index_copy_(0, classes, blocks)
        self.codes.index_copy_(1, classes, codes.to(self.codes.dtype))

    def _blocks(self) -> Float[Tensor, "k s d"]:
        return self.atoms.T.view(len(self.latched), self.atoms_per_class, -1)
