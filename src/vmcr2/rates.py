"""Coding rates R, R_c and ΔR = R − R_c of eq. (1), exact, on the smaller side of every matrix.

With β = d/ε², γ_j = n_j/m and C_j = Zᵀ Diag(Π_j) Z / n_j the rates are R = ½ logdet(I + β ZᵀZ/m) and
R_c = Σ_j γ_j ½ logdet(I + β C_j). Because logdet(I_d + c ZᵀZ) = logdet(I_n + c ZZᵀ), a class of n_j samples costs
min(d, n_j)³, and classes of similar size are factorised in one batch. Also the largest ΔR that classes can have.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from vmcr2.checks import check_number, check_tensor, feature_conditions, read_conditions
from vmcr2.errors import InputError
from vmcr2.linalg import FLOAT64_RANGE, bisected, gram, half_logdet, is_batched, rate_dtype, require_finite, untraced
from vmcr2.membership import Membership, as_membership, moments, weighted_rows


class RateReduction(NamedTuple):
    """R and R_c, in nats; both are rates: ≥ 0, and larger for more volume."""

    expansion: Float[Tensor, ""]
    compression: Float[Tensor, ""]

    @property
    def reduction(self) -> Float[Tensor, ""]:
        """ΔR = R − R_c, which MCR² maximises; ≥ 0 apart from rounding, for labels and soft membership alike."""
        return self.expansion - self.compression


@untraced
def coding_rate(features: Float[Tensor, "*b m d"], *, eps_sq: float = 0.5) -> Float[Tensor, "*b"]:
    """Returns the coding rate R = ½ logdet(I + d/(m ε²) ZᵀZ) of eq. (1), for one matrix or each in a batch.

    Args:
        features: Z, (..., m, d), rows are samples; finite, any floating dtype. Rows need not have norm 1 here.
        eps_sq: the squared precision ε² > 0.

    Returns:
        One value per matrix, in nats, float32 or wider even under autocast. Differentiable.

    Raises:
        InputError: a wrong argument (a ValueError).
        NumericalError: the factorisation failed, or the features' norms are too large for it.
    """
    eps_sq = check_number("eps_sq", eps_sq)
    check_tensor("features", features, "of shape (..., m, d)")
    batched = features.ndim > 2
    if batched and 0 in features.shape:
        raise InputError(
            f"features must have shape (..., m, d) without an empty dimension, got {tuple(features.shape)}"
        )
    read_conditions(feature_conditions(features.flatten(0, -2) if batched else features))
    dtype = rate_dtype(features.shape[-1], eps_sq, features, largest=largest_norm(features))
    rate = expansion_rate(features.to(dtype), eps_sq)
    require_finite(rate)
    return rate


@untraced
def rate_reduction(
    features: Float[Tensor, "m d"],
    membership: Int[Tensor, " m"] | Shaped[Tensor, "m k"],
    *,
    num_classes: int | None = None,
    eps_sq: float = 0.5,
) -> RateReduction:
    """Returns R and R_c of eq. (1) and, as `.reduction`, their difference ΔR.

    Args:
        features: Z, (m, d), rows are samples; finite, any floating dtype. Rows need not have norm 1 here.
        membership: Π as integer labels (m,) in [0, k), or as rows (m, k) ≥ 0 that sum to 1. Classes may be absent.
        num_classes: k; by default inferred from the membership.
        eps_sq: the squared precision ε² > 0.

    Returns:
        Scalars in nats, float32 or wider even under autocast. Differentiable in features and soft membership.

    Raises:
        InputError: a wrong argument (a ValueError).
        NumericalError: the factorisation failed, or the features' norms are too large for it.
    """
    eps_sq = check_number("eps_sq", eps_sq)
    checked = as_membership(features, membership, num_classes)
    rates = checked_rates(features, checked, eps_sq, largest_norm(features))
    require_finite(*rates)
    return rates


@untraced
def transrate(
    features: Float[Tensor, "m d"],
    labels: Int[Tensor, " m"] | Shaped[Tensor, "m k"],
    *,
    eps_sq: float = 1e-4,
) -> Float[Tensor, ""]:
    """Returns TransRate, R(Z, ε) − R(Z, ε | Y): how well features would transfer to a task (Huang et al., ICML 2022).

    It is ΔR in other units. Features are centred by their mean over all samples (not class by class, and not scaled to
    norm 1), and the rate is ½ logdet(I + ZᵀZ/(m ε²)), without the dimension d of eq. (1), so their ε² is d times finer
    than that of `rate_reduction`. R(Z, ε | Y) weights classes by their share of the samples; the authors' code takes
    their plain mean, which is the same for balanced classes.

    Args:
        features: Z, (m, d), rows are samples; finite, any floating dtype. After centring, norms may be up to 10⁶ ε.
        labels: Y, (m,) in [0, k), or rows (m, k) ≥ 0 that sum to 1.
        eps_sq: the squared precision ε² > 0; the authors' code calls this `eps`.

    Returns:
        A scalar in nats, ≥ 0 apart from rounding, computed in float64. Differentiable.

    Raises:
        InputError: a wrong argument (a ValueError).
        NumericalError: the factorisation failed, or the features' norms are too large for it.
    """
    eps_sq = check_number("eps_sq", eps_sq)
    lowest, highest = FLOAT64_RANGE
    if not lowest <= 1 / eps_sq <= highest:
        raise InputError(
            f"eps_sq must be from {1 / highest:.3g} to {1 / lowest:.3g} (beyond that float64 loses log(1 + 1/eps_sq)), "
            f"got {eps_sq!r}"
        )
    checked = as_membership(features, labels, None, name="labels")
    widened = features.double()
    centred = widened - widened.mean(0)
    rates = checked_rates(centred, checked, features.shape[1] * eps_sq, largest_norm(centred))
    require_finite(*rates)
    return rates.reduction


def largest_norm(*features: Tensor) -> float:
    """Returns the norm of the longest row, or NaN under `torch.vmap`, whose batched tensors cannot be read."""
    if any(is_batched(each) for each in features):
        return math.nan
    norms = [torch.linalg.vector_norm(each.detach(), dim=-1, dtype=torch.float64).max() for each in features]
    return float(torch.stack(norms).max())


def checked_rates(
    features: Float[Tensor, "m d"], membership: Membership, eps_sq: float, largest: float = 1.0
) -> RateReduction:
    """Returns R and R_c of eq. (1) for features that have been checked, the longest of norm `largest`.

    They are NaN if a factorisation failed. If `largest` is NaN, meaning unknown, they are float64.
    """
    dtype = rate_dtype(features.shape[1], eps_sq, features, largest=largest)
    widened = features.to(dtype)
    return RateReduction(expansion_rate(widened, eps_sq), compression_rate(widened, membership.to(dtype), eps_sq))


def expansion_rate(features: Float[Tensor, "*b m d"], eps_sq: float) -> Float[Tensor, "*b"]:
    """Returns R of eq. (1) for each matrix, in the features' own dtype."""
    m, d = features.shape[-2:]
    return half_logdet(gram(features.mT if d <= m else features) * (d / (m * eps_sq)))


def compression_rate(features: Float[Tensor, "m d"], membership: Membership, eps_sq: float) -> Float[Tensor, ""]:
    """Returns R_c of eq. (1) in the features' own dtype."""
    m, d = features.shape
    total = features.new_zeros(())
    for group in membership.groups(d):
        rows = group.take(features)
        for part in group.split(d):
            # √w has no gradient at w = 0, so a membership that is being learned stays on the d side, linear in w.
            if rows.shape[1] < d and not membership.is_learned:
                matrices = gram(weighted_rows(rows, part.shares))
            else:
                matrices = moments(rows, part.shares)
            total = total + (part.counts / m * half_logdet(matrices * (d / eps_sq))).sum()
    return total


def reduction_of_lines(sizes: Int[Tensor, " k"], feature_dim: int, eps_sq: float) -> float:
    """Returns the largest ΔR, in nats, of unit features with each class on a line: eq. (1) with C_j of rank 1.

    For up to d classes it is that of orthogonal lines. For more, R is largest if the lines are spread as evenly as the
    sizes allow: a frame of vectors with these energies can have any spectrum that majorises them.

    Args:
        sizes: n_j ≥ 0 of the classes, not all 0.
        feature_dim: d.
        eps_sq: ε² > 0.
    """
    d, beta = feature_dim, feature_dim / eps_sq
    shares = (sizes[sizes > 0].double() / sizes.sum()).cpu().sort(descending=True).values
    spectrum = shares[:d]
    if len(shares) > d:
        # The flattest spectrum keeps a line apart as long as it has more than an even share of what is left.
        left = shares.flip(0).cumsum(0).flip(0)[:d]
        even = left / torch.arange(d, 0, -1, device="cpu")
        apart = int((spectrum <= even * (1 + 1e-9)).to(torch.uint8).argmax())
        spectrum[apart:] = even[apart]
    return 0.5 * (float(torch.log1p(beta * spectrum).sum()) - math.log1p(beta))


def _worth(scaled: Any) -> Any:
    """Returns twice what one more dimension adds to R; `scaled` is β times the energy in a direction of its class."""
    return np.log1p(scaled) - scaled / (1 + scaled)


def _energy_worth(price: float, beta: float) -> float:
    """Returns the energy of a direction, at most 1, at which one more dimension is worth the price."""
    return float(bisected(lambda energy: _worth(beta * energy) > price, 0.0, 1.0, 60)[1])


def largest_reduction(feature_dim: int, class_counts: Int[np.ndarray, " k"], eps_sq: float) -> float:
    """Returns the largest ΔR that unit features in classes of these sizes can have.

    Class j has r_j directions of equal energy, r_j real and from 1 to n_j. If d dimensions are enough for all, they are
    orthogonal (Yu et al., 2020, Theorem 1). If not, classes so small that a direction of their own would hold less
    energy than those of the other classes have none: each is a line, and together these lines spread evenly over the
    remaining dimensions. ΔR is then

    Σ_j r_j/2 [log(1 + β γ_j/r_j) − γ_j log(1 + β/r_j)] + D/2 log(1 + β γ_s/D) − γ_s/2 log(1 + β)

    where j runs over the classes with directions of their own, and the others have the remaining D = d − Σ_j r_j
    dimensions and a share γ_s of the samples. At the best r_j one more dimension is worth the same everywhere. With
    balanced classes the result is d/2 [log(1 + 1/ε²) − log(1 + k/ε²)/k] for k ≤ d, and
    d/2 log(1 + 1/ε²) − ½ log(1 + d/ε²) for k > d.

    Args:
        feature_dim: d.
        class_counts: n_j > 0.
        eps_sq: ε².
    """
    d, beta = feature_dim, feature_dim / eps_sq
    counts, alike = np.unique(np.asarray(class_counts, dtype=np.float64), return_counts=True)
    weights = counts / (counts @ alike)
    most = np.minimum(counts, d)

    def directions(price: float) -> np.ndarray:
        """Returns the r_j from 1 to `most` at which one more direction adds no more to ΔR than its price."""

        def enough(r: np.ndarray) -> np.ndarray:
            return _worth(beta * weights / r) - weights * _worth(beta / r) <= price

        return bisected(enough, np.ones_like(most), most, 30)[0]

    def allotted(price: float) -> tuple[np.ndarray, np.ndarray, float]:
        """Returns r_j, how many classes of each size have directions of their own, the dimensions the others use."""
        even = _energy_worth(price, beta) if price > 0 else 0.0
        own = weights > even
        return directions(price), alike * own, float(weights @ (alike * ~own)) / even if even else 0.0

    def fits(price: float) -> bool:
        r, own, left = allotted(price)
        return bool(r @ own + left <= d)

    r, own, _ = allotted(0.0)
    if r @ own > d:
        r, own, _ = allotted(bisected(fits, 0.0, float(_worth(beta)), 40)[1])
    value = (r * (np.log1p(beta * weights / r) - weights * np.log1p(beta / r))) @ own
    shared, left = 1 - weights @ own, d - r @ own
    if (own == 0).any():
        value += left * np.log1p(beta * shared / left) - shared * np.log1p(beta)
    return 0.5 * float(value) if value > 1e-9 else 0.0  # one dimension gives 0 apart from rounding


def effective_rank(eigenvalues: Float[Tensor, "k d"]) -> Float[Tensor, " k"]:
    """Returns e to the entropy of the eigenvalues' shares (Roy and Vetterli, 2007, here of the second moment)."""
    shares = eigenvalues.clamp_min(0)
    shares = shares / shares.sum(1, keepdim=True)
    return torch.special.entr(shares).sum(1).exp()
