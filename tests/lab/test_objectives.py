"""What surrounds each criterion: latching, clipping, logs, and the notice of a collapse."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small import SMALL

import vmcr2
from vmcr2.errors import NumericalError
from vmcr2.lab import sources, train
from vmcr2.lab.recipes import RECIPES, VMCR2Settings
from vmcr2.lab.run import RunFolder
from vmcr2.lab.sources import DataSettings


def test_collapse_is_said_and_what_to_change(tmp_path):
    """µ m ε²/d near 6: ΔR falls to nothing within an epoch or two; at a tenth of µ the same run makes progress."""
    recipe = replace(RECIPES["digits"], epochs=12, batch_size=1437, device="cpu")
    heavy = replace(recipe, vmcr2=VMCR2Settings(lr=1e-2, mu=1.0, atoms_per_class=20))
    with pytest.raises(
        NumericalError, match=r"the features have collapsed: ΔR .* is 5.6; .* Lower vmcr2.lr or vmcr2.mu"
    ):
        train.start(heavy, tmp_path / "heavy")
    assert len(RunFolder(tmp_path / "heavy").metrics()) < 12
    patient = replace(heavy, vmcr2=replace(heavy.vmcr2, stop_on_collapse=False))
    assert len(train.start(patient, tmp_path / "patient").metrics()) == 12
    light = replace(recipe, vmcr2=VMCR2Settings(lr=1e-2, mu=0.1, atoms_per_class=20))
    metrics = train.start(light, tmp_path / "light").metrics()
    assert metrics[-1]["train_reduction"] > 1.5 * metrics[0]["train_reduction"]


def test_a_collapse_that_dropout_hides_is_said_too(tmp_path):
    """No BatchNorm, classes unbalanced 100 : 1, lr 0.1: the batches' ΔR is noise, the training set's is nothing."""
    digits = sources.load(DataSettings())
    kept = [(digits.train_labels == j).nonzero()[: round(143 * 100 ** (-j / 9)), 0] for j in range(10)]
    rows = torch.cat(kept)
    arrays = {"x_train": digits.train_inputs[rows, 0], "y_train": digits.train_labels[rows]}
    arrays |= {"x_test": digits.test_inputs[:, 0], "y_test": digits.test_labels}
    np.savez(tmp_path / "data.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})
    settings = VMCR2Settings(lr=0.1, energy=1.6)
    source = DataSettings(source=str(tmp_path / "data.npz"))
    recipe = replace(RECIPES["digits"], network="cnn", epochs=12, data=source, device="cpu", vmcr2=settings)
    with pytest.raises(NumericalError, match=r"ΔR of the training set fell .* set vmcr2.gradient_clip to 0.1"):
        train.start(recipe, tmp_path / "stopped")
    clipped = replace(recipe, vmcr2=replace(settings, gradient_clip=0.1))
    assert train.start(clipped, tmp_path / "clipped").summary()["train_reduction"] > 0.1


def test_atoms_follow_from_dimension_and_the_paper_scale_from_mu(tmp_path):
    recipe = replace(SMALL, epochs=1, vmcr2=VMCR2Settings(lr=0.1))
    run = train.start(recipe, tmp_path / "run")
    assert run.summary()["atoms_per_class"] == 3  # 32 // 10
    assert run.summary()["mu"] is None
    # In batches of 100 ρ = 0.05 is µ = 0.05 · 32 / (100 · 0.5); steps of µ m times lr are then the same.
    mu = 0.05 * 32 / (100 * 0.5)
    summed = VMCR2Settings(lr=0.1 / (mu * 100), mu=mu, reduction="sum")
    other = train.start(replace(recipe, vmcr2=summed), tmp_path / "sum")
    assert other.summary()["mu"] == mu
    assert other.summary()["train_reduction"] == pytest.approx(run.summary()["train_reduction"], rel=1e-3)
    assert other.metrics()[0]["residual"] == pytest.approx(run.metrics()[0]["residual"], rel=1e-3)


def test_latching_is_due_in_the_first_epoch_and_every_so_many(tmp_path, monkeypatch):
    latched = []
    latch_from = vmcr2.VMCR2Loss.latch_from
    monkeypatch.setattr(
        vmcr2.VMCR2Loss, "latch_from", lambda loss, *given: (latched.append(1), latch_from(loss, *given))[1]
    )
    run = train.start(replace(SMALL, epochs=6), tmp_path / "run", on_epoch=lambda _: latched.append(0))
    assert latched == [1, 0, 0, 0, 0, 1, 0, 0]  # latch_every is 4
    assert run.is_complete()
