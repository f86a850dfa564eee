"""The three objectives behind one small interface, which is all that `fit` knows about them.

Any object with the attributes and methods of `Objective` can be trained: a new one is a criterion and, if it needs more
than that, a subclass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional

from vmcr2.checks import check_count, check_flag, check_number
from vmcr2.collapse import advice_on_balance, has_collapsed
from vmcr2.distributed import agree, gather_rows
from vmcr2.errors import NumericalError
from vmcr2.lab.recipes import Recipe
from vmcr2.losses import MCR2Loss, VMCR2Loss, balance_at
from vmcr2.rates import rate_reduction

_PATIENCE = 10  # epochs that ΔR may stay low


class CrossEntropyHead(nn.Module):
    """The linear layer on top of the featurizer and its cross-entropy loss (Section 7.2).

    Args:
        feature_dim: d.
        num_classes: k.
        scale: > 0, multiplies the features before the layer; the paper has 1.
    """

    def __init__(self, feature_dim: int, num_classes: int, scale: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(feature_dim, num_classes)
        self.scale = scale

    def logits(self, features: Float[Tensor, "m d"]) -> Float[Tensor, "m k"]:
        """Returns the logits of features of norm 1, before their softmax."""
        return self.linear(self.scale * features)

    def forward(self, features: Float[Tensor, "m d"], labels: Shaped[Tensor, "m ..."]) -> Float[Tensor, ""]:
        """Returns the mean cross-entropy over the samples of all processes, as with the other losses."""
        features, labels = _of_all(features, labels, "a training step")
        return functional.cross_entropy(self.logits(features), labels)

    def predict(self, features: Float[Tensor, "m d"]) -> Int[Tensor, " m"]:
        """Returns the most likely labels."""
        return self.logits(features).argmax(1)


class Objective:
    """What a network is trained on: a criterion, and what has to happen around it.

    Args:
        criterion: maps features (m, d) and labels (m,) to the scalar to minimise. Its parameters are trained with the
            network's, its state is part of a checkpoint. With several processes it receives each one's share of a
            batch, and should return the loss of the whole batch, as this package's do: it is not wrapped in
            DistributedDataParallel, so its parameters must have the same gradients everywhere.
        num_classes: k.
        eps_sq: ε² of the rates that are logged.
        gradient_clip: the largest norm that a step's gradient in the network's weights may have; None for any.
        cure: what to change if training diverges, for the error message.

    Attributes:
        criterion: as given.
        gradient_clip: as given.
        cure: as given.
    """

    def __init__(
        self,
        criterion: nn.Module,
        num_classes: int,
        *,
        eps_sq: float = 0.5,
        gradient_clip: float | None = None,
        cure: str = "Lower the learning rate",
    ) -> None:
        self.criterion = criterion
        self.num_classes = num_classes
        self.eps_sq = eps_sq
        self.gradient_clip = None if gradient_clip is None else check_number("gradient_clip", gradient_clip)
        self.cure = cure

    def before_epoch(self, epoch: int, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Does what is due before an epoch, the first of which is 1.

        Args:
            epoch: its number.
            model: the network.
            batches: one pass over the un-augmented training set, read only if needed.
        """

    def log(self, features: Float[Tensor, "m d"], labels: Int[Tensor, " m"]) -> dict[str, float | int]:
        """Returns the numbers that the log shows for an epoch's last batch (of all processes)."""
        features, labels = _of_all(features, labels, "rates", getattr(self.criterion, "process_group", None))
        rates = rate_reduction(features, labels, num_classes=self.num_classes, eps_sq=self.eps_sq)
        return {
            "batch_size": len(features),
            "batch_expansion": float(rates.expansion),
            "batch_compression": float(rates.compression),
        }

    def check(self, history: Sequence[dict[str, Any]]) -> None:
        """Raises NumericalError if the epochs so far show that there is no point in continuing."""

    @property
    def predict(self) -> Callable[[Tensor], Tensor] | None:
        """The classifier trained along with the network, from features (m, d) to labels (m,), or None."""
        return getattr(self.criterion, "predict", None)

    def describe(self) -> dict[str, Any]:
        """Returns what a summary says about the objective besides its name."""
        return {"mu": None, "atoms_per_class": None}

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns what the figures need from the objective."""
        return {}


class Variational(Objective):
    """V-MCR²: latches when due, logs the variational rates, and detects collapse.

    Args:
        criterion: the loss, which has its own µ, ρ, pull and so on.
        latch_every: epochs between latchings; the first is before the first epoch.
        expand_epochs: after this many epochs the criterion's `expand` is set to 0 permanently; None leaves it alone.
        gradient_clip: the largest norm that a step's gradient in the network's weights may have; None for any.
        stop_on_collapse: whether `check` raises.
    """

    def __init__(
        self,
        criterion: VMCR2Loss,
        *,
        latch_every: int = 50,
        expand_epochs: int | None = None,
        gradient_clip: float | None = None,
        stop_on_collapse: bool = True,
    ) -> None:
        check_count("latch_every", latch_every)
        if expand_epochs is not None:
            check_count("expand_epochs", expand_epochs)
        check_flag("stop_on_collapse", stop_on_collapse)
        rivals = "vmcr2.lr or vmcr2.mu" if criterion.mu is not None else "vmcr2.lr or vmcr2.balance"
        clip = ", or set vmcr2.gradient_clip to 0.02" if gradient_clip is None else ""
        super().__init__(
            criterion,
            criterion.num_classes,
            eps_sq=criterion.eps_sq,
            gradient_clip=gradient_clip,
            cure=f"Lower {rivals}{clip}",
        )
        self.loss = criterion
        self.latch_every = latch_every
        self.expand_epochs = expand_epochs
        self.stop_on_collapse = stop_on_collapse

    def before_epoch(self, epoch: int, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Latches before the first epoch and every `latch_every` after it, and ends the expansion when due."""
        if self.expand_epochs is not None and epoch > self.expand_epochs:
            self.loss.expand = 0.0
        if (epoch - 1) % self.latch_every == 0:
            self.loss.latch_from(model, batches)

    def log(self, features: Float[Tensor, "m d"], labels: Int[Tensor, " m"]) -> dict[str, float | int]:
        """Returns the exact rates of the batch, the dictionary's rates and the residual."""
        rates = self.loss.rates(features, labels)
        return super().log(features, labels) | {
            "residual": float(rates.residual),
            "variational_expansion": float(rates.expansion),
            "variational_compression": float(rates.compression),
        }

    def check(self, history: Sequence[dict[str, Any]]) -> None:
        """Raises NumericalError after a collapse: ΔR of the batches fell to a fifth, or of the training set to a tenth.

        It happens if the penalty outweighs the rates, ρ = µ m ε²/d well above 1, so that the dictionary follows the
        features instead of leading them; or if the learning rate is too high.
        """
        if not self.stop_on_collapse or len(history) <= _PATIENCE:
            return
        m, d = history[-1]["batch_size"], self.loss.feature_dim
        balance = self.loss.balance if self.loss.mu is None else balance_at(self.loss.mu, d, m, self.eps_sq)
        # Dropout's noise looks like ΔR in a batch; ΔR of the whole training set, if measured, is free of it.
        kinds = (("train", "the training set", 0.1, 5), ("batch", "the batches", 0.2, _PATIENCE))
        for kind, of, of_first, looks in kinds:
            measured = [line for line in history if f"{kind}_expansion" in line]
            reductions = [line[f"{kind}_expansion"] - line[f"{kind}_compression"] for line in measured]
            if has_collapsed(reductions, of_first=of_first, looks=looks):
                advice = advice_on_balance(balance, self.loss.mu is not None)
                said = (
                    f"the features have collapsed: ΔR of {of} fell from {reductions[0]:.3g} to {reductions[-1]:.3g} "
                    f"for good, the residual is {history[-1]['residual']:.3g}.{advice}"
                )
                raise NumericalError(said.removesuffix("."))  # the cure follows

    def describe(self) -> dict[str, Any]:
        """Returns µ, if it was chosen rather than ρ, and the atoms per class."""
        return {"mu": self.loss.mu, "atoms_per_class": self.loss.atoms_per_class}

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the codes Ã, (q, k) or (s, k)."""
        return {"codes": self.loss.dictionary.codes.float().cpu().numpy()}


def _of_all(features: Tensor, labels: Tensor, call: str, group: Any = None) -> tuple[Tensor, Tensor]:
    """Returns the batch of all processes; gradients flow back to each of them."""
    facts = {"feature_dim": features.shape[1], "the dtype of features": str(features.dtype)}
    _, sizes = agree(lambda: (None, [len(features)]), lambda _: facts, call, group)
    features, labels = gather_rows(features, labels, shares=[size for (size,) in sizes], group=group)
    return features, labels


def build(recipe: Recipe, num_classes: int) -> Objective:
    """Returns a recipe's objective, not yet latched.

    Args:
        recipe: names the objective and its settings.
        num_classes: k.
    """
    match recipe.objective:
        case "ce":
            head = CrossEntropyHead(recipe.feature_dim, num_classes, recipe.ce.scale)
            return Objective(head, num_classes, eps_sq=recipe.eps_sq, cure="Lower ce.lr")
        case "mcr2":
            return Objective(
                MCR2Loss(num_classes, eps_sq=recipe.eps_sq), num_classes, eps_sq=recipe.eps_sq, cure="Lower mcr2.lr"
            )
        case "vmcr2":
            settings = dict(vars(recipe.vmcr2))
            del settings["lr"], settings["expand_until"]
            around = {name: settings.pop(name) for name in ("latch_every", "gradient_clip", "stop_on_collapse")}
            loss = VMCR2Loss(num_classes, recipe.feature_dim, eps_sq=recipe.eps_sq, **settings)
            return Variational(loss, expand_epochs=recipe.expand_epochs, **around)
