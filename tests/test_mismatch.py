"""M and its gradients, eqs. (9) to (11), in both structures: derivatives, precision, memory."""

import numpy as np
import pytest
import reference
import torch
from conftest import (
    STRUCTURES,
    LargestTensor,
    as_shared,
    at_batch_scale,
    checked,
    loss_at,
    random_dictionary,
    random_labels,
    random_membership,
    random_rows,
    rows_of,
    unit_rows,
)

import vmcr2
from vmcr2.mismatch import BlockCodes, code_gradient, mismatch, precise_mismatch, squared_moment_norms

CASES = [(12, 5, 3, 2), (8, 9, 2, 3), (30, 4, 5, 4)]
each_case = pytest.mark.parametrize(("m", "d", "k", "s"), CASES)
each_structure = pytest.mark.parametrize("structure", STRUCTURES)


@each_case
@pytest.mark.parametrize("kind", ["labels", "soft"])
@each_structure
def test_derivatives_in_features_membership_atoms_and_codes(m, d, k, s, kind, structure):
    z, dictionary = unit_rows(m, d), random_dictionary(d, k, s, structure)
    membership = random_membership(m, k, kind)

    def value(features, weights, atoms, codes):
        pi = checked(features, membership if weights is None else weights, k)
        if isinstance(dictionary, BlockCodes) and weights is None:
            # As in training: block structure meets the classes that are present alone.
            blocks = atoms.view(k, s, d)[pi.present].flatten(0, 1)
            return mismatch(features, pi.among_present(), BlockCodes(blocks, codes[pi.present]))[0]
        return mismatch(features, pi, dictionary.moved(atoms, codes))[0]

    point = [z, dictionary.atoms, dictionary.codes]
    point = [tensor.clone().requires_grad_() for tensor in point]
    assert torch.autograd.gradcheck(lambda a, b, c: value(a, None, b, c), point)
    if kind == "soft":
        logits = membership.log().requires_grad_()
        assert torch.autograd.gradcheck(lambda w, a, b, c: value(a, w.softmax(1), b, c), [logits, *point])


@each_structure
def test_second_derivatives_in_features_membership_atoms_and_codes(structure):
    m, d, k, s = 5, 4, 2, 2
    z, dictionary = unit_rows(m, d), random_dictionary(d, k, s, structure)
    logits = random_rows(m, k).log()
    point = [tensor.clone().requires_grad_() for tensor in (z, logits, dictionary.atoms, dictionary.codes)]
    assert torch.autograd.gradgradcheck(
        lambda a, w, b, c: mismatch(a, checked(a, w.softmax(1), k), dictionary.moved(b, c))[0], point
    )


@each_case
@pytest.mark.parametrize("kind", ["balanced", "labels", "soft"])
@each_structure
def test_closed_form_gradients_equal_autograd(m, d, k, s, kind, structure):
    z, dictionary = unit_rows(m, d), random_dictionary(d, k, s, structure)
    pi = checked(z, random_membership(m, k, kind), k)
    if structure == "block":
        blocks = dictionary.blocks[pi.present].flatten(0, 1)
        dictionary, pi = BlockCodes(blocks, dictionary.codes[pi.present]), pi.among_present()
    free = dictionary.moved(dictionary.atoms.clone().requires_grad_(), dictionary.codes.clone().requires_grad_())
    expected = torch.autograd.grad(mismatch(z, pi, free)[0], (free.atoms, free.codes))
    projections, overlap = dictionary.project(z, pi), dictionary.overlap()
    by_hand = code_gradient(dictionary, dictionary.energies(projections, pi), overlap, pi)
    torch.testing.assert_close(dictionary.atom_gradient(z, projections, overlap, pi), expected[0])
    torch.testing.assert_close(by_hand, expected[1])


@each_case
@pytest.mark.parametrize("kind", ["balanced", "labels", "soft"])
def test_block_structure_is_shared_structure_with_the_other_codes_0(m, d, k, s, kind):
    z, block = unit_rows(m, d), random_dictionary(d, k, s, "block")
    shared, pi = as_shared(block), checked(z, random_membership(m, k, kind), k)
    rows = rows_of(random_membership(m, k, kind), k)
    dense = checked(z, rows, k)
    expected = mismatch(z, pi, shared)[0]
    torch.testing.assert_close(mismatch(z, pi, block)[0], expected)
    torch.testing.assert_close(mismatch(z, dense, block)[0], expected)
    torch.testing.assert_close(
        block.atom_gradient(z, block.project(z, pi), block.overlap(), pi),
        shared.atom_gradient(z, shared.project(z, pi), shared.overlap(), pi),
    )


@pytest.mark.parametrize("kind", ["balanced", "labels", "soft"])
@pytest.mark.parametrize(("m", "d"), [(40, 3), (10, 30)])
def test_moment_norms_are_those_of_the_moments_on_either_side(kind, m, d, monkeypatch):
    z, membership = unit_rows(m, d), random_membership(m, 4, kind)
    rows = rows_of(membership, 4)
    expected = [
        float(((z.T * rows[:, j]) @ z / rows[:, j].sum()).square().sum()) if rows[:, j].any() else 0.0 for j in range(4)
    ]
    assert squared_moment_norms(z, checked(z, membership, 4)).tolist() == pytest.approx(expected)
    monkeypatch.setattr("vmcr2.mismatch._FEW_PAIRS", 0)  # now class by class
    assert squared_moment_norms(z, checked(z, membership, 4)).tolist() == pytest.approx(expected)
    monkeypatch.setattr("vmcr2.mismatch._PAIRS", 60)  # and the inner products come in several parts
    assert squared_moment_norms(z, checked(z, membership, 4)).tolist() == pytest.approx(expected)


@each_case
@pytest.mark.parametrize("kind", ["balanced", "labels", "soft"])
@each_structure
def test_a_small_batch_takes_the_step_and_has_the_derivatives_of_a_large_one(m, d, k, s, kind, structure, monkeypatch):
    z, membership = unit_rows(m, d), random_membership(m, k, kind)

    def stepped():
        loss = vmcr2.VMCR2Loss(k, d, atoms_per_class=s, structure=structure, pull=0.5).double()
        loss.latch(unit_rows(40, d, seed=1), torch.arange(40) % k)
        features = z.clone().requires_grad_()
        value = loss(features, membership)
        (gradient,) = torch.autograd.grad(value, features, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), features)
        return value, gradient, second, loss.dictionary.atoms, loss.dictionary.codes

    small = stepped()
    monkeypatch.setattr("vmcr2.mismatch._FEW_PAIRS", 0)
    monkeypatch.setattr("vmcr2.membership._MERGED", 0)
    torch.testing.assert_close(stepped(), small, rtol=1e-9, atol=1e-12)


def subspaces_with_noise(distance):
    """Returns float32 features near four planes, and the dictionary that describes them best."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.linalg.qr(torch.randn(64, 8, generator=generator, dtype=torch.float64))[0]
    labels = torch.arange(200) % 4
    own = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    z = torch.stack([atoms[:, 2 * y : 2 * y + 2] @ weights for y, weights in zip(labels, own, strict=True)])
    z = torch.nn.functional.normalize(z + distance / 8 * torch.randn(z.shape, generator=generator), dim=1).float()
    return z, labels, vmcr2.latching.latched_blocks(z.double(), checked(z.double(), labels, 4), 2)


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_small_residuals_keep_their_precision(distance):
    """Eq. (9) cancels where the residual is small: in float32 alone the last of these would be noise."""
    z, labels, (blocks, energies) = subspaces_with_noise(distance)
    wide = as_shared(BlockCodes(blocks.mT.flatten(0, 1), energies))
    narrow = wide.moved(wide.atoms.float(), wide.codes.float())
    exact = 0.0
    for j in range(4):
        own = z[labels == j].double()
        model = narrow.atoms.double().T * narrow.codes[j].double() @ narrow.atoms.double()
        exact += 50 / 2 * float((own.T @ own / 50 - model).square().sum())
    assert float(precise_mismatch(z, checked(z, labels, 4), narrow)) == pytest.approx(exact, rel=1e-5)


@each_structure
def test_a_training_step_near_its_dictionary_returns_a_precise_value_and_gradient(structure):
    """The step itself runs in float32 and works the mismatch out again where that has lost its digits."""
    z, labels, _ = subspaces_with_noise(1e-3)
    loss = loss_at(z, labels, 4, 2, structure=structure, energy=1.0)
    features = z.clone().requires_grad_()
    value = loss(features, labels)
    value.backward()
    again = z.double().requires_grad_()
    expected = loss.double().eval()(again, labels)
    expected.backward()
    assert value.item() < 1e-3
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(features.grad.double(), again.grad, rtol=1e-4, atol=1e-4 * float(again.grad.abs().max()))


def test_a_learned_membership_with_block_codes_gets_its_gradient_without_dense_codes_or_overlaps():
    """Of ΓᵀΓ the blocks on the diagonal are enough, of the codes each class's own."""
    m, d, k, s = 40, 16, 150, 8
    q = k * s
    rows, z = random_rows(m, k), unit_rows(m, d)
    loss = loss_at(z, rows, k, s, structure="block", mu=0.3, reduction="sum")
    learned, features = rows.clone().requires_grad_(), z.clone().requires_grad_()
    with LargestTensor() as largest:
        got = torch.autograd.grad(loss(features, learned), (features, learned))
    assert largest.numel < q * k, largest.shape
    assert largest.numel <= 2 * max(m * q, q * d), largest.shape
    shared = as_shared(loss.dictionary.part_for(checked(z, rows, k), torch.float64)[1])
    again, weights = z.clone().requires_grad_(), rows.clone().requires_grad_()
    counts, by_class = weights.sum(0), 0
    for j in range(k):
        moment = (again.T * weights[:, j]) @ again / counts[j]
        model = shared.atoms.T * shared.codes[j] @ shared.atoms
        by_class = by_class + 0.3 / 2 * counts[j] * (moment - model).square().sum()
    for ours, theirs in zip(got, torch.autograd.grad(by_class, (again, weights)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@each_structure
def test_a_step_on_dense_rows_makes_nothing_of_all_samples_times_all_classes_times_dimensions(structure):
    """Each class has a share in each sample; the k×m×d or k×d×d arrays of the formula as printed are not built."""
    m, d, k = 200, 40, 100
    z, rows = unit_rows(m, d), random_rows(m, k)
    loss = loss_at(z, rows, k, 1, structure=structure)
    with LargestTensor() as largest:
        loss(z, rows)
    assert largest.numel <= 2 * max(m * m, m * k, k * k, m * d), largest.shape


def test_a_step_of_few_samples_among_many_classes_of_their_own_atoms_stays_small():
    m, d, k = 30, 16, 3000
    z, labels = unit_rows(m, d), torch.arange(m) % 10 * 7
    loss = loss_at(unit_rows(k, d), torch.arange(k), k, 2, structure="block")
    with LargestTensor() as largest:
        loss(z, labels)
    assert largest.numel <= max(2 * k, 4 * m * d), largest.shape


def test_random_labels_and_rows_of_them_agree():
    z, labels = unit_rows(30, 6), random_labels(30, 3)
    for structure in STRUCTURES:
        dictionary = random_dictionary(6, 3, 2, structure)
        values = [mismatch(z, checked(z, pi, 3), dictionary) for pi in (labels, rows_of(labels, 3))]
        torch.testing.assert_close(*values)


def shortfall(z, pi, gamma, a, mu, pull):
    """What a pull below 1 adds to (µ/2m) M: (1 − uᵖ)/p, p = `pull`, in place of 1 − u, times the largest code."""
    d, m = z.shape
    total = 0.0
    for j in range(pi.shape[1]):
        codes = a[:, j] / max(pi[:, j].sum(), 1e-300)
        for i in range(m):
            if pi[i, j] > 0 and codes.max() > 0:
                u = z[:, i] @ gamma @ np.diag(codes) @ gamma.T @ z[:, i] / codes.max() + 1 / d
                total += pi[i, j] * codes.max() * ((1 - u**pull) / pull - (1 - u))
    return mu * total


@each_case
@pytest.mark.parametrize("kind", ["labels", "soft"])
@each_structure
@pytest.mark.parametrize("pull", [0.1, 0.5, 1.0])
def test_the_pull_is_that_of_its_formula(m, d, k, s, kind, structure, pull):
    z, dictionary, membership = unit_rows(m, d), random_dictionary(d, k, s, structure), random_membership(m, k, kind)
    pi = checked(z, membership, k)
    rows = rows_of(membership, k).numpy()
    atoms, codes = at_batch_scale(dictionary, rows)
    if structure == "block" and kind == "labels":
        present = dictionary.blocks[pi.present].flatten(0, 1)
        got = mismatch(z, pi.among_present(), BlockCodes(present, dictionary.codes[pi.present]), pull=pull)[0]
    else:
        got = mismatch(z, pi, dictionary, pull=pull)[0]
    expected = reference.variational(z.T.numpy(), rows, atoms, codes, 0.7, 0.5)[2]
    expected += shortfall(z.T.numpy(), rows, atoms, codes, 0.7, pull)
    assert float(0.7 * got) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("pull", [1e-2, 1e-6, 1e-60])
def test_a_small_pull_is_as_exact_in_float32_as_in_float64(pull):
    z, labels = unit_rows(40, 8), torch.arange(40) % 4
    loss = loss_at(unit_rows(40, 8, seed=1), labels, 4, 2, pull=pull)
    exact = float(loss(z, labels))
    loss = loss_at(unit_rows(40, 8, seed=1, dtype=torch.float32), labels, 4, 2, pull=pull)
    assert float(loss(z.float(), labels)) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("kind", ["labels", "soft"])
@each_structure
def test_derivatives_with_a_pull_below_one(kind, structure):
    m, d, k, s = 8, 5, 2, 2
    dictionary, membership = random_dictionary(d, k, s, structure), random_membership(m, k, kind)
    assert torch.autograd.gradcheck(
        lambda z: mismatch(z, checked(z, membership, k), dictionary, pull=0.3)[0], unit_rows(m, d).requires_grad_()
    )


@pytest.mark.parametrize("pull", [1.0, 0.5])
def test_a_feature_far_from_its_class_is_pulled_as_hard_as_a_near_one_only_with_a_pull_below_one(pull):
    loss = vmcr2.VMCR2Loss(1, 100, atoms_per_class=1, pull=pull).double()
    atom = torch.zeros(1, 100, dtype=torch.float64)
    atom[0, 0] = 1
    loss.latch(atom, torch.zeros(1, dtype=torch.long))
    across = torch.zeros(100, dtype=torch.float64)
    across[1] = 1

    def force(cosine):
        # Many samples in all directions keep C_j small, so that B_j alone is felt.
        others = torch.eye(100, dtype=torch.float64)[2:]
        z = torch.cat([(cosine * atom + (1 - cosine**2) ** 0.5 * across), others]).requires_grad_()
        loss.eval()(z, torch.zeros(len(z), dtype=torch.long)).backward()
        assert z.grad is not None
        sideways = (1 - cosine**2) ** 0.5 * atom[0] - cosine * across
        return -float(z.grad[0] @ sideways) * len(z)

    ratio = force(0.1) / force(0.7)
    assert ratio < 0.25 if pull == 1 else 0.9 < ratio < 1.1


@each_structure
def test_a_mismatch_that_is_worked_out_again_has_its_pull_too(structure):
    """On the lines of their classes, features have nothing but what `pull` adds: u = 1 + 1/d of the formula."""
    z, labels = torch.eye(8)[torch.arange(40) % 4].requires_grad_(), torch.arange(40) % 4
    loss = loss_at(z.detach(), labels, 4, 1, structure=structure, pull=0.3, energy=1.0)
    assert loss(z, labels).item() == pytest.approx((1 - 1.125**0.3) / 0.3 - (1 - 1.125), rel=1e-5)
