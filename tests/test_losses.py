"""The two criteria: modes, gradients, state, defaults, and what training loops do to them."""

import copy
import pickle
import warnings

import pytest
import reference
import torch
import torch.utils.checkpoint
from conftest import (
    STRUCTURES,
    assert_unchanged,
    checked,
    loss_at,
    normal,
    random_labels,
    random_membership,
    random_rotation,
    random_rows,
    rows_of,
    snapshot,
    unit_rows,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import vmcr2
from vmcr2.collapse import CollapseWatch
from vmcr2.dictionary import ascending_step
from vmcr2.losses import SETTING_CHECKS

each_structure = pytest.mark.parametrize("structure", STRUCTURES)


def test_mcr2_loss_is_minus_the_reduction_and_its_gradient():
    z, labels = unit_rows(30, 8).requires_grad_(), random_labels(30, 3)
    loss = vmcr2.MCR2Loss(4)(z, labels)
    reduction = vmcr2.rate_reduction(z, labels, num_classes=4).reduction
    assert float(loss.detach()) == -float(reduction.detach())
    gradients = [torch.autograd.grad(value, z)[0] for value in (loss, -reduction)]
    assert torch.equal(*gradients)
    few = z.detach()[:6].requires_grad_()  # gradcheck's steps stay within the tolerance on the norms
    assert torch.autograd.gradcheck(lambda features: vmcr2.MCR2Loss(4)(features, labels[:6]), (few,))


# Defaults.


@pytest.mark.parametrize(("k", "d", "s"), [(10, 128, 12), (3, 8, 2), (8, 8, 1), (20, 8, 1), (1, 5, 5)])
def test_atoms_per_class_none_is_the_floor_of_d_over_k_and_1_at_least(k, d, s):
    loss = vmcr2.VMCR2Loss(k, d)
    assert loss.atoms_per_class == s
    assert loss.dictionary.atoms.shape == (d, k * s)
    assert loss.dictionary.codes.shape == (k * s, k)
    assert vmcr2.VMCR2Loss(k, d, structure="block").dictionary.codes.shape == (s, k)


@pytest.mark.parametrize("m", [20, 60])
def test_mu_none_is_the_mu_of_rho_0_05_at_the_batch_seen(m):
    z, labels = unit_rows(m, 8), random_labels(m, 3)
    loss = loss_at(unit_rows(40, 8, seed=1), random_labels(40, 3), 3, 2)
    mu = loss.mu_at(m)
    assert mu * m * loss.eps_sq / 8 == pytest.approx(0.05, rel=1e-12)
    given_mu = vmcr2.VMCR2Loss(3, 8, atoms_per_class=2, mu=mu).double()
    given_mu.load_state_dict(loss.state_dict())
    assert float(loss.rates(z, labels).residual) == float(given_mu.rates(z, labels).residual)
    loss.reduction = "sum"
    assert float(loss.eval()(z, labels)) == pytest.approx(float(loss.rates(z, labels).residual), rel=1e-12)


def test_balance_is_what_the_residual_weighs():
    assert vmcr2.balanced_mu(128, 500, eps_sq=0.5, balance=2.0) * 500 * 0.5 / 128 == pytest.approx(2.0)
    loss = vmcr2.VMCR2Loss(3, 8, balance=0.3, eps_sq=0.25)
    assert loss.mu_at(40) * 40 * 0.25 / 8 == pytest.approx(0.3)
    assert vmcr2.VMCR2Loss(3, 8, balance=0.3, mu=0.7).mu_at(40) == 0.7


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_class_that_training_sees_later_is_latched_alone(structure):
    z, labels = unit_rows(40, 8), torch.arange(40) % 2
    loss = loss_at(z, labels, 3, 2, structure=structure)
    for _ in range(5):
        loss(z, labels)
    features, all_three = unit_rows(45, 8, seed=1), torch.arange(45) % 3
    by_hand = copy.deepcopy(loss)
    by_hand.latch(features[all_three == 2], all_three[all_three == 2])
    assert float(loss(features, all_three)) == pytest.approx(float(by_hand(features, all_three)), rel=1e-9)
    torch.testing.assert_close(loss.state_dict(), by_hand.state_dict())


@each_structure
@pytest.mark.parametrize(("steps", "factor"), [(0, 6.0), (1, 5.82), (20, 6 * 0.97**20), (60, 1.0), (999, 1.0)])
def test_the_first_60_steps_use_up_to_six_times_the_mu_of_rho_0_05(structure, steps, factor):
    z, labels = unit_rows(30, 8), torch.arange(30) % 3
    loss = loss_at(unit_rows(30, 8, seed=1), labels, 3, 2, structure=structure)
    loss.dictionary.steps_taken = steps
    pi = checked(z, labels, 3)
    mu = factor * vmcr2.balanced_mu(8, 30)
    expected = ascending_step(z, pi, loss.dictionary.part_for(pi, torch.float64)[1], mu=mu, eps_sq=0.5).dictionary
    loss(z, labels)
    torch.testing.assert_close(loss.dictionary.codes.T, expected.codes)
    torch.testing.assert_close(loss.dictionary.atoms.T, expected.atoms)
    assert loss.dictionary.steps_taken == steps + 1


def test_a_given_mu_is_used_from_the_first_step():
    z, labels = unit_rows(30, 8), torch.arange(30) % 3
    first, later = (loss_at(unit_rows(30, 8, seed=1), labels, 3, 2, mu=0.1) for _ in range(2))
    later.dictionary.steps_taken = 1000
    assert float(first(z, labels)) == float(later(z, labels))
    assert torch.equal(first.dictionary.codes, later.dictionary.codes)


@each_structure
@pytest.mark.parametrize("kind", ["labels", "soft"])
def test_reduction_mean_is_half_the_weighted_mean_of_squared_distances_and_free_of_mu(structure, kind):
    m, d, k = 30, 8, 3
    z, membership = unit_rows(m, d), random_membership(m, k, kind)
    loss = loss_at(unit_rows(40, d, seed=1), torch.arange(40) % k, k, 2, structure=structure).eval()
    dictionary = loss.dictionary.part_for(checked(z, torch.arange(m) % k, k), torch.float64)[1]
    rows, expected = rows_of(membership, k), 0.0
    for j in range(k):
        if rows[:, j].any():
            moment = (z.T * rows[:, j]) @ z / rows[:, j].sum()
            if structure == "shared":
                model = dictionary.atoms.T * dictionary.codes[j] @ dictionary.atoms
            else:
                model = dictionary.blocks[j].T * dictionary.codes[j] @ dictionary.blocks[j]
            expected += 0.5 * float(rows[:, j].mean()) * float((moment - model).square().sum())
    values = {}
    for mu in (None, 0.01, 1.0, 30.0):
        for reduction in ("mean", "sum"):
            loss.mu, loss.reduction = mu, reduction
            values[mu, reduction] = float(loss(z, membership))
            if reduction == "mean":
                assert values[mu, reduction] == pytest.approx(expected, rel=1e-10)
            else:
                assert values[mu, reduction] == pytest.approx(loss.mu_at(m) * m * expected, rel=1e-10)


# Modes.


@each_structure
@pytest.mark.parametrize("kind", ["labels", "soft"])
@pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode", "eval under inference_mode", "rates"])
def test_eval_mode_no_grad_inference_mode_and_rates_take_no_step(structure, kind, how):
    z, membership = unit_rows(30, 8), random_membership(30, 3, kind)
    loss = loss_at(unit_rows(30, 8, seed=1), torch.arange(30) % 3, 3, 2, structure=structure)
    expected = float(copy.deepcopy(loss).eval()(z, membership))
    before, steps = snapshot(loss), loss.dictionary.steps_taken
    loss.train(not how.startswith("eval"))
    context = {"no_grad": torch.no_grad, "eval": torch.enable_grad, "rates": torch.enable_grad}
    with context.get(how, torch.inference_mode)():
        if how == "rates":
            loss.rates(z, membership)
        else:
            assert float(loss(z, membership)) == pytest.approx(expected, rel=1e-12)
    assert_unchanged(loss, before)
    assert loss.dictionary.steps_taken == steps
    # What inference mode has seen can still be trained on.
    loss.train()
    features = z.clone().requires_grad_()
    loss(features, membership).backward()
    assert features.grad.isfinite().all()
    assert loss.dictionary.steps_taken == steps + 1


@each_structure
def test_a_loss_never_latched_says_so_where_it_takes_no_step(structure):
    z, labels = unit_rows(12, 6), random_labels(12, 3)
    loss = vmcr2.VMCR2Loss(3, 6, structure=structure).double()

    def under(context, call):
        with context():
            return call(z, labels)

    for call in (
        lambda: under(torch.no_grad, loss),
        lambda: under(torch.inference_mode, loss),
        lambda: loss.rates(z, labels),
        lambda: copy.deepcopy(loss).eval()(z, labels),
    ):
        with pytest.raises(vmcr2.NotLatchedError, match=r"never latched.*call loss\.latch_from\(model, batches\)"):
            call()
    assert not loss.dictionary.latched.any()
    loss(z, labels)
    loss.rates(z, labels)


def test_a_loss_made_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        loss = vmcr2.VMCR2Loss(3, 6)
    z, labels = unit_rows(12, 6, dtype=torch.float32).requires_grad_(), random_labels(12, 3)
    loss(z, labels).backward()
    assert loss.dictionary.steps_taken == 1


def test_a_check_that_raises_leaves_modes_whole():
    parent = torch.nn.Sequential(torch.nn.Linear(2, 2), vmcr2.VMCR2Loss(3, 6), torch.nn.Dropout())
    for parent[1].training in (True, False):
        before = [module.training for module in parent.modules()]
        with pytest.raises(ValueError, match="norm 1"):
            parent[1](2 * unit_rows(12, 6, dtype=torch.float32), random_labels(12, 3))
        assert [module.training for module in parent.modules()] == before


# Gradients.


@each_structure
@pytest.mark.parametrize("kind", ["labels", "soft"])
def test_derivatives_in_eval_mode(structure, kind):
    m, k = 6, 2
    membership = random_labels(m, k) if kind == "labels" else None
    logits = normal(m, k, seed=1).requires_grad_()
    loss = loss_at(unit_rows(12, 4, seed=1), torch.arange(12) % k, k, 2, structure=structure).eval()
    z = unit_rows(m, 4).requires_grad_()

    def value(features, weights):
        return loss(features, weights.softmax(1) if membership is None else membership)

    point = (z, logits) if membership is None else (z, logits.detach())
    assert torch.autograd.gradcheck(value, point)
    assert torch.autograd.gradgradcheck(value, point)


@each_structure
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mu", [None, 0.3])
def test_expand_subtracts_so_much_of_the_features_own_rate(structure, reduction, training, mu):
    z, labels = unit_rows(12, 4), torch.arange(12) % 3
    plain, expanding = (
        loss_at(
            unit_rows(20, 4, seed=1), torch.arange(20) % 3, 3, 1,
            structure=structure, reduction=reduction, expand=expand, mu=mu,
        ).train(training)
        for expand in (0.0, 0.7)
    )  # fmt: skip
    expected = 0.7 * reference.rates(z.T.numpy(), reference.one_hot(labels.numpy(), 3), 0.5)[0]
    if reduction == "mean":
        expected /= plain.mu_at(12) * 12
    for _ in range(2):  # the dictionary's step is the same beside it
        without, value = plain(z, labels), expanding(z, labels)
        assert float(without - value) == pytest.approx(expected, rel=1e-9)
    few = z[:6].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda features: expanding.eval()(features, labels[:6]), (few,))


def test_an_expand_that_no_loss_could_hold_is_refused_before_the_dictionary_moves():
    z, labels = unit_rows(12, 4, dtype=torch.float32), torch.arange(12) % 3
    loss = loss_at(z, labels, 3, 1, mu=1e-38, expand=1.0)
    before = snapshot(loss)
    with pytest.raises(vmcr2.NumericalError, match="expand gives R the weight 8.33e\\+36.*lower expand or raise mu"):
        loss(z, labels)
    assert_unchanged(loss, before)


def both_losses(structure="shared"):
    at = unit_rows(20, 4, seed=9), torch.arange(20) % 3, 3, 2
    return [
        vmcr2.MCR2Loss(3),
        loss_at(*at, structure=structure).eval(),
        loss_at(*at, structure=structure, pull=0.3, expand=0.5).eval(),
    ]


@each_structure
@pytest.mark.parametrize("kind", ["labels", "soft"])
def test_torch_func_grad_hessian_and_jvp_equal_autograd(structure, kind):
    z, membership = unit_rows(7, 4), random_membership(7, 3, kind)
    for loss in both_losses(structure):

        def value(features, loss=loss):
            return loss(features, membership)

        free = z.clone().requires_grad_()
        (expected,) = torch.autograd.grad(value(free), free)
        torch.testing.assert_close(torch.func.grad(value)(z), expected)
        hessian = torch.autograd.functional.hessian(value, z)
        torch.testing.assert_close(torch.func.hessian(value)(z), hessian)
        # The directions are tangent to the sphere, along which the checks of norms hold to first order.
        along = normal(7, 4, seed=3)
        torch.testing.assert_close(torch.func.jvp(value, (z,), (along,))[1], (expected * along).sum())


def test_a_training_step_within_torch_func_is_refused():
    loss = vmcr2.VMCR2Loss(3, 4)
    z, labels = unit_rows(7, 4), random_labels(7, 3)
    loss(z, labels)
    before = loss.dictionary.atoms.clone()
    with pytest.raises(vmcr2.InputError, match=r"within torch.func.* loss.eval\(\)"):
        torch.func.grad(loss)(z, labels)
    assert torch.equal(loss.dictionary.atoms, before)
    assert torch.func.grad(loss.eval())(z, labels).isfinite().all()


def test_rates_of_a_spoilt_dictionary_say_so():
    loss = vmcr2.VMCR2Loss(3, 4)
    z, labels = unit_rows(7, 4), random_labels(7, 3)
    loss.latch(z, labels)
    loss.dictionary.codes.fill_(torch.nan)
    with pytest.raises(vmcr2.NumericalError, match="the dictionary holds NaN"):
        loss.rates(z, labels)


@each_structure
def test_torch_vmap_is_a_loop(structure):
    z = torch.stack([unit_rows(7, 4, seed=seed) for seed in range(3)])
    labels, rows = random_labels(7, 3), torch.stack([random_rows(7, 3, seed=seed) for seed in range(3)])
    rows[1] = rows_of(random_labels(7, 2), 3)  # one lacks a class that the others have
    for loss in both_losses(structure):
        expected = torch.stack([loss(one, labels) for one in z])
        torch.testing.assert_close(torch.vmap(loss, in_dims=(0, None))(z, labels), expected)
        expected = torch.stack([loss(one, pi) for one, pi in zip(z, rows, strict=True)])
        torch.testing.assert_close(torch.vmap(loss)(z, rows), expected)
        expected = torch.stack([torch.func.grad(loss)(one, pi) for one, pi in zip(z, rows, strict=True)])
        torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(z, rows), expected)


@each_structure
def test_the_gradient_is_that_of_the_dictionary_at_the_call_however_it_moves_before_backward(structure):
    z, labels = unit_rows(30, 8).requires_grad_(), random_labels(30, 3)
    for training in (True, False):
        loss = loss_at(unit_rows(30, 8, seed=1), labels, 3, 2, structure=structure).train(training)
        value = loss(z, labels)
        still = copy.deepcopy(loss).eval()
        expected = torch.autograd.grad(still(z, labels), z)[0]
        loss.latch(unit_rows(30, 8, seed=4), labels)
        torch.testing.assert_close(torch.autograd.grad(value, z, retain_graph=True)[0], expected)
        torch.testing.assert_close(torch.autograd.grad(value, z, create_graph=True)[0], expected)


@each_structure
def test_two_forwards_before_one_backward(structure):
    labels = random_labels(30, 3)
    together, apart = (loss_at(unit_rows(30, 8), labels, 3, 2, structure=structure) for _ in range(2))
    batches = [unit_rows(30, 8, seed=seed).requires_grad_() for seed in (1, 2)]
    sum(together(z, labels) for z in batches).backward()
    for z in batches:
        (expected,) = torch.autograd.grad(apart(z, labels), z)
        torch.testing.assert_close(z.grad, expected)


# Precision.


@each_structure
@pytest.mark.parametrize("kind", ["labels", "soft"])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_changes_neither_value_nor_gradient_nor_step(structure, kind, training):
    """Also where `backward` is called inside of it."""
    z, membership = unit_rows(60, 16, dtype=torch.float32), random_membership(60, 3, kind)
    if kind == "soft":
        membership = membership.float()
    start = loss_at(unit_rows(60, 16, seed=1, dtype=torch.float32), torch.arange(60) % 3, 3, 4, structure=structure)
    results = []
    for autocast in (False, True):
        loss = copy.deepcopy(start).train(training)
        results.append([])
        for each in (loss, vmcr2.MCR2Loss(3)):
            features, weights = z.clone().requires_grad_(), membership.clone()
            if kind == "soft":
                weights.requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                value = each(features, weights)
                assert value.dtype == torch.float32
                value.backward()
            results[-1] += [value.detach(), features.grad] + ([weights.grad] if kind == "soft" else [])
        results[-1] += loss.state_dict().values()
    for plain, mixed in zip(*results, strict=True):
        torch.testing.assert_close(mixed, plain, rtol=1e-5, atol=1e-5 * float(plain.double().abs().max()))


def test_features_of_an_autocast_model_are_taken_as_they_are():
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Linear(8, 8))
    inputs, labels = normal(40, 5).float(), random_labels(40, 3)
    loss = vmcr2.VMCR2Loss(3, 8, atoms_per_class=2)
    with torch.autocast("cpu", torch.bfloat16):
        z = torch.nn.functional.normalize(model(inputs), dim=1)
        assert z.dtype == torch.bfloat16 or model(inputs).dtype == torch.bfloat16
        loss.latch(z, labels)
        value = loss(z, labels)
    outside = loss.eval()(z.detach().float(), labels)
    assert value.item() == pytest.approx(outside.item(), rel=1e-5)
    value.backward()
    assert model[0].weight.grad.isfinite().all()
    assert model[0].weight.grad.any()


@each_structure
@pytest.mark.parametrize("eps_sq", [1e-12, 1e-6, 1e-3, 1e3, 1e6, 1e12])
def test_tiny_and_huge_eps_sq_train_as_in_float64_or_are_an_error(structure, eps_sq):
    labels = torch.arange(40) % 3
    # Nearly collapsed features, where I + βC is worst conditioned.
    z = torch.nn.functional.normalize(unit_rows(1, 16, seed=7) + 0.05 * normal(40, 16), dim=1)
    if not 1e-8 <= 16 / eps_sq <= 1e10:
        with pytest.raises(vmcr2.InputError, match="eps_sq must be from"):
            vmcr2.VMCR2Loss(3, 16, structure=structure, eps_sq=eps_sq)
        loss = vmcr2.VMCR2Loss(3, 16, structure=structure)
        loss.eps_sq = eps_sq
        with pytest.raises(vmcr2.InputError, match="eps_sq must be from"):
            loss(z.float(), labels)
        return
    losses = [
        vmcr2.VMCR2Loss(3, 16, structure=structure, eps_sq=eps_sq, mu=0.1).to(t) for t in (torch.float32, z.dtype)
    ]
    narrow, wide = losses
    wide.latch(z, labels)
    narrow.load_state_dict(wide.state_dict())
    gradients = []
    for loss in losses:
        features = z.to(loss.dictionary.atoms.dtype).requires_grad_()
        loss(features, labels).backward()
        gradients.append(features.grad.double())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-3 * float(gradients[1].abs().max()))
    for ours, theirs in zip(narrow.rates(z.float(), labels), wide.rates(z, labels), strict=True):
        assert float(ours) == pytest.approx(float(theirs), rel=1e-3)


# State.


@each_structure
def test_state_dict_deepcopy_pickle_and_double_do_what_they_do_elsewhere(structure):
    z, labels = unit_rows(30, 8), random_labels(30, 3)
    loss = loss_at(z, labels, 3, 2, structure=structure)
    loss(z, labels)
    other = vmcr2.VMCR2Loss(3, 8, atoms_per_class=2, structure=structure).double()
    other.load_state_dict(loss.state_dict())
    copies = [other, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))]
    expected = [float(loss(unit_rows(30, 8, seed=seed), labels)) for seed in range(3)]
    for each in copies:
        assert each.dictionary.steps_taken == 1
        assert [float(each(unit_rows(30, 8, seed=seed), labels)) for seed in range(3)] == expected
        assert each.dictionary.steps_taken == 4
    single = copy.deepcopy(loss).float()
    assert single.dictionary.atoms.dtype == single.dictionary.codes.dtype == torch.float32
    assert single.dictionary.latched.dtype == torch.bool
    value = single(unit_rows(30, 8, seed=9, dtype=torch.float32), labels)
    assert float(value) == pytest.approx(float(loss(unit_rows(30, 8, seed=9), labels)), rel=1e-4)
    assert float(single.double()(z, labels)) == pytest.approx(float(loss(z, labels)), rel=1e-4)


@each_structure
def test_state_dict_with_assign(structure):
    z, labels = unit_rows(30, 8), random_labels(30, 3)
    loss = loss_at(z, labels, 3, 2, structure=structure)
    assigned = vmcr2.VMCR2Loss(3, 8, atoms_per_class=2, structure=structure).double()
    assigned.load_state_dict(snapshot(loss), assign=True)
    for seed in range(3):
        batch = unit_rows(30, 8, seed=seed)
        assert float(assigned(batch, labels)) == pytest.approx(float(loss(batch, labels)), rel=1e-12)
    torch.testing.assert_close(assigned.state_dict(), loss.state_dict())


@each_structure
def test_safetensors_take_the_state(structure, tmp_path):
    z, labels = unit_rows(30, 8), random_labels(30, 3)
    loss = loss_at(z, labels, 3, 2, structure=structure)
    loss(z, labels)
    save_file(loss.state_dict(), tmp_path / "loss.safetensors")
    other = vmcr2.VMCR2Loss(3, 8, atoms_per_class=2, structure=structure).double()
    other.load_state_dict(load_file(tmp_path / "loss.safetensors"))
    assert_unchanged(other, snapshot(loss))
    assert float(other(z, labels)) == float(loss(z, labels))


@each_structure
def test_meta_to_empty_and_load_state_dict(structure):
    z, labels = unit_rows(30, 8, dtype=torch.float32), random_labels(30, 3)
    loss = loss_at(z, labels, 3, 2, structure=structure)
    with torch.device("meta"):
        empty = vmcr2.VMCR2Loss(3, 8, atoms_per_class=2, structure=structure)
    assert empty.dictionary.atoms.is_meta
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(loss.state_dict())
    assert float(empty(z, labels)) == float(loss(z, labels))
    torch.testing.assert_close(empty.state_dict(), loss.state_dict())


def test_a_state_without_flags_or_steps_is_taken_as_it_stands():
    """As it was saved by earlier versions, or written by hand."""
    z, labels = unit_rows(30, 8), random_labels(30, 3)
    loss = loss_at(z, labels, 3, 2)
    state = {name: t for name, t in loss.state_dict().items() if name.endswith(("atoms", "codes"))}
    other = vmcr2.VMCR2Loss(3, 8, atoms_per_class=2).double()
    other.load_state_dict(state)
    assert other.dictionary.latched.all()
    assert float(other(z, labels)) == float(loss(z, labels))


@each_structure
def test_a_dictionary_written_by_hand_is_taken_as_it_stands(structure):
    z, labels = unit_rows(30, 8), random_labels(30, 3)
    source = loss_at(z, labels, 3, 2, structure=structure)
    by_hand = vmcr2.VMCR2Loss(3, 8, atoms_per_class=2, structure=structure).double()
    by_hand.dictionary.atoms.copy_(source.dictionary.atoms)
    by_hand.dictionary.codes.copy_(source.dictionary.codes)
    assert float(by_hand.eval()(z, labels)) == float(source.eval()(z, labels))
    assert float(by_hand.train()(z, labels)) == float(source.train()(z, labels))


@pytest.mark.parametrize("wrong", ["missing", "of another size"])
def test_a_state_that_is_refused_leaves_the_steps(wrong):
    z, labels = unit_rows(30, 8), random_labels(30, 3)
    trained, loss = (loss_at(z, labels, 3, 2) for _ in range(2))
    trained(z, labels)
    state = trained.state_dict()
    if wrong == "missing":
        del state["dictionary.atoms"]
    else:
        state["dictionary.atoms"] = state["dictionary.atoms"][:, 1:]
    atoms = loss.dictionary.atoms.clone()
    with pytest.raises(RuntimeError, match=r"dictionary\.atoms"):
        torch.nn.ModuleList([torch.nn.Linear(1, 1), loss]).load_state_dict(
            {f"1.{name}": value for name, value in state.items()}
        )
    assert torch.equal(loss.dictionary.atoms, atoms)
    assert loss.dictionary.steps_taken == 0
    with pytest.raises(RuntimeError, match=r"0\.weight"):  # what another module lacks does not count
        torch.nn.ModuleList([torch.nn.Linear(1, 1), loss]).load_state_dict(
            {f"1.{name}": value for name, value in trained.state_dict().items()}
        )
    assert loss.dictionary.steps_taken == 1


@pytest.mark.parametrize("structure", ["shared", "block"])
def test_functional_call_takes_the_state_dict(structure):
    z, labels = unit_rows(30, 8), random_labels(30, 3)
    loss = loss_at(z, labels, 3, 2, structure=structure).eval()
    other = vmcr2.VMCR2Loss(3, 8, atoms_per_class=2, structure=structure).double().eval()
    with pytest.raises(vmcr2.NotLatchedError):
        other(z, labels)
    called = torch.func.functional_call(other, loss.state_dict(), (z, labels))
    torch.testing.assert_close(called, loss(z, labels))  # a state has its copies in another layout
    with pytest.raises(vmcr2.NotLatchedError):  # its own dictionary is as it was
        other(z, labels)
    assert other.state_dict()["dictionary.steps"] == 0


WRONG_STATES = {
    "structure": "size mismatch for dictionary.codes",
    "atoms missing": "Missing key",
    "codes missing": "Missing key",
    "steps": "steps must be >= 0, got -5",
    "atoms averaged": r"dictionary\.atoms must be of norm 1, got 1 of other norms, such as 0\.5",
    "atoms not finite": r"dictionary\.atoms must be of norm 1, got 1 of other norms, such as nan",
    "codes negative": "dictionary.codes must be >= 0 and finite",
    "codes not finite": "dictionary.codes must be >= 0 and finite",
}


@pytest.mark.parametrize("wrong", WRONG_STATES)
def test_a_state_that_is_refused_changes_nothing(wrong):
    z, labels = unit_rows(30, 8), random_labels(30, 3)
    loss = vmcr2.VMCR2Loss(3, 8, atoms_per_class=2).double()
    state = loss_at(z, labels, 3, 2, structure="block" if wrong == "structure" else "shared").state_dict()
    if wrong == "steps":
        state["dictionary.steps"] = torch.tensor(-5)
    elif wrong.endswith("missing"):
        del state[f"dictionary.{wrong.split()[0]}"]
    elif wrong == "atoms averaged":
        state["dictionary.atoms"][:, 1] *= 0.5
    elif wrong != "structure":
        state[f"dictionary.{wrong.split()[0]}"][0, 1] = -1 if wrong.endswith("negative") else torch.nan
    state["dictionary.first_class"] = torch.zeros(1)  # which only a sharded dictionary has, and no state
    before = snapshot(loss)
    with pytest.raises(RuntimeError, match=WRONG_STATES[wrong]):
        loss.load_state_dict(state)
    assert_unchanged(loss, before)
    with pytest.raises(vmcr2.NotLatchedError):
        loss.eval()(z, labels)


def test_the_loss_has_no_parameters():
    assert not list(vmcr2.VMCR2Loss(3, 8).parameters())


def test_a_training_step_within_backward_is_refused():
    z, labels = unit_rows(12, 4).requires_grad_(), torch.arange(12) % 3
    loss = loss_at(z.detach(), labels, 3, 1)
    value = torch.utils.checkpoint.checkpoint(loss, z, labels, use_reentrant=False)
    before = snapshot(loss)
    with pytest.raises(vmcr2.InputError, match=r"torch\.utils\.checkpoint.*the dictionary would move twice"):
        value.backward()
    assert_unchanged(loss, before)
    hidden = torch.utils.checkpoint.checkpoint(lambda each: each + 0, z, use_reentrant=False)
    loss(hidden, labels).backward()
    assert z.grad.isfinite().all()


def test_a_state_that_is_kept_stays_of_one_moment():
    z, labels = unit_rows(12, 4), torch.arange(12) % 3
    loss = vmcr2.VMCR2Loss(3, 4, atoms_per_class=1).double()
    kept = loss.state_dict()
    loss.latch(z, labels)
    fresh = vmcr2.VMCR2Loss(3, 4, atoms_per_class=1).double().state_dict()
    assert all(torch.equal(kept[name], fresh[name]) for name in fresh)


def test_a_dictionary_made_on_meta_is_set_by_reset_parameters():
    z, labels = unit_rows(12, 4, dtype=torch.float32), torch.arange(12) % 3
    with torch.device("meta"):
        loss = vmcr2.VMCR2Loss(3, 4)
    loss.to_empty(device="cpu")
    loss.dictionary.reset_parameters()
    expected = vmcr2.VMCR2Loss(3, 4)
    assert_unchanged(loss, snapshot(expected))
    torch.testing.assert_close(loss(z, labels), expected(z, labels))


def test_a_step_with_a_spoilt_dictionary_says_that_it_is_spoilt():
    z, labels = unit_rows(12, 4), torch.arange(12) % 3
    loss = loss_at(z, labels, 3, 1)
    loss.dictionary.codes[0, 0] = torch.nan
    with pytest.raises(vmcr2.NumericalError, match="the dictionary holds NaN"):
        loss(z, labels)


@pytest.mark.parametrize("kind", ["vmcr2", "mcr2", "total"])
def test_a_compiled_step_computes_the_same_and_leaves_the_loss_untraced(kind):
    z, labels = unit_rows(30, 8, dtype=torch.float32), random_labels(30, 3)
    losses = {"vmcr2": loss_at(z, labels, 3, 2), "mcr2": vmcr2.MCR2Loss(3), "total": vmcr2.TotalCodingRateLoss()}
    given = (labels,) if kind != "total" else ()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def outcome(compiled):
        network, loss = torch.nn.Linear(8, 8, bias=False), copy.deepcopy(losses[kind])
        network.weight.data = torch.eye(8)
        step = torch.compile(lambda x: 2 * loss(network(x), *given), backend=backend) if compiled else None
        values = [step(z) if compiled else 2 * loss(network(z), *given) for _ in range(2)]
        return *values, torch.autograd.grad(sum(values), network.weight)[0]

    torch.testing.assert_close(outcome(True), outcome(False))
    assert len(graphs) == 2  # the network's and that of doubling
    torch.compiler.reset()
    alone = copy.deepcopy(losses[kind])
    alone.compile(backend=backend)
    torch.testing.assert_close(alone(z, *given), losses[kind](z, *given))
    assert len(graphs) == 2


# Batches of all kinds.


@given(
    st.integers(1, 25),
    st.integers(2, 8),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from(STRUCTURES),
    st.integers(0, 10**6),
)
def test_any_batch_trains_missing_single_sample_and_unbalanced_classes_included(m, d, k, soft, structure, seed):
    loss = vmcr2.VMCR2Loss(k, d, structure=structure).double()
    for i in range(4):
        batch = (seed + i) % (m + 1) or m
        pi = random_rows(batch, k, seed=seed + i) if soft else random_labels(batch, k, seed=seed + i)
        z = unit_rows(batch, d, seed=seed + i).requires_grad_()
        value = loss(z, pi)
        value.backward()
        assert float(value.detach()) >= 0
        assert z.grad.isfinite().all()
        atoms, codes = loss.dictionary.atoms, loss.dictionary.codes
        torch.testing.assert_close(atoms.norm(dim=0), torch.ones_like(atoms[0]))
        assert (codes >= 0).all()
        assert codes.isfinite().all()
        exact = vmcr2.MCR2Loss(k)(z, pi)
        assert float(exact.detach()) <= 1e-10


@given(st.integers(2, 25), st.integers(2, 8), st.integers(1, 5), st.sampled_from(STRUCTURES), st.integers(0, 10**6))
def test_losses_do_not_depend_on_rotation_order_or_names(m, d, k, structure, seed):
    generator = torch.Generator().manual_seed(seed)
    z, labels = unit_rows(m, d, seed=seed), random_labels(m, k, seed=seed)
    order, names = torch.randperm(m, generator=generator), torch.randperm(k, generator=generator)
    turn = random_rotation(d, seed=seed)
    later = unit_rows(m, d, seed=seed + 1)
    values = []
    same, every = torch.eye(d).double(), torch.arange(m)
    cases = [(same, labels, every), (turn, labels, every), (same, names[labels], every), (same, labels[order], order)]
    for turned, pi, by in cases:
        first, second = (each[by] @ turned for each in (z, later))
        # Each class's span as a whole: single eigenvectors are not unique where eigenvalues coincide.
        loss = loss_at(first, pi, k, d, structure=structure, mu=0.1).eval()
        values.append([float(loss(second, pi)), float(vmcr2.MCR2Loss(k)(second, pi))])
    for each in values[1:]:
        assert each == pytest.approx(values[0], rel=1e-8, abs=1e-10)


def test_a_class_of_hardly_any_weight_is_absent():
    z, k = unit_rows(20, 6).float(), 3
    logits = torch.zeros(20, k)
    logits[:, 2] = -86.0
    rows = logits.softmax(1)
    for tiny in (rows, rows.double().index_fill(1, torch.tensor(2), 1e-170)):
        for structure in STRUCTURES:
            features, soft = z.to(tiny.dtype, copy=True).requires_grad_(), tiny.clone().requires_grad_()
            loss = vmcr2.VMCR2Loss(k, 6, atoms_per_class=2, structure=structure).to(tiny.dtype)
            loss(features, soft).backward()
            assert soft.grad.isfinite().all()
            assert features.grad.isfinite().all()
            assert loss.dictionary.latched.tolist() == [True, True, False]


def test_a_step_that_fails_is_a_numerical_error_and_leaves_the_dictionary():
    z, labels = unit_rows(30, 8, dtype=torch.float32), random_labels(30, 3)
    for structure in STRUCTURES:
        loss = loss_at(z, labels, 3, 2, structure=structure)
        loss.dictionary.codes.fill_(1e38)
        before = snapshot(loss)
        with pytest.raises(vmcr2.NumericalError, match=r"step failed.*raise eps_sq. The dictionary is as it was"):
            loss(z, labels)
        assert_unchanged(loss, before)


@each_structure
@pytest.mark.parametrize("settings", [{"mu": 1e37}, {"mu": 1e300}, {"balance": 1e300}, {"energy": 1e30}])
def test_a_class_is_not_latched_by_a_step_that_fails(structure, settings):
    z, labels = unit_rows(40, 8, dtype=torch.float32), torch.arange(40) % 4
    loss = vmcr2.VMCR2Loss(4, 8, structure=structure, **settings)
    loss.latch(z[labels < 2], labels[labels < 2])
    before = snapshot(loss)
    with pytest.raises(vmcr2.NumericalError, match="The dictionary is as it was"):
        loss(z, labels)
    assert_unchanged(loss, before)
    loss.mu, loss.energy, loss.balance = None, None, 0.05
    right = vmcr2.VMCR2Loss(4, 8, structure=structure)
    right.load_state_dict(before)
    assert float(loss(z, labels)) == float(right(z, labels))
    assert_unchanged(loss, snapshot(right))


def test_buffers_passed_for_one_call_leave_no_trace():
    z, labels = unit_rows(40, 8), random_labels(40, 4)
    latched, loss = loss_at(z, labels, 4, 2), vmcr2.VMCR2Loss(4, 8).double().eval()
    torch.func.functional_call(loss, dict(latched.named_buffers()), (z, labels))
    with pytest.raises(vmcr2.NotLatchedError):
        loss(z, labels)


def test_a_dictionary_emptied_by_hand_is_latched_again():
    z, labels = unit_rows(40, 8), random_labels(40, 4)
    loss = loss_at(z, labels, 4, 2)
    loss.dictionary.codes.zero_()
    loss.dictionary.latched.zero_()
    loss(z, labels)
    assert loss.dictionary.latched.all()


@each_structure
def test_a_class_is_not_latched_by_a_step_that_breaks_off(structure, monkeypatch):
    z, labels = unit_rows(30, 8), random_labels(30, 3)
    loss = vmcr2.VMCR2Loss(3, 8, structure=structure).double()
    before = snapshot(loss)

    def break_off(batch):
        assert loss.dictionary.latched.all()
        raise MemoryError

    monkeypatch.setattr(loss, "_step", break_off)
    with pytest.raises(MemoryError):
        loss(z, labels)
    assert_unchanged(loss, before)
    assert not loss.dictionary.known().any()


@each_structure
@pytest.mark.parametrize("name", ["atoms", "codes"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_dictionary_that_is_not_finite_is_a_numerical_error_in_eval_mode_too(structure, name, value):
    z, labels = unit_rows(30, 8), random_labels(30, 3)
    for s in (1, 2):
        loss = loss_at(z, labels, 3, s, structure=structure).eval()
        loss.get_buffer(f"dictionary.{name}")[0, 0] = value
        calls = [lambda f=loss: f(z, labels), lambda f=loss: f.rates(z, labels)]
        if structure == "block":
            calls.append(lambda f=loss: f.nearest_class(z))
        for call in calls:
            with pytest.raises(vmcr2.NumericalError):
                call()


def test_a_value_that_overflows_in_eval_mode_is_a_numerical_error():
    z, labels = unit_rows(30, 8, dtype=torch.float32), random_labels(30, 3)
    loss = loss_at(z, labels, 3, 2, mu=1e300, reduction="sum").eval()
    with pytest.raises(vmcr2.NumericalError, match="so large that the loss overflows"):
        loss(z, labels)


def test_a_value_that_overflows_in_training_is_a_numerical_error_that_leaves_the_dictionary_alone():
    z, labels = unit_rows(30, 8, dtype=torch.float32), random_labels(30, 3)
    loss = loss_at(z, labels, 3, 2, mu=1e38, reduction="sum", step="paper")
    before = snapshot(loss)
    with pytest.raises(vmcr2.NumericalError):
        loss(unit_rows(30, 8, seed=1, dtype=torch.float32), labels)
    assert_unchanged(loss, before)


@each_structure
@pytest.mark.parametrize("energy", [1.0, 3.0])
def test_codes_sum_to_energy_from_the_first_step_on_and_are_latched_as_algorithm_2_has_them(structure, energy):
    z, labels = unit_rows(30, 8), torch.arange(30) % 3
    loss = loss_at(z, labels, 3, 2, structure=structure, energy=energy)
    assert torch.equal(loss.dictionary.codes, loss_at(z, labels, 3, 2, structure=structure).dictionary.codes)
    assert (loss.dictionary.codes.sum(0) < 0.9).all()
    loss(z, labels)
    torch.testing.assert_close(loss.dictionary.codes.sum(0), torch.full((3,), energy).double())
    whole = loss_at(z, labels, 3, 8, structure="block", energy=energy)
    torch.testing.assert_close(whole.dictionary.codes.sum(0), torch.ones(3).double())
    assert float(whole.rates(z, labels).residual) == pytest.approx(0, abs=1e-12)


# Training.


def train(model, loss, inputs, labels, *, lr, epochs=100):
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    for _ in range(epochs):
        optimizer.zero_grad()
        loss(torch.nn.functional.normalize(model(inputs), dim=1), labels).backward()
        optimizer.step()
    with torch.no_grad():
        z = torch.nn.functional.normalize(model(inputs), dim=1)
    return float(vmcr2.rate_reduction(z, labels).reduction)


def clusters():
    labels = random_labels(200, 4)
    return (normal(200, 10) + 3 * normal(4, 10, seed=1)[labels]).float(), labels


@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_defaults_train_in_a_plain_loop(batch_norm):
    inputs, labels = clusters()
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm1d(64) if batch_norm else torch.nn.Identity()
    start = torch.nn.Sequential(torch.nn.Linear(10, 64), norm, torch.nn.ReLU(), torch.nn.Linear(64, 16))
    exact = train(copy.deepcopy(start), vmcr2.MCR2Loss(4), inputs, labels, lr=0.05)
    for structure in STRUCTURES:
        reached = train(copy.deepcopy(start), vmcr2.VMCR2Loss(4, 16, structure=structure), inputs, labels, lr=0.2)
        assert reached > 0.5 * exact, structure


def watch_features(loss, spread_until, steps):
    """Trains the dictionary on features that are spread out up to some step, and all alike from there on."""
    labels = torch.arange(40) % 4
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            z = unit_rows(40, 8, seed=step, dtype=torch.float32)
            if step >= spread_until:
                z = torch.nn.functional.normalize(torch.ones(1, 8) + 1e-3 * z, dim=1)
            loss(z.requires_grad_(), labels)
    collapses = [each for each in caught if "collapsed" in str(each.message)]
    assert {each.filename for each in collapses} <= {__file__}  # it points at the call in the user's loop
    return [str(each.message) for each in collapses]


def test_a_collapse_warns_once_and_names_what_to_change():
    (said,) = watch_features(vmcr2.VMCR2Loss(4, 8), 45, 300)
    assert "Lower the learning rate" in said
    assert "lower mu" not in said
    (said,) = watch_features(vmcr2.VMCR2Loss(4, 8, mu=1.0), 45, 150)
    assert "lower mu" in said
    assert "mu * m * eps_sq / feature_dim is 2.5" in said


@pytest.mark.parametrize("structure", ["shared", "block"])
def test_classes_that_come_later_are_added_through_the_state(structure):
    """As docs/choosing.md says."""
    z, labels = unit_rows(40, 8), torch.arange(40) % 3
    loss, grown = (vmcr2.VMCR2Loss(k, 8, atoms_per_class=2, structure=structure).double() for k in (3, 5))
    loss(z, labels)
    old, new = loss.state_dict(), grown.state_dict()
    for name in old:
        new[name][tuple(map(slice, old[name].shape))] = old[name]
    grown.load_state_dict(new)
    torch.testing.assert_close(grown.eval()(z, labels), loss.eval()(z, labels))
    grown.train()(unit_rows(10, 8, seed=1), torch.full((10,), 4))
    assert grown.dictionary.latched.tolist() == [True, True, True, False, True]


def test_a_collapse_after_an_earlier_state_is_loaded_warns_again():
    """As after a learning-rate finder, which ends in collapse and restores the loss."""
    loss = vmcr2.VMCR2Loss(4, 8)
    state = loss.state_dict()
    for _ in range(2):
        assert len(watch_features(loss, 45, 150)) == 1
        loss.load_state_dict(state)


def test_training_that_goes_well_does_not_warn():
    assert not watch_features(vmcr2.VMCR2Loss(4, 8), 300, 300)
    # Nor does a start from features that are all alike, since nothing has been lost.
    assert not watch_features(vmcr2.VMCR2Loss(4, 8), 0, 200)


def test_features_that_lose_what_chance_gave_them_and_keep_their_classes_do_not_warn():
    # ΔR of a few samples that know no class is 47; where classes lie on a line each it is 6.6, and two thirds of R.
    labels, lines = torch.arange(80) % 4, torch.eye(256)[:4]
    loss = vmcr2.VMCR2Loss(4, 256, atoms_per_class=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(300):
            z = unit_rows(80, 256, seed=step, dtype=torch.float32)
            if step >= 45:
                z = torch.nn.functional.normalize(lines[labels] + 1e-3 * z, dim=1)
            loss(z.requires_grad_(), labels)
    assert not [each for each in caught if "collapsed" in str(each.message)]


def test_batches_of_one_class_alone_do_not_warn():
    lines = torch.eye(8, dtype=torch.float32)[:2]
    loss = vmcr2.VMCR2Loss(2, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(300):  # ΔR is looked at every 20 steps: first of both classes, then of one
            labels = torch.arange(16) % 2 if step < 20 else torch.zeros(16, dtype=torch.long)
            loss(lines[labels].requires_grad_(), labels)
    assert not [each for each in caught if "collapsed" in str(each.message)]


def test_batches_nearly_all_of_one_class_do_not_warn():
    lines = torch.eye(64, dtype=torch.float32)[:10]
    loss = vmcr2.VMCR2Loss(10, 64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(300):
            mixed = torch.arange(100) % 10
            labels = mixed if step < 20 else torch.where(torch.arange(100) == 0, 0, torch.full_like(mixed, 9))
            z = lines[labels] + 0.05 * torch.randn(100, 64, generator=torch.Generator().manual_seed(step))
            loss(torch.nn.functional.normalize(z, dim=1).requires_grad_(), labels)
    assert not [each for each in caught if "collapsed" in str(each.message)]


def test_in_one_dimension_where_there_is_no_reduction_the_watch_is_silent():
    loss, labels = vmcr2.VMCR2Loss(2, 1), torch.arange(8) % 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(100):
            loss(torch.where(labels == 0, 1.0, -1.0)[:, None].requires_grad_(), labels)


def test_a_dip_that_comes_back_does_not_warn_and_one_that_stays_does():
    labels = torch.arange(40) % 4

    def said(low_until):
        loss = vmcr2.VMCR2Loss(4, 8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(300):
                z = unit_rows(40, 8, seed=1, dtype=torch.float32)
                if 20 <= step < low_until:  # ΔR is 0.14 of what it was
                    z = torch.nn.functional.normalize(torch.ones(1, 8) + z, dim=1)
                loss(z.requires_grad_(), labels)
        return any("collapsed" in str(each.message) for each in caught)

    assert not said(120)
    assert said(300)


@pytest.mark.parametrize("eps_sq", [1e-5, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_exact_losses_have_the_dtype_of_their_features_also_where_they_are_computed_in_float64(dtype, eps_sq):
    z, labels = unit_rows(20, 8).to(dtype), torch.arange(20) % 2
    for value in (vmcr2.MCR2Loss(2, eps_sq=eps_sq)(z, labels), vmcr2.TotalCodingRateLoss(eps_sq)(z)):
        assert value.dtype == torch.promote_types(dtype, torch.float32)


OTHER = {"mu": 0.3, "reduction": "sum", "step": "simultaneous", "pull": 0.7}


@pytest.mark.parametrize("name", sorted(SETTING_CHECKS.keys() - {"structure"}))
def test_ranks_compare_every_setting(name):
    loss = vmcr2.VMCR2Loss(3, 6, step="paper")
    before = loss._settings()
    setattr(loss, name, OTHER.get(name, 7.0))
    assert loss._settings() != before


def test_a_state_is_loaded_among_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        loss = vmcr2.VMCR2Loss(3, 6)
        loss.load_state_dict(loss.state_dict())


def test_reset_parameters_forgets_the_steps_too():
    z, labels = unit_rows(30, 6), random_labels(30, 3)
    loss = loss_at(z, labels, 3, 2)
    loss(z, labels)
    loss.dictionary.reset_parameters()
    assert_unchanged(loss, vmcr2.VMCR2Loss(3, 6, atoms_per_class=2).double().state_dict())


@pytest.mark.parametrize(("spread", "looks"), [(1.0, 10), (1e-3, 3)])
def test_a_collapse_is_warned_of_at_the_tenth_look_or_the_third_if_it_is_deep(spread, looks):
    watch, labels, z = CollapseWatch(), torch.arange(40) % 4, unit_rows(40, 8, seed=1)
    alike = torch.nn.functional.normalize(1 + spread * z, dim=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each in [z] + [alike] * (looks - 1) + [z] + [alike] * (looks - 1):  # only in a row
            watch.look(each, labels, 0.5, "")
    with pytest.warns(UserWarning, match="collapsed"):
        watch.look(alike, labels, 0.5, "")


def test_the_reduction_is_looked_at_in_the_first_step_and_every_twentieth_from_there():
    watch = CollapseWatch()
    assert [taken for taken in range(50) if watch.is_due(taken)] == [0, 20, 40]


def test_of_soft_rows_the_watch_takes_the_largest_entry():
    z, labels = unit_rows(40, 8, seed=1), torch.arange(40) % 4
    z[:, :4] += 3 * rows_of(labels, 4)
    z = torch.nn.functional.normalize(z, dim=1)
    hard, soft = CollapseWatch(), CollapseWatch()
    hard.look(z, labels, 0.5, "")
    soft.look(z, 0.8 * rows_of(labels, 4) + 0.05, 0.5, "")
    assert soft.best == hard.best
