"""Batches of equal numbers of each class."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vmcr2
from vmcr2 import ClassBalancedBatchSampler, sampling

LABELS = torch.tensor([0] * 10 + [2] * 7 + [3] * 3 + [5] * 20)  # classes 1 and 4 have no sample


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 100))
def test_every_batch_has_as_many_of_each_of_its_classes(per_class, classes, seed):
    sampler = ClassBalancedBatchSampler(LABELS, per_class, classes_per_batch=classes, batches=6, seed=seed)
    for batch in sampler:
        labels, counts = LABELS[batch].unique(return_counts=True)
        assert len(labels) == classes
        assert set(counts.tolist()) == {per_class}


def test_samples_are_not_repeated_in_a_batch_unless_a_class_has_too_few():
    for batch in ClassBalancedBatchSampler(LABELS, 7, classes_per_batch=4, batches=20):
        own = torch.tensor(batch)
        plenty = own[LABELS[own] != 3]
        assert len(plenty.unique()) == len(plenty)
        assert len(own[LABELS[own] == 3].unique()) == 3


def test_a_class_with_too_few_samples_shows_them_all_before_any_twice():
    sampler = ClassBalancedBatchSampler([0] * 6 + [1] * 50, 7, batches=50)
    for batch in sampler:
        assert sorted(torch.tensor([i for i in batch if i < 6]).bincount().tolist()) == [1, 1, 1, 1, 1, 2]


def test_classes_and_samples_take_turns():
    drawn = torch.tensor(
        [i for batch in ClassBalancedBatchSampler(LABELS, 2, classes_per_batch=2, batches=20) for i in batch]
    )
    by_class = LABELS[drawn].bincount(minlength=6)
    assert by_class.tolist() == [20, 0, 20, 20, 0, 20]
    for j in (0, 2, 3, 5):
        times = drawn[LABELS[drawn] == j].bincount(minlength=len(LABELS))[j == LABELS]
        assert int(times.max() - times.min()) <= 1


def test_an_epoch_follows_from_seed_and_number():
    def epoch(seed, number):
        sampler = ClassBalancedBatchSampler(LABELS, 2, seed=seed)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(0, 1) == epoch(0, 1)
    assert epoch(0, 1) != epoch(0, 2)
    assert epoch(0, 1) != epoch(1, 1)


def test_a_sampler_goes_on_where_another_stood():
    first = ClassBalancedBatchSampler(LABELS, 2, batches=6)
    first.set_epoch(3)
    drawing = iter(first)
    head = [next(drawing) for _ in range(2)]
    second = ClassBalancedBatchSampler(LABELS, 2, batches=6)
    second.load_state_dict(first.state_dict())
    tail = list(second)
    whole = ClassBalancedBatchSampler(LABELS, 2, batches=6)
    whole.set_epoch(3)
    assert head + tail == list(whole)


def test_looking_at_a_batch_or_breaking_off_shortens_no_epoch():
    sampler = ClassBalancedBatchSampler(LABELS, 2, batches=5)
    whole = list(sampler)
    pairs = torch.utils.data.TensorDataset(torch.arange(40), LABELS)
    assert next(iter(sampler)) == whole[0]
    assert sampler.state_dict() == {"epoch": 0, "done": 1}
    assert list(sampler) == whole
    for _ in torch.utils.data.DataLoader(pairs, batch_sampler=sampler):
        break
    assert list(sampler) == whole
    sampler.load_state_dict({"epoch": 0, "done": 2})
    assert sampler.state_dict() == {"epoch": 0, "done": 2}
    assert list(sampler) == whole[2:]
    assert list(sampler) == whole


def test_latching_from_a_loader_takes_a_whole_epoch_and_leaves_the_sampler_where_it_stood():
    labels = torch.arange(40) % 4
    sampler = ClassBalancedBatchSampler(labels, 2, batches=6)
    pairs = torch.utils.data.TensorDataset(torch.eye(40), labels)
    loader = torch.utils.data.DataLoader(pairs, batch_sampler=sampler)
    state = {"epoch": 3, "done": 4}
    sampler.load_state_dict(state)
    sampler.set_epoch(3)  # as a loop does before each epoch, the one that it resumes included
    seen = []
    vmcr2.VMCR2Loss(4, 40).latch_from(lambda inputs: seen.append(inputs) or inputs, loader)
    assert len(seen) - 1 == 6  # a function is run once more, on the first batch
    assert sampler.state_dict() == state
    assert len(list(loader)) == 2
    sampler.set_epoch(3)
    assert len(list(loader)) == 6


def test_batches_do_not_follow_a_default_device():
    labels = torch.arange(12) % 3
    with torch.device("meta"):  # any but the tensors' own
        batches = list(ClassBalancedBatchSampler(labels, 2))
    assert batches == list(ClassBalancedBatchSampler(labels, 2))


def test_a_state_saved_at_the_end_of_an_epoch_goes_on_with_the_next():
    def second_epoch(state):
        sampler = ClassBalancedBatchSampler(LABELS, 2, batches=5)
        sampler.load_state_dict(state)
        return list(sampler)

    sampler = ClassBalancedBatchSampler(LABELS, 2, batches=5)
    states = [sampler.state_dict() for _ in sampler]  # the last one before the loop is left
    states.append(sampler.state_dict())
    sampler.set_epoch(1)
    assert second_epoch(states[-2]) == second_epoch(states[-1]) == list(sampler)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"epoch": 7, "done": 999}, "done must be at most 6"),
        ({"epoch": 2**70, "done": 1}, "epoch must be at most"),
        ({"epoch": 7}, "state must hold epoch and done, .* got {'epoch': 7}"),
        (None, "state must hold epoch and done"),
    ],
)
def test_a_wrong_state_is_named_and_changes_nothing(state, message):
    sampler = ClassBalancedBatchSampler(LABELS, 2, batches=6)
    sampler.load_state_dict({"epoch": 3, "done": 2})
    with pytest.raises(vmcr2.InputError, match=message):
        sampler.load_state_dict(state)
    assert sampler.state_dict() == {"epoch": 3, "done": 2}
    assert len(list(sampler)) == 4


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint64, torch.int8, torch.int32])
def test_labels_of_any_integer_dtype(dtype):
    expected = list(ClassBalancedBatchSampler(LABELS, 2))
    for labels in (LABELS.to(dtype), LABELS.to(dtype).numpy(), LABELS.tolist()):
        assert list(ClassBalancedBatchSampler(labels, 2)) == expected


def test_a_series_and_numpy_integers():
    import pandas  # of the dev extra

    labels = pandas.Series(LABELS.numpy(), index=np.arange(40)[::-1] + 100)
    found = ClassBalancedBatchSampler(labels, np.int64(2), batches=np.int64(5), seed=np.int64(3))
    expected = ClassBalancedBatchSampler(LABELS, 2, batches=5, seed=3)
    found.set_epoch(np.int64(4))
    expected.set_epoch(4)
    assert list(found) == list(expected)


def test_the_largest_seed_and_epoch():
    sampler = ClassBalancedBatchSampler(LABELS, 2, batches=2, seed=2**43)
    sampler.set_epoch(2**43)
    assert len(list(sampler)) == 2


def test_ranks_share_one_batch(monkeypatch):
    whole = list(ClassBalancedBatchSampler(LABELS, 3, classes_per_batch=2))
    early, uneven = (ClassBalancedBatchSampler(LABELS, n, classes_per_batch=2) for n in (3, 2))  # before the ranks meet
    monkeypatch.setattr(sampling, "world_size", lambda group: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(sampling, "process_rank", lambda group, rank=rank: rank)
        shares.append(list(early if rank else ClassBalancedBatchSampler(LABELS, 3, classes_per_batch=2)))
    assert [[i for part in parts for i in part] for parts in zip(*shares, strict=True)] == whole
    with pytest.raises(vmcr2.InputError, match="must be divisible by the 3 processes, got 2 \\* 2"):
        ClassBalancedBatchSampler(LABELS, 2, classes_per_batch=2)
    with pytest.raises(vmcr2.InputError, match="must be divisible by the 3 processes, got 2 \\* 2"):
        next(iter(uneven))


def copied(rank):
    group = torch.distributed.new_group([0, 1])
    sampler = ClassBalancedBatchSampler(LABELS, 3, classes_per_batch=2, process_group=group)
    copies = [copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))]
    return [list(each) for each in (sampler, *copies)]


def test_a_sampler_with_a_group_is_copied_and_pickled(ranks):
    for sampler, *copies in ranks(2, copied):
        assert copies == [sampler] * 2


def test_a_data_loader_takes_it():
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.arange(40), LABELS), batch_sampler=ClassBalancedBatchSampler(LABELS, 3)
    )
    assert len(loader) == 3
    assert all(labels.bincount().tolist() == [3, 0, 3, 3, 0, 3] for _, labels in loader)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("labels must be integers", {"labels": torch.zeros(3)}),
        ("labels must be integers", {"labels": torch.zeros(0, dtype=torch.long)}),
        ("labels must be integers of shape .*, got object \\(\\)", {"labels": None}),
        ("labels must be integers of shape .*, got <U1 \\(2,\\)", {"labels": ["a", "b"]}),
        (
            "labels must be integers of shape .*, got torch.complex64 \\(2,\\)",
            {"labels": torch.zeros(2, dtype=torch.cfloat)},
        ),
        ("labels must have no masked entries, got 1", {"labels": np.ma.masked_equal([0, 1, 2], 1)}),
        ("labels must be >= 0, got -1", {"labels": torch.tensor([-1, 0])}),
        ("samples_per_class", {"samples_per_class": 0}),
        ("classes_per_batch must be at most 4", {"classes_per_batch": 5}),
        ("batches", {"batches": 0}),
        ("seed", {"seed": -1}),
        ("process_group must be a torch.distributed.ProcessGroup or None, got 3", {"process_group": 3}),
        ("seed must be at most 8796093022208, got 4611686018427387904", {"seed": 2**62}),
    ],
)
def test_wrong_arguments_are_named(message, arguments):
    given_ = {"labels": LABELS, "samples_per_class": 2} | arguments
    with pytest.raises(vmcr2.InputError, match=message):
        ClassBalancedBatchSampler(given_.pop("labels"), given_.pop("samples_per_class"), **given_)


def test_epochs_of_different_seeds_differ_whatever_their_numbers():
    seen = set()
    for seed in range(4):
        for number in range(4):
            sampler = ClassBalancedBatchSampler(torch.arange(40) % 4, 2, seed=seed)
            sampler.set_epoch(number)
            seen.add(str(list(sampler)))
    assert len(seen) == 16
