"""The paper's formulas in float64 NumPy, written from the paper alone: columns are samples, A is at batch scale."""

import numpy as np


def logdet_plus_identity(matrix):
    sign, value = np.linalg.slogdet(np.eye(len(matrix)) + matrix)
    assert sign > 0
    return value


def one_hot(labels, k):
    return np.eye(k)[labels]


def rates(z, pi, eps_sq):
    """R and R_c of eq. (1); z is (d, m), pi is (m, k)."""
    d, m = z.shape
    expansion = 0.5 * logdet_plus_identity(d / (m * eps_sq) * z @ z.T)
    compression = 0.0
    for j in range(pi.shape[1]):
        n = pi[:, j].sum()
        if n > 0:
            term = logdet_plus_identity(d / (n * eps_sq) * z @ np.diag(pi[:, j]) @ z.T)
            compression += n / m / 2 * term
    return expansion, compression


def variational(z, pi, gamma, a, mu, eps_sq):
    """R^v, R_c^v and (µ/2m) M of eq. (7), A at batch scale, d×d matrices built as they stand."""
    d, m = z.shape
    alpha = d / (m * eps_sq)
    expansion = 0.5 * logdet_plus_identity(alpha * sum(gamma @ np.diag(a[:, j]) @ gamma.T for j in range(a.shape[1])))
    compression, penalty = 0.0, 0.0
    for j in range(pi.shape[1]):
        n = pi[:, j].sum()
        if n == 0:
            continue
        compression += n / m / 2 * np.log(1 + d / (n * eps_sq) * a[:, j]).sum()
        difference = z @ np.diag(pi[:, j]) @ z.T - gamma @ np.diag(a[:, j]) @ gamma.T
        penalty += m / n * (difference**2).sum()
    return expansion, compression, mu / (2 * m) * penalty


def lipschitz(z, pi, gamma, a, mu):
    """L_Γ and L_A of eqs. (17) and (19), which the paper states for balanced classes."""
    m, k = pi.shape
    bound_atoms = 0.0
    for j in range(k):
        moment = np.linalg.norm(z @ np.diag(pi[:, j]) @ z.T)
        bound_atoms += moment * a[:, j].max() + a[:, j].max() ** 2
    return 2 * mu * k / m * bound_atoms, mu * k / m * np.linalg.norm((gamma.T @ gamma) ** 2)


def numeric_gradient(function, point, step=1e-6):
    """Central differences."""
    gradient = np.zeros_like(point)
    for place in np.ndindex(*point.shape):
        up, down = point.copy(), point.copy()
        up[place] += step
        down[place] -= step
        gradient[place] = (function(up) - function(down)) / (2 * step)
    return gradient


def proximal_step(z, pi, gamma, a, mu, eps_sq, step_atoms, step_codes):
    """Algorithm 1, lines 5 to 10, by numeric gradients, for balanced classes."""

    def objective(g, codes):
        expansion, compression, penalty = variational(z, pi, g, codes, mu, eps_sq)
        return expansion - compression - penalty

    bound_atoms, bound_codes = lipschitz(z, pi, gamma, a, mu)
    new_gamma = gamma + step_atoms / bound_atoms * numeric_gradient(lambda g: objective(g, a), gamma)
    new_a = a + step_codes / bound_codes * numeric_gradient(lambda codes: objective(gamma, codes), a)
    return new_gamma / np.linalg.norm(new_gamma, axis=0), np.maximum(new_a, 0)


def latch(z, pi, s):
    """Algorithm 2."""
    d = z.shape[0]
    k = pi.shape[1]
    gamma, a = np.zeros((d, s * k)), np.zeros((s * k, k))
    for j in range(k):
        u, sigma, _ = np.linalg.svd(z @ np.diag(pi[:, j]) @ z.T)
        gamma[:, j * s : (j + 1) * s] = u[:, :s]
        a[j * s : (j + 1) * s, j] = sigma[:s]
    return gamma, a


def nearest_subspace(train, labels, test, k, r):
    """Eq. (8); train and test are (d, m)."""
    d = train.shape[0]
    distances = []
    for j in range(k):
        u, _, _ = np.linalg.svd(train[:, labels == j] @ train[:, labels == j].T)
        projector = np.eye(d) - u[:, :r] @ u[:, :r].T
        distances.append(((projector @ test) ** 2).sum(0))
    return np.argmin(distances, axis=0)
