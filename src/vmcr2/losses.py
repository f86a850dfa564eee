"""The two objectives as PyTorch criteria: `MCR2Loss` (exact, eq. 1) and `VMCR2Loss` (variational, eq. 7).

Under torch.distributed both gather the batch over the ranks and compute one loss of the whole, identical everywhere;
with DistributedDataParallel's mean over ranks the gradients are those of a single process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from vmcr2.checks import check_count, check_number
from vmcr2.dictionary import Dictionary, MomentStream, latched_blocks, proximal_step
from vmcr2.distributed import gather_rows
from vmcr2.errors import InputError, NotLatchedError, NumericalError
from vmcr2.linalg import may_read, require_finite, wide_dtype
from vmcr2.membership import (
    FINITE,
    ROWS_FINITE,
    ROWS_POSITIVE,
    ROWS_SUM,
    UNIT,
    Condition,
    Membership,
    as_membership,
    labels_within,
    raise_first,
)
from vmcr2.rates import compression_rate, expansion_rate
from vmcr2.variational import (
    VariationalRates,
    as_shared,
    ascent_direction,
    class_moments,
    residual,
    variational_compression,
    variational_expansion,
)

_STEP_HOLDS = "the dictionary's step must be finite (lower the learning rate or mu, or raise eps_sq)"
_CHECK_EVERY = 64  # training steps on an accelerator: seldom enough to cost nothing


def _gather_checked(
    features: Tensor,
    membership: Tensor,
    num_classes: int,
    feature_dim: int | None = None,
    deferred: list[Condition] | None = None,
) -> tuple[Tensor, Membership]:
    """Checks this rank's batch, so that the rank at fault says so, and returns the batch of all ranks."""

    def check(z: Tensor, pi: Tensor) -> Membership:
        return as_membership(z, pi, num_classes, feature_dim=feature_dim, unit=True, deferred=deferred)

    checked = check(features, membership)
    gathered, gathered_membership = gather_rows(features, membership)
    return gathered, checked if gathered is features else check(gathered, gathered_membership)


def _detached(membership: Membership) -> Membership:
    soft = None if membership.soft is None else membership.soft.detach()
    return Membership(membership.labels, soft, membership.counts.detach())


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
        features, checked = _gather_checked(features, membership, self.num_classes)
        with torch.autocast(features.device.type, enabled=False):
            widened = features.to(wide_dtype(features))
            return require_finite(
                compression_rate(widened, checked, self.eps_sq) - expansion_rate(widened, self.eps_sq)
            )

    def extra_repr(self) -> str:
        """Returns the settings, for `repr`."""
        return f"num_classes={self.num_classes}, eps_sq={self.eps_sq}"


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
    """The variational objective of eq. (7): a dictionary that follows the features, and features that follow it.

    In training mode a call first moves the dictionary by one proximal step (Alg. 1, lines 6 to 10) and returns the
    residual (µ/2m) M at the moved dictionary, whose gradient in the features is line 12. In eval mode it returns the
    residual of the dictionary as it stands, and changes nothing.

    A class is latched the first time it is seen: call `latch` or `latch_from` before training so that all classes
    start from all their samples, or let the first batches do it (a class that comes much later replaces atoms that
    shared codes of others may have begun to use). In eval mode a dictionary that was never latched raises
    `NotLatchedError`.

    Args:
        num_classes: k ≥ 1. A batch may lack any of them.
        feature_dim: d ≥ 1.
        atoms_per_class: s = q/k, from 1 to d.
        mu: the penalty weight µ > 0; 1 is the paper's. See `balanced_mu` for one that suits batch size and dimension.
        eps_sq: the squared precision ε² > 0.
        step_atoms: ν_Γ > 0, in units of the inverse Lipschitz bound.
        step_codes: ν_A > 0, likewise.
        energy: what the codes of every class are scaled to sum to after each step. 1 is the constraint of eq. (6) for
            features of norm 1, and gives V-MCR²'s highest ΔR; more presses each class together beyond that. None lets
            the sum run free, as the paper does: it grows (the more, the smaller µ), and with it that pressure.
        structure: "shared": every class may use every atom, codes (q, k). "block": class j uses its own s atoms only,
            codes (s, k); classes cost nothing while absent.

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
        atoms_per_class: int = 10,
        mu: float = 1.0,
        eps_sq: float = 0.5,
        step_atoms: float = 5.0,
        step_codes: float = 5.0,
        energy: float | None = None,
        structure: Literal["shared", "block"] = "shared",
    ) -> None:
        super().__init__()
        check_count("num_classes", num_classes)
        check_count("feature_dim", feature_dim)
        check_count("atoms_per_class", atoms_per_class, at_most=feature_dim, limit="feature_dim")
        for name, value in (("mu", mu), ("eps_sq", eps_sq), ("step_atoms", step_atoms), ("step_codes", step_codes)):
            check_number(name, value)
        if energy is not None:
            check_number("energy", energy)
        if structure not in ("shared", "block"):
            raise InputError(f'structure must be "shared" or "block", got {structure!r}')
        self.num_classes = num_classes
        self.feature_dim = feature_dim
        self.atoms_per_class = atoms_per_class
        self.mu = mu
        self.eps_sq = eps_sq
        self.step_atoms = step_atoms
        self.step_codes = step_codes
        self.energy = energy
        self.structure = structure
        self.dictionary = Dictionary(num_classes, feature_dim, atoms_per_class, structure)
        self._requirements = (
            FINITE, UNIT, labels_within(num_classes), ROWS_FINITE, ROWS_POSITIVE, ROWS_SUM, _STEP_HOLDS
        )  # fmt: skip
        self.register_buffer("_wrong", torch.zeros(len(self._requirements), dtype=torch.bool), persistent=False)
        self._steps = 0

    def check(self) -> None:
        """Raises what training steps on an accelerator found wrong but did not stop to say.

        On a CPU a wrong batch raises at once. On an accelerator asking for values would hold up the host in every step,
        so there a wrong batch gives a loss of NaN and a gradient of 0 in the features, leaves the dictionary as it is,
        and is told of here. (What made the features NaN may still spoil the network's own gradients.) Called every 64
        training steps, and by `eval`, `latch`, `latch_from`, `rates` and `off_block`; call it yourself before saving
        weights, and around CUDA graphs and compiled steps.

        Raises:
            InputError: a batch since the last call was wrong (a ValueError).
            NumericalError: a factorisation failed since the last call.
        """
        if self._wrong.is_meta:  # weights being loaded without memory of their own
            return
        broken = [name for name, wrong in zip(self._requirements, self._wrong.tolist(), strict=True) if wrong]
        if not broken:
            return
        self._wrong.zero_()
        text = f"{'; '.join(broken)}: a batch since the last check did not keep to this, and its loss was NaN"
        raise NumericalError(text) if broken == [_STEP_HOLDS] else InputError(text)

    def _defer(self, conditions: list[Condition]) -> Tensor:
        """Notes what is wrong with a batch, for `check`, and returns whether nothing is."""
        fine = torch.zeros_like(self._wrong[0])
        found = {condition.requirement: condition.wrong for condition in conditions}
        flags = torch.stack([found.get(name, fine) for name in self._requirements])
        self._wrong.logical_or_(flags)  # in place, as CUDA graphs need it
        return ~flags.any()

    def train(self, mode: bool = True) -> VMCR2Loss:
        """Sets training or eval mode; before the latter, `check`."""
        if not mode:
            self.check()
        return super().train(mode)

    def _checked(
        self, features: Tensor, membership: Tensor, deferred: list[Condition] | None = None
    ) -> tuple[Tensor, Membership]:
        """Checks the batch of this rank, gathers it over ranks, and returns it in the dtype to compute in."""
        if deferred is None:
            self.check()
        gathered, checked = _gather_checked(features, membership, self.num_classes, self.feature_dim, deferred)
        if gathered.device != self.dictionary.atoms.device:
            raise InputError(
                f"features must be on the loss's device {self.dictionary.atoms.device}, got {gathered.device}; "
                "move the loss with .to(device)"
            )
        dtype = wide_dtype(gathered, self.dictionary.atoms)
        return gathered.to(dtype), checked.to(dtype)

    def forward(
        self, features: Float[Tensor, "m d"], membership: Int[Tensor, " m"] | Shaped[Tensor, "m k"]
    ) -> Float[Tensor, ""]:
        """Returns the residual (µ/2m) M ≥ 0 of the batch; in training mode, after one dictionary step.

        Args:
            features: Z, (m, d), finite, rows of norm 1 (as the unit columns of Γ assume).
            membership: labels (m,) in [0, num_classes), or rows (m, num_classes) ≥ 0 that sum to 1.

        Raises:
            InputError: a wrong argument (a ValueError); in training on an accelerator see `check`.
            NotLatchedError: eval mode, and nothing was ever latched (a ValueError too).
            NumericalError: the factorisation failed.
        """
        if not (self.training and isinstance(features, Tensor) and not may_read(features)):
            widened, checked = self._checked(features, membership)
            with torch.autocast(features.device.type, enabled=False):
                if self.training:
                    if self.dictionary.num_latched() < self.num_classes:
                        self._latch(widened.detach(), _detached(checked), only_new=True)
                    return self._step(widened, checked)
                atoms, codes, present, _ = self._dictionary(checked, widened.dtype)
                # Copies, since the buffers may move on before the backward pass.
                return residual(widened, present, atoms.clone(), codes.clone(), self.mu)
        return self._step_unread(features, membership)

    def _step_unread(self, features: Tensor, membership: Tensor) -> Tensor:
        """Takes a training step without reading a value, but for checks and new classes now and then."""
        if not torch.compiler.is_compiling():
            self._steps += 1
            if self._steps % _CHECK_EVERY == 0 and not (features.is_cuda and torch.cuda.is_current_stream_capturing()):
                self.check()
        deferred: list[Condition] = []
        widened, checked = self._checked(features, membership, deferred)
        with torch.autocast(features.device.type, enabled=False):
            early = self._steps <= _CHECK_EVERY or self._steps % _CHECK_EVERY == 0
            if early and self.dictionary.num_latched() < self.num_classes:
                raise_first(deferred)
                self._latch(widened.detach(), _detached(checked), only_new=True)
            sound = self._defer(deferred)
            # What is wrong is replaced, so that neither the step nor a gradient can carry it on.
            widened = torch.where(sound, widened, self.feature_dim**-0.5)
            if checked.soft is not None:
                soft = torch.where(sound, checked.soft, 1 / self.num_classes)
                counts = torch.where(sound, checked.counts, checked.num_samples / self.num_classes)
                checked = Membership(None, soft, counts)
            return self._step(widened, checked, sound)

    def _step(self, features: Tensor, membership: Membership, sound: Tensor | None = None) -> Tensor:
        """Moves the dictionary and returns the residual; what both need of the batch is found once.

        Where `sound` is given and false, or the step fails, the dictionary stays and the residual is NaN.
        """
        detached = features.detach()
        before, codes_before, present, classes = self._dictionary(_detached(membership), features.dtype)
        moments = class_moments(detached, present)
        atoms, codes = proximal_step(
            detached,
            present,
            before,
            codes_before,
            mu=self.mu,
            eps_sq=self.eps_sq,
            step_atoms=self.step_atoms,
            step_codes=self.step_codes,
            energy=self.energy,
            moments=moments,
            num_classes=self.num_classes,
        )
        if sound is not None:
            failed = ~(atoms.isfinite().all() & codes.isfinite().all())
            sound = sound & self._defer([Condition(failed, _STEP_HOLDS, str)])
            # A class not latched yet waits for that, since codes of its own would pass for latched ones.
            known = self.dictionary.is_latched()
            # And a place of `present` may hold a class without a sample, which stays to the bit.
            moves = sound & (known if classes is None else known[classes] & (present.counts > 0))
            codes = torch.where(moves, codes, codes_before)
            own = sound if classes is None else moves.repeat_interleave(self.atoms_per_class)
            atoms = torch.where(own, atoms, before)
        self.dictionary.replace(atoms, codes, classes)
        if membership.soft is not None and membership.soft.requires_grad:
            present = membership if classes is None else membership.present()[0]
        value = residual(features, present, atoms, codes, self.mu, moments)
        return value if sound is None else torch.where(sound, value, torch.nan)

    def _dictionary(
        self, membership: Membership, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Membership, Tensor | None]:
        """Returns what `Dictionary.read` gives.

        Raises:
            NotLatchedError: nothing was ever latched.
        """
        if not self.dictionary.num_latched():
            raise NotLatchedError(
                "the dictionary was never latched: call loss.latch(features, membership) or "
                "loss.latch_from(model, batches), or call the loss in training mode first"
            )
        return self.dictionary.read(membership, dtype)

    @torch.no_grad()
    def rates(
        self, features: Float[Tensor, "m d"], membership: Int[Tensor, " m"] | Shaped[Tensor, "m k"]
    ) -> VariationalRates:
        """Returns R^v, R_c^v and the residual of eq. (7), for logging; changes nothing, in either mode.

        R^v and R_c^v are those of the dictionary at the batch's class weights. Their difference is not ΔR of the
        features: for that, see `vmcr2.rate_reduction`.

        Args:
            features: Z, (m, d), finite, rows of norm 1.
            membership: labels (m,) or rows (m, num_classes) that sum to 1.

        Raises:
            InputError: a wrong argument (a ValueError).
            NotLatchedError: nothing was ever latched (a ValueError too).
        """
        widened, checked = self._checked(features, membership)
        with torch.autocast(features.device.type, enabled=False):
            atoms, codes, present, _ = self._dictionary(checked, widened.dtype)
            return VariationalRates(
                variational_expansion(atoms, codes, present.class_weights, self.eps_sq),
                variational_compression(codes, present.class_weights, self.feature_dim, self.eps_sq),
                residual(widened.detach(), present, atoms, codes, self.mu),
            )

    @torch.no_grad()
    def off_block(self, features: Float[Tensor, "m d"], membership: Tensor) -> float:
        """Returns the share of codes outside the classes' own atoms that are on, or that a step would switch on.

        0 means that at this batch block structure takes the step that shared structure takes, but for the bound on its
        length; anything else, that it is another method. Costs (q d + q²) times the classes present: for now and then.

        Args:
            features: Z, (m, d), finite, rows of norm 1.
            membership: labels (m,) or rows (m, num_classes) that sum to 1.

        Raises:
            InputError: a wrong argument (a ValueError).
            NotLatchedError: nothing was ever latched (a ValueError too).
        """
        widened, checked = self._checked(features, membership)
        with torch.autocast(features.device.type, enabled=False):
            atoms, codes, present, _ = self._dictionary(checked, widened.dtype)
            shared = as_shared(atoms, codes)
            direction = ascent_direction(widened, present, atoms, shared, self.mu, self.eps_sq)[1]
            owner = torch.arange(shared.shape[0], device=shared.device) // self.atoms_per_class
            outside = owner[:, None] != torch.arange(shared.shape[1], device=shared.device)
            wanted = (present.counts > 0) & outside & ((shared > 0) | (direction > 0))
            return float(wanted.sum() / outside.sum().clamp_min(1))

    @torch.no_grad()
    def latch(self, features: Float[Tensor, "m d"], membership: Int[Tensor, " m"] | Shaped[Tensor, "m k"]) -> None:
        """Sets the dictionary to each class's top singular vectors and values (Alg. 2).

        A class that is absent keeps what it had. A class of rank below s is completed by orthonormal directions with
        code 0.

        Args:
            features: Z, (m, d), finite, rows of norm 1; of as many samples as there are, as training sees them.
            membership: labels (m,) or rows (m, num_classes) that sum to 1.

        Raises:
            InputError: a wrong argument (a ValueError).
        """
        widened, checked = self._checked(features, membership)
        with torch.autocast(features.device.type, enabled=False):
            self._latch(widened, checked, only_new=False)

    def _latch(self, features: Tensor, membership: Membership, *, only_new: bool) -> None:
        present = membership.counts > 0
        chosen = present & ~self.dictionary.is_latched() if only_new else present
        if bool(chosen.any()):
            self.dictionary.write(*latched_blocks(features, membership, self.atoms_per_class), chosen)

    @torch.no_grad()
    def latch_from(self, model: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Latches onto the features that a model gives for a stream of batches, which need not fit in memory.

        The model runs as training sees the features: BatchNorm normalises by the batch's own statistics and its
        running ones are left alone, since before they have settled eval mode shows another network; dropout is off.
        So the batches should be shuffled, un-augmented, and of about the training batch size. All modes are restored.

        Args:
            model: a Module, or any function, that maps inputs to features (m, d) with rows of norm 1.
            batches: pairs (inputs, membership), one pass over the training set. Tensors are moved to the loss's device.

        Raises:
            InputError: no batch, or a batch that is wrong (a ValueError).
        """
        device = self.dictionary.atoms.device
        stream = MomentStream(self.num_classes, self.feature_dim)
        with training_statistics(model):
            for inputs, membership in batches:
                widened, checked = self._checked(model(inputs.to(device)), membership.to(device))
                with torch.autocast(device.type, enabled=False):
                    stream.add(widened, checked)
        if not stream.rows and stream.sums is None:
            raise InputError("batches must give at least one pair (inputs, membership), got none")
        with torch.autocast(device.type, enabled=False):
            blocks, energies, counts = stream.blocks(self.atoms_per_class)
        self.dictionary.write(blocks, energies, counts > 0)

    def extra_repr(self) -> str:
        """Returns the settings, for `repr`."""
        return (
            f"num_classes={self.num_classes}, feature_dim={self.feature_dim}, "
            f"atoms_per_class={self.atoms_per_class}, mu={self.mu}, eps_sq={self.eps_sq}, "
            f"step_atoms={self.step_atoms}, step_codes={self.step_codes}, "
            f"energy={self.energy}, structure={self.structure!r}"
        )


@contextmanager
def training_statistics(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Runs a model on batch statistics without noise: BatchNorm as in training but frozen, everything else in eval."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [(module, module.training) for module in modules]
    norms = [module for module in modules if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm, norm.momentum, None if (n := norm.num_batches_tracked) is None else n.clone()) for norm in norms]
    try:
        for module in modules:
            module.training = False
        for norm in norms:
            norm.training = True
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum, tracked in kept:
            norm.momentum = momentum
            if tracked is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(tracked)
        for module, mode in modes:
            module.training = mode
