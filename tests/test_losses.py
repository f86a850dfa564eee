"""The two criteria: latching, modes, gradients, state, and what training loops do to them."""

import copy
import pickle

import numpy as np
import pytest
import reference
import torch
from conftest import random_labels, random_rows, unit_rows
from hypothesis import given
from hypothesis import strategies as st

import vmcr2
from vmcr2.dictionary import MomentStream, latched_blocks
from vmcr2.membership import as_membership

STRUCTURES = ["shared", "block"]


def latched(z, membership, k, s, **settings):
    loss = vmcr2.VMCR2Loss(k, z.shape[1], atoms_per_class=s, **settings).to(z.dtype)
    loss.latch(z, membership)
    return loss


def test_mcr2_loss_is_minus_the_reduction():
    z, labels = unit_rows(30, 8).requires_grad_(), random_labels(30, 3)
    loss = vmcr2.MCR2Loss(4)(z, labels)
    assert float(loss.detach()) == pytest.approx(
        -float(vmcr2.rate_reduction(z, labels, num_classes=4).reduction.detach())
    )
    few = z.detach()[:6].requires_grad_()  # gradcheck's steps stay within the tolerance on the norms
    assert torch.autograd.gradcheck(lambda features: vmcr2.MCR2Loss(4)(features, labels[:6]), (few,))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("m", "d", "k", "s"), [(40, 6, 4, 3), (12, 10, 3, 2)])
def test_latching_is_algorithm_2(m, d, k, s, structure):
    z, labels = unit_rows(m, d), torch.arange(m) % k
    loss = latched(z, labels, k, s, structure=structure)
    gamma, a = reference.latch(z.numpy().T, reference.one_hot(labels.numpy(), k), s)
    codes = loss.dictionary.codes
    if structure == "block":
        codes = torch.block_diag(*codes.T[:, :, None])
    np.testing.assert_allclose(codes.numpy() * (m / k), a, atol=1e-9)
    overlap = (loss.dictionary.atoms.numpy() * gamma).sum(0)
    np.testing.assert_allclose(np.abs(overlap), 1, atol=1e-9)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_equal_to_mcr2_at_a_full_rank_latch(soft, structure):
    z, k = unit_rows(60, 7), 3
    membership = random_rows(60, k) if soft else random_labels(60, k)
    loss = latched(z, membership, k, 7, structure=structure)
    exact = vmcr2.rate_reduction(z, membership, num_classes=k)
    got = loss.rates(z, membership)
    assert float(got.expansion) == pytest.approx(float(exact.expansion))
    assert float(got.compression) == pytest.approx(float(exact.compression))
    assert float(got.residual) == pytest.approx(0, abs=1e-12)


@given(st.integers(1, 25), st.integers(2, 8), st.integers(1, 5), st.integers(0, 10**6))
def test_full_rank_latch_on_any_batch(m, d, k, seed):
    """Absent classes, single samples, classes of fewer samples than dimensions."""
    z, labels = unit_rows(m, d, seed=seed), random_labels(m, k, seed=seed)
    loss = latched(z, labels, k, d)
    exact = vmcr2.rate_reduction(z, labels, num_classes=k)
    got = loss.rates(z, labels)
    assert float(got.expansion) == pytest.approx(float(exact.expansion))
    assert float(got.compression) == pytest.approx(float(exact.compression))
    assert float(got.residual) == pytest.approx(0, abs=1e-9)
    atoms = loss.dictionary.atoms
    torch.testing.assert_close(atoms.norm(dim=0), torch.ones_like(atoms[0]))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradient_is_line_12(structure):
    """The gradient of the returned loss is that of (µ/2m) M at the moved dictionary, which stands still meanwhile."""
    z, labels = unit_rows(20, 6), random_labels(20, 4)
    loss = latched(z, labels, 4, 2, structure=structure, mu=0.3)
    features = unit_rows(20, 6, seed=5).requires_grad_()
    before = loss.dictionary.atoms.clone()
    value = loss(features, labels)
    assert not torch.equal(before, loss.dictionary.atoms)
    value.backward()
    loss.eval()
    again = features.detach().requires_grad_()
    value_again = loss(again, labels)
    assert float(value_again.detach()) == pytest.approx(float(value.detach()))
    value_again.backward()
    torch.testing.assert_close(features.grad, again.grad)
    # ∂residual/∂z_i = 2µ (C_j − Γ Diag(Ã_j) Γᵀ) z_i
    atoms, codes = loss.dictionary.atoms, loss.dictionary.codes
    for i in range(20):
        j = int(labels[i])
        own = again.detach()[labels == j]
        if structure == "block":
            model = atoms[:, 2 * j : 2 * j + 2] * codes[:, j] @ atoms[:, 2 * j : 2 * j + 2].T
        else:
            model = atoms * codes[:, j] @ atoms.T
        expected = 2 * 0.3 * (own.T @ own / len(own) - model) @ again.detach()[i]
        torch.testing.assert_close(features.grad[i], expected)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_eval_mode_changes_nothing(structure):
    z, labels = unit_rows(30, 8), random_labels(30, 3)
    loss = latched(z, labels, 3, 2, structure=structure).eval()
    state = copy.deepcopy(loss.state_dict())
    loss(unit_rows(30, 8, seed=1), labels)
    loss.rates(unit_rows(30, 8, seed=2), labels)
    for name, tensor in loss.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_soft_one_hot_rows_equal_labels():
    z, labels = unit_rows(30, 8), random_labels(30, 3)
    rows = torch.nn.functional.one_hot(labels, 3).double()
    values = []
    for membership in (labels, rows):
        loss = latched(z, membership, 3, 2)
        features = unit_rows(30, 8, seed=1).requires_grad_()
        value = loss(features, membership)
        value.backward()
        values.append((value.detach(), features.grad, loss.dictionary.codes, loss.dictionary.atoms.abs()))
    for hard, soft in zip(*values, strict=True):
        torch.testing.assert_close(hard, soft)


def test_relabelling_and_rotation():
    """Training steps commute with renaming the classes and with rotating the features."""
    z, labels = unit_rows(30, 6), random_labels(30, 3)
    names = torch.tensor([2, 0, 1])
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    runs = []
    for features, membership in ((z, labels), (z, names[labels]), (z @ rotation, labels)):
        loss = latched(features, membership, 3, 2)
        runs.append([float(loss(features, membership)) for _ in range(5)])
    assert runs[1] == pytest.approx(runs[0])
    assert runs[2] == pytest.approx(runs[0])


def test_a_class_is_latched_the_first_time_it_is_seen():
    z, labels = unit_rows(30, 8), random_labels(30, 2)
    loss = vmcr2.VMCR2Loss(3, 8, atoms_per_class=2).double()
    assert float(loss(z, labels)) > 0
    assert loss.dictionary.latched.tolist() == [True, True, False]
    untouched = loss.dictionary.codes[:, :2].clone()
    loss.step_atoms = loss.step_codes = 1e-12
    later = torch.full((30,), 2)
    loss(z, later)
    assert loss.dictionary.latched.all()
    own = torch.linalg.eigvalsh(z.T @ z / 30)[-2:].flip(0)
    torch.testing.assert_close(loss.dictionary.codes[4:6, 2], own)
    torch.testing.assert_close(loss.dictionary.codes[:, :2], untouched)


def test_absent_classes_keep_what_they_had():
    z, labels = unit_rows(40, 8), random_labels(40, 4)
    loss = latched(z, labels, 4, 2)
    kept = loss.dictionary.atoms[:, 6:].clone(), loss.dictionary.codes[:, 3].clone()
    some = labels < 3
    loss.latch(unit_rows(40, 8, seed=9)[some], labels[some])
    torch.testing.assert_close(loss.dictionary.atoms[:, 6:], kept[0])
    torch.testing.assert_close(loss.dictionary.codes[:, 3], kept[1])
    loss(z[some], labels[some])
    torch.testing.assert_close(loss.dictionary.codes[:, 3], kept[1])


def test_state_dict_dtype_and_device_do_what_they_do_elsewhere():
    z, labels = unit_rows(30, 8), random_labels(30, 3)
    loss = latched(z, labels, 3, 2)
    other = vmcr2.VMCR2Loss(3, 8, atoms_per_class=2).double().eval()
    with pytest.raises(vmcr2.NotLatchedError):
        other(z, labels)
    other.load_state_dict(loss.state_dict())
    assert float(other(z, labels)) == float(loss.eval()(z, labels))
    assert float(pickle.loads(pickle.dumps(loss))(z, labels)) == float(loss(z, labels))
    single = loss.float()
    assert single.dictionary.atoms.dtype == torch.float32
    assert single.dictionary.latched.dtype == torch.bool
    assert float(single(z.float(), labels)) == pytest.approx(float(other(z, labels)), rel=1e-5)
    assert single(z, labels).dtype == torch.float64  # wider features are not narrowed
    double = latched(z, labels, 3, 2)
    for membership in (labels, random_rows(30, 3).float()):
        assert double.train()(z.float(), membership).dtype == torch.float64  # nor is a wider dictionary
        assert double.rates(z.bfloat16(), membership).residual.dtype == torch.float64


def test_an_eval_loss_keeps_its_gradient_when_the_dictionary_moves_on():
    z, labels = unit_rows(30, 8).requires_grad_(), random_labels(30, 3)
    for structure in STRUCTURES:
        loss = latched(z.detach(), labels, 3, 2, structure=structure).eval()
        (expected,) = torch.autograd.grad(loss(z, labels), z)
        value = loss(z, labels)
        loss.latch(unit_rows(30, 8, seed=4), labels)
        (plain,) = torch.autograd.grad(value, z, retain_graph=True)
        (with_graph,) = torch.autograd.grad(value, z, create_graph=True)
        torch.testing.assert_close(plain, expected)
        torch.testing.assert_close(with_graph, expected)


def test_two_forwards_before_one_backward():
    labels = random_labels(30, 3)
    for structure in STRUCTURES:
        together, apart = (latched(unit_rows(30, 8), labels, 3, 2, structure=structure) for _ in range(2))
        batches = [unit_rows(30, 8, seed=seed).requires_grad_() for seed in (1, 2)]
        sum(together(z, labels) for z in batches).backward()
        for z in batches:
            (expected,) = torch.autograd.grad(apart(z, labels), z)
            torch.testing.assert_close(z.grad, expected)


def test_a_dictionary_written_by_hand_is_taken_as_it_stands():
    z, labels = unit_rows(30, 8), random_labels(30, 3)
    source = latched(z, labels, 3, 2)
    for structure in STRUCTURES:
        source = latched(z, labels, 3, 2, structure=structure)
        by_hand = vmcr2.VMCR2Loss(3, 8, atoms_per_class=2, structure=structure).double()
        by_hand.dictionary.atoms.copy_(source.dictionary.atoms)
        by_hand.dictionary.codes.copy_(2 * source.dictionary.codes)
        source.dictionary.codes.mul_(2)
        assert float(by_hand.eval()(z, labels)) == float(source.eval()(z, labels))
        assert float(by_hand.train()(z, labels)) == float(source.train()(z, labels))
        without_flags = {name: t for name, t in source.state_dict().items() if not name.endswith("latched")}
        loaded = vmcr2.VMCR2Loss(3, 8, atoms_per_class=2, structure=structure).double()
        loaded.load_state_dict(without_flags)
        assert float(loaded.eval()(z, labels)) == float(source.eval()(z, labels))
        assert all(tensor.is_contiguous() for tensor in source.state_dict().values())


def test_off_block_says_when_block_structure_is_another_method():
    z, labels = unit_rows(60, 12), random_labels(60, 3)
    for structure in STRUCTURES:
        loss = latched(z, labels, 3, 2, structure=structure, mu=5.0)
        # The batch's class 0 has moved onto the atoms of class 1: a shared dictionary would switch them on.
        moved = loss.dictionary.atoms[:, 2:4].T[torch.arange(60) % 2]
        features = torch.where((labels == 0)[:, None], moved, z)
        share = loss.off_block(features, labels)
        assert share > 0
        if structure == "shared":
            loss(features, labels)
            codes = loss.dictionary.codes
            outside = torch.arange(6)[:, None] // 2 != torch.arange(3)
            assert float(((codes > 0) & outside).sum() / outside.sum()) == pytest.approx(share)
        orthogonal = torch.nn.functional.one_hot(labels * 4 + torch.arange(60) % 4, 12).double()
        loss.latch(orthogonal, labels)
        assert loss.off_block(orthogonal, labels) == 0


@pytest.mark.parametrize("structure", STRUCTURES)
def test_energy_keeps_the_trace(structure):
    z, labels = unit_rows(60, 12), random_labels(60, 3)
    loss = vmcr2.VMCR2Loss(4, 12, atoms_per_class=3, structure=structure, energy=1.0).double()
    for seed in range(5):
        loss(unit_rows(60, 12, seed=seed), labels)
    torch.testing.assert_close(loss.dictionary.codes.sum(0), torch.tensor([1.0, 1, 1, 0]).double())
    free = vmcr2.VMCR2Loss(4, 12, atoms_per_class=3, structure=structure).double()
    free(z, labels)
    bound = vmcr2.VMCR2Loss(4, 12, atoms_per_class=3, structure=structure, energy=1.0).double()
    bound(z, labels)
    torch.testing.assert_close(
        bound.dictionary.codes[:, :3], (free.dictionary.codes / free.dictionary.codes.sum(0))[:, :3]
    )
    torch.testing.assert_close(bound.dictionary.atoms, free.dictionary.atoms)


def test_failed_factorisations_are_numerical_errors():
    loss = vmcr2.VMCR2Loss(3, 50, eps_sq=1e-12)
    z, labels = unit_rows(60, 50, dtype=torch.float32), random_labels(60, 3)
    loss.latch(z, labels)
    with pytest.raises(vmcr2.NumericalError, match="raise eps_sq"):
        loss(z, labels)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_single_class_in_the_batch(structure):
    """In block structure the one class present must take the step it takes among absent ones in shared structure."""
    z, labels = unit_rows(40, 8), random_labels(40, 4)
    alone = torch.full((10,), 2)
    loss = latched(z, labels, 4, 2, structure=structure)
    other = latched(z, labels, 4, 2, structure="shared")
    # Orthogonal subspaces, where the two structures' step bounds coincide.
    for each in (loss, other):
        each.dictionary.atoms.copy_(torch.eye(8, dtype=torch.float64))
    first, second = loss(unit_rows(10, 8, seed=3), alone), other(unit_rows(10, 8, seed=3), alone)
    block = loss.dictionary.codes[:, 2] if structure == "block" else loss.dictionary.codes[4:6, 2]
    torch.testing.assert_close(block, other.dictionary.codes[4:6, 2])
    torch.testing.assert_close(loss.dictionary.atoms[:, 4:6], other.dictionary.atoms[:, 4:6])
    if structure == "shared":
        assert float(first) == float(second)


def test_autocast_computes_the_objective_in_float32():
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Linear(8, 8))
    inputs, labels = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), random_labels(40, 3)
    loss = vmcr2.VMCR2Loss(3, 8, atoms_per_class=2)
    with torch.autocast("cpu", torch.bfloat16):
        z = torch.nn.functional.normalize(model(inputs), dim=1)
        loss.latch(z, labels)
        value = loss(z, labels)
        exact = vmcr2.MCR2Loss(3)(z, labels)
    assert value.dtype == exact.dtype == torch.float32
    outside = loss.eval()(z.detach().float(), labels)
    assert value.item() == pytest.approx(outside.item(), rel=1e-6)
    (value + exact).backward()
    assert model[0].weight.grad.isfinite().all()


def test_three_lines_in_a_loop_increase_the_reduction():
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(200, 10, generator=generator), random_labels(200, 4)
    inputs = inputs + 3 * torch.randn(4, 10, generator=generator)[labels]
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(10, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Linear(64, 16)
    )
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    loss = vmcr2.VMCR2Loss(num_classes=4, feature_dim=16, atoms_per_class=4, mu=0.1)

    def features():
        return torch.nn.functional.normalize(model(inputs), dim=1)

    before = float(vmcr2.rate_reduction(features().detach(), labels).reduction)
    for _ in range(100):
        optimizer.zero_grad()
        loss(features(), labels).backward()
        optimizer.step()
    after = float(vmcr2.rate_reduction(features().detach(), labels).reduction)
    assert after > 1.5 * before


class Noisy(torch.nn.Module):
    """BatchNorm and dropout, so that modes matter."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5)

    def forward(self, inputs):
        return torch.nn.functional.normalize(self.drop(self.norm(inputs)), dim=1)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_latch_from_sees_training_statistics_and_leaves_no_trace(momentum):
    model = Noisy().double()
    model.norm.momentum = momentum
    model.norm.running_mean += 100.0  # eval mode would show another network
    state = copy.deepcopy(model.state_dict())
    inputs, labels = unit_rows(40, 6) + 1, random_labels(40, 3)
    loss = vmcr2.VMCR2Loss(3, 6, atoms_per_class=2).double()
    loss.latch_from(model, [(inputs, labels)])
    assert model.training
    assert model.norm.momentum == momentum
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    normed = (inputs - inputs.mean(0)) / (inputs.var(0, unbiased=False) + 1e-5).sqrt()
    expected = latched(torch.nn.functional.normalize(normed, dim=1), labels, 3, 2)
    torch.testing.assert_close(loss.dictionary.codes, expected.dictionary.codes)


@pytest.mark.parametrize("soft", [False, True])
def test_streamed_latching_equals_latching_in_memory(soft):
    """With few samples the stream keeps rows; with more than k d it folds them into second moments."""
    for m in (20, 400):
        z = unit_rows(m, 6)
        membership = random_rows(m, 3) if soft else random_labels(m, 3)
        loss = vmcr2.VMCR2Loss(3, 6, atoms_per_class=2).double()
        loss.latch_from(torch.nn.Identity(), zip(z.split(7), membership.split(7), strict=True))
        expected = latched(z, membership, 3, 2)
        torch.testing.assert_close(loss.dictionary.codes, expected.dictionary.codes)
        overlap = (loss.dictionary.atoms * expected.dictionary.atoms).sum(0).abs()
        torch.testing.assert_close(overlap, torch.ones_like(overlap))


def test_moment_stream_forgets_the_rows_it_has_folded():
    stream = MomentStream(2, 3)
    for seed in range(50):
        z, labels = unit_rows(10, 3, seed=seed), random_labels(10, 2, seed=seed)
        stream.add(z, as_membership(z, labels, 2))
        assert stream.kept <= 6
    _, energies, counts = stream.blocks(3)
    assert counts.sum() == 500
    torch.testing.assert_close(energies.sum(1), torch.ones(2, dtype=torch.float64))


def test_latched_blocks_complete_a_class_of_low_rank():
    z = torch.nn.functional.normalize(torch.eye(6, dtype=torch.float64)[[0, 0, 1]], dim=1)
    blocks, energies = latched_blocks(z, as_membership(z, torch.tensor([0, 0, 1]), 3), 4)
    for j in range(2):
        torch.testing.assert_close(blocks[j].T @ blocks[j], torch.eye(4, dtype=torch.float64))
        torch.testing.assert_close(energies[j], torch.tensor([1.0, 0, 0, 0], dtype=torch.float64), atol=1e-12, rtol=0)
    assert (blocks[2] == 0).all()
