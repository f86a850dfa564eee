"""A dictionary sharded by class gives what the unsharded one gives, on any number of ranks; its state moves between."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import LargestTensor, random_labels, random_rows, unit_rows
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

import vmcr2
from vmcr2.distributed import Shards

K, D, S, M = 5, 8, 2, 33
WORLDS = [1, 2, 3, 4]  # of 5 classes they hold 5; 3, 2; 2, 2, 1; 2, 2, 1 and none
SHARES = {1: [33], 2: [20, 13], 3: [5, 27, 1], 4: [16, 2, 12, 3]}


def share_of(rank, world):
    start = sum(SHARES[world][:rank])
    return slice(start, start + SHARES[world][rank])


def network():
    torch.manual_seed(0)
    return torch.nn.Linear(6, D).double()


def batch(kind, seed=0):
    """Returns inputs and a membership in which class 3 has no sample; a first batch lacks class 1 as well."""
    inputs, labels = unit_rows(M, 6, seed=seed), random_labels(M, K - 1, seed=seed)
    labels = torch.where(labels == 3, K - 1, labels)
    if kind == "soft":
        rows = random_rows(M, K, seed=seed)
        rows[:, 3] = 0
        return inputs, rows / rows.sum(1, keepdim=True)
    return inputs, torch.where(labels == 1, 0, labels) if seed == 0 else labels


def loss_of(*, sharded=False, **settings):
    loss = vmcr2.VMCR2Loss(K, D, atoms_per_class=S, structure="block", sharded=sharded, **settings)
    return loss.double()


def models_of(state):
    """Returns Γ Diag(Ã_j) Γᵀ of every class: what of a dictionary does not depend on the sign of an atom."""
    blocks = state["dictionary.atoms"].T.reshape(K, S, D)
    return torch.einsum("ksd,ks,kse->kde", blocks, state["dictionary.codes"].T, blocks)


def everything(loss):
    state = loss.full_state_dict()
    names = ("dictionary.codes", "dictionary.latched", "dictionary.steps")
    return [models_of(state), *(state[name].clone() for name in names)]


def train(model, loss, kind, share, latch):
    """Latches, steps, evaluates, predicts; returns all that must not depend on the number of ranks."""
    results = []
    if latch == "in memory":
        inputs, membership = (each[share] for each in batch(kind, 1))
        loss.latch(normalize(model(inputs).detach(), dim=1), membership)
    elif latch == "streamed":
        inputs, membership = (each[share] for each in batch(kind, 1))
        pairs = list(zip(inputs.split(4), membership.split(4), strict=True))
        loss.latch_from(lambda x: normalize(model(x), dim=1), pairs[: 0 if share.start else None])
    results += everything(loss)
    for seed in range(3):
        inputs, membership = (each[share] for each in batch(kind, seed))
        membership = membership.clone().requires_grad_(kind == "soft")
        model.zero_grad()
        value = loss(normalize(model(inputs), dim=1), membership)
        value.backward()
        results += [value.detach(), *(p.grad.clone() for p in model.parameters()), *everything(loss)]
    inputs, membership = (each[share] for each in batch(kind))
    z = normalize(model(inputs), dim=1)
    results += list(loss.rates(z.detach(), membership))
    loss.eval()
    model.zero_grad()
    value = loss(z, membership)
    value.backward()
    return [*results, value.detach(), *(p.grad.clone() for p in model.parameters())]


def trained(rank, world, kind, latch, settings):
    model, loss = DistributedDataParallel(network()), loss_of(sharded=True, **settings)
    return train(model, loss, kind, share_of(rank, world), latch)


def assert_each(results, expected):
    for got in results:
        assert len(got) == len(expected)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    ("kind", "latch", "settings"),
    [
        ("labels", "in memory", {}),
        ("labels", "by the first batches", {"energy": 1.0, "reduction": "sum"}),
        ("labels", "in memory", {"step": "paper"}),
        ("labels", "in memory", {"pull": 0.3, "expand": 0.5}),
        ("soft", "in memory", {}),
    ],
)
def test_a_sharded_dictionary_equals_the_unsharded_one(ranks, world, kind, latch, settings):
    expected = train(network(), loss_of(**settings), kind, slice(0, M), latch)
    assert_each(ranks(world, trained, world, kind, latch, settings), expected)


@pytest.mark.parametrize("world", WORLDS)
def test_a_sharded_dictionary_is_latched_from_streams_of_unequal_length(ranks, world):
    first = slice(0, SHARES[world][0])  # the other ranks have no batch
    expected = loss_of()
    model = network()
    inputs, labels = (each[first] for each in batch("labels", 1))
    expected.latch_from(lambda x: normalize(model(x), dim=1), [(inputs, labels)])
    for got in ranks(world, trained, world, "labels", "streamed", {}):
        for ours, theirs in zip(got[:4], everything(expected), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_one_process_without_torch_distributed_holds_all_classes():
    expected = train(network(), loss_of(), "labels", slice(0, M), "in memory")
    loss = loss_of(sharded=True)
    assert_each([train(network(), loss, "labels", slice(0, M), "in memory")], expected)
    other = loss_of()
    other.load_state_dict(loss.state_dict())
    torch.testing.assert_close(other.dictionary.atoms, loss.dictionary.atoms)
    assert "sharded=True" in repr(copy.deepcopy(loss))


def kept_and_restored(*_):
    """Returns a sharded loss's `full_state_dict` before and after a step, and the copy it should still equal."""
    loss = vmcr2.VMCR2Loss(K, D, atoms_per_class=1, structure="block", sharded=True)
    z, labels = unit_rows(2 * K, D, dtype=torch.float32), torch.arange(2 * K) % K
    loss.latch(z[labels < 2], labels[labels < 2])
    state = loss.full_state_dict()
    then = copy.deepcopy(state)
    loss(z, labels)
    return all(torch.equal(state[name], value) for name, value in then.items())


def test_a_full_state_is_of_one_moment(ranks):
    assert kept_and_restored()
    assert all(ranks(1, kept_and_restored) + ranks(2, kept_and_restored))


def held(rank, world):
    """The ranges are torch.chunk's and DTensor's, and buffers have no more than a rank's classes."""
    loss = loss_of(sharded=True)
    state = loss.state_dict()
    chunks = torch.arange(K).chunk(world)
    own = chunks[rank].tolist() if rank < len(chunks) else []
    assert list(Shards(K).own) == own
    assert loss.dictionary.atoms.shape == (D, len(own) * S)
    assert loss.dictionary.codes.shape == (S, len(own))
    for name, shape in (("atoms", (K, S, D)), ("codes", (K, S)), ("latched", (K,))):
        value = state[f"dictionary.{name}"]
        assert value.shape == shape
        assert value.to_local().shape == (len(own), *shape[1:])
        by_torch = dist.tensor.distribute_tensor(torch.zeros(shape), value.device_mesh, [dist.tensor.Shard(0)])
        assert by_torch.to_local().shape == (len(own), *shape[1:])
        assert value.to_local().untyped_storage().data_ptr() == getattr(loss.dictionary, name).data_ptr() or not own


@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_holds_its_chunk_of_the_classes_and_shows_it_as_a_dtensor_without_a_copy(ranks, world):
    ranks(world, held, world)


def largest_of_a_step(rank):
    """Returns the entries of the largest tensor that latching by a batch, a step and an evaluation make."""
    k = 40_000
    loss = vmcr2.VMCR2Loss(k, D, atoms_per_class=1, structure="block", sharded=True)
    z, labels = unit_rows(16, D, dtype=torch.float32).requires_grad_(), torch.arange(rank, k, k // 16)[:16]
    with LargestTensor() as largest:
        for _ in range(2):
            loss(z, labels).backward()
        loss.rates(z.detach(), labels)
    return largest.numel, largest.shape


def test_a_step_makes_nothing_of_more_entries_than_a_rank_has_classes(ranks):
    for numel, shape in ranks(2, largest_of_a_step):
        assert numel <= 20_000, shape


def states(state):
    return {name: value.clone() for name, value in state.items()}


def saved(rank, folder):
    loss = loss_of(sharded=True)
    loss.load_state_dict(a_loss_state())
    dcp.save({"loss": loss.state_dict()}, checkpoint_id=folder)


def loaded(rank, folder):
    loss = loss_of(sharded=True)
    state = {"loss": loss.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    loss.load_state_dict(state["loss"])
    return states(loss.full_state_dict()), loss.dictionary.steps_taken


def a_loss_state():
    """Returns the state of an unsharded loss, which is latched without its ranks meeting."""
    from conftest import checked

    from vmcr2.latching import latched_blocks

    z, labels = unit_rows(40, D, seed=3), torch.arange(40) % K
    loss = loss_of()
    loss.dictionary.latch(*latched_blocks(z, checked(z, labels, K), S), torch.arange(K) != 3)
    loss.dictionary.steps_taken = 7
    return loss.state_dict()


def assert_state(state, expected):
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
        assert type(state[name]) is torch.Tensor


@pytest.mark.parametrize("world", WORLDS)
def test_a_checkpoint_of_some_ranks_is_loaded_by_any_other_number(ranks, world, tmp_path):
    expected = a_loss_state()
    ranks(world, saved, str(tmp_path / "checkpoint"))
    for other in WORLDS:
        for state, steps in ranks(other, loaded, str(tmp_path / "checkpoint")):
            assert_state(state, expected)
            assert steps == 7
    loss = loss_of(sharded=True)  # one process without torch.distributed
    state = {"loss": loss.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    loss.load_state_dict(state["loss"])
    assert_state(loss.full_state_dict(), expected)
    unsharded = loss_of()
    unsharded.load_state_dict(loss.full_state_dict())
    assert_state(unsharded.state_dict(), expected)


def moved_between(rank, world):
    """Unsharded into sharded, sharded into unsharded, sharded into sharded, and the whole into one machine's loss."""
    sharded, again, unsharded, other = loss_of(sharded=True), loss_of(sharded=True), loss_of(), loss_of()
    sharded.load_state_dict(a_loss_state())
    again.load_state_dict(sharded.state_dict())
    unsharded.load_state_dict(again.state_dict())
    other.load_state_dict(again.full_state_dict())
    for wrong_sharded in (False, True):
        wrong = vmcr2.VMCR2Loss(K + 3, D, atoms_per_class=S, structure="block", sharded=wrong_sharded)
        with pytest.raises(RuntimeError, match="size mismatch"):
            loss_of(sharded=True).load_state_dict(wrong.state_dict())
    return [states(each.full_state_dict()) for each in (sharded, again, unsharded, other)]


@pytest.mark.parametrize("world", WORLDS)
def test_sharded_and_unsharded_losses_load_each_others_state(ranks, world):
    for found in ranks(world, moved_between, world):
        for state in found:
            assert_state(state, a_loss_state())


def loaded_from_one_rank(rank, world, folder):
    """A state written by torch.save on the first rank alone holds that rank's classes, and is refused by the others."""
    loss, path = loss_of(sharded=True), f"{folder}/{world}.pt"
    loss.load_state_dict(a_loss_state())
    if rank == 0:
        torch.save(loss.state_dict(), path)
    torch.distributed.barrier()
    if rank == 0:
        loss.load_state_dict(torch.load(path, weights_only=False))
        return ""
    said = []
    for other in (loss, loss_of()):
        before = states(other.state_dict())
        with pytest.raises(RuntimeError) as caught:
            other.load_state_dict(torch.load(path, weights_only=False))
        said.append(str(caught.value))
        for name, value in before.items():
            now = other.state_dict()[name]
            assert torch.equal(*(each.to_local() if hasattr(each, "to_local") else each for each in (now, value)))
    return said


@pytest.mark.parametrize("world", [2, 3])
def test_a_state_of_one_rank_alone_is_refused_by_the_others(ranks, world, tmp_path):
    told = ranks(world, loaded_from_one_rank, world, str(tmp_path))
    for said in told[1:]:
        for each in said:
            assert f"dictionary.atoms is only the part of rank 0 among {world} processes: save with" in each
    with pytest.raises(RuntimeError, match="is only the part of rank 0 among"):
        loss_of().load_state_dict(torch.load(tmp_path / f"{world}.pt", weights_only=False))


def saved_alone(rank, folder):
    """States of one process with a group, which hold the whole, and of a group that other processes do not have."""
    groups = [torch.distributed.new_group([0]), torch.distributed.new_group([0, 1])]
    if rank == 0:
        for name, group in zip(("alone", "group"), groups, strict=True):
            loss = loss_of(sharded=True, process_group=group)
            if name == "alone":
                loss.load_state_dict(a_loss_state())
            torch.save(loss.state_dict(), f"{folder}/{name}.pt")


def test_a_state_of_a_single_process_is_whole_wherever_it_is_loaded(ranks, tmp_path):
    ranks(2, saved_alone, str(tmp_path))
    for loss in (loss_of(), loss_of(sharded=True)):
        loss.load_state_dict(torch.load(tmp_path / "alone.pt", weights_only=False))
        assert_state(loss.full_state_dict(), a_loss_state())
    ranks(2, loads_of_another_group, str(tmp_path))


def loads_of_another_group(rank, folder):
    loss = loss_of(sharded=True)
    loss.load_state_dict(torch.load(f"{folder}/alone.pt", weights_only=False))
    assert_state(loss.full_state_dict(), a_loss_state())
    with pytest.raises(RuntimeError, match="is only the part of rank 0 among 2 processes"):
        loss.load_state_dict(torch.load(f"{folder}/group.pt", weights_only=False))


def got_and_set(rank):
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    states = []
    for sharded in (False, True):
        for within in (lambda loss: loss, lambda loss: torch.nn.ModuleDict({"loss": loss})):
            loss, other = loss_of(sharded=sharded), loss_of(sharded=sharded)
            loss.load_state_dict(a_loss_state())
            set_model_state_dict(within(other), get_model_state_dict(within(loss)))
            states.append(other.full_state_dict())
    return states


@pytest.mark.parametrize("world", [1, 2])
def test_torchs_own_functions_get_and_set_the_state(ranks, world):
    for found in ranks(world, got_and_set):
        for state in found:
            assert_state(state, a_loss_state())


def predicted(rank, world):
    loss = loss_of(sharded=True)
    loss.load_state_dict(a_loss_state())
    z = unit_rows(M, D, seed=9)
    none = loss.nearest_class(z[:0] if rank else z[:3])
    return loss.nearest_class(z[share_of(rank, world)]), none


@pytest.mark.parametrize("world", WORLDS)
def test_predictions_by_shards_are_those_of_the_classes_subspaces(ranks, world):
    z, labels = unit_rows(40, D, seed=3), torch.arange(40) % K
    there = labels != 3  # class 3 was not latched
    classifier = vmcr2.NearestSubspaceClassifier(S).fit(z[there].numpy(), labels[there].numpy())
    expected = torch.from_numpy(classifier.predict(unit_rows(M, D, seed=9).numpy()))
    found = ranks(world, predicted, world)
    assert torch.equal(torch.cat([each for each, _ in found]), expected)
    assert torch.equal(torch.cat([none for _, none in found]), expected[:3])
    loss = loss_of()
    loss.load_state_dict(a_loss_state())
    assert torch.equal(loss.nearest_class(unit_rows(M, D, seed=9)), expected)


def test_prediction_needs_atoms_of_each_class_and_a_latch():
    with pytest.raises(vmcr2.InputError, match="nearest_class requires structure='block'"):
        vmcr2.VMCR2Loss(K, D).nearest_class(unit_rows(3, D).float())
    for sharded in (False, True):
        with pytest.raises(vmcr2.NotLatchedError):
            loss_of(sharded=sharded).nearest_class(unit_rows(3, D))
        with pytest.raises(vmcr2.InputError, match="feature_dim"):
            loss_of(sharded=sharded).nearest_class(unit_rows(3, D + 1))


def spoilt(rank):
    loss = loss_of(sharded=True)
    loss.load_state_dict(a_loss_state())
    if rank == 1:
        loss.dictionary.codes[0, 0] = torch.nan
    said = []
    for call in (
        lambda: loss.nearest_class(unit_rows(6, D)),
        lambda: loss.eval()(unit_rows(6, D), torch.arange(6) % K),
    ):
        with pytest.raises((vmcr2.NumericalError, vmcr2.InputError)) as caught:
            call()
        said.append(str(caught.value))
    return said


def test_a_dictionary_with_nan_on_one_rank_is_an_error_on_all(ranks):
    (first, both), (second, again) = ranks(2, spoilt)
    assert first.startswith("the call failed on rank 1")
    assert second.startswith("the dictionary holds NaN")
    assert both == again == second


def test_a_sharded_latch_refuses_what_it_cannot_part():
    with pytest.raises(vmcr2.InputError, match="features must be a dense torch.Tensor"):
        loss_of(sharded=True).latch(unit_rows(6, D).to_sparse(), torch.arange(6) % K)


def test_sharded_takes_block_structure():
    with pytest.raises(vmcr2.InputError, match="sharded requires structure='block'"):
        vmcr2.VMCR2Loss(K, D, sharded=True)


def made_before(rank, folder):
    dist.destroy_process_group()
    loss = loss_of(sharded=True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=2)
    with pytest.raises(vmcr2.InputError, match="Construct it after torch.distributed.init_process_group"):
        loss(unit_rows(5, D), torch.arange(5))


def test_a_loss_made_before_its_processes_met_says_so(ranks, tmp_path):
    ranks(2, made_before, str(tmp_path))


class WithLoss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.network = torch.nn.Linear(6, D)
        self.loss = vmcr2.VMCR2Loss(6, D, atoms_per_class=S, structure="block", sharded=True)

    def forward(self, inputs, labels):
        return self.loss(normalize(self.network(inputs), dim=1), labels)


def wrapped(rank):
    model = DistributedDataParallel(WithLoss())
    with pytest.raises(vmcr2.InputError) as caught:
        model(unit_rows(12, 6).float(), torch.arange(12) % 6)
    return str(caught.value)


def test_a_sharded_loss_that_is_wrapped_with_its_network_says_so(ranks):
    """DistributedDataParallel gives every rank the buffers of the first, here as many on each."""
    first, second = ranks(2, wrapped)
    assert first.startswith("the call failed on rank 1")
    assert "this rank holds the classes from 3 on, but its dictionary was overwritten by those from 0 on" in second
    assert "Wrap only the network, not a module that holds the loss" in second


def takes_a_state_of_few_classes(rank):
    few = vmcr2.VMCR2Loss(3, D, atoms_per_class=S, structure="block")
    few.latch(unit_rows(12, D, dtype=torch.float32), torch.arange(12) % 3)
    loss = vmcr2.VMCR2Loss(6, D, atoms_per_class=S, structure="block", sharded=True)
    before = loss.full_state_dict()
    with pytest.raises(
        RuntimeError, match=r"dictionary\.codes: it must be a share of 6 classes, got a state of \(2, 3\)"
    ):
        loss.load_state_dict(few.state_dict())
    after = loss.full_state_dict()
    return all(torch.equal(before[name], after[name]) for name in before)


def test_a_state_of_as_many_classes_as_a_rank_holds_is_not_taken_for_all(ranks):
    assert ranks(2, takes_a_state_of_few_classes) == [True, True]


def not_latched(rank):
    loss = loss_of(sharded=True).eval()
    z, labels = unit_rows(6, D), torch.zeros(6, dtype=torch.long)
    with pytest.raises(vmcr2.NotLatchedError):
        loss(z, labels)
    with pytest.raises(vmcr2.InputError, match="batches must give at least one pair"):
        loss.latch_from(torch.nn.Identity(), [])
    loss.latch(z, labels)  # the classes of the first rank alone: the others then have nothing, and go on
    return loss(z, labels)


def test_a_sharded_dictionary_without_any_class_is_not_latched(ranks):
    first, second = ranks(2, not_latched)
    assert torch.equal(first, second)


def outside(rank):
    loss = loss_of(sharded=True)
    said = []
    for call in (
        lambda labels: loss(unit_rows(6, D), labels),
        lambda labels: loss.latch(unit_rows(6, D), labels),
        lambda labels: loss.latch_from(torch.nn.Identity(), [(unit_rows(6, D), labels)]),
        lambda labels: loss.latch(unit_rows(5, D), labels),
    ):
        with pytest.raises(vmcr2.InputError) as caught:
            call(torch.arange(6) if rank == 1 else torch.arange(6) % K)
        said.append(str(caught.value))
    assert not loss.dictionary.latched.any()
    assert loss.dictionary.steps_taken == 0
    return said


def test_labels_outside_of_every_shard_are_an_error_on_all_ranks(ranks):
    first, second = ranks(2, outside)
    for said in first[:3]:
        assert said.startswith("the call failed on rank 1")
    for said in second[:3]:
        assert said.startswith(f"membership labels must lie in [0, {K})")
    for said in (first, second):
        assert said[3].startswith("membership must have shape (5,)")
