"""The dictionary's step never lowers eq. (7), keeps its constraints, and leaves absent classes alone."""

import copy
import io
import itertools

import numpy as np
import pytest
import torch
from conftest import (
    STRUCTURES,
    LargestTensor,
    as_shared,
    checked,
    loss_at,
    normal,
    random_dictionary,
    random_labels,
    random_membership,
    random_rows,
    rows_of,
    snapshot,
    unit_rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch.autograd import grad
from torch.nn.functional import one_hot

import vmcr2
from vmcr2.dictionary import ascending_step, paper_step, scaled_to
from vmcr2.mismatch import BlockCodes, SharedCodes
from vmcr2.variational import objective

EPS_SQ = 0.5


def worst_fall(loss, z, membership, steps):
    """Returns the largest fall of eq. (7) in any step of a training loss, relative to (7)'s size."""
    values = []
    for _ in range(steps + 1):
        rates = loss.rates(z, membership)
        values.append((float(rates.expansion - rates.compression - rates.residual), sum(map(float, rates))))
        loss(z, membership)
    if loss.energy is not None:
        values = values[1:]  # the first step scales what latching gave to the constraint
    return max((before - after) / size for (before, size), (after, _) in itertools.pairwise(values))


def unbalanced(m, k, *, seed=0):
    """Returns labels of which one class has about 100 times as many samples as each of the others."""
    labels = random_labels(m, k, seed=seed)
    return torch.where(torch.arange(m) % 101 > k, 0, labels) if k > 1 else labels


def nearly_parallel(m, d, *, seed=0):
    return torch.nn.functional.normalize(unit_rows(1, d, seed=seed + 1) + 1e-2 * normal(m, d, seed=seed), dim=1)


def at_balance(rho, m, d):
    return {"mu": vmcr2.balanced_mu(d, m, eps_sq=EPS_SQ, balance=rho), "eps_sq": EPS_SQ}


MEMBERSHIPS = {
    "balanced": lambda m, k, seed: torch.arange(m) % k,
    "unbalanced": lambda m, k, seed: unbalanced(m, k, seed=seed),
    "soft": lambda m, k, seed: random_rows(m, k, seed=seed),
    "confident": lambda m, k, seed: torch.softmax(40 * normal(m, k, seed=seed), dim=1),
    "smoothed": lambda m, k, seed: 0.99 * one_hot(random_labels(m, -(-k // 2), seed=seed), k).double() + 0.01 / k,
}
RHOS = [0.01, 0.3, 10.0]
# (d, k, s): one class, s from 1 to ⌊d/k⌋ and s = d, more classes than dimensions.
SIZES = [(8, 1, 1), (8, 1, 8), (12, 2, 1), (16, 2, 8), (12, 2, 12), (12, 4, 3), (6, 3, 6), (10, 20, 1), (8, 20, 3)]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("kind", MEMBERSHIPS)
def test_objective_7_never_falls(kind, rho, structure):
    m = 60
    for d, k, s in SIZES:
        membership = MEMBERSHIPS[kind](m, k, 0)
        z = unit_rows(m, d, seed=1)
        loss = loss_at(unit_rows(m, d), membership, k, s, structure=structure, **at_balance(rho, m, d))
        assert worst_fall(loss, z, membership, 40 if (d, k, s) == (16, 2, 8) else 10) <= 1e-6, (d, k, s)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("energy", [0.3, 3.0])
def test_objective_7_never_falls_under_the_constraint_of_energy(energy, rho, structure):
    m = 60
    for kind in ("balanced", "unbalanced", "soft"):
        for d, k, s in [(8, 1, 8), (16, 2, 8), (8, 20, 3)]:
            membership = MEMBERSHIPS[kind](m, k, 0)
            loss = loss_at(
                unit_rows(m, d), membership, k, s, structure=structure, energy=energy, **at_balance(rho, m, d)
            )
            assert worst_fall(loss, unit_rows(m, d, seed=1), membership, 10) <= 1e-6, (kind, d, k, s)
            sums = loss.dictionary.codes.sum(0)[torch.as_tensor(loss.dictionary.latched)]
            torch.testing.assert_close(sums, torch.full_like(sums, energy))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("energy", [None, 1.0])
def test_objective_7_never_falls_after_latching_on_nearly_parallel_features(rho, energy, structure):
    """All classes latch onto nearly one direction: their atoms coincide, where the mismatch curves most."""
    m = 80
    for d, k, s in [(16, 2, 8), (10, 20, 1)]:
        for kind in ("balanced", "soft"):
            z, membership = nearly_parallel(m, d), MEMBERSHIPS[kind](m, k, 0)
            loss = loss_at(z, membership, k, s, structure=structure, energy=energy, **at_balance(rho, m, d))
            spread = copy.deepcopy(loss)
            assert worst_fall(loss, z, membership, 25) <= 1e-6, (d, k, s, kind)
            # And as training goes on from there: the dictionary is of the parallel features, the batch no longer.
            assert worst_fall(spread, unit_rows(m, d, seed=3), membership, 8) <= 1e-6, (d, k, s, kind)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("rho", [0.05, 5.0])
def test_objective_7_never_falls_with_200_classes(rho, structure):
    m, d, k = 400, 24, 200
    for kind in ("balanced", "unbalanced"):
        membership = MEMBERSHIPS[kind](m, k, 0)
        loss = loss_at(unit_rows(m, d), membership, k, 1, structure=structure, **at_balance(rho, m, d))
        assert worst_fall(loss, unit_rows(m, d, seed=1), membership, 10) <= 1e-6, kind


@settings(max_examples=60)
@given(
    st.integers(2, 40),
    st.integers(2, 10),
    st.integers(1, 8),
    st.data(),
    st.sampled_from(sorted(MEMBERSHIPS)),
    st.floats(-2, 1),
    st.sampled_from(STRUCTURES),
    st.sampled_from([None, 0.5, 1.0, 3.0]),
    st.integers(0, 10**6),
)
def test_objective_7_never_falls_from_any_dictionary(m, d, k, data, kind, log_rho, structure, energy, seed):
    """Not only from a latched one: atoms and codes are drawn, some codes are 0, some atoms coincide."""
    s = data.draw(st.integers(1, d))
    dictionary = random_dictionary(d, k, s, structure, seed=seed)
    scale = 10.0 ** data.draw(st.integers(-3, 2))
    dictionary = dictionary.moved(codes=scale * torch.where(dictionary.codes < 0.3, 0, dictionary.codes))
    if data.draw(st.booleans()):
        dictionary = dictionary.moved(atoms=dictionary.atoms[:1].expand_as(dictionary.atoms).clone())
    z, membership = unit_rows(m, d, seed=seed), MEMBERSHIPS[kind](m, k, seed)
    pi = checked(z, membership, k)
    if structure == "block":
        present = pi.present
        blocks = dictionary.blocks[present].flatten(0, 1)
        dictionary, pi = BlockCodes(blocks, dictionary.codes[present]), pi.among_present()
    settings_ = at_balance(10**log_rho, m, d)
    dictionary = scaled_to(dictionary, energy)
    for _ in range(5):
        before = objective(z, pi, dictionary, **settings_)
        dictionary = ascending_step(z, pi, dictionary, energy=energy, **settings_).dictionary
        after = objective(z, pi, dictionary, **settings_)
        value, risen = (float(rates.expansion - rates.compression - rates.residual) for rates in (before, after))
        assert risen >= value - 1e-6 * sum(map(float, before))
        assert (dictionary.codes >= 0).all()
        torch.testing.assert_close(dictionary.atoms.norm(dim=1), torch.ones(len(dictionary.atoms)).double())


@pytest.mark.parametrize("rho", [1e-4, 1e-2, 1.0])
def test_objective_7_never_falls_where_codes_are_far_from_what_energy_leaves_room_for(rho):
    """Codes over many orders of magnitude, of as many atoms as dimensions: the multiplier has a long way to go."""
    m, d, k = 6, 12, 2
    labels, settings_ = torch.arange(m) % k, at_balance(rho, m, d)
    for seed in range(40):
        z, dictionary = unit_rows(m, d, seed=seed), random_dictionary(d, k, d, "block", seed=seed)
        pi, dictionary = checked(z, labels, k), scaled_to(dictionary.moved(codes=dictionary.codes**4), 1.0)
        for _ in range(4):
            before = objective(z, pi, dictionary, **settings_)
            dictionary = ascending_step(z, pi, dictionary, energy=1.0, **settings_).dictionary
            after = objective(z, pi, dictionary, **settings_)
            value, risen = (float(rates.expansion - rates.compression - rates.residual) for rates in (before, after))
            assert risen >= value - 1e-6 * sum(map(float, before)), seed


def objective_in_atoms(z, pi, codes, mu):
    """Returns the part of eq. (7) that the atoms (q, d) change, and −L_l, the least curvature `_ascended_atoms` names.

    Both by the formulas as they are written, of dense soft rows Π (m, k) and codes Ã (q, k).
    """
    (m, d), counts = z.shape, pi.sum(0)
    beta, spent = d / EPS_SQ, codes @ counts / m
    moments = torch.einsum("mk,md,me->kde", pi, z, z) / counts[:, None, None]

    def value(atoms):
        expansion = 0.5 * torch.logdet(torch.eye(d).double() + beta * atoms.T @ torch.diag(spent) @ atoms)
        models = torch.einsum("lk,ld,le->kde", codes, atoms, atoms)
        return expansion - mu / 2 * (counts * (moments - models).square().sum((1, 2))).sum()

    return value, beta / 8 * spent + 6 * mu * (codes * codes.sum(0)) @ counts


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["balanced", "soft"])
def test_atoms_move_along_their_gradient_over_the_least_curvature(kind, structure):
    z, membership = unit_rows(20, 6), random_membership(20, 3, kind)
    pi = checked(z, membership, 3)
    dictionary = random_dictionary(6, 3, 2, structure)
    dense = as_shared(dictionary)
    value, curvature = objective_in_atoms(z, rows_of(membership, 3), dense.codes.T, mu=0.3)
    atoms = dense.atoms.clone().requires_grad_()
    expected = torch.nn.functional.normalize(atoms + grad(value(atoms), atoms)[0] / curvature[:, None], dim=1)
    moved = ascending_step(z, pi, dictionary, mu=0.3, eps_sq=EPS_SQ).dictionary.atoms
    torch.testing.assert_close(moved, expected.detach())


@pytest.mark.parametrize("mu", [0.0, 0.01, 1.0])
def test_the_least_curvature_in_the_atoms_is_a_bound_and_is_met(mu):
    """With it added, the Hessian is positive semi-definite on the unit ball; at the worst points it is singular."""
    for seed in range(20):
        z, pi = unit_rows(12, 3, seed=seed), random_rows(12, 2, seed=seed)
        codes, atoms = normal(4, 2, seed=seed).square(), unit_rows(4, 3, seed=seed + 1)
        atoms = atoms * torch.rand(4, 1, generator=torch.Generator().manual_seed(seed)).double()
        value, curvature = objective_in_atoms(z, pi, codes, mu)
        hessian = torch.autograd.functional.hessian(value, atoms).view(12, 12)
        assert torch.linalg.eigvalsh(hessian + curvature.repeat_interleave(3).diag()).min() > -1e-9
    if mu == 0:  # singular values √3 of √β Γ Diag(Ã γ)^½
        z, pi = unit_rows(4, 2), torch.ones(4, 1).double()
        codes, atoms = torch.full((2, 1), 0.75).double(), torch.eye(2)
    else:  # atoms that coincide, orthogonal to all features; the rate is left out by its weight
        z, pi, mu = torch.eye(2)[[0, 0]], torch.ones(2, 1).double(), 1e9
        codes, atoms = torch.tensor([[0.5], [1.5]]).double(), torch.eye(2)[[1, 1]]
    value, curvature = objective_in_atoms(z.double(), pi, codes, mu)
    hessian = torch.autograd.functional.hessian(value, atoms.double()).view(4, 4)
    shifted = hessian + curvature.repeat_interleave(2).diag()
    assert abs(torch.linalg.eigvalsh(shifted).min()) < 1e-6 * curvature.max()


def test_the_papers_own_steps_may_lower_objective_7():
    """What the step above is for: with the paper's bounds and ν = 5 the same batch swings (so the test works)."""
    m, d, k, s = 100, 64, 2, 32
    z, labels = unit_rows(m, d), torch.arange(m) % k
    for step, falls in (("paper", True), ("simultaneous", True), ("ascent", False)):
        loss = loss_at(z, labels, k, s, step=step, **at_balance(0.05, m, d))
        assert (worst_fall(loss, z, labels, 20) > 0.01) == falls, step


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_step_moves_towards_a_stationary_point_and_stops_there(structure):
    """The limit meets the first-order conditions of (7) on unit atoms and codes ≥ 0: nothing is frozen by mistake."""
    z, labels = unit_rows(40, 6), torch.arange(40) % 3
    pi, settings_ = checked(z, labels, 3), at_balance(0.05, 40, 6)

    def slopes(dictionary):
        """Returns by how much atoms, and codes, could still raise (7) to first order."""
        atoms, codes = dictionary.atoms.clone().requires_grad_(), dictionary.codes.clone().requires_grad_()
        rates = objective(z, pi, dictionary.moved(atoms, codes), **settings_)
        in_atoms, in_codes = grad(rates.expansion - rates.compression - rates.residual, (atoms, codes))
        tangent = in_atoms - (in_atoms * dictionary.atoms).sum(1, keepdim=True) * dictionary.atoms
        allowed = torch.where(dictionary.codes > 1e-6, in_codes.abs(), in_codes.clamp_min(0))
        return float(tangent.abs().max()), float(allowed.max())

    dictionary = random_dictionary(6, 3, 2, structure)
    start = slopes(dictionary)
    for _ in range(1000):
        dictionary = ascending_step(z, pi, dictionary, **settings_).dictionary
    end = slopes(dictionary)
    assert end[0] < 0.01 * start[0]
    assert end[1] < 0.001 * start[1]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("step", ["ascent", "paper", "simultaneous"])
def test_a_step_leaves_absent_classes_as_they_were_to_the_bit(structure, step):
    z, labels = unit_rows(40, 8), torch.arange(40) % 4
    loss = loss_at(z, labels, 4, 2, structure=structure, step=step, mu=0.1)
    before = snapshot(loss)
    some = labels != 2
    loss(z[some], labels[some])
    assert torch.equal(loss.dictionary.codes[:, 2], before["dictionary.codes"][:, 2])
    assert torch.equal(loss.dictionary.atoms[:, 4:6], before["dictionary.atoms"][:, 4:6])
    others = torch.tensor([0, 1, 3])
    assert (loss.dictionary.codes[:, others] != before["dictionary.codes"][:, others]).any(0).all()


@pytest.mark.parametrize("share", [1e-4, 1e-2])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("step", ["ascent", "paper"])
def test_a_class_with_less_than_one_sample_moves_in_proportion(step, structure, share):
    """Label smoothing gives classes without a sample a share of the batch, and n_j cancels in a class's step."""
    z, labels = unit_rows(40, 8), torch.arange(40) % 4
    some = labels != 2
    rows = one_hot(labels[some], 4).double()
    rows[:, 2] = share / len(rows)
    smoothed, hard = (loss_at(z, labels, 4, 2, structure=structure, step=step, mu=0.1) for _ in range(2))
    before = snapshot(smoothed)
    smoothed(z[some], rows / rows.sum(1, keepdim=True))
    hard(z[some], labels[some])
    for name, own in (("codes", (slice(None), 2)), ("atoms", (slice(None), slice(4, 6)))):
        moved = (getattr(smoothed.dictionary, name) - before[f"dictionary.{name}"])[own].abs().max()
        assert 0 < moved < 2 * share
        torch.testing.assert_close(
            getattr(smoothed.dictionary, name), getattr(hard.dictionary, name), rtol=0, atol=3 * share
        )


def test_a_negligible_code_of_another_class_does_not_set_its_atoms_free():
    z, labels = unit_rows(40, 8), torch.arange(40) % 4
    some = labels != 2
    loss = loss_at(z, labels, 4, 2, mu=0.1)
    loss.dictionary.codes[4, 0] = 1e-12
    before = loss.dictionary.atoms[:, 4].clone()
    loss(z[some], 0.99 * one_hot(labels[some], 4).double() + 0.01 * torch.tensor([1.0, 0, 1e-4, 0]).double() / 1.0001)
    assert 0 < (loss.dictionary.atoms[:, 4] - before).abs().max() < 1e-4


def test_a_small_batch_of_many_classes_touches_no_others():
    loss = loss_at(unit_rows(70, 12), torch.arange(70) % 7, 7, 2, structure="block")
    before = copy.deepcopy(loss.dictionary)
    loss(unit_rows(3, 12, seed=1), torch.tensor([4, 1, 4]))
    assert (loss.dictionary.codes != before.codes).any(0).nonzero()[:, 0].tolist() == [1, 4]
    moved = (loss.dictionary.atoms != before.atoms).view(12, 7, 2).any(2).any(0)
    assert moved.nonzero()[:, 0].tolist() == [1, 4]


@pytest.mark.parametrize(("energy", "confined"), [(None, True), (0.001, False), (0.2, True), (1.0, True)])
def test_a_shared_dictionary_confined_to_own_atoms_takes_the_very_step_of_block_structure(energy, confined):
    """From step 60 on µ is that of ρ = 0.05: no class would gain by others' atoms, unless codes are tiny."""
    m, d, k, s = 60, 12, 3, 2
    labels = torch.arange(m) % k
    shared, block, dense = (
        loss_at(unit_rows(m, d), labels, k, s, structure=structure, energy=energy)
        for structure in ("shared", "block", "shared")
    )
    for loss in (shared, block, dense):
        loss.dictionary.steps_taken = 60
    same = []
    for seed in range(4):
        z = unit_rows(m, d, seed=seed)
        values = [float(loss(z, labels)) for loss in (shared, block)]
        mu = shared.mu_at(m)
        expected = ascending_step(
            z,
            checked(z, labels, k),
            dense.dictionary.part_for(checked(z, labels, k), torch.float64)[1],  # all atoms for all classes
            mu=mu,
            eps_sq=EPS_SQ,
            energy=energy,
        ).dictionary
        dense.dictionary.replace(expected, checked(z, labels, k))
        torch.testing.assert_close(shared.dictionary.codes, dense.dictionary.codes)
        torch.testing.assert_close(shared.dictionary.atoms, dense.dictionary.atoms)
        if confined:
            torch.testing.assert_close(shared.dictionary.codes, torch.block_diag(*block.dictionary.codes.T[:, :, None]))
            torch.testing.assert_close(shared.dictionary.atoms, block.dictionary.atoms)
        same.append(values[0] == pytest.approx(values[1], rel=1e-12))
    assert all(same) == confined


@pytest.mark.parametrize("energy", [None, 1.0])
@pytest.mark.parametrize("rho", [0.05, 1.0, 20.0])
def test_a_shared_dictionary_takes_the_step_of_all_its_atoms_whichever_classes_are_absent(rho, energy):
    m, stayed, spread = 40, 0, 0
    for seed in range(12):
        d, k, s = [(12, 4, 2), (10, 20, 1), (16, 3, 4)][seed % 3]
        settings_ = at_balance(rho, m, d)
        first = unit_rows(60, d), torch.arange(60) % k
        shared, dense = (loss_at(*first, k, s, energy=energy, **settings_) for _ in range(2))
        if energy is not None:  # an absent class is scaled in its first step, or with all others
            shared.dictionary.codes *= energy / shared.dictionary.codes.sum(0)
            dense.dictionary.codes.copy_(shared.dictionary.codes)
        for i in range(3):
            z, labels = unit_rows(m, d, seed=10 * seed + i), random_labels(m, max(1, k // 2), seed=seed + i)
            if seed % 2:  # some samples of class 0 lie along an atom of the last class, which has none
                z[(labels == 0).nonzero()[: 1 + seed, 0]] = shared.dictionary.atoms[:, -1]
            pi = checked(z, labels, k)
            before = dense.dictionary.part_for(pi, torch.float64)[1]
            dense.dictionary.replace(ascending_step(z, pi, before, energy=energy, **settings_).dictionary, pi)
            shared(z, labels)
            torch.testing.assert_close(shared.dictionary.atoms, dense.dictionary.atoms)
            torch.testing.assert_close(shared.dictionary.codes, dense.dictionary.codes)
            expected = objective(z, pi, dense.dictionary.part_for(pi, torch.float64)[1], **settings_)
            for ours, theirs in zip(shared.rates(z, labels), expected, strict=True):
                torch.testing.assert_close(ours, theirs)
        stayed += bool(shared.dictionary.confined())
        spread += not shared.dictionary.confined()
    assert (stayed > 0) == (rho < 20)
    assert (spread > 0) == (rho > 0.05)


def test_a_shared_dictionary_whose_classes_use_others_atoms_never_takes_the_block_step():
    z, labels = unit_rows(60, 12), torch.arange(60) % 3
    loss, pi = loss_at(z, labels, 3, 2), checked(z, labels, 3)
    loss.dictionary.steps_taken = 60  # at ρ = 0.05 no code would rise from 0
    loss.dictionary.codes += 0.5
    _, before = loss.dictionary.part_for(pi, torch.float64)
    expected = ascending_step(z, pi, before, mu=loss.mu_at(60), eps_sq=EPS_SQ).dictionary
    loss(z, labels)
    torch.testing.assert_close(loss.dictionary.atoms, expected.atoms.T)
    torch.testing.assert_close(loss.dictionary.codes, expected.codes.T)


def test_a_confined_step_makes_no_products_of_all_samples_with_all_atoms():
    m, d, k, s = 300, 40, 20, 4  # more samples than have all their inner products taken at once
    z, labels = unit_rows(m, d), torch.arange(m) % k
    loss = loss_at(z, labels, k, s)
    loss.dictionary.steps_taken = 60
    loss(z, labels)  # past the watch's look at ΔR
    with LargestTensor() as largest:
        loss(z, labels)
    assert largest.numel <= m * d < m * k * s, largest.shape
    z, labels = z[labels < 2], labels[labels < 2]
    loss.rates(z, labels)
    with LargestTensor() as largest:
        loss(z, labels)
        loss.rates(z, labels)
    assert largest.numel <= (k * s) * d < (k * s) ** 2, largest.shape  # of the dictionary, not of its overlap


@pytest.mark.parametrize(("rho", "n"), [(0.6, 1), (12.5, 2)])
def test_shared_codes_switch_on_atoms_of_others(rho, n):
    """Class 0 lies along n atoms of class 1: its codes there rise if ρ/n > ½ (1 − Γ_lᵀ S⁻¹ Γ_l)."""
    z, labels = unit_rows(60, 12), torch.arange(60) % 3
    shared, block = (
        loss_at(z, labels, 3, 2, structure=structure, **at_balance(rho, 60, 12)) for structure in STRUCTURES
    )
    moved = shared.dictionary.atoms[:, 2 : 2 + n].T[torch.arange(60) // 3 % n]
    features = torch.where((labels == 0)[:, None], moved, z)
    before = [loss.rates(features, labels) for loss in (shared, block)]
    assert float(before[0].residual) == pytest.approx(float(before[1].residual))
    for loss in (shared, block):
        loss(features, labels)
    assert (shared.dictionary.codes[2 : 2 + n, 0] > 0).all()
    after = [loss.rates(features, labels) for loss in (shared, block)]
    assert float(after[0].residual) < float(after[1].residual)


@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 5), st.integers(0, 10**6), st.sampled_from(STRUCTURES))
def test_a_paper_step_keeps_the_constraints(m, d, k, seed, structure):
    z, labels = unit_rows(m, d, seed=seed), torch.arange(m) % k
    dictionary, pi = random_dictionary(d, k, min(d, 2), structure, seed=seed), checked(z, labels, k)
    after = paper_step(
        z, pi, dictionary, mu=0.7, eps_sq=EPS_SQ, step_atoms=5, step_codes=5, at_moved_atoms=True, num_classes=k
    )
    torch.testing.assert_close(after.atoms.norm(dim=1), torch.ones(len(after.atoms)).double())
    assert (after.codes >= 0).all()
    assert torch.equal(after.codes[pi.counts == 0], dictionary.codes[pi.counts == 0])


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("step", ["ascent", "paper"])
def test_codes_that_are_all_zero_have_a_finite_step(structure, step):
    z, labels = unit_rows(10, 6), random_labels(10, 2)
    dictionary = random_dictionary(6, 2, 3, structure)
    dictionary, pi = dictionary.moved(codes=dictionary.codes * 0), checked(z, labels, 2)
    if step == "ascent":
        after = ascending_step(z, pi, dictionary, mu=0.7, eps_sq=EPS_SQ).dictionary
    else:
        after = paper_step(z, pi, dictionary, mu=0.7, eps_sq=EPS_SQ, step_atoms=5, step_codes=5, at_moved_atoms=True)
    torch.testing.assert_close(after.atoms, dictionary.atoms)  # atoms without energy have no gradient
    assert after.codes.isfinite().all()
    assert (after.codes > 0).any()


def test_scaling_to_an_energy_leaves_codes_without_any():
    dictionary = SharedCodes(unit_rows(3, 4), torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0]]).double())
    assert scaled_to(dictionary, 2.0).codes.tolist() == [[0.5, 1.5, 0.0], [0.0, 0.0, 0.0]]
    assert scaled_to(dictionary, None) is dictionary


def test_a_code_that_falls_gets_to_0():
    """Rather than being halved for ever: a class on a line, with an atom beside it."""
    z, labels = torch.eye(4)[[0] * 20].double(), torch.zeros(20, dtype=torch.long)
    dictionary = SharedCodes(torch.eye(4)[:2].double(), torch.full((1, 2), 0.5).double())
    for _ in range(60):
        dictionary = ascending_step(z, checked(z, labels, 1), dictionary, **at_balance(10.0, 20, 4)).dictionary
    assert dictionary.codes[0].tolist() == [pytest.approx(1.0), 0.0]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_steps_commute_with_renaming_classes_and_rotating_features(structure):
    z, labels = unit_rows(30, 6), random_labels(30, 3)
    names = torch.tensor([2, 0, 1])
    rotation = torch.linalg.qr(normal(6, 6))[0]
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    runs = []
    for features, membership in ((z, labels), (z, names[labels]), (z @ rotation, labels), (z[order], labels[order])):
        loss = loss_at(features, membership, 3, 2, structure=structure)
        runs.append([float(loss(features, membership)) for _ in range(5)])
    for run in runs[1:]:
        assert run == pytest.approx(runs[0], rel=1e-9)


def test_one_hot_rows_take_the_step_of_labels():
    z, labels = unit_rows(30, 8), random_labels(30, 3)
    for structure in STRUCTURES:
        hard, soft = (loss_at(z, labels, 3, 2, structure=structure) for _ in range(2))
        rows = torch.nn.functional.one_hot(labels, 3)
        for seed in range(3):
            batch = unit_rows(30, 8, seed=seed)
            assert float(hard(batch, labels)) == pytest.approx(float(soft(batch, rows)), rel=1e-10)
        torch.testing.assert_close(hard.dictionary.codes, soft.dictionary.codes)
        torch.testing.assert_close(hard.dictionary.atoms, soft.dictionary.atoms)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["labels", "soft"])
def test_training_killed_and_resumed_by_state_dict_equals_training_that_was_not(structure, kind):
    membership = random_membership(40, 4, kind)
    through = vmcr2.VMCR2Loss(4, 8, structure=structure)
    batches = [unit_rows(40, 8, seed=seed, dtype=torch.float32) for seed in range(8)]
    for z in batches[:4]:
        through(z, membership)
    saved = io.BytesIO()
    torch.save(through.state_dict(), saved)
    saved.seek(0)
    resumed = vmcr2.VMCR2Loss(4, 8, structure=structure)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    for z in batches[4:]:
        assert float(through(z, membership)) == float(resumed(z, membership))
    for name, tensor in through.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert resumed.dictionary.steps_taken == 8


@pytest.mark.parametrize(("eps_sq", "energy"), [(0.5, 1e-10), (1e4, 1e-3), (7.9e8, None)])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_codes_that_all_add_little_are_kept(eps_sq, energy, structure):
    z, labels = unit_rows(30, 8), torch.arange(30) % 3
    loss = loss_at(z, labels, 3, 2, eps_sq=eps_sq, energy=energy, structure=structure)
    for _ in range(3):
        loss(z, labels)
    sums = loss.dictionary.codes.sum(0)
    assert (sums > 0).all()
    if energy is not None:
        torch.testing.assert_close(sums, torch.full_like(sums, energy), rtol=1e-5, atol=0)


def test_codes_go_half_of_the_way_to_the_maximum_of_their_bound():
    """With one atom a class the bound of R^v is w log(u/u₀), u = a + 1/β, and that of M its own quadratic."""
    z, labels = unit_rows(40, 6), torch.arange(40) % 3
    pi, dictionary = checked(z, labels, 3), random_dictionary(6, 3, 1, "block")
    beta, mu = 6 / 0.5, 0.3
    moved = ascending_step(z, pi, dictionary, mu=mu, eps_sq=0.5).dictionary
    codes = dictionary.codes.clone().requires_grad_()
    rates = objective(z, pi, moved.moved(codes=codes), mu=mu, eps_sq=0.5)
    (rise,) = grad(rates.expansion, codes, retain_graph=True)
    (fall,) = grad(rates.compression + rates.residual, codes)
    for j in range(3):
        at, up, down, n = (float(each[j]) for each in (dictionary.codes, rise, fall, pi.counts))

        def bound(a, at=at, up=up, down=down, n=n):
            u, u0 = a + 1 / beta, at + 1 / beta
            return -(u0 * up * np.log(u / u0) - down * (a - at) - mu * n / 2 * (a - at) ** 2)

        best = minimize_scalar(bound, bounds=(0, 3), method="bounded", options={"xatol": 1e-10}).x
        assert float(moved.codes[j]) == pytest.approx((at + best) / 2, abs=1e-6)


def test_a_simultaneous_step_in_block_structure_counts_the_classes_that_a_batch_lacks():
    """L_A has the √k of all classes: with half of them the same step of the codes is √2 times as long."""
    z, labels = unit_rows(40, 8), torch.arange(40) % 2
    moved = []
    for k in (2, 4):
        loss = vmcr2.VMCR2Loss(k, 8, atoms_per_class=2, structure="block", step="simultaneous", mu=0.1, step_codes=0.1)
        loss.double().latch(z, labels)
        before = loss.dictionary.codes.clone()
        loss(unit_rows(40, 8, seed=1), labels)
        moved.append((loss.dictionary.codes - before)[:, :2])
    torch.testing.assert_close(moved[0], 2**0.5 * moved[1])


@pytest.mark.parametrize("step", ["paper", "simultaneous"])
@pytest.mark.parametrize("structure", ["shared", "block"])
def test_a_paper_step_that_would_take_a_class_all_its_codes_leaves_it_its_energy(structure, step):
    """The samples are orthogonal to all atoms, and the step far too long."""
    lines, labels = torch.eye(8).double(), torch.arange(40) % 4
    loss = loss_at(lines[labels], labels, 4, 1, structure=structure, step=step, energy=1.0, mu=1.0, step_codes=1e3)
    loss(lines[4 + labels], labels)
    torch.testing.assert_close(loss.dictionary.codes.sum(0), torch.ones(4).double())
