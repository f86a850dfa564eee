"""Collapse: all features become alike, and ΔR falls to almost nothing. The loss warns of it; training runs stop.

The loss's value does not show it: features that all coincide match a dictionary that has followed them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vmcr2.membership import as_membership
from vmcr2.rates import checked_rates, reduction_of_lines

_WATCH_EVERY = 20  # training steps between looks at ΔR: rare enough to cost little
_HEAVY = 0.5  # a ρ above this may be what makes features collapse


@dataclass(frozen=True)
class _Low:
    """How low ΔR must be, and for how long, before features count as collapsed.

    Attributes:
        of_best: ΔR is below this share of the best so far,
        of_expansion: and below this share of R,
        looks: this many times in a row.
    """

    of_best: float
    of_expansion: float
    looks: int

    def holds(self, reduction: float, expansion: float, best: float) -> bool:
        """Whether ΔR is that low at one look."""
        return reduction < min(self.of_best * best, self.of_expansion * expansion)


# In a small batch of natural images an untrained network's features have a high ΔR without separating any class. In
# training, ΔR may stay below a fifth of that for a long time while it is still a quarter of R; after a collapse it is
# almost 0.
_LASTING = _Low(of_best=0.2, of_expansion=0.1, looks=10)
_DEEP = _Low(of_best=0.05, of_expansion=math.inf, looks=3)


def has_collapsed(reductions: Sequence[float], *, of_first: float, looks: int) -> bool:
    """Whether a run's ΔR has stayed below a share of its first value for `looks` measurements in a row.

    A healthy run may start with a dip, deep if its epochs are short, but recovers sooner. R plays no part here:
    after an epoch ΔR is no longer that of an untrained network, which may be high by chance.

    Args:
        reductions: ΔR after each epoch, or whenever it was measured.
        of_first: the share of the first one, in (0, 1).
        looks: how many times in a row, at least 1.
    """
    return len(reductions) > looks and max(reductions[-looks:]) < of_first * reductions[0]


def advice_on_balance(balance: float, given: bool) -> str:
    """Returns a sentence on ρ for a message about collapse; empty unless ρ is high enough to be the cause.

    Args:
        balance: ρ.
        given: whether ρ follows from a µ that the user gave, rather than being given itself.
    """
    if balance <= _HEAVY:
        return ""
    cure = "lower mu (mu=None takes the ρ of balance, by default 0.05)" if given else "lower balance"
    return (
        f" ρ = mu * m * eps_sq / feature_dim is {balance:.2g}: from about 1 the dictionary cannot lead the features, "
        f"so {cure}."
    )


class CollapseWatch:
    """Warns once when the features of a loss's batches have collapsed.

    A batch that is nearly all one class can only have a small ΔR, so each batch's ΔR is taken relative to that of one
    orthogonal line per class. It begins anew when the dictionary's steps go back, as after loading an earlier state.
    """

    def __init__(self) -> None:
        self.taken = 0
        self._begin()

    def _begin(self) -> None:
        self.steps = 0
        self.best = 0.0
        self.low = {_DEEP: 0, _LASTING: 0}  # looks in a row
        self.warned = False

    def is_due(self, taken: int) -> bool:
        """Counts a training step, and returns whether it is one to look at; `taken` is the dictionary's count."""
        if taken < self.taken:
            self._begin()
        self.taken = taken
        self.steps += 1
        return not self.warned and self.steps % _WATCH_EVERY == 1

    def look(self, features: Float[Tensor, "m d"], rows_or_labels: Tensor, eps_sq: float, advice: str) -> None:
        """Looks at a batch's ΔR.

        Args:
            features: Z, checked.
            rows_or_labels: labels (m,), or soft rows (m, k), of which only the largest entry counts: with a share of
                every class in every sample there would be k determinants of d×d.
            eps_sq: ε².
            advice: from `advice_on_balance`, for the warning.
        """
        labels = rows_or_labels.argmax(1) if rows_or_labels.ndim == 2 else rows_or_labels
        membership = as_membership(features, labels.unique(return_inverse=True)[1], None)
        if membership.num_classes < 2:
            return  # ΔR of a single class is 0 whatever its features
        rates = checked_rates(features, membership, eps_sq)
        reduction, expansion = torch.stack([rates.reduction, rates.expansion]).tolist()
        of_lines = reduction_of_lines(membership.sizes, features.shape[1], eps_sq)
        if of_lines < 1e-6:
            return  # in one dimension there is no ΔR
        self.best = max(self.best, reduction / of_lines)
        best = self.best * of_lines
        # If features are all alike from the start, ΔR is 0 apart from rounding.
        for low in self.low:
            self.low[low] = self.low[low] + 1 if self.best > 1e-3 and low.holds(reduction, expansion, best) else 0
        if all(count < low.looks for low, count in self.low.items()):
            return
        self.warned = True
        warnings.warn(
            f"the features have collapsed: this batch has a ΔR of {reduction:.3g}, where features as good as the best "
            f"so far would have {best:.3g}.{advice} Lower the learning rate, or clip the network's gradients",
            stacklevel=6,  # the call of the loss, past its two `forward` and Module's own two
        )
