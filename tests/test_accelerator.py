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
    z = z.clone().requires_grad_()
    value = loss(z, pi)
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
    """More classes than samples: absent ones fill the places and stay as they are."""
    loss = latched("block")
    before = copy.deepcopy(loss.dictionary)
    loss(unit_rows(3, D, dtype=torch.float32), torch.tensor([4, 1, 4]))
    changed = (loss.dictionary.codes != before.codes).any(0)
    assert changed.nonzero()[:, 0].tolist() == [1, 4]


@pytest.mark.parametrize("kind", ["labels", "soft"])
@pytest.mark.parametrize("structure", ["shared", "block"])
def test_nothing_is_read_in_a_step(unread, kind, structure):
    loss = latched(structure)
    z, pi = batch(kind)
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    fake = copy.deepcopy(loss)
    for name, buffer in loss.dictionary.named_buffers():
        setattr(fake.dictionary, name, mode.from_tensor(buffer))
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
    for name, buffer in list(loss.dictionary.named_buffers()):
        setattr(loss.dictionary, name, mode.from_tensor(buffer))
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
        assert float(compiled(z, y)) == pytest.approx(float(loss(z, y)), rel=1e-4)
        assert torch.allclose(loss.dictionary.atoms, other.dictionary.atoms, atol=1e-6)
