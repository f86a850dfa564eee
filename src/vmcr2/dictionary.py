"""The dictionary (Γ, Ã): its step (Algorithm 1, lines 6 to 10) and the buffers that hold it.

`ascending_step` is ours: it has no step size, and eq. (7) never falls. `paper_step` is the paper's: gradients over
Lipschitz bounds, times ν. Both are pure functions; `Dictionary` only holds the state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vmcr2.checks import UNIT_NORM_TOLERANCE
from vmcr2.distributed import Shards, full_tensor, part_of_another_rank
from vmcr2.linalg import one_for_zero, wide_dtype
from vmcr2.membership import Membership
from vmcr2.mismatch import BlockCodes, Codes, SharedCodes, code_gradient, squared_moment_norms
from vmcr2.variational import (
    atom_energies,
    compression_code_gradient,
    coverages,
    expansion_atom_gradient,
    expansion_code_gradient,
    exposures,
    lipschitz_atoms,
    lipschitz_codes,
    solved_atoms,
)

Structure = Literal["shared", "block"]
_BLOCK_CLASSES = 200

# How far a step moves the codes towards the maximum of its bound. Stopping halfway gives the atoms time to turn away
# from each other before competing codes are pressed to zero. With soft membership this ends at a higher eq. (7);
# otherwise at about the same, at small ρ sometimes at a lower one.
_CODE_SHARE = 0.5
_LARGEST_MOMENT = 1.05  # ‖C_j‖ of unit rows, allowing for the tolerance of their norms
_NEGLIGIBLE = 1e-6  # times the shift: codes that add this little to R^v and R_c^v become 0
_COPIED = 2**22  # entries of the atoms written at once
_NEWTON_STEPS = 12  # for the multiplier that keeps a class's energy; it converges quadratically, from one side


def default_structure(num_classes: int) -> Structure:
    """Returns the structure that estimators, and recipes for one's own data, take for k ≥ 1 classes."""
    return "shared" if num_classes < _BLOCK_CLASSES else "block"


class Ascent(NamedTuple):
    """The result of a step, with what has been computed there.

    Attributes:
        dictionary: Γ and Ã after the step.
        projections: `Codes.project` of the features, differentiable in them.
        energies: `Codes.energies` of the projections, likewise.
        overlap: ΓᵀΓ as `Codes.overlap` returns it.
        confined: whether all codes on atoms of other classes are 0 and no class would gain by raising one.
    """

    dictionary: Codes
    projections: list[Tensor]
    energies: Float[Tensor, "k c"]
    overlap: Tensor
    confined: Bool[Tensor, ""]


def ascending_step(
    features: Float[Tensor, "m d"],
    membership: Membership,
    dictionary: Codes,
    *,
    mu: float,
    eps_sq: float,
    energy: float | None = None,
    others: Float[Tensor, "r d"] | None = None,
) -> Ascent:
    """Returns Γ and Ã after a step that never lowers eq. (7), whatever µ, the features and the dictionary are.

    First the atoms move, then, at the moved atoms, the codes: each towards the maximum of a lower bound of eq. (7) that
    touches it at the present value (minorise and maximise). Classes without a sample, and codes that are 0 and would
    fall, stay as they are (but for `energy`). A class whose soft membership adds up to less than one sample moves in
    proportion: label smoothing gives every class a share of every batch, which says nothing about those without a
    sample in it.

    Args:
        features: Z, (m, d), rows of norm 1. The step itself has no gradient.
        membership: Π, among the dictionary's classes.
        dictionary: Γ and Ã.
        mu: µ > 0.
        eps_sq: ε² > 0.
        energy: what each class's codes must sum to; None leaves the sum free. With it, eq. (7) does not fall among
            codes that have this sum; a class whose codes do not is scaled first.
        others: atoms of classes without a sample that `dictionary` leaves out, for `Ascent.confined`.
    """
    detached = membership.detach()
    with torch.no_grad():
        dictionary = scaled_to(dictionary, energy)
        dictionary = dictionary.moved(atoms=_ascended_atoms(features.detach(), detached, dictionary, mu, eps_sq))
        overlap = dictionary.overlap()
    projections = dictionary.project(features, membership)
    energies = dictionary.energies(projections, membership)
    with torch.no_grad():
        solved = solved_atoms(dictionary, detached.class_weights, eps_sq)
        bound = _code_bound(detached, dictionary, solved, energies.detach(), overlap, mu, eps_sq)
        confined = _confined(features.detach(), detached, dictionary, solved, others, mu, eps_sq)
        share = _CODE_SHARE * detached.counts.clamp_max(1)[:, None]
        codes = _ascended_codes(dictionary.codes, bound, energy, share)
    return Ascent(dictionary.moved(codes=codes), projections, energies, overlap, confined)


def _confined(
    features: Float[Tensor, "m d"],
    membership: Membership,
    dictionary: Codes,
    solved: Float[Tensor, "q d"],
    others: Float[Tensor, "r d"] | None,
    mu: float,
    eps_sq: float,
) -> Bool[Tensor, ""]:
    """Whether the gradient of eq. (7) in a code of 0 on an atom of another class is nowhere above 0.

    It is γ_j ½β (Γ_lᵀ S⁻¹ Γ_l − 1) + µ n_j Γ_lᵀ (C_j − B_j) Γ_l, so it suffices that µ m Γ_lᵀ C_j Γ_l is at most
    ½β (1 − Γ_lᵀ S⁻¹ Γ_l). For atoms of classes with a sample, ‖C_j‖ stands for the former. An atom of another class may
    be nearly orthogonal to all that S holds, and then to the features as well: of these the energies are computed.
    """
    half_beta, weight = features.shape[1] / eps_sq / 2, mu * membership.num_samples
    # With a zero added, since a rank of a sharded dictionary may hold no atom of the batch's classes.
    exposed = torch.cat([exposures(dictionary, solved), solved.new_zeros(1)]).max()
    confined = weight * _LARGEST_MOMENT <= half_beta * (1 - exposed)
    if others is None:
        return confined
    energies = membership.collect((features @ others.mT).square()) / one_for_zero(membership.counts)[:, None]
    covered = coverages(dictionary, solved, others, membership.class_weights, eps_sq)
    return confined & (weight * energies.amax(0) <= half_beta * covered).all()


def scaled_to(dictionary: Codes, energy: float | None) -> Codes:
    """Returns the dictionary with every class's codes scaled to sum to an energy; all-zero codes stay."""
    if energy is None:
        return dictionary
    sums = dictionary.codes.sum(1, keepdim=True)
    return dictionary.moved(codes=torch.where(sums > 0, dictionary.codes * (energy / one_for_zero(sums)), 0))


def _ascended_atoms(
    features: Float[Tensor, "m d"],
    membership: Membership,
    dictionary: Codes,
    mu: float,
    eps_sq: float,
) -> Float[Tensor, "q d"]:
    """Returns Γ_l + ∇_l/L_l, scaled to norm 1, with L_l = β/8 (Ã γ)_l + 6µ Σ_j n_j Ã_lj ‖Ã_j‖₁.

    −L_l bounds the objective's curvature from below on the whole unit ball, atom by atom, so the objective plus
    Σ_l L_l/2 ‖Γ_l‖² is convex and its tangent a lower bound, which this maximises over unit atoms. Convex terms
    contribute nothing to L: the attraction µ ⟨C_j, B_j⟩, and R^v except for −β/8 (Ã γ)_l. The −1/8 is the minimum of
    (1 − xy)/((1 + x²)(1 + y²)), the second derivative of ½ logdet(I + X Xᵀ) between singular values x and y of X. The
    quartic −µ/2 n_j ‖B_j‖² contributes at least −6 Ã_lj ‖Ã_j‖₁, reached where all its atoms coincide.
    """
    weights = membership.class_weights
    beta = features.shape[1] / eps_sq
    codes = dictionary.codes
    spent = codes * membership.counts[:, None] * codes.sum(1, keepdim=True)
    used = dictionary.by_atom(spent)
    curvature = beta / 8 * atom_energies(dictionary, weights) + 6 * mu * used
    # A curvature so small that its inverse overflows means an atom without energy.
    length = torch.where(curvature > torch.finfo(curvature.dtype).tiny, 1 / one_for_zero(curvature), 0)[:, None]
    if membership.labels is None:  # a shorter step maximises a lower bound too, that of a larger L_l
        damped = dictionary.by_atom(spent * membership.counts.clamp_max(1)[:, None])
        length = length * (damped / one_for_zero(used))[:, None]
    projections = dictionary.project(features, membership)
    attraction = dictionary.atom_gradient(features, projections, dictionary.overlap(), membership)
    gradient = expansion_atom_gradient(dictionary, solved_atoms(dictionary, weights, eps_sq), weights, eps_sq)
    moved = torch.addcmul(dictionary.atoms, gradient.sub_(attraction, alpha=mu), length)
    return torch.where(length > 0, nn.functional.normalize(moved, dim=1), dictionary.atoms)


class _CodeBound(NamedTuple):
    """A lower bound of eq. (7) in the codes that touches it at their present values: a sum over single codes.

    For a code a, now at a₀, and u = a + δ it is

        w log(u/u₀) + b (a − a₀) − h/2 (a − a₀)²   with   w = u₀ ∂R^v/∂a,   b = −∂R_c^v/∂a − ∂(µM/2m)/∂a

    −R_c^v is convex, so its tangent is a bound. R^v is the logarithm of a sum of positive semi-definite terms, one per
    code; by Jensen's inequality for the operator-concave logarithm it has the bound w log(u/u₀), if the terms of all
    shifts δ add up to at most I. This holds for δ_j = 1/(β s_j), s_j being the number of class j's codes that move. M
    is quadratic with the non-negative matrix H = (ΓᵀΓ)^⊙2, so h = µ n_j (H v)_l / v_l bounds its curvature for any
    positive v: here the codes, lifted by their mean so that small ones are not held back.

    Attributes:
        moves: the codes that the bound covers: those of classes with a sample that are above 0 or rising.
        rise: the slope of eq. (7) at the codes.
        curvature: h.
        shift: δ.
        slope: b + h u₀.
        expansion: h w.
    """

    moves: Bool[Tensor, "k c"]
    rise: Float[Tensor, "k c"]
    curvature: Float[Tensor, "k c"]
    shift: Float[Tensor, "k 1"]
    slope: Float[Tensor, "k c"]
    expansion: Float[Tensor, "k c"]

    def maximum(self, multiplier: Float[Tensor, "k 1"] | float) -> tuple[Float[Tensor, "k c"], Float[Tensor, "k c"]]:
        """Returns the codes that maximise the bound less `multiplier` times each, and minus their derivative in it.

        u is the larger root of h u² − (slope − multiplier) u − w, by the formula without cancellation.
        """
        tilted = self.slope - multiplier
        root = (tilted.square() + 4 * self.expansion).sqrt()
        upper = (tilted + root) / (2 * self.curvature)
        u = torch.where(tilted >= 0, upper, 2 * self.expansion / self.curvature / (root - tilted))
        codes = torch.where(self.moves, (u - self.shift).clamp_min(0), 0)
        return codes, torch.where(self.moves & (u > self.shift), u / root, 0)


def _code_bound(
    membership: Membership,
    dictionary: Codes,
    solved: Float[Tensor, "q d"],
    energies: Float[Tensor, "k c"],
    overlap: Tensor,
    mu: float,
    eps_sq: float,
) -> _CodeBound:
    """Returns the lower bound of eq. (7) in the codes."""
    codes, counts = dictionary.codes, membership.counts[:, None]
    beta = dictionary.atoms.shape[1] / eps_sq
    weights = membership.class_weights
    grows = expansion_code_gradient(dictionary, exposures(dictionary, solved), weights, eps_sq)
    linear = -mu * code_gradient(dictionary, energies, overlap, membership)
    linear = linear - compression_code_gradient(dictionary, weights, eps_sq)
    moves = (codes > 0) | (grows + linear > 0)
    number = moves.sum(1, keepdim=True).clamp_min(1)
    sums = codes.sum(1, keepdim=True)
    lifted = torch.where(moves, codes + torch.where(sums > 0, sums / number, 1), 0)
    curvature = mu * counts * dictionary.respond(overlap, lifted) / one_for_zero(lifted)
    moves = moves & (counts > 0) & (curvature > 0)
    curvature = torch.where(moves, curvature, 1)
    shift = 1 / (beta * number)
    slope, expansion = linear + curvature * (codes + shift), curvature * grows * (codes + shift)
    return _CodeBound(moves, grows + linear, curvature, shift, slope, expansion)


def _ascended_codes(
    codes: Float[Tensor, "k c"], bound: _CodeBound, energy: float | None, share: Float[Tensor, "k 1"]
) -> Float[Tensor, "k c"]:
    """Returns Ã after a share of the way to the maximum of its bound, among codes that sum to `energy` in each class.

    The bound is concave, so every part of the way rises.
    """
    moves = bound.moves
    if energy is None:
        best, _ = bound.maximum(0.0)
    else:
        # The sum of the maxima is convex and falling in the multiplier: Newton's method starts where it is too large.
        multiplier = torch.where(moves, bound.rise, torch.inf).amin(1, keepdim=True)
        multiplier = torch.where(multiplier.isfinite(), multiplier, 0)
        for _ in range(_NEWTON_STEPS):
            best, slopes = bound.maximum(multiplier)
            multiplier = multiplier + (best.sum(1, keepdim=True) - energy) / one_for_zero(slopes.sum(1, keepdim=True))
        best, _ = bound.maximum(multiplier)
        best = best * (energy / one_for_zero(best.sum(1, keepdim=True)))
        moves = moves & (codes.sum(1, keepdim=True) > 0)
    stepped = codes + share * (best - codes)
    # So that a code falling to 0 gets there, rather than halving until its square underflows. Where ε² is large, or the
    # energy small, all codes add little, and a class's total is the measure.
    negligible = _NEGLIGIBLE * bound.shift.clamp_max(1.0 if energy is None else energy)
    stepped = torch.where(stepped <= negligible, 0, stepped)  # NaN stays, for the caller to see
    return torch.where(moves, stepped, codes)


def paper_step(
    features: Float[Tensor, "m d"],
    membership: Membership,
    dictionary: Codes,
    *,
    mu: float,
    eps_sq: float,
    step_atoms: float,
    step_codes: float,
    at_moved_atoms: bool,
    energy: float | None = None,
    num_classes: int | None = None,
) -> Codes:
    """Returns Γ and Ã after one proximal gradient step on eq. (7) with the paper's bounds (Alg. 1, lines 6 to 10).

    The bounds cover the mismatch alone, so where the rates outweigh it (ρ = µ m ε²/d well below 1) eq. (7) may fall.
    As in `ascending_step`, the codes of a class with less than one sample move in proportion.

    Args:
        features: Z, (m, d), rows of norm 1, without gradient.
        membership: Π, among the dictionary's classes.
        dictionary: Γ and Ã.
        mu: µ > 0.
        eps_sq: ε² > 0.
        step_atoms: ν_Γ, in units of 1/L_Γ (eq. 17).
        step_codes: ν_A, in units of each class's 1/L_A (eq. 19).
        at_moved_atoms: take the codes' gradient at the atoms that line 7 has moved, not yet scaled to norm 1, as line 8
            is written; else take both gradients at the old dictionary.
        energy: the sum that each class's codes are finally scaled to; None leaves it free, as the paper does.
        num_classes: k of the whole dictionary, if only the classes present are passed.
    """
    weights, counts = membership.class_weights, membership.counts
    overlap = dictionary.overlap()
    projections = dictionary.project(features, membership)
    moments = squared_moment_norms(features, membership)
    bound_atoms = dictionary.total(lipschitz_atoms(moments, counts, dictionary.codes, mu))  # line 6
    overlaps = dictionary.overlap_norms(overlap, num_classes or membership.num_classes)
    bound_codes = lipschitz_codes(overlaps, counts, mu)[:, None]
    solved = solved_atoms(dictionary, weights, eps_sq)
    gradient = expansion_atom_gradient(dictionary, solved, weights, eps_sq)
    gradient = gradient - mu * dictionary.atom_gradient(features, projections, overlap, membership)
    moved = dictionary.moved(atoms=dictionary.atoms + step_atoms * _over(gradient, bound_atoms))  # line 7
    if at_moved_atoms:
        overlap, projections = moved.overlap(), moved.project(features, membership)
        solved = solved_atoms(moved, weights, eps_sq)
    here = moved if at_moved_atoms else dictionary
    energies = here.energies(projections, membership)
    rise = expansion_code_gradient(here, exposures(here, solved), weights, eps_sq)
    rise = rise - compression_code_gradient(here, weights, eps_sq)
    rise = rise - mu * code_gradient(here, energies, overlap, membership)
    share = step_codes * counts.clamp_max(1)[:, None]
    codes = (dictionary.codes + share * _over(rise, bound_codes)).clamp_min(0)  # lines 8 and 9
    # A class whose codes have all fallen to 0 could not be scaled back to its energy.
    moves = (counts > 0) if energy is None else (counts > 0) & (codes.sum(1) > 0)
    codes = torch.where(moves[:, None], codes, dictionary.codes)
    used = dictionary.by_atom(dictionary.codes * counts[:, None])[:, None] > 0
    atoms = torch.where(used, nn.functional.normalize(moved.atoms, dim=1), dictionary.atoms)  # line 10
    return scaled_to(dictionary.moved(atoms, codes), energy)


def _over(gradient: Tensor, bound: Tensor) -> Tensor:
    """Returns gradient / bound, or 0 where the bound is 0: the batch has nothing of that class or dictionary."""
    return torch.where(bound > 0, gradient / one_for_zero(bound), 0)


def _in_columns(by_class: Tensor) -> Tensor:
    """Returns a state that is indexed by class in the layout of the buffers."""
    return by_class if by_class.ndim == 1 else by_class.flatten(0, -2).T


def _wrong_values(state: dict[str, Tensor], by_class: bool) -> Iterator[str]:
    """Yields what no dictionary can hold, such as a mean of dictionaries, whose atoms cancel where signs differ.

    Only of plain tensors, which each rank has whole, so that all ranks refuse the same.
    """
    held = {name: value for name, value in state.items() if type(value) is Tensor and not value.is_meta}
    atoms, codes = held.get("atoms"), held.get("codes")
    if atoms is not None and atoms.is_floating_point():
        norms = torch.linalg.vector_norm(atoms, dim=-1 if by_class else 0, dtype=wide_dtype(atoms))
        far = ~((norms - 1).abs() < UNIT_NORM_TOLERANCE)  # so that NaN is far
        if far.any():
            yield f"atoms must be of norm 1, got {int(far.sum())} of other norms, such as {norms[far][0].item():.3g}"
    if codes is not None and not bool(((codes >= 0) & codes.isfinite()).all()):
        yield "codes must be >= 0 and finite"


class Dictionary(nn.Module):
    """Γ and Ã as buffers: in `state_dict`, moved by `.to`, never changed in eval mode.

    If the dictionary is sharded, a rank has the buffers of its own classes only (k below is their number), and
    `state_dict` has them by class as DTensors `Shard(0)`: atoms (k, s, d), codes (k, s), latched (k,), with all k
    classes. Otherwise `state_dict` returns a copy, contiguous as safetensors requires: writing to it changes nothing
    here.

    Attributes:
        atoms: Γ, (d, q), unit columns; class j was latched into columns j s to (j+1) s − 1.
        codes: Ã ≥ 0, (q, k) in shared structure, (s, k) in block structure.
        latched: (k,), which classes have been latched.
        steps_taken: how many steps have been taken; `state_dict` has it as `steps`, a 0-d tensor.
        shards: which rank holds which classes, or None if each holds all.
    """

    atoms: Float[Tensor, "d q"]
    codes: Float[Tensor, "c k"]
    latched: Bool[Tensor, " k"]
    first_class: Int[Tensor, " 1"] | None

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        atoms_per_class: int,
        structure: Structure,
        shards: Shards | None = None,
    ) -> None:
        super().__init__()
        self.shards = shards
        if shards is not None:
            num_classes = len(shards.own)
        self.atoms_per_class = atoms_per_class
        self.structure: Structure = structure
        q = num_classes * atoms_per_class
        with torch.inference_mode(False):  # no later step could change an inference tensor
            self.register_buffer("atoms", torch.empty(q, feature_dim).T)  # each atom is contiguous in memory
            codes = torch.empty(num_classes, atoms_per_class if structure == "block" else q)
            self.register_buffer("codes", codes.T)  # each class's codes likewise
            self.register_buffer("latched", torch.empty(num_classes, dtype=torch.bool))
            # Shows when something, such as DistributedDataParallel, overwrites all ranks' buffers with the first's.
            first = None if shards is None else torch.empty(1, dtype=torch.long)
            self.register_buffer("first_class", first, persistent=False)
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Resets all: nothing latched, no energy. A dictionary made on `meta` needs this after `to_empty`."""
        q, d = self.atoms.T.shape
        # Unit columns from the start, so that a class that is never seen cannot spoil Γ.
        self.atoms.zero_()
        numbers = torch.arange(q, device=self.atoms.device)
        self.atoms.T[numbers, numbers % d] = 1
        self.codes.zero_()
        self.latched.zero_()
        if self.shards is not None and self.first_class is not None:
            self.first_class.fill_(self.shards.own.start)
        self.steps_taken = 0
        self._known: tuple[Tensor, Tensor, int] | None = None
        self.changed = True  # not yet known to be the same on all ranks

    @property
    def steps(self) -> Int[Tensor, ""]:
        """`steps_taken` as a tensor: torch's functions on states read, and may set, an attribute for each entry."""
        return torch.tensor(self.steps_taken, device="cpu")

    @steps.setter
    def steps(self, value: Int[Tensor, ""]) -> None:
        self.steps_taken = int(value)

    def known(self) -> Bool[Tensor, " k"]:
        """Returns which classes have been latched, or given codes by hand, on the CPU; remembered once all have."""
        # Only for these buffers, which `torch.func.functional_call` swaps, and until they are changed by hand.
        latched = self.latched
        version = -1 if latched.is_inference() else latched._version
        flags, of, when = (None, None, -1) if self._known is None else self._known
        if flags is None or of is not latched or when != version or not bool(flags.all()):
            flags = (latched | (self.codes > 0).any(0)).cpu()
            self._known = (flags, latched, version)
        return flags

    def _by_class(self) -> dict[str, Tensor]:
        """Returns the buffers of block structure by class: views, as long as they keep their original layout."""
        k, s = len(self.latched), self.atoms_per_class
        return {
            "atoms": self.atoms.T.unflatten(0, (k, s)).contiguous(),
            "codes": self.codes.T.contiguous(),
            "latched": self.latched,
        }

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.shards is None:
            for name in ("atoms", "codes", "latched"):  # all copied, or a saved state would mix two moments
                destination[f"{prefix}{name}"] = destination[f"{prefix}{name}"].clone(
                    memory_format=torch.contiguous_format
                )
        else:
            for name, own in self._by_class().items():
                destination[f"{prefix}{name}"] = self.shards.distributed_tensor(own)
        destination[f"{prefix}steps"] = self.steps

    def full_state(self) -> dict[str, Tensor]:
        """Returns the `state_dict` that a sharded dictionary would have unsharded; a collective of its ranks."""
        assert self.shards is not None
        state = {name: self.shards.gathered(own) for name, own in self._by_class().items()}
        state["atoms"] = state["atoms"].flatten(0, 1).T.contiguous()
        state["codes"] = state["codes"].T.contiguous()
        return {**state, "steps": self.steps}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        kept = ("atoms", "codes", "latched")
        loaded = {name: state_dict[f"{prefix}{name}"] for name in kept if f"{prefix}{name}" in state_dict}
        for name, value in loaded.items():
            if whose := part_of_another_rank(value):
                error_msgs.append(
                    f"{prefix}{name} is only {whose}: save with torch.distributed.checkpoint, or full_state_dict()"
                )
                return
        by_class = "atoms" in loaded and loaded["atoms"].ndim == 3
        steps = int(state_dict.pop(f"{prefix}steps", self.steps_taken))
        parts = {name: self._own_part(name, value, by_class) for name, value in loaded.items()}
        wrong = []
        for name, value in loaded.items():
            part, own = parts[name], getattr(self, name)
            if part is None or part.shape != own.shape:
                of = tuple(own.shape) if self.shards is None else f"a share of {self.shards.num_classes} classes"
                got = f"a state of {tuple(value.shape)}, of other classes, atoms, dimension or structure"
                wrong.append(f"size mismatch for {prefix}{name}: it must be {of}, got {got}")
        if steps < 0:
            wrong.append(f"{prefix}steps must be >= 0, got {steps}")
        wrong = wrong or [f"{prefix}{text}" for text in _wrong_values(loaded, by_class)]
        absent = [f"{prefix}{name}" for name in ("atoms", "codes") if name not in loaded]
        if wrong or (strict and absent):  # load nothing: some buffers without the others make no dictionary
            error_msgs += wrong
            missing_keys += absent
            return
        state_dict |= {f"{prefix}{name}": part for name, part in parts.items()}
        if "latched" not in loaded and "codes" in loaded:
            state_dict[f"{prefix}latched"] = (state_dict[f"{prefix}codes"] > 0).any(0)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not absent:  # otherwise these buffers are not the ones that took the steps
            self.steps_taken = steps
        self._known, self.changed = None, True

    def _own_part(self, name: str, value: Tensor, by_class: bool) -> Tensor | None:
        """Returns the part of a state that goes into this dictionary's buffer, whether or not either is sharded.

        A sharded dictionary takes nothing from a state with another number of classes, which may equal a rank's share.
        """
        if self.shards is None:
            value = full_tensor(value)
            return _in_columns(value) if by_class else value
        own, k = self.shards.own, self.shards.num_classes
        if by_class and len(value) == k:
            local = value.to_local() if hasattr(value, "to_local") else value  # pyrefly: ignore[not-callable]
            if local is value or len(local) != len(own) or not value.placements[0].is_shard(0):  # pyrefly: ignore
                local = full_tensor(value)[own.start : own.stop]
            return _in_columns(local)
        value = full_tensor(value)
        s = self.atoms_per_class if name == "atoms" else 1
        fits = not by_class and value.shape[-1] == k * s
        return value[..., own.start * s : own.stop * s] if fits else None

    @torch.no_grad()
    def latch(
        self,
        blocks: Float[Tensor, "p d s"],
        energies: Float[Tensor, "p s"],
        chosen: Bool[Tensor, " p"],
        classes: Int[Tensor, " p"] | None = None,
    ) -> None:
        """Sets the chosen classes' atoms and codes (Alg. 2); the others keep theirs.

        Args:
            blocks: orthonormal directions of some classes.
            energies: their energies.
            chosen: which of those classes to set.
            classes: which classes they are; None for all.
        """
        k, (_, d, s) = len(self.latched), blocks.shape
        atoms = self.atoms.T.unflatten(0, (k, s))
        for part in chosen.nonzero()[:, 0].split(max(1, _COPIED // (s * d))):
            atoms[part if classes is None else classes[part]] = blocks[part].mT.to(atoms.dtype)
        latched = chosen if classes is None else classes[chosen]
        values = energies[chosen].to(self.codes.dtype)
        if self.structure == "shared":
            places = torch.arange(k * s, device=blocks.device).view(k, s)[latched]
            values = values.new_zeros(len(values), k * s).scatter_(1, places, values)
        self.codes.T[latched] = values
        self.latched[latched] = True
        self._known, self.changed = None, True

    @contextmanager
    def restored_on_error(self, chosen: Bool[Tensor, " k"]) -> Iterator[None]:
        """Restores the chosen classes (`chosen` is on the CPU) if the block raises; copies only those classes."""
        if not bool(chosen.any()):  # as in nearly every step
            yield
            return
        classes = chosen.nonzero()[:, 0].to(self.atoms.device)
        views = (self.atoms.T.unflatten(0, (len(self.latched), self.atoms_per_class)), self.codes.T, self.latched)
        before = [view[classes] for view in views]
        try:
            yield
        except Exception:
            with torch.no_grad():
                for view, values in zip(views, before, strict=True):
                    view[classes] = values
            self._known, self.changed = None, True
            raise

    def confined(self) -> Bool[Tensor, ""]:
        """Returns whether every class of a shared dictionary uses only its own atoms, as after latching."""
        return (self.codes > 0).sum() == (self._own_codes() > 0).sum()

    def part_for(
        self, membership: Membership, dtype: torch.dtype, *, confined: bool = False
    ) -> tuple[Membership, Codes]:
        """Returns a batch's membership among the classes it involves, and their part of the dictionary, in a dtype.

        In block structure, or for a shared dictionary that is `confined`, these are the classes that have a sample;
        otherwise all classes.
        """
        if self.structure == "shared" and not confined:
            return membership, SharedCodes(self.atoms.T.to(dtype), self.codes.T.to(dtype))
        codes, atoms = self.codes.T if self.structure == "block" else self._own_codes(), self.atoms.T
        if len(membership.present) < membership.num_classes:
            atoms, codes = atoms.index_select(0, self._places(membership)), codes.index_select(0, membership.present)
        return membership.among_present(), BlockCodes(atoms.to(dtype), codes.to(dtype), self.shards)

    def absent_atoms(self, membership: Membership, dtype: torch.dtype) -> Float[Tensor, "r d"] | None:
        """Returns the atoms, as rows, of the classes without a sample in a batch; None if all classes have one."""
        if len(membership.present) == membership.num_classes:
            return None
        absent = torch.ones(membership.num_classes, dtype=torch.bool, device=self.atoms.device)
        absent[membership.present] = False
        return self.atoms.T.unflatten(0, (-1, self.atoms_per_class))[absent].flatten(0, 1).to(dtype)

    def whole(self) -> BlockCodes:
        """Returns all that this rank holds of a dictionary in block structure, without a copy."""
        return BlockCodes(self.atoms.T, self.codes.T, self.shards)

    @torch.no_grad()
    def replace(self, dictionary: Codes, membership: Membership) -> None:
        """Writes back, after a step, the part that `part_for` returned for a batch."""
        if isinstance(dictionary, SharedCodes):
            self.atoms.copy_(dictionary.atoms.T)
            self.codes.copy_(dictionary.codes.T)
            return
        codes = self.codes.T if self.structure == "block" else self._own_codes()
        self.atoms.T.index_copy_(0, self._places(membership), dictionary.atoms.to(self.atoms.dtype))
        codes.index_copy_(0, membership.present, dictionary.codes.to(self.codes.dtype))

    def _places(self, membership: Membership) -> Int[Tensor, " p_s"]:
        """Returns the indices of the atoms of the classes that have a sample."""
        steps = torch.arange(self.atoms_per_class, device=self.atoms.device)
        return (membership.present[:, None] * self.atoms_per_class + steps).flatten()

    def _own_codes(self) -> Float[Tensor, "k s"]:
        """Returns a view of a shared dictionary's codes at each class's own atoms."""
        k, s = len(self.latched), self.atoms_per_class
        return self.codes.T.unflatten(1, (k, s)).diagonal(dim1=0, dim2=1).T
