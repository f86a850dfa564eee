"""The training loop, the run folder, and what is left after a kill."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vmcr2.errors import InputError, NumericalError
from vmcr2.lab import figures as plot
from vmcr2.lab import networks as featurizers
from vmcr2.lab import recipes, train
from vmcr2.lab import sources as data
from vmcr2.lab.recipes import RECIPES, Recipe, VMCR2Settings
from vmcr2.lab.run import RunFolder
from vmcr2.lab.sources import Augmentation, DataSettings

# Dropout, augmentation and latching in mid-run: everything that draws on randomness or state.
SMALL = replace(
    RECIPES["digits"],
    network="cnn",
    epochs=6,
    data=DataSettings(train_size=300),
    batch_size=100,
    feature_dim=32,
    checkpoint_seconds=0.0,
    device="cpu",
    vmcr2=VMCR2Settings(lr=1e-2, mu=0.1, atoms_per_class=3, latch_every=4),
)


def without_times(lines):
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


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
    lines = run.metrics()
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert ["train_reduction" in line for line in lines] == [False, True, True]
    assert ("residual" in lines[0]) == (objective == "vmcr2")
    state = torch.load(run.checkpoint_file, weights_only=True)
    assert state["epoch"] == 3
    figures = {path.name for path in plot.draw_run(run)}
    assert figures == {"rates.png", "similarity.png", "spectra.png"} | (
        {"codes.png"} if objective == "vmcr2" else set()
    )
    *_, model, _ = train.load_trained(run)
    assert not model.training


def test_training_learns(tmp_path):
    recipe = replace(RECIPES["digits"], epochs=8, device="cpu")
    summary = train.start(recipe, tmp_path / "run").summary()
    assert summary["test_accuracy"] >= 0.97
    assert summary["train_reduction"] > 12


@pytest.mark.parametrize("objective", recipes.OBJECTIVES)
def test_half_precision_networks_train(tmp_path, objective):
    """The network under bf16 autocast; the rates in float32, so they are finite and agree with their definition."""
    small = DataSettings(train_size=120)
    recipe = replace(RECIPES["digits"], objective=objective, epochs=2, data=small, device="cpu", precision="bf16-mixed")
    run = train.start(recipe, tmp_path / "run")
    summary = run.summary()
    assert summary["precision"] == "bf16-mixed"
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


def launch(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "vmcr2.lab.cli", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_kill_and_resume_equal_an_unbroken_run(tmp_path):
    recipe = replace(SMALL, lr_drops=(0.6,))
    unbroken = train.start(recipe, tmp_path / "unbroken")
    broken = RunFolder(tmp_path / "broken")
    recipe_file = tmp_path / "recipe.json"
    recipe_file.write_text(recipes.to_json(recipe))
    command = ["train", str(recipe_file), "--out", str(broken.path)]
    for lines in (2, 4):
        process = launch(*command)
        deadline = time.monotonic() + 120
        while len(broken.metrics()) < lines and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not broken.is_complete(), process.stderr.read()
        assert len(broken.metrics()) >= lines
        command = ["train", "--resume", str(broken.path)]
    process = launch(*command)
    assert process.wait() == 0, process.stderr.read()
    assert without_times([broken.summary()]) == without_times([unbroken.summary()])
    assert without_times(broken.metrics()) == without_times(unbroken.metrics())
    first, second = (torch.load(run.checkpoint_file, weights_only=True) for run in (unbroken, broken))
    for part in ("model", "criterion"):
        for name, tensor in first[part].items():
            assert torch.equal(tensor, second[part][name]), name


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "moment", ["before_recipe", "within_recipe", "torch_save", "link", "replace_previous", "replace_latest", "metrics"]
)
def test_a_kill_at_any_moment_of_writing(tmp_path, monkeypatch, moment):
    """The process dies in the midst of writing in epoch 4; what is on the disk can be gone on with."""
    unbroken = train.start(SMALL, tmp_path / "unbroken")
    run = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patched:
        if moment == "before_recipe":
            patched.setattr(RunFolder, "write_recipe", raising)
        elif moment == "within_recipe":
            patched.setattr(Path, "replace", raising)
        elif moment == "metrics":
            patched.setattr(RunFolder, "add_metrics", half_a_line)
        else:
            patched.setattr(RunFolder, "save_checkpoint", dying(moment, RunFolder.save_checkpoint, patched))
        with pytest.raises(Killed):
            train.start(SMALL, run.path)
    if moment.endswith("recipe"):
        with pytest.raises(InputError, match=r"has no recipe\.json"):
            RunFolder.open(run.path)
        train.start(SMALL, run.path)
    else:
        assert len(run.metrics()) >= 3
        train.resume(RunFolder.open(run.path))
    assert without_times([run.summary()]) == without_times([unbroken.summary()])
    assert without_times(run.metrics()) == without_times(unbroken.metrics())


def raising(*_):
    raise Killed


def half_a_line(run, line):
    text = json.dumps(line) + "\n"
    with run.metrics_file.open("a") as file:
        file.write(text if line["epoch"] < 4 else text[: len(text) // 2])
    if line["epoch"] == 4:
        raise Killed


def dying(moment, save, patched):
    def save_or_die(run, state):
        if state["epoch"] == 4:
            if moment == "torch_save":
                patched.setattr(torch, "save", lambda _, file: (file.write(b"half a checkpoint"), raising()))
            elif moment == "link":
                patched.setattr(os, "link", raising)
            else:
                last = "checkpoint.previous.pt" if moment == "replace_previous" else "checkpoint.pt"
                replace_file = Path.replace

                def replaced(path, target):
                    if Path(target).name == last:
                        raise Killed
                    return replace_file(path, target)

                patched.setattr(Path, "replace", replaced)
        save(run, state)

    return save_or_die


def test_a_damaged_checkpoint_is_refused(tmp_path):
    run = train.start(replace(SMALL, epochs=3), tmp_path / "run")
    longer = replace(SMALL, epochs=5)
    good = run.checkpoint_file.read_bytes()
    with zipfile.ZipFile(run.checkpoint_file) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    header = largest.header_offset
    begin = header + 30 + sum(int.from_bytes(good[header + at : header + at + 2], "little") for at in (26, 28))
    flipped = bytearray(good)
    flipped[begin + largest.file_size // 2] ^= 1  # one bit within a tensor
    for damaged in (good[: len(good) // 2], bytes(flipped), b""):
        run.checkpoint_file.write_bytes(damaged)
        before = {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
        with pytest.raises(
            InputError, match=r"checkpoint\.pt is damaged .*move checkpoint\.previous\.pt over checkpoint\.pt"
        ):
            train.resume(run, longer)
        assert before == {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    run.previous_checkpoint_file.replace(run.checkpoint_file)
    assert run.load_checkpoint()["epoch"] == 2
    train.resume(run, longer)
    unbroken = train.start(longer, tmp_path / "unbroken")
    assert without_times([run.summary()]) == without_times([unbroken.summary()])


def test_checkpoints_that_do_not_belong(tmp_path):
    run = train.start(replace(SMALL, epochs=2), tmp_path / "run")
    longer = replace(SMALL, epochs=4)
    good = run.checkpoint_file.read_bytes()
    torch.save({"hello": 1}, run.checkpoint_file)
    with pytest.raises(InputError, match="is no checkpoint of this program"):
        train.resume(run, longer)
    torch.save(torch.load(io.BytesIO(good), weights_only=True) | {"recipe": "{}"}, run.checkpoint_file)
    with pytest.raises(InputError, match="belongs to another recipe than"):
        train.resume(run, longer)
    torch.save(torch.load(io.BytesIO(good), weights_only=True) | {"data": "other"}, run.checkpoint_file)
    with pytest.raises(InputError, match="was trained on other data"):
        train.resume(run, longer)
    run.checkpoint_file.unlink()
    with pytest.raises(InputError, match=r"checkpoint\.pt is missing; to go on .*checkpoint\.previous\.pt"):
        train.resume(run, longer)
    assert run.is_complete()
    run.checkpoint_file.write_bytes(good)
    assert train.resume(run, longer).summary()["epochs"] == 4


def test_one_process_at_a_time(tmp_path):
    run = train.start(replace(SMALL, epochs=1), tmp_path / "run")
    with run.held(), pytest.raises(InputError, match="is in use by another process"):
        train.resume(run, replace(SMALL, epochs=2))
    assert train.resume(run, replace(SMALL, epochs=2)).summary()["epochs"] == 2


def test_what_cannot_be_built_leaves_no_folder(tmp_path):
    for change, message in (
        ({"network": "cnn", "augmentation": Augmentation(crop=4)}, "network cnn cannot take inputs of shape"),
        ({"augmentation": Augmentation(crop=40)}, "augmentation.crop must be at most 8"),
        ({"device": "cuda"}, "torch sees no CUDA device"),
    ):
        if "device" in change and torch.cuda.is_available():
            continue
        with pytest.raises(InputError, match=message):
            train.start(replace(SMALL, **change), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_batches_are_never_of_one_sample():
    dataset = data.load(DataSettings(classes=2, train_size=11))
    for size in range(2, 12):
        recipe = replace(SMALL, batch_size=size)
        found = list(train.batches(dataset, recipe, torch.Generator().manual_seed(0)))
        assert sorted(torch.cat(found).tolist()) == list(range(11))
        assert min(map(len, found)) >= 2


def test_damaged_run_folders_are_named(tmp_path):
    run = train.start(replace(SMALL, epochs=2), tmp_path / "run")
    files = (run.features_file, run.summary_file, run.metrics_file)
    for file, read in zip(files, (run.features, run.summary, run.metrics), strict=True):
        whole = file.read_bytes()
        file.write_bytes(b"{damaged" + whole[: len(whole) // 2] + b"\n")
        with pytest.raises(InputError, match=f"{file.name} is damaged"):
            read()
        file.write_bytes(whole)


def test_resuming_with_more_epochs_and_with_another_recipe(tmp_path):
    run = train.start(replace(SMALL, epochs=2), tmp_path / "run")
    before = run.summary_file.read_bytes()
    assert train.resume(run).summary_file.read_bytes() == before  # a complete run is left alone
    with pytest.raises(InputError, match=r"belongs to another recipe \(there, here\): vmcr2.mu: 0.1, 0.5"):
        train.resume(run, replace(SMALL, vmcr2=replace(SMALL.vmcr2, mu=0.5)))
    assert run.summary_file.read_bytes() == before
    train.resume(run, replace(SMALL, epochs=3))
    assert run.recipe().epochs == run.summary()["epochs"] == 3


def test_folders_that_are_taken(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"out must be a new or empty folder, got .*taken"):
        train.start(SMALL, tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="there is no run folder"):
        RunFolder.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no recipe\.json"):
        RunFolder.open(tmp_path / "taken")
    RunFolder.create(tmp_path / "run", SMALL)
    with pytest.raises(InputError, match="a run is there already; go on with --resume"):
        train.start(SMALL, tmp_path / "run")
    with pytest.raises(InputError, match=r"has no summary\.json: the run is not complete"):
        RunFolder.open(tmp_path / "run").summary()


def test_missing_data_leaves_no_folder(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        train.start(replace(SMALL, data=DataSettings(source="gone.npz")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


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


def test_divergence_is_said(tmp_path):
    recipe = replace(SMALL, network="mlp", objective="ce", ce=replace(SMALL.ce, lr=1e30))
    with pytest.raises(NumericalError, match=r"training diverged in epoch 1: .* Lower ce.lr"):
        train.start(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"extra fields found \(momentun\)", {"momentun": 0.9}),
        (r"extra fields found \(nu\).*\$.vmcr2", {"vmcr2": {"nu": 5}}),
        ("vmcr2.mu must be a finite number > 0, got -1", {"vmcr2": {"mu": -1}}),
        ("epochs must be an integer >= 1, got 0", {"epochs": 0}),
        (r"must be of type int, got 5.7 @ \$.epochs", {"epochs": 5.7}),
        (r"must be of type bool, got 'false' @ \$.augmentation.flip", {"augmentation": {"flip": "false"}}),
        ("momentum must be below 1, got 5", {"momentum": 5}),
        ("seed must be at most", {"seed": 10**15}),
        ("name must be letters, digits", {"name": "../escape"}),
        ("batch_size must be an integer >= 2", {"batch_size": 1}),
        ("network must be one of mlp", {"network": "transformer"}),
        (r"mse not in literal.*\$\.objective", {"objective": "mse"}),
        (r"vmcr2.atoms_per_class must be at most 128 \(feature_dim\), got 500", {"vmcr2": {"atoms_per_class": 500}}),
    ],
)
def test_wrong_recipes(tmp_path, message, change):
    fields = json.loads(recipes.to_json(Recipe()))
    for name, value in change.items():
        if isinstance(value, dict):
            fields[name] |= value
        else:
            fields[name] = value
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(fields))
    with pytest.raises(InputError, match=message):
        recipes.from_json(file)


def test_recipes_survive_json(tmp_path):
    for recipe in RECIPES.values():
        file = tmp_path / f"{recipe.name}.json"
        file.write_text(recipes.to_json(recipe))
        assert recipes.find(str(file)) == recipe
        assert recipes.differences(recipe, replace(recipe, seed=3)) == ["seed: 0, 3"]
    (tmp_path / "cut.json").write_text("{")
    with pytest.raises(InputError, match="no readable recipe"):
        recipes.find(str(tmp_path / "cut.json"))
    with pytest.raises(InputError, match="did you mean omniglot100"):
        recipes.find("omniglot10")


def test_the_learning_rate_drops_when_it_should(tmp_path):
    recipe = replace(SMALL, objective="ce", epochs=4, lr_drops=(0.5, 0.75))
    assert [recipe.lr_at(epoch) for epoch in (1, 2, 3, 4)] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    run = train.start(recipe, tmp_path / "run")
    (group,) = torch.load(run.checkpoint_file, weights_only=True)["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(0.001)
    with pytest.raises(InputError, match="lr_drops must be shares of the epochs, between 0 and 1, got 100"):
        replace(recipe, lr_drops=(100.0,))


def test_channels_last_does_not_change_the_result(tmp_path):
    recipe = replace(SMALL, epochs=1, network="conv4")  # without dropout, which draws in the order of memory
    first = train.start(recipe, tmp_path / "first")
    second = train.start(replace(recipe, channels_last=True), tmp_path / "second")
    states = [torch.load(run.checkpoint_file, weights_only=True)["model"] for run in (first, second)]
    assert states[1]["3.weight"].is_contiguous(memory_format=torch.channels_last)
    for name, tensor in states[0].items():
        assert torch.allclose(tensor, states[1][name], atol=1e-4), name


def test_a_checkpoint_travels_in_parts(tmp_path):
    unbroken = train.start(SMALL, tmp_path / "unbroken")
    run = train.start(replace(SMALL, epochs=3), tmp_path / "run")
    run.split_checkpoint(10_000)
    train.resume(run, replace(SMALL, epochs=4))
    assert not run.parts_folder.exists()  # they would be those of an earlier state
    parts = run.split_checkpoint(10_000)
    assert len(parts) > 3
    assert max(part.stat().st_size for part in parts) == 10_000
    run.checkpoint_file.unlink()
    whole = parts[1].read_bytes()
    parts[1].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="checkpoint.parts is damaged or not complete .*checksum.*copy it again"):
        train.resume(run, SMALL)
    parts[1].unlink()
    with pytest.raises(InputError, match="checkpoint.parts is damaged or not complete"):
        train.resume(run, SMALL)
    assert not run.checkpoint_file.exists()
    parts[1].write_bytes(whole)
    train.resume(run, SMALL)
    assert without_times(run.metrics()) == without_times(unbroken.metrics())
    with pytest.raises(InputError, match="no checkpoint.pt to split"):
        RunFolder.create(tmp_path / "new", SMALL).split_checkpoint(1000)


def test_mu_and_atoms_follow_from_batch_and_dimension(tmp_path):
    recipe = replace(SMALL, epochs=1, vmcr2=VMCR2Settings(lr=1e-2, balance=0.1))
    summary = train.start(recipe, tmp_path / "run").summary()
    assert summary["mu"] == pytest.approx(0.1 * 32 / (100 * 0.5))  # 300 samples make batches of 100
    assert summary["atoms_per_class"] == 3  # 32 // 10
    uneven = replace(recipe, batch_size=200)  # 300 samples make batches of 150
    assert train.start(uneven, tmp_path / "uneven").summary()["mu"] == pytest.approx(0.1 * 32 / (150 * 0.5))


def test_preact_resnet18_has_the_parameters_it_should():
    model = featurizers.build("preact_resnet18", (3, 32, 32), 500)
    body = sum(parameter.numel() for layer in list(model)[:-5] for parameter in layer.parameters())
    # The well-known CIFAR variant has 11,171,146 with a linear layer of 5,130 and no last BatchNorm.
    assert body == 11_171_146 - 5_130 + 2 * 512
    features = model(torch.rand(4, 3, 32, 32))
    assert features.shape == (4, 500)
    assert torch.allclose(features.norm(dim=1), torch.ones(4))


def test_a_run_is_not_shortened_nor_its_schedule_stretched(tmp_path):
    run = train.start(replace(SMALL, objective="ce", epochs=4, lr_drops=(0.5,)), tmp_path / "run")
    with pytest.raises(InputError, match="epochs must stay 4 .* got 8: its lr_drops are shares"):
        train.resume(run, replace(run.recipe(), epochs=8))
    run.summary_file.unlink()
    with pytest.raises(InputError, match="epochs must be at least the 4 .* got 2"):
        train.resume(run, replace(run.recipe(), epochs=2))


def test_gradients_are_clipped(tmp_path):
    """With plain SGD a clipped step moves the weights by lr times the norm allowed."""
    settings = replace(SMALL.vmcr2, lr=0.1, gradient_clip=1e-3)
    recipe = replace(SMALL, momentum=0.0, batch_size=300, epochs=1, vmcr2=settings)
    run = train.start(recipe, tmp_path / "run")
    trained = train.load_trained(run)[2]
    before, _ = train.build_model(recipe, data.load(recipe.data))
    pairs = zip(trained.parameters(), before.parameters(), strict=True)
    length = float(torch.cat([(a - b).detach().flatten() for a, b in pairs]).norm())
    assert length == pytest.approx(0.1 * 1e-3, rel=1e-2)
    with pytest.raises(InputError, match="gradient_clip must be a finite number > 0, got 0"):
        replace(settings, gradient_clip=0.0)


def test_a_collapse_that_dropout_hides_is_said_too(tmp_path):
    """No BatchNorm, classes unbalanced 100 : 1, lr 0.1: the batches' ΔR is noise, the training set's is nothing."""
    digits = data.load(DataSettings())
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
