"""A recipe at the size of a test, and how to compare its runs."""

from dataclasses import replace

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


def without_times(lines):
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]
