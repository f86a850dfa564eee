"""The objectives as PyTorch criteria: `MCR2Loss` (exact, eq. 1), `VMCR2Loss` (variational, eq. 7), and, without
labels, `TotalCodingRateLoss` (R alone).

Under torch.distributed each gathers the batch over the ranks and computes one loss of the whole, identical everywhere;
with DistributedDataParallel's mean over ranks the gradients are those of a single process.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from vmcr2.checks import (
    UNIT_NORM_TOLERANCE,
    Condition,
    check_choice,
    check_count,
    check_flag,
    check_number,
    check_tensor,
    feature_conditions,
    iterator_of,
    pair_of,
    read_conditions,
)
from vmcr2.collapse import CollapseWatch, advice_on_balance
from vmcr2.dictionary import Dictionary, Structure, ascending_step, paper_step
from vmcr2.distributed import (
    Shards,
    agree,
    broadcast,
    check_group,
    gather_rows,
    process_rank,
    require_equal,
    world_size,
)
from vmcr2.errors import InputError, NotLatchedError, NumericalError
from vmcr2.latching import MomentStream, batch_statistics, latched_blocks
from vmcr2.linalg import check_eps_sq, is_batched, rate_dtype, require_finite, untraced, wide_dtype
from vmcr2.membership import Membership, as_membership, as_rows, part_of, read_membership
from vmcr2.mismatch import Codes, mismatch, precise_mismatch
from vmcr2.rates import checked_rates, expansion_rate, largest_norm
from vmcr2.sampling import position_kept
from vmcr2.subspaces import default_components, nearest_in_dictionary
from vmcr2.variational import VariationalRates, objective

Step = Literal["ascent", "paper", "simultaneous"]
Reduction = Literal["mean", "sum"]

# Ranks that hold the same dictionary take the same steps, but GPUs may sum in another order each time, and the paper's
# steps multiply such a rounding: after so many steps the first rank's dictionary is given to all again.
_STEPS_ALIKE = 50
_ROWS = 4096  # rows of each rank gathered at once if the dictionary is sharded
_CANCELLED = 0.05  # below this share of its terms a float32 mismatch is computed again in float64
# If µ follows from `balance`, the first steps hold the dictionary back: ρ starts this many times higher and falls by a
# constant factor. An untrained network without BatchNorm maps all samples to nearly one direction; a dictionary running
# ahead would push them all together, and at a high learning rate they would never separate (results/defaults.md).
_FIRST_BALANCE = 6.0
_BALANCE_DECAY = 0.97
_HEAVIEST = 1e30  # largest weight of R: up to it float32 holds the loss and its gradient
_SPOILT = (
    "the dictionary holds NaN or infinite entries, or codes (or mu) so large that the loss overflows; load it or latch "
    "it anew"
)


class _OverRanks(nn.Module):
    """A loss of the batch of all ranks in a process group; copies of the loss share the group.

    Settings are checked whenever they are assigned, so a schedule may change them between steps; whether ε² suits d is
    checked in each step.
    """

    _checks: ClassVar[dict[str, Callable[[str, Any], Any]]] = {"eps_sq": check_number}
    _fixed: ClassVar[tuple[str, ...]] = ("process_group",)  # the buffers, and what ranks share, depend on these

    def __init__(self, process_group: Any) -> None:
        super().__init__()
        check_group(process_group)
        self.process_group = process_group

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._fixed and (name in self.__dict__ or isinstance(getattr(type(self), name, None), property)):
            raise InputError(
                f"{name} cannot change once the loss is made (it is {getattr(self, name)!r}), got {value!r}"
            )
        check = self._checks.get(name)
        super().__setattr__(name, value if check is None else check(name, value))

    def _settings(self) -> dict[str, int | str]:
        """Returns what must be the same in all ranks' losses."""
        return {"settings of the loss, see repr(loss), by a checksum": zlib.crc32(self.extra_repr().encode())}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self.process_group)] = self.process_group
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def _facts(features: Tensor, membership: Membership) -> dict[str, int | str]:
    """Returns what must be the same on all ranks for a batch that has been checked."""
    return {
        "the dimension of features": features.shape[1],
        "the dtype of features": str(features.dtype),
        "the kind of membership": "soft rows" if membership.labels is None else "labels",
        "gradients": _gradients(features, membership.rows_or_labels),
    }


def _gradients(features: Tensor, rows_or_labels: Tensor) -> str:
    """Returns which of the two carry gradients, each of which takes a collective in the backward pass."""
    if not torch.is_grad_enabled():
        return "without gradient"
    if features.requires_grad:
        return "with gradient in both" if rows_or_labels.requires_grad else "with gradient"
    return "with gradient in the membership alone" if rows_or_labels.requires_grad else "without gradient"


class MCR2Loss(_OverRanks):
    """−ΔR of eq. (1), to be minimised: exact, computed on the smaller side of every matrix.

    It is negative when training goes well, since ΔR ≥ 0 is maximised.

    Args:
        num_classes: k ≥ 1. A batch may lack any of them.
        eps_sq: the squared precision ε² > 0.
        process_group: the ranks whose batches form one; None for all.

    Raises:
        InputError: a wrong argument (a ValueError).
    """

    _fixed = (*_OverRanks._fixed, "num_classes")

    def __init__(self, num_classes: int, *, eps_sq: float = 0.5, process_group: Any = None) -> None:
        super().__init__(process_group)
        self.num_classes = check_count("num_classes", num_classes)
        self.eps_sq = eps_sq

    @untraced
    def forward(
        self, features: Float[Tensor, "m d"], membership: Int[Tensor, " m"] | Shaped[Tensor, "m k"]
    ) -> Float[Tensor, ""]:
        """Returns −ΔR of the batch.

        Args:
            features: Z, (m, d), finite, rows of norm 1 (ΔR is unbounded otherwise).
            membership: labels (m,) in [0, num_classes), or rows (m, num_classes) ≥ 0 that sum to 1.

        Raises:
            InputError: a wrong argument (a ValueError).
            NumericalError: the factorisation failed.
        """

        def prepare() -> tuple[Membership, list[int]]:
            return as_membership(features, membership, self.num_classes, unit=True), [len(features)]

        def facts(checked: Membership) -> dict[str, int | str]:
            return {"num_classes": self.num_classes} | self._settings() | _facts(features, checked)

        checked, brought = agree(prepare, facts, "MCR2Loss", self.process_group)
        gathered, rows_or_labels = gather_rows(
            features, checked.rows_or_labels, shares=[rows for (rows,) in brought], group=self.process_group
        )
        if gathered is not features:
            checked = as_membership(gathered, rows_or_labels, self.num_classes, unit=True)
        loss = -checked_rates(gathered, checked, self.eps_sq).reduction
        require_finite(loss)
        return loss.to(wide_dtype(features))

    def extra_repr(self) -> str:
        """Returns the settings, for `repr`."""
        return f"num_classes={self.num_classes}, eps_sq={self.eps_sq}"


class TotalCodingRateLoss(_OverRanks):
    """−R of eq. (1), to be minimised: it spreads features over all directions, without labels.

    This is the term against collapse in EMP-SSL (Tong et al., 2023), SimDINO (Wu et al., 2025) and the like; add a loss
    that pulls the views of one image together. Minimising it expands: spread features have the lowest value.

    Args:
        eps_sq: the squared precision ε² > 0; the default is EMP-SSL's, whose code calls it `eps`.
        process_group: the ranks whose views are gathered; None for all.

    Raises:
        InputError: a wrong argument (a ValueError).
    """

    def __init__(self, eps_sq: float = 0.2, *, process_group: Any = None) -> None:
        super().__init__(process_group)
        self.eps_sq = eps_sq

    @untraced
    def forward(
        self, features: Float[Tensor, "m d"] | Float[Tensor, "b m d"] | Sequence[Float[Tensor, "_ d"]]
    ) -> Float[Tensor, ""]:
        """Returns minus the mean of R over the views.

        Args:
            features: Z of one view (m, d), of b views (b, m, d), or a sequence of views (n, d) that may differ in n.
                Finite, rows of norm 1, or less if they are means of such rows (R is unbounded otherwise). Every rank
                must pass the same number of views.

        Raises:
            InputError: a wrong argument (a ValueError).
            NumericalError: the factorisation failed.
        """
        views, brought = agree(
            lambda: _checked_views(features),
            lambda views: self._settings() | _view_facts(views),
            "TotalCodingRateLoss",
            self.process_group,
        )
        if len(brought) > 1:
            sizes = torch.tensor([len(view) for view in views], device=views[0].device)
            rows, sizes = gather_rows(
                torch.cat(views), shares=[count for (count,) in brought], group=self.process_group
            ) + gather_rows(sizes, shares=[len(views)] * len(brought), group=self.process_group)
            parts = rows.split(sizes.tolist())
            views = [torch.cat(parts[number :: len(views)]) for number in range(len(views))]
        dtype = rate_dtype(views[0].shape[1], self.eps_sq, *views, largest=largest_norm(*views))
        rates = torch.stack([expansion_rate(view.to(dtype), self.eps_sq) for view in views])
        require_finite(rates)
        return -rates.mean().to(wide_dtype(*views))

    def extra_repr(self) -> str:
        """Returns the settings, for `repr`."""
        return f"eps_sq={self.eps_sq}"


def _checked_views(features: Any) -> tuple[list[Tensor], list[int]]:
    """Returns the views, and their total number of rows."""
    form = "a torch.Tensor of shape (m, d) or (b, m, d), or a sequence of views (n, d)"
    if isinstance(features, Tensor):
        check_tensor("features", features, "of shape (m, d) or (b, m, d)")
        views = [features] if features.ndim == 2 else list(features) if features.ndim == 3 else []
    else:
        views = list(iterator_of("features", features, form))
    if not views:
        got = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else "an empty sequence"
        raise InputError(f"features must be {form}, got {got}")
    read_conditions([condition for view in views for condition in (*feature_conditions(view), _longest(view))])
    widths = sorted({view.shape[1] for view in views})
    if len(widths) > 1:
        raise InputError(f"features must be views of one dimension, got {', '.join(map(str, widths))}")
    return views, [sum(len(view) for view in views)]


def _view_facts(views: list[Tensor]) -> dict[str, int | str]:
    gradient = torch.is_grad_enabled() and any(view.requires_grad for view in views)
    return {
        "the dimension of features": views[0].shape[1],
        "the number of views": len(views),
        "the dtype of features": str(views[0].dtype),
        "gradients": "with gradient" if gradient else "without gradient",
    }


def _longest(features: Float[Tensor, "m d"]) -> Condition:
    longest = torch.linalg.vector_norm(features.detach(), dim=1, dtype=wide_dtype(features)).max()
    return Condition(
        longest > 1 + UNIT_NORM_TOLERANCE,
        "features must have rows of norm 1 at most (R is unbounded otherwise)",
        lambda: f"norms up to {float(longest):.3g}; end the network with torch.nn.functional.normalize(z, dim=1)",
    )


def balanced_mu(feature_dim: int, batch_size: int, *, eps_sq: float = 0.5, balance: float = 0.05) -> float:
    """Returns the µ at which the residual weighs ρ = µ m ε² / d against the rates in the dictionary's step.

    A good µ depends on batch size and dimension; a good ρ hardly does (docs/choosing.md). From ρ of about 1 the
    dictionary no longer leads the features, and they may collapse; the paper's µ = 1 has ρ from 2 to 10.

    Args:
        feature_dim: d ≥ 1.
        batch_size: m ≥ 1, of all ranks together.
        eps_sq: ε² > 0.
        balance: ρ > 0.

    Raises:
        InputError: a wrong argument (a ValueError).
    """
    check_count("feature_dim", feature_dim)
    check_count("batch_size", batch_size)
    eps_sq, balance = check_number("eps_sq", eps_sq), check_number("balance", balance)
    check_eps_sq(feature_dim, eps_sq)
    return balance * feature_dim / (batch_size * eps_sq)


def balance_at(mu: float, feature_dim: int, batch_size: int, eps_sq: float) -> float:
    """Returns ρ = µ m ε² / d, the residual's weight against the rates; `balanced_mu` turns it into µ.

    Args:
        mu: µ > 0.
        feature_dim: d ≥ 1.
        batch_size: m ≥ 1, of all ranks together.
        eps_sq: ε² > 0.
    """
    return mu * batch_size * eps_sq / feature_dim


@dataclass(frozen=True)
class _Batch:
    """The batch of all ranks, and the part of it that this rank works on.

    Attributes:
        features: Z; if the dictionary is sharded, the part that concerns this rank's classes. Differentiable.
        membership: Π of `features`.
        whole: Z of all classes.
        rows_or_labels: labels or soft rows of all classes.
        confined: whether the step is the ascent, the dictionary shared, and every class keeps to its own atoms, so that
            block structure gives the same.
        latched: whether any rank's part of a sharded dictionary has been latched; None if it is not sharded.
    """

    features: Float[Tensor, "n d"]
    membership: Membership
    whole: Float[Tensor, "m d"]
    rows_or_labels: Tensor
    confined: bool
    latched: bool | None


class _Stepped(NamedTuple):
    """The result of a step.

    Attributes:
        membership: Π among the dictionary's classes.
        dictionary: the dictionary after the step.
        mismatch: M/2m between it and the features, and what `pull` adds. Differentiable.
        flags: whether all is finite, whether the mismatch lost its digits to cancellation, and whether no code beyond
            a class's own atoms would have risen.
    """

    membership: Membership
    dictionary: Codes
    mismatch: Float[Tensor, ""]
    flags: Bool[Tensor, " 3"]


def _number_or_none(name: str, value: float | None) -> float | None:
    return None if value is None else check_number(name, value)


# Checks of `VMCR2Loss`'s settings, by name; recipes and estimators call them under names of their own. Each takes the
# setting's name for messages and its value, and returns the value to keep.
SETTING_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "mu": _number_or_none,
    "eps_sq": check_number,
    "balance": check_number,
    "energy": _number_or_none,
    "pull": partial(check_number, at_most=1.0),
    "expand": partial(check_number, positive=False),
    "step_atoms": check_number,
    "step_codes": check_number,
    "reduction": partial(check_choice, choices=get_args(Reduction)),
    "structure": partial(check_choice, choices=get_args(Structure)),
    "step": partial(check_choice, choices=get_args(Step)),
}


class VMCR2Loss(_OverRanks):
    """The variational objective of eq. (7): a dictionary that leads the features, and features that follow it.

    In training mode a call first moves the dictionary by one step (Alg. 1, lines 6 to 10) and returns the mismatch
    between the features and the moved dictionary, whose gradient in the features is line 12. In eval mode, and whenever
    gradients are off (`torch.no_grad`, `torch.inference_mode`), it returns the mismatch with the present dictionary and
    changes nothing. With gradient accumulation the dictionary moves once per micro-batch, even under
    DistributedDataParallel's `no_sync`, which defers only the mean of the network's gradients
    (docs/many-processes.md).

    A class is latched the first time training sees it: call `latch` or `latch_from` before training so that all
    classes start from all their samples, or let the first batches do it. In a shared dictionary, a class first seen
    much later overwrites its own atoms, which other classes may already be using.

    With labels, a training step reads from the device twice: the checks of the batch and the sizes of its classes
    before it, and whether the result is finite after it. Further reads are:

    - ΔR every twentieth step, for the warning of collapse;
    - which classes have been latched, until all have;
    - for soft rows with few entries, how to pack them;
    - for a sharded dictionary, what each rank keeps of the batch;
    - for a shared one, whether the result is finite once more, in the step in which classes begin to use each other's
      atoms: it is computed twice.

    Settings may change between steps, by assignment (`loss.mu = 0.3`), in the same way on all ranks; num_classes,
    feature_dim, atoms_per_class, structure, sharded and process_group may not.

    Args:
        num_classes: k ≥ 1. A batch may lack any of them.
        feature_dim: d ≥ 1.
        atoms_per_class: s = q/k, from 1 to d; None means ⌊d/k⌋, at least 1.
        mu: the penalty weight µ > 0; None means the µ that `balance` gives at the present batch size. The paper has 1.
        eps_sq: the squared precision ε² > 0.
        reduction: "mean": M/2m² = ½ Σ_j γ_j ‖C_j − B_j‖²_F, free of µ, m and d, so that one learning rate suits all;
            "sum": (µ/2m) M, as in the paper. The gradient's direction is the same.
        structure: "shared": every class may use every atom, codes (q, k). "block": class j uses its own s atoms only,
            codes (s, k); classes cost nothing while absent.
        balance: ρ = µ m ε²/d > 0, the residual's weight against the rates in the dictionary's step. Not used if mu is
            given. The first 60 training steps use up to 6 times as much, so that features that are still all alike are
            not left behind.
        energy: what the codes of a class sum to, from its first step on; 1 is the trace of C_j. Latching follows
            Algorithm 2 whatever this is: its codes sum to the part of that trace in s directions. None leaves the sum
            free, as the paper does: it then grows (the more so the smaller ρ is) and presses each class together.
        pull: exponent in (0, 1]. 1 is eq. (7), in which the pull into its class vanishes for a feature orthogonal to
            it: this limits the effect of wrong labels, but is slow when features start far from their classes. Any
            value below 1 pulls distant features harder, by u^(pull − 1), where u is the share of a feature's energy in
            its class; below ½ the most distant are pulled hardest: for natural images from scratch (docs/choosing.md).
        expand: λ ≥ 0, the weight of the features' own R of eq. (1) beside the residual: the loss is (µ/2m) M − λ R or,
            with "mean", that divided by µ m (= ρ d/ε² if µ follows from `balance`). 0 is Algorithm 1, in which only the
            dictionary expands. Larger values keep more of the variety within a class, for one log-determinant a step;
            the loss may be negative. Use 0.2 to 0.6, and `pull` near 0.3: at 1, samples that R pushes out of their
            class are let go. With many classes and a long run, setting it to 0 part-way is more accurate
            (docs/choosing.md).
        step: "ascent": eq. (7) at the step's µ never falls, no step size. "paper": the paper's Lipschitz bounds, the
            codes' gradient at the moved atoms (line 8). "simultaneous": both gradients at the old dictionary.
        step_atoms: ν_Γ > 0, in units of the inverse Lipschitz bound; not used by "ascent".
        step_codes: ν_A > 0, likewise.
        sharded: whether each rank holds the atoms, codes and latched flags of its own range of classes only; requires
            structure "block". The same loss, gradients and steps, in 1/W of the memory on W ranks. Ranks hold
            `torch.chunk`'s ranges; the last may hold fewer classes, or none.
        process_group: the ranks whose batches form one; None for all.

    Attributes:
        dictionary: the `Dictionary`, whose buffers `atoms` and `codes` are part of `state_dict`. If it is sharded, the
            buffers are this rank's, and `state_dict` holds them as DTensors by class, `Shard(0)`: atoms (k, s, d),
            codes (k, s), latched (k,), which `torch.distributed.checkpoint` saves under any number of ranks and loads
            under any other. `full_state_dict` returns an unsharded loss's state; each loads what the other saved.

    Raises:
        InputError: a wrong argument (a ValueError).
    """

    _checks = SETTING_CHECKS
    _fixed = (*_OverRanks._fixed, "num_classes", "feature_dim", "atoms_per_class", "structure", "sharded")

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        *,
        atoms_per_class: int | None = None,
        mu: float | None = None,
        eps_sq: float = 0.5,
        reduction: Reduction = "mean",
        structure: Structure = "shared",
        balance: float = 0.05,
        energy: float | None = None,
        pull: float = 1.0,
        expand: float = 0.0,
        step: Step = "ascent",
        step_atoms: float = 5.0,
        step_codes: float = 5.0,
        sharded: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__(process_group)
        num_classes = check_count("num_classes", num_classes)
        feature_dim = check_count("feature_dim", feature_dim)
        check_eps_sq(feature_dim, check_number("eps_sq", eps_sq))
        if atoms_per_class is None:
            atoms_per_class = default_components(feature_dim, num_classes)
        atoms_per_class = check_count("atoms_per_class", atoms_per_class, at_most=feature_dim, limit="feature_dim")
        self.mu = mu
        self.eps_sq = eps_sq
        self.balance = balance
        self.energy = energy
        self.pull = pull
        self.expand = expand
        self.step_atoms = step_atoms
        self.step_codes = step_codes
        self.reduction: Reduction = reduction
        self.structure: Structure = structure
        self.step: Step = step
        check_flag("sharded", sharded)
        if sharded and structure != "block":
            raise InputError(
                f"sharded requires structure='block', in which classes have atoms of their own, got {structure!r}"
            )
        self.num_classes = num_classes
        self.feature_dim = feature_dim
        self.atoms_per_class = atoms_per_class
        shards = Shards(num_classes, process_group) if sharded else None
        self.dictionary = Dictionary(num_classes, feature_dim, atoms_per_class, structure, shards)
        self._watch = CollapseWatch()

    def mu_at(self, batch_size: int) -> float:
        """Returns µ for a batch of this size: `mu`, or the value that `balance` gives.

        Args:
            batch_size: m ≥ 1, of all ranks together.

        Raises:
            InputError: a wrong argument (a ValueError).
        """
        check_count("batch_size", batch_size)
        if self.mu is not None:
            return self.mu
        return balanced_mu(self.feature_dim, batch_size, eps_sq=self.eps_sq, balance=self.balance)

    @property
    def sharded(self) -> bool:
        """Whether each rank holds only its own range of classes."""
        return self.dictionary.shards is not None

    def _check(self, features: Tensor, membership: Tensor, *, watched: bool = False) -> tuple[Membership, bool]:
        """Returns the membership and, if `watched`, whether classes of a shared dictionary use only their own atoms."""
        shards, beside = self.dictionary.shards, None
        if shards is not None:
            beside = self.dictionary.first_class
        elif watched and self.structure == "shared" and self.step == "ascent":
            beside = self.dictionary.confined()[None]
        if shards is not None and len(shards.own) != len(self.dictionary.latched):
            raise InputError(
                f"sharded: the loss was made to hold {len(self.dictionary.latched)} classes on this rank, whose share "
                f"is now {len(shards.own)}: the number of processes has changed. Construct it after "
                "torch.distributed.init_process_group. To use it in one process later, call full_state_dict() while "
                "all ranks run, and load that into an unsharded loss"
            )
        self._check_device(features)
        checked, on_host = read_membership(
            features,
            membership,
            self.num_classes,
            feature_dim=self.feature_dim,
            unit=True,
            beside=beside,
            counted=not self.sharded,
        )
        if shards is None:
            return checked, on_host is not None and bool(on_host)
        if on_host is not None and int(on_host) != shards.own.start:
            raise InputError(
                f"sharded: this rank holds the classes from {shards.own.start} on, but its dictionary was overwritten "
                f"by those from {int(on_host)} on: DistributedDataParallel overwrites the buffers of whatever it wraps."
                " Wrap only the network, not a module that holds the loss"
            )
        return checked, False

    def _check_device(self, features: Tensor) -> None:
        if is_batched(self.dictionary.atoms):
            raise InputError("the loss's buffers must not be batched by torch.vmap; call the losses one after another")
        if isinstance(features, Tensor) and features.device != self.dictionary.atoms.device:
            raise InputError(
                f"features must be on the loss's device {self.dictionary.atoms.device}, got {features.device}; "
                "move the loss with .to(device)"
            )

    def _batch(self, features: Tensor, membership: Tensor, call: str) -> _Batch:
        """Checks this rank's batch, makes sure that all ranks agree, and gathers theirs."""
        dictionary, group = self.dictionary, self.process_group

        def prepare() -> tuple[tuple[Membership, bool], list[int]]:
            made = self._check(features, membership, watched=True)
            latched = self.sharded and bool(dictionary.known().any())
            return made, [len(features), int(dictionary.changed), int(latched), dictionary.steps_taken]

        (checked, confined), brought = agree(
            prepare, lambda made: self._settings() | _facts(features, made[0]), call, group
        )
        shares, changed, latched, steps = zip(*brought, strict=True)
        several, differ = len(brought) > 1, any(changed) and not self.sharded
        if not differ:
            require_equal("the number of steps that the dictionary has taken", steps, group)
        due = call == "a training step" and steps[0] % _STEPS_ALIKE == 0 and not self.sharded
        if several and (differ or due):
            broadcast(dictionary, group)
        gathered, rows_or_labels = gather_rows(features, checked.rows_or_labels, shares=list(shares), group=group)
        dtype = rate_dtype(self.feature_dim, self.eps_sq, gathered, dictionary.atoms)
        here = gathered
        if dictionary.shards is not None:
            here, checked = part_of(gathered, rows_or_labels, dictionary.shards.own)
        elif gathered is not features:
            checked, confined = self._check(gathered, rows_or_labels, watched=True)
        dictionary.changed = dictionary.changed and not several  # ranks may join later
        return _Batch(
            here.to(dtype),
            checked.to(dtype),
            gathered.to(dtype),
            rows_or_labels,
            confined,
            any(latched) if self.sharded else None,
        )

    def _settings(self) -> dict[str, int | str]:
        """Returns what must be the same in all ranks' losses."""
        return {
            "num_classes": self.num_classes,
            "feature_dim": self.feature_dim,
            "atoms_per_class": self.atoms_per_class,
            "the dtype of the dictionary": str(self.dictionary.atoms.dtype),
            **super()._settings(),
        }

    @untraced
    def forward(
        self, features: Float[Tensor, "m d"], membership: Int[Tensor, " m"] | Shaped[Tensor, "m k"]
    ) -> Float[Tensor, ""]:
        """Returns (µ/2m) M or M/2m² of the batch, less the term of `expand`; in training mode after one step.

        Args:
            features: Z, (m, d), finite, rows of norm 1 (as the unit columns of Γ assume).
            membership: labels (m,) in [0, num_classes), or rows (m, num_classes) ≥ 0 that sum to 1.

        Raises:
            InputError: a wrong argument (a ValueError).
            NotLatchedError: nothing was ever latched, and this call does not latch (a ValueError too).
            NumericalError: the step failed, or R has a larger weight than the loss can hold (the dictionary is then as
                it was); or, without a step, the value is not finite.
        """
        moving = self.training and torch.is_grad_enabled()
        if moving and torch._C._functorch.maybe_current_level() is not None:
            raise InputError(
                "a training step must not be taken within torch.func's grad, jvp, vmap and the like: it changes the "
                "dictionary. Call loss.eval() first; the dictionary is then left alone"
            )
        if moving and torch._C._current_graph_task_id() != -1:
            raise InputError(
                "a training step must not be taken within backward, where torch.utils.checkpoint runs its function "
                "again: the dictionary would move twice. Checkpoint the network, and call the loss outside of it"
            )
        batch = self._batch(features, membership, "a training step" if moving else "an evaluation")
        m = batch.membership.num_samples
        weight = self.expand if self.reduction == "sum" else self.expand / (self.mu_at(m) * m)
        if weight > _HEAVIEST:
            raise NumericalError(
                f"expand gives R the weight {weight:.3g}, more than the loss can hold; lower expand or raise mu"
            )
        if moving:
            new = (batch.membership.sizes > 0) & ~self.dictionary.known()
            with self.dictionary.restored_on_error(new):  # nothing stays latched if the step fails
                self._latch(batch.features.detach(), batch.membership.detach(), new)
                if self._watch.is_due(self.dictionary.steps_taken):
                    balance = balance_at(self.mu_at(m), self.feature_dim, m, self.eps_sq)
                    advice = advice_on_balance(balance, self.mu is not None)
                    self._watch.look(batch.whole.detach(), batch.rows_or_labels.detach(), self.eps_sq, advice)
                value = self._step(batch)
        else:
            value = precise_mismatch(batch.features, *self._part_for(batch), self.pull)
        value = value * self.mu_at(m) if self.reduction == "sum" else value / m
        if weight:
            value = value - weight * expansion_rate(batch.whole, self.eps_sq).double()
        value = value.to(wide_dtype(features))
        if not moving:
            require_finite(value, otherwise=_SPOILT)
        return value

    def _part_for(self, batch: _Batch) -> tuple[Membership, Codes]:
        """Returns the part of the dictionary that a batch involves, as a copy of its present state.

        Raises:
            NotLatchedError: nothing was ever latched.
        """
        latched = bool(self.dictionary.known().any()) if batch.latched is None else batch.latched
        if not latched:
            raise _not_latched()
        among, dictionary = self.dictionary.part_for(batch.membership, batch.features.dtype, confined=batch.confined)
        # Copies, since the buffers may move on before the backward pass.
        return among, dictionary.moved(dictionary.atoms.clone(), dictionary.codes.clone())

    def _step(self, batch: _Batch) -> Tensor:
        """Moves the dictionary and returns the mismatch with it (Alg. 1, lines 6 to 12).

        If every class of a shared dictionary keeps to its own atoms, the step is taken in block structure, of the
        classes that have a sample, without the products of all atoms with each other. It is the same step if no other
        code would rise from 0 (`Ascent.confined`).
        """
        features, membership = batch.features, batch.membership
        mu = self.mu_at(membership.num_samples)
        if self.mu is None:
            mu *= max(1.0, _FIRST_BALANCE * _BALANCE_DECAY**self.dictionary.steps_taken)
        if mu > torch.finfo(features.dtype).max:  # torch would raise an error of its own
            raise _step_failed(self.dictionary)
        stepped = self._stepped(features, membership, mu, batch.confined)
        finite, cancelled, confined = stepped.flags.tolist()  # the step's only read from the device
        if batch.confined and finite and not confined:
            stepped = self._stepped(features, membership, mu, False)
            finite, cancelled, _ = stepped.flags.tolist()
        if not finite:
            raise _step_failed(self.dictionary)
        value = stepped.mismatch
        if cancelled and features.dtype != torch.float64:
            value = precise_mismatch(features, stepped.membership, stepped.dictionary, self.pull)
        self.dictionary.replace(stepped.dictionary, membership)
        self.dictionary.steps_taken += 1
        return value

    def _stepped(self, features: Tensor, membership: Membership, mu: float, confined: bool) -> _Stepped:
        """Returns the result of a step on the dictionary, which itself stays as it is."""
        among, before = self.dictionary.part_for(membership, features.dtype, confined=confined)
        others = self.dictionary.absent_atoms(membership, features.dtype) if confined else None
        with torch.autocast(features.device.type, enabled=False):
            if self.step == "ascent":
                after, projections, energies, overlap, remains_confined = ascending_step(
                    features, among, before, mu=mu, eps_sq=self.eps_sq, energy=self.energy, others=others
                )
            else:
                with torch.no_grad():
                    after = paper_step(
                        features.detach(),
                        among.detach(),
                        before,
                        mu=mu,
                        eps_sq=self.eps_sq,
                        step_atoms=self.step_atoms,
                        step_codes=self.step_codes,
                        at_moved_atoms=self.step == "paper",
                        energy=self.energy,
                        num_classes=self.num_classes,
                    )
                projections, energies, overlap = None, None, None
                remains_confined = features.new_zeros((), dtype=torch.bool)
            value, terms = mismatch(
                features, among, after, self.pull, projections=projections, energies=energies, overlap=overlap
            )
        # The mismatch as it is returned, where it may be infinite though finite in float64.
        factor = self.mu_at(membership.num_samples) if self.reduction == "sum" else 1.0
        returned = (value.detach() * factor).to(features.dtype)
        finite = (after.total(after.atoms.sum() + after.codes.sum()) + returned).isfinite()
        flags = torch.stack([finite, value.detach() < _CANCELLED * terms, remains_confined])
        return _Stepped(among, after, value, flags)

    @torch.no_grad()
    def rates(
        self, features: Float[Tensor, "m d"], membership: Int[Tensor, " m"] | Shaped[Tensor, "m k"]
    ) -> VariationalRates:
        """Returns R^v, R_c^v and the residual (µ/2m) M of eq. (7), for logging; changes nothing, in either mode.

        R^v and R_c^v are those of the dictionary at the batch's class weights. Their difference is not ΔR of the
        features: for that, see `vmcr2.rate_reduction`. Under torch.distributed every rank must call it.

        Args:
            features: Z, (m, d), finite, rows of norm 1.
            membership: labels (m,) or rows (m, num_classes) that sum to 1.

        Raises:
            InputError: a wrong argument (a ValueError).
            NotLatchedError: nothing was ever latched (a ValueError too).
            NumericalError: a factorisation failed.
        """
        batch = self._batch(features, membership, "rates")
        with torch.autocast(batch.features.device.type, enabled=False):
            among, dictionary = self._part_for(batch)
            mu = self.mu_at(batch.membership.num_samples)
            rates = objective(batch.features, among, dictionary, mu=mu, eps_sq=self.eps_sq)
        try:
            require_finite(*rates)
        except NumericalError as error:
            raise (NumericalError(_SPOILT) if _is_spoilt(self.dictionary) else error) from None
        return rates

    @torch.no_grad()
    def latch(self, features: Float[Tensor, "m d"], membership: Int[Tensor, " m"] | Shaped[Tensor, "m k"]) -> None:
        """Sets the dictionary to each class's top singular vectors and values (Alg. 2).

        An absent class keeps what it had. A class of rank below s is completed by orthonormal directions with code 0.
        Under torch.distributed every rank must call it, each with its share.

        Args:
            features: Z, (m, d), finite, rows of norm 1; from as many samples as there are, as training sees them.
            membership: labels (m,) or rows (m, num_classes) that sum to 1.

        Raises:
            InputError: a wrong argument (a ValueError).
            NumericalError: a decomposition did not converge.
        """
        if self.sharded:  # no rank could hold all rows of a large set
            self._latch_shard(_pieces(features, membership), "latch")
            return
        batch = self._batch(features, membership, "latch")
        self._latch(batch.features, batch.membership, batch.membership.sizes > 0)

    @torch.no_grad()
    def _latch(self, features: Tensor, membership: Membership, chosen: Bool[Tensor, " k"]) -> None:
        if bool(chosen.any()):
            with torch.autocast(features.device.type, enabled=False):
                blocks, energies = latched_blocks(features, membership.among_present(), self.atoms_per_class)
            chosen = chosen[membership.sizes > 0].to(blocks.device)
            self.dictionary.latch(blocks, energies, chosen, membership.present)
            self.dictionary.changed = world_size(self.process_group) == 1  # several ranks have latched onto the same

    @torch.no_grad()
    def latch_from(self, model: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Latches onto a model's features of a stream of batches, which need not fit in memory.

        The model runs as in training: normalisation layers use the batch's own statistics (unless they are frozen) and
        leave the running ones alone, since until these have settled the network in eval mode is a different one;
        dropout is off. (This is so for PyTorch's layers and subclasses of them, not within TorchScript, in layers of
        another make, or for a function that runs the layers in threads that were there before the call.) So the batches
        should be shuffled, un-augmented, and of about the training batch size. All modes are restored. Under
        torch.distributed each rank passes its own share, of any number of batches, even none (the same number on every
        rank if the model gathers its weights as it runs, as with FSDP). From a DataLoader with a
        `ClassBalancedBatchSampler` a whole epoch is read, and the sampler's position is restored; a generator around
        the DataLoader hides the sampler, and its position is then not restored.

        Args:
            model: a Module, or any function that calls Modules, mapping inputs to features (m, d) with rows of norm 1.
            batches: pairs (inputs, membership), one pass over the training set. They are moved to the loss's device by
                `to`; inputs may be any object with such a method that the model takes.

        Raises:
            InputError: no batch on any rank, a batch that is wrong or not a pair, or a model that cannot be called (a
                ValueError).
            NumericalError: a decomposition did not converge.
        """
        with batch_statistics(model) as run, position_kept(getattr(batches, "batch_sampler", None)):

            def pairs() -> Iterator[tuple[Tensor, Tensor]]:
                # Drawn where ranks learn of each other's errors; one by one, since a stream may not end.
                if not callable(model):
                    raise InputError(f"model must be a Module or a function, got {type(model).__name__}")
                device = self.dictionary.atoms.device
                for batch in iterator_of("batches", batches, "pairs (inputs, membership)"):
                    inputs, membership = pair_of(batch)
                    yield run(inputs.to(device)), membership.to(device)

            if self.sharded:
                self._latch_shard(pairs(), "latch_from")
            else:
                self._latch_stream(pairs())

    def _latch_stream(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Latches onto the features and memberships of all ranks, which communicate once, at the end."""
        atoms = self.dictionary.atoms
        dtype = rate_dtype(self.feature_dim, self.eps_sq, atoms)
        stream = MomentStream(self.num_classes, self.feature_dim, dtype, atoms.device)

        def prepare() -> tuple[None, list[int]]:
            for features, membership in pairs:
                checked, _ = self._check(features, membership)
                with torch.autocast(atoms.device.type, enabled=False):
                    stream.add(features.to(dtype), checked.to(dtype))
            return None, [*stream.brings(), int(self.dictionary.changed)]

        _, brought = agree(prepare, lambda _: self._settings(), "latch_from", self.process_group)
        with torch.autocast(atoms.device.type, enabled=False):
            if len(brought) > 1:
                stream.meet([numbers[:-1] for numbers in brought], self.process_group)
            if not bool((stream.counts > 0).any()):
                raise _no_batches()
            self._latch_onto(stream)
        # Several ranks have latched onto the same; if they differed before, classes without a sample still do.
        self.dictionary.changed = len(brought) == 1 or any(numbers[-1] for numbers in brought)

    def _latch_shard(self, pairs: Iterator[tuple[Tensor, Tensor]], call: str) -> None:
        """Latches each rank's classes: gathers all ranks' rows batch by batch, and keeps those of its own classes."""
        atoms, shards = self.dictionary.atoms, self.dictionary.shards
        assert shards is not None
        dtype = rate_dtype(self.feature_dim, self.eps_sq, atoms)
        stream = MomentStream(len(shards.own), self.feature_dim, dtype, atoms.device)

        def prepare() -> tuple[tuple[Tensor, Tensor], list[int]]:
            pair = next(pairs, None)
            if pair is None:  # this rank has no more, while others may
                return (stream.empty, stream.empty.new_zeros(0, dtype=torch.long)), [0, 0, 0]
            checked, _ = self._check(*pair)
            rows_or_labels = checked.rows_or_labels
            return (pair[0].to(dtype), rows_or_labels), [len(pair[0]), 1, int(checked.labels is None)]

        rounds = 0
        while True:
            (features, rows_or_labels), brought = agree(prepare, lambda _: self._settings(), call, self.process_group)
            shares, more, soft = zip(*brought, strict=True)
            if not any(more):
                break
            rounds += 1
            if any(soft):  # where one rank has soft rows, all do
                rows_or_labels = as_rows(rows_or_labels, self.num_classes, dtype)
            gathered, rows_or_labels = gather_rows(
                features, rows_or_labels, shares=list(shares), group=self.process_group
            )
            with torch.autocast(atoms.device.type, enabled=False):
                stream.add(*part_of(gathered, rows_or_labels, shards.own))
        if not rounds:
            raise _no_batches()
        with torch.autocast(atoms.device.type, enabled=False):
            self._latch_onto(stream)

    def _latch_onto(self, stream: MomentStream) -> None:
        self.dictionary.latch(*stream.blocks(self.atoms_per_class), stream.counts > 0)

    @torch.no_grad()
    def nearest_class(self, features: Float[Tensor, "m d"]) -> Int[Tensor, " m"]:
        """Returns the class whose subspace in the dictionary is nearest to each sample (eq. 8); block structure only.

        A class's subspace is spanned by those of its atoms whose codes are above 0; a class without any is never
        predicted. If the dictionary is sharded, every rank must call this, each with any number of samples of its own,
        even none: each rank finds the best of its classes for all samples, and the best of those wins.

        Args:
            features: Z, (m, d), finite; of the same dtype on all ranks.

        Returns:
            Labels (m,) of this rank's samples.

        Raises:
            InputError: a wrong argument, or shared structure (a ValueError).
            NotLatchedError: nothing was ever latched (a ValueError too).
            NumericalError: the dictionary is not finite.
        """
        dictionary, shards = self.dictionary, self.dictionary.shards
        if self.structure != "block":
            raise InputError(
                "nearest_class requires structure='block', in which classes have atoms of their own, got "
                f"{self.structure!r}; fit vmcr2.NearestSubspaceClassifier on features instead"
            )

        def prepare() -> tuple[None, list[int]]:
            self._check_device(features)
            if not (self.sharded and isinstance(features, Tensor) and features.shape == (0, self.feature_dim)):
                read_conditions(feature_conditions(features, feature_dim=self.feature_dim))
            require_finite(dictionary.atoms.sum(0), dictionary.codes.sum(0), otherwise=_SPOILT)
            return None, [len(features), int(dictionary.known().any())]

        if shards is None:
            prepare()
            if not bool(dictionary.known().any()):
                raise _not_latched()
            return nearest_in_dictionary(features, dictionary.whole())[1]
        _, brought = agree(
            prepare,
            lambda _: self._settings() | {"the dtype of features": str(features.dtype)},
            "nearest_class",
            self.process_group,
        )
        if not any(latched for _, latched in brought):
            raise _not_latched()
        rank, predicted = process_rank(self.process_group), [torch.zeros(0, dtype=torch.long, device=features.device)]
        for start in range(0, max(rows for rows, _ in brought), _ROWS):
            shares = [min(max(rows - start, 0), _ROWS) for rows, _ in brought]
            own = features[start : start + shares[rank]] if shares[rank] else features[:0]
            (gathered,) = gather_rows(own, shares=shares, group=self.process_group)
            scores, classes = nearest_in_dictionary(gathered, dictionary.whole())
            best = shards.best_class(scores, classes + shards.own.start)
            predicted.append(best[sum(shares[:rank]) : sum(shares[: rank + 1])])
        return torch.cat(predicted)

    def full_state_dict(self) -> dict[str, Tensor]:
        """Returns, on every rank, the `state_dict` of the same loss unsharded: for use on one machine.

        If the dictionary is sharded, every rank must call this, and each receives all k s d numbers.
        """
        if self.dictionary.shards is None:
            return dict(self.state_dict())
        agree(lambda: (None, []), lambda _: self._settings(), "full_state_dict", self.process_group)
        return {f"dictionary.{name}": value for name, value in self.dictionary.full_state().items()}

    def extra_repr(self) -> str:
        """Returns the settings, for `repr`."""
        steps = "" if self.step == "ascent" else f", step_atoms={self.step_atoms}, step_codes={self.step_codes}"
        return (
            f"num_classes={self.num_classes}, feature_dim={self.feature_dim}, "
            f"atoms_per_class={self.atoms_per_class}, mu={self.mu}, eps_sq={self.eps_sq}, "
            f"reduction={self.reduction!r}, structure={self.structure!r}, balance={self.balance}, "
            f"energy={self.energy}, pull={self.pull}, expand={self.expand}, step={self.step!r}{steps}"
            f"{', sharded=True' if self.sharded else ''}"
        )


def _is_spoilt(dictionary: Dictionary) -> bool:
    return not bool(dictionary.atoms.isfinite().all() & dictionary.codes.isfinite().all())


def _step_failed(dictionary: Dictionary) -> NumericalError:
    if _is_spoilt(dictionary):
        return NumericalError(_SPOILT)
    return NumericalError(
        "the dictionary's step failed: I + β Γ Diag(Ã γ) Γᵀ could not be factorised, or a gradient overflowed; lower "
        "the learning rate or mu, or raise eps_sq. The dictionary is as it was"
    )


def _not_latched() -> NotLatchedError:
    return NotLatchedError(
        "the dictionary was never latched, and no step is taken here (eval mode, or gradients are off): call "
        "loss.latch_from(model, batches) or loss.latch(features, membership) before evaluating, or train "
        "first. Where a trainer validates before it trains (Lightning's sanity check), skip that "
        "(num_sanity_val_steps=0) or latch before it"
    )


def _no_batches() -> InputError:
    return InputError("batches must give at least one pair (inputs, membership), got none")


def _pieces(features: Any, membership: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields a batch in parts of few rows; what cannot be split is yielded as it is, to be refused."""
    dense = all(isinstance(each, Tensor) and each.layout == torch.strided for each in (features, membership))
    if dense and features.shape[:1] == membership.shape[:1]:
        yield from zip(features.split(_ROWS), membership.split(_ROWS), strict=True)
    else:
        yield features, membership
