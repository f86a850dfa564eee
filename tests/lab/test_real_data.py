"""Short runs on the real data sets, where they are present."""

import math
from dataclasses import replace

import pytest

from vmcr2.lab import train
from vmcr2.lab.augmentation import Augmentation
from vmcr2.lab.recipes import RECIPES, Recipe, VMCR2Settings
from vmcr2.lab.sources import DataSettings
from vmcr2.lab.trained import load


def test_omniglot_many_classes_few_samples(data_root, tmp_path):
    base = RECIPES["omniglot100"]
    data = replace(base.data, classes=40)
    recipe = replace(base, epochs=12, batch_size=100, feature_dim=80, evaluate_every=12, device="cpu", data=data)
    variational = train.start(recipe, tmp_path / "vmcr2", data_root).summary()
    exact = train.start(replace(recipe, objective="mcr2"), tmp_path / "mcr2", data_root).summary()
    assert variational["test_accuracy"] > 0.8
    # The paper's central claim at the size of a laptop: exact MCR² expands and never compresses.
    assert exact["test_accuracy"] < 0.5
    assert variational["train_compression"] < 0.75 * exact["train_compression"]


@pytest.mark.parametrize(
    ("source", "classes", "network", "channels"), [("mnist", 2, "cnn", 1), ("cifar100", 10, "resnet18", 3)]
)
def test_the_papers_networks_on_their_data(data_root, tmp_path, source, classes, network, channels):
    """Architectures 1 and 2 at the paper's input size; two epochs of a subset, to see that they run and stay finite."""
    recipe = Recipe(
        name=source,
        epochs=2,
        batch_size=100,
        network=network,
        feature_dim=128,
        evaluate_every=2,
        device="cpu",
        data=DataSettings(source=source, classes=classes, train_size=300),
        augmentation=Augmentation(crop=32, padding=8 if channels == 1 else 4, flip=True),
        vmcr2=VMCR2Settings(atoms_per_class=5),
    )
    run = train.start(recipe, tmp_path / "run", data_root)
    if network == "cnn":
        assert load(run).model[7].in_features == 12544
    summary = run.summary()
    measured = ("train_expansion", "train_compression", "train_reduction", "test_accuracy", "class_rank")
    assert all(math.isfinite(summary[name]) for name in measured)
    assert summary["train_reduction"] > 0
