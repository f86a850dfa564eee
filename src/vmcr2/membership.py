"""Class membership Π: checked once on entry, then held in the one form the mathematics needs.

Inside the package a membership is a `Membership`. Per-class work goes through `Membership.groups`: classes of similar
size in one padded batch, so that nothing builds the k×m×m matrices of eq. (1) and only classes with a sample are
touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vmcr2.checks import Condition, check_count, check_tensor, feature_conditions, read_conditions
from vmcr2.errors import InputError
from vmcr2.linalg import is_batched, is_tracked, one_for_zero, product, wide_dtype

_ABSENT = 1e-15  # a class with a smaller share of the samples counts as absent: its part in any rate is below rounding
_LARGEST_LABEL = 10_000_000  # beyond this, num_classes was probably forgotten
_GROUP_ELEMENTS = 2**25  # entries of the largest padded tensor a group may need
_MERGED = 2**22  # p n² d for p classes of at most n samples: up to here padding costs less than another group
_MOMENT_ELEMENTS = 2**24  # entries of the moments, or of the rows they are made of, held at once
_TOLERANCE_16_BITS = 1e-2  # for the sums of rows held in 16 bits
_DENSE = 0.125  # from this share of entries above 0, soft rows are used whole


@dataclass(frozen=True)
class ClassGroup:
    """A batch of sets of samples, each with the classes that weight it; padding has weight 0.

    With labels, or soft rows with few entries, each set has one class (c = 1) and only its samples; sets of similar
    size are batched. Dense soft rows give a single set: all samples, weighted for all classes (b = 1, n = m, c = k).

    Attributes:
        classes: the classes of each set, (b, c).
        rows: the samples of each set, (b, n); padding may name any sample. None: all samples in order.
        weights: Π of each, (b, n, c).
        counts: n_j, (b, c).
    """

    classes: Int[Tensor, "b c"]
    rows: Int[Tensor, "b n"] | None
    weights: Float[Tensor, "b n c"]
    counts: Float[Tensor, "b c"]

    @property
    def shares(self) -> Float[Tensor, "b n c"]:
        """Π_ij / n_j, or 0 for a class without a sample, which can occur only under `torch.vmap`."""
        return self.weights / one_for_zero(self.counts)[:, None]

    def take(self, values: Float[Tensor, "m d"]) -> Float[Tensor, "b n d"]:
        """Returns each set's rows. Differentiable."""
        if self.rows is None:
            return values[None]
        return values.index_select(0, self.rows.flatten()).view(*self.rows.shape, values.shape[1])

    def split(self, width: int) -> Iterator[ClassGroup]:
        """Yields the group a few classes at a time, so that their moments of (width, width) fit in memory."""
        b, n, _ = self.weights.shape
        at_once = max(1, _MOMENT_ELEMENTS // (b * max(n, width) * width))
        parts = (self.classes.split(at_once, 1), self.weights.split(at_once, 2), self.counts.split(at_once, 1))
        for classes, weights, counts in zip(*parts, strict=True):
            yield ClassGroup(classes, self.rows, weights, counts)


def moments(rows: Float[Tensor, "b n d"], weights: Float[Tensor, "b n c"]) -> Float[Tensor, "b c d d"]:
    """Returns Σ_i w_ij z_i z_iᵀ: C_j if the weights are a group's `shares`, n_j C_j if they are its `weights`.

    Args:
        rows: the features Z as `ClassGroup.take` returns them.
        weights: w, for each of the c classes of a set.

    Returns:
        A d×d matrix for each class. Differentiable, and linear in the weights.
    """
    each = rows[:, None].expand(-1, weights.shape[2], -1, -1)
    return product(each.mT, each * weights.mT[..., None])


def weighted_rows(rows: Float[Tensor, "b n d"], weights: Float[Tensor, "b n c"]) -> Float[Tensor, "b c n d"]:
    """Returns √w_ij z_i, for each class the n×d root of its matrix in `moments`; not differentiable at w = 0."""
    return rows[:, None] * weights.mT[..., None].sqrt()


@dataclass(frozen=True)
class Membership:
    """Π as labels (hard) or as rows that sum to one (soft), with n_j = ⟨1, Π_j⟩; exactly one form is not None.

    Attributes:
        labels: (m,), or None.
        soft: (m, k), or None.
        counts: n_j, (k,), in the dtype of the computation.
        sizes: how many samples each class has a share in, (k,), on the CPU: all later shapes depend on it.
        batch_size: m of the batch that these samples and classes are a part of; None if they are all of it.
    """

    labels: Int[Tensor, " m"] | None
    soft: Float[Tensor, "m k"] | None
    counts: Float[Tensor, " k"]
    sizes: Int[Tensor, " k"]
    batch_size: int | None = None
    _packed: dict[tuple[int, bool], list[ClassGroup]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_classes(self) -> int:
        """The number of classes k, including absent ones."""
        return self.counts.shape[0]

    @property
    def num_samples(self) -> int:
        """The number of samples m, in the whole batch if this is a part of one."""
        return len(self.rows_or_labels) if self.batch_size is None else self.batch_size

    @property
    def rows_or_labels(self) -> Tensor:
        """The form that is not None."""
        value = self.soft if self.labels is None else self.labels
        assert value is not None
        return value

    @property
    def is_learned(self) -> bool:
        """Whether derivatives in Π are needed, so that entries of 0 count too."""
        return self.soft is not None and is_tracked(self.soft)

    @property
    def class_weights(self) -> Float[Tensor, " k"]:
        """γ_j = n_j / m."""
        return self.counts / self.num_samples

    @cached_property
    def present(self) -> Int[Tensor, " p"]:
        """The classes that have a sample, on the device."""
        return self.sizes.nonzero()[:, 0].to(self.counts.device)

    def spread(self, values: Float[Tensor, "k q"]) -> Float[Tensor, "m q"]:
        """Returns Π V: for each sample, the values of its class."""
        if self.labels is not None:
            return values.index_select(0, self.labels)
        assert self.soft is not None
        return product(self.soft, values)

    def collect(self, values: Float[Tensor, "m q"]) -> Float[Tensor, "k q"]:
        """Returns Πᵀ V: the sum over each class's samples."""
        if self.labels is not None:
            return values.new_zeros(self.num_classes, values.shape[1]).index_add(0, self.labels, values)
        assert self.soft is not None
        return product(self.soft.mT, values)

    def to(self, dtype: torch.dtype) -> Membership:
        """Returns the membership with its weights in a dtype."""
        if self.counts.dtype == dtype:
            return self
        soft = None if self.soft is None else self.soft.to(dtype)
        return Membership(self.labels, soft, self.counts.to(dtype), self.sizes, self.batch_size)

    def detach(self) -> Membership:
        """Returns the membership without gradient."""
        if self.soft is None or not self.soft.requires_grad:
            return self
        return Membership(None, self.soft.detach(), self.counts.detach(), self.sizes, self.batch_size)

    def among_present(self) -> Membership:
        """Returns the membership among only the classes of `present`, numbered in their order."""
        if len(self.present) == self.num_classes:
            return self
        sizes = self.sizes[self.sizes > 0]
        if self.labels is None:
            assert self.soft is not None
            return Membership(None, self.soft[:, self.present], self.counts[self.present], sizes, self.batch_size)
        places = torch.zeros_like(self.counts, dtype=torch.long)
        places[self.present] = torch.arange(len(self.present), device=places.device)
        return Membership(places[self.labels], None, self.counts[self.present], sizes, self.batch_size)

    def groups(self, width: int, *, merged: bool = False) -> list[ClassGroup]:
        """Returns the classes that have a sample, as `ClassGroup`s; computed once.

        A group holds classes whose sizes lie within a factor of two, so padding at most doubles the work however
        unbalanced the classes are. Rows of weight 0 are left out, unless the membership itself is being learned.

        Args:
            width: entries per row (the feature dimension); bounds the memory a batch may use.
            merged: whether the classes of a small batch may form a single group whatever their sizes. This saves calls,
                the main cost of a small step; for callers that work on rows, not on a matrix per class.
        """
        if (width, merged) not in self._packed:
            self._packed[width, merged] = list(self._pack(width, merged))
        return self._packed[width, merged]

    def _pack(self, width: int, merged: bool) -> Iterator[ClassGroup]:
        device = self.counts.device
        sizes, total = self.sizes, int(self.sizes.sum())
        if total == 0:  # a rank of a sharded dictionary may have no sample of its classes
            return
        if self.soft is not None and (total >= _DENSE * self.soft.numel() or self.is_learned):
            yield ClassGroup(
                self.present[None], None, self.soft[None][..., self.present], self.counts[None, self.present]
            )
            return
        if self.labels is not None:
            order, weights = torch.argsort(self.labels, stable=True), None
        else:
            assert self.soft is not None
            classes, order = shared_in(self.soft, self.counts).T.nonzero(as_tuple=True)
            weights = self.soft[order, classes]
        starts = (sizes.cumsum(0) - sizes).to(device)
        present = sizes > 0
        if merged and int(present.sum()) * int(sizes.max()) ** 2 * width <= _MERGED:
            buckets = torch.zeros_like(sizes)
        else:  # frexp's exponent is the number of binary digits: one bucket for sizes within a factor of two
            buckets = torch.frexp(sizes.double()).exponent
        for bucket in buckets[present].unique().tolist():
            members = (buckets == bucket).logical_and(present).nonzero()[:, 0]
            n = int(sizes[members].max())
            for chosen in members.split(max(1, _GROUP_ELEMENTS // (n * width))):
                lengths, chosen_there = sizes[chosen].to(device), chosen.to(device)
                steps = torch.arange(n, device=device)
                inside = steps < lengths[:, None]
                places = torch.where(inside, starts[chosen_there, None] + steps, 0)
                packed = inside.to(self.counts.dtype) if weights is None else weights[places] * inside
                yield ClassGroup(
                    chosen_there[:, None], order[places], packed[..., None], self.counts[chosen_there, None]
                )


def as_membership(
    features: Tensor, membership: Tensor, num_classes: int | None, *, unit: bool = False, name: str = "membership"
) -> Membership:
    """Checks features and membership together and returns the membership in the form used inside the package.

    Args:
        features: (m, d), floating point and finite; with `unit`, rows of norm 1.
        membership: integer labels (m,) in [0, k), or rows (m, k) ≥ 0 that sum to one.
        num_classes: k, or None to take it from the membership (labels: the largest + 1).
        unit: whether rows must have norm 1.
        name: the caller's name for the membership.

    Raises:
        InputError: an argument is wrong; names it, what is required and what was given.
    """
    return read_membership(features, membership, num_classes, unit=unit, name=name)[0]


def read_membership(
    features: Tensor,
    membership: Tensor,
    num_classes: int | None,
    *,
    feature_dim: int | None = None,
    unit: bool = False,
    beside: Tensor | None = None,
    counted: bool = True,
    name: str = "membership",
) -> tuple[Membership, Tensor | None]:
    """Does what `as_membership` does, reading the checks, the class sizes and `beside` from the device in one transfer.

    Args:
        features: as for `as_membership`.
        membership: likewise.
        num_classes: likewise.
        feature_dim: the required d, or None.
        unit: as for `as_membership`.
        beside: a vector to read from the device in the same transfer, or None.
        counted: whether to count the classes of labels. If not, nothing with k entries is made, and the membership has
            no classes: it is for `part_of` only.
        name: as for `as_membership`.

    Returns:
        The membership, and `beside` on the CPU.

    Raises:
        InputError: an argument is wrong; names it, what is required and what was given.
    """
    conditions = feature_conditions(features, feature_dim=feature_dim, unit=unit)
    if num_classes is not None:
        check_count("num_classes", num_classes)
    check_tensor(name, membership, "of labels (m,) or rows (m, k)", integers=True)
    m = features.shape[0]
    if membership.ndim not in (1, 2) or membership.shape[0] != m:
        raise InputError(
            f"{name} must have shape ({m},) or ({m}, k) to match features {tuple(features.shape)}, "
            f"got {tuple(membership.shape)}"
        )
    if membership.device != features.device:
        raise InputError(f"{name} must be on the features' device {features.device}, got {membership.device}")
    if membership.ndim == 2:
        return _from_rows(membership, num_classes, conditions, wide_dtype(features), beside, name)
    return _from_labels(membership, num_classes, conditions, wide_dtype(features), beside, counted, name)


def part_of(
    features: Float[Tensor, "m d"], rows_or_labels: Tensor, classes: range
) -> tuple[Float[Tensor, "n d"], Membership]:
    """Returns the part of a batch that concerns some classes; γ is still their share of the whole batch.

    Args:
        features: Z of the whole batch, checked. Differentiable, as the membership is.
        rows_or_labels: labels (m,), int64, or rows (m, k), checked.
        classes: which of the k classes.

    Returns:
        With labels the samples of those classes, with rows all samples; and Π among those classes, numbered from 0.
    """
    dtype = wide_dtype(features)
    if rows_or_labels.ndim == 2:
        soft = rows_or_labels[:, classes.start : classes.stop].to(dtype)
        counts, sizes = _counted(soft)
        return features, Membership(None, soft, counts, sizes.cpu(), len(features))
    places = ((rows_or_labels >= classes.start) & (rows_or_labels < classes.stop)).nonzero()[:, 0]
    labels = rows_or_labels[places] - classes.start
    sizes = torch.bincount(labels, minlength=len(classes))
    return features.index_select(0, places), Membership(labels, None, sizes.to(dtype), sizes.cpu(), len(features))


def _read_sizes(
    conditions: list[Condition], sizes: Tensor, beside: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Reads all that a step needs on the host; sizes are None if `torch.vmap` has batched them."""
    on_host = read_conditions(conditions, sizes if beside is None else torch.cat([sizes.double(), beside.double()]))
    if on_host is None:
        return None, None
    return on_host[: len(sizes)].long(), None if beside is None else on_host[len(sizes) :]


def _from_labels(
    labels: Tensor,
    num_classes: int | None,
    conditions: list[Condition],
    dtype: torch.dtype,
    beside: Tensor | None,
    counted: bool,
    name: str,
) -> tuple[Membership, Tensor | None]:
    named = name if name == "labels" else f"{name} labels"
    if labels.is_floating_point():
        raise InputError(
            f"{named} must be of an integer dtype, got {labels.dtype}; "
            "soft membership has shape (m, k), one row per sample"
        )
    if is_batched(labels):
        raise InputError(f"{name} must be the same across the batch of torch.vmap, got labels that differ")
    labels = labels.long()
    lowest, highest = labels.min(), labels.max()
    limit = _LARGEST_LABEL if num_classes is None else num_classes
    could_be_told = num_classes is None and name == "membership"
    conditions.append(
        Condition(
            (lowest < 0) | (highest >= limit),
            f"{named} must lie in [0, {limit})",
            lambda: (
                f"labels from {int(lowest)} to {int(highest)}"
                + ("; pass num_classes if they are right" if could_be_told and int(highest) >= limit else "")
            ),
        )
    )
    if num_classes is None:
        read_conditions(conditions)
        conditions, num_classes = [], int(highest) + 1
    sizes = torch.zeros(num_classes if counted else 0, dtype=torch.long, device=labels.device)
    if counted:
        sizes.index_add_(0, labels.clamp(0, num_classes - 1), torch.ones_like(labels))
    on_host, beside = _read_sizes(conditions, sizes, beside)
    assert on_host is not None
    return Membership(labels, None, sizes.to(dtype), on_host), beside


def _from_rows(
    rows: Tensor,
    num_classes: int | None,
    conditions: list[Condition],
    dtype: torch.dtype,
    beside: Tensor | None,
    name: str,
) -> tuple[Membership, Tensor | None]:
    hint = "; labels have shape (m,), not (m, 1)" if rows.shape[1] == 1 else ""
    if rows.shape[1] == 0 or (num_classes is not None and rows.shape[1] != num_classes):
        raise InputError(
            f"{name} rows must have num_classes = {num_classes or 'at least 1'} entries, got shape {tuple(rows.shape)}"
            + hint
        )
    coarse = rows.is_floating_point() and torch.finfo(rows.dtype).bits == 16
    tolerance = _TOLERANCE_16_BITS if coarse else 1e-4
    rows = rows.to(dtype)
    detached = rows.detach()
    sums = detached.sum(1)
    conditions += [
        Condition(~detached.isfinite().all(), f"{name} rows must be finite", lambda: "NaN or infinite entries"),
        Condition(
            detached.min() < 0,
            f"{name} rows must be >= 0",
            lambda: f"entries down to {float(detached.min()):.3g}",
        ),
        Condition(
            (sums - 1).abs().max() > tolerance,
            f"{name} rows must sum to 1",
            lambda: (
                f"sums from {float(sums.min()):.6g} to {float(sums.max()):.6g}"
                + hint
                + (
                    "; divide the rows by their sums, as is needed if they were computed in 16 bits"
                    if bool(((sums - 1).abs() <= _TOLERANCE_16_BITS).all())
                    else ""
                )
            ),
        ),
    ]
    if coarse:  # their rounding would make ΔR negative; a gradient sees a constant here, as of rows that need none
        rows = rows / one_for_zero(sums)[:, None]
    counts, sizes = _counted(rows)
    on_host, beside = _read_sizes(conditions, sizes, beside)
    # Under vmap nothing can be read: every class may then have every sample.
    sizes = torch.full((rows.shape[1],), len(rows), device="cpu") if on_host is None else on_host
    return Membership(None, rows, counts, sizes), beside


def _counted(rows: Float[Tensor, "m k"]) -> tuple[Float[Tensor, " k"], Int[Tensor, " k"]]:
    """Returns n_j (0 for a class that counts as absent), and how many samples have a share in each class."""
    counts = rows.sum(0)
    counts = torch.where(counts > _ABSENT * len(rows), counts, 0)
    return counts, shared_in(rows, counts).sum(0)


def as_rows(rows_or_labels: Tensor, num_classes: int, dtype: torch.dtype) -> Float[Tensor, "m k"]:
    """Returns soft rows in a dtype: those given, or those of labels."""
    if rows_or_labels.ndim == 1:
        rows_or_labels = nn.functional.one_hot(rows_or_labels, num_classes)
    return rows_or_labels.to(dtype)


def shared_in(rows: Float[Tensor, "m k"], counts: Float[Tensor, " k"]) -> Bool[Tensor, "m k"]:
    """Returns which samples have a share in which classes, except classes that count as absent."""
    return (rows.detach() > 0) & (counts > 0)
