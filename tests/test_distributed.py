"""Two ranks give the losses, the dictionary and the gradients of one process, whatever share each of them has."""

import contextlib
import copy
import re
import time

import pytest
import torch
import torch.distributed as dist
from conftest import Ranks, checked, random_labels, random_rows, rows_of, unit_rows
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

import vmcr2
from vmcr2.distributed import gather_rows, world_size
from vmcr2.latching import latched_blocks

K, D, M = 3, 8, 31
SHARES = [slice(0, 20), slice(20, M)]


def network():
    torch.manual_seed(0)
    return torch.nn.Linear(6, D).double()


def batch(kind, seed=0):
    return unit_rows(M, 6, seed=seed), random_labels(M, K, seed=seed) if kind == "labels" else random_rows(M, K)


def losses_of(structure, step="ascent"):
    if structure == "exact":
        return vmcr2.MCR2Loss(K)
    if structure == "sharded":
        return vmcr2.VMCR2Loss(K, D, atoms_per_class=2, structure="block", sharded=True).double()
    if structure == "expanding":
        return vmcr2.VMCR2Loss(K, D, atoms_per_class=2, pull=0.3, expand=0.5).double()
    return vmcr2.VMCR2Loss(K, D, atoms_per_class=2, structure=structure, step=step).double()


def trained(rank, structure, step, kind):
    return train(DistributedDataParallel(network()), losses_of(structure, step), kind, SHARES[rank])


def train(model, loss, kind, share):
    """Latches and takes two steps; returns all that must agree between ranks, and with one process."""
    results = []
    if isinstance(loss, vmcr2.VMCR2Loss):
        inputs, membership = (each[share] for each in batch(kind))
        loss.latch(normalize(model(inputs).detach(), dim=1), membership)
    for seed in range(2):
        inputs, membership = (each[share] for each in batch(kind, seed))
        model.zero_grad()
        value = loss(normalize(model(inputs), dim=1), membership)
        value.backward()
        results += [value.detach(), *(p.grad.clone() for p in model.parameters())]
    if isinstance(loss, vmcr2.VMCR2Loss):
        with torch.no_grad():
            results += list(loss.rates(normalize(model(inputs), dim=1), membership))
    return [*results, *loss.state_dict().values()]


TRAINED = [
    ("exact", "ascent", "labels"),
    ("exact", "ascent", "soft"),
    ("shared", "ascent", "labels"),
    ("shared", "ascent", "soft"),
    ("block", "ascent", "labels"),
    ("block", "ascent", "soft"),
    ("shared", "paper", "labels"),
    ("expanding", "ascent", "labels"),
    ("expanding", "ascent", "soft"),
]


def latch_batches(case):
    """Returns the batches of each of two ranks: unequal numbers, none on one, a class on one rank alone, many."""
    z, labels = unit_rows(60, D), random_labels(60, K)
    pairs = list(zip(z.split(7), labels.split(7), strict=True))
    if case == "unequal":
        return [pairs[:6], pairs[6:]]
    if case == "none on the first":
        return [[], pairs]
    if case == "none on the second":
        return [pairs, []]
    if case == "a class on one rank":
        return [[(z[labels == 0], labels[labels == 0])], [(z[labels > 0], labels[labels > 0])]]
    if case == "soft on one rank":
        return [pairs[:6], [(each, rows_of(pi, K)) for each, pi in pairs[6:]]]
    assert case == "folded"  # more than k d samples, of which one rank alone has folded its own
    many = unit_rows(200, D, seed=5), random_labels(200, K, seed=5)
    return [list(zip(many[0].split(50), many[1].split(50), strict=True)), pairs[:1]]


LATCHED = ["unequal", "none on the first", "none on the second", "a class on one rank", "soft on one rank", "folded"]


def latched_from(rank, case):
    loss = losses_of("shared")
    loss.latch_from(torch.nn.Identity(), latch_batches(case)[rank])
    # Were a rank out of step, its next collective would meet another's and give garbage.
    value = loss(*(each[:9] for each in (unit_rows(60, D), random_labels(60, K))))
    return [value.detach(), *loss.state_dict().values()]


def wrapped_model_with_batch_statistics(rank):
    """A function around a DistributedDataParallel with buffers, and a batch more on one rank than on the other."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.BatchNorm1d(D)).double()
    model = DistributedDataParallel(module)
    batches = [(unit_rows(20, D, seed=seed), random_labels(20, K, seed=seed)) for seed in range(3)]
    loss = losses_of("shared")
    loss.latch_from(lambda x: normalize(model(x), dim=1), batches[:2] if rank == 0 else batches[2:])
    return [loss.dictionary.codes.clone()]


def used_alone_first(rank, how):
    """Each rank latches, and takes a step, before the processes are joined; then both take steps together."""
    loss = losses_of("shared")
    z, labels = unit_rows(M, D, seed=5 + rank), random_labels(M, K)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dist, "is_initialized", lambda: False)
        if how == "latch_from":
            loss.latch_from(torch.nn.Identity(), [(z, labels)])
        elif how == "latch":
            loss.latch(z, labels)
        else:
            loss(z.requires_grad_(), labels)
    return steps_of(loss, SHARES[rank])


@pytest.mark.parametrize("how", ["latch", "latch_from", "a step"])
def test_what_ranks_did_before_they_were_joined_gives_way_to_the_first_ranks(ranks, how):
    first, second = ranks(2, used_alone_first, how)
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)


def parted_by_roundings(rank):
    """A GPU sums in another order on each rank; here an entry of one rank's atoms is changed by as little."""
    loss, steps = source_of(3, 1), []
    loss.dictionary.changed = False
    if rank == 1:
        loss.dictionary.atoms.data[0, 0] *= 1 + 1e-12
    z, labels = unit_rows(M, D, seed=4), random_labels(M, K, seed=4)
    for _ in range(51):
        loss(z[SHARES[rank]].requires_grad_(), labels[SHARES[rank]])
        steps.append(loss.dictionary.atoms.clone())
    return steps


def test_ranks_parted_by_roundings_are_brought_together_again(ranks):
    first, second = ranks(2, parted_by_roundings)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[-1], second[-1])


def source_of(seed, steps):
    """Returns a loss that has been latched without its ranks meeting."""
    z, labels = unit_rows(40, D, seed=seed), torch.arange(40) % K
    loss = losses_of("shared")
    loss.dictionary.latch(*latched_blocks(z, checked(z, labels, K), 2), torch.ones(K, dtype=torch.bool))
    loss.dictionary.steps_taken = steps
    return loss


def prepared(how, rank):
    """Returns a loss whose dictionary one rank alone has been given."""
    loss = losses_of("shared")
    source = source_of(3, 70)  # past the first steps, in which µ is larger
    if how == "loaded on the first" and rank == 0:
        loss.load_state_dict(source.state_dict())
    elif how == "written on the first" and rank == 0:
        loss.dictionary.atoms.copy_(source.dictionary.atoms)
        loss.dictionary.codes.copy_(source.dictionary.codes)
        loss.dictionary.changed = True
    elif how == "another on each":
        loss.load_state_dict(source_of(3 + rank, 70 - 60 * rank).state_dict())
    elif how == "nothing on the first":
        if rank == 1:
            loss.load_state_dict(source.state_dict())
    elif how == "loaded later":  # after both have been in step
        loss.load_state_dict(source_of(8, 0).state_dict())
        z, labels = unit_rows(M, D), random_labels(M, K)
        loss(z[SHARES[rank]], labels[SHARES[rank]])
        if rank == 0:
            loss.load_state_dict(source.state_dict())
    return loss


PREPARED = ["loaded on the first", "written on the first", "another on each", "nothing on the first", "loaded later"]


def stepped(rank, how):
    return steps_of(prepared(how, rank), SHARES[rank])


def steps_of(loss, share):
    z, labels = unit_rows(M, D, seed=4), random_labels(M, K, seed=4)
    return [loss(z[share], labels[share]).detach() for _ in range(2)] + list(loss.state_dict().values())


def latched_after_loading(rank):
    """The first rank alone has loaded; both latch onto two classes; the third is the first rank's on both."""
    loss = losses_of("block")
    if rank == 0:
        loss.load_state_dict(losses_of("block").state_dict() | source_block())
    z, labels = unit_rows(20, D), torch.arange(20) % 2
    loss.latch_from(torch.nn.Identity(), [(z[rank::2], labels[rank::2])])
    loss(unit_rows(6, D, seed=1), torch.arange(6) % K)
    return list(loss.state_dict().values())


def source_block():
    z, labels = unit_rows(40, D, seed=3), torch.arange(40) % K
    loss = losses_of("block")
    loss.dictionary.latch(*latched_blocks(z, checked(z, labels, K), 2), torch.ones(K, dtype=torch.bool))
    return loss.state_dict()


def test_what_one_rank_had_loaded_before_a_latch_is_given_to_all_after_it(ranks):
    first, second = ranks(2, latched_after_loading)
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)


def half_precision(rank, dtype):
    z, labels = unit_rows(M, D)[SHARES[rank]].to(dtype).requires_grad_(), random_labels(M, K)[SHARES[rank]]
    values = []
    for structure in ("exact", "shared", "sharded"):
        value = losses_of(structure)(z, labels)
        value.backward()
        values.append(value.detach())
    return [torch.stack(values), z.grad]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_features_of_any_precision_are_gathered(ranks, dtype):
    z, labels = unit_rows(M, D).to(dtype).requires_grad_(), random_labels(M, K)
    values = []
    for structure in ("exact", "shared", "block"):
        value = losses_of(structure)(z, labels)
        value.backward()
        values.append(value.detach())
    results = ranks(2, half_precision, dtype)
    for got, _ in results:
        torch.testing.assert_close(got, torch.stack(values))
    torch.testing.assert_close(torch.cat([each for _, each in results]), 2 * z.grad)


def gathered(rank):
    z, labels = unit_rows(M, D), random_labels(M, K)
    share = SHARES[rank]
    shares = [len(z[each]) for each in SHARES]
    return list(gather_rows(z[share], labels[share], shares=shares))


def errors(rank):
    """A wrong batch on every rank, and ranks that never had a batch, are errors on every rank."""
    said = []
    for call in (
        lambda: losses_of("shared")(2 * unit_rows(5, D), random_labels(5, K)),
        lambda: losses_of("shared").latch_from(torch.nn.Identity(), []),
    ):
        try:
            call()
        except vmcr2.InputError as error:
            said.append(str(error))
    return said


def assert_each(results, expected):
    for got in results:
        assert len(got) == len(expected)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("structure", "step", "kind"), TRAINED)
def test_two_ranks_with_unequal_shares_equal_one(ranks, structure, step, kind):
    expected = train(network(), losses_of(structure, step), kind, slice(None))
    assert_each(ranks(2, trained, structure, step, kind), expected)


@pytest.mark.parametrize("case", LATCHED)
def test_latch_from_takes_unequal_numbers_of_batches_none_included(ranks, case):
    first, second = latch_batches(case)
    expected = losses_of("shared")
    expected.latch_from(torch.nn.Identity(), first + second)
    z, labels = unit_rows(60, D)[:9], random_labels(60, K)[:9]
    # Both ranks then trained on the same nine samples: a batch of eighteen.
    value = expected(torch.cat([z, z]), torch.cat([labels, labels]))
    got = ranks(2, latched_from, case)
    for each in got:
        torch.testing.assert_close(each[0], value.detach())
        state = dict(zip(expected.state_dict(), each[1:], strict=True))
        torch.testing.assert_close(state["dictionary.codes"], expected.dictionary.codes)
        overlap = (state["dictionary.atoms"] * expected.dictionary.atoms).sum(0).abs()
        torch.testing.assert_close(overlap, torch.ones_like(overlap))
    for ours, theirs in zip(*got, strict=True):
        assert torch.equal(ours, theirs)


def test_latch_from_a_function_of_a_distributed_module_does_not_synchronise_it(ranks):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.BatchNorm1d(D)).double()
    batches = [(unit_rows(20, D, seed=seed), random_labels(20, K, seed=seed)) for seed in range(3)]
    loss = losses_of("shared")
    loss.latch_from(lambda x: normalize(model(x), dim=1), batches)
    assert_each(ranks(2, wrapped_model_with_batch_statistics), [loss.dictionary.codes])


@pytest.mark.parametrize("how", PREPARED)
def test_the_first_ranks_dictionary_is_given_to_all_at_the_next_call(ranks, how):
    source = source_of(3, 0 if how == "written on the first" else 70)
    if how == "nothing on the first":
        source = losses_of("shared")
    expected = steps_of(source, slice(None))
    if how == "written on the first":  # by hand: `latched` says nothing of that
        source.dictionary.latched[:] = False
        expected = [*expected[:-2], source.dictionary.latched, expected[-1]]
    assert_each(ranks(2, stepped, how), expected)


def test_gathering_gives_rows_in_rank_order(ranks):
    assert_each(ranks(2, gathered), [unit_rows(M, D), random_labels(M, K)])


def test_what_is_wrong_everywhere_is_an_error_everywhere(ranks):
    for first, second in ranks(2, errors):
        assert "norm 1" in first
        assert "batches must give at least one pair" in second


def said_by(calls):
    """Returns what the error of each call says, "" where there was none."""
    said = []
    for call in calls:
        try:
            call()
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            said.append("")
    return said


def batches_of(kind, wrong):
    """Returns a batch, and the same with something wrong."""
    z, labels = unit_rows(6, D), torch.arange(6) % K
    held = rows_of(labels, K) if kind == "soft" else labels
    if not wrong:
        return z, held
    if wrong == "NaN":
        z = torch.cat([z[:5], torch.full((1, D), torch.nan)])
    elif wrong == "norms":
        z = 2 * z
    elif wrong == "no rows":
        z, held = z[:0], held[:0]
    elif wrong == "a label beyond":
        held = labels + 1
    elif wrong == "rows that sum to 2":
        held = 2 * rows_of(labels, K)
    elif wrong == "no tensor":
        z = z.tolist()
    return z, held


WRONG = {
    "NaN": "features must be finite",
    "norms": "features must have rows of norm 1",
    "no rows": "features must have shape",
    "a label beyond": "membership labels must lie in",
    "rows that sum to 2": "membership rows must sum to 1",
    "no tensor": "features must be a torch.Tensor",
}


def wrong_on_one(rank, faulty, wrong):
    """One rank's batch is wrong: every call of every loss raises on every rank, and the next one works."""
    kind = "soft" if "rows" in wrong else "labels"
    z, held = batches_of(kind, wrong if rank == faulty else None)
    said = []
    for structure in ("exact", "shared", "block", "sharded"):
        loss = losses_of(structure)
        calls = [lambda loss=loss: loss(z, held)]
        if structure != "exact":
            calls += [lambda f=loss: f.rates(z, held), lambda f=loss: f.latch(z, held)]
            calls += [lambda f=loss: f.latch_from(torch.nn.Identity(), [(torch.as_tensor(z), held)])]
        said += said_by(calls if wrong != "no tensor" else calls[:3])
        value = loss(*batches_of(kind, None))
        assert value.isfinite()
    if wrong in ("NaN", "norms", "no rows", "no tensor"):
        said += said_by([lambda: vmcr2.TotalCodingRateLoss()([z])])
    return said


@pytest.mark.parametrize("faulty", [0, 2])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_on_one_rank_is_an_error_on_all(ranks, wrong, faulty):
    results = ranks(3, wrong_on_one, faulty, wrong)
    for rank, said in enumerate(results):
        assert len(said) >= 7
        for each in said:
            assert each.startswith("InputError: ")
            expected = WRONG[wrong] if rank == faulty else f"the call failed on rank {faulty}"
            assert expected in each


def a_model_that_fails(rank, structure):
    def model(inputs):
        if rank == 1:
            raise RuntimeError("out of memory")
        return inputs

    return said_by([lambda: losses_of(structure).latch_from(model, [batches_of("labels", None)])])


@pytest.mark.parametrize("structure", ["block", "sharded"])
def test_a_model_that_fails_on_one_rank_leaves_no_other_waiting(ranks, structure):
    (first,), (second,) = ranks(2, a_model_that_fails, structure)
    assert "the call failed on rank 1" in first
    assert second == "RuntimeError: out of memory"


def wrong_stream(rank, what, structure):
    pairs, model = [batches_of("labels", None)], torch.nn.Identity()
    if rank == 1 and what == "labels":
        pairs = [pairs[0], (pairs[0][0], pairs[0][1].tolist())]
    elif rank == 1 and what == "batches":
        pairs = None
    elif rank == 1:
        model = None
    loss = losses_of(structure)
    said = said_by([lambda: loss.latch_from(model, pairs)])
    assert not loss.dictionary.latched.any()
    return said


WRONG_STREAMS = {
    "labels": "batches must give pairs (inputs, membership) of tensors, got membership of type list",
    "batches": "batches must be pairs (inputs, membership), got NoneType",
    "model": "model must be a Module or a function, got NoneType",
}


@pytest.mark.parametrize("structure", ["block", "sharded"])
@pytest.mark.parametrize("what", WRONG_STREAMS)
def test_a_stream_that_is_wrong_on_one_rank_is_an_error_on_all(ranks, what, structure):
    (first,), (second,) = ranks(2, wrong_stream, what, structure)
    assert "the call failed on rank 1" in first
    assert WRONG_STREAMS[what] in second


def disagreement(rank, what):
    z, labels = batches_of("labels", None)
    odd = rank == 1
    if what == "k":
        return said_by([lambda: vmcr2.VMCR2Loss(K + odd, D, atoms_per_class=2).double()(z, labels)])
    if what == "k, exact":
        return said_by([lambda: vmcr2.MCR2Loss(K + odd)(z, labels)])
    if what == "d":
        z = unit_rows(6, D + odd)
        return said_by([lambda: vmcr2.VMCR2Loss(K, D + odd, atoms_per_class=2).double()(z, labels)])
    if what == "atoms":
        return said_by([lambda: vmcr2.VMCR2Loss(K, D, atoms_per_class=1 + odd).double()(z, labels)])
    if what == "settings":
        return said_by([lambda: vmcr2.VMCR2Loss(K, D, eps_sq=0.5 + 0.1 * odd).double()(z, labels)])
    if what == "settings, exact":
        return said_by([lambda: vmcr2.MCR2Loss(K, eps_sq=0.5 + odd)(z, labels)])
    if what == "settings, alone":
        return said_by([lambda: vmcr2.TotalCodingRateLoss(0.2 + odd)(z)])
    loss = losses_of("block" if what.endswith("block") else "shared")
    if what == "dtype":
        return said_by([lambda: loss(z.float() if odd else z, labels)])
    if what == "kind":
        return said_by([lambda: loss(z, rows_of(labels, K) if odd else labels)])
    if what == "gradient":
        return said_by([lambda: loss(z.requires_grad_(odd), labels)])
    if what == "gradient in soft rows":
        return said_by([lambda: loss(z.requires_grad_(), rows_of(labels, K).requires_grad_(odd))])
    if what.startswith("dtype of the dictionary"):
        return said_by([lambda: (loss.float() if odd else loss)(z, labels)])
    if what == "views":
        return said_by([lambda: vmcr2.TotalCodingRateLoss()([z] * (1 + odd))])
    loss(z, labels)
    if what.startswith("steps"):
        loss.dictionary.steps_taken += odd
        return said_by([lambda: loss(z, labels)])
    assert what.startswith("call")
    return said_by([lambda: loss.latch(z, labels) if odd else loss(z, labels)]) + said_by(
        [lambda: loss.rates(z, labels) if odd else loss.latch_from(torch.nn.Identity(), [(z, labels)])]
    )


DISAGREEMENTS = {
    "k": f"num_classes: {K} on ranks 0, 2; {K + 1} on rank 1",
    "k, exact": f"num_classes: {K} on ranks 0, 2; {K + 1} on rank 1",
    "d": f"feature_dim: {D} on ranks 0, 2; {D + 1} on rank 1",
    "atoms": "atoms_per_class: 1 on ranks 0, 2; 2 on rank 1",
    "settings": "settings of the loss, see repr(loss)",
    "settings, exact": "settings of the loss, see repr(loss)",
    "settings, alone": "settings of the loss, see repr(loss)",
    "dtype": "the dtype of features: torch.float64 on ranks 0, 2; torch.float32 on rank 1",
    "kind": "the kind of membership: labels on ranks 0, 2; soft rows on rank 1",
    "gradient": "gradients: without gradient on ranks 0, 2; with gradient on rank 1",
    "gradient in soft rows": "gradients: with gradient on ranks 0, 2; with gradient in both on rank 1",
    "dtype of the dictionary": "the dtype of the dictionary: torch.float64 on ranks 0, 2; torch.float32 on rank 1",
    "dtype of the dictionary, block": "the dtype of the dictionary: torch.float64 on ranks 0, 2; torch.float32",
    "views": "the number of views: 1 on ranks 0, 2; 2 on rank 1",
    "steps": "the number of steps that the dictionary has taken: 1 on ranks 0, 2; 2 on rank 1",
    "steps, block": "the number of steps that the dictionary has taken: 1 on ranks 0, 2; 2 on rank 1",
    "call": "the call: ",
}


@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_ranks_that_disagree_are_named_on_all_of_them(ranks, what):
    results = ranks(3, disagreement, what)
    assert results[0] == results[1] == results[2]
    assert f"InputError: ranks disagree on {DISAGREEMENTS[what]}" in results[0][0]
    if what == "call":
        assert "a training step on ranks 0, 2; latch on rank 1" in results[0][0]
        assert "latch_from on ranks 0, 2; rates on rank 1" in results[0][1]


def fully_sharded(rank):
    """Returns what kind of parameters an FSDP network has after latching."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    inner = torch.nn.Linear(8, D, dtype=torch.float64)
    model = torch.nn.Sequential(inner, torch.nn.Linear(D, D, dtype=torch.float64))
    loss = vmcr2.VMCR2Loss(K, D).double()
    z, labels = unit_rows(M, 8)[SHARES[rank]], random_labels(M, K)[SHARES[rank]]
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(inner, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss.latch_from(lambda x: torch.nn.functional.normalize(model(x), dim=1), [(z, labels)])
    return [type(each).__name__ for each in model.parameters()]


def test_latch_from_leaves_the_weights_of_fsdp_sharded_for_an_optimizer_that_is_made_next(ranks):
    for kinds in ranks(2, fully_sharded):
        assert set(kinds) == {"DTensor"}


def dtensors(rank):
    """Returns what is said of DTensors in the place of features and of membership."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    z, labels = unit_rows(M, D), random_labels(M, K)
    spread, own = distribute_tensor(z, mesh, [Shard(0)]), distribute_tensor(labels, mesh, [Shard(0)])
    calls = [lambda call=call: call(spread) for call in (vmcr2.coding_rate, vmcr2.TotalCodingRateLoss())]
    for loss in (vmcr2.MCR2Loss(K), losses_of("shared"), losses_of("sharded")):
        calls += [lambda loss=loss: loss(spread, labels), lambda loss=loss: loss(z, own)]
    calls += [lambda: vmcr2.label_quality(spread, labels), lambda: vmcr2.report(z, own)]
    calls += [lambda: vmcr2.ClassBalancedBatchSampler(own, 2)]
    calls += [lambda: vmcr2.NearestSubspaceClassifier().fit(spread, labels)]
    return said_by(calls)


def test_a_dtensor_is_refused_with_what_to_pass_instead(ranks):
    for said in ranks(2, dtensors):
        assert len(said) == 12
        for each in said:
            assert re.search(r"got a DTensor; pass the whole, \w+\.full_tensor\(\)", each), each


def in_groups(rank):
    """Two groups of two ranks at once, each with a batch of its own; and a copy of a loss shares its group."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = groups[rank % 2]
    z, labels = unit_rows(M, D, seed=rank % 2), random_labels(M, K, seed=rank % 2)
    share = SHARES[rank // 2]
    losses = {
        "exact": vmcr2.MCR2Loss(K, process_group=group),
        "shared": vmcr2.VMCR2Loss(K, D, atoms_per_class=2, process_group=group).double(),
        "sharded": vmcr2.VMCR2Loss(
            K, D, atoms_per_class=2, structure="block", sharded=True, process_group=group
        ).double(),
    }
    values = [copy.deepcopy(loss)(z[share], labels[share]) for loss in losses.values()]
    values.append(vmcr2.TotalCodingRateLoss(process_group=group)(z[share]))
    full = losses["sharded"].full_state_dict()
    assert full["dictionary.atoms"].shape == (D, 2 * K)
    said = said_by([lambda: losses["exact"](z[share] * (1 + rank // 3), labels[share])])  # wrong on rank 3
    said += said_by([lambda: vmcr2.MCR2Loss(K, process_group=groups[1 - rank % 2])])
    said += said_by([lambda: vmcr2.MCR2Loss(K, process_group="gloo")])
    return torch.stack(values), said


def test_a_process_group_of_its_own_takes_all_communication(ranks):
    for rank, (values, said) in enumerate(ranks(4, in_groups)):
        z, labels = unit_rows(M, D, seed=rank % 2), random_labels(M, K, seed=rank % 2)
        losses = [vmcr2.MCR2Loss(K), losses_of("shared"), losses_of("block")]
        expected = [loss(z, labels) for loss in losses] + [vmcr2.TotalCodingRateLoss()(z)]
        torch.testing.assert_close(values, torch.stack(expected))
        if rank == 1:
            assert "the call failed on rank 3" in said[0]
        elif rank % 2 == 0:
            assert not said[0]
        assert "process_group must include this process" in said[1]
        assert "process_group must be a torch.distributed.ProcessGroup or None, got 'gloo'" in said[2]


def penalised(rank, world, structure):
    """The gradient of Σ ‖∂L/∂z‖² over all ranks, by second derivatives, from each rank's share."""
    z, labels = unit_rows(M, D), random_labels(M, K)
    share = SHARES[rank] if world > 1 else slice(0, M)
    loss = losses_of(structure)
    if isinstance(loss, vmcr2.VMCR2Loss):
        loss.latch(unit_rows(M, D, seed=1)[share], labels[share])
        loss.eval()
    features = z[share].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(features, labels[share]), features, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), features)[0]


@pytest.mark.parametrize("structure", ["exact", "shared", "block", "sharded"])
def test_second_derivatives_are_those_of_one_process(ranks, structure):
    expected = penalised(0, 1, structure)
    # What gradients are taken of is the sum over ranks of the same loss: twice it, and the square of that here.
    torch.testing.assert_close(torch.cat(ranks(2, penalised, 2, structure)), 4 * expected)


def accumulated(rank, structure):
    """Two micro-batches under `no_sync`, then one that synchronises, as DistributedDataParallel's docs have it."""
    model, loss = network(), losses_of(structure)
    if rank is None:
        share, unsynchronised = slice(None), contextlib.nullcontext
    else:
        model = DistributedDataParallel(model)
        share, unsynchronised = SHARES[rank], model.no_sync
    for seed in range(3):
        inputs, labels = (each[share] for each in batch("labels", seed))
        with unsynchronised() if seed < 2 else contextlib.nullcontext():
            loss(normalize(model(inputs), dim=1), labels).backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("structure", ["block", "sharded"])
def test_gradients_accumulate_under_no_sync(ranks, structure):
    assert_each(ranks(2, accumulated, structure), accumulated(None, "block"))


def one_fails(rank):
    if rank == 1:
        raise ValueError("the second rank's own")
    dist.barrier()


def hangs(rank):
    dist.barrier() if rank == 0 else time.sleep(60)


def test_the_pool_reports_a_rank_that_fails_or_hangs_and_goes_on():
    pool = Ranks(2)
    try:
        for function, deadline, said in ((one_fails, 20, "the second rank's own"), (hangs, 3, "nothing was heard")):
            with pytest.raises(pytest.fail.Exception, match=said):
                pool(2, function, deadline=deadline)
        assert len(pool(2, gathered)) == 2
    finally:
        pool.end()


def test_without_processes_nothing_is_gathered():
    z, labels = unit_rows(5, D), random_labels(5, K)
    rows, pi = gather_rows(z, labels, shares=[5])
    assert rows is z
    assert pi is labels
    assert world_size() == 1


def trained_in_groups(rank):
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    share = SHARES[rank // 2]
    z, labels = (each[share] for each in (unit_rows(M, D, seed=rank % 2), random_labels(M, K, seed=rank % 2)))
    found = []
    for settings in ({}, {"structure": "block", "sharded": True}):
        loss = vmcr2.VMCR2Loss(K, D, atoms_per_class=2, process_group=groups[rank % 2], **settings).double()
        loss.latch_from(torch.nn.Identity(), [(z, labels)])
        features = z.clone().requires_grad_()
        loss(features, labels).backward()
        found.append(features.grad)
    return [*found, loss.nearest_class(z)]


def test_in_a_group_latching_gradients_and_predictions_are_those_of_its_ranks_alone(ranks):
    results = ranks(4, trained_in_groups)
    for group in range(2):
        z, labels = unit_rows(M, D, seed=group), random_labels(M, K, seed=group)
        expected = []
        for structure in ("shared", "block"):
            loss = losses_of(structure)
            loss.latch_from(torch.nn.Identity(), [(z, labels)])
            features = z.clone().requires_grad_()
            loss(features, labels).backward()
            expected.append(2 * features.grad)  # which DistributedDataParallel's mean over two ranks halves
        expected.append(loss.nearest_class(z))
        for ours, theirs in zip(zip(*results[group::2], strict=True), expected, strict=True):
            torch.testing.assert_close(torch.cat(ours), theirs)
