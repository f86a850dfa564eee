"""The training step as an accelerator takes it: nothing is read back, and what comes out is the same.

No accelerator is needed: the path is forced on the CPU, and fake tensors, which have shapes and no values, prove that
neither a value is read nor a shape depends on one.
"""

import copy

import pytest
import torch
from conftest import random_labels, random_rows, unit_rows
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import vmcr2
from vmcr2 import linalg, losses, membership, variational

M, D, K, S = 40, 12, 7, 2


@pytest.fixture
def unread(monkeypatch):
    for module in (linalg, losses, membership, variational):
        monkeypatch.setattr(module, "may_read", lambda tensor: False)


def batch(kind, m=M, dtype=torch.float32):
    z = unit_rows(m, D, seed=1, dtype=dtype)
    # The last two classes are absent.
    return z, random_labels(m, K - 2) if kind == "labels" else random_rows(m, K).to(dtype)


def latched(structure, dtype=torch.float32, **settings):
    loss = vmcr2.VMCR2Loss(K, D, atoms_per_class=S, mu=0.3, structure=structure, **settings).to(dtype)
    loss.latch(unit_rows(70, D, seed=2, dtype=dtype), torch.arange(70) % K)
    return loss


def step(loss, z, pi):
    return step_of(loss, loss, z, pi)


def step_of(called, loss, z, pi):
    z = z.clone().requires_grad_()
    value = called(z, pi)
    value.backward()
    return value.detach(), z.grad, loss.dictionary.atoms.clone(), loss.dictionary.codes.clone()


@pytest.mark.parametrize("kind", ["labels", "soft"])
@pytest.mark.parametrize("structure", ["shared", "block"])
@pytest.mark.parametrize("energy", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_step_is_the_same(monkeypatch, kind, structure, energy, dtype):
    usual = latched(structure, dtype, energy=energy)
    other = copy.deepcopy(usual)
    for i in range(3):
        z, pi = batch(kind, M + i, dtype)
        expected = step(usual, z, pi)
        with monkeypatch.context() as patched:
            for module in (linalg, losses, membership, variational):
                patched.setattr(module, "may_read", lambda tensor: False)
            found = step(other, z, pi)
        for one, two in zip(expected, found, strict=True):
            assert torch.allclose(one, two, rtol=1e-4, atol=1e-6 if dtype == torch.float32 else 1e-12)


def test_a_small_batch_of_many_classes(unread):
    """More classes than samples: absent ones fill the places and stay as they are, to the bit."""
    loss = latched("block")
    before = copy.deepcopy(loss.dictionary)
    loss(unit_rows(3, D, dtype=torch.float32), torch.tensor([4, 1, 4]))
    changed = (loss.dictionary.codes != before.codes).any(0)
    assert changed.nonzero()[:, 0].tolist() == [1, 4]
    moved = (loss.dictionary.atoms != before.atoms).view(D, K, S).any(2).any(0)
    assert moved.nonzero()[:, 0].tolist() == [1, 4]


@pytest.mark.parametrize("kind", ["labels", "soft"])
def test_more_classes_than_dimensions(monkeypatch, kind):
    """Here each sample meets its own class's atoms alone."""
    z = unit_rows(60, 5, dtype=torch.float32)
    pi = random_labels(60, 9) if kind == "labels" else random_rows(60, 9).float()
    usual = vmcr2.VMCR2Loss(9, 5, atoms_per_class=3, mu=0.3, structure="block")
    usual.latch(z, pi)
    other = copy.deepcopy(usual)
    expected = step(usual, z, pi)
    for module in (linalg, losses, membership, variational):
        monkeypatch.setattr(module, "may_read", lambda tensor: False)
    monkeypatch.setattr(variational, "_PAIRS", 700)  # and the inner products come in several parts
    for one, two in zip(expected, step(other, z, pi), strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("structure", ["shared", "block"])
def test_a_learned_membership_gets_its_gradient(monkeypatch, structure):
    usual = latched(structure, torch.float64)
    other = copy.deepcopy(usual)
    z, rows = batch("soft", dtype=torch.float64)
    gradients = []
    for loss in (usual, other):
        learned = rows.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss(z, learned), learned)[0])
        for module in (linalg, losses, membership, variational):
            monkeypatch.setattr(module, "may_read", lambda tensor: False)
    assert torch.allclose(*gradients, rtol=1e-6, atol=1e-9)


def make_fake(loss, mode):
    for module in loss.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, mode.from_tensor(buffer))


@pytest.mark.parametrize("kind", ["labels", "soft"])
@pytest.mark.parametrize("structure", ["shared", "block"])
def test_nothing_is_read_in_a_step(unread, kind, structure):
    loss = latched(structure)
    z, pi = batch(kind)
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    fake = copy.deepcopy(loss)
    make_fake(fake, mode)
    assert fake.dictionary.num_latched() == K  # known, as it is once all classes are
    features = mode.from_tensor(z.requires_grad_())
    with mode:
        value = fake(features, mode.from_tensor(pi))
        (gradient,) = torch.autograd.grad(value, features)
    assert gradient.shape == z.shape


def test_fake_tensors_would_notice(monkeypatch):
    """The check of the check: the path for the CPU, which does read values, fails under fake tensors."""
    loss = latched("shared")
    mode = FakeTensorMode()
    make_fake(loss, mode)
    z, pi = batch("labels")
    with mode, pytest.raises(DataDependentOutputException):
        loss(mode.from_tensor(z), mode.from_tensor(pi))


WRONG = [
    ("features must be finite", lambda z, y: (z.clone().index_fill_(0, torch.tensor(3), torch.nan), y)),
    ("features must have rows of norm 1", lambda z, y: (2 * z, y)),
    (r"membership labels must lie in \[0, 7\)", lambda z, y: (z, y + 5)),
    ("membership rows must sum to 1", lambda z, _: (z, torch.ones(len(z), K))),
]


@pytest.mark.parametrize(("said", "spoil"), WRONG)
@pytest.mark.parametrize("structure", ["shared", "block"])
def test_a_wrong_batch_is_told_of_later_and_spoils_nothing(unread, structure, said, spoil):
    loss = latched(structure)
    before = copy.deepcopy(loss.state_dict())
    z, y = batch("labels")
    wrong_z, wrong_y = spoil(z, y)
    wrong_z = wrong_z.requires_grad_()
    value = loss(wrong_z, wrong_y)
    assert value.isnan()
    (gradient,) = torch.autograd.grad(value, wrong_z)
    assert not gradient.any()
    for name, tensor in before.items():
        assert torch.equal(tensor, loss.state_dict()[name])
    assert loss(z, y).isfinite()  # the next batch is good, and what was wrong is not forgotten
    with pytest.raises(vmcr2.InputError, match=said):
        loss.eval()
    loss.check()  # said once
    loss.eval()


@pytest.mark.parametrize(("said", "spoil"), WRONG)
def test_a_wrong_batch_is_not_latched_onto(unread, said, spoil):
    loss = vmcr2.VMCR2Loss(K, D, atoms_per_class=S)
    with pytest.raises(vmcr2.InputError, match=said):
        loss(*spoil(*batch("labels")))
    assert not loss.dictionary.num_latched()


def test_everything_that_was_wrong_is_told_of(unread):
    loss = latched("shared")
    z, y = batch("labels")
    loss(2 * z, y)
    loss(z, y + 5)
    with pytest.raises(vmcr2.InputError, match=r"norm 1 .*\[0, 7\)"):
        loss.check()


def test_nan_features_leave_no_nan_gradient_in_features_or_membership(unread):
    loss = latched("block")
    z, rows = batch("soft")
    z = z.index_fill(0, torch.tensor(2), torch.nan).requires_grad_()
    rows.requires_grad_()
    for gradient in torch.autograd.grad(loss(z, rows), (z, rows)):
        assert not gradient.any()


def test_a_class_that_comes_late_is_latched_when_seen_early_on(unread):
    loss = vmcr2.VMCR2Loss(3, D, atoms_per_class=S)
    z = unit_rows(12, D, dtype=torch.float32)
    loss(z, torch.arange(12) % 2)
    assert loss.dictionary.latched.tolist() == [True, True, False]
    loss(z, torch.arange(12) % 3)
    assert loss.dictionary.latched.all()


def test_loading_counts_what_is_latched(unread):
    loss = latched("shared")
    other = vmcr2.VMCR2Loss(K, D, atoms_per_class=S)
    other.load_state_dict(loss.state_dict())
    assert other.dictionary._num_latched == K


def test_a_failed_factorisation_is_told_of(unread):
    loss = latched("shared")
    loss.dictionary.codes.fill_(1e38)
    z, y = batch("labels")
    assert loss(z, y).isnan()
    with pytest.raises(vmcr2.NumericalError, match="dictionary's step must be finite"):
        loss.check()


def test_wrong_batches_are_told_of_every_64_steps(unread):
    loss = latched("block")
    z, y = batch("labels")
    for _ in range(63):
        assert loss(2 * z, y).isnan()
    with pytest.raises(vmcr2.InputError, match="norm 1"):
        loss(2 * z, y)


def test_rates_still_stop_at_a_failure(unread):
    with pytest.raises(vmcr2.NumericalError, match="logdet"):
        vmcr2.coding_rate(torch.full((3, 3), 1e30))


@pytest.mark.parametrize("structure", ["shared", "block"])
def test_the_step_compiles_in_one_graph(unread, structure):
    loss = latched(structure)
    other = copy.deepcopy(loss)
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    for i in range(2):
        z, y = batch("labels", M)
        z = torch.nn.functional.normalize(z + 0.1 * i, dim=1)
        for one, two in zip(step(loss, z, y), step_of(compiled, other, z, y), strict=True):
            assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("structure", ["shared", "block"])
def test_a_class_that_comes_late_waits_until_it_is_latched(unread, structure):
    loss = vmcr2.VMCR2Loss(3, D, atoms_per_class=S, structure=structure)
    z = unit_rows(12, D, dtype=torch.float32)
    for _ in range(100):
        loss(z, torch.arange(12) % 2)
    for _ in range(27):
        loss(z, torch.arange(12) % 3)
        assert not loss.dictionary.codes[:, 2].any()
    loss(z, torch.arange(12) % 3)  # the 128th step looks for new classes
    assert loss.dictionary.latched.all()
