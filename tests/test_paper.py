"""One test an equation of the paper, named after it, against `reference.py`, which is written from the paper alone.

docs/paper.md maps equations to functions and to these tests.
"""

import re

import numpy as np
import pytest
import reference
import torch
from conftest import (
    REPOSITORY,
    STRUCTURES,
    at_batch_scale,
    checked,
    loss_at,
    normal,
    random_dictionary,
    random_labels,
    random_membership,
    random_rows,
    rows_of,
    unit_rows,
)

import vmcr2
from vmcr2.dictionary import paper_step
from vmcr2.mismatch import code_gradient, mismatch, squared_moment_norms
from vmcr2.subspaces import class_subspaces, nearest_subspace
from vmcr2.variational import lipschitz_atoms, lipschitz_codes, objective

EPS_SQ, MU = 0.5, 0.7
CASES = [(12, 5, 3, 2), (8, 9, 2, 3), (30, 4, 5, 4)]
KINDS = ["balanced", "labels", "soft"]
each_case = pytest.mark.parametrize(("m", "d", "k", "s"), CASES)
each_structure = pytest.mark.parametrize("structure", STRUCTURES)


def balanced(m, d, k, s, structure="shared"):
    """Returns a balanced batch and a random dictionary, both as the package and as the paper has them."""
    z, labels = unit_rows(m, d), torch.arange(m) % k
    dictionary = random_dictionary(d, k, s, structure)
    pi = rows_of(labels, k).numpy()
    return z, labels, dictionary, z.numpy().T, pi, *at_batch_scale(dictionary, pi)


@pytest.mark.parametrize(("m", "d", "k"), [(40, 12, 4), (10, 30, 3), (60, 5, 7), (1, 6, 1), (33, 33, 2)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps_sq", [0.5, 0.05])
def test_eq_1(m, d, k, kind, eps_sq):
    z, membership = unit_rows(m, d), random_membership(m, k, kind)
    expected = reference.rates(z.numpy().T, rows_of(membership, k).numpy(), eps_sq)
    got = vmcr2.rate_reduction(z, membership, num_classes=k, eps_sq=eps_sq)
    assert [float(rate) for rate in got] == pytest.approx(expected, rel=1e-12)
    assert float(vmcr2.coding_rate(z, eps_sq=eps_sq)) == pytest.approx(expected[0], rel=1e-12)
    assert float(got.reduction) == pytest.approx(expected[0] - expected[1], rel=1e-10, abs=1e-12)
    loss = vmcr2.MCR2Loss(k, eps_sq=eps_sq)(z, membership)
    assert float(loss) == pytest.approx(expected[1] - expected[0], rel=1e-10, abs=1e-12)


def test_proposition_3_1():
    """−logdet(I + cM) = max over U Uᵀ = M of −Σ log(1 + c ‖U_i‖²), eq. (3), and the SVD attains it."""
    u, c = normal(5, 4).numpy(), 0.7
    exact = reference.logdet_plus_identity(c * u @ u.T)
    expected = sum(np.log(1 + c * np.linalg.norm(u[:, i]) ** 2) for i in range(4))
    assert float(vmcr2.variational_logdet(torch.from_numpy(u), scale=c)) == pytest.approx(expected, rel=1e-12)
    assert expected > exact + 0.1
    left, values, _ = np.linalg.svd(u @ u.T)
    optimal = torch.from_numpy(left * np.sqrt(values))
    assert float(vmcr2.variational_logdet(optimal, scale=c)) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("columns", [4, 5, 9])
def test_theorem_2_1(columns):
    """Of its use here: every U with U Uᵀ = M bounds logdet(I + cM), however many columns it has; equal at the SVD."""
    u, c = normal(5, 4), 2.0
    exact = reference.logdet_plus_identity(c * (u @ u.T).numpy())
    left, values, _ = torch.linalg.svd(u, full_matrices=False)
    wide = torch.nn.functional.pad(left * values, (0, columns - 4))
    assert float(vmcr2.variational_logdet(wide, scale=c)) == pytest.approx(exact, rel=1e-12)
    for seed in range(20):
        turned = wide @ torch.linalg.qr(normal(columns, columns, seed=seed))[0]
        torch.testing.assert_close(turned @ turned.T, u @ u.T)
        assert float(vmcr2.variational_logdet(turned, scale=c)) > exact + 1e-6


@each_structure
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "d", "k"), [(60, 7, 3), (9, 6, 4)])
def test_eq_5_6(m, d, k, kind, structure):
    """At a full-rank latch the constraints of (5) and (6) hold, and V-MCR² equals MCR²."""
    z, membership = unit_rows(m, d), random_membership(m, k, kind)
    got = loss_at(z, membership, k, d, structure=structure).rates(z, membership)
    expected = reference.rates(z.numpy().T, rows_of(membership, k).numpy(), EPS_SQ)
    assert [float(rate) for rate in got[:2]] == pytest.approx(expected, rel=1e-10)
    assert float(got.residual) == pytest.approx(0, abs=1e-12)


@each_case
@pytest.mark.parametrize("kind", KINDS)
@each_structure
def test_eq_7(m, d, k, s, kind, structure):
    z, membership = unit_rows(m, d), random_membership(m, k, kind)
    dictionary = random_dictionary(d, k, s, structure)
    pi = rows_of(membership, k).numpy()
    expected = reference.variational(z.numpy().T, pi, *at_batch_scale(dictionary, pi), MU, EPS_SQ)
    got = objective(z, checked(z, membership, k), dictionary, mu=MU, eps_sq=EPS_SQ)
    assert [float(term) for term in got] == pytest.approx(expected, rel=1e-12)
    loss = vmcr2.VMCR2Loss(k, d, atoms_per_class=s, structure=structure, mu=MU, reduction="sum").double().eval()
    loss.dictionary.atoms.copy_(dictionary.atoms.T)
    loss.dictionary.codes.copy_(dictionary.codes.T)
    assert [float(term) for term in loss.rates(z, membership)] == pytest.approx(expected, rel=1e-12)
    assert float(loss(z, membership)) == pytest.approx(expected[2], rel=1e-12)


@pytest.mark.parametrize(("d", "k", "r"), [(12, 3, None), (12, 3, 1), (5, 4, 2)])
def test_eq_8(d, k, r):
    train, labels, test = unit_rows(80, d), random_labels(80, k), unit_rows(50, d, seed=1)
    expected = reference.nearest_subspace(train.numpy().T, labels.numpy(), test.numpy().T, k, r or d // k)
    assert nearest_subspace(test, class_subspaces(train, labels, k, r)).tolist() == expected.tolist()
    estimator = vmcr2.NearestSubspaceClassifier(r).fit(train.numpy(), labels.numpy())
    assert estimator.predict(test.numpy()).tolist() == expected.tolist()


@each_case
@each_structure
def test_eq_9(m, d, k, s, structure):
    """Term by term as the second line of (9) has it: ⟨ΠΠᵀ, (ZᵀZ)^⊙2⟩, ⟨AΠᵀ, (ΓᵀZ)^⊙2⟩, ⟨AAᵀ, (ΓᵀΓ)^⊙2⟩."""
    z, labels, dictionary, columns, pi, gamma, a = balanced(m, d, k, s, structure)
    pi_checked, n = checked(z, labels, k), m / k
    assert float((n * n * squared_moment_norms(z, pi_checked)).sum()) == pytest.approx(
        np.sum((pi @ pi.T) * (columns.T @ columns) ** 2), rel=1e-12
    )
    energies = dictionary.energies(dictionary.project(z, pi_checked), pi_checked)
    assert float((n * dictionary.codes * energies).sum()) == pytest.approx(
        np.sum((a @ pi.T) * (gamma.T @ columns) ** 2), rel=1e-12
    )
    response = dictionary.respond(dictionary.overlap(), n * dictionary.codes)
    assert float((n * dictionary.codes * response).sum()) == pytest.approx(
        np.sum((a @ a.T) * (gamma.T @ gamma) ** 2), rel=1e-12
    )
    whole = MU * float(mismatch(z, pi_checked, dictionary)[0])
    assert whole == pytest.approx(reference.penalty_expanded(columns, pi, gamma, a, MU), rel=1e-12)
    assert whole == pytest.approx(reference.variational(columns, pi, gamma, a, MU, EPS_SQ)[2], rel=1e-12)


@each_case
@each_structure
def test_eq_10(m, d, k, s, structure):
    z, labels, dictionary, columns, pi, gamma, a = balanced(m, d, k, s, structure)
    pi_checked = checked(z, labels, k)
    got = MU * dictionary.atom_gradient(z, dictionary.project(z, pi_checked), dictionary.overlap(), pi_checked)
    np.testing.assert_allclose(
        got.T, reference.penalty_atom_gradient(columns, pi, gamma, a, MU), rtol=1e-10, atol=1e-12
    )


@each_case
@each_structure
def test_eq_11(m, d, k, s, structure):
    """∇_Ã is n_j ∇_A, since A = Ã Diag(n)."""
    z, labels, dictionary, columns, pi, gamma, a = balanced(m, d, k, s, structure)
    pi_checked = checked(z, labels, k)
    energies = dictionary.energies(dictionary.project(z, pi_checked), pi_checked)
    got = MU * k / m * code_gradient(dictionary, energies, dictionary.overlap(), pi_checked)
    expected = reference.penalty_code_gradient(columns, pi, gamma, a, MU)
    if structure == "block":
        expected = np.stack([expected[j * s : (j + 1) * s, j] for j in range(k)], axis=1)
    np.testing.assert_allclose(got.T, expected, rtol=1e-10, atol=1e-12)


@each_case
@each_structure
def test_eq_17(m, d, k, s, structure):
    z, labels, dictionary, columns, pi, gamma, a = balanced(m, d, k, s, structure)
    pi_checked = checked(z, labels, k)
    got = lipschitz_atoms(squared_moment_norms(z, pi_checked), pi_checked.counts, dictionary.codes, MU)
    assert float(got) == pytest.approx(reference.lipschitz(columns, pi, gamma, a, MU)[0], rel=1e-12)


@each_case
def test_eq_19(m, d, k, s):
    """The bound in Ã_j = A_j / n_j is n_j² times the paper's in A."""
    z, labels, dictionary, columns, pi, gamma, a = balanced(m, d, k, s)
    norms = dictionary.overlap_norms(dictionary.overlap(), k)
    got = lipschitz_codes(norms, checked(z, labels, k).counts, MU) / (m / k) ** 2
    np.testing.assert_allclose(got, np.full(k, reference.lipschitz(columns, pi, gamma, a, MU)[1]), rtol=1e-12)


def test_eq_19_in_block_structure():
    """Where the classes' subspaces are orthogonal and alike, √k times a block's norm is that of the whole."""
    dictionary = random_dictionary(12, 3, 4, "block")
    base = unit_rows(4, 4)
    rows = torch.zeros(3, 4, 12, dtype=torch.float64)
    for j in range(3):
        rows[j, :, 4 * j : 4 * j + 4] = base
    dictionary = dictionary.moved(atoms=rows.flatten(0, 1))
    norms = dictionary.overlap_norms(dictionary.overlap(), 3)
    whole = torch.linalg.vector_norm((dictionary.atoms @ dictionary.atoms.T).square())
    torch.testing.assert_close(norms, whole.expand(3))


# Algorithm 1. The steps of lines 6 to 10 are those of step="paper", and of step="simultaneous" where both gradients are
# taken at the old dictionary. Step sizes are such that line 9 finds some codes below 0, and line 10 atoms to normalise.
NU_ATOMS, NU_CODES = 5.0, 0.9


def paper_dictionary(m, d, k, s, *, at_moved_atoms):
    z, labels, dictionary, *as_printed = balanced(m, d, k, s)
    after = paper_step(
        z,
        checked(z, labels, k),
        dictionary,
        mu=MU,
        eps_sq=EPS_SQ,
        step_atoms=NU_ATOMS,
        step_codes=NU_CODES,
        at_moved_atoms=at_moved_atoms,
    )
    return z, labels, dictionary, after, *as_printed


@each_case
def test_algorithm_1_line_5(m, d, k, s):
    """What the dictionary's step climbs is all of (7): a paper step of small ν moves along its gradient."""
    z, labels, dictionary, columns, pi, gamma, a = balanced(m, d, k, s)
    nu = 1e-4
    after = paper_step(
        z, checked(z, labels, k), dictionary, mu=MU, eps_sq=EPS_SQ, step_atoms=nu, step_codes=nu, at_moved_atoms=False
    )
    bounds = reference.lipschitz(columns, pi, gamma, a, MU)
    moved = (after.codes.T.numpy() - dictionary.codes.T.numpy()) * (m / k)
    gradient = reference.numeric_gradient(
        lambda codes: reference.variational_objective(columns, pi, gamma, codes, MU, EPS_SQ), a
    )
    np.testing.assert_allclose(moved * bounds[1] / nu, gradient, rtol=1e-5, atol=1e-5)


@each_case
def test_algorithm_1_line_6(m, d, k, s):
    """L_Γ and L_A are those of the dictionary before line 7, also for line 8."""
    _, _, _, after, columns, pi, gamma, a = paper_dictionary(m, d, k, s, at_moved_atoms=True)
    bounds = reference.lipschitz(columns, pi, gamma, a, MU)
    moved = reference.move_atoms(columns, pi, gamma, a, MU, EPS_SQ, NU_ATOMS)
    moved_bounds = reference.lipschitz(columns, pi, moved, a, MU)
    assert abs(moved_bounds[1] / bounds[1] - 1) > 1e-3  # so that the one is not the other
    expected = reference.move_codes(columns, pi, moved, a, MU, EPS_SQ, NU_CODES, bounds[1])
    np.testing.assert_allclose(after.codes.T * (m / k), expected, rtol=1e-6, atol=1e-6)


@each_case
@pytest.mark.parametrize("at_moved_atoms", [True, False])
def test_algorithm_1_line_7(m, d, k, s, at_moved_atoms):
    _, _, _, after, columns, pi, gamma, a = paper_dictionary(m, d, k, s, at_moved_atoms=at_moved_atoms)
    moved = reference.move_atoms(columns, pi, gamma, a, MU, EPS_SQ, NU_ATOMS)
    assert np.abs(moved - gamma).max() > 1e-2
    np.testing.assert_allclose(after.atoms.T, reference.unit_columns(moved), atol=1e-7)


@each_case
@pytest.mark.parametrize("step", ["paper", "simultaneous"])
def test_algorithm_1_line_8(m, d, k, s, step):
    """As printed, the gradient in A is taken at the Γ of line 7, which line 10 has not normalised yet."""
    z, labels, dictionary, columns, pi, gamma, a = balanced(m, d, k, s)
    loss = vmcr2.VMCR2Loss(k, d, atoms_per_class=s, mu=MU, step=step, step_atoms=NU_ATOMS, step_codes=NU_CODES).double()
    loss.dictionary.atoms.copy_(dictionary.atoms.T)
    loss.dictionary.codes.copy_(dictionary.codes.T)
    loss(z, labels)
    bound = reference.lipschitz(columns, pi, gamma, a, MU)[1]
    moved = reference.move_atoms(columns, pi, gamma, a, MU, EPS_SQ, NU_ATOMS)
    at = {"paper": moved, "simultaneous": gamma}
    expected = {name: reference.move_codes(columns, pi, g, a, MU, EPS_SQ, NU_CODES, bound) for name, g in at.items()}
    normalised = reference.move_codes(columns, pi, reference.unit_columns(moved), a, MU, EPS_SQ, NU_CODES, bound)
    assert np.abs(expected["paper"] - expected["simultaneous"]).max() > 1e-3
    assert np.abs(expected["paper"] - normalised).max() > 1e-3
    np.testing.assert_allclose(loss.dictionary.codes * (m / k), expected[step], rtol=1e-6, atol=1e-6)


@each_case
def test_algorithm_1_line_9(m, d, k, s):
    """Codes that the step takes below 0 are 0, and only those."""
    _, _, _, after, columns, pi, gamma, a = paper_dictionary(m, d, k, s, at_moved_atoms=False)
    bound = reference.lipschitz(columns, pi, gamma, a, MU)[1]
    gradient = reference.numeric_gradient(
        lambda codes: reference.variational_objective(columns, pi, gamma, codes, MU, EPS_SQ), a
    )
    below = a + NU_CODES / bound * gradient < 0
    assert 0 < below.sum() < below.size
    assert ((after.codes.T.numpy() == 0) == below).all()


@each_case
@pytest.mark.parametrize("at_moved_atoms", [True, False])
def test_algorithm_1_line_10(m, d, k, s, at_moved_atoms):
    after = paper_dictionary(m, d, k, s, at_moved_atoms=at_moved_atoms)[3]
    torch.testing.assert_close(after.atoms.norm(dim=1), torch.ones(k * s, dtype=torch.float64))


@each_structure
@pytest.mark.parametrize("step", ["ascent", "paper", "simultaneous"])
def test_algorithm_1_line_11(structure, step):
    """The returned loss is M with the dictionary as lines 7 to 10 have left it."""
    z, labels = unit_rows(20, 6), torch.arange(20) % 4
    loss = loss_at(unit_rows(40, 6, seed=1), torch.arange(40) % 4, 4, 2, structure=structure, mu=MU, reduction="sum")
    loss.step = step
    pi = rows_of(labels, 4).numpy()

    def by_hand():
        dictionary = loss.dictionary.part_for(checked(z, labels, 4), torch.float64)[1]
        return reference.variational(z.numpy().T, pi, *at_batch_scale(dictionary, pi), MU, EPS_SQ)[2]

    before = by_hand()
    value = float(loss(z, labels))
    assert value == pytest.approx(by_hand(), rel=1e-10)
    assert value != pytest.approx(before, rel=1e-3)


@each_structure
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_algorithm_1_line_12(structure, kind, reduction):
    """The features' gradient is that of (µ/2m) M (of M/2m² for "mean") while the moved dictionary stands still."""
    m, d, k, s = 20, 6, 4, 2
    z, membership = unit_rows(m, d).requires_grad_(), random_membership(m, k, kind)
    loss = loss_at(unit_rows(40, d, seed=1), torch.arange(40) % k, k, s, structure=structure, mu=0.3)
    loss.reduction = reduction
    loss(z, membership).backward()
    pi = rows_of(membership, k).numpy()
    gamma, a = at_batch_scale(loss.dictionary.part_for(checked(z, torch.arange(m) % k, k), torch.float64)[1], pi)
    expected = reference.numeric_gradient(
        lambda columns: reference.variational(columns, pi, gamma, a, 0.3, EPS_SQ)[2], z.detach().numpy().T
    )
    # The same in closed form: 2µ Σ_j π_ij (C_j − Γ Diag(Ã_j) Γᵀ) z_i.
    columns, closed = z.detach().numpy().T, np.zeros((d, m))
    for j in range(k):
        n = pi[:, j].sum()
        if n > 0:
            difference = (columns * pi[:, j] @ columns.T - gamma * a[:, j] @ gamma.T) / n
            closed += 2 * 0.3 * difference @ (columns * pi[:, j])
    np.testing.assert_allclose(closed, expected, rtol=1e-6, atol=1e-8)
    if reduction == "mean":
        closed = closed / (0.3 * m)
    np.testing.assert_allclose(z.grad.T, closed, rtol=1e-9, atol=1e-12)


@each_structure
@pytest.mark.parametrize(("m", "d", "k", "s"), [(40, 6, 4, 3), (12, 10, 3, 2)])
def test_algorithm_2(m, d, k, s, structure):
    z, labels = unit_rows(m, d), torch.arange(m) % k
    loss = loss_at(z, labels, k, s, structure=structure)
    pi = rows_of(labels, k)
    gamma, a = reference.latch(z.numpy().T, pi.numpy(), s)
    got_gamma, got_a = at_batch_scale(loss.dictionary.part_for(checked(z, labels, k), torch.float64)[1], pi.numpy())
    np.testing.assert_allclose(got_a, a, atol=1e-9)
    np.testing.assert_allclose(np.abs((got_gamma * gamma).sum(0)), 1, atol=1e-9)


def test_algorithm_2_of_soft_membership():
    z, rows = unit_rows(40, 6), random_rows(40, 3)
    loss = loss_at(z, rows, 3, 2)
    gamma, a = reference.latch(z.numpy().T, rows.numpy(), 2)
    np.testing.assert_allclose(loss.dictionary.codes * rows.sum(0), a, atol=1e-9)
    np.testing.assert_allclose(np.abs((loss.dictionary.atoms.numpy() * gamma).sum(0)), 1, atol=1e-9)


def test_the_map_of_the_paper_names_functions_and_tests_that_exist():
    text = (REPOSITORY / "docs" / "paper.md").read_text()
    for name in set(re.findall(r"`(test_\w+)`", text)):
        assert name in globals(), name
    source = "".join(path.read_text() for path in (REPOSITORY / "src" / "vmcr2").glob("*.py"))
    table = text[: text.index("## Where we differ")]
    for name in set(re.findall(r"`([A-Za-z_0-9]+)`", table)) - set(re.findall(r"`(test_\w+)`", table)):
        assert re.search(rf"(def|class) {name}\b|\b{name}: ", source), name
    for path in set(re.findall(r"`(\w+\.py)`", table)):
        assert (REPOSITORY / "src" / "vmcr2" / path).is_file(), path
    for path in set(re.findall(r"`(tests/\w+\.py)`", text)):
        assert (REPOSITORY / path).is_file(), path
