"""A recipe at the size of a test, its data in a file, and how to compare its runs."""

from dataclasses import replace

import numpy as np

from vmcr2.lab import sources
from vmcr2.lab.recipes import RECIPES, VMCR2Settings
from vmcr2.lab.sources import DataSettings

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
    vmcr2=VMCR2Settings(lr=0.1, atoms_per_class=3, latch_every=4),
)


def from_file(recipe, path):
    """Writes the data of a recipe to a file, so that a process need not import scikit-learn for it."""
    data = sources.load(recipe.data)
    train, test = ((data.train_inputs, data.train_labels), (data.test_inputs, data.test_labels))
    (x_train, y_train), (x_test, y_test) = (tuple(each.numpy() for each in part) for part in (train, test))
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return replace(recipe, data=DataSettings(source=str(path)))


def without_times(lines):
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]
