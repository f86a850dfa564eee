"""The nearest-subspace classifier of eq. (8), as functions on tensors; batched, so cheap enough for every epoch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from vmcr2.checks import check_count, feature_conditions, read_conditions
from vmcr2.latching import latched_blocks
from vmcr2.linalg import one_for_zero
from vmcr2.membership import as_membership
from vmcr2.mismatch import BlockCodes

_BASES = 2**21  # entries of subspaces of the dictionary held at once
_ENERGIES = 2**23  # energies, by sample and subspace, held at once
_FOLDS = 5
_CACHED = 2**20  # projections found at once: few enough to be squared and summed while they are in the cache
_SMALLEST_NORM = 1e-140  # of features whose squares are exact in float64; 1 over it is the largest


def default_components(feature_dim: int, num_classes: int) -> int:
    """Returns ⌊d/k⌋, the paper's number of components, or 1 if there are more classes than dimensions."""
    return max(1, feature_dim // num_classes)


def check_components(n_components: int, d: int, stacklevel: int) -> int:
    """Returns the number of components; warns if subspaces of as many cannot tell classes apart by eq. (8).

    Args:
        n_components: r.
        d: the number of features.
        stacklevel: the call that the warning points at: 1 is this function's, 2 its caller's, and so on.

    Raises:
        InputError: r is not from 1 to d (a ValueError).
    """
    n_components = check_count("n_components", n_components, at_most=d, limit="the number of features")
    if n_components == d > 1:
        warnings.warn(
            f"n_components = {d} is the number of features: the subspace of a class of {d} samples or more is the "
            "whole space, so that classes tie",
            stacklevel=stacklevel + 1,
        )
    return n_components


def warn_of_small_classes(sizes: Int[Tensor, " k"], n_components: int, cure: str, stacklevel: int) -> None:
    """Warns if a class has far fewer samples than its subspace should have dimensions, and another has more.

    By eq. (8) the larger subspaces then claim new samples of the small classes.

    Args:
        sizes: n_j of the classes, 0 for an absent one.
        n_components: r.
        cure: what to do, for the message.
        stacklevel: as for `check_components`.
    """
    sizes = sizes[sizes > 0]
    fewest = int(sizes.min())
    if 4 * fewest < 3 * min(n_components, int(sizes.max())):  # with nearly as many, a class loses little
        warnings.warn(
            f"{int((sizes < n_components).sum())} of {len(sizes)} classes have fewer samples than the {n_components} "
            f"dimensions of a subspace, the smallest only {fewest}: larger classes may claim their new samples; {cure}",
            stacklevel=stacklevel + 1,
        )


@torch.no_grad()
def class_subspaces(
    features: Float[Tensor, "m d"],
    membership: Int[Tensor, " m"] | Shaped[Tensor, "m k"],
    num_classes: int,
    n_components: int | None = None,
) -> Float[Tensor, "k d r"]:
    """Returns an orthonormal basis V^(j) of each class's top principal directions (uncentred, as in eq. 8).

    For a class of rank below r the remaining columns are zeros, so that only directions its samples actually span
    count; for an absent class all are.

    Args:
        features: Z of the training set, (m, d), finite.
        membership: labels (m,) in [0, num_classes), or rows (m, num_classes) that sum to 1.
        num_classes: k.
        n_components: r, from 1 to d; None means ⌊d/k⌋, at least 1.

    Raises:
        InputError: a wrong argument (a ValueError).
    """
    checked = as_membership(features, membership, num_classes)
    d = features.shape[1]
    if n_components is None:
        n_components = default_components(d, num_classes)
    n_components = check_count("n_components", n_components, at_most=d, limit="the number of features")
    # In float64, and scaled so that squares neither overflow nor vanish: a direction may be small and still count.
    widened = features.double()
    bases, energies = latched_blocks(
        widened / widened.abs().max().clamp_min(1e-300), checked.to(torch.float64), n_components
    )
    return spanned(bases, energies)


def spanned(bases: Float[Tensor, "k d r"], energies: Float[Tensor, "k r"]) -> Float[Tensor, "k d r"]:
    """Returns the bases with zeros for directions that a class does not span: those without energy (float64)."""
    # Eigenvalues of a Gram matrix are known to about eps relative to the largest.
    floor = energies.amax(1, keepdim=True) * torch.finfo(torch.float64).eps * bases.shape[1]
    return bases * (energies > floor)[:, None, :]


@torch.no_grad()
def subspace_energies(features: Float[Tensor, "m d"], bases: Float[Tensor, "k d r"]) -> Float[Tensor, "m k"]:
    """Returns ‖V^(j)ᵀ z‖² for every sample and class; the residual of eq. (8) is ‖z‖² minus this."""
    k, d, r = bases.shape
    flat = bases.permute(1, 0, 2).reshape(d, k * r)
    at_once = max(64, _CACHED // (k * r))
    parts = [(rows @ flat).square().view(-1, k, r).sum(2) for rows in features.to(bases.dtype).split(at_once)]
    return torch.cat(parts)


def places_in_class(labels: Int[Tensor, " m"]) -> Int[Tensor, " m"]:
    """Returns how many samples of its class come before each sample."""
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels)
    starts = counts.cumsum(0) - counts
    places = torch.empty_like(labels)
    places[order] = torch.arange(len(labels), device=labels.device) - starts[labels[order]]
    return places


def held_out_energies(
    features: Float[Tensor, "m d"],
    labels: Int[Tensor, " m"],
    num_classes: int,
    n_components: int,
    learnt_from: Bool[Tensor, " m"] | None = None,
    judged: Bool[Tensor, " m"] | None = None,
) -> Iterator[tuple[Int[Tensor, " n"], Float[Tensor, "n k"]]]:
    """Yields, fold by fold and a few at a time, samples' indices and their energies in subspaces found without them.

    Samples of a class are dealt to five folds in turn. If a class has no more samples to learn from in the other folds
    than its subspace has dimensions, all of its samples there are used.

    Args:
        features: Z, (m, d), finite.
        labels: (m,) in [0, num_classes).
        num_classes: k.
        n_components: r.
        learnt_from: the samples that subspaces are found from; None means all.
        judged: the samples to yield; None means all. A fold for which nothing can be learnt is left out.
    """
    folds = places_in_class(labels) % _FOLDS
    for fold in folds.unique().tolist():
        inside = folds == fold
        chosen = ~inside
        if learnt_from is not None:
            few = torch.bincount(labels[learnt_from & ~inside], minlength=num_classes) <= n_components
            chosen = chosen & (learnt_from | few[labels])
        if not chosen.any():
            continue
        bases = class_subspaces(features[chosen], labels[chosen], num_classes, n_components)
        rows = (inside if judged is None else inside & judged).nonzero()[:, 0]
        for part in rows.split(max(1, _ENERGIES // num_classes)):
            yield part, subspace_energies(features[part], bases)


@torch.no_grad()
def nearest_subspace(features: Float[Tensor, "m d"], bases: Float[Tensor, "k d r"]) -> Int[Tensor, " m"]:
    """Returns the class whose subspace is nearest to each sample, eq. (8); never a class without a basis.

    Args:
        features: (m, d), finite.
        bases: V^(j), (k, d, r), from `class_subspaces`.

    Raises:
        InputError: a wrong argument (a ValueError).
    """
    read_conditions(feature_conditions(features, feature_dim=bases.shape[1]))
    return nearest(features, bases)[1]


@torch.no_grad()
def nearest(
    features: Float[Tensor, "m d"], bases: Float[Tensor, "k d r"], excluded: Bool[Tensor, " k"] | None = None
) -> tuple[Float[Tensor, " m"], Int[Tensor, " m"]]:
    """Returns the share in [0, 1] of a sample's energy in its nearest subspace, and the class of that subspace.

    They are −1 and 0 if there is no subspace. Samples are read a few at a time.

    Args:
        features: (m, d), finite.
        bases: V^(j), (k, d, r).
        excluded: the classes that are never the nearest; None means those without a basis.
    """
    if excluded is None:
        excluded = (bases == 0).all(2).all(1)
    bases = bases.double()
    shares, owners = [], []
    for part in features.split(max(1, _CACHED // max(bases.shape[:2]))):
        rows = part.double()
        norms = torch.linalg.vector_norm(rows, dim=1)
        if not bool(((norms > _SMALLEST_NORM) & (norms < 1 / _SMALLEST_NORM)).all()):
            # Squares would overflow or vanish; scaling by a power of two changes no digit.
            exponents = torch.frexp(torch.linalg.vector_norm(rows, torch.inf, dim=1)).exponent.clamp(-1000, 1000)
            rows = rows * torch.exp2(-exponents.double())[:, None]
            norms = torch.linalg.vector_norm(rows, dim=1)
        best, nearest_classes = subspace_energies(rows, bases).masked_fill_(excluded, -1).max(1)
        shares.append(torch.where(best < 0, best, best / one_for_zero(norms.square())))
        owners.append(nearest_classes)
    return torch.cat(shares), torch.cat(owners)


def dictionary_subspaces(dictionary: BlockCodes) -> Float[Tensor, "k d s"]:
    """Returns an orthonormal basis of the span of each class's atoms with codes above 0, float64, padded with zeros.

    Its vectors are the eigenvectors of B_j = Γ Diag(Ã_j) Γᵀ, as those of `class_subspaces` are of C_j.
    """
    weighted = dictionary.blocks.double() * dictionary.codes.double().sqrt()[..., None]
    if dictionary.codes.shape[1] == 1:  # nothing to decompose
        return torch.nn.functional.normalize(weighted, dim=2).mT
    _, values, vectors = torch.linalg.svd(weighted, full_matrices=False)
    return spanned(vectors.mT, values.square())


@torch.no_grad()
def nearest_in_dictionary(
    features: Float[Tensor, "m d"], dictionary: BlockCodes
) -> tuple[Float[Tensor, " m"], Int[Tensor, " m"]]:
    """Returns the share of energy in the nearest of the dictionary's subspaces, −1 if it has none, and whose it is.

    Args:
        features: (m, d), finite.
        dictionary: Γ and Ã, of any number of classes, even none.
    """
    scores = features.new_full((len(features),), -1, dtype=torch.float64)
    owners = torch.zeros_like(scores, dtype=torch.long)
    s = dictionary.codes.shape[1]
    at_once = max(1, _BASES // (s * features.shape[1]))
    for start in range(0, len(dictionary.codes), at_once):
        part = BlockCodes(
            dictionary.atoms[start * s : (start + at_once) * s], dictionary.codes[start : start + at_once]
        )
        best, classes = nearest(features, dictionary_subspaces(part))
        better = best > scores
        scores = torch.where(better, best, scores)
        owners = torch.where(better, classes + start, owners)
    return scores, owners
