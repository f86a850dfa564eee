"""The rates of eq. (7): gradients, and the bound of Proposition 3.1."""

import pytest
import torch
from conftest import STRUCTURES, checked, generator, normal, random_dictionary, random_membership, unit_rows
from hypothesis import given
from hypothesis import strategies as st

import vmcr2
from vmcr2.mismatch import BlockCodes
from vmcr2.variational import (
    compression_code_gradient,
    expansion_atom_gradient,
    expansion_code_gradient,
    exposures,
    solved_atoms,
    variational_compression,
    variational_expansion,
)

EPS_SQ = 0.5
each_structure = pytest.mark.parametrize("structure", STRUCTURES)


@each_structure
@pytest.mark.parametrize(("m", "d", "k", "s"), [(12, 5, 3, 2), (8, 13, 2, 3), (30, 4, 5, 4)])
@pytest.mark.parametrize("kind", ["balanced", "labels", "soft"])
def test_closed_form_gradients_equal_autograd(m, d, k, s, kind, structure):
    dictionary = random_dictionary(d, k, s, structure)
    weights = checked(unit_rows(m, d), random_membership(m, k, kind), k).class_weights
    free = dictionary.moved(dictionary.atoms.clone().requires_grad_(), dictionary.codes.clone().requires_grad_())
    expansion = torch.autograd.grad(variational_expansion(free, weights, EPS_SQ), (free.atoms, free.codes))
    (compression,) = torch.autograd.grad(variational_compression(free, weights, EPS_SQ), free.codes)
    solved = solved_atoms(dictionary, weights, EPS_SQ)
    torch.testing.assert_close(expansion_atom_gradient(dictionary, solved, weights, EPS_SQ), expansion[0])
    torch.testing.assert_close(
        expansion_code_gradient(dictionary, exposures(dictionary, solved), weights, EPS_SQ), expansion[1]
    )
    torch.testing.assert_close(compression_code_gradient(dictionary, weights, EPS_SQ), compression)


@pytest.mark.parametrize("atoms", ["spread", "near", "coincident", "without energy"])
@pytest.mark.parametrize("eps_sq", [0.25, 0.025])
def test_few_float32_atoms_are_solved_as_in_float64(atoms, eps_sq):
    q, d = 40, 250
    rows = unit_rows(q, d)
    if atoms in ("near", "coincident"):
        rows = torch.nn.functional.normalize(rows[:1] + (0.03 if atoms == "near" else 0) * rows, dim=1)
    codes = torch.rand(q, 1, generator=generator(), dtype=torch.float64) * 4
    if atoms == "without energy":
        codes[::2] = 0
    weights = torch.full((q,), 1 / q, dtype=torch.float64)
    wide = BlockCodes(rows.float().double(), codes.float().double())
    narrow = BlockCodes(rows.float(), codes.float())
    moment = (d / eps_sq) * (wide.atoms * (wide.codes * weights[:, None])).mT @ wide.atoms
    expected = torch.linalg.solve(torch.eye(d).double() + moment, wide.atoms.mT).mT
    solved = solved_atoms(narrow, weights.float(), eps_sq)
    assert ((solved - expected).norm(dim=1) < 2e-3 * expected.norm(dim=1)).all()
    assert exposures(narrow, solved).tolist() == pytest.approx(exposures(wide, expected).tolist(), rel=1e-4)


def test_a_negative_code_is_not_solved_for():
    dictionary = BlockCodes(unit_rows(2, 9), torch.tensor([[1.0], [-1.0]]).double())
    assert solved_atoms(dictionary, torch.tensor([0.5, 0.5]).double(), EPS_SQ).isnan().any()


@each_structure
def test_rates_have_first_and_second_derivatives(structure):
    dictionary = random_dictionary(4, 2, 2, structure)
    weights = torch.tensor([0.3, 0.7]).double()
    point = [dictionary.atoms.clone().requires_grad_(), dictionary.codes.clone().requires_grad_()]

    def difference(atoms, codes):
        moved = dictionary.moved(atoms, codes)
        return variational_expansion(moved, weights, EPS_SQ) - variational_compression(moved, weights, EPS_SQ)

    assert torch.autograd.gradcheck(difference, point)
    assert torch.autograd.gradgradcheck(difference, point)


@given(st.integers(1, 6), st.integers(1, 9), st.floats(1e-3, 1e3), st.integers(0, 10_000))
def test_the_bound_lies_above_the_log_determinant_and_is_met_at_the_svd(d, r, scale, seed):
    u = normal(d, r, seed=seed)
    exact = torch.logdet(torch.eye(d).double() + scale * u @ u.T)
    assert vmcr2.variational_logdet(u, scale=scale) >= exact - 1e-9
    left, values, _ = torch.linalg.svd(u, full_matrices=False)
    assert vmcr2.variational_logdet(left * values, scale=scale) == pytest.approx(float(exact), rel=1e-9, abs=1e-9)
    # Any other factor of the same matrix lies between: turning its columns cannot pass below the log-determinant.
    turned = left * values @ torch.linalg.qr(normal(len(values), len(values), seed=seed))[0]
    assert vmcr2.variational_logdet(turned, scale=scale) >= exact - 1e-9


def test_the_bound_takes_batches():
    u = normal(4, 5, 3)
    expected = [float(vmcr2.variational_logdet(each, scale=0.7)) for each in u]
    assert vmcr2.variational_logdet(u, scale=0.7).tolist() == pytest.approx(expected)


def test_the_bound_is_differentiable():
    u = normal(2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda factor: vmcr2.variational_logdet(factor, scale=2.0), u)
    torch.func.vmap(torch.func.grad(lambda factor: vmcr2.variational_logdet(factor)))(u.detach())


@pytest.mark.parametrize(
    ("message", "factor", "scale"),
    [
        ("factor must be a torch.Tensor", [[1.0]], 1.0),
        ("factor must be floating point of shape", torch.ones(3), 1.0),
        (r"factor must be floating point \(16, 32 or 64 bits\) of shape", torch.ones(3, 3, dtype=torch.long), 1.0),
        ("factor must be finite", torch.full((2, 2), torch.nan), 1.0),
        ("scale must be a finite number > 0", torch.ones(2, 2), 0.0),
    ],
)
def test_the_bound_says_what_is_wrong(message, factor, scale):
    with pytest.raises(vmcr2.InputError, match=message):
        vmcr2.variational_logdet(factor, scale=scale)


@pytest.mark.parametrize(("entry", "scale"), [(1e30, 1.0), (1.0, 1e300)])
def test_the_bound_overflows_with_an_error(entry, scale):
    with pytest.raises(vmcr2.NumericalError, match="overflowed; lower scale"):
        vmcr2.variational_logdet(torch.full((3, 2), entry), scale=scale)
    assert vmcr2.variational_logdet(torch.full((3, 2), entry).double(), scale=scale).isfinite()


def test_the_bound_is_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert vmcr2.variational_logdet(torch.ones(2, 2, dtype=torch.bfloat16)).dtype == torch.float32
