"""Class membership Π: checked once at the border, then read in the two forms the mathematics needs.

Inside the package a membership is a `Membership`: labels or soft rows, plus the class counts. Per-class work goes
through `Membership.groups`, which packs classes of similar size into one padded batch, so that nothing here ever
builds the k×m×m matrices of eq. (1) and only classes with a sample are touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from vmcr2.checks import check_count
from vmcr2.errors import InputError
from vmcr2.linalg import may_read, wide_dtype

UNIT_NORM_TOLERANCE = 0.02  # bf16 normalisation is off by up to 2⁻⁸ in the norm and as much in each entry
_ABSENT = 1e-15  # a class with a smaller share of the samples counts as absent: its part in any rate is below rounding
_LARGEST_LABEL = 10_000_000  # beyond this a forgotten num_classes is likelier than so many classes
_GROUP_ELEMENTS = 2**25  # entries of the largest padded tensor a group may give rise to

FINITE = "features must be finite"
UNIT = "features must have rows of norm 1 (the objective is unbounded otherwise)"
ROWS_FINITE = "membership rows must be finite"
ROWS_POSITIVE = "membership rows must be >= 0"
ROWS_SUM = "membership rows must sum to 1"


def labels_within(num_classes: int) -> str:
    """Returns what is required of labels, in words."""
    return f"membership labels must lie in [0, {num_classes})"


class Condition(NamedTuple):
    """Something that must hold of a tensor's values.

    Attributes:
        wrong: 0-d bool tensor, true where it does not hold.
        requirement: what is required, of which argument.
        got: says what was found instead.
    """

    wrong: Tensor
    requirement: str
    got: Callable[[], str]


@dataclass(frozen=True)
class ClassGroup:
    """Classes of similar size: which rows belong to each, padded to the largest with weight 0.

    Attributes:
        classes: which classes.
        rows: the samples of each; the padding names any sample.
        weights: Π of each, 0 for the padding.
        counts: n_j.
        filled: places in the flattened rows that are no padding.
        once: whether no sample is in two classes, as with labels.
    """

    classes: Int[Tensor, " b"]
    rows: Int[Tensor, "b n"]
    weights: Float[Tensor, "b n"]
    counts: Float[Tensor, " b"]
    filled: Int[Tensor, " f"]
    once: bool

    def take(self, features: Float[Tensor, "m d"]) -> Float[Tensor, "b n d"]:
        """Returns each class's rows; the padding repeats a row, to be weighted by 0."""
        taken = _Take.apply(features, self)
        assert isinstance(taken, Tensor)
        return taken

    def give(self, values: Float[Tensor, "b n d"], to: Float[Tensor, "m d"]) -> None:
        """Adds each class's rows to their samples, in place; what stands in the padding is left out.

        Where no sample is in two classes the rows are copied, many times faster than adding on a CPU: `to` must then
        hold 0 for these samples.
        """
        rows = self.rows.flatten().index_select(0, self.filled)
        filled = values.flatten(0, 1).index_select(0, self.filled)
        (to.index_copy_ if self.once else to.index_add_)(0, rows, filled)


class _Take(torch.autograd.Function):
    """Gathers a group's rows; the gradient goes back by `ClassGroup.give`."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, group: ClassGroup) -> Tensor:
        ctx.group, ctx.shape = group, features.shape
        return features.index_select(0, group.rows.flatten()).view(*group.rows.shape, features.shape[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        gradient = grad_outputs[0].new_zeros(ctx.shape)
        ctx.group.give(grad_outputs[0], to=gradient)
        return gradient, None


@dataclass(frozen=True)
class Membership:
    """Π as labels (hard) or as rows that sum to one (soft), with n_j = ⟨1, Π_j⟩; exactly one form is not None."""

    labels: Int[Tensor, " m"] | None
    soft: Float[Tensor, "m k"] | None
    counts: Float[Tensor, " k"]
    _packed: dict[int, list[ClassGroup]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_classes(self) -> int:
        """The number of classes k, the absent ones included."""
        return self.counts.shape[0]

    @property
    def num_samples(self) -> int:
        """The number of samples m."""
        held = self.soft if self.labels is None else self.labels
        assert held is not None
        return held.shape[0]

    @property
    def class_weights(self) -> Float[Tensor, " k"]:
        """γ_j = n_j / m."""
        return self.counts / self.num_samples

    def spread(self, codes: Float[Tensor, "q k"]) -> Float[Tensor, "m q"]:
        """Returns Π Ãᵀ: for each sample the codes of its class."""
        if self.labels is not None:
            return codes.T.index_select(0, self.labels)
        assert self.soft is not None
        return self.soft.to(codes.dtype) @ codes.T

    def collect(self, values: Float[Tensor, "m q"]) -> Float[Tensor, "q k"]:
        """Returns valuesᵀ Π: the sum over each class's samples."""
        if self.labels is not None:
            sums = values.new_zeros(self.num_classes, values.shape[1])
            return sums.index_add(0, self.labels, values).T
        assert self.soft is not None
        return values.T @ self.soft.to(values.dtype)

    def to(self, dtype: torch.dtype) -> Membership:
        """Returns the membership with its weights in a dtype."""
        if self.counts.dtype == dtype:
            return self
        return Membership(self.labels, None if self.soft is None else self.soft.to(dtype), self.counts.to(dtype))

    def present(self) -> tuple[Membership, Int[Tensor, " p"]]:
        """Returns the membership among the classes that have a sample alone, and which classes these are.

        On an accelerator, where their number is not known to the host, as many classes as could have a sample.
        """
        if not may_read(self.counts):
            return self._perhaps_present()
        if self.labels is not None:
            classes, labels = self.labels.unique(return_inverse=True)
            return Membership(labels, None, self.counts[classes]), classes
        assert self.soft is not None
        classes = self.counts.nonzero()[:, 0]
        return Membership(None, self.soft[:, classes], self.counts[classes]), classes

    def _perhaps_present(self) -> tuple[Membership, Int[Tensor, " p"]]:
        k = self.num_classes
        places = torch.arange(k, device=self.counts.device)
        if self.labels is None:
            return self, places
        classes = torch.argsort((self.counts == 0).to(torch.uint8), stable=True)[: min(k, self.num_samples)]
        slots = torch.zeros_like(places).scatter_(0, classes, places[: len(classes)])
        return Membership(slots[self.labels], None, self.counts[classes]), classes

    def rows(self) -> Float[Tensor, "m k"]:
        """Returns Π as rows."""
        if self.soft is not None:
            return self.soft
        assert self.labels is not None
        return functional.one_hot(self.labels, self.num_classes).to(self.counts.dtype)

    def groups(self, width: int) -> list[ClassGroup]:
        """Returns the classes that have a sample, in padded batches of classes of similar size; found once.

        A batch holds classes whose sizes lie within a factor of two, so padding at most doubles the work however
        unbalanced the classes are. Rows of weight 0 are left out, unless the membership itself is being learned.

        Args:
            width: entries each row brings along (the feature dimension); bounds the memory a batch may take.
        """
        if width not in self._packed:
            self._packed[width] = list(self._pack(width))
        return self._packed[width]

    def _pack(self, width: int) -> Iterator[ClassGroup]:
        if self.labels is not None:
            order = torch.argsort(self.labels, stable=True)
            weights = None
            sizes = torch.bincount(self.labels, minlength=self.num_classes)
        else:
            assert self.soft is not None
            kept = (self.counts > 0) & ((self.soft > 0) | self.soft.requires_grad)
            classes, order = kept.T.nonzero(as_tuple=True)
            weights = self.soft[order, classes]
            sizes = kept.sum(0)
        ends = sizes.cumsum(0)
        by_bucket: dict[int, list[int]] = {}
        sizes_list = sizes.tolist()
        for j, size in enumerate(sizes_list):
            if size:
                by_bucket.setdefault(size.bit_length(), []).append(j)
        for members in by_bucket.values():
            n = max(sizes_list[j] for j in members)
            at_once = max(1, _GROUP_ELEMENTS // (n * width))
            for start in range(0, len(members), at_once):
                chosen = torch.tensor(members[start : start + at_once], device=sizes.device)
                steps = torch.arange(n, device=sizes.device)
                inside = steps < sizes[chosen, None]
                places = torch.where(inside, (ends - sizes)[chosen, None] + steps, 0)
                packed = inside.to(self.counts.dtype)
                if weights is not None:
                    packed = packed * weights[places]
                filled = inside.flatten().nonzero()[:, 0]
                yield ClassGroup(chosen, order[places], packed, self.counts[chosen], filled, weights is None)


def raise_first(conditions: Sequence[Condition]) -> None:
    """Raises InputError for the first condition that holds; one synchronisation with the device for all of them."""
    broken = torch.stack([condition.wrong for condition in conditions]).tolist()
    for wrong, condition in zip(broken, conditions, strict=True):
        if wrong:
            raise InputError(f"{condition.requirement}, got {condition.got()}")


def feature_conditions(features: Tensor, *, feature_dim: int | None = None, unit: bool = False) -> list[Condition]:
    """Checks type and shape of features at once and returns what remains to be checked of their values.

    Args:
        features: (m, d), floating point.
        feature_dim: the d that is required, or None.
        unit: whether rows must have norm 1 (within 2 %, so that bf16 features pass).
    """
    if not isinstance(features, Tensor):
        raise InputError(f"features must be a torch.Tensor of shape (m, d), got {type(features).__name__}")
    if features.ndim != 2 or 0 in features.shape:
        raise InputError(f"features must have shape (m, d) with m, d >= 1, got {tuple(features.shape)}")
    if not features.is_floating_point():
        raise InputError(f"features must be floating point, got {features.dtype}")
    if feature_dim is not None and features.shape[1] != feature_dim:
        raise InputError(f"features must have feature_dim = {feature_dim} columns, got shape {tuple(features.shape)}")
    detached = features.detach()
    finite = detached.isfinite().all()
    conditions = [
        Condition(
            ~finite,
            FINITE,
            lambda: f"{int((~detached.isfinite()).sum())} NaN or infinite entries",
        )
    ]
    if unit:
        norms = torch.linalg.vector_norm(detached, dim=1, dtype=wide_dtype(detached))
        off = (norms - 1).abs().max() > UNIT_NORM_TOLERANCE
        conditions.append(
            Condition(
                off,
                UNIT,
                lambda: (
                    f"norms from {float(norms.min()):.3g} to {float(norms.max()):.3g}; "
                    "end the network with torch.nn.functional.normalize(z, dim=1)"
                ),
            )
        )
    return conditions


def as_membership(
    features: Tensor,
    membership: Tensor,
    num_classes: int | None,
    *,
    feature_dim: int | None = None,
    unit: bool = False,
    deferred: list[Condition] | None = None,
) -> Membership:
    """Checks features and membership together and returns the membership in the form used inside the package.

    Args:
        features: (m, d), floating point and finite; with `unit`, rows of norm 1.
        membership: integer labels (m,) in [0, k), or rows (m, k) ≥ 0 that sum to one.
        num_classes: k, or None to take it from the membership (labels: the largest + 1).
        feature_dim: the d that is required, or None.
        unit: whether rows must have norm 1.
        deferred: where given, what must hold of the values is added to it and not waited for; num_classes must then
            be given, and a label outside of the range stands for the nearest one inside.

    Raises:
        InputError: names the argument, what it got and what it takes.
    """
    conditions = feature_conditions(features, feature_dim=feature_dim, unit=unit)
    if num_classes is not None:
        check_count("num_classes", num_classes)
    if not isinstance(membership, Tensor):
        raise InputError(
            f"membership must be a torch.Tensor of labels (m,) or rows (m, k), got {type(membership).__name__}"
        )
    m = features.shape[0]
    if membership.ndim not in (1, 2) or membership.shape[0] != m:
        raise InputError(
            f"membership must have shape ({m},) or ({m}, k) to match features {tuple(features.shape)}, "
            f"got {tuple(membership.shape)}"
        )
    if membership.device != features.device:
        raise InputError(f"membership must be on the features' device {features.device}, got {membership.device}")
    if membership.dtype == torch.bool or membership.is_complex():
        raise InputError(f"membership must hold integer labels or real rows, got {membership.dtype}")
    read = _from_labels if membership.ndim == 1 else _from_rows
    return read(membership, num_classes, conditions, wide_dtype(features), deferred)


def _from_labels(
    labels: Tensor,
    num_classes: int | None,
    conditions: list[Condition],
    dtype: torch.dtype,
    deferred: list[Condition] | None,
) -> Membership:
    if labels.is_floating_point():
        raise InputError(
            f"membership as labels must be of an integer dtype, got {labels.dtype}; "
            "soft membership has shape (m, k), one row a sample"
        )
    labels = labels.long()
    lowest, highest = labels.min(), labels.max()
    limit = _LARGEST_LABEL if num_classes is None else num_classes
    conditions.append(
        Condition(
            (lowest < 0) | (highest >= limit),
            labels_within(limit),
            lambda: (
                f"labels from {int(lowest)} to {int(highest)}"
                + ("; pass num_classes if they are right" if num_classes is None else "")
            ),
        )
    )
    if deferred is not None and num_classes is not None:
        deferred += conditions
        labels = labels.clamp(0, num_classes - 1)
        counts = torch.zeros(num_classes, dtype=dtype, device=labels.device)
        return Membership(labels, None, counts.index_add_(0, labels, counts.new_ones(len(labels))))
    raise_first(conditions)
    k = int(highest) + 1 if num_classes is None else num_classes
    return Membership(labels, None, torch.bincount(labels, minlength=k).to(dtype))


def _from_rows(
    rows: Tensor,
    num_classes: int | None,
    conditions: list[Condition],
    dtype: torch.dtype,
    deferred: list[Condition] | None,
) -> Membership:
    if rows.shape[1] == 0 or (num_classes is not None and rows.shape[1] != num_classes):
        raise InputError(
            f"membership rows must have num_classes = {num_classes or 'at least 1'} entries, "
            f"got shape {tuple(rows.shape)}"
        )
    tolerance = 1e-2 if rows.is_floating_point() and torch.finfo(rows.dtype).bits == 16 else 1e-4
    rows = rows.to(dtype)
    detached = rows.detach()
    sums = detached.sum(1)
    conditions += [
        Condition(~detached.isfinite().all(), ROWS_FINITE, lambda: "NaN or infinite entries"),
        Condition(
            detached.min() < 0,
            ROWS_POSITIVE,
            lambda: f"entries down to {float(detached.min()):.3g}",
        ),
        Condition(
            (sums - 1).abs().max() > tolerance,
            ROWS_SUM,
            lambda: f"sums from {float(sums.min()):.3g} to {float(sums.max()):.3g}",
        ),
    ]
    if deferred is None:
        raise_first(conditions)
    else:
        deferred += conditions
    counts = rows.sum(0)
    return Membership(None, rows, torch.where(counts > _ABSENT * len(rows), counts, 0))
