"""Latching (Algorithm 2): streamed as in memory, on the features that training sees, leaving no trace in the model."""

import copy
import functools
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from conftest import (
    assert_unchanged,
    checked,
    generator,
    loss_at,
    normal,
    random_labels,
    random_membership,
    random_rows,
    rows_of,
    snapshot,
    unit_rows,
)
from torch import nn

import vmcr2
from vmcr2.lab.networks import Normalize
from vmcr2.latching import MomentStream, latched_blocks

normalize = nn.functional.normalize


def stream(k, d, z):
    return MomentStream(k, d, z.dtype, z.device)


@pytest.mark.parametrize("kind", ["balanced", "labels", "soft"])
@pytest.mark.parametrize(("m", "d"), [(40, 5), (12, 20)])
def test_latched_blocks_are_the_top_eigenvectors_and_values(kind, m, d):
    z, membership = unit_rows(m, d), random_membership(m, 3, kind)
    blocks, energies = latched_blocks(z, checked(z, membership, 3), 2)
    rows = rows_of(membership, 3)
    for j in range(3):
        if not rows[:, j].any():
            assert not blocks[j].any()
            continue
        moment = (z.T * rows[:, j]) @ z / rows[:, j].sum()
        torch.testing.assert_close(energies[j], torch.linalg.eigvalsh(moment)[-2:].flip(0))
        torch.testing.assert_close(moment @ blocks[j], blocks[j] * energies[j])


def test_a_class_of_low_rank_is_completed_to_orthonormal_directions_of_no_energy():
    z = torch.eye(6, dtype=torch.float64)[[0, 0, 1]]
    blocks, energies = latched_blocks(z, checked(z, torch.tensor([0, 0, 1]), 3), 4)
    for j in range(2):
        torch.testing.assert_close(blocks[j].T @ blocks[j], torch.eye(4, dtype=torch.float64))
        torch.testing.assert_close(energies[j], torch.tensor([1.0, 0, 0, 0], dtype=torch.float64), atol=1e-12, rtol=0)
    assert (blocks[2] == 0).all()


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("d", "sizes"), [(16, [1, 60, 2]), (12, [15, 9]), (20, [31, 17])])
def test_a_class_has_no_energy_beyond_its_samples(d, sizes, streamed):
    s, k = d // 2 + 4, len(sizes)
    labels = torch.repeat_interleave(torch.arange(k), torch.tensor(sizes))
    z = unit_rows(len(labels), d, dtype=torch.float32)
    if streamed:
        held = stream(k, d, z)
        held.add(z, checked(z, labels, k))
        held._fold()
        _, energies = held.blocks(s)
    else:
        _, energies = latched_blocks(z, checked(z, labels, k), s)
    assert (energies > 0).sum(1).tolist() == [min(s, n) for n in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("structure", ["shared", "block"])
def test_repeated_samples_leave_no_energy_beyond_their_rank(structure, dtype):
    """As `ClassBalancedBatchSampler` repeats the samples of small classes."""
    k, d, distinct = 10, 128, 5
    z, labels = unit_rows(k * distinct, d, dtype=dtype), torch.arange(k).repeat_interleave(distinct)
    loss = vmcr2.VMCR2Loss(k, d, structure=structure).to(dtype)
    loss.latch(z.repeat(3, 1), labels.repeat(3))
    assert ((loss.dictionary.codes > 0).sum(0) == distinct).all()
    if structure == "block":
        unseen = unit_rows(500, d, dtype=dtype)
        alone = vmcr2.NearestSubspaceClassifier().fit(z.double().numpy(), labels.numpy())
        assert (loss.nearest_class(unseen).numpy() == alone.predict(unseen.double().numpy())).all()


def test_a_decomposition_that_fails_is_a_numerical_error():
    z = torch.full((4, 3), torch.nan)
    with pytest.raises(vmcr2.NumericalError, match="latching failed"):
        latched_blocks(z, checked(torch.ones(4, 3), torch.zeros(4, dtype=torch.long), 1), 2)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("m", [20, 400])  # with more than k d samples the stream folds them into second moments
def test_streamed_latching_equals_latching_in_memory(soft, m):
    z = unit_rows(m, 6)
    membership = random_rows(m, 3) if soft else random_labels(m, 3)
    loss = vmcr2.VMCR2Loss(3, 6, atoms_per_class=2).double()
    loss.latch_from(nn.Identity(), zip(z.split(7), membership.split(7), strict=True))
    expected = loss_at(z, membership, 3, 2)
    torch.testing.assert_close(loss.dictionary.codes, expected.dictionary.codes)
    overlap = (loss.dictionary.atoms * expected.dictionary.atoms).sum(0).abs()
    torch.testing.assert_close(overlap, torch.ones_like(overlap))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("m", [100, 400])  # with more than k d samples the stream folds them into second moments
def test_a_stream_may_lack_a_class_in_one_batch_but_for_entries_of_no_account(m, sharded):
    k, d = 20, 10
    labels = torch.arange(m) % k
    labels = labels[torch.argsort((labels == 7).int(), stable=True)]  # class 7 comes last
    z, membership = unit_rows(m, d, dtype=torch.float32), rows_of(labels, k).float()
    membership[: m // 2 : 5, 7] = 1e-20  # as a confident softmax leaves them
    loss = vmcr2.VMCR2Loss(k, d, atoms_per_class=2, structure="block", sharded=sharded)
    loss.latch_from(nn.Identity(), zip(z.split(m // 2), membership.split(m // 2), strict=True))
    expected = loss_at(z, membership, k, 2, structure="block")
    torch.testing.assert_close(loss.dictionary.codes.cpu(), expected.dictionary.codes, rtol=1e-5, atol=1e-6)


def test_a_stream_may_hold_entries_that_vanish_in_the_dictionarys_dtype():
    z, labels = unit_rows(80, 8), torch.arange(80) % 16
    rows = rows_of(labels, 16)
    rows[3:6, 2] = 1e-60
    loss = vmcr2.VMCR2Loss(16, 8, atoms_per_class=2, structure="block")
    loss.latch_from(nn.Identity(), [(z, rows)])
    expected = loss_at(z.float(), labels, 16, 2, structure="block")
    torch.testing.assert_close(loss.dictionary.codes, expected.dictionary.codes)


def test_latching_does_not_follow_a_default_device():
    z, labels = unit_rows(40, 6), random_labels(40, 3)
    loss, expected = vmcr2.VMCR2Loss(3, 6).double(), loss_at(z, labels, 3, 2)
    batches = [(z, labels), (z[:9], rows_of(labels[:9], 3))]
    with torch.device("meta"):  # any but the tensors' own
        loss.latch_from(nn.Identity(), batches[:1])
        torch.testing.assert_close(loss.dictionary.codes, expected.dictionary.codes)
        loss.latch_from(nn.Identity(), batches)


def test_labels_and_soft_rows_may_come_in_one_stream():
    z, labels = unit_rows(30, 6), random_labels(30, 3)
    loss = vmcr2.VMCR2Loss(3, 6, atoms_per_class=2).double()
    loss.latch_from(nn.Identity(), [(z[:10], labels[:10]), (z[10:], rows_of(labels[10:], 3))])
    torch.testing.assert_close(loss.dictionary.codes, loss_at(z, labels, 3, 2).dictionary.codes)


def test_the_stream_forgets_the_rows_it_has_folded():
    moments = stream(2, 3, unit_rows(1, 3))
    for seed in range(50):
        z, labels = unit_rows(10, 3, seed=seed), random_labels(10, 2, seed=seed)
        moments.add(z, checked(z, labels, 2))
        assert moments.kept <= 6
    _, energies = moments.blocks(3)
    assert moments.counts.sum() == 500
    torch.testing.assert_close(energies.sum(1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_stream_of_soft_rows_is_folded_before_they_outgrow_the_moments(sharded, monkeypatch):
    k, d, most = 40, 4, 0
    keep = MomentStream._keep

    def kept(self, features, rows_or_labels, sizes):
        nonlocal most
        keep(self, features, rows_or_labels, sizes)
        most = max(most, sum(each.numel() for each in (*self.features, *self.memberships)))

    monkeypatch.setattr(MomentStream, "_keep", kept)
    z, rows = unit_rows(400, d), random_rows(400, k)
    loss = vmcr2.VMCR2Loss(k, d, atoms_per_class=1, structure="block", sharded=sharded).double()
    loss.latch_from(nn.Identity(), zip(z.split(5), rows.split(5), strict=True))
    assert k * d**2 < most <= k * d**2 + 5 * (k + d)
    torch.testing.assert_close(loss.dictionary.codes, loss_at(z, rows, k, 1, structure="block").dictionary.codes)


def test_latching_under_autocast_keeps_float32():
    z, labels = unit_rows(400, 6, dtype=torch.float32), random_labels(400, 3)
    batches = list(zip(z.split(50), labels.split(50), strict=True))
    losses = [vmcr2.VMCR2Loss(3, 6, atoms_per_class=2) for _ in range(2)]
    losses[0].latch_from(nn.Identity(), batches)
    with torch.autocast("cpu", torch.bfloat16):
        losses[1].latch_from(nn.Identity(), batches)
    torch.testing.assert_close(losses[1].dictionary.codes, losses[0].dictionary.codes)


class Noisy(nn.Module):
    """BatchNorm, and dropout as a module and as a function, so that modes matter."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)

    def forward(self, inputs):
        return self.embed(inputs)

    def embed(self, inputs):
        z = self.drop(self.norm(inputs))
        return normalize(nn.functional.dropout(z, 0.5, self.training), dim=1)


def on_batch_statistics(inputs):
    return normalize((inputs - inputs.mean(0)) / (inputs.var(0, unbiased=False) + 1e-5).sqrt(), dim=1)


def on_running_statistics(inputs, norm):
    return normalize((inputs - norm.running_mean) / (norm.running_var + norm.eps).sqrt(), dim=1)


def fresh(momentum=0.1):
    torch.manual_seed(0)
    model = Noisy().double()
    model.norm.momentum = momentum
    model.norm.running_mean.uniform_(-1, 1)  # eval mode would show another network
    model.norm.running_var.uniform_(1, 9)
    return model


INPUTS, LABELS = normal(40, 6) + 1, random_labels(40, 3)

WRAPPED = {
    "module": lambda model: model,
    "lambda": lambda model: lambda x: model(x),
    "partial": lambda model: functools.partial(model),
    "partial of a function": lambda model: functools.partial(lambda net, x: net(x), model),
    "bound __call__": lambda model: model.__call__,
    "bound method": lambda model: model.embed,
    "partial of a bound method": lambda model: functools.partial(model.embed),
    "forward": lambda model: model.forward,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled function": lambda model: torch.compile(lambda x: model(x), backend="eager"),
    "sequential": lambda model: nn.Sequential(nn.Identity(), model).train(model.training),
    "inner module of a function": lambda model: lambda x: nn.Sequential(model).train(model.training)(x),
}


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("training", [True, False])
def test_latch_from_sees_batch_statistics_without_noise_and_leaves_no_trace(wrapped, training):
    model = fresh().train(training)
    before = copy.deepcopy(model)
    loss = vmcr2.VMCR2Loss(3, 6, atoms_per_class=2).double()
    loss.latch_from(WRAPPED[wrapped](model), [(INPUTS, LABELS)])
    assert_unchanged(model, before.state_dict())
    assert [module.training for module in model.modules()] == [training] * 3
    expected = loss_at(on_batch_statistics(INPUTS), LABELS, 3, 2)
    torch.testing.assert_close(loss.dictionary.codes, expected.dictionary.codes)
    # And the model works as before: running statistics in eval mode, and they move in training.
    torch.testing.assert_close(model.eval()(INPUTS), before.eval()(INPUTS))
    model.train()(INPUTS)
    assert not torch.equal(model.norm.running_mean, before.norm.running_mean)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_momentum_of_running_statistics_plays_no_part(momentum):
    model = fresh(momentum)
    before = snapshot(model)
    loss = vmcr2.VMCR2Loss(3, 6, atoms_per_class=2).double()
    loss.latch_from(model, [(INPUTS, LABELS)])
    assert model.norm.momentum == momentum
    assert_unchanged(model, before)
    expected = loss_at(on_batch_statistics(INPUTS), LABELS, 3, 2)
    torch.testing.assert_close(loss.dictionary.codes, expected.dictionary.codes)


@pytest.mark.parametrize("wrapped", ["module", "lambda", "partial", "bound method", "compiled"])
def test_a_frozen_batchnorm_inside_of_a_training_model_stays_frozen(wrapped):
    model = fresh()
    model.norm.eval()
    loss = vmcr2.VMCR2Loss(3, 6, atoms_per_class=2).double()
    loss.latch_from(WRAPPED[wrapped](model), [(INPUTS, LABELS)])
    expected = loss_at(on_running_statistics(INPUTS, model.norm), LABELS, 3, 2)
    torch.testing.assert_close(loss.dictionary.codes, expected.dictionary.codes)
    assert not model.norm.training
    assert model.drop.training


def test_a_lazy_norm_layer_takes_its_shapes_and_works_on():
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d())
    inputs, labels = normal(40, 5).float(), torch.arange(40) % 2
    model.append(Normalize())
    vmcr2.VMCR2Loss(2, 8).latch_from(model, [(inputs, labels)])
    assert (model[1].running_mean == 0).all()
    assert model(inputs).isfinite().all()


@pytest.mark.parametrize("order", ["frozen first", "frozen last"])
def test_a_frozen_backbone_beside_a_training_head_stays_frozen(order):
    """Two modules in one function: the frozen one is in eval mode as a whole, the other is being trained."""
    frozen, head = fresh().eval(), nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).double()

    def model(inputs):
        return normalize(head(frozen(inputs)) if order == "frozen first" else frozen(head(inputs)), dim=1)

    loss = vmcr2.VMCR2Loss(3, 6, atoms_per_class=2).double()
    loss.latch_from(model, [(INPUTS, LABELS)])
    with torch.no_grad():
        expected = loss_at(model(INPUTS), LABELS, 3, 2)  # as training would see it; neither has noise
    torch.testing.assert_close(loss.dictionary.codes, expected.dictionary.codes)


@pytest.mark.parametrize("training", [True, False])
def test_instance_norm_that_tracks_running_statistics_uses_those_of_the_instance(training):
    norm = nn.InstanceNorm1d(2, track_running_stats=True).double()
    norm.running_mean += 5.0
    model = nn.Sequential(nn.Unflatten(1, (2, 3)), norm, nn.Flatten()).train(training)
    before = snapshot(model)

    def run(inputs):
        return normalize(model(inputs), dim=1)

    loss = vmcr2.VMCR2Loss(3, 6, atoms_per_class=2).double()
    loss.latch_from(run, [(INPUTS, LABELS)])
    assert_unchanged(model, before)
    per_instance = nn.functional.instance_norm(INPUTS.unflatten(1, (2, 3))).flatten(1)
    expected = loss_at(normalize(per_instance, dim=1), LABELS, 3, 2)
    torch.testing.assert_close(loss.dictionary.codes, expected.dictionary.codes)


@pytest.mark.parametrize("wrapped", ["module", "lambda"])
def test_a_batch_with_nan_is_an_error_and_leaves_statistics_and_dictionary_alone(wrapped):
    model = fresh()
    spoilt = INPUTS.clone()
    spoilt[3, 2] = torch.nan
    loss = loss_at(on_batch_statistics(INPUTS), LABELS, 3, 2)
    before = snapshot(model), snapshot(loss)
    with pytest.raises(vmcr2.InputError, match="features must be finite"):
        loss.latch_from(WRAPPED[wrapped](model), [(INPUTS, LABELS), (spoilt, LABELS)])
    assert_unchanged(model, before[0])
    assert_unchanged(loss, before[1])
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("wrapped", ["module", "lambda"])
def test_the_model_is_as_it_was_after_it_has_failed_itself(wrapped):
    class Failing(Noisy):
        def embed(self, inputs):
            super().embed(inputs)
            raise KeyError("no such thing")

    model = Failing().double()
    before = snapshot(model)
    with pytest.raises(KeyError):
        vmcr2.VMCR2Loss(3, 6).double().latch_from(WRAPPED[wrapped](model), [(INPUTS, LABELS)])
    assert_unchanged(model, before)
    assert all(module.training for module in model.modules())
    assert model.norm.running_mean is not None


def noting(modes):
    """Returns a network that notes in which modes it runs, and whether with running statistics."""
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    network.register_forward_pre_hook(
        lambda *_: modes.append((network[1].training, network[1].running_mean is not None, network[2].training))
    )
    return network


@pytest.mark.parametrize("alone", [False, True])
def test_modules_that_another_thread_trains_are_left_alone(alone):
    modes, model = [], nn.Linear(4, 4)
    other = noting(modes)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # which starts its thread

        def embed(inputs):
            trained = pool.submit(other, inputs).result()
            return normalize(8 + (trained if alone else model(inputs)), dim=1)  # dropout may leave zeros

        with pytest.warns(UserWarning, match="no module ran in this thread") if alone else nullcontext():
            vmcr2.VMCR2Loss(2, 4).latch_from(embed, [(torch.randn(8, 4), torch.arange(8) % 2)] * 2)
    assert modes == [(True, True, True)] * 3  # the first batch runs twice
    assert other[1].num_batches_tracked == 3


def test_a_function_may_run_the_model_in_threads_that_it_starts():
    modes = []
    model = noting(modes)

    def embed(inputs):
        with ThreadPoolExecutor(2) as pool:
            return normalize(torch.cat(list(pool.map(model, inputs.chunk(2)))), dim=1)

    vmcr2.VMCR2Loss(2, 4).latch_from(embed, [(torch.randn(8, 4), torch.arange(8) % 2)] * 2)
    assert modes[:2] == [(False, True, False)] * 2  # to find the modules
    assert modes[2:] == [(False, False, False)] * 4
    assert model[1].num_batches_tracked == 0


def test_latch_from_needs_a_batch():
    with pytest.raises(vmcr2.InputError, match="batches must give at least one pair"):
        vmcr2.VMCR2Loss(3, 6).latch_from(nn.Identity(), [])


WRONG_BATCHES = {
    r"got membership of type ndarray": [(INPUTS, LABELS.numpy())],
    r"got membership of type list": [(INPUTS, LABELS.tolist())],
    r"got membership on the meta device": [(INPUTS, LABELS.to("meta"))],
    r"got inputs of type dict; several may come as one object with a method `to`": [({"pixel_values": INPUTS}, LABELS)],
    r"got inputs of type ndarray": [(INPUTS.numpy(), LABELS)],
    r"got inputs of type NoneType": [(None, LABELS)],
    r"batches must be pairs \(inputs, membership\), got int": 3,
    r"batches must be pairs \(inputs, membership\), got NoneType": None,
}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("message", WRONG_BATCHES)
def test_latch_from_says_what_is_wrong_with_a_batch(message, sharded):
    loss = vmcr2.VMCR2Loss(3, 6, atoms_per_class=2, structure="block", sharded=sharded).double()
    before = snapshot(loss)
    with pytest.raises(vmcr2.InputError, match=message):
        loss.latch_from(fresh(), WRONG_BATCHES[message])
    assert_unchanged(loss, before)


@pytest.mark.parametrize("model", [None, 3])
def test_latch_from_needs_a_model(model):
    with pytest.raises(vmcr2.InputError, match=f"model must be a Module or a function, got {type(model).__name__}"):
        vmcr2.VMCR2Loss(3, 6).double().latch_from(model, [(INPUTS, LABELS)])


def test_a_stream_that_does_not_end_is_checked_batch_by_batch():
    def stream():
        while True:
            yield INPUTS, LABELS
            yield INPUTS, LABELS.tolist()

    with pytest.raises(vmcr2.InputError, match="got membership of type list"):
        vmcr2.VMCR2Loss(3, 6).double().latch_from(fresh(), stream())


def test_absent_classes_keep_what_they_had():
    z, labels = unit_rows(40, 8), random_labels(40, 4)
    for again in ("latch", "latch_from"):
        loss = loss_at(z, labels, 4, 2)
        kept = loss.dictionary.atoms[:, 6:].clone(), loss.dictionary.codes[:, 3].clone()
        batch = unit_rows(40, 8, seed=9)[labels < 3], labels[labels < 3]
        if again == "latch":
            loss.latch(*batch)
        else:
            loss.latch_from(nn.Identity(), [batch])
        assert torch.equal(loss.dictionary.atoms[:, 6:], kept[0])
        assert torch.equal(loss.dictionary.codes[:, 3], kept[1])


def test_a_class_is_latched_the_first_time_training_sees_it():
    z, labels = unit_rows(30, 8), random_labels(30, 2)
    loss = vmcr2.VMCR2Loss(3, 8, atoms_per_class=2, step="paper", step_atoms=1e-12, step_codes=1e-12).double()
    assert float(loss(z, labels)) > 0
    assert loss.dictionary.latched.tolist() == [True, True, False]
    untouched = loss.dictionary.codes[:, :2].clone()
    loss(z, torch.full((30,), 2))
    assert loss.dictionary.latched.all()
    own = torch.linalg.eigvalsh(z.T @ z / 30)[-2:].flip(0)
    torch.testing.assert_close(loss.dictionary.codes[4:6, 2], own)
    torch.testing.assert_close(loss.dictionary.codes[:, :2], untouched)


def test_shuffled_batches_give_the_same_dictionary():
    z, labels = unit_rows(60, 6), random_labels(60, 3)
    order = torch.randperm(60, generator=generator())
    codes = []
    for features, membership in ((z, labels), (z[order], labels[order])):
        loss = vmcr2.VMCR2Loss(3, 6, atoms_per_class=2).double()
        loss.latch_from(nn.Identity(), zip(features.split(13), membership.split(13), strict=True))
        codes.append(loss.dictionary.codes)
    torch.testing.assert_close(*codes)


def test_inputs_may_be_any_object_that_moves_and_that_the_model_takes():
    class Both(dict):
        def to(self, device):
            return Both({name: tensor.to(device) for name, tensor in self.items()})

    z, labels = unit_rows(20, 4), torch.arange(20) % 2
    several, single = (vmcr2.VMCR2Loss(2, 4).double() for _ in range(2))
    several.latch_from(lambda both: both["left"] + both["right"], [(Both(left=z / 4, right=0.75 * z), labels)])
    single.latch_from(torch.nn.Identity(), [(z, labels)])
    torch.testing.assert_close(several.state_dict(), single.state_dict())


def test_a_function_that_calls_a_compiled_module():
    """As README's loop has it, before and after the module was compiled by a training step."""
    z, labels = unit_rows(40, 8).float(), torch.arange(40) % 4
    plain = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16))
    model = torch.compile(plain, backend="eager")
    losses = [vmcr2.VMCR2Loss(4, 16, atoms_per_class=2) for _ in range(3)]
    losses[0].latch_from(lambda x: torch.nn.functional.normalize(model(x), dim=1), [(z, labels)])
    losses[1].latch_from(lambda x: torch.nn.functional.normalize(plain(x), dim=1), [(z, labels)])
    model(z)
    plain[1].reset_running_stats()
    losses[2].latch_from(lambda x: torch.nn.functional.normalize(model(x), dim=1), [(z, labels)])
    for loss in losses[1:]:
        torch.testing.assert_close(loss.dictionary.codes, losses[0].dictionary.codes)


def test_modes_are_restored_where_the_function_compiles_a_module_itself():
    z, labels = unit_rows(40, 8).float(), torch.arange(40) % 4
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16)).train()
    vmcr2.VMCR2Loss(4, 16).latch_from(
        lambda x: torch.nn.functional.normalize(torch.compile(net, backend="eager")(x), dim=1), [(z, labels)]
    )
    assert all(module.training for module in net.modules())


def test_a_last_batch_of_one_sample_is_named():
    z, labels = unit_rows(21, 8).float(), torch.arange(21) % 4
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16)).eval()
    with pytest.raises(vmcr2.InputError, match="batches must have at least 2 samples each.*drop_last=True"):
        vmcr2.VMCR2Loss(4, 16).latch_from(
            lambda x: torch.nn.functional.normalize(model(x), dim=1), zip(z.split(10), labels.split(10), strict=True)
        )


def test_a_lazy_norm_layer_without_weights_takes_its_shapes_too():
    model = nn.Sequential(nn.Linear(5, 8), nn.LazyBatchNorm1d(affine=False), Normalize())
    inputs, labels = normal(40, 5).float(), torch.arange(40) % 2
    vmcr2.VMCR2Loss(2, 8).latch_from(model, [(inputs, labels)])
    assert (model[1].running_mean == 0).all()
    assert model(inputs).isfinite().all()
