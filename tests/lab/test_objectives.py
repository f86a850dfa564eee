"""What surrounds each criterion: latching, clipping, logs, and the notice of a collapse."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small import SMALL

import vmcr2
from vmcr2.errors import NumericalError
from vmcr2.lab import objectives, train
from vmcr2.lab.recipes import RECIPES, VMCR2Settings
from vmcr2.lab.run import RunFolder


def test_cross_entropy_is_of_scaled_features():
    recipe = replace(SMALL, objective="ce", ce=replace(SMALL.ce, scale=10.0))
    head = objectives.build(recipe, 5).criterion.double()
    z = torch.nn.functional.normalize(torch.randn(7, recipe.feature_dim, dtype=torch.float64), dim=1)
    y = torch.arange(7) % 5
    weight, bias = head.linear.weight.detach().numpy(), head.linear.bias.detach().numpy()
    logits = 10 * z.numpy() @ weight.T + bias
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.log(shares[np.arange(7), y.numpy()]).mean()
    assert head(z, y).item() == pytest.approx(expected, rel=1e-12)
    assert head.predict(z).tolist() == logits.argmax(1).tolist()


def test_collapse_is_said_and_what_to_change(tmp_path):
    """µ m ε²/d near 6: ΔR falls to nothing within an epoch or two; at a tenth of µ the same run makes progress."""
    recipe = replace(RECIPES["digits"], epochs=20, batch_size=1437, device="cpu")
    paper = VMCR2Settings(lr=1e-2, reduction="sum", mu=1.0, atoms_per_class=20, step="paper")
    heavy = replace(recipe, vmcr2=paper)
    with pytest.raises(
        NumericalError, match=r"the features have collapsed: ΔR .* is 5.6: .* Lower vmcr2.lr or vmcr2.mu"
    ):
        train.start(heavy, tmp_path / "heavy")
    assert len(RunFolder(tmp_path / "heavy").metrics()) < 20
    patient = replace(heavy, vmcr2=replace(heavy.vmcr2, stop_on_collapse=False))
    assert len(train.start(patient, tmp_path / "patient").metrics()) == 20
    light = replace(recipe, vmcr2=replace(paper, mu=0.1))
    metrics = train.start(light, tmp_path / "light").metrics()
    assert metrics[-1]["train_reduction"] > 1.5 * metrics[0]["train_reduction"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gradient_clip", -1.0),
        ("gradient_clip", 0.0),
        ("latch_every", 0),
        ("expand_epochs", 0),
        ("stop_on_collapse", "no"),
    ],
)
def test_wrong_settings_of_the_variational_objective_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        objectives.Variational(vmcr2.VMCR2Loss(4, 16), **{name: value})


def test_a_collapse_names_the_balance_of_the_loss_itself_also_on_resuming():
    """Whatever its settings say, which another loss may be given with; before a batch was seen, too."""
    loss = vmcr2.VMCR2Loss(4, 16, mu=1.0)
    objective = objectives.Variational(loss)
    with pytest.raises(NumericalError, match=r"feature_dim is 3.1"):
        objective.check(lines([1.0] + [0.01] * 60, [1.0] * 61))
    assert objective.describe()["mu"] == 1.0


def lines(batches, sets):
    """Log lines with these ΔR of the batches, and of the training set."""
    pairs = enumerate(zip(batches, sets, strict=True), 1)
    return [
        {
            "epoch": i,
            "batch_size": 100,
            "batch_expansion": 2.0 + batch,
            "batch_compression": 2.0,
            "residual": 1.0,
            "train_expansion": 2.0 + whole,
            "train_compression": 2.0,
        }
        for i, (batch, whole) in pairs
    ]


def test_a_collapse_is_told_from_a_dip():
    settings = VMCR2Settings(gradient_clip=0.02)
    objective = objectives.build(replace(SMALL, vmcr2=settings), 10)
    objective.check(lines([5] + 9 * [0.1] + [2], [5] + 9 * [0.1] + [2]))  # it recovers
    objective.check(lines([5] + 9 * [0.1], [5] + 9 * [0.1]))  # too early to say
    fallen = lines([5] + 10 * [0.9], [5] + 10 * [3])
    with pytest.raises(NumericalError, match=r"ΔR of the batches fell from 5 to 0.9 for good") as said:
        objective.check(fallen)
    assert "mu" not in str(said.value)  # ρ is 0.05, which is no reason
    # Dropout's noise keeps the batches up, the training set has none.
    with pytest.raises(NumericalError, match="ΔR of the training set fell from 5 to 0.1 for good"):
        objective.check(lines([5] + 10 * [3], [5] + 10 * [0.1]))
    objective.check(lines([5] + 10 * [3], [5] + 10 * [0.6]))  # the set's is above a tenth
    with pytest.raises(NumericalError, match="ΔR of the training set"):  # five times are enough
        objective.check(lines([5] + 10 * [3], [5] + 5 * [3] + 5 * [0.1]))
    patient = objectives.build(replace(SMALL, vmcr2=replace(settings, stop_on_collapse=False)), 10)
    patient.check(fallen)
    assert objective.cure == "Lower vmcr2.lr or vmcr2.balance"
    assert patient.gradient_clip == 0.02


def test_atoms_follow_from_dimension(tmp_path):
    run = train.start(replace(SMALL, epochs=1, vmcr2=VMCR2Settings(lr=0.1)), tmp_path / "run")
    assert run.summary()["atoms_per_class"] == 3  # 32 // 10
    assert run.summary()["mu"] is None


def test_the_sum_and_the_mean_take_the_same_steps_at_rates_that_differ_by_mu_m(tmp_path):
    mu = 0.05 * 32 / (100 * 0.5)
    mean = VMCR2Settings(lr=0.1, mu=mu)
    summed = VMCR2Settings(lr=0.1 / (mu * 100), mu=mu, reduction="sum")
    runs = [train.start(replace(SMALL, epochs=1, vmcr2=kind), tmp_path / kind.reduction) for kind in (mean, summed)]
    one, other = (run.summary()["train_reduction"] for run in runs)
    assert one == pytest.approx(other, rel=1e-3)
    assert runs[0].metrics()[0]["residual"] == pytest.approx(runs[1].metrics()[0]["residual"], rel=1e-3)


def test_latching_is_due_in_the_first_epoch_and_every_so_many(tmp_path, monkeypatch):
    latched = []
    latch_from = vmcr2.VMCR2Loss.latch_from
    monkeypatch.setattr(
        vmcr2.VMCR2Loss, "latch_from", lambda loss, *given: (latched.append(1), latch_from(loss, *given))[1]
    )
    run = train.start(replace(SMALL, epochs=6), tmp_path / "run", on_epoch=lambda _: latched.append(0))
    assert latched == [1, 0, 0, 0, 0, 1, 0, 0]  # latch_every is 4
    assert run.is_complete()


def test_expansion_ends_at_its_share_of_the_epochs_also_on_resuming(tmp_path, monkeypatch):
    expand = []
    forward = vmcr2.VMCR2Loss.forward
    monkeypatch.setattr(
        vmcr2.VMCR2Loss, "forward", lambda loss, *given: (expand.append(loss.expand), forward(loss, *given))[1]
    )
    recipe = replace(SMALL, epochs=4, vmcr2=replace(SMALL.vmcr2, expand=0.3, expand_until=0.5))
    whole = train.start(recipe, tmp_path / "whole")
    steps = len(expand) // 4
    assert expand == 2 * steps * [0.3] + 2 * steps * [0.0]
    expand.clear()

    def stop(line):
        if line["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.start(recipe, tmp_path / "broken", on_epoch=stop)
    resumed = train.resume(RunFolder(tmp_path / "broken"))
    assert expand == 2 * steps * [0.3] + 2 * steps * [0.0]
    assert resumed.summary()["train_reduction"] == whole.summary()["train_reduction"]
    with pytest.raises(ValueError, match="epochs must stay 4 for .* got 8: its expansion depends"):
        train.resume(whole, replace(recipe, epochs=8))
    assert recipe.expand_epochs == 2
    assert replace(recipe, vmcr2=replace(recipe.vmcr2, expand_until=0.01)).expand_epochs == 1
    assert replace(recipe, epochs=5).expand_epochs == 3
    hundred = replace(recipe, epochs=100)
    for percent in (1, 7, 28, 29, 55, 57):  # whose products with 100 lie beside a whole number in floating point
        assert replace(hundred, vmcr2=replace(recipe.vmcr2, expand_until=percent / 100)).expand_epochs == percent
    assert replace(hundred, vmcr2=replace(recipe.vmcr2, expand_until=1e-12)).expand_epochs == 1
    for objective, expand, until in (("vmcr2", 0.3, 1), ("vmcr2", 0.0, 0.5), ("ce", 0.3, 0.5)):
        settings = replace(recipe.vmcr2, expand=expand, expand_until=until)
        assert not replace(recipe, objective=objective, vmcr2=settings).tied_to_epochs  # more may be given later


def test_expansion_assigned_during_training_counts_until_its_end():
    objective = objectives.Variational(vmcr2.VMCR2Loss(4, 16, expand=0.2), latch_every=9, expand_epochs=2)
    batches = [(torch.nn.functional.normalize(torch.randn(8, 16), dim=1), torch.arange(8) % 4)]
    seen = []
    for epoch in (1, 2, 3):
        objective.before_epoch(epoch, torch.nn.Identity(), batches)
        seen.append(objective.loss.expand)
        if epoch == 1:
            objective.loss.expand = 0.4
    assert seen == [0.2, 0.4, 0.0]
