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


def variational_objective(z, pi, gamma, a, mu, eps_sq):
    """R^v − R_c^v − (µ/2m) M, which eq. (7) maximises: Algorithm 1, line 5."""
    expansion, compression, penalty = variational(z, pi, gamma, a, mu, eps_sq)
    return expansion - compression - penalty


def penalty_expanded(z, pi, gamma, a, mu):
    """(µ/2m) M for balanced classes as the second line of eq. (9) has it."""
    m, k = pi.shape
    data = np.sum((pi @ pi.T) * (z.T @ z) ** 2)
    cross = np.sum((a @ pi.T) * (gamma.T @ z) ** 2)
    own = np.sum((a @ a.T) * (gamma.T @ gamma) ** 2)
    return mu * k / (2 * m) * data - mu * k / m * cross + mu * k / (2 * m) * own


def penalty_atom_gradient(z, pi, gamma, a, mu):
    """∇_Γ of (µ/2m) M for balanced classes, eq. (10)."""
    m, k = pi.shape
    total = np.zeros_like(gamma)
    for j in range(k):
        code = np.diag(a[:, j])
        total += z @ np.diag(pi[:, j]) @ z.T @ gamma @ code - gamma @ code @ gamma.T @ gamma @ code
    return -2 * mu * k / m * total


def penalty_code_gradient(z, pi, gamma, a, mu):
    """∇_A of (µ/2m) M for balanced classes, eq. (11)."""
    m, k = pi.shape
    return mu * k / m * ((gamma.T @ gamma) ** 2 @ a - (gamma.T @ z) ** 2 @ pi)


def move_atoms(z, pi, gamma, a, mu, eps_sq, nu):
    """Algorithm 1, line 7, by a numeric gradient; balanced classes."""
    gradient = numeric_gradient(lambda g: variational_objective(z, pi, g, a, mu, eps_sq), gamma)
    return gamma + nu / lipschitz(z, pi, gamma, a, mu)[0] * gradient


def move_codes(z, pi, gamma, a, mu, eps_sq, nu, bound):
    """Algorithm 1, lines 8 and 9, by a numeric gradient, at the Γ given; L_A is that of line 6."""
    gradient = numeric_gradient(lambda codes: variational_objective(z, pi, gamma, codes, mu, eps_sq), a)
    return np.maximum(a + nu / bound * gradient, 0)


def unit_columns(gamma):
    """Algorithm 1, line 10."""
    return gamma / np.linalg.norm(gamma, axis=0)


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
