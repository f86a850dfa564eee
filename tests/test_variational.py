"""Variational rates, residual, step bounds and the dictionary step against the paper's batch-scale formulas."""

import numpy as np
import pytest
import reference
import torch
from conftest import random_labels, random_rows, unit_rows
from hypothesis import given
from hypothesis import strategies as st

import vmcr2
from vmcr2.dictionary import proximal_step
from vmcr2.membership import as_membership
from vmcr2.variational import (
    ascent_direction,
    atom_overlap,
    class_moments,
    lipschitz_atoms,
    lipschitz_codes,
    residual,
    variational_compression,
    variational_expansion,
)

EPS_SQ, MU = 0.5, 0.7


def balanced_labels(m, k):
    return torch.arange(m) % k


def random_dictionary(d, k, s, *, seed=0, block=False):
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.nn.functional.normalize(torch.randn(d, k * s, generator=generator, dtype=torch.float64), dim=0)
    codes = torch.rand(s if block else k * s, k, generator=generator, dtype=torch.float64)
    return atoms, codes


def in_shared_structure(codes):
    """Writes block codes (s, k) as shared codes (k s, k)."""
    s, k = codes.shape
    full = codes.new_zeros(k * s, k)
    for j in range(k):
        full[j * s : (j + 1) * s, j] = codes[:, j]
    return full


CASES = [(12, 5, 3, 2), (8, 9, 2, 3), (30, 4, 5, 4)]


@pytest.mark.parametrize(("m", "d", "k", "s"), CASES)
@pytest.mark.parametrize("kind", ["balanced", "labels", "soft"])
@pytest.mark.parametrize("block", [False, True])
def test_objective_equals_equation_7(m, d, k, s, kind, block):
    z = unit_rows(m, d)
    membership = {
        "balanced": balanced_labels(m, k),
        "labels": torch.randint(k - 1, (m,), generator=torch.Generator().manual_seed(0)),  # the last class is absent
        "soft": random_rows(m, k),
    }[kind]
    checked = as_membership(z, membership, k)
    atoms, codes = random_dictionary(d, k, s, block=block)
    pi = membership.numpy() if kind == "soft" else reference.one_hot(membership.numpy(), k)
    shared = in_shared_structure(codes) if block else codes
    batch_scale = shared.numpy() * pi.sum(0)
    expected = reference.variational(z.numpy().T, pi, atoms.numpy(), batch_scale, MU, EPS_SQ)
    assert float(variational_expansion(atoms, codes, checked.class_weights, EPS_SQ)) == pytest.approx(expected[0])
    assert float(variational_compression(codes, checked.class_weights, d, EPS_SQ)) == pytest.approx(expected[1])
    assert float(residual(z, checked, atoms, codes, MU)) == pytest.approx(expected[2])


@pytest.mark.parametrize(("m", "d", "k", "s"), CASES)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("block", [False, True])
def test_gradients(m, d, k, s, soft, block):
    z = unit_rows(m, d).requires_grad_()
    membership = random_rows(m, k) if soft else random_labels(m, k)
    checked = as_membership(z, membership, k)
    given = random_dictionary(d, k, s, block=block)
    assert torch.autograd.gradcheck(lambda features: residual(features, checked, *given, MU), (z,))
    atoms, codes = (tensor.requires_grad_() for tensor in given)
    assert torch.autograd.gradcheck(
        lambda *given: residual(given[0], checked, given[1], given[2], MU), (z, atoms, codes)
    )


@pytest.mark.parametrize(("m", "d", "k", "s"), [*CASES, (40, 6, 8, 2)])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("kind", ["dense", "latched", "block"])
def test_closed_forms_equal_autograd(m, d, k, s, soft, kind):
    """Each way through: all codes in use, the few that latching leaves in use, and one block a class."""
    z = unit_rows(m, d).requires_grad_()
    membership = random_rows(m, k) if soft else torch.randint(max(1, k - 1), (m,))
    checked = as_membership(z, membership, k)
    atoms, codes = random_dictionary(d, k, s, block=kind != "dense")
    if kind == "latched":
        codes = in_shared_structure(codes)
    value = residual(z, checked, atoms, codes, MU)
    (gradient,) = torch.autograd.grad(value, z)
    free = z.detach().requires_grad_(), atoms.requires_grad_(), codes.requires_grad_()
    plain = residual(free[0], checked, free[1], free[2], MU)
    weights = checked.class_weights
    expansion = variational_expansion(atoms, codes, weights, EPS_SQ)
    objective = expansion - variational_compression(codes, weights, d, EPS_SQ) - plain
    by_autograd = torch.autograd.grad(objective, free)
    assert float(value.detach()) == pytest.approx(float(plain.detach()))
    torch.testing.assert_close(gradient, -by_autograd[0], rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        moved = ascent_direction(z.detach(), checked, atoms, codes, MU, EPS_SQ)
    torch.testing.assert_close(moved[0], by_autograd[1], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(moved[1], by_autograd[2], rtol=1e-9, atol=1e-11)


def test_learned_membership_has_a_gradient():
    z = unit_rows(6, 4).requires_grad_()
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    atoms, codes = random_dictionary(4, 3, 2)

    def of_rows(features, given):
        return residual(features, as_membership(features, given.softmax(1), 3), atoms, codes, MU)

    assert torch.autograd.gradcheck(of_rows, (z, logits))


@pytest.mark.parametrize(("m", "d", "k", "s"), [(12, 5, 3, 2), (8, 9, 2, 3)])
def test_step_is_algorithm_1(m, d, k, s):
    """With balanced classes codes at class scale take the very step that the paper takes at batch scale."""
    z, labels = unit_rows(m, d), balanced_labels(m, k)
    checked = as_membership(z, labels, k)
    atoms, codes = random_dictionary(d, k, s)
    n = m / k
    pi = reference.one_hot(labels.numpy(), k)
    bounds = reference.lipschitz(z.numpy().T, pi, atoms.numpy(), codes.numpy() * n, MU)
    norms_sq = class_moments(z, checked).norms_sq
    assert float(lipschitz_atoms(norms_sq, checked.counts, codes, MU)) == pytest.approx(bounds[0])
    # The bound on Ã's gradient is n_j² times that on A's: Ã_j = A_j / n_j.
    bound_codes = lipschitz_codes(atom_overlap(atoms, codes), checked.counts, MU, k)
    assert bound_codes.numpy() == pytest.approx(bounds[1] * n * n)
    got = proximal_step(z, checked, atoms, codes, mu=MU, eps_sq=EPS_SQ, step_atoms=5, step_codes=5)
    expected = reference.proximal_step(z.numpy().T, pi, atoms.numpy(), codes.numpy() * n, MU, EPS_SQ, 5, 5)
    np.testing.assert_allclose(got[0].numpy(), expected[0], atol=1e-7)
    np.testing.assert_allclose(got[1].numpy() * n, expected[1], atol=1e-6)


@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 5), st.integers(0, 10**6), st.booleans())
def test_step_keeps_the_constraints(m, d, k, seed, block):
    z, labels = unit_rows(m, d, seed=seed), random_labels(m, k, seed=seed)
    atoms, codes = random_dictionary(d, k, min(d, 2), seed=seed, block=block)
    checked = as_membership(z, labels, k)
    moved, new_codes = proximal_step(z, checked, atoms, codes, mu=MU, eps_sq=EPS_SQ, step_atoms=5, step_codes=5)
    torch.testing.assert_close(moved.norm(dim=0), torch.ones(moved.shape[1], dtype=torch.float64))
    assert bool((new_codes >= 0).all())
    absent = checked.counts == 0
    torch.testing.assert_close(new_codes[:, absent], codes[:, absent])


def test_small_steps_ascend():
    z, labels = unit_rows(30, 6), random_labels(30, 4)
    checked = as_membership(z, labels, 4)
    atoms, codes = random_dictionary(6, 4, 2)

    def objective(gamma, coded):
        weights = checked.class_weights
        return float(
            variational_expansion(gamma, coded, weights, EPS_SQ)
            - variational_compression(coded, weights, 6, EPS_SQ)
            - residual(z, checked, gamma, coded, MU)
        )

    before = objective(atoms, codes)
    for _ in range(20):
        atoms, codes = proximal_step(z, checked, atoms, codes, mu=MU, eps_sq=EPS_SQ, step_atoms=0.2, step_codes=0.2)
        after = objective(atoms, codes)
        assert after > before
        before = after


@pytest.mark.parametrize("block", [False, True])
def test_codes_at_zero_have_a_finite_step(block):
    z, labels = unit_rows(10, 6), random_labels(10, 2)
    atoms, codes = random_dictionary(6, 2, 3, block=block)
    moved, new_codes = proximal_step(
        z, as_membership(z, labels, 2), atoms, codes * 0, mu=MU, eps_sq=EPS_SQ, step_atoms=5, step_codes=5
    )
    torch.testing.assert_close(moved, atoms)  # atoms without energy have no gradient, and no bound to divide by
    assert bool(new_codes.isfinite().all())
    assert bool((new_codes > 0).any())


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_small_residuals_keep_their_precision(distance):
    """Eq. (9) cancels where the residual is small: in float32 alone the last of these would be noise."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.linalg.qr(torch.randn(64, 8, generator=generator, dtype=torch.float64))[0]
    labels = torch.arange(200) % 4
    own = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    z = torch.stack([atoms[:, 2 * y : 2 * y + 2] @ weights for y, weights in zip(labels, own, strict=True)])
    z = torch.nn.functional.normalize(z + distance / 8 * torch.randn(z.shape, generator=generator), dim=1).float()
    codes = torch.zeros(8, 4, dtype=torch.float64)
    for j in range(4):
        moment = z[labels == j].double().T @ z[labels == j].double() / 50
        values, vectors = torch.linalg.eigh(moment)
        atoms[:, 2 * j : 2 * j + 2], codes[2 * j : 2 * j + 2, j] = vectors[:, -2:], values[-2:]
    narrow = atoms.float(), codes.float()
    checked = as_membership(z, labels, 4)
    exact = 0.0
    for j in range(4):
        own = z[labels == j].double()
        model = narrow[0].double() * narrow[1][:, j].double() @ narrow[0].double().T
        exact += 50 / 2 * float((own.T @ own / 50 - model).square().sum())
    assert float(residual(z, checked, *narrow, 1.0)) == pytest.approx(exact, rel=1e-5)


def test_the_bound_of_proposition_3_1_against_its_formula():
    u = np.random.default_rng(0).normal(size=(4, 5, 3))
    expected = [sum(np.log(1 + 0.7 * np.linalg.norm(each[:, i]) ** 2) for i in range(3)) for each in u]
    assert vmcr2.variational_logdet(torch.from_numpy(u), scale=0.7).numpy() == pytest.approx(np.array(expected))


@given(st.integers(1, 6), st.integers(1, 9), st.floats(1e-3, 1e3), st.integers(0, 10_000))
def test_proposition_3_1_bounds_the_log_determinant_and_is_met_at_the_svd(d, r, scale, seed):
    u = torch.randn(d, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    exact = torch.logdet(torch.eye(d, dtype=torch.float64) + scale * u @ u.T)
    assert vmcr2.variational_logdet(u, scale=scale) >= exact - 1e-9
    left, values, _ = torch.linalg.svd(u, full_matrices=False)
    assert vmcr2.variational_logdet(left * values, scale=scale) == pytest.approx(float(exact), rel=1e-9, abs=1e-9)
    # Any other factor of the same matrix lies between: turning its columns cannot pass below the log-determinant.
    turned = left * values @ torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))[0]
    assert vmcr2.variational_logdet(turned, scale=scale) >= exact - 1e-9


def test_the_bound_of_proposition_3_1_is_differentiable_and_says_what_is_wrong():
    u = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda factor: vmcr2.variational_logdet(factor, scale=2.0), u)
    for message, factor, scale in (
        ("factor must be a torch.Tensor", [[1.0]], 1.0),
        ("factor must be floating point of shape", torch.ones(3), 1.0),
        ("factor must be floating point of shape", torch.ones(3, 3, dtype=torch.long), 1.0),
        ("factor must be finite", torch.full((2, 2), torch.nan), 1.0),
        ("scale must be a finite number > 0", torch.ones(2, 2), 0.0),
    ):
        with pytest.raises(vmcr2.InputError, match=message):
            vmcr2.variational_logdet(factor, scale=scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert vmcr2.variational_logdet(torch.ones(2, 2, dtype=torch.bfloat16)).dtype == torch.float32


def test_balanced_mu_weighs_the_residual_as_it_says():
    assert vmcr2.balanced_mu(128, 500, eps_sq=0.5, balance=2.0) * 500 * 0.5 / 128 == pytest.approx(2.0)
    for wrong in ({"feature_dim": 0}, {"batch_size": 2.5}, {"eps_sq": -1.0}, {"balance": 0.0}):
        with pytest.raises(vmcr2.InputError, match=next(iter(wrong))):
            vmcr2.balanced_mu(**({"feature_dim": 8, "batch_size": 4} | wrong))
