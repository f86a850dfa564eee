"""Proposition 3.1 outside MCR²: completing a low-rank covariance from a few of its entries.

The rank of a positive semi-definite M is not differentiable; logdet(I + cM) is the classic smooth surrogate for it, as
in system identification, where M is a covariance of past and future. Here it is never computed: M is written as U Uᵀ
and `variational_logdet`, a sum of logarithms over the columns of U, takes its place.

    python examples/low_rank_completion.py
"""

import torch

import vmcr2

SIZE, RANK, SEEN = 60, 4, 0.25


def complete(observed: torch.Tensor, mask: torch.Tensor, weight: float) -> torch.Tensor:
    """Returns U (SIZE, SIZE) that fits the observed entries of M; `weight` is the log-determinant's."""
    torch.manual_seed(1)
    factor = (0.3 * torch.randn(SIZE, SIZE, dtype=torch.float64)).requires_grad_()
    optimizer = torch.optim.Adam([factor], 0.02)
    for _ in range(3000):
        misfit = (mask * (factor @ factor.T - observed)).square().sum() / mask.sum()
        loss = misfit + weight * vmcr2.variational_logdet(factor, scale=10.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return factor.detach()


def main() -> None:
    torch.manual_seed(0)
    truth = torch.randn(SIZE, RANK, dtype=torch.float64)
    matrix = truth @ truth.T / RANK
    upper = torch.triu(torch.rand(SIZE, SIZE) < SEEN)
    mask = (upper | upper.T).double()
    print(f"a {SIZE}×{SIZE} covariance of rank {RANK}, {mask.mean():.0%} of its entries seen")
    for weight in (0.0, 1e-3):
        factor = complete(matrix, mask, weight)
        found = factor @ factor.T
        error = ((1 - mask) * (found - matrix)).norm() / ((1 - mask) * matrix).norm()
        rank = int((torch.linalg.eigvalsh(found) > 1e-2).sum())
        exact = float(torch.logdet(torch.eye(SIZE, dtype=torch.float64) + 10 * found))
        bound = float(vmcr2.variational_logdet(factor, scale=10.0))
        print(
            f"weight {weight:g}: rank {rank}, relative error of the unseen entries {error:.3f}, "
            f"logdet {exact:.2f}, its bound {bound:.2f}"
        )


if __name__ == "__main__":
    main()
