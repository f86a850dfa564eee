"""docs/coming-from.md in numbers: the other's published formula, written anew in NumPy or torch, beside ours."""

import numpy as np
import pytest
import torch
from conftest import random_labels, unit_rows

import vmcr2

M, D, K = 60, 8, 4
EPS = 0.3


@pytest.fixture
def z():
    return unit_rows(M, D)


@pytest.fixture
def labels():
    return random_labels(M, K)


@pytest.fixture
def balanced():
    return torch.arange(M) % K


def logdet(matrix):
    return np.linalg.slogdet(np.eye(len(matrix)) + matrix)[1]


def mcr2(z, labels, gam1=1.0, gam2=1.0, eps=EPS):
    """ryanchankh/mcr2: columns are samples, Π_j is m×m; loss, R, R_c."""
    w = z.numpy().T
    d, m = w.shape
    expansion = logdet(gam1 * d / (m * eps) * w @ w.T) / 2
    compression = 0.0
    for j in range(K):
        pi = np.diag((labels.numpy() == j).astype(float))
        trace = np.trace(pi)
        compression += trace / (2 * m) * logdet(d / (trace * eps) * w @ pi @ w.T)
    return compression - gam2 * expansion, expansion, compression


class TestMCR2:
    def test_loss_and_rates(self, z, labels):
        loss, expansion, compression = mcr2(z, labels)
        np.testing.assert_allclose(vmcr2.MCR2Loss(K, eps_sq=EPS)(z, labels), loss)
        ours = vmcr2.rate_reduction(z, labels, eps_sq=EPS)
        np.testing.assert_allclose([ours.expansion, ours.compression], [expansion, compression])

    def test_gam1_is_a_finer_eps_in_the_expansion(self, z, labels):
        np.testing.assert_allclose(vmcr2.coding_rate(z, eps_sq=EPS / 3), mcr2(z, labels, gam1=3)[1])

    def test_gam2_weighs_the_expansion(self, z, labels):
        rates = vmcr2.rate_reduction(z, labels, eps_sq=EPS)
        np.testing.assert_allclose(rates.compression - 5 * rates.expansion, mcr2(z, labels, gam2=5)[0])

    def test_code_that_squares_eps_takes_the_root(self, z):
        w, eps = z.numpy().T, EPS**0.5
        np.testing.assert_allclose(vmcr2.coding_rate(z, eps_sq=EPS), logdet(D / (M * eps**2) * w @ w.T) / 2)


class TestEMPSSL:
    def test_one_view(self, z):
        w = z.numpy().T
        np.testing.assert_allclose(vmcr2.TotalCodingRateLoss(eps_sq=EPS)(z), -logdet(D / (M * EPS) * w @ w.T) / 2)

    def test_views_one_after_the_other(self, z):
        views = np.split(z.numpy(), 3)
        expected = -np.mean([logdet(D / (len(v) * EPS) * v.T @ v) / 2 for v in views])
        loss = vmcr2.TotalCodingRateLoss(eps_sq=EPS)
        np.testing.assert_allclose(loss(z.chunk(3)), expected)
        np.testing.assert_allclose(loss(z.view(3, -1, D)), expected)

    def test_defaults(self):
        assert vmcr2.TotalCodingRateLoss().eps_sq == 0.2


def simdino_expansion(views, ranks=1, covariances=None):
    """SimDINO's calc_expansion: views (v, m, d) of one rank, or their covariances summed over ranks."""
    _, m, d = views.shape
    whole = m * ranks
    total = 0.0
    for view, covariance in zip(views, views if covariances is None else covariances, strict=True):
        matrix = view.T @ view if covariances is None else covariance
        total += np.log(np.diag(np.linalg.cholesky(np.eye(d) + d / (whole * EPS) * matrix))).sum()
    return total / len(views) * (d + whole) / (d * whole)


class TestSimDINO:
    def test_expansion(self, z):
        views = z.view(3, -1, D)
        m = views.shape[1]
        ours = -vmcr2.TotalCodingRateLoss(eps_sq=EPS)(views) * (D + m) / (D * m)
        np.testing.assert_allclose(ours, simdino_expansion(views.numpy()))

    def test_reduced_covariances_are_the_batch_of_all_ranks(self, z):
        views = z.view(2, -1, D).numpy()
        first, second = np.split(views, 2, axis=1)
        summed = [a.T @ a + b.T @ b for a, b in zip(first, second, strict=True)]
        m = views.shape[1]
        ours = -vmcr2.TotalCodingRateLoss(eps_sq=EPS)(torch.tensor(views)) * (D + m) / (D * m)
        np.testing.assert_allclose(ours, simdino_expansion(first, 2, summed))

    def test_its_default_is_too_small_and_differs_by_rank(self, z):
        views = z.view(2, -1, D).numpy()
        first, second = np.split(views, 2, axis=1)
        alone = [simdino_expansion(part, 2) for part in (first, second)]
        assert max(alone) < simdino_expansion(views)
        assert alone[0] != alone[1]

    def test_means_of_two_views_are_taken(self, z):
        means = (z + z.flip(0)) / 2
        ours = vmcr2.TotalCodingRateLoss(eps_sq=EPS)(means)
        np.testing.assert_allclose(-ours * (D + M) / (D * M), simdino_expansion(means.numpy()[None]))


def published_transrate(z, labels, eps):
    """TransRate's code: the plain mean of the classes' rates."""
    z = z.numpy() - z.numpy().mean(0, keepdims=True)
    classes = [z[labels.numpy() == j] for j in range(K)]
    each = [0.5 * logdet(rows.T @ rows / (len(rows) * eps)) for rows in classes]
    return 0.5 * logdet(z.T @ z / (len(z) * eps)) - np.mean(each), each


class TestTransRate:
    def test_balanced(self, z, balanced):
        np.testing.assert_allclose(vmcr2.transrate(z, balanced, eps_sq=1e-3), published_transrate(z, balanced, 1e-3)[0])

    def test_unbalanced_classes_are_weighed(self, z, labels):
        plain, each = published_transrate(z, labels, 1e-4)
        shares = np.bincount(labels, minlength=K) / M
        np.testing.assert_allclose(vmcr2.transrate(z, labels), plain + np.mean(each) - shares @ each)

    def test_in_terms_of_the_rate_reduction(self, z, labels):
        ours = vmcr2.rate_reduction(z - z.mean(0), labels, eps_sq=D * 1e-2).reduction
        np.testing.assert_allclose(vmcr2.transrate(z, labels, eps_sq=1e-2), ours)


class TestKeepLost:
    @pytest.fixture
    def loss(self, z, balanced):
        loss = vmcr2.VMCR2Loss(
            K, D, atoms_per_class=2, eps_sq=EPS, mu=1.0, reduction="mean", structure="block"
        ).double()
        loss.latch(z, balanced)
        loss.dictionary.codes *= (
            torch.rand(loss.dictionary.codes.shape, generator=torch.Generator().manual_seed(0)) + 0.5
        )
        return loss.eval()

    def blocks(self, loss):
        gamma, codes = loss.dictionary.atoms.numpy(), loss.dictionary.codes.numpy()
        return [gamma[:, 2 * j : 2 * j + 2] @ np.diag(codes[:, j]) @ gamma[:, 2 * j : 2 * j + 2].T for j in range(K)]

    def regulariser(self, z, labels, loss):
        """Σ_j ‖C_j − B_j‖²/γ_j."""
        total = 0.0
        for j, block in enumerate(self.blocks(loss)):
            rows = z.numpy()[labels.numpy() == j]
            total += ((rows.T @ rows / len(rows) - block) ** 2).sum() / (len(rows) / len(z))
        return total

    def test_compression(self, z, balanced, loss):
        expected = 0.5 * (np.log(1 + D / EPS * loss.dictionary.codes.numpy()).sum(0) / K).sum()
        np.testing.assert_allclose(loss.rates(z, balanced).compression, expected)

    def test_expansion_lacks_the_class_weights(self, z, balanced, loss):
        expected = 0.5 * logdet(D / EPS * sum(self.blocks(loss)))
        assert loss.rates(z, balanced).expansion < expected
        loss.dictionary.codes *= K
        np.testing.assert_allclose(loss.rates(z, balanced).expansion, expected)

    def test_residual_lacks_the_number_of_samples(self, z, balanced, loss):
        expected = 0.5 * loss.mu * self.regulariser(z, balanced, loss) / K**2
        np.testing.assert_allclose(loss.rates(z, balanced).residual / M, expected)

    def test_what_the_network_minimises(self, z, balanced, loss):
        np.testing.assert_allclose(2 * K**2 * loss(z, balanced), self.regulariser(z, balanced, loss))
