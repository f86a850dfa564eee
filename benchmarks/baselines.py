"""What the objectives cost when written as the formulas stand: the rivals that `objective.py` measures against.

Columns of tables: (a) dense Π, (b) one d×d log-determinant per class, (c) V-MCR² with k dense d×d matrices,
(d) the smaller side, batched by Cholesky: the honest one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mcr2_dense_membership(z: Tensor, labels: Tensor, k: int, eps_sq: float = 0.5) -> Tensor:
    """(a) −ΔR of eq. (1) with Π as a k×m×m tensor of diagonal matrices."""
    m, d = z.shape
    pi = torch.zeros(k, m, m)
    pi[labels, torch.arange(m), torch.arange(m)] = 1
    eye = torch.eye(d)
    expansion = 0.5 * torch.logdet(eye + d / (m * eps_sq) * z.T @ z)
    compression = z.new_zeros(())
    for j in range(k):
        n = torch.trace(pi[j]) + 1e-8
        compression = compression + n / (2 * m) * torch.logdet(eye + d / (n * eps_sq) * z.T @ pi[j] @ z)
    return compression - expansion


def mcr2_logdet_per_class(z: Tensor, labels: Tensor, k: int, eps_sq: float = 0.5) -> Tensor:
    """(b) −ΔR of eq. (1), one d×d log-determinant per class, of that class's rows alone."""
    m, d = z.shape
    eye = torch.eye(d)
    total = -0.5 * torch.logdet(eye + d / (m * eps_sq) * z.T @ z)
    for j in range(k):
        own = z[labels == j]
        if len(own):
            total = total + len(own) / (2 * m) * torch.logdet(eye + d / (len(own) * eps_sq) * own.T @ own)
    return total


def mcr2_smaller_side(z: Tensor, labels: Tensor, k: int, eps_sq: float = 0.5) -> Tensor:
    """(d) −ΔR of eq. (1): classes padded to the largest, n×n Grams where n < d, one batched Cholesky."""
    m, d = z.shape
    counts = torch.bincount(labels, minlength=k)
    order = torch.argsort(labels)
    n = int(counts.max())
    starts = counts.cumsum(0) - counts
    steps = torch.arange(n)
    inside = steps < counts[:, None]
    rows = z[order[torch.where(inside, starts[:, None] + steps, 0)]] * inside[..., None]
    gram = rows @ rows.mT if n < d else rows.mT @ rows
    scale = d / (counts.clamp_min(1) * eps_sq)
    factor = torch.linalg.cholesky(torch.eye(gram.shape[1]) + scale[:, None, None] * gram)
    compression = (counts / m * factor.diagonal(dim1=1, dim2=2).log().sum(1)).sum()
    whole = torch.linalg.cholesky(torch.eye(d) + d / (m * eps_sq) * z.T @ z)
    return compression - whole.diagonal().log().sum()


class DenseVMCR2:
    """(c) V-MCR² with k dense d×d matrices, both steps by autograd on eq. (7) as it stands."""

    def __init__(self, atoms: Tensor, codes: Tensor, mu: float, eps_sq: float = 0.5, step: float = 5.0) -> None:
        self.atoms, self.codes, self.mu, self.eps_sq, self.step = atoms.clone(), codes.clone(), mu, eps_sq, step

    def residual(self, z: Tensor, pi: Tensor, atoms: Tensor, codes: Tensor) -> Tensor:
        counts = pi.sum(0).clamp_min(1e-8)
        total = z.new_zeros(())
        for j in range(pi.shape[1]):
            moment = (z * pi[:, j, None]).T @ z / counts[j]
            total = total + counts[j] * (moment - atoms * codes[:, j] @ atoms.T).square().sum()
        return 0.5 * self.mu * total

    def __call__(self, z: Tensor, labels: Tensor) -> Tensor:
        k = self.codes.shape[1]
        pi = torch.nn.functional.one_hot(labels, k).to(z.dtype)
        counts, d = pi.sum(0), z.shape[1]
        weights = counts / len(z)
        atoms, codes = self.atoms.requires_grad_(), self.codes.requires_grad_()
        beta = d / self.eps_sq
        model = sum(weights[j] * (atoms * codes[:, j] @ atoms.T) for j in range(k))
        expansion = 0.5 * torch.logdet(torch.eye(d) + beta * model)
        compression = 0.5 * (weights * torch.log1p(beta * codes).sum(0)).sum()
        objective = expansion - compression - self.residual(z.detach(), pi, atoms, codes)
        grad_atoms, grad_codes = torch.autograd.grad(objective, (atoms, codes))
        with torch.no_grad():
            norms = torch.stack([((z * pi[:, j, None]).T @ z / counts[j].clamp_min(1e-8)).norm() for j in range(k)])
            largest = codes.amax(0)
            bound = 2 * self.mu * (counts * largest * (norms + largest)).sum()
            bound_codes = self.mu * counts * (atoms.T @ atoms).square().norm()
            atoms = torch.nn.functional.normalize(atoms + self.step / bound * grad_atoms, dim=0)
            self.codes = (codes + self.step * torch.where(counts > 0, grad_codes / bound_codes, 0)).clamp_min(0)
            self.atoms = atoms
        return self.residual(z, pi, self.atoms, self.codes)
