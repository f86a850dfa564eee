"""Training by several processes: the run of one to rounding, whatever their number, and what is left when one dies."""

import os
import platform
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import SMALL, from_file, without_times
from torch.nn.parallel import DistributedDataParallel

import vmcr2
from vmcr2.errors import InputError
from vmcr2.lab import networks, objectives, processes, recipes, sources, train
from vmcr2.lab.run import RunFolder
from vmcr2.lab.sources import DataSettings
from vmcr2.latching import batch_statistics
from vmcr2.sampling import ClassBalancedBatchSampler

# 301 samples: batches of 76, 75, 75, 75, which neither two nor three processes share equally.
UNEVEN = replace(SMALL, epochs=3, data=DataSettings(train_size=301), vmcr2=replace(SMALL.vmcr2, latch_every=2))
MLP = replace(UNEVEN, network="mlp", sync_batchnorm=True)
CONV4 = replace(MLP, network="conv4", epochs=1)
RUNS = {
    "vmcr2 with dropout": UNEVEN,
    "vmcr2 with BatchNorm": MLP,
    "vmcr2 with BatchNorm, channels last": CONV4,
    "mcr2": replace(MLP, objective="mcr2"),
    "ce": replace(MLP, objective="ce"),
}


@pytest.fixture(autouse=True)
def one_thread():
    """As torchrun gives its processes: another number of threads rounds otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def float64():
    """Trains in float64, so that what other processors round otherwise stays far below every tolerance."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@float64()
def started(rank, recipe, path):
    """Trains a recipe as one of several processes; returns what each of them was told and left with."""
    told = []
    run = train.start(recipe, path, on_epoch=told.append)
    return len(told), run.summary()["test_accuracy"]


@float64()
def resumed(rank, recipe, path):
    return train.resume(RunFolder.open(path), recipe)


def assert_alike(run, expected, weights=1e-9, **tolerances):
    for ours, theirs in zip(without_times(run.metrics()), without_times(expected.metrics()), strict=True):
        assert {name for name, value in ours.items() if value is None} <= {"head_accuracy"}
        assert {**ours, "head_accuracy": ours["head_accuracy"] or 0} == pytest.approx(
            {**theirs, "head_accuracy": theirs["head_accuracy"] or 0}, **tolerances
        )
    states = [torch.load(each.checkpoint_file, weights_only=True) for each in (run, expected)]
    assert states[0]["model"].keys() == states[1]["model"].keys()
    for name, tensor in states[0]["model"].items():
        torch.testing.assert_close(tensor, states[1]["model"][name], rtol=0, atol=weights)
    assert torch.equal(states[0]["rng"], states[1]["rng"])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_two_and_of_three_processes_is_that_of_one(ranks, tmp_path, name):
    started(0, RUNS[name], tmp_path / "1")
    expected = RunFolder.open(tmp_path / "1")
    for world in (2, 3):
        told = ranks(world, started, RUNS[name], tmp_path / str(world))
        assert [epochs for epochs, _ in told] == [RUNS[name].epochs] + [0] * (world - 1)
        run = RunFolder.open(tmp_path / str(world))
        assert run.summary()["processes"] == world
        assert_alike(run, expected, rel=1e-9, abs=1e-9)


def test_a_run_goes_on_with_another_number_of_processes(ranks, tmp_path):
    recipe = replace(UNEVEN, epochs=4)
    started(0, recipe, tmp_path / "expected")
    ranks(2, started, replace(recipe, epochs=1), tmp_path / "run")
    ranks(3, resumed, replace(recipe, epochs=2), tmp_path / "run")
    run = resumed(0, replace(recipe, epochs=3), tmp_path / "run")
    ranks(2, resumed, recipe, tmp_path / "run")
    assert_alike(run, RunFolder.open(tmp_path / "expected"), rel=1e-9, abs=1e-9)


def unsynchronised(rank, path):
    """Two processes with BatchNorm of their own, which have but one set of running statistics on the disk."""
    run = train.start(replace(UNEVEN, network="mlp", epochs=1), path)
    state = torch.load(run.checkpoint_file, weights_only=True)["model"]
    return bool(state["2.running_mean"].any()), run.summary()["test_accuracy"]


def test_batchnorm_of_each_process_trains_too(ranks, tmp_path):
    first, second = ranks(2, unsynchronised, tmp_path / "run")
    assert first == second
    assert first[0]


def refused(rank, recipe, path, change):
    if change == "other data" and rank == 1:
        sources.fingerprint = lambda _: "other"
    try:
        train.start(recipe, path)
    except InputError as error:
        return str(error)
    finally:
        if change == "other data" and rank == 1:
            sources.fingerprint = REAL_FINGERPRINT
    return "nothing"


REAL_FINGERPRINT = sources.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 2}, "the processes must be at most 2 for batches of 2 samples, got 3"),
        (
            {"network": "mlp", "batch_size": 5},
            r"at most 2 for batches of 4 samples, of which BatchNorm needs 2 a process \(or sync_batchnorm\), got 3",
        ),
        ({"data": DataSettings(source="gone.npz")}, "there is no file"),
        ("other data", "data must be the same in all processes, got other data in process 1 than in process 0"),
        ("taken", "continue it with --resume"),
    ],
)
def test_what_is_wrong_is_said_in_every_process_before_anything_is_written(ranks, tmp_path, change, message):
    recipe = replace(UNEVEN, **change) if isinstance(change, dict) else UNEVEN
    path = tmp_path / "run"
    if change == "taken":
        with RunFolder.created(path, UNEVEN):
            pass
    before = path.exists()
    for said in ranks(3, refused, recipe, path, change):
        assert re.search(message, said)
    assert path.exists() == before


def agreements(rank):
    """What each of three processes learns of calls that fail in the second of them, and of those of the first alone."""

    def failing(kind):
        if rank == 1:
            raise kind("no room")
        return rank

    said = []
    for kind in (InputError, OSError, KeyError):
        try:
            processes.everywhere(lambda kind=kind: failing(kind))
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    said.append(processes.first(lambda: rank + 7))
    try:
        processes.first(lambda: failing(InputError) if rank else int("seven"))
    except Exception as error:
        said.append(type(error).__name__)
    return [*said, processes.in_turns(lambda: rank), processes.any_of(rank == 2)]


def test_processes_agree_on_results_and_on_errors(ranks):
    first, second, third = ranks(3, agreements)
    other = ["InputError: process 1: no room", "OSError: no room", "PeerError: process 1 failed: KeyError('no room')"]
    assert first == [*other, 7, "ValueError", 0, True]
    assert second == [
        "InputError: process 1: no room",
        "OSError: no room",
        "KeyError: 'no room'",
        7,
        "PeerError",
        1,
        True,
    ]
    assert third == [*other, 7, "PeerError", 2, True]


def test_shares_put_together_are_the_batch():
    dataset = sources.load(DataSettings(train_size=101))
    for augment in (True, False):
        whole = list(train.EpochBatches(dataset, UNEVEN, 3, augment))
        for world in (2, 3, 5):
            shares = [list(train.EpochBatches(dataset, UNEVEN, 3, augment, rank, world)) for rank in range(world)]
            for inputs, labels in whole:
                parts = [share.pop(0) for share in shares]
                assert torch.equal(torch.cat([x for x, _ in parts]), inputs)
                assert torch.equal(torch.cat([y for _, y in parts]), labels)
                assert max(len(y) for _, y in parts) - min(len(y) for _, y in parts) <= 1


def normalised(rank, world, inputs, channels_last):
    """Returns what a network with BatchNorm gives, its gradients, and its running statistics."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3), torch.nn.ReLU()).double()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    share = slice(None)
    if world > 1:
        share = processes.share(len(inputs), rank, world)
        model = networks.synchronise_batchnorm(model)
    own = inputs[share].requires_grad_()
    wrapped = networks.distributed(model)
    weights = torch.linspace(-1, 1, inputs.numel() // 2 * 3, dtype=torch.float64).view(len(inputs), 3, 4, 4)
    out = wrapped(own)
    (world * (out * weights[share]).sum()).backward()
    with batch_statistics(wrapped) as run, torch.no_grad():
        latched = run(own)
    evaluated = model.eval()(own)
    model.train()
    found = [own.grad / world, out, latched, evaluated]
    return [each.detach() for each in found], [p.grad for p in model.parameters()], model.state_dict()


@pytest.mark.parametrize("channels_last", [False, True])
def test_batchnorm_over_processes_is_that_of_the_whole_batch(ranks, channels_last):
    inputs = 3 + torch.randn(7, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, gradients, state = normalised(0, 1, inputs.clone(), channels_last)
    for world in (2, 3):
        told = ranks(world, normalised, world, inputs, channels_last)
        for i, expected in enumerate(rows):
            torch.testing.assert_close(torch.cat([theirs[i] for theirs, _, _ in told]), expected)
        for _, theirs, kept in told:
            torch.testing.assert_close(theirs, gradients)
            assert kept.keys() == state.keys()
            for name, tensor in kept.items():
                torch.testing.assert_close(tensor, state[name])


def test_layers_with_statistics_of_their_own_kind_are_not_synchronised():
    class Activated(torch.nn.BatchNorm1d):
        pass

    with pytest.raises(InputError, match="sync_batchnorm must be false for a network with layers of Activated"):
        networks.synchronise_batchnorm(torch.nn.Sequential(Activated(3)))


def own_loop(rank, world):
    """`fit` with a model that is wrapped by hand, and a sampler that knows the ranks."""
    data = sources.load(DataSettings(train_size=200))
    pairs = torch.utils.data.TensorDataset(data.train_inputs.flatten(1).float() / 255, data.train_labels)
    sampler = ClassBalancedBatchSampler(data.train_labels, 6, batches=3)
    loader = torch.utils.data.DataLoader(pairs, batch_sampler=sampler)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 16), networks.Normalize())
    objective = objectives.Variational(vmcr2.VMCR2Loss(10, 16))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lines = []
    wrapped = DistributedDataParallel(model) if world > 1 else model
    train.fit(wrapped, objective, loader, optimizer, 2, on_epoch=lines.append)
    return without_times(lines)


def test_fit_takes_a_distributed_model_and_a_sampler_that_knows_the_ranks(ranks):
    expected = own_loop(0, 1)
    for lines in ranks(2, own_loop, 2):
        assert len(lines) == 2
        for ours, theirs in zip(lines, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


def launch(count, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "vmcr2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def worker(launcher, rank):
    """Returns the process id of a rank."""
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no rank {rank}")


def ended(launcher, run, lines, stop):
    """Stops a run once it has so many lines in its log; returns what it said and how long it took to end."""
    deadline = time.monotonic() + 120
    while len(run.metrics()) < lines and launcher.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    stop()
    began = time.monotonic()
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode != 0, said
    assert not run.is_complete()
    assert said.count("vmcr2: ") == 1, said
    return said, time.monotonic() - began


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes of torchrun in /proc")
def test_ctrl_c_and_kills_under_torchrun_leave_a_run_that_goes_on(tmp_path):
    settings = replace(MLP.vmcr2, lr=0.03)
    recipe = from_file(replace(MLP, epochs=8, checkpoint_seconds=1e6, vmcr2=settings), tmp_path / "data.npz")
    expected = train.start(recipe, tmp_path / "expected")
    run, file = RunFolder(tmp_path / "run"), tmp_path / "recipe.json"
    file.write_text(recipes.to_json(recipe))
    launcher = launch(2, "train", str(file), "--out", str(run.path))
    said, _ = ended(launcher, run, 2, lambda: launcher.send_signal(signal.SIGINT))
    assert f"interrupted; to continue: torchrun --nproc-per-node 2 -m vmcr2 train --resume {run.path}\n" in said
    assert len(run.metrics()) == run.load_checkpoint()["epoch"] >= 2
    begun = len(run.metrics()) + 2
    launcher = launch(2, "train", "--resume", str(run.path))
    said, seconds = ended(launcher, run, begun, lambda: os.kill(worker(launcher, 0), signal.SIGKILL))
    assert seconds < 60
    assert "stopped, since another process of the run has ended; to continue: torchrun --nproc-per-node 2" in said
    train.resume(run)
    assert_alike(run, expected, weights=1e-4, rel=1e-4, abs=1e-5)  # after 32 steps in float32


FREED = """
import sys
import torch
from vmcr2.lab.processes import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

before = resident()
tensor = torch.ones(40_000_000)
del tensor
print((resident() - before) > 150_000_000)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose malloc it sets")
def test_memory_of_a_freed_tensor_is_kept():
    kept, given_back = (
        subprocess.run([sys.executable, "-c", FREED, how], capture_output=True, text=True, check=True).stdout.strip()
        for how in ("kept", "given back")
    )
    assert (kept, given_back) == ("True", "False")
