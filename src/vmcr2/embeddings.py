"""Examines features and labels from any source: a report in words and figures, and which labels look wrong."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from vmcr2.checks import UNIT_NORM_TOLERANCE, check_number, refuse_distributed, refuse_masked
from vmcr2.errors import InputError, NumericalError
from vmcr2.linalg import require_finite
from vmcr2.membership import Membership, as_membership
from vmcr2.rates import checked_rates, effective_rank, largest_reduction, transrate
from vmcr2.subspaces import check_components, default_components, held_out_energies

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MISSING = ("NoneType", "NAType", "NaTType")  # the types of what stands for a missing label, pandas's included
_NAMED_PAIRS = 10
_SHOWN_CLASSES = 20
_MOMENT_ELEMENTS = 2**27  # entries of all classes' moments held at once
_TIE = 1e-9  # shares of a sample's energy that differ by less are equal apart from rounding: a label is kept
_DIRECTIONS = 8  # of each class, used to find overlaps when the moments are too many to hold
_ROUNDS = 5
_SAMPLES_A_DIRECTION = 8  # of the median class: fewer say little about a direction
_FEWEST_A_DIRECTION = 4  # of a small class, whose samples the larger subspaces of the others would claim
_SMALL_CLASS = 0.1  # a class is small if it is at this quantile of the class sizes: of ten classes, the smallest


@dataclass(frozen=True)
class Overlap:
    """Two classes and how far their subspaces coincide: 0 if they are orthogonal, 1 if they are the same."""

    first: str
    second: str
    overlap: float


@dataclass(frozen=True, eq=False)
class Report:
    """A description of features; `str` gives it as text, `as_dict` as data, `figure` as a picture.

    Attributes:
        num_samples: m.
        feature_dim: d.
        class_names: (k,), of the classes that have a sample.
        class_counts: (k,), how many samples each has.
        eps_sq: ε² of the rates.
        normalized: whether rows had to be scaled to norm 1.
        expansion: R, in nats.
        compression: R_c.
        reduction: ΔR = R − R_c.
        maximum: the largest ΔR at these class sizes, from `largest_reduction`: that of orthogonal classes with equal
            energy in each of their directions; if dimensions are few, small classes share some.
        effective_rank: of all features, from 1 to d: e to the entropy of the eigenvalues of their second moment.
        class_ranks: (k,), each class's effective rank.
        centre: norm of the mean of all features, from 0 to 1.
        overlap: (k, k), the cosine between classes' second moments, Σ_ab (z_a·z_b)² scaled to 1 on the diagonal. If the
            moments are too many to hold (about 500 classes at d = 512), the part of it that each class's first 8
            directions account for: a lower bound.
        entangled: the pairs that overlap most, the worst first.
        transrate: TransRate of the features as given, see `vmcr2.transrate`; None if their norms are too large for it.
        spectrum: (d,), shares of the eigenvalues of the second moment of all features, largest first.
        warnings: what looks wrong, in words.
    """

    num_samples: int
    feature_dim: int
    class_names: tuple[str, ...]
    class_counts: Int[np.ndarray, " k"]
    eps_sq: float
    normalized: bool
    expansion: float
    compression: float
    reduction: float
    maximum: float
    effective_rank: float
    class_ranks: Float[np.ndarray, " k"]
    centre: float
    overlap: Float[np.ndarray, "k k"]
    entangled: tuple[Overlap, ...]
    transrate: float | None
    spectrum: Float[np.ndarray, " d"]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        """Returns the report as text."""
        k, ranks = len(self.class_names), self.class_ranks
        lowest, highest = int(ranks.argmin()), int(ranks.argmax())
        share = self.reduction / self.maximum if self.maximum > 0 else 0.0
        fewest, most = int(self.class_counts.min()), int(self.class_counts.max())
        lines = [
            f"{_counted(self.num_samples, 'sample')}, {_counted(k, 'class', 'es')} ("
            + (f"{fewest} to {most} samples" if fewest < most else _counted(most, "sample"))
            + f" each), {_counted(self.feature_dim, 'dimension')}"
            + (", rows scaled to norm 1" if self.normalized else ""),
            f"ΔR {self.reduction:.2f} = R {self.expansion:.2f} − R_c {self.compression:.2f} nats (eps_sq {self.eps_sq})"
            f"; {share:.0%} of the largest possible, {self.maximum:.2f}",
            f"effective rank {self.effective_rank:.1f} of {self.feature_dim}; of a class {np.median(ranks):.1f} "
            f"(median), from {ranks[lowest]:.1f} ({self.class_names[lowest]}) to {ranks[highest]:.1f} "
            f"({self.class_names[highest]})",
            f"overlap of two classes {self.mean_overlap:.3f} on average (0 orthogonal, 1 the same)",
            f"TransRate {'–' if self.transrate is None else format(self.transrate, '.2f')}"
            + (" (of the features at their own scale)" if self.normalized else ""),
        ]
        if self.entangled:
            lines.append("most entangled:")
            lines += [f"  {pair.first} and {pair.second}  {pair.overlap:.3f}" for pair in self.entangled]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    @property
    def mean_overlap(self) -> float:
        """The mean overlap over pairs of different classes; 0 for one class."""
        k = len(self.class_names)
        return float((self.overlap.sum() - np.trace(self.overlap)) / max(1, k * (k - 1)))

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as numbers, strings, lists and dicts, ready for JSON; of overlaps, the entangled pairs."""
        names = (
            "num_samples",
            "feature_dim",
            "eps_sq",
            "normalized",
            "expansion",
            "compression",
            "reduction",
            "maximum",
            "effective_rank",
            "centre",
            "mean_overlap",
            "transrate",
        )
        return {name: getattr(self, name) for name in names} | {
            "classes": [
                {"name": name, "samples": int(count), "effective_rank": float(rank)}
                for name, count, rank in zip(self.class_names, self.class_counts, self.class_ranks, strict=True)
            ],
            "entangled": [{"classes": [pair.first, pair.second], "overlap": pair.overlap} for pair in self.entangled],
            "warnings": list(self.warnings),
        }

    def figure(self) -> Figure:
        """Returns the report as a figure, to be saved with `.savefig(path)`; opens no window.

        Raises:
            ImportError: matplotlib is missing: pip install 'vmcr2[lab]'.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            text = "Report.figure needs matplotlib: pip install 'vmcr2[lab]'"
            raise ModuleNotFoundError(text, name="matplotlib") from error
        figure = Figure(figsize=(10, 8), layout="constrained", dpi=120)
        rates, spectrum, overlaps, ranks = figure.subplots(2, 2).flat
        self._draw_rates(rates)
        self._draw_spectrum(spectrum)
        self._draw_overlaps(figure, overlaps)
        self._draw_ranks(ranks)
        for axes in (rates, spectrum, ranks):
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{self.num_samples} features, {self.feature_dim} dimensions, {len(self.class_names)} classes")
        if self.warnings:
            text = "\n".join(textwrap.fill(f"Warning: {_plain(warning)}", 130) for warning in self.warnings)
            figure.supxlabel(text, x=0.01, ha="left", fontsize=9, color="#a02030")
        return figure

    def _draw_rates(self, axes: Any) -> None:
        values = [self.expansion, self.compression, self.reduction, self.maximum]
        names = ["R\nall\nfeatures", "R_c\nwithin\nclasses", "ΔR =\nR − R_c", "largest\npossible\nΔR"]
        bars = axes.bar(names, values, color=["#3a7d44", "#d1495b", "#0b6e99", "#cfd8dc"])
        axes.bar_label(bars, fmt="%.1f", padding=2)
        axes.margins(y=0.1)
        axes.set_ylabel("coding rate (nats)")
        axes.set_title("How much room features take\nGood: ΔR close to the largest possible", fontsize=10)

    def _draw_spectrum(self, axes: Any) -> None:
        places = np.arange(1, len(self.spectrum) + 1)
        axes.plot(places, 100 * np.cumsum(self.spectrum), color="#0b6e99")
        axes.axvline(self.effective_rank, color="#7a7a7a", linestyle="--", linewidth=1)
        axes.text(self.effective_rank, 3, f" effective rank {self.effective_rank:.1f}", color="#555555")
        axes.set(xlabel="directions, strongest first", ylabel="energy in them (%)", ylim=(0, 103), xlim=(1, None))
        axes.set_title("How many directions are used\nGood: a slow rise; bad: a jump at the left", fontsize=10)

    def _chosen(self) -> list[int]:
        """Returns the classes to show: all if they are few, otherwise those of the most entangled pairs."""
        k = len(self.class_names)
        if k <= _SHOWN_CLASSES:
            return list(range(k))
        upper = np.where(np.triu(np.ones((k, k), dtype=bool), 1), self.overlap, -1)
        best = np.argpartition(upper.ravel(), -_SHOWN_CLASSES)[-_SHOWN_CLASSES:]
        chosen: list[int] = []
        for place in best[np.argsort(-upper.ravel()[best])]:
            for j in divmod(int(place), k):
                if j not in chosen and len(chosen) < _SHOWN_CLASSES:
                    chosen.append(j)
        return chosen

    def _draw_overlaps(self, figure: Any, axes: Any) -> None:
        chosen = self._chosen()
        names = [_short(self.class_names[j]) for j in chosen]
        image = axes.imshow(self.overlap[np.ix_(chosen, chosen)], vmin=0, vmax=1, cmap="magma_r")
        axes.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        figure.colorbar(image, ax=axes, label="overlap", shrink=0.8)
        some = "" if len(chosen) == len(self.class_names) else f" ({len(chosen)} of {len(self.class_names)}, the worst)"
        axes.set_title(
            f"Which classes coincide{some}\nGood: bright off the diagonal. Dark: subspaces confuse the two classes",
            fontsize=10,
        )

    def _draw_ranks(self, axes: Any) -> None:
        chosen = self._chosen()
        order = sorted(chosen, key=lambda j: self.class_ranks[j])
        axes.barh(range(len(order)), self.class_ranks[order], color="#0b6e99")
        axes.set_yticks(range(len(order)), [_short(self.class_names[j]) for j in order], fontsize=8)
        room = max(1.0, self.feature_dim / len(self.class_names))
        axes.axvline(room, color="#d1495b", linestyle="--", linewidth=1.5)
        dashed = f"d/k = {room:.1f}, an equal share" if room > 1 else "1, the least"
        label = f"effective rank (dashed: {dashed})"
        axes.set(xlabel=label, xlim=(0, max(1.2 * room, 1.1 * self.class_ranks[order].max())))
        axes.set_title("How much variety each class has\nGood: about the dashed line; collapsed: 1", fontsize=10)


def _short(name: str) -> str:
    return _plain(name if len(name) <= 18 else f"{name[:9]}…{name[-8:]}")  # names may differ only at their end


def _plain(text: str) -> str:
    """Returns text that matplotlib does not mistake for mathematics."""
    return text.replace("$", r"\$")


def report(
    features: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[Any],
    class_names: Sequence[str] | None = None,
    eps_sq: float = 0.5,
) -> Report:
    """Reports on features: coding rates beside what they could be, ranks, overlaps, collapse, TransRate.

    Args:
        features: Z, (m, d), NumPy or torch, finite; rows that are not of norm 1 are scaled to it (but not for
            TransRate).
        labels: (m,), of any kind.
        class_names: names by label, for integer labels from 0 to len(class_names) − 1; by default the labels are used.
        eps_sq: the squared precision ε² > 0.

    Returns:
        The report, computed in float64 on the features' device.

    Raises:
        InputError: a wrong argument (a ValueError).
        NumericalError: a factorisation failed.
    """
    eps_sq = check_number("eps_sq", eps_sq)
    given, places, values = _checked(features, labels)
    names = _named(values, class_names)
    unit, normalized = _unit_rows(given)
    m, d = unit.shape
    membership = as_membership(unit, places, len(names))
    rates = checked_rates(unit, membership, eps_sq)
    require_finite(*rates)
    spectrum = torch.linalg.svdvals(unit).square() / m
    spectrum = functional.pad(spectrum, (0, d - len(spectrum)))
    overlap, ranks = _overlaps_and_ranks(unit, membership)
    counts = membership.sizes.numpy()
    maximum = largest_reduction(d, counts, eps_sq)
    centre = float(unit.mean(0).norm())
    pairs = _worst_pairs(overlap, names)
    rank = float(effective_rank(spectrum[None])[0])
    reduction = max(0.0, float(rates.reduction))
    warnings = _warnings(d, counts, reduction / maximum if maximum > 0 else None, rank, ranks, centre, pairs)
    transferable = _transrate(given, places)
    if transferable is None:
        warnings.append(
            "the norms of features are too large for TransRate, which does not rescale them: divide all by one number"
        )
    return Report(
        num_samples=m,
        feature_dim=d,
        class_names=names,
        class_counts=counts,
        eps_sq=eps_sq,
        normalized=normalized,
        expansion=float(rates.expansion),
        compression=float(rates.compression),
        reduction=reduction,
        maximum=maximum,
        effective_rank=rank,
        class_ranks=ranks,
        centre=centre,
        overlap=overlap,
        entangled=pairs,
        transrate=transferable,
        spectrum=spectrum.cpu().numpy(),
        warnings=tuple(warnings),
    )


def _transrate(features: Float[Tensor, "m d"], labels: Int[Tensor, " m"]) -> float | None:
    try:
        return float(transrate(features, labels))
    except NumericalError:
        return None


def _warnings(
    d: int,
    counts: np.ndarray,
    share: float | None,
    rank: float,
    ranks: np.ndarray,
    centre: float,
    pairs: tuple[Overlap, ...],
) -> list[str]:
    k, texts = len(counts), []
    # The values of orthogonal classes of one line each, which are no better if one class has nearly all samples.
    weights = counts / counts.sum()
    good_rank, good_centre = float(effective_rank(torch.from_numpy(weights)[None])[0]), float(np.linalg.norm(weights))
    collapsed = rank < min(2, (1 + good_rank) / 2)
    if collapsed and d > 2:
        texts.append(
            f"all features lie near one direction (effective rank {rank:.1f} of {d}): they have collapsed, "
            "or share a large mean that hides the rest"
        )
    elif centre > max(0.7, (1 + good_centre) / 2):
        texts.append(
            f"features share a large mean (norm {centre:.2f} of at most 1), which is then in every class's subspace: "
            "centre them before comparing subspaces"
        )
    enough = counts >= 5
    flat = enough & (ranks < 1.5)
    if d // k >= 2 and flat.sum() > 0.5 * enough.sum():
        texts.append(
            f"{flat.sum()} of {k} classes have collapsed to a single direction each, where there is room for {d // k}"
            ": the variety within a class is gone"
        )
    if share is not None and share < 0.1 and not collapsed and k > 1:
        texts.append(f"classes are barely separated: ΔR is {share:.0%} of what it could be")
    if pairs and pairs[0].overlap > 0.9 and not collapsed:
        texts.append(
            f"{pairs[0].first} and {pairs[0].second} have nearly the same subspace: subspaces cannot tell them apart"
        )
    if d < k:
        texts.append(f"{k} classes cannot all be orthogonal in {d} dimensions")
    if not enough.all():
        few = int((~enough).sum())
        texts.append(
            f"{_counted(few, 'class', 'es')} of {k} with fewer than 5 samples: ranks and overlaps there are unreliable"
        )
    if k == 1:
        texts.append("there is only one class: ΔR is 0 and says nothing")
    return texts


def _counted(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun if number == 1 else noun + plural}"


def _overlaps_and_ranks(unit: Tensor, membership: Membership) -> tuple[np.ndarray, np.ndarray]:
    """Returns the cosines between classes' second moments, or lower bounds on them, and each class's effective rank."""
    d, k = unit.shape[1], membership.num_classes
    most = min(d, int(membership.sizes.max()))
    depth = min(_DIRECTIONS, most)
    affordable = k * d * max(d, most) <= _MOMENT_ELEMENTS
    whole = affordable and depth < most  # otherwise the directions are as exact, and fewer
    ranks, norms = (torch.empty(k, dtype=unit.dtype, device="cpu") for _ in range(2))
    vectors, moments = [], unit.new_empty(k if whole else 0, d * d)
    for j, rows in enumerate(unit[membership.rows_or_labels.argsort(stable=True)].split(membership.sizes.tolist())):
        _, values, directions = torch.linalg.svd(rows / len(rows) ** 0.5, full_matrices=False)
        energies = values.square()
        ranks[j] = effective_rank(energies[None])[0].cpu()
        norms[j] = torch.linalg.vector_norm(energies).cpu()
        scaled = directions * energies[:, None].sqrt()
        if whole:
            moments[j] = (scaled.mT @ scaled).flatten()
        else:
            vectors.append(functional.pad(scaled[:depth], (0, 0, 0, max(0, depth - len(scaled)))))
    if whole:
        inner = moments @ moments.mT
    else:
        padded = torch.stack(vectors).to(torch.float64 if affordable else torch.float32)
        flat = padded.flatten(0, 1)
        rows = [
            (part.flatten(0, 1) @ flat.mT).square().view(len(part), depth, k, depth).sum((1, 3))
            for part in padded.split(64)
        ]
        inner = torch.cat(rows).double()
    cosines = (inner.cpu() / (norms[:, None] * norms)).clamp(0, 1).fill_diagonal_(1)
    return cosines.numpy(), ranks.numpy()


def _worst_pairs(overlap: np.ndarray, names: tuple[str, ...]) -> tuple[Overlap, ...]:
    k = len(names)
    first, second = np.triu_indices(k, 1)
    values = overlap[first, second]
    number = min(_NAMED_PAIRS, len(values))
    best = np.argpartition(-values, number - 1)[:number] if number else np.empty(0, dtype=int)
    best = best[np.argsort(-values[best], kind="stable")]
    return tuple(Overlap(names[first[p]], names[second[p]], float(values[p])) for p in best)


@dataclass(frozen=True, eq=False)
class LabelQuality:
    """How well each label fits its sample, in cleanlab's convention.

    Attributes:
        scores: (m,), from 0 to 1; low is suspect. Below 0.5, another class's subspace holds more of the sample.
        suggested: (m,), the label of the nearest subspace, of the same kind as the labels given.
        labels: (m,), as given.
    """

    scores: Float[np.ndarray, " m"]
    suggested: np.ndarray
    labels: np.ndarray

    @property
    def order(self) -> Int[np.ndarray, " m"]:
        """The samples from the most suspect to the least."""
        return np.argsort(self.scores, kind="stable")

    @property
    def suspects(self) -> Int[np.ndarray, " s"]:
        """The samples whose suggested label differs from the given one, the most suspect first."""
        return self.order[(self.suggested != self.labels)[self.order]]

    def __str__(self) -> str:
        """Returns how many labels are suspect, and the ten worst."""
        lines = [f"{len(self.suspects)} of {len(self.scores)} labels are suspect"]
        for i in self.suspects[:10]:
            lines.append(
                f"  sample {i}: given {self.labels[i]}, suggested {self.suggested[i]}, score {self.scores[i]:.3f}"
            )
        if 2 * len(self.suspects) > len(self.scores):
            lines.append(
                "more than half: these features hardly tell the classes apart, so do not rely on the suggestions"
            )
        return "\n".join(lines)


def label_quality(
    features: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[Any],
    n_components: int | None = None,
) -> LabelQuality:
    """Scores how well each sample's label fits, by the classes' subspaces.

    The score is ½ (1 + a − b): a is the share of the sample's energy in its class's subspace, b the largest share in
    another class's. A sample is judged by subspaces found without it (five folds) and, over a few rounds, without the
    samples that fitted another class better in the round before; so subspaces of high dimension do not memorise wrong
    labels, and up to half of the labels may be wrong. A class's only sample cannot be judged, as no other shows what
    the class is like: it keeps its label, with score 0.5. The samples of a class are dealt to the folds in order, and
    scores depend slightly on this order. docs/estimators.md says what each of these steps is worth.

    Args:
        features: Z, (m, d), NumPy or torch, finite, no row all zeros; their scale does not matter.
        labels: (m,), of any kind, at least two classes.
        n_components: dimension of each class's subspace, from 1 to d (at d, large classes cannot be told apart); None
            means ⌊d/k⌋, but at most an eighth of the median class's samples and a quarter of a small class's (at the
            10 % quantile of the sizes), and at least 1.

    Raises:
        InputError: a wrong argument (a ValueError).
        NumericalError: a decomposition did not converge.
    """
    given, places, values = _checked(features, labels)
    unit, _ = _unit_rows(given)
    d, k = unit.shape[1], len(values)
    if k < 2:
        raise InputError(f"labels must hold at least 2 classes, got {values.tolist()}")
    if n_components is None:
        sizes = torch.bincount(places).double()
        median, small = int(sizes.quantile(0.5)), int(sizes.quantile(_SMALL_CLASS, interpolation="lower"))
        enough = min(median // _SAMPLES_A_DIRECTION, small // _FEWEST_A_DIRECTION)
        n_components = max(1, min(default_components(d, k), enough))
    n_components = check_components(n_components, d, stacklevel=2)
    kept = torch.ones_like(places, dtype=torch.bool)
    own, best, other = _judged(unit, places, k, n_components, kept)
    for _ in range(_ROUNDS - 1):
        fits = own >= best - _TIE
        if torch.equal(fits, kept):
            break
        kept = fits
        own, best, other = _judged(unit, places, k, n_components, kept)
    suggested = torch.where(best > own + _TIE, other, places)
    return LabelQuality(
        (0.5 * (1 + own - best)).clamp(0, 1).cpu().numpy(),
        values[suggested.cpu().numpy()],
        values[places.cpu().numpy()],
    )


def _judged(
    unit: Float[Tensor, "m d"], labels: Int[Tensor, " m"], k: int, n_components: int, kept: Bool[Tensor, " m"]
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"], Int[Tensor, " m"]]:
    """Returns each sample's energy in its class's subspace, the largest in another's, and which other.

    The subspaces are found from the kept samples of the other folds. If a class has none there, the sample's own energy
    counts as equal to the largest.
    """
    own, best, other = unit.new_zeros(len(unit)), unit.new_zeros(len(unit)), torch.zeros_like(labels)
    for rows, energies in held_out_energies(unit, labels, k, n_components, kept):
        own_labels = labels[rows, None]
        own[rows] = energies.gather(1, own_labels)[:, 0]
        best[rows], other[rows] = energies.scatter_(1, own_labels, -1.0).max(1)
    alone = torch.bincount(labels, minlength=k)[labels] == 1  # two samples of a class lie in two folds
    return torch.where(alone, best, own), best, other


def _checked(features: Any, labels: Any) -> tuple[Tensor, Tensor, np.ndarray]:
    """Returns features as float64, labels as indices into their sorted values, and these values."""
    refuse_distributed("features", features)
    if not isinstance(features, Tensor):
        if hasattr(features, "toarray"):
            raise InputError(f"features must be dense, got {type(features).__name__}; .toarray() makes it so")
        refuse_masked("features", features)
        try:
            array = np.asarray(features)
            numbers = array.dtype.kind in "fiubO"
            features = torch.from_numpy(np.array(array, dtype=np.float64)) if numbers else None
        except (TypeError, ValueError) as error:  # rows of unequal length, or objects that are not numbers
            raise InputError(f"features must hold real numbers, (m, d): {error}") from error
        if features is None:
            raise InputError(f"features must hold real numbers, got dtype {array.dtype}")
    if features.layout != torch.strided or features.is_nested or features.is_meta:
        got = "a nested one" if features.is_nested else "meta" if features.is_meta else f"layout {features.layout}"
        raise InputError(f"features must be a dense tensor with values, got {got}")
    if features.ndim != 2 or 0 in features.shape:
        raise InputError(f"features must have shape (m, d) with m, d >= 1, got {tuple(features.shape)}")
    if features.is_complex() or features.dtype == torch.bool:
        raise InputError(f"features must hold real numbers, got {features.dtype}")
    features = features.detach().double()
    if not bool(features.isfinite().all()):
        raise InputError(f"features must be finite, got {int((~features.isfinite()).sum())} NaN or infinite entries")
    values, places = sorted_classes(labels, len(features))
    return features, torch.from_numpy(places).to(features.device), values


def sorted_classes(
    labels: Any, m: int, name: str = "labels", beside: str = "features"
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sorted values (k,) of m labels of any kind, and the labels (m,) as indices into them, 0 to k − 1.

    Args:
        labels: of the samples.
        m: how many there must be.
        name: the caller's name for them.
        beside: the caller's name for the samples.

    Raises:
        InputError: there are not m labels, or they are non-integer numbers, of several kinds, or some are missing (a
            ValueError).
    """
    refuse_masked(name, labels)
    refuse_distributed(name, labels)
    try:
        array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    except (TypeError, ValueError, RuntimeError) as error:  # bfloat16, sparse, without values; lists of unequal length
        raise InputError(
            f"{name} must be of shape ({m},), dense and of a dtype that NumPy supports: {error}"
        ) from error
    if array.shape != (m,):
        raise InputError(f"{name} must have shape ({m},) to match {beside}, got {array.shape}")
    # In a list with strings NumPy turns everything into strings, and it sorts NaN as if it were a label.
    listed = list(labels) if array.dtype.kind in "OU" else []
    if array.dtype.kind in "fmM":
        missing = int((np.isnan(array) if array.dtype.kind == "f" else np.isnat(array)).sum())
    else:
        missing = sum(
            type(label).__name__ in _MISSING or (isinstance(label, float) and math.isnan(label)) for label in listed
        )
    if missing:
        raise InputError(f"{name} must not be missing, but {missing} of {m} are")
    whole = array.dtype.kind != "f" or (np.isfinite(array).all() and (array == np.round(array)).all())
    if array.dtype.kind == "c" or not whole:
        raise InputError(f"{name} must name classes, got numbers that are not integers")
    if len({isinstance(label, str) for label in listed}) < 2:
        with suppress(TypeError):  # labels that cannot be sorted
            return np.unique(array, return_inverse=True)
    kinds = sorted({type(label).__name__ for label in listed})
    raise InputError(f"{name} must be of one kind that can be sorted, got {' and '.join(kinds)}")


def _unit_rows(features: Tensor) -> tuple[Tensor, bool]:
    """Returns the rows scaled to norm 1, and whether any had another norm."""
    largest = features.abs().amax(1, keepdim=True)
    if not bool((largest > 0).all()):
        rows = (largest[:, 0] == 0).nonzero()[:, 0].tolist()
        raise InputError(f"features must have no row of zeros, got {len(rows)}, the first at {rows[0]}")
    scaled = features / largest
    norms = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    off = bool(((norms * largest - 1).abs() > UNIT_NORM_TOLERANCE).any())
    return scaled / norms, off


def _named(values: np.ndarray, class_names: Sequence[str] | None) -> tuple[str, ...]:
    if class_names is None:
        return tuple(str(value) for value in values.tolist())
    if isinstance(class_names, str) or not isinstance(class_names, Sequence | np.ndarray):
        raise InputError(f"class_names must be a list, a tuple or an array of names, got {class_names!r}")
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= len(class_names):
        raise InputError(
            f"class_names has length {len(class_names)}, so labels must be integers >= 0 and below that, "
            f"got labels from {values[0]} to {values[-1]}"
        )
    return tuple(str(class_names[value]) for value in values.tolist())
