"""The objectives as PyTorch criteria: `MCR2Loss` (exact, eq. 1), `VMCR2Loss` (variational, eq. 7), and without labels
`TotalCodingRateLoss` (R alone).

Under torch.distributed all gather the batch over the ranks and compute one loss of the whole, identical everywhere;
with DistributedDataParallel's mean over ranks the gradients are those of a single process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from vmcr2.checks import UNIT_NORM_TOLERANCE, Condition, check_count, check_number, feature_conditions, read
from vmcr2.dictionary import Dictionary, Structure, ascending_step, paper_step
from vmcr2.distributed import broadcast, gather_rows
from vmcr2.errors import InputError, NotLatchedError, NumericalError
from vmcr2.latching import MomentStream, batch_statistics, latched_blocks
from vmcr2.linalg import rate_dtype, require_finite, wide_dtype
from vmcr2.membership import Membership, as_membership
from vmcr2.mismatch import Codes, mismatch, precise_mismatch
from vmcr2.rates import checked_rates, coding_rate
from vmcr2.variational import VariationalRates, objective

Step = Literal["ascent", "paper", "simultaneous"]
Reduction = Literal["mean", "sum"]

_CANCELLED = 0.05  # below this share of its terms a float32 mismatch is worked out again in float64
# Where µ follows from `balance`, the first steps hold the dictionary back: ρ starts so many times higher and falls by a
# constant factor. A fresh network without BatchNorm gives all samples nearly one direction; a dictionary that ran ahead
# of it would push them all together, and at a high learning rate they would never part (results/defaults.md).
_FIRST_BALANCE = 6.0
_BALANCE_DECAY = 0.97
_WATCH_EVERY = 20  # training steps between looks at ΔR: seldom enough to cost little
_LARGEST_MOMENT = 1.05  # ‖C_j‖ of unit rows, with the tolerance of their norms
_COLLAPSED = 0.2  # of the best ΔR so far


class MCR2Loss(nn.Module):
    """−ΔR of eq. (1), to be minimised: exact, on the smaller side of every matrix.

    It is negative where training goes well, since ΔR ≥ 0 is maximised.

    Args:
        num_classes: k ≥ 1. A batch may lack any of them.
        eps_sq: the squared precision ε² > 0.

    Raises:
        InputError: a wrong argument (a ValueError).
    """

    def __init__(self, num_classes: int, *, eps_sq: float = 0.5) -> None:
        super().__init__()
        check_count("num_classes", num_classes)
        check_number("eps_sq", eps_sq)
        self.num_classes = num_classes
        self.eps_sq = eps_sq

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
        # Checked before gathering too, so that the rank at fault says so.
        checked, _ = as_membership(features, membership, self.num_classes, unit=True)
        (gathered, held), _ = gather_rows(features, membership)
        if gathered is not features:
            checked, _ = as_membership(gathered, held, self.num_classes, unit=True)
        loss = -checked_rates(gathered, checked, self.eps_sq).reduction
        require_finite(loss)
        return loss.to(torch.promote_types(features.dtype, torch.float32))

    def extra_repr(self) -> str:
        """Returns the settings, for `repr`."""
        return f"num_classes={self.num_classes}, eps_sq={self.eps_sq}"


class TotalCodingRateLoss(nn.Module):
    """−R of eq. (1), to be minimised: it spreads features over all directions, without labels.

    The term against collapse of EMP-SSL (Tong et al., 2023), SimDINO (Wu et al., 2025) and their kin; a loss that pulls
    the views of one image together goes beside it. Minimising it expands: spread features score lowest.

    Args:
        eps_sq: the squared precision ε² > 0; EMP-SSL's 0.2, which its code calls `eps`.

    Raises:
        InputError: a wrong argument (a ValueError).
    """

    def __init__(self, eps_sq: float = 0.2) -> None:
        super().__init__()
        check_number("eps_sq", eps_sq)
        self.eps_sq = eps_sq

    def forward(
        self, features: Float[Tensor, "m d"] | Float[Tensor, "b m d"] | Sequence[Float[Tensor, "_ d"]]
    ) -> Float[Tensor, ""]:
        """Returns minus the mean of R over the views.

        Args:
            features: Z of one view (m, d), of b views (b, m, d), or a sequence of views (n, d) that may differ in n.
                Finite, rows of norm 1, or less where they are means of such (R is unbounded otherwise). Every rank
                gives as many views.

        Raises:
            InputError: a wrong argument (a ValueError).
            NumericalError: the factorisation failed.
        """
        if isinstance(features, Tensor):
            views = [features] if features.ndim == 2 else list(features) if features.ndim == 3 else []
        else:
            views = list(features)
        if not views:
            raise InputError(
                "features must have shape (m, d) or (b, m, d), or be a sequence of views (n, d), got "
                + (f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else "an empty sequence")
            )
        for view in views:  # before gathering, so that the rank at fault says so
            read([*feature_conditions(view), _longest(view)])
        if len({view.shape for view in views}) == 1:
            (gathered,), _ = gather_rows(torch.stack(views, 1))  # (m, b, d): one collective for all views
            rate = coding_rate(gathered.transpose(0, 1), eps_sq=self.eps_sq).mean()
        else:
            whole = [gather_rows(view)[0][0] for view in views]
            rate = torch.stack([coding_rate(view, eps_sq=self.eps_sq) for view in whole]).mean()
        return -rate

    def extra_repr(self) -> str:
        """Returns the settings, for `repr`."""
        return f"eps_sq={self.eps_sq}"


def _longest(features: Float[Tensor, "m d"]) -> Condition:
    longest = torch.linalg.vector_norm(features.detach(), dim=1, dtype=wide_dtype(features)).max()
    return Condition(
        longest > 1 + UNIT_NORM_TOLERANCE,
        "features must have rows of norm 1 at most (R is unbounded otherwise)",
        lambda: f"norms up to {float(longest):.3g}; end the network with torch.nn.functional.normalize(z, dim=1)",
    )


def balanced_mu(feature_dim: int, batch_size: int, *, eps_sq: float = 0.5, balance: float = 0.05) -> float:
    """Returns the µ at which the residual weighs ρ = µ m ε² / d against the rates in the dictionary's step.

    What a good µ is depends on batch size and dimension, what a good ρ is hardly (docs/choosing.md). From about 1 the
    dictionary no longer leads the features, and they may collapse; the paper's µ = 1 has ρ from 2 to 10.

    Args:
        feature_dim: d ≥ 1.
        batch_size: m ≥ 1, that of all ranks together.
        eps_sq: ε² > 0.
        balance: ρ > 0.

    Raises:
        InputError: a wrong argument (a ValueError).
    """
    check_count("feature_dim", feature_dim)
    check_count("batch_size", batch_size)
    check_number("eps_sq", eps_sq)
    check_number("balance", balance)
    return balance * feature_dim / (batch_size * eps_sq)


class VMCR2Loss(nn.Module):
    """The variational objective of eq. (7): a dictionary that leads the features, and features that follow it.

    In training mode a call first moves the dictionary by one step (Alg. 1, lines 6 to 10) and returns the mismatch
    between the features and the moved dictionary, whose gradient in the features is line 12. In eval mode, and wherever
    gradients are off (`torch.no_grad`, `torch.inference_mode`), it returns the mismatch with the dictionary as it
    stands, and changes nothing. With gradient accumulation the dictionary moves once a micro-batch.

    A class is latched the first time training sees it: call `latch` or `latch_from` before training so that all
    classes start from all their samples, or let the first batches do it (a class that comes much later replaces atoms
    that shared codes of others may have begun to use).

    A training step reads from the device twice: before it what must hold of the batch, with the sizes of its classes,
    and after it whether it came out finite; every twentieth step ΔR as well, for the warning of a collapse.

    Args:
        num_classes: k ≥ 1. A batch may lack any of them.
        feature_dim: d ≥ 1.
        atoms_per_class: s = q/k, from 1 to d; None means ⌊d/k⌋, 1 at least.
        mu: the penalty weight µ > 0; None means the µ of `balance` at the batch at hand. 1 is the paper's.
        eps_sq: the squared precision ε² > 0.
        reduction: "mean": M/2m² = ½ Σ_j γ_j ‖C_j − B_j‖²_F, free of µ, m and d, so that one learning rate suits all;
            "sum": (µ/2m) M, as the paper has it. The directions are the same.
        structure: "shared": every class may use every atom, codes (q, k). "block": class j uses its own s atoms only,
            codes (s, k); classes cost nothing while absent.
        balance: ρ = µ m ε²/d > 0, what the residual weighs in the dictionary's step against the rates. Not used where
            mu is given. The first 60 training steps use up to 6 times as much, so that features that are still all
            alike are not left behind.
        energy: what the codes of every class sum to; 1 is the trace of C_j. None lets the sum run free, as the paper
            does: it grows (the more, the smaller ρ), and presses each class together.
        step: "ascent": eq. (7) never falls, no step size. "paper": the paper's Lipschitz bounds, the codes' gradient
            at the moved atoms (line 8). "simultaneous": the same with both gradients at the old dictionary.
        step_atoms: ν_Γ > 0, in units of the inverse Lipschitz bound; not used by "ascent".
        step_codes: ν_A > 0, likewise.

    Attributes:
        dictionary: the `Dictionary`, whose buffers `atoms` and `codes` are part of `state_dict`.

    Raises:
        InputError: a wrong argument (a ValueError).
    """

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
        step: Step = "ascent",
        step_atoms: float = 5.0,
        step_codes: float = 5.0,
    ) -> None:
        super().__init__()
        check_count("num_classes", num_classes)
        check_count("feature_dim", feature_dim)
        if atoms_per_class is None:
            atoms_per_class = max(1, feature_dim // num_classes)
        check_count("atoms_per_class", atoms_per_class, at_most=feature_dim, limit="feature_dim")
        numbers = {"eps_sq": eps_sq, "balance": balance, "step_atoms": step_atoms, "step_codes": step_codes}
        for name, value in numbers.items():
            check_number(name, value)
        for name, value in (("mu", mu), ("energy", energy)):
            if value is not None:
                check_number(name, value)
        for name, value, taken in (
            ("reduction", reduction, ("mean", "sum")),
            ("structure", structure, ("shared", "block")),
            ("step", step, ("ascent", "paper", "simultaneous")),
        ):
            if value not in taken:
                raise InputError(f"{name} must be one of {', '.join(map(repr, taken))}, got {value!r}")
        self.num_classes = num_classes
        self.feature_dim = feature_dim
        self.atoms_per_class = atoms_per_class
        self.mu = mu
        self.eps_sq = eps_sq
        self.reduction: Reduction = reduction
        self.structure: Structure = structure
        self.balance = balance
        self.energy = energy
        self.step: Step = step
        self.step_atoms = step_atoms
        self.step_codes = step_codes
        self.dictionary = Dictionary(num_classes, feature_dim, atoms_per_class, structure)
        self._watch = _CollapseWatch()

    def mu_at(self, batch_size: int) -> float:
        """Returns µ at a batch of so many samples: `mu`, or what `balance` makes of it."""
        if self.mu is not None:
            return self.mu
        return balanced_mu(self.feature_dim, batch_size, eps_sq=self.eps_sq, balance=self.balance)

    def _checked(self, features: Tensor, membership: Tensor) -> tuple[Tensor, Membership, bool]:
        """Checks the batch of this rank, gathers it over ranks, and returns it in the dtype to compute in.

        The last says whether the dictionary is shared and every class keeps to its own atoms.
        """
        beside = self.dictionary.confined()[None] if self.structure == "shared" and self.step == "ascent" else None
        if isinstance(features, Tensor) and features.device != self.dictionary.atoms.device:
            raise InputError(
                f"features must be on the loss's device {self.dictionary.atoms.device}, got {features.device}; "
                "move the loss with .to(device)"
            )

        def check(z: Tensor, pi: Tensor) -> tuple[Membership, Tensor | None]:
            return as_membership(z, pi, self.num_classes, feature_dim=self.feature_dim, unit=True, beside=beside)

        checked, confined = check(features, membership)
        (gathered, held), stale = gather_rows(features, membership, flag=self.dictionary.changed)
        if gathered is not features:
            if stale:
                broadcast(self.dictionary)
                beside = None if beside is None else self.dictionary.confined()[None]
            checked, confined = check(gathered, held)
        self.dictionary.changed = False
        dtype = rate_dtype(self.feature_dim, self.eps_sq, gathered, self.dictionary.atoms)
        return gathered.to(dtype), checked.to(dtype), confined is not None and bool(confined)

    def forward(
        self, features: Float[Tensor, "m d"], membership: Int[Tensor, " m"] | Shaped[Tensor, "m k"]
    ) -> Float[Tensor, ""]:
        """Returns the mismatch ≥ 0 of the batch (`reduction`); in training mode, after one dictionary step.

        Args:
            features: Z, (m, d), finite, rows of norm 1 (as the unit columns of Γ assume).
            membership: labels (m,) in [0, num_classes), or rows (m, num_classes) ≥ 0 that sum to 1.

        Raises:
            InputError: a wrong argument (a ValueError).
            NotLatchedError: nothing was ever latched, and this call is not to (a ValueError too).
            NumericalError: the step failed; the dictionary is as it was.
        """
        widened, checked, confined = self._checked(features, membership)
        m = checked.num_samples
        if self.training and torch.is_grad_enabled():
            if not bool(self.dictionary.known().all()):
                self._latch(widened.detach(), checked.detach(), only_new=True)
            self._watch.look(self, widened.detach(), checked.detach())
            value = self._step(widened, checked, confined=confined)
        else:
            value = precise_mismatch(widened, *self._read(checked, widened.dtype))
        value = value * self.mu_at(m) if self.reduction == "sum" else value / m
        return value.to(torch.promote_types(features.dtype, torch.float32))

    def _read(self, membership: Membership, dtype: torch.dtype) -> tuple[Membership, Codes]:
        """Returns what a batch meets of the dictionary.

        Raises:
            NotLatchedError: nothing was ever latched.
        """
        if not bool(self.dictionary.known().any()):
            raise NotLatchedError(
                "the dictionary was never latched, and no step is taken here (eval mode, or gradients are off): call "
                "loss.latch_from(model, batches) or loss.latch(features, membership) before evaluating, or train "
                "first. Where a trainer validates before it trains (Lightning's sanity check), skip that "
                "(num_sanity_val_steps=0) or latch before it"
            )
        dictionary, among = self.dictionary.read(membership, dtype)
        # Copies, since the buffers may move on before the backward pass.
        return among, dictionary.moved(dictionary.atoms.clone(), dictionary.codes.clone())

    def _step(self, features: Tensor, membership: Membership, *, confined: bool) -> Tensor:
        """Moves the dictionary and returns the mismatch with it (Alg. 1, lines 6 to 12).

        A shared dictionary of which every class keeps to its own atoms takes the step in block structure, without the
        products of all atoms with all samples. That is the same step if no other code would rise from 0, and none would
        where its gradient γ_j ½β (Γ_lᵀ S⁻¹ Γ_l − 1) + µ n_j Γ_lᵀ (C_j − B_j) Γ_l is at most 0, with C_j at most I.
        """
        mu = self.mu_at(membership.num_samples)
        if self.mu is None:
            mu *= max(1.0, _FIRST_BALANCE * _BALANCE_DECAY**self.dictionary.steps)
        confined = confined and len(membership.present) == self.num_classes
        among, after, value, flags = self._stepped(features, membership, mu, confined)
        # The step's one look back: whether all of it is finite, whether the mismatch kept its digits, and the above.
        finite, small, alone = flags.tolist()
        if confined and finite and not alone:
            among, after, value, flags = self._stepped(features, membership, mu, False)
            finite, small, _ = flags.tolist()
        if not finite:
            raise NumericalError(
                "the dictionary's step failed: I + β Γ Diag(Ã γ) Γᵀ could not be factorised, or a gradient overflowed; "
                "lower the learning rate or mu, or raise eps_sq. The dictionary is as it was"
            )
        self.dictionary.replace(after, membership)
        self.dictionary.steps += 1
        return precise_mismatch(features, among, after) if small and features.dtype != torch.float64 else value

    def _stepped(
        self, features: Tensor, membership: Membership, mu: float, confined: bool
    ) -> tuple[Membership, Codes, Tensor, Tensor]:
        """Returns the membership among the dictionary's classes, the dictionary after a step, the mismatch, flags."""
        before, among = self.dictionary.read(membership, features.dtype, confined=confined)
        with torch.autocast(features.device.type, enabled=False):
            if self.step == "ascent":
                after, energies, overlap, exposure = ascending_step(
                    features, among, before, mu=mu, eps_sq=self.eps_sq, energy=self.energy
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
                energies, overlap, exposure = None, None, features.new_ones(())
            value, terms = mismatch(features, among, after, energies, overlap)
        balance = mu * membership.num_samples * self.eps_sq / self.feature_dim
        finite = (after.atoms.sum() + after.codes.sum() + value.detach()).isfinite()
        alone = balance * _LARGEST_MOMENT <= 0.5 * (1 - exposure)
        return among, after, value, torch.stack([finite, value.detach() < _CANCELLED * terms, alone])

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
        widened, checked, _ = self._checked(features, membership)
        with torch.autocast(widened.device.type, enabled=False):
            among, dictionary = self._read(checked, widened.dtype)
            mu = self.mu_at(checked.num_samples)
            rates = objective(widened, among, dictionary, mu=mu, eps_sq=self.eps_sq)
        require_finite(*rates)
        return rates

    @torch.no_grad()
    def latch(self, features: Float[Tensor, "m d"], membership: Int[Tensor, " m"] | Shaped[Tensor, "m k"]) -> None:
        """Sets the dictionary to each class's top singular vectors and values (Alg. 2).

        A class that is absent keeps what it had. A class of rank below s is completed by orthonormal directions with
        code 0. Under torch.distributed every rank must call it, each with its share.

        Args:
            features: Z, (m, d), finite, rows of norm 1; of as many samples as there are, as training sees them.
            membership: labels (m,) or rows (m, num_classes) that sum to 1.

        Raises:
            InputError: a wrong argument (a ValueError).
            NumericalError: a decomposition did not converge.
        """
        widened, checked, _ = self._checked(features, membership)
        self._latch(widened, checked, only_new=False)

    @torch.no_grad()
    def _latch(self, features: Tensor, membership: Membership, *, only_new: bool) -> None:
        chosen = membership.sizes > 0
        if only_new:
            chosen = chosen & ~self.dictionary.known()
        if bool(chosen.any()):
            with torch.autocast(features.device.type, enabled=False):
                blocks, energies = latched_blocks(features, membership, self.atoms_per_class)
            self.dictionary.latch(blocks, energies, chosen.to(blocks.device))
            self.dictionary.changed = False  # every rank has latched onto the same

    @torch.no_grad()
    def latch_from(self, model: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Latches onto the features that a model gives for a stream of batches, which need not fit in memory.

        The model runs as training sees the features: normalisation layers use the batch's own statistics (unless they
        are frozen) and leave the running ones alone, since before they have settled eval mode shows another network;
        dropout is off. So the batches should be shuffled, un-augmented, and of about the training batch size. All modes
        are restored. Under torch.distributed each rank gives its own share, of any number of batches, none included.

        Args:
            model: a Module, or any function that calls some, that maps inputs to features (m, d) with rows of norm 1.
            batches: pairs (inputs, membership), one pass over the training set. Tensors are moved to the loss's device.

        Raises:
            InputError: no batch on any rank, or a batch that is wrong or no pair (a ValueError).
            NumericalError: a decomposition did not converge.
        """
        atoms = self.dictionary.atoms
        dtype = rate_dtype(self.feature_dim, self.eps_sq, atoms)
        stream = MomentStream(self.num_classes, self.feature_dim, dtype, atoms.device)
        with batch_statistics(model) as run:
            for inputs, membership in map(_pair, batches):
                features, held = run(inputs.to(atoms.device)), membership.to(atoms.device)
                checked, _ = as_membership(features, held, self.num_classes, feature_dim=self.feature_dim, unit=True)
                with torch.autocast(atoms.device.type, enabled=False):
                    stream.add(features.to(dtype), checked.to(dtype))
        with torch.autocast(atoms.device.type, enabled=False):
            blocks, energies, counts = stream.blocks(self.atoms_per_class)
        if not bool((counts > 0).any()):
            raise InputError("batches must give at least one pair (inputs, membership), got none")
        self.dictionary.latch(blocks, energies, counts > 0)
        self.dictionary.changed = False

    def extra_repr(self) -> str:
        """Returns the settings, for `repr`."""
        steps = "" if self.step == "ascent" else f", step_atoms={self.step_atoms}, step_codes={self.step_codes}"
        return (
            f"num_classes={self.num_classes}, feature_dim={self.feature_dim}, "
            f"atoms_per_class={self.atoms_per_class}, mu={self.mu}, eps_sq={self.eps_sq}, "
            f"reduction={self.reduction!r}, structure={self.structure!r}, balance={self.balance}, "
            f"energy={self.energy}, step={self.step!r}{steps}"
        )


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Returns a batch of `latch_from`, which must be a pair; a dict of two would unpack into its keys."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    got = f"a dict of {', '.join(map(repr, batch))}" if isinstance(batch, dict) else f"a {type(batch).__name__}"
    raise InputError(
        f"batches must give pairs (inputs, membership), got {got}; of dicts make pairs: "
        "((batch['pixel_values'], batch['labels']) for batch in loader)"
    )


class _CollapseWatch:
    """Warns once when the features have collapsed: ΔR of three batches in a row far below the best there was.

    The loss's value alone does not show it: features that all coincide match a dictionary that followed them.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.best = 0.0
        self.low = 0
        self.warned = False

    def look(self, loss: VMCR2Loss, features: Tensor, membership: Membership) -> None:
        """Looks at ΔR of every so many batches."""
        self.steps += 1
        if self.warned or self.steps % _WATCH_EVERY != 1:
            return
        if membership.soft is not None:
            # By the largest entry: with a share of every class in every sample there were k determinants of d×d.
            membership, _ = as_membership(features, membership.soft.argmax(1), membership.num_classes)
        reduction = float(checked_rates(features, membership, loss.eps_sq).reduction)
        self.best = max(self.best, reduction)
        # Of a single class, and of features that are all alike from the start, ΔR is 0 but for rounding.
        self.low = self.low + 1 if self.best > 1e-3 and reduction < _COLLAPSED * self.best else 0
        if self.low < 3:
            return
        self.warned = True
        balance = loss.mu_at(membership.num_samples) * membership.num_samples * loss.eps_sq / loss.feature_dim
        warnings.warn(
            f"the features have collapsed: ΔR of a batch fell from {self.best:.3g} to {reduction:.3g}. Lower the "
            f"learning rate, or clip the network's gradients"
            + (
                f"; and lower mu: mu * m * eps_sq / feature_dim is {balance:.2g}, from about 1 the dictionary cannot "
                "lead the features (mu=None takes 0.05)"
                if balance > 0.5
                else ""
            ),
            stacklevel=5,  # the call of the loss, past Module's own two
        )
