"""The settings that `ablation.py` runs: data sets, and studies that change one thing at a time on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vmcr2.data import Augmentation, DataSettings
from vmcr2.recipes import RECIPES, CESettings, MCR2Settings, Recipe, VMCR2Settings

BASES: dict[str, Recipe] = {
    "digits": RECIPES["digits"],
    "omniglot100": RECIPES["omniglot100"],
    "omniglot200": replace(
        RECIPES["omniglot100"], name="omniglot200", feature_dim=400, data=DataSettings(source="omniglot", classes=200)
    ),
    "mnist5000": Recipe(
        name="mnist5000",
        epochs=15,
        batch_size=500,
        network="cnn",
        feature_dim=128,
        momentum=0.0,
        data=DataSettings(source="mnist", train_size=5000),
        augmentation=Augmentation(crop=32, padding=4),
        vmcr2=VMCR2Settings(lr=1e-3, mu=1.0, atoms_per_class=20),
        mcr2=MCR2Settings(lr=1e-2),
        ce=CESettings(lr=1e-1),
    ),
}

STUDIES: dict[str, dict[str, Any]] = {
    "ce-grid": {
        "about": "The baseline's learning rate: cross-entropy on omniglot100.",
        "base": "omniglot100",
        "objective": "ce",
        "seeds": [0, 1, 2],
        "rows": [{"lr": lr} for lr in (0.1, 0.3, 0.6, 1.0, 2.0)],
    },
}
