"""The training loop and the runs around it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from small import SMALL

import vmcr2
from vmcr2.errors import InputError, NumericalError
from vmcr2.lab import figures, networks, objectives, recipes, sources, train
from vmcr2.lab.augmentation import Augmentation
from vmcr2.lab.evaluate import accuracy_by_components, extract
from vmcr2.lab.recipes import RECIPES
from vmcr2.lab.run import RunFolder
from vmcr2.lab.sources import DataSettings
from vmcr2.lab.trained import load


@pytest.mark.parametrize("objective", recipes.OBJECTIVES)
def test_a_run_leaves_what_it_promises(tmp_path, objective):
    recipe = replace(SMALL, objective=objective, epochs=3, evaluate_every=2)
    run = train.start(recipe, tmp_path / "run")
    assert run.recipe() == recipe
    summary = run.summary()
    expected = "recipe objective seed epochs train_reduction train_expansion train_compression test_accuracy"
    for name in [*expected.split(), "head_accuracy", "seconds_per_epoch", "device", "torch"]:
        assert name in summary
    assert summary["train_reduction"] == pytest.approx(
        summary["train_expansion"] - summary["train_compression"], rel=1e-4
    )
    assert (summary["head_accuracy"] is None) == (objective != "ce")
    assert 0 < summary["test_accuracy"] <= 1
    dataset = sources.load(recipe.data)
    features = extract(load(run).model, dataset, recipe.augmentation, 500)
    assert summary["test_accuracy_one_component"] == accuracy_by_components(features, dataset, [1])[1]
    ranks = vmcr2.report(features.train, dataset.train_labels).class_ranks
    assert summary["class_rank"] == pytest.approx(np.quantile(ranks, 0.5, method="lower"), rel=1e-3)
    lines = run.metrics()
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert ["train_reduction" in line for line in lines] == [False, True, True]
    assert ("residual" in lines[0]) == (objective == "vmcr2")
    state = torch.load(run.checkpoint_file, weights_only=True)
    assert state["epoch"] == 3
    drawn = {path.name for path in figures.draw_run(run)}
    expected = {"rates.png", "similarity.png", "spectra.png", "confusion.png"}
    assert drawn == expected | ({"codes.png"} if objective == "vmcr2" else set())
    assert summary["evaluated_on"] == "test"


def test_subspaces_larger_than_a_class_are_warned_of(tmp_path):
    pixels, labels = load_digits(return_X_y=True)
    rows = np.concatenate([np.flatnonzero(labels == 0)[:40], np.flatnonzero(labels == 1)[:4]])
    arrays = {"features": pixels[rows] / 16, "labels": labels[rows]}
    np.savez(tmp_path / "two.npz", **arrays, x_test=arrays["features"], y_test=arrays["labels"])
    data = DataSettings(source=str(tmp_path / "two.npz"))
    recipe = replace(SMALL, network="mlp", epochs=1, data=data, batch_size=22, augmentation=Augmentation())
    with pytest.warns(UserWarning, match="1 of 2 classes have fewer .* 16 dimensions .* vmcr2 evaluate shows"):
        train.start(recipe, tmp_path / "run")


def test_training_learns(tmp_path):
    recipe = replace(RECIPES["digits"], epochs=8, device="cpu")
    summary = train.start(recipe, tmp_path / "run").summary()
    assert summary["test_accuracy"] >= 0.97
    assert summary["train_reduction"] > 12


@pytest.mark.parametrize("objective", recipes.OBJECTIVES)
def test_half_precision_networks_train(tmp_path, objective):
    """The network under bf16 autocast; the rates in float32, so they are finite and agree with their definition."""
    small = DataSettings(train_size=120)
    recipe = replace(RECIPES["digits"], objective=objective, epochs=2, data=small, device="cpu", precision="bf16")
    run = train.start(recipe, tmp_path / "run")
    summary = run.summary()
    assert summary["precision"] == "bf16"
    assert 0 < summary["train_compression"] < summary["train_expansion"]
    state = torch.load(run.checkpoint_file, weights_only=True)
    assert all(tensor.dtype != torch.bfloat16 for tensor in state["model"].values())


def test_embeddings_train_too(tmp_path):
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(3, 16))
    y = np.arange(120) % 3
    x = centres[y] + 0.3 * generator.normal(size=(120, 16))
    np.savez(tmp_path / "e.npz", x_train=x[:90], y_train=y[:90], x_test=x[90:], y_test=y[90:])
    source = DataSettings(source=str(tmp_path / "e.npz"))
    recipe = replace(SMALL, network="mlp", data=source, batch_size=45, epochs=10)
    assert train.start(recipe, tmp_path / "run").summary()["test_accuracy"] > 0.9


def test_what_cannot_be_built_leaves_no_folder(tmp_path):
    for change, message in (
        (
            {"network": "cnn", "augmentation": Augmentation(crop=4)},
            "network cnn cannot take inputs of shape \\(1, 4, 4\\)",
        ),
        ({"augmentation": Augmentation(crop=40)}, "augmentation.crop must be at most 8"),
        ({"device": "cuda"}, "torch sees no CUDA device"),
    ):
        if "device" in change and torch.cuda.is_available():
            continue
        with pytest.raises(InputError, match=message):
            train.start(replace(SMALL, **change), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_batches_are_never_of_one_sample():
    dataset = sources.load(DataSettings(classes=2, train_size=11))
    for size in range(2, 12):
        recipe = replace(SMALL, batch_size=size)
        batches = train.EpochBatches(dataset, recipe, 1)
        labels = [labels for _, labels in batches]
        assert len(labels) == len(batches)
        assert sorted(torch.cat(labels).tolist()) == sorted(dataset.train_labels.tolist())
        assert min(map(len, labels)) >= 2


class Counting(objectives.Objective):
    """Squared distance to a fixed target a class, with a count of what `fit` asks for."""

    def __init__(self):
        super().__init__(torch.nn.MSELoss(), 2)
        self.criterion.forward = lambda z, y: (z - torch.eye(2)[y]).square().mean()
        self.asked = []

    def before_epoch(self, epoch, model, batches):
        self.asked.append((epoch, len(list(batches))))

    def log(self, features, labels):
        return {"largest": float(features.max())}

    def check(self, history):
        if history[-1]["epoch"] == 3:
            raise NumericalError("enough")


def test_fit_takes_any_objective_and_any_iterable_of_batches():
    torch.manual_seed(0)
    model, objective, seen = torch.nn.Linear(2, 2), Counting(), []
    pairs = torch.utils.data.TensorDataset(torch.eye(2).repeat(8, 1), torch.arange(2).repeat(8))
    loader = torch.utils.data.DataLoader(pairs, batch_size=4)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    with pytest.raises(NumericalError, match="training diverged in epoch 3: enough. Lower the learning rate."):
        train.fit(model, objective, loader, optimizer, 9, on_epoch=seen.append)
    assert objective.asked == [(1, 4), (2, 4), (3, 4)]
    assert [set(line) for line in seen] == [{"epoch", "loss", "largest", "seconds"}] * 3
    assert seen[2]["loss"] < seen[0]["loss"]
    with pytest.raises(InputError, match="must give at least one batch per epoch"):
        train.fit(model, Counting(), iter(()), optimizer, 1)


class Stream(torch.utils.data.IterableDataset):
    """Samples that come from somewhere one by one, a part of them in each worker."""

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        for i in range(worker.id, 12, worker.num_workers):
            yield torch.eye(2)[i % 2], i % 2


@pytest.mark.parametrize(
    ("epochs", "bare", "message"),
    [
        (-1, False, "epochs must be"),
        (2.5, False, "epochs must be"),
        (1, True, "objective must be an Objective, got VMCR2Loss; a VMCR2Loss goes in"),
    ],
)
def test_fit_refuses_what_is_no_number_of_epochs_and_no_objective(epochs, bare, message):
    model, loss = torch.nn.Linear(4, 4), vmcr2.VMCR2Loss(2, 4)
    with pytest.raises(InputError, match=message):
        train.fit(
            model, loss if bare else objectives.Variational(loss), [], torch.optim.SGD(model.parameters(), 0.1), epochs
        )


def test_fit_takes_batches_that_do_not_fit_in_memory():
    """Workers, a sampler that is told the epoch, a stream without a length, a generator function."""
    labels = torch.arange(24) % 2
    pairs = torch.utils.data.TensorDataset(torch.eye(2)[labels], labels)
    sampler, drawn = vmcr2.ClassBalancedBatchSampler(labels, 3), []
    monitored = torch.utils.data.DataLoader(pairs, batch_sampler=sampler, num_workers=2)

    def seen(_, __, ___):
        drawn.append(sampler.epoch)

    for batches, count in (
        (monitored, 4),
        (torch.utils.data.DataLoader(Stream(), batch_size=3, num_workers=2), 4),
        (lambda epoch: ((torch.eye(2), torch.arange(2)) for _ in range(epoch)), None),
    ):
        torch.manual_seed(0)
        model, objective, lines = torch.nn.Linear(2, 2), Counting(), []
        model.register_forward_hook(seen)
        train.fit(model, objective, batches, torch.optim.SGD(model.parameters(), 0.1), 2, on_epoch=lines.append)
        assert objective.asked == [(1, count or 1), (2, count or 2)]
        assert lines[1]["loss"] < lines[0]["loss"]
    assert drawn[:8] == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("batches", "lr_at", "message"),
    [
        (torch.utils.data.DataLoader(Stream(), batch_size=3), lambda _: 0.1, "must have a length if lr_at is given"),
        ([{"pixel_values": torch.eye(2), "labels": torch.arange(2)}], None, "got a dict of 'pixel_values', 'labels'"),
        ([(torch.eye(2), torch.arange(2), torch.ones(2))], None, r"got a tuple of 3; take the two out"),
        ([torch.eye(2)], None, r"batches must give pairs \(inputs, labels\), got a Tensor"),
        ([(torch.eye(2), [0, 1])], None, r"pairs \(inputs, labels\) of tensors, got labels of type list"),
        ([(torch.ones(2), 1)], None, "got those of one sample; wrap a Dataset in a DataLoader"),
        (
            torch.utils.data.TensorDataset(torch.eye(2), torch.arange(2)),
            None,
            r"labels of shape \(m,\) or \(m, k\), got those of one sample; wrap a Dataset in a DataLoader",
        ),
    ],
)
def test_batches_that_fit_cannot_take(batches, lr_at, message):
    model = torch.nn.Linear(2, 2)
    optimizer, objective = torch.optim.SGD(model.parameters(), 1.0), Counting()
    objective.before_epoch = lambda *_: None
    with pytest.raises(InputError, match=message):
        train.fit(model, objective, batches, optimizer, 1, lr_at=lr_at)


def test_wrong_labels_are_no_divergence():
    objective = objectives.Objective(vmcr2.MCR2Loss(2), 2)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), networks.Normalize())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(InputError, match=r"labels must lie in \[0, 2\)"):
        train.fit(model, objective, [(torch.eye(2), torch.tensor([0, 7]))], optimizer, 1)


def test_weights_that_the_last_step_spoils_are_no_silent_nan():
    class Cusp(torch.nn.Module):
        """Finite where its argument is 0, with a gradient that is not."""

        def forward(self, features, labels):
            return (features - features.detach()).abs().sqrt().sum()

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), networks.Normalize())
    optimizer, objective = torch.optim.SGD(model.parameters(), 0.1), objectives.Objective(Cusp(), 2)
    with pytest.raises(NumericalError, match="diverged in epoch 1: the network's weights are no longer finite"):
        train.fit(model, objective, [(torch.eye(2), torch.tensor([0, 1]))], optimizer, 1)


def test_every_line_reaches_the_hook(tmp_path):
    seen = []
    run = train.start(replace(SMALL, epochs=2), tmp_path / "run", on_epoch=seen.append)
    assert seen == run.metrics()
    train.resume(run, replace(SMALL, epochs=3), on_epoch=seen.append)
    assert [line["epoch"] for line in seen] == [1, 2, 3]
    assert seen == run.metrics()


def test_paths_may_be_text(tmp_path):
    run = train.start(replace(SMALL, epochs=1), str(tmp_path / "run"), str(tmp_path))
    assert RunFolder.open(str(run.path)).is_complete()


def test_a_validation_share_takes_the_place_of_the_test_set(tmp_path):
    recipe = replace(SMALL, epochs=1, data=DataSettings(train_size=300, validation=0.2))
    summary = train.start(recipe, tmp_path / "run").summary()
    assert summary["evaluated_on"] == "validation"


def test_a_crop_that_shrinks_an_image_warns(tmp_path):
    recipe = replace(SMALL, epochs=1, network="mlp", augmentation=Augmentation(crop=6))
    with pytest.warns(UserWarning, match="crop 6 is smaller than the images of 8×8"):
        train.start(recipe, tmp_path / "run")


def test_missing_data_leaves_no_folder(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        train.start(replace(SMALL, data=DataSettings(source="gone.npz")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_divergence_is_said(tmp_path):
    recipe = replace(SMALL, network="mlp", objective="ce", ce=replace(SMALL.ce, lr=1e30))
    with pytest.raises(NumericalError, match=r"training diverged in epoch 1: .* Lower ce.lr"):
        train.start(recipe, tmp_path / "run")


def test_a_run_that_ends_without_reduction_says_so(tmp_path):
    recipe = replace(SMALL, network="mlp", epochs=1, mcr2=replace(SMALL.mcr2, lr=1e6), objective="mcr2")
    with pytest.warns(UserWarning, match="the network has learnt almost nothing"):
        train.start(recipe, tmp_path / "run")


def test_the_learning_rate_follows_its_schedule_step_by_step(tmp_path):
    recipe = replace(SMALL, objective="ce", epochs=4, schedule="cosine", warmup_epochs=2)
    run = train.start(recipe, tmp_path / "run")
    (group,) = torch.load(run.checkpoint_file, weights_only=True)["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(recipe.lr_at(4 - 0.5 / 3))  # the last of three steps
    model, rates = torch.nn.Linear(2, 2), []
    objective = objectives.Objective(torch.nn.CrossEntropyLoss(), 2)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    batches = [(torch.eye(2), torch.arange(2))] * 2
    train.fit(model, objective, batches, optimizer, 2, lr_at=lambda epoch: epoch)
    assert rates == [0.25, 0.75, 1.25, 1.75]


def test_channels_last_does_not_change_the_result(tmp_path, monkeypatch):
    # Without dropout, which draws in the order of memory, and a single step, before rounding grows.
    recipe = replace(SMALL, epochs=1, batch_size=300, network="conv4")
    first = train.start(recipe, tmp_path / "first")
    monkeypatch.setattr(networks, "channels_last", lambda model: model)
    second = train.start(recipe, tmp_path / "second")
    states = [torch.load(run.checkpoint_file, weights_only=True)["model"] for run in (first, second)]
    assert states[0]["3.weight"].is_contiguous(memory_format=torch.channels_last)
    for name, tensor in states[0].items():
        assert torch.allclose(tensor, states[1][name], atol=1e-4), name


def test_gradients_are_clipped(tmp_path):
    """With plain SGD a clipped step moves the weights by lr times the norm allowed."""
    settings = replace(SMALL.vmcr2, lr=0.1, gradient_clip=1e-3)
    recipe = replace(SMALL, momentum=0.0, batch_size=300, epochs=1, vmcr2=settings)
    run = train.start(recipe, tmp_path / "run")
    trained = load(run).model
    before, _ = train.build(recipe, (1, 8, 8), 10)
    pairs = zip(trained.parameters(), before.parameters(), strict=True)
    length = float(torch.cat([(a - b).detach().flatten() for a, b in pairs]).norm())
    assert length == pytest.approx(0.1 * 1e-3, rel=1e-2)
    with pytest.raises(InputError, match="gradient_clip must be a finite number > 0, got 0"):
        replace(settings, gradient_clip=0.0)
