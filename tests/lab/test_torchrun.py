"""Training by several processes: the run of one to rounding, whatever their number, and what is left when one dies."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import SMALL, without_times
from torch.nn.parallel import DistributedDataParallel

import vmcr2
from vmcr2.errors import InputError
from vmcr2.lab import networks, objectives, processes, recipes, sources, train
from vmcr2.lab.run import RunFolder
from vmcr2.lab.sources import DataSettings
from vmcr2.sampling import ClassBalancedBatchSampler

# 301 samples: batches of 76, 75, 75, 75, which neither two nor three processes share equally.
UNEVEN = replace(SMALL, epochs=3, data=DataSettings(train_size=301), vmcr2=replace(SMALL.vmcr2, latch_every=2))
MLP = replace(UNEVEN, network="mlp", sync_batchnorm=True)
CONV4 = replace(UNEVEN, network="conv4", sync_batchnorm=True, epochs=1)
RUNS = {
    "vmcr2 with dropout": UNEVEN,
    "vmcr2 with BatchNorm": MLP,
    "vmcr2 with BatchNorm, channels last": CONV4,
    "mcr2": replace(MLP, objective="mcr2"),
    "ce": replace(MLP, objective="ce"),
}


def started(rank, recipe, path):
    """Trains a recipe as one of several processes; returns what each of them was told and left with."""
    told = []
    run = train.start(recipe, path, on_epoch=told.append)
    return len(told), run.summary()["test_accuracy"]


def resumed(rank, recipe, path):
    train.resume(RunFolder.open(path), recipe)


def assert_alike(run, expected, **tolerances):
    for ours, theirs in zip(without_times(run.metrics()), without_times(expected.metrics()), strict=True):
        assert {name for name, value in ours.items() if value is None} <= {"head_accuracy"}
        assert {**ours, "head_accuracy": ours["head_accuracy"] or 0} == pytest.approx(
            {**theirs, "head_accuracy": theirs["head_accuracy"] or 0}, **tolerances
        )
    states = [torch.load(each.checkpoint_file, weights_only=True) for each in (run, expected)]
    assert states[0]["model"].keys() == states[1]["model"].keys()
    for name, tensor in states[0]["model"].items():
        torch.testing.assert_close(tensor, states[1]["model"][name], rtol=1e-3, atol=1e-4)
    assert torch.equal(states[0]["rng"], states[1]["rng"])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_two_and_of_three_processes_is_that_of_one(ranks, tmp_path, name):
    expected = train.start(RUNS[name], tmp_path / "1")
    for world in (2, 3):
        told = ranks(world, started, RUNS[name], tmp_path / str(world))
        assert [epochs for epochs, _ in told] == [RUNS[name].epochs] + [0] * (world - 1)
        run = RunFolder.open(tmp_path / str(world))
        assert run.summary()["processes"] == world
        for a, b in zip(run.metrics(), expected.metrics()):
            print(world, max(abs(a[k]-b[k])/max(abs(b[k]),1e-3) for k in a if b[k] is not None and "seconds" not in k))
        assert_alike(run, expected, rel=1e-4)
